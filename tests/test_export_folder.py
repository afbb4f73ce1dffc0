"""An export's folder: never half written, checked when read, exact about ids and titles, published on the Hub."""

import errno
import functools
import hashlib
import itertools
import json
import os
import sys
from unittest.mock import create_autospec

import numpy as np
import pytest
from huggingface_hub import HfApi, RepoUrl

import serving.hub
from common.errors import InputError
from serving import Recommender
from serving import folder as export
from serving.folder import pack_items, pack_weights, read_folder, write_folder
from serving.items import Items, make_items
from serving.weights import expected_shapes
from tests.made_up import random_model, write_export
from tests.prepared import contents, in_child, put_in_hub_cache

SIZES, FEATURES, IDS = (2, 5), 3, ["A1", "B2", "C3"]
FILES = ("model.safetensors", "items.safetensors", "recommend.onnx")
DESCRIBED = {
    **{"size": SIZES[-1], "sizes": SIZES, "num_blocks": 1, "max_len": 9, "num_items": len(IDS), "quantize": "none"},
    "dataset": {"code": "shop", "digest": "0"},
    "features": {"dim": FEATURES, "language": None, "image": None},
    **{"run": "a-run", "metrics": None},
}
AGAIN = "; export the model again: python -m serving.export"


def weights_of(sizes=SIZES, blocks=1, quantized=False):
    random = np.random.default_rng(0)
    shapes = expected_shapes(sizes[-1], blocks, FEATURES, quantized)
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: w.astype(np.int8) if f"{name}.scale" in shapes else w for name, w in weights.items()}


def write(folder, ids=IDS, titles=None, table=None, scale=None, weights=None, overwrite=False, more=(), **config):
    """Write an export of random numbers, or of the given ones."""
    if table is None:
        table = np.random.default_rng(1).normal(size=(len(ids) + 1, SIZES[-1])).astype(np.float32)
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
    rows = 2 * export.CHUNK + 3
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
