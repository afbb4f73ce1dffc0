"""Files of vectors by product id, read in pieces. R rows, F feature width.

    .npy            a 2-d array, with FILE.ids.txt (an id per line) or FILE.ids.json (a list) beside FILE.npy
    .safetensors    "features" [R, F] with "ids" [R, bytes] uint8 (UTF-8, zero-padded), or a 1-d tensor per product id
    .csv, .parquet  the first column has the ids, the others numbers; or one column of lists (.parquet)
    .b              Amazon's visual features of 2014: records of a 10-byte ASIN and 4096 float32, little endian

Nothing is unpickled.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import ARRAY_ERRORS, parse_json, read_text
from common.schema import check_schema

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
                    numbers = table[columns[1:]].apply(pd.to_numeric, errors="coerce")
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
