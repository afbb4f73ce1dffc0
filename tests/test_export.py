"""python -m serving.export and serving.recommend: sizes, folders and their content, and the size that fits a limit."""

import hashlib
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from benchmarks import deploy
from common.errors import InputError
from datasets.catalog import load_catalog
from experiments.deployment import card_table
from model import slice_model
from serving import export, recommend
from serving.convert import serving_weights
from serving.folder import read_folder
from serving.quantize import dequantize
from tests.prepared import contents, write_metadata, write_prepared
from trainer.load_run import load_run
from trainer.runs import commit

REPOSITORY = Path(__file__).parent.parent
SIZES, ITEMS = (4, 8, 16), 30
TINY = "--dataset_code tiny --num_epochs 1 --lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --lru_max_len 6 --device cpu"
BY_TEXT = "--language_encoder lexical --no-use_img_encoder --mrl_hidden_sizes 4,8,16"
BY_NUMBER = "--no-use_language_encoder --no-use_img_encoder --mrl_hidden_sizes 4 --runs_root learned"
GRAPHS = {"recommend.onnx", "step.onnx", "rank.onnx"}
EXPORT = {"config.json", "model.safetensors", "items.safetensors", "README.md"}


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


# -------------------------------------------------------------------------------------------- which run, sizes, folders


def test_a_run_is_exported_without_its_dataset_as_with_it(run, copy, monkeypatch, tmp_path, home):
    monkeypatch.chdir(tmp_path)  # there are no data here
    assert run_export(run) == [Path("exports/tiny-16")]
    assert config_of(Path("exports/tiny-16"))["size"] == 16
    (copy / "table.safetensors").unlink()  # as of a run of an earlier version
    with pytest.raises(InputError, match="give --data_root"):
        run_export(copy, "--out again")
    run_export(copy, f"--data_root {home}/data --out again")
    assert contents(Path("again")) == contents(Path("exports/tiny-16"))


def test_one_size_is_written_to_out_itself(run, tmp_path, capsys):
    out = tmp_path / "new" / "deep" / "small"
    assert run_export(run, f"--size 4 --out {out}") == [out]
    assert config_of(out)["size"] == 4
    total = sum(map(len, contents(out).values()))
    assert f"{out}  size 4, torch, float16: {total / 1e6:.2f} MB" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "sizes"), [("all", SIZES), ("' 8, 4,8'", (8, 4))])
def test_several_sizes_are_written_below_out(run, tmp_path, flag, sizes):
    assert run_export(run, f"--size {flag} --out {tmp_path}") == [tmp_path / f"tiny-{size}" for size in sizes]
    assert [config_of(tmp_path / f"tiny-{size}")["size"] for size in sizes] == list(sizes)


def test_an_export_of_an_unfinished_run_says_so(run, tmp_path, capsys):
    cut = shutil.copytree(run, tmp_path / "cut")
    (cut / "log.jsonl").write_text("")
    run_export(cut, f"--out {tmp_path / 'new'}")
    assert f"run {cut}, unfinished: epoch 0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--dataset_code", "tiny"]])
def test_the_newest_run_of_all_or_of_a_dataset_is_the_default(run, tmp_path, flags):
    (folder,) = export.main([*flags, "--out", str(tmp_path / "new")])
    assert config_of(folder)["run"] == run.name


def test_a_dataset_without_runs_or_of_another_run_is_refused(run):
    with pytest.raises(InputError, match="no run below experiments/runs matches --dataset_code beauty"):
        export.main(["--dataset_code", "beauty"])
    with pytest.raises(InputError, match="--dataset_code beauty differs from"):
        export.main(["--dataset_code", "beauty", "--run", str(run)])


# ------------------------------------------------------------------------------------------------ content of the folder


def test_config_describes_the_export_and_its_origin(run, tmp_path):
    (folder,) = run_export(run, f"--size 8 --out {tmp_path / 'out'}")
    config = config_of(folder)
    catalog = load_catalog("data", "tiny")
    expected = {
        "format": "fmrlrec-export",
        "version": 1,
        "size": 8,
        "sizes": [4, 8],
        "num_blocks": 1,
        "max_len": 6,
        "post_norm": False,
        "num_items": ITEMS,
        "quantize": "float16",
        "dataset": {"code": "tiny", "digest": catalog.digest()},
        "run": run.name,
        "commit": commit(),
        "metrics": json.loads((run / "test_mrl_metrics.json").read_text())["8"],
    }
    assert {name: config[name] for name in expected} == expected
    assert config["features"]["dim"] == 1024 and config["features"]["image"] is None
    assert config["features"]["language"]["encoder"] == "lexical"
    assert config["features"]["language"]["attributes"] == ["title", "price", "brand", "categories"]
    assert set(config) == {*expected, "features", "files", "sha256"}


@pytest.mark.parametrize(("format", "more"), [("torch", set()), ("onnx", GRAPHS)])
def test_the_folder_holds_the_same_bytes_each_time_with_their_checksums(run, tmp_path, format, more):
    first, second = (run_export(run, f"--format {format} --out {tmp_path}/{n}/out")[0] for n in (1, 2))
    files = contents(first)
    assert files == contents(second) and files.keys() == EXPORT | more
    assert config_of(first)["files"] == {
        name: {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in {"model.safetensors", "items.safetensors", *more}
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


def test_the_model_card_gives_size_items_encoders_storage_metrics_and_commands(run, tmp_path):
    (folder,) = run_export(run, f"--size 8 --format onnx --quantize int8 --out {tmp_path / 'shop'}")
    text = (folder / "README.md").read_text(encoding="utf-8")
    metrics = config_of(folder)["metrics"]
    assert text.startswith("# tiny, size 8\n")
    assert "with 8 dimensions" in text and "the last 6 items" in text and "ranks 30 items" in text and run.name in text
    assert "features: lexical. Stored with the item table and the blocks' matrices in int8.\n" in text
    assert f"NDCG@10 {metrics['NDCG@10']:.4f}, Recall@10 {metrics['Recall@10']:.4f}" in text
    assert f"(commit `{commit()}`)" in text
    for line in ("python -m serving.recommend THIS_FOLDER --history", "fmrlrec-recommend THIS_FOLDER --history"):
        assert f"\n{line} ID,ID --top_k 10\n" in text
    assert "\nfrom serving import Recommender\n" in text and "\nfrom fmrlrec import Recommender\n" in text


def test_a_run_that_was_not_tested_is_exported_without_metrics_and_without_graphs_for_a_clone_only(copy, tmp_path):
    (copy / "test_mrl_metrics.json").unlink()
    (folder,) = run_export(copy, f"--out {tmp_path / 'out'}")
    assert config_of(folder)["metrics"] is None
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "not tested" in text
    assert "python -m serving.recommend" in text and "fmrlrec-recommend" not in text


@pytest.fixture(scope="module")
def learned(home):
    """An ONNX export of a run whose items have no features."""
    run = train.main(shlex.split(f"{TINY} {BY_NUMBER}"))
    return run_export(home / run, f"--format onnx --out {home}/learned-4")[0]


def test_a_learned_table_is_exported_without_a_projection(learned):
    found = read_folder(learned)
    assert found.config["features"] == found.config["features"] | {"dim": 0, "language": None, "image": None}
    assert not [name for name in found.weights if name.startswith("projection")]
    assert "features: none, the item table is learned" in (learned / "README.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------- serving.recommend


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_recommend_prints_ids_and_titles_best_first(run, tmp_path, capsys, format):
    (folder,) = run_export(run, f"--format {format} --out {tmp_path / 'out'}")
    capsys.readouterr()
    history = "B000000001,B000000002"
    recommend.main([str(folder), "--history", history, "--top_k", "3"])
    lines = capsys.readouterr().out.splitlines()
    recommend.main([str(folder), "--history", history, "--top_k", "3", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["titles"] == [f"Thé & Lamp {number}" for number in answer["numbers"]]
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    ranked = enumerate(zip(answer["scores"], answer["ids"], answer["titles"], strict=True), 1)
    assert [line.split(maxsplit=3) for line in lines] == [
        [str(rank), f"{score:.4f}", id, title] for rank, (score, id, title) in ranked
    ]
    assert not set(answer["ids"]) & set(history.split(","))


def test_recommend_accepts_numbers_for_ids_and_ranks_only_candidates(run, tmp_path, capsys):
    (folder,) = run_export(run, f"--out {tmp_path / 'out'}")
    answers = []
    for history, candidates in (("B000000001,B000000002", "B000000003,B000000004"), ("1, 2", "4,3")):
        capsys.readouterr()
        recommend.main([str(folder), "--history", history, "--candidates", candidates, "--top_k", "2", "--json"])
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert sorted(answers[0]["numbers"]) == [3, 4]


def test_recommend_refuses_unknown_histories_and_runs_with_a_hint(run, tmp_path):
    (folder,) = run_export(run, f"--out {tmp_path / 'out'}")
    with pytest.raises(InputError, match=r"--history 'A B': unknown: 'A B' \(of 30 items\); give ids of this cat"):
        recommend.main([str(folder), "--history", "A B"])
    with pytest.raises(InputError, match=f"{run} is a run, not an export; .*python -m serving.export --run {run}"):
        recommend.main([str(run)])


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("size", "named"), [("4,5", "5"), ("4,", "''"), ("8.0", "8.0")])
def test_a_size_that_was_not_trained_is_refused_with_the_trained_ones(run, tmp_path, size, named):
    with pytest.raises(InputError, match=rf"--size {named} was not trained; use sizes of 4,8,16, or all"):
        run_export(run, f"--size {size} --out {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_size_and_a_limit_together_are_refused(run):
    with pytest.raises(InputError, match="give --size, or --max_bytes and --max_latency_ms, not both"):
        run_export(run, "--size 4 --max_bytes 2MB")


def test_an_existing_export_is_replaced_only_with_overwrite(run, tmp_path):
    out = tmp_path / "out"
    run_export(run, f"--size 4 --out {out}")
    before = contents(out)
    with pytest.raises(InputError, match=rf"{out} exists; pass --overwrite"):
        run_export(run, f"--size 8 --out {out}")
    assert contents(out) == before
    run_export(run, f"--size 8 --out {out} --overwrite")
    assert read_folder(out).config["size"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_size_is_written_if_the_folder_of_one_exists(run, tmp_path):
    (tmp_path / "tiny-16").mkdir()
    with pytest.raises(InputError, match="tiny-16 exists"):
        run_export(run, f"--size all --out {tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-16"]


@pytest.mark.parametrize("precious", ["out", "out/photos/1.jpg", "out/config.json"])
def test_what_is_not_an_export_is_never_overwritten(run, tmp_path, precious):
    (tmp_path / precious).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / precious).write_text("{}")
    with pytest.raises(InputError, match="out is not an export, so it is not overwritten"):
        run_export(run, f"--out {tmp_path / 'out'} --overwrite")
    assert (tmp_path / precious).read_text() == "{}"


def test_a_table_beyond_float16_is_refused_unless_it_is_stored_in_float32(run, tmp_path):
    config, catalog, model = load_run(run)
    model.items.projection.weight.data.zero_()

    def table(largest, quantize):
        model.items.projection.bias.data.fill_(largest)
        folder = tmp_path / f"{largest} {quantize}"
        export.export_size(model, 4, folder, config=config, catalog=catalog, run=run, quantize=quantize)
        return read_folder(folder).table

    assert (table(-65504, "float16") == -65504).all()
    assert (table(65505, "none") == 65505).all()
    with pytest.raises(InputError, match="exceeds float16's 65504; export it with --quantize none"):
        table(65505, "float16")


@pytest.mark.parametrize(
    ("name", "named"),
    [("items.projection.bias", "the item table"), ("blocks.0.ffn.G.bias", "blocks.0.ffn.expand_bias")],
)
def test_weights_that_are_not_finite_are_not_exported(run, tmp_path, name, named):
    config, catalog, model = load_run(run)
    with torch.no_grad():
        model.get_parameter(name)[0] = torch.nan
    with pytest.raises(InputError, match=f"{named} of {run} is not finite and cannot be exported; train it again"):
        export.export_size(model, 4, tmp_path / "out", config=config, catalog=catalog, run=run, quantize="int8")
    assert not (tmp_path / "out").exists()


def test_a_refusal_is_one_line_without_traceback(tmp_path):
    command = [sys.executable, "-m", "serving.export", "--run", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere/config.json does not exist")
    assert len(done.stderr.splitlines()) == 1


# ----------------------------------------------------------------------------------------------- the size that fits

CARD = [  # engine, quantize, size, bytes, ms, NDCG@10; the largest size is not the best
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
    names = ("engine", "quantize", "size", "bytes", "p50_ms", "NDCG@10")
    rows = [dict(zip(names, row, strict=True)) for row in CARD]
    weights = hashlib.sha256((copy / "best.safetensors").read_bytes()).hexdigest()
    (copy / "deploy.json").write_text(json.dumps({"weights": weights, "rows": rows}))
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
        ("--max_bytes 999", "no size fits as --format torch --quantize float16; size 4 has 1,000 bytes and 1.00 ms; "
         "variants that fit: --format onnx --quantize int8"),
        ("--max_bytes 1", "variants that fit: none"),
        ("--max_bytes 1GB --quantize int8", "deploy.json has no --format torch --quantize int8; it has onnx float16, "
         "onnx int8, torch float16, torch none"),
        ("--max_bytes=2MiB", "--max_bytes '2MiB' must be a number of bytes such as 2MB"),
    ],
)  # fmt: skip
def test_limits_that_nothing_measured_fits_are_refused_with_what_does(carded, flags, problem):
    with pytest.raises(InputError, match=problem):
        run_export(carded, flags)


def test_a_card_of_other_weights_is_refused(carded):
    with (carded / "best.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"measured on other weights than the run has now; measure it: python -m"):
        run_export(carded, "--max_bytes 1GB")


@pytest.mark.parametrize("card", [None, "[]", "{}", '{"weights": "SHA", "rows": [{"size": 4}]}'])
def test_a_missing_or_damaged_card_is_refused_with_the_command_that_measures(carded, card):
    if card is None:
        (carded / "deploy.json").unlink()
    else:
        sha = hashlib.sha256((carded / "best.safetensors").read_bytes()).hexdigest()
        (carded / "deploy.json").write_text(card.replace("SHA", sha))
    with pytest.raises(InputError, match=rf"measure it: python -m benchmarks.deploy --run {carded}"):
        run_export(carded, "--max_bytes 1GB")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1000000", 1e6), (" 2 mb ", 2e6), ("1.5k", 1500), ("3G", 3e9)],
)
def test_bytes_are_read_with_their_unit(text, value):
    assert export.parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e6", "2,5MB"])
def test_what_is_not_a_number_of_bytes_is_refused(text):
    with pytest.raises(InputError, match=rf"--max_bytes '{text}' must be a number of bytes such as 2MB"):
        export.parse_bytes(text)


# ------------------------------------------------------------------------------------------------- the measured card


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    """A run with a measured card; each engine and storage is timed once, for all sizes."""
    copy, costs = Path(shutil.copytree(run, tmp_path_factory.mktemp("measured") / run.name)), {}

    def once(exported, engine, histories, true=deploy.measure_in_subprocess):
        kind = engine, config_of(exported)["quantize"]
        if kind not in costs:
            costs[kind] = true(exported, engine, histories)
        return costs[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy, "measure_in_subprocess", once)
        deploy.main(["--run", str(copy), "--size", "4,16", "--requests", "3", "--catalogue", "1000"])
    return copy


def test_the_card_has_a_row_of_plausible_numbers_for_every_size_and_variant(measured):
    card = json.loads((measured / "deploy.json").read_text())
    assert [(row["size"], row["engine"], row["quantize"]) for row in card["rows"]] == [
        (size, *variant) for size in (4, 16) for variant in deploy.VARIANTS
    ]
    costs = ("bytes", "load_s", "resident_mb", "peak_mb", "p50_ms", "p95_ms", "step_p50_ms", "add_10000_s")
    costs += ("batch256_p50_ms", "batch256_p95_ms", "candidates100_p50_ms", "add_1_ms")
    for row in [*card["rows"], card["large_catalogue"] | {"bytes": 1}]:
        assert all(row[name] > 0 and math.isfinite(row[name]) for name in costs)
        assert row["resident_mb"] <= row["peak_mb"]
        assert row["p50_ms"] <= row["p95_ms"] and row["batch256_p50_ms"] <= row["batch256_p95_ms"]
    assert all(0 <= row[name] <= 1 for row in card["rows"] for name in ("NDCG@10", "Recall@10", "same_top10"))
    for row in [*card["rows"], card["large_catalogue"] | {"engine": "onnx"}]:
        assert row["torch_imported"] == (row["engine"] == "torch")
    assert all((row["same_top10_as_torch"] >= 0) for row in card["rows"] if row["engine"] == "onnx")
    assert (card["users"], card["items"], card["sizes"]) == (30, ITEMS, "4,16")
    assert (card["large_catalogue"]["items"], card["large_catalogue"]["size"]) == (1000, 16)
    assert (measured / "deploy.png").read_bytes().startswith(b"\x89PNG")


def test_the_cards_metrics_equal_the_runs_test_metrics(measured):
    """Equal because no items tie here: serving ranks the lower number of a tie first, the test takes the mean rank."""
    card, tested = (json.loads((measured / name).read_text()) for name in ("deploy.json", "test_mrl_metrics.json"))
    plain = [row for row in card["rows"] if (row["engine"], row["quantize"]) == ("torch", "none")]
    assert [row["size"] for row in plain] == [4, 16]
    for row in plain:
        for metric in ("NDCG@10", "Recall@10"):
            assert abs(row[metric] - tested[str(row["size"])][metric]) < 1e-6
        assert row["same_top10"] == 1


def test_an_export_chosen_by_the_card_has_the_size_on_the_card(measured, home, tmp_path, monkeypatch):
    row = next(row for row in json.loads((measured / "deploy.json").read_text())["rows"] if row["quantize"] == "int8")
    monkeypatch.chdir(tmp_path)
    (folder,) = run_export(
        measured, f"--max_bytes {row['bytes']} --format onnx --quantize int8 --data_root {home}/data"
    )
    assert folder == Path("exports/tiny-4")
    assert sum(map(len, contents(folder).values())) == row["bytes"]


def test_a_card_with_an_ndcg_of_zero_is_printed(measured):
    card = json.loads((measured / "deploy.json").read_text())
    card["rows"] = [row | {"NDCG@10": 0.0} for row in card["rows"]]
    assert sum(line.startswith(("| 4 ", "| 16 ")) for line in card_table(card)) == 8


def test_the_large_catalogue_begins_with_the_real_items(learned, tmp_path):
    row = deploy.measure_large_catalogue(
        learned, 1000, tmp_path / "large", [["B000000001", "B000000030"], ["B000000002"]]
    )
    assert row["items"] == 1000 and row["p50_ms"] > 0 and row["add_10000_s"] is None  # no features, no new items
    small, large = read_folder(learned), read_folder(tmp_path / "large")
    assert len(large.items) == 1000 and large.items.id(ITEMS) == small.items.id(ITEMS)
    assert np.array_equal(large.table[: ITEMS + 1], small.table)


@pytest.mark.parametrize("flag", ["--users 0", "--requests 1", "--catalogue 9"])
def test_too_small_a_measurement_is_refused(run, flag):
    name, value = flag.split()
    with pytest.raises(InputError, match=rf"{name} {value} must be at least \d+"):
        deploy.main(["--run", str(run), name, value])
