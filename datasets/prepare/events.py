"""Events of users with items, from a file of any known format: datasets/prepare/readers describes them.

n events, U users, N items.
"""

import reprlib
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from datasets.records import RecordFile

if TYPE_CHECKING:
    import pandas as pd

    from datasets.prepare.readers.columns import Columns


@dataclass(frozen=True)
class Events:
    """Events in the order of their file. Event r: user users[user[r]] had item items[item[r]]."""

    users: list[str]  # [U] in the order of their first line
    items: list[str]  # [N] likewise
    user: np.ndarray  # [n] int32
    item: np.ndarray  # [n] int32
    time: np.ndarray  # [n] float64, in the file's unit (text: milliseconds since 1970)
    rating: np.ndarray  # [n] float32, NaN if there is none
    line: np.ndarray | None  # [n] int64: equal for copies of one line; None: the four columns tell
    notes: list[str]  # what was left out, with counts
    filters: tuple[dict[str, Any], ...] = ()  # that were applied already: users, items and interactions after each


def read_events(path: Path, columns: "Columns | None" = None) -> Events:
    """Read all events with a user, an item and a time of 0 (1970) or later.

    columns: names of the file's columns, from --columns. Raises InputError if the file is damaged or holds something
    else.
    """
    file = event_file(path)
    coded = Codes(), Codes()
    time, rating, line = array("d"), array("f"), array("q")
    for chunk in event_chunks(file, columns):
        for codes, names in zip(coded, (chunk.user, chunk.item), strict=True):
            codes.add(names)
        time.frombytes(chunk.time.tobytes())
        rating.frombytes(chunk.rating.tobytes())
        if chunk.line is not None:
            line.frombytes(chunk.line.tobytes())
    notes = check_events(file)
    users, items = coded
    return Events(
        users=list(users.number),
        items=list(items.number),
        user=np.asarray(users.codes),
        item=np.asarray(items.codes),
        time=np.asarray(time),
        rating=np.asarray(rating),
        line=np.asarray(line) if line else None,
        notes=notes,
    )


class Chunk(NamedTuple):
    """Some events in the order of their file, as in Events."""

    user: "pd.Series"  # ids
    item: "pd.Series"  # ids
    time: np.ndarray
    rating: np.ndarray
    line: np.ndarray | None


def event_file(path: Path) -> RecordFile:
    from datasets.prepare.readers.base import HINT

    return RecordFile(
        path,
        f"{HINT}, with ids as text or whole numbers, and times as numbers or ISO 8601 text such as 2024-05-31T10:00:00",
    )


def event_chunks(file: RecordFile, columns: "Columns | None" = None) -> Iterator[Chunk]:
    """Yield the events with a user, an item and a time, and count the others in `file`."""
    from datasets.prepare.readers import find_reader

    times = Times()
    with tqdm(desc=f"reading {file.path.name}", unit="event", unit_scale=True, disable=None) as bar:
        for chunk in find_reader(file.path).events(file, columns or {}):
            bar.update(len(chunk))
            raw = {name: chunk[name] for name in ("user", "item")}
            found = {name: ids(raw[name]) for name in raw} | {"time": times.read(chunk["time"])}
            known = [column.notna().to_numpy() for name, column in found.items() if column is not raw.get(name)]
            good = np.logical_and.reduce(known)
            _count_bad(file, chunk, found, np.flatnonzero(~good))
            user, item = (found[name] if good.all() else found[name][good] for name in raw)
            line = chunk["line"].to_numpy(np.int64)[good] if "line" in chunk else None
            yield Chunk(user, item, found["time"].to_numpy()[good], ratings(chunk)[good], line)


def check_events(file: RecordFile) -> list[str]:
    """Return notes on the lines that were left out. Raises InputError if they are too many."""
    return file.check("events with a user, an item and a time")


def _count_bad(file: RecordFile, chunk: "pd.DataFrame", found: dict[str, "pd.Series"], rows: np.ndarray) -> None:
    import pandas as pd

    for row in rows[:5]:
        column = next(name for name, values in found.items() if values.isna().iloc[row])
        value = chunk[column].iloc[row]
        is_scalar = pd.api.types.is_scalar(value)
        nothing = is_scalar and pd.isna(value)
        text = str(value) if is_scalar else reprlib.repr(value)  # bounded in depth and length
        file.count_bad(chunk.index[row], f"no {column}" if nothing else f"{column} {text[:60]!r}")
    file.bad += len(rows[5:])


class Codes:
    """Numbers ids from 0 in the order of their first appearance."""

    def __init__(self) -> None:
        self.number: defaultdict[str, int] = defaultdict()
        self.number.default_factory = self.number.__len__
        self.codes = array("i")

    def add(self, names: "pd.Series") -> None:
        import pandas as pd

        if names.dtype == object:  # most are new in a small chunk of JSON lines
            codes = np.fromiter(map(self.number.__getitem__, names.tolist()), np.int32, len(names))
        else:
            places, uniques = pd.factorize(names)
            codes = np.fromiter(map(self.number.__getitem__, uniques), np.int32, len(uniques))[places]
        self.codes.frombytes(codes.tobytes())


def ids(column: "pd.Series") -> "pd.Series":
    """Return ids as text; missing if empty or neither text nor a whole number. A column of texts is returned itself."""
    import pandas as pd

    if pd.api.types.is_integer_dtype(column.dtype):
        return column.astype("str")
    if pd.api.types.infer_dtype(column, skipna=column.dtype != object) == "string":
        if column.dtype == object and all(column.tolist()):
            return column
        return column.where(column != "")
    # map() would infer a type that refuses lone surrogates.
    return pd.Series([_id(value) for value in column], index=column.index, dtype=object)


def _id(value: Any) -> str | None:
    if isinstance(value, str):
        return value or None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


class Times:
    """Reads times. The first chunk decides whether a file has numbers or ISO 8601 text."""

    def __init__(self) -> None:
        self.are_numbers: bool | None = None

    def read(self, column: "pd.Series") -> "pd.Series":
        """Return times as float64, missing if they are neither, before 1970 or not finite."""
        import pandas as pd

        if pd.api.types.is_datetime64_any_dtype(column.dtype):
            return _milliseconds(pd.to_datetime(column, utc=True))
        if pd.api.types.is_bool_dtype(column.dtype):
            return pd.Series(np.nan, index=column.index)
        if column.dtype == object and pd.api.types.infer_dtype(column) != "integer":
            column = column.where(~column.map(lambda value: isinstance(value, bool)))
        numbers = _to_numbers(column).astype("float64")
        if self.are_numbers is None and column.notna().any():
            self.are_numbers = bool(numbers.notna().sum() * 2 >= column.notna().sum())
        if self.are_numbers is False:
            return _milliseconds(pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce"))
        return numbers.where((numbers >= 0) & (numbers < 2.0**63))


def _milliseconds(times: "pd.Series") -> "pd.Series":
    if times.dt.unit in ("s", "ms"):  # microseconds would overflow 292,000 years from now
        since = times.astype("int64").astype("float64") * (1000 if times.dt.unit == "s" else 1)
    else:
        since = times.dt.as_unit("us").astype("int64") / 1000
    return since.where(times.notna() & (since >= 0))


def ratings(chunk: "pd.DataFrame") -> np.ndarray:
    """Return ratings as float32, NaN for none."""
    if "rating" not in chunk:
        return np.full(len(chunk), np.nan, dtype=np.float32)
    return _to_numbers(chunk["rating"]).to_numpy(np.float32, na_value=np.nan)


def _to_numbers(column: "pd.Series") -> "pd.Series":
    """Return a column as numbers; what is no number, or is too large for a float, is missing."""
    import pandas as pd

    try:
        return pd.to_numeric(column, errors="coerce")
    except OverflowError:
        return pd.to_numeric(column.map(lambda value: None if _is_huge(value) else value), errors="coerce")


def _is_huge(value: Any) -> bool:
    """Return whether a whole number, or a text of one, is too large for a float."""
    return len(value) > 300 if isinstance(value, str) else isinstance(value, int) and abs(value) > 1 << 1000
