"""Export sizes of a run: flags, files, weights, graphs, the size that fits a limit, and the installed package."""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import serving
import train
from benchmarks import deploy
from common.errors import InputError
from datasets.catalog import load_catalog
from experiments.figures import card_table
from model import slice_model
from serving import export, recommend
from serving.folder import GRAPHS, WEIGHTS, read_folder
from serving.packaging import runtime_modules
from serving.torch_engine import serving_weights
from serving.weights import dequantize, quantize
from tests.made_up import random_model, write_export, write_plane
from tests.prepared import contents, write_metadata, write_prepared
from trainer.load_run import load_run
from trainer.runs import commit

REPOSITORY = Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SIZES, ITEMS = (4, 8, 16), 30
TINY = "--dataset_code tiny --num_epochs 1 --lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --lru_max_len 6 --device cpu"
BY_TEXT = "--language_encoder lexical --no-use_img_encoder --mrl_hidden_sizes 4,8,16"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """The working folder of these tests, with data/tiny prepared; item 2 has no title."""
    folder = tmp_path_factory.mktemp("home")
    records = [{"asin": f"B{i:09d}", "title": f"Thé &amp; Lamp {i}", "brand": f"Nº{i}"} for i in range(1, ITEMS + 1)]
    del records[1]["title"]
    write_metadata(write_prepared(folder / "data", "tiny", users=30, items=ITEMS), records)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(home):
    """The absolute path of a trained run."""
    return home / train.main(shlex.split(f"{TINY} {BY_TEXT}"))


@pytest.fixture
def copy(run, tmp_path):
    """A run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "runs" / run.name))


def run_export(run, flags=""):
    return export.main(["--run", str(run), *shlex.split(flags)])


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_a_run_is_exported_without_its_dataset_as_with_it(run, copy, monkeypatch, tmp_path, home):
    monkeypatch.chdir(tmp_path)  # there are no data here
    assert run_export(run) == [Path("exports/tiny-16")]
    assert config_of(Path("exports/tiny-16"))["size"] == 16
    (copy / "table.safetensors").unlink()  # as of a run of an earlier version
    with pytest.raises(InputError, match="give --data_root"):
        run_export(copy, "--out again")
    run_export(copy, f"--data_root {home}/data --out again")
    assert contents(Path("again")) == contents(Path("exports/tiny-16"))


@pytest.mark.parametrize(("flag", "folders"), [("4", ["."]), ("all", SIZES), ("' 8, 4,8'", (8, 4))])
def test_one_size_is_written_to_out_itself_and_several_below_it(run, tmp_path, flag, folders):
    out = tmp_path / "new" / "deep"
    expected = [out if size == "." else out / f"tiny-{size}" for size in folders]
    assert run_export(run, f"--size {flag} --out {out}") == expected
    assert [config_of(f)["size"] for f in expected] == [4 if size == "." else size for size in folders]


def test_the_newest_run_is_the_default_and_another_dataset_is_refused(run, tmp_path, capsys):
    (folder,) = export.main(["--dataset_code", "tiny", "--out", str(tmp_path / "new")])
    assert config_of(folder)["run"] == run.name
    for more, problem in (([], "no run below experiments/runs matches"), (["--run", str(run)], "beauty differs from")):
        with pytest.raises(InputError, match=problem):
            export.main(["--dataset_code", "beauty", *more])
    cut = shutil.copytree(run, tmp_path / "cut")
    (cut / "log.jsonl").write_text("")
    run_export(cut, f"--out {tmp_path / 'another'}")
    assert f"run {cut}, unfinished: epoch 0 of 1" in capsys.readouterr().out


def test_config_describes_the_export_and_the_folder_is_the_same_each_time(run, tmp_path):
    first, second = (run_export(run, f"--size 8 --format onnx --out {tmp_path}/{n}/out")[0] for n in (1, 2))
    files = contents(first)
    assert files == contents(second)
    names = {WEIGHTS, "items.safetensors", *GRAPHS}
    assert files.keys() == {"config.json", "README.md", *names}
    config = config_of(first)
    features = config.pop("features")
    assert config.pop("sha256") and (features["dim"], features["image"]) == (1024, None)
    assert features["language"]["encoder"] == "lexical"
    assert features["language"]["attributes"] == ["title", "price", "brand", "categories"]
    sizes = {"size": 8, "sizes": [4, 8], "num_blocks": 1, "max_len": 6, "num_items": ITEMS}
    hashes = {n: {"bytes": len(files[n]), "sha256": hashlib.sha256(files[n]).hexdigest()} for n in names}
    assert config == {
        **{"format": "fmrlrec-export", "version": 1, "post_norm": False, "quantize": "float16"},
        **sizes,
        "dataset": {"code": "tiny", "digest": load_catalog("data", "tiny").digest()},
        "run": run.name,
        "commit": commit(),
        "metrics": json.loads((run / "test_mrl_metrics.json").read_text())["8"],
        "files": hashes,
    }


@pytest.mark.parametrize("quantize", ["none", "float16", "int8"])
def test_weights_and_items_are_those_of_the_slice_up_to_their_storage(run, tmp_path, quantize):
    (folder,) = run_export(run, f"--size 8 --quantize {quantize} --out {tmp_path / 'out'}")
    found, small = read_folder(folder), slice_model(load_run(run)[2], 8)
    expected = serving_weights(small, quantize == "int8")
    assert found.weights.keys() == expected.keys()
    assert all(found.weights[n].dtype == w.dtype and np.array_equal(found.weights[n], w) for n, w in expected.items())
    table = small.item_table().detach().numpy()
    if quantize == "int8":
        error = abs(dequantize(found.table, found.scale, axis=1) - table)
        assert (error <= abs(table).max(axis=1, keepdims=True) / 127 / 2 * 1.001).all()
    else:
        assert found.scale is None
        np.testing.assert_allclose(found.table, table, rtol=1e-5 if quantize == "none" else 2**-11, atol=1e-7)
    assert [found.items.id(i) for i in range(1, ITEMS + 1)] == load_catalog("data", "tiny").asins
    assert [found.items.title(i) for i in (1, 2, 30)] == ["Thé & Lamp 1", "", "Thé & Lamp 30"]


def test_the_model_card_gives_size_items_encoders_storage_metrics_and_commands(run, copy, tmp_path):
    (folder,) = run_export(run, f"--size 8 --format onnx --quantize int8 --out {tmp_path / 'shop'}")
    text, metrics = (folder / "README.md").read_text(encoding="utf-8"), config_of(folder)["metrics"]
    for part in (
        "\n# tiny, size 8\n",
        "with 8 dimensions",
        "the last 6 items",
        "ranks 30 items",
        run.name,
        "features: lexical. Stored with the item table and the blocks' matrices in int8.\n",
        f"NDCG@10 {metrics['NDCG@10']:.4f}, Recall@10 {metrics['Recall@10']:.4f}",
        f"(commit `{commit()}`)",
        *(f"\n{name} THIS_FOLDER --history ID,ID" for name in ("python -m serving.recommend", "fmrlrec-recommend")),
        *(f"\nfrom {package} import Recommender\n" for package in ("serving", "fmrlrec")),
    ):
        assert part in text
    (copy / "test_mrl_metrics.json").unlink()
    (folder,) = run_export(copy, f"--out {tmp_path / 'out'}")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert config_of(folder)["metrics"] is None and "not tested" in text
    assert "python -m serving.recommend" in text and "fmrlrec-recommend" not in text  # without graphs in a clone only


def test_the_card_and_config_of_a_narrow_table_say_both_widths_among_those_that_were_measured(copy, tmp_path, home):
    flags = f"--size 8 --table_width 4 --format onnx --data_root {home}/data"
    (folder,) = run_export(copy, f"{flags} --out {tmp_path / 'bare'}")
    assert "plane" not in config_of(folder) and "table (columns" not in (folder / "README.md").read_text("utf-8")
    write_plane(copy, SIZES, ITEMS)
    (folder,) = run_export(copy, f"{flags} --out {tmp_path / 'shop'}")
    assert (config_of(folder)["size"], config_of(folder)["table_width"]) == (8, 4)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Ranks vectors of 4 numbers, cut from the 8" in text and "`rank.onnx`, B users, N items, m = 4:" in text
    assert "| encoder | ms | 4 (0.000496 MB) | 8 (0.000992 MB) | 16 (0.00198 MB) |\n" in text
    assert "| 8 | 0.08 | **0.0032** | 0.0064 |  |\n| 16 | 0.16 | 0.0064 | 0.0128 | 0.0256 |\n" in text
    read_folder(folder)
    rows = folder / "rows.safetensors"
    rows.write_bytes(b"0" * rows.stat().st_size)
    with pytest.raises(InputError, match=r"rows.safetensors was altered"):
        read_folder(folder)


def test_recommend_prints_ids_and_titles_best_first(run, tmp_path, capsys):
    (folder,) = run_export(run, f"--out {tmp_path / 'out'}")

    def printed(history, *flags):
        recommend.main([str(folder), "--history", history, *flags])
        return capsys.readouterr().out

    capsys.readouterr()
    history = "B000000001,B000000002"
    answer = json.loads(printed(history, "--top_k", "3", "--json"))
    assert answer["titles"] == [f"Thé & Lamp {number}" for number in answer["numbers"]]
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    rows = zip(answer["scores"], answer["ids"], answer["titles"], strict=True)
    assert [line.split(maxsplit=3) for line in printed(history, "--top_k", "3").splitlines()] == [
        [str(rank), f"{score:.4f}", id, title] for rank, (score, id, title) in enumerate(rows, 1)
    ]
    by_id = printed(history, "--candidates", "B000000003,B000000004", "--json")
    assert by_id == printed("1, 2", "--candidates", "4,3", "--json")
    assert sorted(json.loads(by_id)["numbers"]) == [3, 4]
    with pytest.raises(InputError, match=r"--history 'A B': unknown: 'A B' \(of 30 items\); give ids of this cat"):
        recommend.main([str(folder), "--history", "A B"])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--size 4,5", "--size 5 was not trained; use sizes of 4,8,16, or all"),
        ("--size 8.0", "--size 8.0 was not trained"),
        ("--size 4 --max_bytes 2MB", "give --size, or --max_bytes and --max_latency_ms, not both"),
        ("--size 4,8 --table_width 5", "--table_width 5 must be from 1 to the size, 4"),
        ("--table_width 5 --quantize int8", "not for --quantize int8; use --format onnx or torch, --quantize float16"),
        (
            "--table_width 5 --data_root gone",
            "--table_width needs the validation users of the run's dataset: dataset 'tiny' is not at gone",
        ),
    ],
)
def test_impossible_sizes_are_refused_with_the_trained_ones(run, tmp_path, flags, problem):
    with pytest.raises(InputError, match=problem):
        run_export(run, f"{flags} --out {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_an_existing_export_is_replaced_only_with_overwrite_and_before_any_is_written(run, tmp_path):
    out = tmp_path / "tiny-8"
    run_export(run, f"--size 4 --out {out}")
    before = contents(out)
    for flags in (f"--size 8 --out {out}", f"--size all --out {tmp_path}"):
        with pytest.raises(InputError, match=rf"{out} exists; pass --overwrite"):
            run_export(run, flags)
    assert contents(out) == before
    run_export(run, f"--size 8 --out {out} --overwrite")
    assert read_folder(out).config["size"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-8"]


@pytest.mark.parametrize("precious", ["out", "out/photos/1.jpg", "out/config.json"])
def test_a_path_that_is_not_an_export_is_never_overwritten(run, tmp_path, precious):
    (tmp_path / precious).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / precious).write_text("{}")
    with pytest.raises(InputError, match="out is not an export, so it is not overwritten"):
        run_export(run, f"--out {tmp_path / 'out'} --overwrite")
    assert (tmp_path / precious).read_text() == "{}"


def test_a_table_beyond_float16_or_weights_that_are_not_finite_are_not_exported(run, tmp_path):
    config, catalog, model = load_run(run)
    model.items.projection.weight.data.zero_()

    def table(largest, quantize):
        model.items.projection.bias.data.fill_(largest)
        folder = tmp_path / f"{largest} {quantize}"
        export.export_size(model, 4, folder, config=config, catalog=catalog, run=run, quantize=quantize)
        return read_folder(folder).table

    assert (table(-65504, "float16") == -65504).all() and (table(65505, "none") == 65505).all()
    with pytest.raises(InputError, match="exceeds float16's 65504; export it with --quantize none"):
        table(65505, "float16")
    with pytest.raises(InputError, match=f"the item table of {run} is not finite and cannot be exported"):
        table(np.nan, "int8")
    model.blocks[0].ffn.G.bias.data[0] = torch.nan
    with pytest.raises(InputError, match=r"blocks.0.ffn.expand_bias of .* is not finite"):
        table(0, "int8")


COLUMNS = ("engine", "quantize", "size", "bytes", "p50_ms", "NDCG@10")
CARD = [  # the largest size is not the best
    ("torch", "float16", 4, 1000, 1.0, 0.1),
    ("torch", "float16", 8, 2000, 2.0, 0.3),
    ("torch", "float16", 16, 3000, 0.5, 0.2),
    ("torch", "none", 4, 1000, 1.0, 0.8),
    ("onnx", "float16", 4, 1000, 0.1, 0.9),
    ("onnx", "int8", 16, 500, 0.1, 0.9),
]


@pytest.fixture
def carded(copy):
    """A run with a card."""
    weights = hashlib.sha256((copy / "best.safetensors").read_bytes()).hexdigest()
    card = {"weights": weights, "rows": [dict(zip(COLUMNS, row, strict=True)) for row in CARD]}
    (copy / "deploy.json").write_text(json.dumps(card))
    return copy


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        ("--max_bytes 2000", 8),  # a limit may be reached
        ("--max_latency_ms 1.999", 16),
        ("--max_latency_ms 1.999 --max_bytes 2kB", 4),  # 8 is too slow, 16 too large
        ("--max_bytes 2MB --format onnx --quantize int8", 16),
    ],
)
def test_of_the_sizes_within_the_limits_the_one_with_the_best_ndcg_is_exported(carded, tmp_path, capsys, limits, size):
    (folder,) = run_export(carded, f"{limits} --out {tmp_path / 'out'}")
    assert config_of(folder)["size"] == size
    assert f"size {size}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--max_bytes 999", "no size fits .* size 4 has 1,000 bytes .*that fit: --format onnx --quantize int8"),
        ("--max_bytes 1", "variants that fit: none"),
        ("--max_bytes 1GB --quantize int8", "no --format torch --quantize int8; it has onnx float16, onnx int8, torch"),
        ("--max_bytes=2MiB", "--max_bytes '2MiB' must be a number of bytes such as 2MB"),
    ],
)
def test_limits_that_nothing_measured_fits_are_refused_with_what_does(carded, flags, problem):
    with pytest.raises(InputError, match=problem):
        run_export(carded, flags)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (None, ""),
        ({"rows": ...}, ""),
        ({"rows": [{"size": 4}]}, ""),
        ({"weights": "of another"}, "measured on other weights .* "),
    ],
)
def test_a_missing_damaged_or_outdated_card_is_refused_with_the_command_that_measures(carded, change, problem):
    path = carded / "deploy.json"
    card = json.loads(path.read_text()) | (change or {})
    path.write_text(json.dumps({name: value for name, value in card.items() if value is not ...}))
    if change is None:
        path.unlink()
    with pytest.raises(InputError, match=rf"{problem}measure it: python -m benchmarks.deploy --run {carded}"):
        run_export(carded, "--max_bytes 1GB")


def test_the_card_has_plausible_costs_and_the_metrics_and_bytes_of_every_export(run, home, tmp_path, monkeypatch):
    """The metrics equal the test's as no items tie here: serving ranks the lower number first, the test averages."""
    copy, costs = Path(shutil.copytree(run, tmp_path / run.name)), {}

    def once(exported, engine, histories, true=deploy.measure_in_subprocess):
        if engine not in costs:
            costs[engine] = (deploy.measure if engine == "torch" else true)(exported, engine, histories)
        return costs[engine]

    monkeypatch.setattr(deploy, "measure_in_subprocess", once)
    for name in ("ADDED", "BATCHES"):
        monkeypatch.setattr(deploy, name, 2)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    deploy.main(["--run", str(copy), "--size", "4,16", "--requests", "3", "--catalogue", "1000"])
    card, tested = (json.loads((copy / name).read_text()) for name in ("deploy.json", "test_mrl_metrics.json"))
    assert [(row["size"], row["engine"], row["quantize"]) for row in card["rows"]] == [
        (size, *variant) for size in (4, 16) for variant in deploy.VARIANTS
    ]
    names = "bytes load_s resident_mb peak_mb p50_ms p95_ms step_p50_ms add_10000_s batch256_p50_ms batch256_p95_ms"
    for row in [*card["rows"], card["large_catalogue"] | {"bytes": 1, "engine": "onnx"}]:
        assert all(0 < row[name] < math.inf for name in (*names.split(), "candidates100_p50_ms", "add_1_ms"))
        assert row["resident_mb"] <= row["peak_mb"] and row["p50_ms"] <= row["p95_ms"]
        assert row["torch_imported"] == (row["engine"] == "torch")
    assert all(row["same_top10_as_torch"] >= 0 for row in card["rows"] if row["engine"] == "onnx")
    for row in card["rows"]:
        for name in ("NDCG@10", "Recall@10"):
            exact = (row["engine"], row["quantize"]) == ("torch", "none")
            assert row[name] == pytest.approx(tested[str(row["size"])][name], abs=1e-6 if exact else 0.2)
    assert (card["users"], card["items"], card["sizes"]) == (30, ITEMS, "4,16")
    assert (card["large_catalogue"]["items"], card["large_catalogue"]["size"]) == (1000, 16)
    assert (copy / "deploy.png").read_bytes().startswith(b"\x89PNG")
    assert sum(line.startswith(("| 4 ", "| 16 ")) for line in card_table(card)) == 8

    limit = next(row["bytes"] for row in card["rows"] if row["quantize"] == "int8")
    monkeypatch.chdir(tmp_path)
    flags = f"--max_bytes {limit} --format onnx --quantize int8 --data_root {home}/data"
    assert run_export(copy, flags) == [Path("exports/tiny-4")]
    assert sum(map(len, contents(Path("exports/tiny-4")).values())) == limit
    with pytest.raises(InputError, match=r"--requests 1 must be at least 2"):
        deploy.main(["--run", str(copy), "--requests", "1"])


def test_the_indices_of_synthetic_items_are_measured_and_int8_differs_nowhere():
    found = deploy.main(["--synthetic", "5000", "--size", "16", "--requests", "20"])
    assert found["int8_different"] == 0 and found["faiss_recall"] > 0.9 and found["faiss_p50_ms"] > 0


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_is_off_by_half_a_scale_at_most(axis):
    values = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * np.logspace(-6, 3, 40, dtype="f4")
    q, scale = quantize(values, axis)
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (values.shape[1 - axis],)
    assert np.allclose(scale, abs(values).max(axis=axis) / 127) and (abs(q.astype(int)).max(axis=axis) == 127).all()
    error = abs(dequantize(q, scale, axis) - values)
    assert (error <= np.expand_dims(scale, axis) / 2 * (1 + 1e-4)).all()
    assert error.max() > scale.max() / 4  # the bound is tight
    q, scale = quantize(np.linspace(-1e-45, 1e-45, 9, dtype=np.float32)[None], axis=1)
    assert not q.any() and (scale == 1).all()  # too small to divide by


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_the_graphs_point_to_every_weight_in_the_weights_file_and_hold_no_copy(tmp_path, kind):
    model = random_model((8, 16, 32), num_blocks=2)
    folder = write_export(tmp_path / "out", model, quantize=kind)
    stored, weights = (folder / WEIGHTS).read_bytes(), read_folder(folder).weights
    products = {n for n in weights if ".norm" not in n and not n.endswith("_log") and "projection" not in n}
    for name in GRAPHS:
        onnx.checker.check_model(str(folder / name), full_check=True)
        graph = onnx.load(folder / name, load_external_data=False).graph
        assert {"MatMul", "Gemm"}.isdisjoint(node.op_type for node in graph.node) or kind == "none"
        external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert {t.name for t in external} == (set() if name == "rank.onnx" else products)
        for tensor in external:
            at, weight = {entry.key: entry.value for entry in tensor.external_data}, weights[tensor.name]
            assert at["location"] == WEIGHTS
            assert stored[int(at["offset"]) :][: int(at["length"])] == weight.tobytes()
            assert tuple(tensor.dims) == weight.shape
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) == weight.dtype
        assert all(np.prod(t.dims) < 32 * 32 for t in graph.initializer if t not in external)


SERVE = """
import json, sys
target, folder, products = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, target)
for name in "torch transformers tqdm pandas onnx serving common config datasets model trainer".split():
    sys.modules[name] = None  # cannot be imported
import fmrlrec
from fmrlrec import http
recommender = fmrlrec.Recommender.from_pretrained(folder)
features = recommender.embed_items(products)
recommender.add_items(["NEW1", "NEW2"], features)
[answer] = recommender.recommend([[3, "NEW1"]], top_k=22, exclude_history=False)
try:
    fmrlrec.Recommender.from_pretrained(folder, "torch")
except fmrlrec.InputError as error:
    refused = str(error)
routes = [route.path for route in http.create_app(recommender).app.routes]
print(json.dumps([fmrlrec.__version__, answer.ids, answer.scores, features.tolist(), refused, routes]))
"""


@pytest.mark.slow
def test_the_package_holds_serving_alone_and_answers_without_torch_as_in_the_clone(shop, tmp_path, capsys):
    setuptools = pytest.importorskip("setuptools", "77", reason="building needs setuptools>=77")
    pytest.importorskip("pip", reason="installing needs pip")
    clone, target = tmp_path / "clone", tmp_path / "installed"
    stale = clone / "build/lib/fmrlrec/stale.py"  # left by an earlier build
    stale.parent.mkdir(parents=True)
    stale.touch()
    copied = re.findall(r"^COPY (.+) \S+$", (REPOSITORY / "serving/Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, clone)

    def run_in(folder, *command, **options):
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **options)

    options = ["-q", "--no-deps", "--no-build-isolation", "--target", target]
    done = run_in(clone, sys.executable, "-m", "pip", "install", *options, ".")
    assert done.returncode == 0, f"setuptools {setuptools.__version__}\n{done.stderr}"
    assert {path.name for path in target.iterdir()} == {"fmrlrec", "fmrlrec-0.9.0.dist-info", "bin"}
    files = {str(path.relative_to(target / "fmrlrec")) for path in (target / "fmrlrec").rglob("*.py")}
    assert files >= {"__init__.py", "recommender.py", "recommend.py", "http.py", "engines.py", "common/errors.py"}
    assert not files & {"export.py", "graphs.py", "widths.py", "torch_engine.py", "packaging.py", "stale.py"}
    assert len(files) == len(runtime_modules())

    folder, products = shop.export("float16"), shop.records[:2]
    done = run_in(shop.root, sys.executable, "-I", "-c", SERVE, target, folder, json.dumps(products))
    assert done.returncode == 0, done.stderr
    version, ids, scores, features, refused, routes = json.loads(done.stdout)
    recommender = serving.Recommender.from_pretrained(folder)
    np.testing.assert_array_equal(features, recommender.embed_items(products))
    recommender.add_items(["NEW1", "NEW2"], np.array(features))
    [expected] = recommender.recommend([[3, "NEW1"]], top_k=22, exclude_history=False)
    assert (ids, scores) == (expected.ids, expected.scores)
    assert version == serving.__version__ == PROJECT["version"]
    assert refused.startswith("the torch engine needs torch and a clone of the repository") and "/recommend" in routes
    flags = [str(folder), "--history", "3,17", "--top_k", "4"]
    paths = os.environ | {"PYTHONPATH": str(target)}
    output = run_in(shop.root, target / "bin/fmrlrec-recommend", *flags, env=paths).stdout
    recommend.main(flags)
    assert output == capsys.readouterr().out and len(output.splitlines()) == 4


def test_the_packages_requirements_are_those_of_the_clone():
    extras, required = PROJECT["optional-dependencies"], {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
        required[name] = {line.partition("#")[0].strip() for line in lines}
    assert {*PROJECT["dependencies"], *extras["pictures"], *extras["encoders"]} <= required["requirements.txt"]
    assert set(extras["http"]) <= required["requirements-dev.txt"]
