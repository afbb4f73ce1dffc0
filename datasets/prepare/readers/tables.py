"""Tables: CSV and TSV with or without a header, and parquet, read in chunks by pandas and pyarrow."""

import codecs
import csv
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from datasets.prepare.readers.base import CHUNK, HINT, USUAL, Columns, Head, find_columns, find_id, no_events, shown
from datasets.records import RecordFile, open_data

if TYPE_CHECKING:
    import pandas as pd

SEPARATORS = (",", "\t", ";", "|")
ASIN = re.compile(r"B[0-9A-Z]{9}|\d{9}[\dX]")  # an Amazon product, or a book's ISBN
TYPE = re.compile(r":(?:token|float)(?:_seq)?$")  # in the header of RecBole's files
ITEMS_CHUNK = 10_000


def separator_of(line: str) -> str:
    return max(SEPARATORS, key=line.count)


def _as_windows_1252(error: UnicodeError) -> tuple[str, int]:
    """Decode bytes that are not UTF-8."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


def read_csv(file: RecordFile, chunk: int, **how: Any) -> Iterator["pd.DataFrame"]:
    """Yield a text table in chunks. The index is the line. Raises InputError for a row with too many cells."""
    import pandas as pd

    codecs.register_error("cp1252", _as_windows_1252)
    first = 1 if how.get("header", 0) is None else 2
    with open_data(file.path, HINT) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="cp1252", newline="")
        try:
            how |= {"keep_default_na": False, "na_values": [""], "index_col": False}
            frames = iter(pd.read_csv(text, chunksize=chunk, **how))
            while (frame := _next_without_loss(frames)) is not None:
                frame.index += first
                file.lines += len(frame)
                yield frame
        except pd.errors.EmptyDataError:
            return
        except pd.errors.ParserWarning:
            raise InputError(f"{file.path} has more cells in its rows than in its header; name every column") from None
        except (ValueError, OverflowError, csv.Error) as error:  # pandas' own errors are ValueErrors
            reason = str(error).removeprefix("Error tokenizing data. C error: ").strip()
            raise InputError(
                f"{file.path} is no whole table ({reason}); every row needs as many cells as the first"
            ) from None


def _next_without_loss(frames: Iterator["pd.DataFrame"]) -> "pd.DataFrame | None":
    """Return the next chunk, or None at the end. Raises ParserWarning if pandas would drop cells."""
    import pandas as pd

    with warnings.catch_warnings():  # not around a yield: other code would run in it
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return next(frames, None)


def records(file: RecordFile, frames: Iterator["pd.DataFrame"]) -> Iterator[dict[str, Any]]:
    """Yield rows as dicts, without empty cells."""
    for frame in frames:
        for file.number, row in zip(frame.index, frame.to_dict("records"), strict=True):
            yield {str(name): value for name, value in row.items() if value is not None and value == value}


class Table:
    """A text table with a header; RecBole's atomic files are such tables with types in the header."""

    name = "CSV or TSV with a header (RecBole's .inter and .item too)"

    def recognises(self, head: Head) -> bool:
        return separator_of(head.lines[0]) in head.lines[0]

    def header(self, path: Path) -> tuple[str, list[str]]:
        """Return the separator and the columns, without RecBole's types. Raises InputError if two have one name."""
        line = Head.of(path).lines[0]
        separator = separator_of(line)
        try:
            names = [TYPE.sub("", name) for name in next(csv.reader([line], delimiter=separator))]
        except csv.Error as error:
            raise InputError(f"{path} has an invalid header ({error}); {HINT}") from None
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{path} has two columns {twice!r}; rename one, or add the header line if it is missing")
        return separator, names

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        separator, names = self.header(file.path)
        found = find_columns(file.path, names, columns)
        if found is None:
            raise no_events(file.path, names)
        named = {found[column]: column for column in USUAL if column in found}
        dtype = {found["user"]: "str", found["item"]: "str"}
        # All columns are read, as pandas checks the number of cells only then.
        for frame in read_csv(file, CHUNK, sep=separator, header=0, names=names, dtype=dtype, low_memory=False):
            yield frame[list(named)].rename(columns=named)

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        separator, names = self.header(file.path)
        if find_id(names, columns) is None:
            raise no_items(file.path, names)
        return records(file, read_csv(file, ITEMS_CHUNK, sep=separator, header=0, names=names, dtype="str"))


def no_items(path: Path, names: list[str]) -> InputError:
    return InputError(f"{path} has no column with the items' ids: it has {shown(names)}; name it: --columns id=...")


def rows_match(lines: list[str], row: re.Pattern[str]) -> bool:
    """Return whether the first line and nine in ten have the form of a row. Others are damaged, and counted later."""
    return bool(row.fullmatch(lines[0])) and sum(bool(row.fullmatch(line)) for line in lines) >= 0.9 * len(lines)


class Headerless:
    """Rows of a known form without a header; `fields` name the cells."""

    def __init__(self, name: str, row: str, separator: str, fields: tuple[str, ...]) -> None:
        self.name, self.row, self.separator, self.fields = name, re.compile(row), separator, fields

    def recognises(self, head: Head) -> bool:
        return rows_match(head.lines, self.row)

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        if not {"user", "time"} <= set(self.fields):
            raise no_events(file.path, self.fields)
        # pandas reads one character fast: "::" is ":" with empty cells between.
        step = len(self.separator)
        cells = {step * place: name for place, name in enumerate(self.fields)}
        dtype = {place: "str" for place, name in cells.items() if name in ("user", "item")}
        for frame in read_csv(file, CHUNK, sep=self.separator[0], header=None, usecols=list(cells), dtype=dtype):
            yield frame.rename(columns=cells)

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        if "user" in self.fields:
            raise no_items(file.path, list(self.fields))
        for line in file.texts():
            cells = line.split(self.separator)
            if len(cells) < len(self.fields):
                file.count_bad(problem=f"{line[:60]!r}, not {self.separator.join(self.fields)}")
            else:
                yield dict(zip(self.fields, cells, strict=False))


HEADERLESS = (
    Headerless("MovieLens ratings.dat", r"\d+::\d+::[\d.]+::\d+", "::", ("user", "item", "rating", "time")),
    Headerless("MovieLens u.data", r"\d+\t\d+\t[\d.]+\t\d+", "\t", ("user", "item", "rating", "time")),
    Headerless("ratings without times", r"\d+(::|\t)\d+\1[\d.]+(?:\1)?", "::", ("user", "item", "rating")),
    Headerless("MovieLens movies.dat", r"\d+::.+::[^:]*", "::", ("item", "title", "categories")),
    Headerless("MovieLens u.item", r"\d+\|[^|]*\|[^|]*\|.*(?:\|[01]){10,}", "|", ("item", "title", "date")),
)


class AmazonRatings:
    """Amazon's ratings without a header: user,item,rating,time in 2014, and item,user,rating,time in 2018."""

    name = "Amazon's ratings without a header"

    def recognises(self, head: Head) -> bool:
        return rows_match(head.lines, re.compile(r"[^,]+,[^,]+,[\d.]+,\d+(?:\.\d+)?"))

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        fields = self.order(Head.of(file.path), columns)
        for frame in read_csv(file, CHUNK, sep=",", header=None, dtype={0: "str", 1: "str"}):
            yield frame.rename(columns=dict(enumerate(fields)))

    def order(self, head: Head, columns: Columns) -> tuple[str, str, str, str]:
        """Return the columns' order: the column with more product ids holds the items."""
        if columns.get("user") in ("1", "2") and columns.get("item") in ("1", "2"):
            is_first = columns["item"] == "1"
        else:
            first, second = zip(*(line.split(",")[:2] for line in head.lines if "," in line), strict=True)
            ids = [sum(bool(ASIN.fullmatch(cell)) for cell in cells) for cells in (first, second)]
            if ids[0] == ids[1]:
                raise InputError(
                    f"{head.path} has no header, and its first two columns ({head.lines[0]!r}) could each be the "
                    f"items; say which: --columns user=1,item=2 or --columns user=2,item=1"
                )
            is_first = ids[0] > ids[1]
        return ("item", "user", "rating", "time") if is_first else ("user", "item", "rating", "time")

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        raise no_items(file.path, ["user", "item", "rating", "time"])


class Parquet:
    """A parquet file or a folder of parts, as Spark, BigQuery and Hugging Face write them, read part by part."""

    name = "parquet (a file or a folder of parts)"

    def recognises(self, head: Head) -> bool:
        return bool(self.parts(head.path)) if head.path.is_dir() else head.data.startswith(b"PAR1")

    @staticmethod
    def parts(path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]
        return sorted((p for p in path.rglob("*.parquet") if p.is_file()), key=_by_number)

    @contextmanager
    def open(self, part: Path) -> Iterator[Any]:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        try:
            with pq.ParquetFile(part) as table:
                yield table
        except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
            raise InputError(f"{part} cannot be read as parquet ({error}); {HINT}") from None

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        for part in self.parts(file.path):
            with self.open(part) as table:
                found = find_columns(part, table.schema_arrow.names, columns)
                if found is None:
                    raise no_events(part, table.schema_arrow.names)
                named = {found[column]: column for column in USUAL if column in found}
                for batch in table.iter_batches(CHUNK, columns=list(named)):
                    batch = batch.replace_schema_metadata(None)  # pandas' notes may turn a column into the index
                    frame = batch.to_pandas(date_as_object=False, integer_object_nulls=True).rename(columns=named)
                    frame.index += file.lines + 1
                    file.lines += len(frame)
                    yield frame

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        import pyarrow as pa

        for part in self.parts(file.path):
            with self.open(part) as table:
                if find_id(table.schema_arrow.names, columns) is None:
                    raise no_items(part, table.schema_arrow.names)
                for batch in table.iter_batches(ITEMS_CHUNK):
                    for record in batch.cast(pa.schema(map(_as_text, batch.schema))).to_pylist():
                        file.lines += 1
                        file.number = file.lines
                        yield record


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts part.10 after part.2."""
    return [(int(digits or -1), text) for text, digits in re.findall(r"(\D+)|(\d+)", str(path))]


def _as_text(field: Any) -> Any:
    """Return an Arrow field with text in place of what JSON cannot hold: dates, times and decimals, nested ones too."""
    import pyarrow as pa

    kind, types = field.type, pa.types
    if types.is_temporal(kind) or types.is_decimal(kind):
        kind = pa.string()
    elif types.is_struct(kind):
        kind = pa.struct(list(map(_as_text, kind)))
    elif types.is_map(kind):
        kind = pa.map_(_as_text(kind.key_field), _as_text(kind.item_field))
    elif types.is_list(kind):
        kind = pa.list_(_as_text(kind.value_field))
    elif types.is_large_list(kind):
        kind = pa.large_list(_as_text(kind.value_field))
    elif types.is_fixed_size_list(kind):
        kind = pa.list_(_as_text(kind.value_field), kind.list_size)
    return field.with_type(kind)
