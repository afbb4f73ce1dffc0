"""An exported model's folder: one size, ready to serve. Nothing in it is pickled.

config.json           what it is: size, architecture, dataset, encoders, metrics; checksums of the files below
model.safetensors     the weights as model/serving/weights.py lists them
items.safetensors     table   [N+1, m]  the projected item table, float32, float16 or int8; row 0 begins a sequence
                      scale   [N+1]     of int8 rows
                      ids     [N, W]    item ids in UTF-8, filled up with zeros
                      titles  [bytes]   all titles in UTF-8, one after another
                      title_ends [N]    where each ends
*.onnx                optional: recommend, step and rank (model/serving/graphs.py)
README.md             the same for people

N items, m the size, W bytes of the longest id. A folder is written beside its place and renamed, so that it is whole or
as it was before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import InputError
from datasets.files import read_json
from model.serving.weights import expected_shapes

FORMAT, VERSION = "fmrlrec-export", 1
CONFIG, WEIGHTS, ITEMS, CARD = "config.json", "model.safetensors", "items.safetensors", "README.md"
GRAPHS = ("recommend.onnx", "step.onnx", "rank.onnx")
MAX_ID = 256  # bytes
CHUNK = 1 << 16  # rows of a table that are converted at once


@dataclass(frozen=True)
class Items:
    """What there is to recommend: item i (1..N) has ids[i - 1] and title(i)."""

    ids: np.ndarray  # [N] of bytes, UTF-8
    titles: np.ndarray  # [bytes] uint8
    title_ends: np.ndarray  # [N] int64

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, item: int) -> str:
        return self.ids[item - 1].decode("utf-8", "surrogatepass")

    def title(self, item: int) -> str:
        start = self.title_ends[item - 2] if item > 1 else 0
        return self.titles[start : self.title_ends[item - 1]].tobytes().decode()

    def extended(self, more: Items) -> Items:
        """These items and then `more`."""
        ends = np.concatenate([self.title_ends, more.title_ends + len(self.titles)])
        return Items(np.concatenate([self.ids, more.ids]), np.concatenate([self.titles, more.titles]), ends)


def make_items(ids: list[str], titles: list[str]) -> Items:
    """Items of these ids and titles. Raises InputError for an id that cannot be stored, or stands twice."""
    seen: set[str] = set()
    for item in ids:
        if not isinstance(item, str) or "\0" in item or not 1 <= len(item.encode("utf-8", "surrogatepass")) <= MAX_ID:
            raise InputError(f"item id {item!r:.80} must be a text of 1 to {MAX_ID} bytes without the character NUL")
        if item in seen:
            raise InputError(f"item id {item!r} stands twice; ids must be unique")
        seen.add(item)
    if len(titles) != len(ids):
        raise InputError(f"{len(titles)} titles for {len(ids)} items; give one a piece")
    encoded = [title.encode("utf-8", "replace") for title in titles]
    ends = np.cumsum([len(title) for title in encoded], dtype=np.int64)
    return Items(
        np.array([item.encode("utf-8", "surrogatepass") for item in ids], dtype=np.bytes_),
        np.frombuffer(b"".join(encoded), dtype=np.uint8),
        ends,
    )


@dataclass(frozen=True)
class Export:
    """A folder's content, checked."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    items: Items
    table: np.ndarray  # [N+1, m] float32 (also where it is stored as float16) or int8
    scale: np.ndarray | None  # [N+1] float32 of an int8 table

    @property
    def has_graphs(self) -> bool:
        return GRAPHS[0] in self.config["files"]


# --------------------------------------------------------------------------------------------------------------- write


def pack_weights(weights: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of model.safetensors."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(value) for name, value in weights.items()})


def pack_items(items: Items, table: np.ndarray, scale: np.ndarray | None) -> bytes:
    """The bytes of items.safetensors."""
    from safetensors.numpy import save

    tensors = {
        "table": np.ascontiguousarray(table),
        "ids": items.ids.view(np.uint8).reshape(len(items), -1),
        "titles": items.titles,
        "title_ends": items.title_ends,
    }
    if scale is not None:
        tensors["scale"] = scale
    return save(tensors)


def write_folder(
    folder: Path, config: dict[str, Any], files: Mapping[str, bytes | Path], card: str, overwrite: bool = False
) -> None:
    """Write an export: files (bytes, or a path to copy) and config.json with their checksums.

    Raises InputError where `folder` exists and `overwrite` is not set, where it is no export, and where it cannot be
    written; it is then as it was before.
    """
    refuse_existing(folder, overwrite)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        config = {**config, "format": FORMAT, "version": VERSION, "files": {}}
        for name, content in files.items():
            path = temporary / name
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)
            config["files"][name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        config["sha256"] = _config_sha256(config)
        (temporary / CARD).write_text(card, encoding="utf-8")
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        former = _former(folder)
        if folder.exists():
            folder.rename(former)
        temporary.rename(folder)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        _restore(folder)
        raise InputError(
            f"cannot write {folder}: {error.strerror or error}; free space or give another --out"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise InputError where something is in the way of an export."""
    _restore(folder)
    if not (folder.exists() or folder.is_symlink()):
        return
    if not overwrite:
        raise InputError(f"{folder} exists; give --overwrite to replace it, or another --out")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is no export (it has no {CONFIG}), so it is not overwritten; give another --out")


def _former(folder: Path) -> Path:
    """Where the former export lies for the moment between two renames."""
    return folder.parent / f".{folder.name}.former"


def _restore(folder: Path) -> None:
    """Bring back the former export where a kill fell into that moment."""
    if not folder.exists() and _former(folder).exists():
        _former(folder).rename(folder)


# ---------------------------------------------------------------------------------------------------------------- read


def read_folder(folder: str | Path) -> Export:
    """Read and check an export. Raises InputError that names the file, what is wrong and what mends it."""
    folder, mends = Path(folder), "export the model again: python -m model.export --run ..."
    _restore(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is no exported model (it has no {CONFIG}); python -m model.export makes one")
    config = read_json(folder / CONFIG, mends)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG} describes no exported model; {mends}")
    if not isinstance(config.get("version"), int) or config["version"] > VERSION:
        raise InputError(
            f"{folder} has format version {config.get('version')!r}, this code reads up to {VERSION}; update the code"
        )
    if config.get("sha256") != _config_sha256(config):
        raise InputError(f"{folder / CONFIG} was altered (its checksum differs); {mends}")
    for name in {WEIGHTS, ITEMS, *config["files"]}:
        path, expected = folder / name, config["files"].get(name)
        if expected is None or Path(name).name != name:
            raise InputError(f"{folder / CONFIG} lists no {name}; {mends}")
        if not path.is_file():
            raise InputError(f"{path} is missing; {mends}")
        if path.stat().st_size != expected["bytes"]:
            raise InputError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}; {mends}")
        if _sha256(path) != expected["sha256"]:
            raise InputError(f"{path} was altered (its checksum differs); {mends}")
    weights = _read_weights(folder / WEIGHTS, config, mends)
    items, table, scale = _read_items(folder / ITEMS, config, mends)
    return Export(folder, config, weights, items, table, scale)


def _read_weights(path: Path, config: dict[str, Any], mends: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    weights = load_file(path)
    expected = expected_shapes(
        config["size"], config["num_blocks"], config["features"]["dim"], config["quantize"] == "int8"
    )
    for name in expected.keys() | weights.keys():
        found = tuple(weights[name].shape) if name in weights else None
        if found != expected.get(name):
            raise InputError(f"{path}: {name} has shape {found} instead of {expected.get(name)}; {mends}")
    return weights


def _read_items(path: Path, config: dict[str, Any], mends: str) -> tuple[Items, np.ndarray, np.ndarray | None]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        ids = file.get_tensor("ids")
        items = Items(
            np.ascontiguousarray(ids).view(f"S{ids.shape[1]}")[:, 0],
            file.get_tensor("titles"),
            file.get_tensor("title_ends"),
        )
        rows, size, found = len(items) + 1, config["size"], file.get_slice("table")
        scale = file.get_tensor("scale") if config["quantize"] == "int8" else None
        shape, stored = found.get_shape(), {"F32": np.float32, "F16": np.float16, "I8": np.int8}[found.get_dtype()]
    if shape != [rows, size] or len(items.title_ends) != len(items) or (scale is not None and len(scale) != rows):
        raise InputError(f"{path}: a table of {shape} for {len(items)} items of size {size}; {mends}")
    table = np.empty((rows, size), dtype=np.int8 if stored == np.int8 else np.float32)
    with path.open("rb") as opened:  # read and widened in pieces, so that a large table is in memory once
        length = int.from_bytes(opened.read(8), "little")
        opened.seek(tensor_offsets(opened.read(length))["table"][0])
        for start in range(0, rows, CHUNK):
            piece = table[start : start + CHUNK]
            piece[:] = np.fromfile(opened, dtype=stored, count=piece.size).reshape(piece.shape)
    return items, table, scale


def tensor_offsets(header: bytes) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies: name -> (first byte, bytes). header: the JSON that the file begins
    with, without the 8 bytes that say how long it is."""
    tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
    first = 8 + len(header)
    return {
        name: (first + tensor["data_offsets"][0], tensor["data_offsets"][1] - tensor["data_offsets"][0])
        for name, tensor in tensors.items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config_sha256(config: dict[str, Any]) -> str:
    content = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
