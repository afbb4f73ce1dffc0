"""Write and read an export: the folder of one model size, ready to serve. Nothing in it is pickled.

README.md             model card
config.json           size, architecture, dataset, encoders, metrics; checksums of the files below
model.safetensors     the weights listed in serving/weights.py
items.safetensors     table   [N+1, m]  item table, float32, float16 or int8; row 0 begins a sequence
                      scale   [N+1]     scale of each row, int8 only
                      ids     [N, W]    item ids in UTF-8, padded with zeros
                      titles  [bytes]   all titles in UTF-8, concatenated
                      title_ends [N]    end of each title
                      removed [n]       numbers of removed items; version 2, written only if there are any
rows.safetensors      with --table_width only: rows [N+1, m], which the encoder reads; `table` then is [N+1, w]
*.onnx                optional: recommend, step and rank (serving/graphs.py)
index.safetensors, scan.onnx     optional: the int8 scan (serving/index.py)
index.faiss           optional: the approximate index

N items, m the size, w the table's width, W bytes of the longest id. A folder is written under a temporary name and
renamed, so it is never half written (common/files.py).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from common.errors import InputError, shown
from common.files import (
    MAX_ID,
    Count,
    Number,
    Positive,
    check_schema,
    former_folder,
    read_json,
    replacing_folder,
    restore_folder,
    sha256,
)
from serving.hub import CARD, IDS, model_card
from serving.weights import baseline_shapes, expected_shapes

FORMAT, VERSION = "fmrlrec-export", 1
WITH_REMOVED = 2  # the version of an export with removed items, which earlier code would recommend
CONFIG, WEIGHTS, ITEMS = "config.json", "model.safetensors", "items.safetensors"
GRAPHS = ("recommend.onnx", "step.onnx", "rank.onnx")
ROWS = "rows.safetensors"
INDEX, SCAN = "index.safetensors", "scan.onnx"  # of an export with --index int8 (serving/index.py)
FAISS = "index.faiss"  # of an export with --index faiss
STORED = {
    "none": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "int8": ("I8", np.int8),
}  # the table's dtype
MAX_CONFIG = 1 << 22  # bytes
HINT = "export the model again: python -m serving.export"
CHUNK = 1 << 16  # rows converted at once


@dataclass(frozen=True)
class Export:
    """The checked content of an export."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    items: Items
    buffer: np.ndarray  # [N+1 and spare rows, m] float32 (also if stored as float16) or int8
    scale: np.ndarray | None  # [N+1] float32 if the table is int8
    removed: np.ndarray  # numbers of removed items, sorted
    rows: np.ndarray | None = None  # [N+1, m], memory-mapped, if the table has another width

    @property
    def table(self) -> np.ndarray:
        """The item table [N+1, m]."""
        return self.buffer[: len(self.items) + 1]

    @property
    def has_graphs(self) -> bool:
        return GRAPHS[0] in self.config["files"]


# --------------------------------------------------------------------------------------------------------------- write


def pack_weights(weights: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of model.safetensors."""
    return save({name: np.ascontiguousarray(value) for name, value in weights.items()})


def pack_items(items: Items, table: np.ndarray, scale: np.ndarray | None, removed: np.ndarray | None = None) -> bytes:
    """Return the bytes of items.safetensors."""
    tensors = {
        "table": np.ascontiguousarray(table),
        "ids": items.ids.view(np.uint8).reshape(len(items), -1),
        "titles": items.titles,
        "title_ends": items.title_ends,
    }
    if scale is not None:
        tensors["scale"] = np.ascontiguousarray(scale)
    if removed is not None and len(removed):
        tensors["removed"] = removed
    return save(tensors)


def pack_rows(rows: np.ndarray) -> bytes:
    """Return the bytes of rows.safetensors."""
    return save({"rows": np.ascontiguousarray(rows)})


def spare_rows(rows: int) -> int:
    """Return how many more rows a table of `rows` rows gets room for. Untouched room takes no memory."""
    return 64 + rows // 32


def write_folder(
    folder: Path, config: dict[str, Any], files: Mapping[str, bytes | Path], overwrite: bool = False
) -> None:
    """Write an export: `files`, config.json with their checksums, and README.md.

    files: name -> bytes, or the path of another export's file to copy.
    Raises InputError, and changes nothing, if `folder` exists without `overwrite`, is not an export or cannot be
    written, or if a copied file differs from its checksum in `config`.
    """
    refuse_existing(folder, overwrite)
    with replacing_folder(folder) as temporary:
        version = WITH_REMOVED if config.get("num_removed") else VERSION
        written = {**config, "format": FORMAT, "version": version, "files": {}}
        for name, content in files.items():
            path = temporary / name
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)
            written["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            if isinstance(content, Path) and written["files"][name] != config["files"].get(name):
                raise InputError(f"{content} changed since it was opened; open it again")
        written["sha256"] = _config_sha256(written)
        (temporary / CARD).write_text(model_card(written), encoding="utf-8")
        (temporary / CONFIG).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise InputError if `folder` exists and may not be replaced."""
    folder = folder.resolve()
    restore_folder(folder)
    if not folder.exists():
        return
    if not overwrite:
        raise InputError(f"{folder} exists; pass --overwrite (overwrite=True) to replace it, or choose another folder")
    try:
        is_export = read_json(folder / CONFIG, HINT, MAX_CONFIG).get("format") == FORMAT
    except InputError:
        is_export = False
    if not is_export:
        raise InputError(f"{folder} is not an export, so it is not overwritten; choose another folder")


# ---------------------------------------------------------------------------------------------------------------- read


def read_folder(folder: str | Path) -> Export:
    """Read and check an export. Raises InputError that names the damaged file and how to mend it."""
    try:
        folder = Path(folder).resolve()
        (folder / CONFIG).is_file()
    except (OSError, ValueError) as error:  # a name that is too long or cannot be encoded
        raise InputError(f"{str(folder)!r:.80} is not a folder's name ({error!s:.80}); give an export's") from None
    if not folder.exists() and former_folder(folder).exists():  # killed between the two renames
        folder = former_folder(folder)
    if folder.is_file() and folder.name.endswith(".tar.gz"):
        unpacked = folder.name.removesuffix(".tar.gz")
        raise InputError(f"{folder} is an archive; unpack it by `tar xf` and give the folder {unpacked}")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is not an export (it has no {CONFIG}); python -m serving.export makes one")
    config = read_json(folder / CONFIG, HINT, MAX_CONFIG)
    if "settings" in config:
        raise InputError(
            f"{folder} is a run, not an export; export it: python -m serving.export --run {shlex.quote(str(folder))}"
        )
    if config.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG} does not describe an export; {HINT}")
    if config.get("version") not in (VERSION, WITH_REMOVED):
        raise InputError(
            f"{folder} has format version {config.get('version')!r}, this code reads versions {VERSION} and "
            f"{WITH_REMOVED}; update the code, or {HINT}"
        )
    if config.get("sha256") != _config_sha256(config):
        raise InputError(f"{folder / CONFIG} was altered (its checksum differs); {HINT}")
    check_schema(config, ExportConfig, folder / CONFIG, HINT)
    sizes = config["sizes"]
    if sizes[-1] != config["size"] or any(low >= high for low, high in itertools.pairwise(sizes)):
        raise InputError(f"{folder / CONFIG}: sizes {sizes} must rise and end at size {config['size']}; {HINT}")
    if IDS in config["files"]:
        raise InputError(
            f"{folder} is one ONNX file for other runtimes; its README.md shows how to use it. For the Recommender "
            "export it with --format torch or onnx"
        )
    for name in (WEIGHTS, ITEMS, *sorted(set(config["files"]) - {WEIGHTS, ITEMS})):
        path, expected = folder / name, config["files"].get(name)
        if expected is None or Path(name).name != name:
            raise InputError(f"{folder / CONFIG} lists {name!r} wrongly or not at all; {HINT}")
        if not path.is_file():
            raise InputError(f"{path} is missing; {HINT}")
        if path.stat().st_size != expected["bytes"]:
            raise InputError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}; {HINT}")
        if sha256(path) != expected["sha256"]:
            raise InputError(f"{path} was altered (its checksum differs); {HINT}")
    weights = _read_weights(folder / WEIGHTS, config)
    rows = _map_rows(folder / ROWS, config) if config.get("table_width") else None
    return Export(folder, config, weights, *_read_items(folder / ITEMS, config), rows)


def _read_weights(path: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    with _named(path):
        weights = load_file(path)
    features, int8 = config["features"], config["quantize"] == "int8"
    if "model" in config:
        return _checked_baseline(path, weights, config)
    shapes = expected_shapes(
        config["size"],
        config["num_blocks"],
        features["dim"],
        int8,
        features.get("whitened", ()),
        config.get("post_norm", False),
        config.get("table_width"),
    )
    for name in sorted(shapes.keys() | weights.keys()):
        found = f"{weights[name].dtype} {list(weights[name].shape)}" if name in weights else "nothing"
        dtype = "int8" if f"{name}.scale" in shapes else "float32"
        expected = f"{dtype} {list(shapes[name])}" if name in shapes else "nothing"
        if found != expected:
            raise InputError(f"{path}: {name} is {found} instead of {expected}; {HINT}")
    return weights


def _checked_baseline(path: Path, weights: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the weights of a baseline. Raises InputError if one has another type or shape than its model's."""
    shapes = baseline_shapes(config)
    for name in sorted(shapes.keys() | weights.keys()):
        found, shape = weights.get(name), shapes.get(name, ())
        dtype = np.int64 if name in ("begins", "neighbours") else np.float32
        fits = found is not None and name in shapes and found.dtype == dtype and found.ndim == len(shape)
        if not fits or any(n not in (None, weights[name].shape[axis]) for axis, n in enumerate(shape)):
            raise InputError(f"{path}: {name} does not fit a {config['model']} of size {config['size']}; {HINT}")
    if "begins" in weights:
        begins, neighbours = weights["begins"], weights["neighbours"]
        ends = begins[0] == 0 and begins[-1] == len(neighbours) == len(weights["alike"])
        if not ends or (np.diff(begins) < 0).any() or ((neighbours < 1) | (neighbours > config["num_items"])).any():
            raise InputError(f"{path}: the neighbours are not of {config['num_items']} items; {HINT}")
    return weights


def _map_rows(path: Path, config: dict[str, Any]) -> np.ndarray:
    """Return the full rows [N+1, m], memory-mapped: only rows of histories are ever read."""
    shape, (name, dtype) = [config["num_items"] + 1, config["size"]], STORED[config["quantize"]]
    if ROWS not in config["files"]:
        raise InputError(f"{path} is missing; {HINT}")
    with _named(path), safe_open(path, framework="numpy") as file:
        found = file.get_slice("rows")
        if (found.get_shape(), found.get_dtype()) != (shape, name):
            raise ValueError(f"rows is {found.get_dtype()} {found.get_shape()} instead of {name} {shape}")
    with path.open("rb") as opened:
        offset = tensor_offsets(opened.read(int.from_bytes(opened.read(8), "little")))["rows"][0]
    return np.memmap(path, dtype, mode="r", offset=offset, shape=tuple(shape))


def _read_items(path: Path, config: dict[str, Any]) -> tuple[Items, np.ndarray, np.ndarray | None, np.ndarray]:
    with _named(path), safe_open(path, framework="numpy") as file:
        ids = _tensor(file, "ids", np.uint8, 2)
        items = Items(
            np.ascontiguousarray(ids).view(f"S{ids.shape[1]}")[:, 0],
            _tensor(file, "titles", np.uint8, 1),
            _tensor(file, "title_ends", np.int64, 1),
            config.get("whole_number_ids", False),
        )
        rows, found = len(items) + 1, file.get_slice("table")
        size = config.get("table_width") or config["size"]
        scale = _tensor(file, "scale", np.float32, 1) if config["quantize"] == "int8" else None
        removed = _tensor(file, "removed", np.int64, 1) if config["version"] == WITH_REMOVED else np.zeros(0, np.int64)
        shape, stored = found.get_shape(), STORED[config["quantize"]]
        if found.get_dtype() != stored[0]:
            raise InputError(f"{path}: table is {found.get_dtype()} instead of {stored[0]}; {HINT}")
    if shape != [rows, size] or len(items.title_ends) != len(items) or (scale is not None and len(scale) != rows):
        raise InputError(f"{path}: table of shape {shape} for {len(items)} items of size {size}; {HINT}")
    ends = np.concatenate([[0], items.title_ends])
    if (np.diff(ends) < 0).any() or ends[-1] != len(items.titles):
        raise InputError(f"{path}: title_ends do not divide the {len(items.titles)} bytes of titles; {HINT}")
    if len(removed) and not (removed.min() >= 1 and removed.max() < rows):
        raise InputError(f"{path}: removed has numbers beyond 1 to {rows - 1}; {HINT}")
    table = np.empty((rows + spare_rows(rows), size), dtype=np.int8 if scale is not None else np.float32)
    with path.open("rb") as opened:  # convert in chunks, so a large table is in memory once
        length = int.from_bytes(opened.read(8), "little")
        opened.seek(tensor_offsets(opened.read(length))["table"][0])
        for start in range(0, rows, CHUNK):
            piece = table[start : min(start + CHUNK, rows)]
            piece[:] = np.fromfile(opened, dtype=stored[1], count=piece.size).reshape(piece.shape)
    return items, table, scale, removed


def _tensor(file: Any, name: str, dtype: type, dimensions: int) -> np.ndarray:
    """Return a tensor of a safetensors file. Raises ValueError for another dtype or number of dimensions."""
    tensor = file.get_tensor(name)
    if tensor.dtype != dtype or tensor.ndim != dimensions or 0 in tensor.shape[1:]:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    return tensor


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise the errors of reading a safetensors file as an InputError that names it."""
    try:
        yield
    except (SafetensorError, ValueError, TypeError, KeyError) as error:  # KeyError: a dtype that NumPy lacks
        raise InputError(f"{path} is damaged ({error}); {HINT}") from error


def tensor_offsets(header: bytes) -> dict[str, tuple[int, int]]:
    """Return tensor name -> (first byte, number of bytes) in a safetensors file.

    header: the file's JSON header, without the 8 bytes before it that give its length.
    """
    tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
    first = 8 + len(header)
    return {
        name: (first + tensor["data_offsets"][0], tensor["data_offsets"][1] - tensor["data_offsets"][0])
        for name, tensor in tensors.items()
    }


def _config_sha256(config: dict[str, Any]) -> str:
    content = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------- ids and titles
# Stored as arrays, so that millions load at once.

ItemId = str | int  # the dataset's id, or the item's number (serving/catalogue.py)


@dataclass(frozen=True)
class Items:
    """The ids and titles of items 1..N."""

    ids: np.ndarray  # [N] bytes, UTF-8
    titles: np.ndarray  # [bytes] uint8, UTF-8, concatenated
    title_ends: np.ndarray  # [N] int64
    were_numeric: bool = False  # all ids were whole numbers until products with other ids were added

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, item: int) -> str:
        return self.ids[item - 1].decode("utf-8", "replace")

    def title(self, item: int) -> str:
        start = self.title_ends[item - 2] if item > 1 else 0
        return self.titles[start : self.title_ends[item - 1]].tobytes().decode("utf-8", "replace")

    def find(self, ids: Sequence[str]) -> list[int]:
        """Return the number of each id, 0 if it is unknown."""
        if not len(self) or not ids:
            return [0] * len(ids)
        encoded = (item.encode("utf-8", "surrogatepass") for item in ids)
        keys = np.array(
            [b"" if b"\0" in key or len(key) > self.ids.itemsize else key for key in encoded], dtype=self.ids.dtype
        )
        at = np.minimum(np.searchsorted(self.ids, keys, sorter=self._order), len(self) - 1)
        found = self._order[at]
        return np.where((self.ids[found] == keys) & (keys != b""), found + 1, 0).tolist()

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.ids)

    @cached_property
    def numeric(self) -> bool:
        """Whether every id of the first export is a whole number, such as "4711"."""
        if self.were_numeric:
            return True
        characters = self.ids.view(np.uint8)
        digits = ((characters >= ord("0")) & (characters <= ord("9"))) | (characters == 0)
        return len(self) > 0 and bool(digits.all())

    def extended(self, more: Items) -> Items:
        """Return these items with `more` appended."""
        ids, titles = np.concatenate([self.ids, more.ids]), np.concatenate([self.titles, more.titles])
        ends = np.concatenate([self.title_ends, more.title_ends + len(self.titles)])
        return Items(ids, titles, ends, self.numeric)


def make_items(ids: Iterable[str], titles: Iterable[str]) -> Items:
    """Return Items with these ids and titles. Raises InputError for an invalid or duplicate id and an invalid title."""
    ids, titles = list(ids), list(titles)
    if len(titles) != len(ids):
        raise InputError(f"{len(titles)} titles for {len(ids)} items; give one per item, '' if it has none")
    seen: set[str] = set()
    for item, title in zip(ids, titles, strict=True):
        if not isinstance(item, str) or not 1 <= len(_utf8(item)) <= MAX_ID or "\0" in item:
            raise InputError(f"item id {shown(item)} must be a string of 1 to {MAX_ID} bytes in UTF-8 without NUL")
        if item in seen:
            raise InputError(f"item id {shown(item)} occurs twice; ids must be unique")
        if not isinstance(title, str):
            raise InputError(f"the title of item {shown(item)} is {shown(title)}; give a string, '' if it has none")
        seen.add(item)
    encoded = [title.encode("utf-8", "replace") for title in titles]
    return Items(
        np.array([item.encode() for item in ids], dtype=np.bytes_),
        np.frombuffer(b"".join(encoded), dtype=np.uint8),
        np.cumsum([len(title) for title in encoded], dtype=np.int64),
    )


def _utf8(text: str) -> bytes:
    """Encode a string; b"" if it has a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return b""


# --------------------------------------------------------------------------------------------------------------- schema
# The content of config.json.

MAX_SIZE = 1 << 16

Width = Annotated[int, Meta(ge=1, le=1 << 20)]  # of features
Size = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,8}$")]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class StoredFile(Struct):
    """The size and checksum of a file."""

    bytes: Count
    sha256: Sha256


class Dataset(Struct):
    """The dataset of the training."""

    code: str
    digest: str


class ImageEncoder(Struct):
    """The encoder of the pictures."""

    encoder: str
    fingerprint: dict[str, Any]


class TextEncoder(ImageEncoder):
    """The encoder of the texts, and the metadata that they are made of."""

    commit: str | None
    attributes: Annotated[list[str], Meta(min_length=1)]


class FeatureFile(Struct):
    """Features that were read from a file."""

    name: str
    sha256: str
    dim: Width


class Features(Struct):
    """How the items' features were made, by datasets/features/load.py."""

    dim: Annotated[int, Meta(ge=0, le=1 << 20)]
    language: TextEncoder | None
    image: ImageEncoder | None
    files: list[FeatureFile] = []
    whitened: list[Width] = []


class PlaneRow(Struct, rename={"ndcg": "NDCG@10"}):
    """An encoder size of the run, with the metric of every table width; experiments/cut.py measures them."""

    encoder_ms: Number
    ndcg: dict[Size, Number]


class ExportConfig(Struct):
    """config.json, whose format and version are right."""

    size: Annotated[int, Meta(ge=1, le=MAX_SIZE)]
    sizes: Annotated[list[Annotated[int, Meta(ge=1, le=MAX_SIZE)]], Meta(min_length=1, max_length=1000)]
    num_blocks: Annotated[int, Meta(ge=1, le=1000)]
    max_len: Annotated[int, Meta(ge=1, le=1 << 20)]
    num_items: Positive
    dataset: Dataset
    features: Features
    quantize: Literal["none", "float16", "int8"]
    files: dict[str, StoredFile]
    post_norm: bool = False
    history_bias: Number = 0.0  # added to the scores of history items; 0: none
    table_width: Annotated[int, Meta(ge=1, le=MAX_SIZE)] | None = None  # of the table that is ranked; None: size
    num_removed: Count = 0
    whole_number_ids: bool = False  # Items.were_numeric
    run: str = ""
    commit: str | None = None
    metrics: dict[str, Number] | None = None
    plane: dict[Size, PlaneRow] = {}
