"""Exports of a trained run: their folders, the size that fits a limit, the installed package, the page, and the Hub."""

import errno
import functools
import hashlib
import http.server
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file, save_file

import serving
import serving.hub
import train
from benchmarks import deploy
from common.errors import InputError
from datasets.catalog import load_catalog
from experiments.tables import card_table
from serving import Recommender, export, recommend
from serving import folder as export_folder
from serving.folder import GRAPHS, WEIGHTS, Items, make_items, pack_items, pack_weights, read_folder, write_folder
from serving.packaging import runtime_modules
from serving.page import __main__ as page
from serving.weights import expected_shapes
from tests.made_up import (
    contents,
    in_child,
    put_in_hub_cache,
    random_model,
    write_export,
    write_metadata,
    write_plane,
    write_prepared,
)
from trainer.load_run import load_run
from trainer.runs import REPOSITORY, commit

# --------------------------------------------------------------------------------------------------------------- folder

TWO_SIZES, FEATURES, IDS = (2, 5), 3, ["A1", "B2", "C3"]
FILES = ("model.safetensors", "items.safetensors", "recommend.onnx")
DESCRIBED = {
    **{"size": TWO_SIZES[-1], "sizes": TWO_SIZES, "num_blocks": 1, "max_len": 9, "num_items": 3, "quantize": "none"},
    "dataset": {"code": "shop", "digest": "0"},
    "features": {"dim": FEATURES, "language": None, "image": None},
    **{"run": "a-run", "metrics": None},
}
AGAIN = "; export the model again: python -m serving.export"


def weights_of(sizes=TWO_SIZES, blocks=1, quantized=False):
    random = np.random.default_rng(0)
    shapes = expected_shapes(sizes[-1], blocks, FEATURES, quantized)
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: w.astype(np.int8) if f"{name}.scale" in shapes else w for name, w in weights.items()}


def write(folder, ids=IDS, titles=None, table=None, scale=None, weights=None, overwrite=False, more=(), **config):
    """Write an export of random numbers, or of the given ones."""
    if table is None:
        table = np.random.default_rng(1).normal(size=(len(ids) + 1, TWO_SIZES[-1])).astype(np.float32)
    items = make_items(ids, [f"Item {id}" for id in ids] if titles is None else titles)
    files = {
        "model.safetensors": pack_weights(weights or weights_of()),
        "items.safetensors": pack_items(items, table, scale),
        "recommend.onnx": b"a graph",
        **dict(more),
    }
    write_folder(folder, DESCRIBED | config, files, overwrite)
    return folder


def altered_config(folder, changes):
    """Alter config.json and update its checksum. Ellipsis: remove a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    config = {name: value for name, value in config.items() if name != "sha256" and value is not ...}
    config["sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(config), encoding="utf-8")


def names(folder):
    return sorted(os.listdir(folder))  # noqa: PTH208 (hidden files count too)


def test_what_was_written_is_read(tmp_path):
    table = np.random.default_rng(3).normal(size=(4, 5)).astype(np.float32)
    folder = write(tmp_path / "out", table=table, note="Größe", more={"step.onnx": b"another"})
    found = read_folder(str(folder))
    assert found.folder == folder and found.has_graphs and found.scale is None
    assert found.config["note"] == "Größe" and set(found.config["files"]) == {*FILES, "step.onnx"}
    assert found.table.dtype == np.float32 and np.array_equal(found.table, table)
    assert all(np.array_equal(found.weights[name], weight) for name, weight in weights_of().items())
    assert "\n# shop, size 5\n" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("# mine")
    assert len(read_folder(folder).items) == 3
    assert names(tmp_path) == ["out"] and (folder.stat().st_mode & 0o777) == 0o755


def test_a_folder_that_is_not_an_export_is_refused_with_how_to_make_one(tmp_path):
    for text, problem in (
        (None, "out is not an export .it has no config.json.; python -m serving.export makes one"),
        ("[]", f"config.json is not a JSON object{AGAIN}"),
        ('{"format": "another"}', f"config.json does not describe an export{AGAIN}"),
        ('{"settings": {}}', "out is a run, not an export; export it: python -m serving.export --run .*/out"),
    ):
        if text is not None:
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "config.json").write_text(text)
        with pytest.raises(InputError, match=problem):
            read_folder(tmp_path / "out")


def test_a_missing_cut_or_altered_file_is_named(tmp_path):
    path = write(tmp_path / "out") / "recommend.onnx"
    content = path.read_bytes()
    for damaged, problem in (
        (content[:-1], rf"has \d+ bytes instead of {len(content)}"),
        (content[:-1] + bytes([content[-1] ^ 1]), r"was altered \(its checksum differs\)"),
        (None, "is missing"),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{path} {problem}{AGAIN}"):
            read_folder(path.parent)


def test_an_altered_config_is_noticed(tmp_path):
    path = write(tmp_path / "out", note="Größe") / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("Größe", "Grosse"), encoding="utf-8")
    with pytest.raises(InputError, match=rf"{path} was altered \(its checksum differs\){AGAIN}"):
        read_folder(path.parent)


def test_a_config_of_another_version_without_a_key_or_that_points_elsewhere_is_refused(tmp_path):
    (tmp_path / "outside").touch()
    for changes, problem in (
        ({"version": 3}, "has format version 3, this code reads versions 1 and 2"),
        ({"num_blocks": ...}, "config.json has no 'num_blocks'"),
        ({"sizes": [4]}, r"sizes \[4\] must rise and end at size 5"),
        ({"history_bias": "much"}, "config.json has history_bias 'much'"),
        ({"files": {}}, "config.json lists 'model.safetensors' wrongly or not at all"),
        ({"files": {"../outside": {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}}}, "lists '../outside' wrongly"),
    ):
        folder = write(tmp_path / "out", overwrite=True)
        if changes.get("files"):
            changes = {"files": read_folder(folder).config["files"] | changes["files"]}
        altered_config(folder, changes)
        with pytest.raises(InputError, match=rf"{problem}.*{AGAIN[2:]}"):
            read_folder(folder)


def with_weight(name, weight):
    return {"weights": {n: w for n, w in (weights_of() | {name: weight}).items() if w is not None}}


INT8 = {"scale": np.ones(3, "f4"), "weights": weights_of(quantized=True), "quantize": "int8"}
FEWER = Items(make_items(IDS, IDS).ids, make_items(IDS, IDS).titles, np.array([2, 4]))  # two titles


def test_content_that_contradicts_config_or_was_never_valid_is_refused(tmp_path):
    for content, problem in (
        (with_weight("blocks.0.lru.C", np.zeros((5, 10), "f4")), r"\[5, 10\] instead of float32 \[10, 5\]"),
        (with_weight("blocks.0.norm1.bias", np.zeros(5, "f8")), r"bias is float64 \[5\] instead of float32 \[5\]"),
        (with_weight("blocks.0.norm1.bias", None), r"norm1.bias is nothing instead of float32 \[5\]"),
        (with_weight("blocks.1.norm1.bias", np.zeros(5, "f4")), r"norm1.bias is float32 \[5\] instead of nothing"),
        ({"table": np.zeros((3, 5), "f4")}, r"table of shape \[3, 5\] for 3 items of size 5"),
        ({"table": np.zeros((4, 5), "f2")}, "table is F16 instead of F32"),
        ({"table": np.zeros((4, 5), "i1"), **INT8}, "for 3 items of size 5"),
        ({"more": {"items.safetensors": pack_items(FEWER, np.zeros((4, 5), "f4"), None)}}, "for 3 items of size"),
        ({"more": {"items.safetensors": b"\xff" * 100}}, "is damaged"),
    ):
        write(tmp_path / "out", overwrite=True, **content)
        with pytest.raises(InputError, match=rf"(model|items).safetensors.* ?{problem}.*{AGAIN}"):
            read_folder(tmp_path / "out")


ODD = {"x/y": "Thé 🎒", "漢" * 85: "漢字", "x" * 256: "a\n", "42": " b ", "..": "c" * 10_000, "e\u0301": ""}


def test_ids_and_titles_of_any_characters_are_read_as_they_were(tmp_path):
    table = np.zeros((len(ODD) + 1, 5), dtype=np.float32)
    items = read_folder(write(tmp_path / "out", ids=list(ODD), titles=list(ODD.values()), table=table)).items
    assert {items.id(i): items.title(i) for i in range(1, len(items) + 1)} == ODD
    assert make_items(["a"], ["a\ud800b"]).title(1) == "a?b"  # a lone surrogate


STRING = "must be a string of 1 to 256 bytes in UTF-8 without NUL"


def test_invalid_ids_and_titles_are_named():
    for ids, titles, problem in (
        *((["fine", bad], ["", ""], f"{bad!r:.80} {STRING}") for bad in ("", "a\0", "漢" * 86, "a\ud800", 7)),
        (["a", "b", "a"], ["", "", ""], "item id 'a' occurs twice"),
        (IDS, ["", ""], "2 titles for 3 items; give one per item"),
        (IDS, ["", None, ""], "the title of item 'B2' is None; give a string"),
    ):
        with pytest.raises(InputError) as raised:
            make_items(ids, titles)
        assert problem in str(raised.value)


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_a_table_of_several_chunks_is_read_in_order(tmp_path, kind):
    rows = 2 * export_folder.CHUNK + 3
    table = (np.arange(rows * 2).reshape(rows, 2) % 251 - 125).astype(kind)
    scale = np.arange(rows, dtype=np.float32) if kind == "int8" else None
    weights, ids = weights_of((2,), quantized=kind == "int8"), [f"i{n}" for n in range(1, rows)]
    found = read_folder(write(tmp_path / "out", ids, None, table, scale, weights, quantize=kind, size=2, sizes=(2,)))
    assert np.array_equal(found.table, table) and found.items.id(rows - 1) == f"i{rows - 1}"
    assert found.scale is scale or np.array_equal(found.scale, scale)


@pytest.mark.parametrize(("call", "at"), [("rename", 1), ("rename", 2), ("fsync", 3)])
def test_a_full_disk_leaves_the_old_export(tmp_path, monkeypatch, call, at):
    folder = write(tmp_path / "out")
    before, calls, real = contents(folder), [], getattr(os, call)

    def fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(InputError) as raised:
        patch.setattr(os, call, fails)
        write(folder, ids=["new"], overwrite=True)
    assert str(raised.value) == f"cannot write {folder}: No space left on device; free space or choose another folder"
    assert contents(folder) == before and names(tmp_path) == ["out"]


def test_two_writers_at_once_leave_the_whole_export_of_one(tmp_path):
    write(tmp_path / "out", ids=["old"])

    def replace(number):
        with suppress(InputError):  # the other one was first
            write(tmp_path / "out", ids=[f"new{number}"], overwrite=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(replace, range(8)))
    assert read_folder(tmp_path / "out").items.id(1) in ["old", *(f"new{number}" for number in range(8))]
    assert names(tmp_path) == ["out"]


CHANGES = ("os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir")


def replace_until(change, folder, log):
    """Replace an export until its n-th change of a file or folder, named in `log`, and die; status 9, or 0 if whole."""
    changes = itertools.count(1)

    def hook(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and next(changes) == change:
            os.write(log, event.encode())
            os._exit(9)

    os.fsync = lambda _: None
    sys.addaudithook(hook)
    write(folder, ids=["new"], overwrite=True)


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_export_and_the_next_one_succeeds(tmp_path):
    changes, found = [], []
    for change in itertools.count(1):
        place = tmp_path / str(change)
        write(place / "out", ids=["old"])
        came, log = os.pipe()
        status = in_child(functools.partial(replace_until, change, place / "out", log))
        os.close(log)
        if status == 0:
            break
        assert status == 9
        changes.append(os.read(came, 20).decode())
        os.close(came)
        left = names(place)
        found.append(read_folder(place / "out").items.id(1))
        assert names(place) == left  # reading changes nothing: a writer may be at work
        assert read_folder(write(place / "out", ids=["next"], overwrite=True)).items.id(1) == "next"
        assert names(place) == ["out"]
    assert changes.count("open") >= 10 and "os.remove" in changes
    # The old one is moved aside, then the new one into its place, then the old one away.
    _, placed, _ = (at + 1 for at, change in enumerate(changes) if change == "os.rename")
    assert found == ["old"] * placed + ["new"] * (len(changes) - placed)


def test_replacing_a_link_replaces_its_target(tmp_path):
    write(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    for name in ("first", "second"):
        assert read_folder(write(tmp_path / "out", ids=[name], overwrite=True)).items.id(1) == name
        assert (tmp_path / "out").is_symlink() and names(tmp_path) == ["out", "real"]


# ----------------------------------------------------------------------------------------------------------------- hub
# push_to_hub, and from_pretrained("user/name") from the Hub's cache.


@pytest.fixture
def pushed(monkeypatch):
    """Stand in for the Hub: return {file: content} of the newest commit."""
    files, url = {}, RepoUrl("https://huggingface.co/user/shop")

    def upload(api, *, folder_path, allow_patterns, **_):
        files.clear()
        files.update((name, content) for name, content in contents(folder_path).items() if name in allow_patterns)

    monkeypatch.setattr(HfApi, "create_repo", create_autospec(HfApi.create_repo, return_value=url))
    monkeypatch.setattr(HfApi, "upload_folder", create_autospec(HfApi.upload_folder, side_effect=upload))
    return files


@pytest.fixture
def exported(tmp_path):
    return write_export(tmp_path / "shop", random_model((4, 8)))


def test_the_files_of_an_export_are_pushed_also_with_a_changed_catalogue(pushed, exported):
    (exported / "notes.txt").write_text("not of the export", encoding="utf-8")
    assert serving.hub.main([str(exported), "user/shop"]) == "https://huggingface.co/user/shop"
    assert pushed == {name: content for name, content in contents(exported).items() if name != "notes.txt"}
    recommender = Recommender.from_pretrained(exported)
    recommender.remove_items([3])
    recommender.push_to_hub("user/shop")
    assert json.loads(pushed["config.json"])["num_removed"] == 1


def test_an_export_on_the_hub_is_opened_by_its_name_but_a_folder_goes_first(hub, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_in_hub_cache(hub, "user/shop", "1" * 40, exported)
    expected = Recommender.from_pretrained(exported).recommend([[1, 2]])
    assert Recommender.from_pretrained("user/shop").recommend([[1, 2]]) == expected
    (tmp_path / "exports").mkdir()
    for ask, problem in (
        (lambda: Recommender.from_pretrained("exports/demo-64"), "exports/demo-64 is not an export"),
        (lambda: Recommender.from_pretrained("user/none"), "no folder user/none, and no such .*; check the name"),
        (lambda: serving.hub.push(exported, "a/b/c"), "such as user/name"),
        (lambda: serving.hub.push(tmp_path, "user/shop"), "is not an export"),
        (lambda: serving.hub.push(exported, "user/shop"), "could not publish user/shop on the Hub .*; log in with `hf"),
    ):
        with pytest.raises(InputError, match=problem):
            ask()


# -------------------------------------------------------------------------------------------------------------- exports

SIZES, ITEMS, MAX_LEN = (4, 8, 16), 90, 6
TITLES = [f"Thé & Lamp {i} word{i * 7 % 40} word{i * 11 % 37}" for i in range(1, ITEMS + 1)]
TRAIN = "--dataset_code tiny --num_epochs 1 --lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --device cpu"
TRAIN += f" --lru_max_len {MAX_LEN} --language_encoder lexical --img_encoder pixel --mrl_hidden_sizes 4,8,16"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """The working folder of these tests, with data/tiny prepared; item 2 has no title."""
    folder = tmp_path_factory.mktemp("home")
    titles = [title.replace("&", "&amp;") for title in TITLES]
    records = [{"asin": f"B{i:09d}", "title": title, "brand": f"Nº{i}"} for i, title in enumerate(titles, start=1)]
    del records[1]["title"]
    write_metadata(write_prepared(folder / "data", "tiny", users=60, items=ITEMS, pictures=True), records)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(home):
    return home / train.main(shlex.split(TRAIN))


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "runs" / run.name))


def run_export(run, flags=""):
    return export.main(["--run", str(run), *shlex.split(flags)])


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_a_run_is_exported_without_its_dataset_as_with_it(run, copy, monkeypatch, tmp_path, home):
    monkeypatch.chdir(tmp_path)  # there are no data here
    assert run_export(run) == [Path("exports/tiny-16")] and config_of(Path("exports/tiny-16"))["size"] == 16
    table = copy / "table.safetensors"
    save_file(load_file(table), table, {"weights": "of another epoch", "widths": "1024,240"})
    for use in (Path.exists, Path.unlink):  # then as of a run of an earlier version
        use(table)
        with pytest.raises(InputError, match="give --data_root"):
            run_export(copy, "--out again")
    run_export(copy, f"--data_root {home}/data --out again")
    assert contents(Path("again")) == contents(Path("exports/tiny-16"))
    write_prepared(tmp_path / "other", "tiny", seed=9)
    with pytest.raises(InputError, match=r"validation users of the run's dataset, but tiny in .*other has changed"):
        run_export(run, f"--table_width 2 --data_root {tmp_path}/other --out cut")


@pytest.mark.parametrize(("flag", "folders"), [("4", ["."]), ("all", SIZES), ("' 8, 4,8'", (8, 4))])
def test_one_size_is_written_to_out_itself_and_several_below_it(run, tmp_path, flag, folders):
    out = tmp_path / "new" / "deep"
    expected = [out if size == "." else out / f"tiny-{size}" for size in folders]
    assert run_export(run, f"--size {flag} --out {out}") == expected
    assert [config_of(f)["size"] for f in expected] == [4 if size == "." else size for size in folders]


def test_config_describes_the_export_and_the_folder_is_the_same_each_time(run, tmp_path):
    first, second = (run_export(run, f"--size 8 --format onnx --out {tmp_path}/{n}/out")[0] for n in (1, 2))
    files, names = contents(first), {WEIGHTS, "items.safetensors", *GRAPHS}
    assert files == contents(second) and files.keys() == {"config.json", "README.md", *names}
    config = config_of(first)
    features = config.pop("features")
    assert config.pop("sha256") and (features["dim"], features["image"]["encoder"]) == (1264, "pixel")
    assert features["language"]["encoder"] == "lexical"
    assert features["language"]["attributes"] == ["title", "price", "brand", "categories"]
    assert config == {
        **{"format": "fmrlrec-export", "version": 1, "post_norm": False, "quantize": "float16"},
        **{"size": 8, "sizes": [4, 8], "num_blocks": 1, "max_len": MAX_LEN, "num_items": ITEMS},
        "dataset": {"code": "tiny", "digest": load_catalog("data", "tiny").digest()},
        "run": run.name,
        "commit": commit(),
        "metrics": json.loads((run / "test_mrl_metrics.json").read_text())["8"],
        "files": {n: {"bytes": len(files[n]), "sha256": hashlib.sha256(files[n]).hexdigest()} for n in names},
    }


def test_the_model_card_gives_metrics_commands_and_the_widths_that_were_measured(copy, tmp_path):
    def exported(flags):
        (folder,) = run_export(copy, flags)
        return config_of(folder), (folder / "README.md").read_text(encoding="utf-8")

    flags = f"--size 8 --table_width 4 --format onnx --data_root data --overwrite --out {tmp_path / 'shop'}"
    config, card = exported(flags)
    assert (config["size"], config["table_width"]) == (8, 4) and "table (columns" not in card
    ndcg = f"NDCG@10 {config['metrics']['NDCG@10']:.4f}, "
    assert all(part in card for part in ("\n# tiny, size 8\n", ndcg, "\nfmrlrec-recommend THIS_FOLDER "))
    write_plane(copy, SIZES, ITEMS)
    assert "| 8 | 0.08 | **0.0032** | 0.0064 |  |\n" in exported(flags)[1]
    (copy / "test_mrl_metrics.json").unlink()
    config, card = exported(f"--out {tmp_path / 'out'}")
    assert config["metrics"] is None and "not tested" in card
    assert "python -m serving.recommend" in card and "fmrlrec-recommend" not in card  # without graphs in a clone only


def test_recommend_prints_ids_and_titles_best_first(run, tmp_path, capsys):
    (folder,) = run_export(run, f"--out {tmp_path / 'out'}")

    def printed(*flags):
        capsys.readouterr()
        recommend.main([str(folder), *flags])
        return capsys.readouterr().out

    asked = ("--history", "B000000001,B000000002", "--top_k", "3")
    answer = json.loads(printed(*asked, "--json"))
    assert answer["titles"] == [TITLES[number - 1] for number in answer["numbers"]]
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    shown = [tuple(line.split(maxsplit=3)[2:]) for line in printed(*asked).splitlines()]
    assert shown == list(zip(answer["ids"], answer["titles"], strict=True))
    by_number = printed("--history", "1, 2", "--top_k", "3", "--candidates", "4,3", "--json")
    assert by_number == printed(*asked, "--candidates", "B000000003,B000000004", "--json")
    with pytest.raises(InputError, match=r"--history 'A B': unknown: 'A B' \(of 90 items\); give ids of this cat"):
        printed("--history", "A B")


def test_impossible_sizes_and_another_dataset_are_refused(run, tmp_path):
    for flags, problem in (
        ("--dataset_code beauty", "beauty differs from"),
        ("--size 4,5", "--size 5 was not trained; use sizes of 4,8,16, or all"),
        ("--size 4 --max_bytes 2MB", "give --size, or --max_bytes and --max_latency_ms, not both"),
        ("--max_bytes 2MB --index int8", "no figures with --index or --table_width; give --size with them"),
        ("--size 4,8 --table_width 5", "--table_width 5 must be from 1 to the size, 4"),
        ("--table_width 5 --quantize int8", "not for --quantize int8; use --format onnx or torch, --quantize float16"),
        ("--table_width 5 --data_root gone", "needs the validation users .* dataset: dataset 'tiny' is not at gone"),
    ):
        with pytest.raises(InputError, match=problem):
            run_export(run, f"{flags} --out {tmp_path / 'out'}")
        assert not (tmp_path / "out").exists()


def test_an_existing_export_is_replaced_only_with_overwrite_and_before_any_is_written(run, tmp_path):
    out = tmp_path / "tiny-8"
    run_export(run, f"--size 4 --out {out}")
    before = contents(tmp_path)
    for flags in (f"--size 8 --out {out}", f"--size all --out {tmp_path}"):
        with pytest.raises(InputError, match=rf"{out} exists; pass --overwrite"):
            run_export(run, flags)
    assert contents(tmp_path) == before
    run_export(run, f"--size 8 --out {out} --overwrite")
    assert read_folder(out).config["size"] == 8


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
def best_size(tmp_path):

    def choose(flags, changes=()):
        (tmp_path / "best.safetensors").write_bytes(b"weights")
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in CARD]
        card = {"weights": hashlib.sha256(b"weights").hexdigest(), "rows": rows}
        path = tmp_path / "deploy.json"
        path.unlink() if changes is None else path.write_text(json.dumps(card | dict(changes)))
        arguments = export.arguments_parser().parse_args(["--run", str(tmp_path), *flags.split()])
        return export.chosen_sizes(arguments, SIZES)

    return choose


def test_of_the_sizes_within_the_limits_the_one_with_the_best_ndcg_is_chosen(best_size):
    for limits, size in (
        ("--max_bytes 2000 --max_latency_ms 2", 8),  # a limit may be reached
        ("--max_bytes 1MB", 8),  # the largest is not the best
        ("--max_latency_ms 1.999", 16),
        ("--max_latency_ms 1.999 --max_bytes 2kB", 4),  # 8 is too slow, 16 too large
        ("--max_bytes 2MB --format onnx --quantize int8", 16),
    ):
        assert best_size(limits) == [size]


def test_limits_that_nothing_measured_fits_are_refused_with_what_does(best_size):
    for flags, changes, problem in (
        ("--max_bytes 999", {}, "no size fits .* size 4 has 1,000 bytes .*that fit: --format onnx --quantize int8"),
        ("--max_bytes 1", {}, "variants that fit: none"),
        ("--max_bytes 1GB --quantize int8", {}, "no --format torch --quantize int8; it has onnx float16, onnx int8, "),
        ("--max_bytes=2MiB", {}, "--max_bytes '2MiB' must be a number of bytes such as 2MB"),
        ("--max_bytes 1GB", None, "measure it: python -m benchmarks.deploy --run "),
        ("--max_bytes 1GB", {"rows": [{"size": 4}]}, "measure it: python -m benchmarks.deploy --run "),
        ("--max_bytes 1GB", {"weights": "other"}, "was measured on other weights .* measure it: "),
    ):
        with pytest.raises(InputError, match=problem):
            best_size(flags, changes)


def test_the_card_has_the_costs_metrics_and_bytes_of_every_export(copy, tmp_path, monkeypatch):
    """The metrics equal the test's as no items tie here: serving ranks the lower number first, the test averages."""
    monkeypatch.setattr(deploy, "measure_in_subprocess", deploy.measure)
    for name in ("ADDED", "BATCHES"):
        monkeypatch.setattr(deploy, name, 2)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    deploy.main(["--run", str(copy), "--size", "4,16", "--requests", "3", "--catalogue", "1000"])
    card, tested = (json.loads((copy / name).read_text()) for name in ("deploy.json", "test_mrl_metrics.json"))
    variants = [(row["size"], row["engine"], row["quantize"]) for row in card["rows"]]
    assert variants == [(size, *variant) for size in (4, 16) for variant in deploy.VARIANTS]
    for row in card["rows"]:
        exact = (row["engine"], row["quantize"]) == ("torch", "none")
        assert row["NDCG@10"] == pytest.approx(tested[str(row["size"])]["NDCG@10"], abs=1e-6 if exact else 0.2)
    assert (card["users"], card["items"], card["large_catalogue"]["items"]) == (60, ITEMS, 1000)
    assert sum(line.startswith(("| 4 ", "| 16 ")) for line in card_table(card)) == 8
    limit = next(row["bytes"] for row in card["rows"] if row["quantize"] == "int8")
    flags = f"--max_bytes {limit} --format onnx --quantize int8 --data_root data --out {tmp_path / 'out'}"
    assert sum(map(len, contents(*run_export(copy, flags)).values())) == limit


SERVE = """
import json, sys
target, folder, products = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, target)
for name in "torch transformers tqdm pandas onnx serving common config datasets model trainer".split():
    sys.modules[name] = None  # cannot be imported
import fmrlrec
from fmrlrec import http
recommender = fmrlrec.Recommender.from_pretrained(folder)
recommender.add_items(["NEW1", "NEW2"], recommender.embed_items(products))
[answer] = recommender.recommend([[3, "NEW1"]], top_k=22, exclude_history=False)
try:
    fmrlrec.Recommender.from_pretrained(folder, "torch")
except fmrlrec.InputError as error:
    refused = str(error)
routes = [route.path for route in http.create_app(recommender).app.routes]
print(json.dumps([fmrlrec.__version__, answer.ids, answer.scores, refused, routes]))
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
        folder = (REPOSITORY / name).is_dir()
        shutil.copytree(REPOSITORY / name, clone / name) if folder else shutil.copy(REPOSITORY / name, clone)

    def run_in(folder, *command, **options):
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **options)

    options = ["-q", "--no-deps", "--no-build-isolation", "--target", target]
    done = run_in(clone, sys.executable, "-m", "pip", "install", *options, ".")
    assert done.returncode == 0, f"setuptools {setuptools.__version__}\n{done.stderr}"
    assert {path.name for path in target.iterdir()} == {"fmrlrec", "fmrlrec-1.0.0.dist-info", "bin"}
    files = {str(path.relative_to(target / "fmrlrec")) for path in (target / "fmrlrec").rglob("*.py")}
    assert files >= {"__init__.py", "recommender.py", "recommend.py", "http.py", "engines.py", "common/errors.py"}
    assert not files & {"export.py", "graphs.py", "torch_engine.py", "packaging.py", "stale.py"}
    assert len(files) == len(runtime_modules())

    folder, products = shop.export("float16"), shop.records[:2]
    done = run_in(shop.root, sys.executable, "-I", "-c", SERVE, target, folder, json.dumps(products))
    assert done.returncode == 0, done.stderr
    version, ids, scores, refused, routes = json.loads(done.stdout)
    recommender = Recommender.from_pretrained(folder)
    recommender.add_items(["NEW1", "NEW2"], recommender.embed_items(products))
    [expected] = recommender.recommend([[3, "NEW1"]], top_k=22, exclude_history=False)
    assert (version, ids, scores) == (serving.__version__, expected.ids, expected.scores)
    assert refused.startswith("the torch engine needs torch and a clone of the repository") and "/recommend" in routes
    flags = [str(folder), "--history", "3,17", "--top_k", "4"]
    paths = os.environ | {"PYTHONPATH": str(target)}
    output = run_in(shop.root, target / "bin/fmrlrec-recommend", *flags, env=paths).stdout
    recommend.main(flags)
    assert output == capsys.readouterr().out and len(output.splitlines()) == 4


# ----------------------------------------------------------------------------------------------------------------- page

DONE = "#best > li, #message:not([hidden]):not(:has(code))"  # an answer, or a message other than the first


def missing(what):
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {what}")  # never skipped in CI


@pytest.fixture(scope="module")
def built(home, run):
    if not (page.RUNTIME / page.RUNTIME_FILES[0]).is_file():
        missing("npm ci --prefix serving/page")
    measured = shutil.copytree(run, home / "measured" / run.name)
    write_plane(measured, SIZES, ITEMS)
    return home / page.main([str(measured), "--out", "page"])


@pytest.fixture(scope="module")
def recommenders(run):
    folders = run_export(run, "--size all --out exports")
    return {size: Recommender.from_pretrained(folder) for size, folder in zip(SIZES, folders, strict=True)}


@pytest.fixture(scope="module")
def address(built):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=built)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromium"):
        missing("the browser chromium")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        flags = deploy.CHROMIUM_FLAGS.split()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield browser.new_context()
        browser.close()


@pytest.fixture
def tab(browser):
    """A new tab; at the end of the test it must have had no errors and loaded nothing from elsewhere."""
    tab, wrong = browser.new_page(), []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: wrong.append(request.url))
    yield tab
    tab.close()
    assert [each for each in wrong if not each.startswith(("data:", "http://127.0.0.1:"))] == []


def load(tab, address, fragment=""):
    tab.goto(address + fragment)
    tab.wait_for_selector(DONE)


def shown(tab):
    return tab.eval_on_selector_all("#best .row .item", "items => items.map(item => Number(item.dataset.item))")


def message(tab):
    return "" if tab.is_hidden("#message") else tab.inner_text("#message")


def test_the_browser_recommends_the_ten_items_that_python_does_at_every_size(tab, address, recommenders):
    load(tab, address)
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, size=n % (2 * MAX_LEN)).tolist() for n in range(200)]
    ask = "async ([size, histories]) => { const page = await import('./page.js'); const found = [];"
    ask += " for (const items of histories) found.push((await page.recommend(size, items)).best); return found; }"
    for size, recommender in recommenders.items():
        found = tab.evaluate(ask, [size, histories])
        assert found == [answer.numbers for answer in recommender.recommend(histories)]
        similar = tab.evaluate("async (size) => (await import('./page.js')).similar(size, 5)", size)
        assert similar == recommender.similar_items([5], top_k=page.SIMILAR)[0].numbers


@pytest.mark.parametrize("width", [390, 1440])
def test_a_history_and_a_size_are_chosen_by_keyboard_at_any_width(tab, address, built, recommenders, width):
    tab.set_viewport_size({"width": width, "height": 844})
    load(tab, address, "#size=4&history=B000000003,B000000007")
    full = set(recommenders[16].recommend([[3, 7]])[0].numbers)
    for size in SIZES:
        expected = recommenders[size].recommend([[3, 7]])[0].numbers
        tab.wait_for_function(
            "want => want === [...document.querySelectorAll('#best .row .item')].map(i => i.dataset.item).join()",
            arg=",".join(map(str, expected)),
        )
        assert tab.inner_text("#size") == str(size) and tab.inner_text("#same") == f"{len(full & set(expected))} of 10"
        assert tab.inner_text("#bytes") == f"{(built / f'models/{size}.onnx').stat().st_size / 1e3:.0f} kB"
        assert tab.inner_text("#milliseconds").endswith(" ms") and not message(tab)
        tab.focus("#slider")
        tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.eval_on_selector("#catalogue img", "image => image.complete && image.naturalWidth > 0")

    tab.focus("#best > li:first-child .item")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".similar .item")
    tab.eval_on_selector("#best > li:first-child .item", "item => [1, 2, 3, 4].forEach(() => item.click())")
    tab.wait_for_selector(".similar .item")
    assert tab.locator(".similar").count() == 1
    tab.fill("#search", "b000000011")
    tab.focus("#catalogue .item")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => location.hash.endsWith('B000000011')")
    assert tab.eval_on_selector_all("#history .item", "items => items.map(i => i.dataset.item)") == ["3", "7", "11"]


@pytest.mark.parametrize("width", [390, 1440])
def test_a_table_width_is_chosen_by_keyboard_among_those_of_the_encoder_and_charts_show_all(tab, address, width):
    tab.set_viewport_size({"width": width, "height": 844})
    load(tab, address, "#size=16&history=B000000003")
    tab.focus("#plane > summary")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#by-time circle.cell")
    assert tab.eval_on_selector_all("#plane polyline", "lines => lines.length") == 2 * len(SIZES)
    assert tab.eval_on_selector_all("#cells tr", "rows => rows.length") == 6 == tab.locator("#by-bytes circle").count()
    for pressed, of_cell in (("", ["16 of 16", "0.0256"]), ("ArrowLeft", ["8 of 16", "0.0128 50% of the whole's"])):
        tab.focus("#width")
        tab.keyboard.press(pressed) if pressed else None
        assert [tab.inner_text("#width-text"), tab.inner_text("#cell-quality")] == of_cell
    assert tab.inner_text("#cell-command") == "python -m serving.export --size 16 --table_width 8"
    tab.focus("#slider")
    tab.keyboard.press("ArrowLeft")  # an encoder of 8 has no wider table
    assert tab.inner_text("#width-text") == "8 of 8" and tab.inner_text("#cell-time") == "0.08 ms"
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("fault", ["is missing (status 404)", "is damaged: its checksum differs"])
def test_a_missing_or_damaged_model_is_named_and_other_sizes_still_answer(tab, address, built, fault):
    content = bytearray((built / "models/8.onnx").read_bytes())
    content[-1000] ^= 1
    status = 404 if "404" in fault else 200
    tab.route("**/models/8.onnx", lambda route: route.fulfill(status=status, body=bytes(content)))
    tab.route("**/models/16.similar", lambda route: route.fulfill(body="1234567"))
    load(tab, address, "#size=8&history=B000000003")
    assert f"models/8.onnx {fault}" in message(tab) and not shown(tab)
    tab.focus("#slider")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector("#best > li")
    assert message(tab) == "" and len(shown(tab)) == 10
    tab.click("#best > li:first-child .item")
    tab.wait_for_selector("#message:not([hidden])")
    assert message(tab).startswith(
        f"models/16.similar is damaged: it has 7 bytes instead of {4 * ITEMS * page.SIMILAR}. "
    )


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("catalogue.json", None, "is missing (status 404). Build the page again with python -m serving.page."),
        ("catalogue.json", "[", "is damaged: it is not JSON. Copy or build the page again."),
        ("ort/ort.wasm.min.mjs", None, "is damaged: it is missing or no module. Copy or build the page again."),
    ],
)
def test_a_missing_or_damaged_file_of_the_page_is_named(tab, address, file, content, problem):
    tab.route(f"**/{file}", lambda route: route.fulfill(status=200 if content else 404, body=content or ""))
    load(tab, address)
    assert message(tab) == f"{file} {problem}" and tab.is_hidden("#app")


def test_unknown_ids_are_named_and_a_run_that_was_not_cut_has_no_choice_of_a_width(tab, address, built, recommenders):
    catalogue = json.loads((built / "catalogue.json").read_text(encoding="utf-8")) | {"plane": []}
    tab.route("**/catalogue.json", lambda route: route.fulfill(json=catalogue))
    load(tab, address, "#size=16&history=OLD,OLDER")
    assert message(tab).startswith("Unknown and skipped: OLD, OLDER. No item of the history is known")
    assert shown(tab) == recommenders[16].recommend([[]])[0].numbers and tab.is_hidden("#plane")


def test_without_webassembly_the_page_says_so(tab, address):
    tab.add_init_script("delete window.WebAssembly")
    load(tab, address)
    assert "no WebAssembly" in message(tab) and tab.is_hidden("#app")


def test_other_folders_are_not_replaced_a_former_one_is_restored_and_a_missing_npm_package_is_named(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(page, "RUNTIME", tmp_path)
    (tmp_path / ".old.former").mkdir()  # left by a process that was killed while it replaced the page
    for flags, problem in (
        (["--out", str(tmp_path / "old")], "pass --overwrite to replace it"),
        (["--out", str(tmp_path), "--overwrite"], r"is not a page of serving\.page"),
        (["--out", str(tmp_path / "page")], r"install onnxruntime-web: npm ci --prefix .*serving/page"),
    ):
        with pytest.raises(InputError, match=problem):
            page.main(flags)


def test_a_release_has_the_same_bytes_each_time_and_its_archives_hold_the_exports(run, tmp_path, monkeypatch):
    first, second = (run_export(run, f"--release {tmp_path / name}")[0] for name in ("first", "second"))
    files = contents(first)
    assert files == contents(second)
    assert files.keys() == {"README.md", "SHA256SUMS", *(f"fmrlrec-tiny-{size}.tar.gz" for size in SIZES)}
    with pytest.raises(InputError, match=r"unpack it by `tar xf` and give the folder fmrlrec-tiny-8"):
        serving.Recommender.from_pretrained(first / "fmrlrec-tiny-8.tar.gz")
    monkeypatch.chdir(first)
    subprocess.run("sha256sum -c --quiet SHA256SUMS && tar xf fmrlrec-tiny-8.tar.gz", shell=True, check=True)
    unpacked = serving.Recommender.from_pretrained("fmrlrec-tiny-8").recommend([[1, 2]])
    (folder,) = run_export(run, f"--size 8 --out {tmp_path / 'export'}")
    assert unpacked == serving.Recommender.from_pretrained(folder).recommend([[1, 2]])
    card = files["README.md"].decode()
    assert f"| 8 | `fmrlrec-tiny-8.tar.gz` | {len(files['fmrlrec-tiny-8.tar.gz']) / 1e6:.2f} | " in card


def test_a_release_goes_into_a_new_folder_as_archives_of_trained_sizes(run, tmp_path):
    for flags, problem in (
        ("", "exists; choose another folder for --release"),
        ("--out here", "--out does not go with --release"),
        ("--format onnx-file", "--format onnx-file does not go with --release"),
        ("--size 5", "--size 5 was not trained"),
    ):
        with pytest.raises(InputError, match=problem):
            run_export(run, f"--release {tmp_path / 'new' if flags else tmp_path} {flags}")
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_part_of_a_release(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "pack", create_autospec(export.pack, side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(InputError, match=r"cannot write .*new: full; free space"):
        run_export(run, f"--release {tmp_path / 'new'}")
    assert list(tmp_path.iterdir()) == []
