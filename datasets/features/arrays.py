"""Features from a file: a vector per product id, made by any means. N items, F feature width, n new products.

Rows are scaled to length 1, as encoders' are. Items that the file lacks have zero vectors.
"""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from common import processes
from common.errors import InputError
from common.files import ARRAY_ERRORS, check_regular, check_schema, parse_json, read_json, read_text, write_json
from datasets.features import cache, encode
from datasets.features.encode import normalised
from datasets.features.modality import CHUNK, Job, Modality, Record, digest

if TYPE_CHECKING:
    from config import FeatureSettings

DIGESTS = "digests.json"  # in the cache: path -> size, time and SHA-256, so that a large file is hashed once


@dataclass(frozen=True)
class FileModality(Modality):
    """Vectors from a file, under a name that the user gives."""

    name: str
    path: Path
    cache_root: Path = Path()
    trained: dict[str, Any] | None = None  # the description in an export

    kind = "file"
    block = "files"
    several = True

    @classmethod
    def from_settings(cls, settings: FeatureSettings) -> list[Self]:
        for name in settings.feature_files:
            if name in settings.item_attributes:
                raise InputError(f"--features {name}=...: {name!r} is one of --item_attributes; give another name")
        cache_root = Path(settings.features_root)
        return [cls(name, Path(path), cache_root) for name, path in settings.feature_files.items()]

    @classmethod
    def from_description(cls, description: Any, encoder: str | None) -> Self:
        return cls(description["name"], Path(), trained=description)

    def inputs(self, job: Job) -> list[str]:
        processes.on_main_process(lambda: open_array_file(self.path).width)  # raises if it cannot be read
        return job.catalog.asins

    def key(self, job: Job, inputs: Sequence[str]) -> dict[str, Any]:
        content = processes.on_main_process(lambda: file_sha256(self.path, self.cache_root))
        return {"kind": self.kind, "version": 1, "sha256": content, "items": digest(inputs)}

    def cache_name(self, key: dict[str, Any]) -> str:
        return f"{self.name}-{key['sha256']}"  # so the run's env.json has the digest

    def refuse_change(self, job: Job) -> None:
        raise InputError(
            f"--features {self.name}={self.path} is not the file that the run was trained on (its SHA-256 differs); "
            f"put that one back, or train anew"
        )

    def make(self, file: cache.File, inputs: Sequence[str], job: Job) -> dict[str, Any]:
        processes.print_main(f"reading {self.path}, once: {file.path}")
        return processes.on_main_process(lambda: self._copy(file, inputs))

    def _copy(self, file: cache.File, asins: Sequence[str]) -> dict[str, Any]:
        """Copy the rows of the catalogue's items from the file to the cache."""
        source, row_of = open_array_file(self.path), {asin: row for row, asin in enumerate(asins)}
        batches = encode.in_order(len(asins), CHUNK)
        plan = {"key": file.key, "commit": "", "shape": [len(asins), source.width]}
        cache.begin(file.path, plan, (len(asins), source.width), batches)
        try:
            writer = cache.Writer(file.path)
            checksums = np.zeros(len(asins), np.uint32)  # of each item's row in the file; 0: not there
            places = np.zeros(len(asins), np.int64)
            done = 0
            from tqdm import tqdm

            for ids, rows in tqdm(source.pieces(), f"reading {self.path.name}", unit="piece", disable=None):
                kept = [(at, row_of[item]) for at, item in enumerate(ids) if item in row_of]
                for at, row in kept:
                    if not np.isfinite(rows[at]).all():
                        raise InputError(
                            f"{source.place(done + at)} ({asins[row]}) has a number that is not finite; mend it or "
                            f"leave the product out"
                        )
                    checksum = zlib.crc32(np.ascontiguousarray(rows[at]).data) or 1
                    if checksums[row] not in (0, checksum):
                        raise InputError(
                            f"{source.place(done + at)} has other numbers for {asins[row]} than {source.unit} "
                            f"{places[row] + source.first}; keep one of the two"
                        )
                    checksums[row], places[row] = checksum, done + at
                if kept:
                    of_file, of_items = np.array(kept).T
                    writer.rows[of_items] = normalised(rows[of_file].astype(np.float64))
                done += len(ids)
            if not checksums.any():
                raise InputError(
                    f"{self.path} has {done:,} products and none of the {len(asins):,} items, whose ids are such as "
                    f"{asins[0]!r}; give a file with the ids of datamaps.json"
                )
            known = np.flatnonzero(checksums)
            if len(known) > 1 and (checksums[known] == checksums[known[0]]).all():
                raise InputError(
                    f"{self.path} has the same vector for all {len(known):,} items, so they cannot be told apart; give "
                    f"a file with the vectors of another encoder"
                )
            for number, batch in enumerate(batches):
                writer.mark(number, batch)
            absent = {asins[row]: f"not in {self.path.name}" for row in np.flatnonzero(checksums == 0).tolist()}
            return cache.finish(file.path, {"key": file.key, "commit": "", "broken": absent}, batches)
        except BaseException:
            cache.drop(file.path)
            raise

    def note(self, file: cache.File, job: Job) -> None:
        if absent := len(file.header["broken"]):
            processes.print_main(
                f"{absent} of {job.catalog.num_items} items are not in {self.path}: zero vectors, named in "
                f"{cache.sidecar(file.path)}"
            )

    def describe(self, width: int) -> dict[str, Any]:
        return {"name": self.name, "sha256": file_sha256(self.path, self.cache_root), "dim": width}

    def has_input(self, record: Record) -> bool:
        value = record.get(self.name)
        return value is not None and not (isinstance(value, float) and np.isnan(value))  # NaN: an empty cell

    def embed(self, records: Sequence[Record]) -> np.ndarray:
        assert self.trained is not None  # made by from_description
        width = self.trained["dim"]
        features = np.zeros((len(records), width))
        for row, record in enumerate(records):
            if not self.has_input(record):
                continue  # zeros, as in training
            try:
                vector = np.asarray(record[self.name], dtype=np.float64)
            except (TypeError, ValueError, OverflowError):
                vector = np.empty(())
            if vector.shape != (width,) or not np.isfinite(vector).all():
                raise InputError(
                    f"{self.name!r} of record {row + 1} is {record[self.name]!r:.80}; give a list of {width} finite "
                    f"numbers, or nothing"
                )
            features[row] = vector
        return normalised(features)


def file_sha256(path: Path, cache_root: Path) -> str:
    """Return the SHA-256 of a file of vectors (.npy: of the array, then the ids).

    The cache remembers it by the file's size and time.
    """
    parts = parts_of(path)
    signature = [[part.name, part.stat().st_size, part.stat().st_mtime_ns] for part in parts]
    memory, where = cache_root / DIGESTS, str(path.resolve())
    check_regular(memory, "remove it")
    try:
        known = read_json(memory, "")
        if known[where]["files"] == signature:
            return known[where]["sha256"]
    except (InputError, KeyError, TypeError):
        known = {}
    content = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    known[where] = {"files": signature, "sha256": content.hexdigest()}
    with suppress(InputError):  # a cache that may only be read
        write_json(memory, known)
    return content.hexdigest()


# ---------------------------------------------------------------------------------------------------------- array files
# Files of vectors by product id, read in pieces. R rows, F feature width.
#
#     .npy            a 2-d array, with FILE.ids.txt (an id per line) or FILE.ids.json (a list) beside FILE.npy
#     .safetensors    "features" [R, F] with "ids" [R, bytes] uint8 (UTF-8, zero-padded), or a 1-d tensor per product id
#     .csv, .parquet  the first column has the ids, the others numbers; or one column of lists (.parquet)
#     .b              Amazon's visual features of 2014: records of a 10-byte ASIN and 4096 float32, little endian
#
# Nothing is unpickled.

ID_COLUMNS = ("asin", "item_id", "product_id", "parent_asin", "id")
AMAZON = np.dtype([("id", "S10"), ("row", "<f4", 4096)])
PIECE = 1024  # rows that are read at once

Piece = tuple[Sequence[str], np.ndarray]  # ids, rows [n, F]


@dataclass(frozen=True)
class ArrayFile:
    """A file that was opened: its width, and its rows in pieces."""

    path: Path
    width: int
    pieces: Callable[[], Iterator[Piece]]
    unit: str = "row"  # what the file's rows are called, in messages
    first: int = 1  # number of the first one

    def place(self, index: int) -> str:
        """Return where the row of this index is."""
        return f"{self.path}, {self.unit} {index + self.first}"


def open_array_file(path: Path) -> ArrayFile:
    """Open a file of vectors by its suffix. Raises InputError that names the file, the row and a way to mend it."""
    reader = READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"{path} has none of the known suffixes {', '.join(READERS)}; convert it to one of them")
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a {path.suffix} file")
    found = reader(path)
    if not found.width:
        raise InputError(f"{path} has vectors without numbers; give at least one number per product")
    return found


def parts_of(path: Path) -> list[Path]:
    """Return the files that hold the vectors: the file itself, and the ids beside a .npy file."""
    if path.suffix != ".npy":
        return [path]
    choices = [path.with_suffix(".ids.txt"), path.with_suffix(".ids.json")]
    for ids in choices:
        if ids.is_file():
            return [path, ids]
    raise InputError(
        f"{path} has no product ids beside it; write {choices[0].name} (an id per line) or {choices[1].name} (a list)"
    )


def _open_npy(path: Path) -> ArrayFile:
    [_, ids_path] = parts_of(path)
    hint = "save a 2-d array of numbers with numpy.save"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise _unreadable(path, error, hint) from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        kind = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise InputError(f"{path} is {kind}; {hint}")
    text = read_text(ids_path, "write one product id for each row of the array")
    ids = text.removesuffix("\n").split("\n") if ids_path.suffix == ".txt" else _json_ids(ids_path, text)
    if len(ids) != len(array):
        raise InputError(f"{ids_path} has {len(ids)} ids for the {len(array)} rows of {path}; give one for each row")

    def pieces() -> Iterator[Piece]:
        for start in range(0, len(ids), PIECE):
            yield [item.strip() for item in ids[start : start + PIECE]], array[start : start + PIECE]

    return ArrayFile(path, array.shape[1], pieces)


def _json_ids(path: Path, text: str) -> list[str]:
    hint = "write a JSON list of product ids"
    try:
        return check_schema(parse_json(text), list[str], path, hint)
    except ValueError as error:
        raise _unreadable(path, error, hint) from None


def _open_safetensors(path: Path) -> ArrayFile:
    from safetensors import SafetensorError, safe_open

    hint = 'save "features" [products, width] with "ids" [products, bytes] uint8, or a 1-d tensor per product id'
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            shapes = {name: list(tensor.get_shape()) for name, tensor in found.items()}
            types = {name: tensor.get_dtype() for name, tensor in found.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error, hint) from None
    if not shapes:
        raise InputError(f"{path} has no tensor; {hint}")
    table = {"features", "ids"} & set(shapes) != set()
    if table and not (
        set(shapes) >= {"features", "ids"}
        and len(shapes["features"]) == len(shapes["ids"]) == 2
        and shapes["features"][0] == shapes["ids"][0]
        and types["ids"] == "U8"
    ):
        raise InputError(f"{path} has {', '.join(f'{n} {types[n]} {s}' for n, s in shapes.items())}; {hint}")
    width = shapes["features"][-1] if table else (shapes[min(shapes)] or [0])[0]
    for name in ["features"] if table else shapes:
        if types[name] not in ("F16", "F32", "F64", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"):
            raise InputError(f"{path}: tensor {name!r} is {types[name]}; save numbers of float16, float32 or float64")
        if not table and shapes[name] != [width]:
            raise InputError(f"{path}: tensor {name!r} has shape {shapes[name]}, others {[width]}; save one width")

    def pieces() -> Iterator[Piece]:
        with safe_open(path, framework="numpy") as file:
            names = sorted(shapes)
            count = shapes["features"][0] if table else len(names)
            for start in range(0, count, PIECE):
                end = min(start + PIECE, count)
                if table:
                    codes = [bytes(row).rstrip(b"\0") for row in file.get_slice("ids")[start:end]]
                    ids = [code.decode("utf-8", "replace") for code in codes]
                    yield ids, file.get_slice("features")[start:end]
                else:
                    some = names[start:end]
                    yield some, np.stack([file.get_tensor(name) for name in some])

    return ArrayFile(path, width, pieces, "row" if table else "tensor (sorted by name)")


def _to_floats(column: Any) -> Any:
    """Return a column of a CSV file as numbers; NaN for text, infinity for integers beyond floats."""
    import pandas as pd

    return pd.to_numeric(column.astype(str) if column.dtype == object else column, errors="coerce")


def _open_csv(path: Path) -> ArrayFile:
    import pandas as pd

    hint = f"write a header with {' or '.join(ID_COLUMNS)} first, then one number per column"

    def read(**options: Any) -> Any:
        return pd.read_csv(path, na_filter=False, index_col=False, encoding="utf-8-sig", **options)

    errors = (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError, OSError)
    try:
        columns = list(read(nrows=0).columns)
    except errors as error:
        raise _unreadable(path, error, hint) from None
    _check_id_column(path, columns, hint)

    def pieces() -> Iterator[Piece]:
        done = 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # for a row that is too long
                for table in read(chunksize=PIECE, dtype={columns[0]: str}):
                    numbers = table[columns[1:]].apply(_to_floats)
                    bad = ~np.isfinite(numbers.to_numpy(np.float64))
                    if bad.any():
                        row, column = np.argwhere(bad)[0]
                        raise InputError(
                            f"{path}, line {done + row + 2}: column {columns[1 + column]!r} has "
                            f"{table.iat[row, 1 + column]!r}; give a finite number"
                        )
                    yield table[columns[0]].tolist(), numbers.to_numpy(np.float64)
                    done += len(table)
        except errors as error:
            raise _unreadable(path, error, hint) from None

    return ArrayFile(path, len(columns) - 1, pieces, "line", 2)


def _open_parquet(path: Path) -> ArrayFile:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    hint = f"save a table with {' or '.join(ID_COLUMNS)} first, then columns of numbers or one column of lists"
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error, hint) from None
    _check_id_column(path, schema.names, hint)
    types = schema.types[1:]
    lists = len(types) == 1 and pa.types.is_nested(types[0])
    numeric = [pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in types]
    if not lists and not all(numeric):
        name = schema.names[1 + numeric.index(False)]
        raise InputError(f"{path}: column {name!r} is {schema.field(name).type}; {hint}")

    def tables() -> Iterator[Any]:
        try:
            for batch in file.iter_batches(PIECE):
                yield batch.replace_schema_metadata(None).to_pandas()  # pandas' notes may be damaged or hide a column
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error, hint) from None

    width = len(types)
    if lists:
        first = next(tables(), None)
        width = 0 if first is None or first.iat[0, 1] is None else len(first.iat[0, 1])

    def pieces() -> Iterator[Piece]:
        done = 0
        for table in tables():
            if lists:
                rows = table.iloc[:, 1]
                for at, row in enumerate(rows):
                    if row is None or len(row) != width:
                        found = "nothing" if row is None else f"{len(row)} numbers"
                        raise InputError(f"{path}, row {done + at + 1} has {found}, others {width}; save one width")
                values = _numbers(path, rows)
            else:
                values = table.iloc[:, 1:].to_numpy(np.float64)
            yield [str(item) for item in table.iloc[:, 0]], values
            done += len(table)

    return ArrayFile(path, width, pieces)


def _numbers(path: Path, rows: Any) -> np.ndarray:
    try:
        return np.stack([np.asarray(row, dtype=np.float64) for row in rows])
    except (TypeError, ValueError):
        raise InputError(f"{path}: the column of lists has more than numbers; save lists of numbers") from None


def _check_id_column(path: Path, columns: list[str], hint: str) -> None:
    if not columns or columns[0] not in ID_COLUMNS or len(columns) < 2:
        raise InputError(f"{path} has the columns {', '.join(map(str, columns[:4])) or 'none'}; {hint}")


def _open_amazon(path: Path) -> ArrayFile:
    records, rest = divmod(path.stat().st_size, AMAZON.itemsize)
    if rest:
        raise InputError(
            f"{path} ends within record {records + 1} ({rest} of {AMAZON.itemsize} bytes); it is cut short, or "
            f"does not hold 10-byte ASINs with 4096 float32: fetch it again"
        )

    def pieces() -> Iterator[Piece]:
        with path.open("rb") as file:
            while len(table := np.fromfile(file, AMAZON, PIECE)):
                yield [item.decode("ascii", "replace") for item in table["id"].tolist()], table["row"]

    return ArrayFile(path, AMAZON["row"].shape[0], pieces, "record")


def _unreadable(path: Path, error: Exception, hint: str) -> InputError:
    return InputError(f"{path} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); {hint}")


READERS: dict[str, Callable[[Path], ArrayFile]] = {
    ".npy": _open_npy,
    ".safetensors": _open_safetensors,
    ".csv": _open_csv,
    ".parquet": _open_parquet,
    ".b": _open_amazon,
}
