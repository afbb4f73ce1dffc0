"""An export's folder: never half written, checked when it is read, exact about ids and titles."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from serving import folder as export
from serving.folder import pack_items, pack_weights, read_folder, write_folder
from serving.items import Items, make_items
from serving.weights import expected_shapes
from tests.prepared import contents

REPOSITORY = Path(__file__).parent.parent
SIZES, FEATURES, IDS = (2, 5), 3, ["A1", "B2", "C3"]
FILES = ("model.safetensors", "items.safetensors", "recommend.onnx")
DESCRIBED = {
    "size": SIZES[-1],
    "sizes": SIZES,
    "num_blocks": 1,
    "max_len": 9,
    "num_items": len(IDS),
    "dataset": {"code": "shop", "digest": "0"},
    "features": {"dim": FEATURES, "language": None, "image": None},
    "quantize": "none",
    "run": "a-run",
    "metrics": None,
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


def test_a_copied_file_is_checked_against_its_checksum(tmp_path):
    first = write(tmp_path / "first")
    more, files = {"recommend.onnx": first / "recommend.onnx"}, read_folder(first).config["files"]
    copy = write(tmp_path / "copy", ids=["new"], more=more, files=files)
    assert read_folder(copy).config["files"]["recommend.onnx"] == files["recommend.onnx"]
    (first / "recommend.onnx").write_bytes(b"another")
    with pytest.raises(InputError, match=r"recommend.onnx changed since it was opened; open it again"):
        write(tmp_path / "third", more=more, files=files)
    assert names(tmp_path) == ["copy", "first"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "out is not an export .it has no config.json.; python -m serving.export makes one"),
        ("[]", f"config.json is not a JSON object{AGAIN}"),
        ('{"format": "another"}', f"config.json does not describe an export{AGAIN}"),
        ('{"settings": {}}', "out is a run, not an export; export it: python -m serving.export --run .*/out"),
    ],
)
def test_a_folder_that_is_not_an_export_is_refused_with_how_to_make_one(tmp_path, text, problem):
    if text is not None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text(text)
    with pytest.raises(InputError, match=problem):
        read_folder(tmp_path / "out")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_cut_or_altered_file_is_named(tmp_path, name):
    path = write(tmp_path / "out") / name
    content = path.read_bytes()
    for damaged, problem in (
        (content[:-1], rf"has \d+ bytes instead of {len(content)}"),
        (content[:-1] + bytes([content[-1] ^ 1]), r"was altered \(its checksum differs\)"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{path} {problem}{AGAIN}"):
            read_folder(path.parent)
    path.unlink()
    with pytest.raises(InputError, match=f"{path} is missing{AGAIN}"):
        read_folder(path.parent)


@pytest.mark.parametrize(("old", "new"), [('"Größe"', '"Grosse"'), ('"sha256": ', '"no": ')])
def test_an_altered_config_is_noticed(tmp_path, old, new):
    path = write(tmp_path / "out", note="Größe") / "config.json"
    before, found, after = path.read_text(encoding="utf-8").rpartition(old)
    assert found
    path.write_text(before + new + after, encoding="utf-8")
    with pytest.raises(InputError, match=rf"{path} was altered \(its checksum differs\){AGAIN}"):
        read_folder(path.parent)


ENTRY = {"bytes": 1, "sha256": hashlib.sha256(b"a").hexdigest()}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 3}, "has format version 3, this code reads versions 1 and 2"),
        ({"num_blocks": ...}, "config.json has no 'num_blocks'"),
        ({"sizes": [4]}, r"sizes \[4\] must rise and end at size 5"),
        ({"history_bias": "much"}, "config.json has history_bias 'much'"),
        ({"files": {}}, "config.json lists 'model.safetensors' wrongly or not at all"),
        *(({"files": {name: ENTRY}}, f"lists '{name}' wrongly") for name in ("../outside", "deep/inside")),
    ],
)
def test_a_config_of_another_version_without_a_key_or_that_points_elsewhere_is_refused(tmp_path, changes, problem):
    folder = write(tmp_path / "out")
    (folder / "deep").mkdir()
    for path in (tmp_path / "outside", folder / "deep" / "inside"):
        path.write_bytes(b"a")
    if changes.get("files"):
        changes = {"files": read_folder(folder).config["files"] | changes["files"]}
    altered_config(folder, changes)
    with pytest.raises(InputError, match=rf"{problem}.*{AGAIN[2:]}"):
        read_folder(folder)


def with_weight(name, weight):
    return {"weights": {n: w for n, w in (weights_of() | {name: weight}).items() if w is not None}}


def with_table(rows, width, dtype=np.float32, **more):
    return {"table": np.zeros((rows, width), dtype=dtype), **more}


INT8 = {"scale": np.ones(3, dtype=np.float32), "weights": weights_of(quantized=True), "quantize": "int8"}
FEWER = Items(make_items(IDS, IDS).ids, make_items(IDS, IDS).titles, np.array([2, 4]))  # two titles


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (with_weight("blocks.0.lru.C", np.zeros((5, 10), "f4")), r"\[5, 10\] instead of float32 \[10, 5\]"),
        (with_weight("blocks.0.norm1.bias", np.zeros(5, "f8")), r"bias is float64 \[5\] instead of float32 \[5\]"),
        (with_weight("blocks.0.norm1.bias", None), r"norm1.bias is nothing instead of float32 \[5\]"),
        (with_weight("blocks.1.norm1.bias", np.zeros(5, "f4")), r"norm1.bias is float32 \[5\] instead of nothing"),
        (with_table(3, 5), r"table of shape \[3, 5\] for 3 items of size 5"),
        (with_table(4, 6), r"table of shape \[4, 6\] for 3 items of size 5"),
        (with_table(4, 5, np.float16), "table is F16 instead of F32"),
        (with_table(4, 5, np.int8, **INT8), "for 3 items of size 5"),
        ({"more": {"items.safetensors": pack_items(FEWER, np.zeros((4, 5), "f4"), None)}}, "for 3 items of size"),
        ({"more": {"items.safetensors": b"\xff" * 100}}, "is damaged"),
        ({"more": {"model.safetensors": b""}}, "is damaged"),
    ],
)
def test_content_that_contradicts_config_or_was_never_valid_is_refused(tmp_path, content, problem):
    with pytest.raises(InputError, match=rf"(model|items).safetensors.* ?{problem}.*{AGAIN}"):
        read_folder(write(tmp_path / "out", **content))


ODD = {"x/y": "Thé 🎒", "漢" * 85: "漢字", "x" * 256: "a\n", "42": " b ", "..": "c" * 10_000, "e\u0301": ""}


def test_ids_and_titles_of_any_characters_are_read_as_they_were(tmp_path):
    table = np.zeros((len(ODD) + 1, 5), dtype=np.float32)
    items = read_folder(write(tmp_path / "out", ids=list(ODD), titles=list(ODD.values()), table=table)).items
    assert {items.id(i): items.title(i) for i in range(1, len(items) + 1)} == ODD
    assert make_items(["a"], ["a\ud800b"]).title(1) == "a?b"  # a lone surrogate


STRING = "must be a string of 1 to 256 bytes in UTF-8 without NUL"


@pytest.mark.parametrize(
    ("ids", "titles", "problem"),
    [
        *((["fine", bad], ["", ""], f"{bad!r:.80} {STRING}") for bad in ("", "a\0", "漢" * 86, "a\ud800", 7)),
        (["a", "b", "a"], ["", "", ""], "item id 'a' occurs twice"),
        (IDS, ["", ""], "2 titles for 3 items; give one per item"),
        (IDS, ["", None, ""], "the title of item 'B2' is None; give a string"),
    ],
)
def test_invalid_ids_and_titles_are_named(ids, titles, problem):
    with pytest.raises(InputError) as raised:
        make_items(ids, titles)
    assert problem in str(raised.value)


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_a_table_of_several_chunks_is_read_in_order(tmp_path, dtype):
    rows = 2 * export.CHUNK + 3
    table = np.arange(rows * 2).reshape(rows, 2) % 251 - 125
    int8 = dtype is np.int8
    scale, weights = np.arange(rows, dtype=np.float32), weights_of((2,), quantized=int8)
    ids = [f"i{n}" for n in range(1, rows)]
    how = {"scale": scale, "quantize": "int8"} if int8 else {"quantize": "float16"}
    found = read_folder(
        write(tmp_path / "out", ids, table=table.astype(dtype), weights=weights, size=2, sizes=(2,), **how)
    )
    assert np.array_equal(found.table, table) and found.items.id(rows - 1) == f"i{rows - 1}"
    assert np.array_equal(found.scale, scale) if int8 else found.scale is None


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


KILLED = """
import os, shutil, sys
from pathlib import Path
from tests.test_export_folder import write

CHANGES = ("os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir")

def die_at(n, log):
    count = 0
    def hook(event, arguments):
        nonlocal count
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            count += 1
            if count == n:
                os.write(log, event.encode())
                os._exit(9)
    sys.addaudithook(hook)

os.fsync = lambda _: None
root = Path(sys.argv[1])
for n in range(1, 200):
    place = root / f"{n:03d}"
    place.mkdir()
    write(place / "out", ids=["old"])
    log = os.open(root / f"{n:03d}.log", os.O_WRONLY | os.O_CREAT)
    child = os.fork()
    if not child:
        die_at(n, log)
        write(place / "out", ids=["new"], overwrite=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        shutil.rmtree(place)
        break
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_export_and_the_next_one_succeeds(tmp_path):
    root = tmp_path / "killed"
    root.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(root)], cwd=REPOSITORY, env=environment, check=True, timeout=120)
    places = sorted(root.glob("???"))
    changes = [root.joinpath(f"{place.name}.log").read_text() for place in places]
    assert changes.count("open") >= 10 and "os.remove" in changes
    found = []
    for place in places:
        left = names(place)
        found.append(read_folder(place / "out").items.id(1))
        assert names(place) == left  # reading changes nothing: a writer may be at work
        assert read_folder(write(place / "out", ids=["next"], overwrite=True)).items.id(1) == "next"
        assert names(place) == ["out"]
    # The old one is moved aside, then the new one into its place, then the old one away.
    _, placed, _ = (at + 1 for at, change in enumerate(changes) if change == "os.rename")
    assert found == ["old"] * placed + ["new"] * (len(changes) - placed)


def test_replacing_a_link_replaces_its_target(tmp_path):
    write(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    for name in ("first", "second"):
        assert read_folder(write(tmp_path / "out", ids=[name], overwrite=True)).items.id(1) == name
        assert (tmp_path / "out").is_symlink() and names(tmp_path) == ["out", "real"]
