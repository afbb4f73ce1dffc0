"""Read events and items from files of any known format, recognised by a file's content, not by its name.

    format                          events                                    items
    JSON lines or Python literals   Amazon 2014, 2018, 2023, or usual names   an object a line
    JSON array, or object around    the same                                  the same
    LETTER *.inter.json, .item.json {"0": [3, 7, ...], ...}                   {"0": {"title": ...}, ...}
    parquet, or a folder of parts   columns by name (Hugging Face's too)      columns by name
    CSV, TSV, RecBole atomic files  columns by name                           columns by name
    Amazon ratings without header   2014 user,item,... or 2018 item,user,...
    MovieLens                       u.data, ratings.dat, ratings.csv          u.item, movies.dat, movies.csv
    S3Rec and P5 text               a line per user: user item item ...

gzip and zstd are unpacked. A format is one object of READERS; to add one, write a class in datasets/prepare/readers/
and list it in READERS. Names of columns: datasets/prepare/readers/base.py. n events, U users, N items.
"""

import json
import re
import reprlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common.errors import InputError
from datasets.items import attribute_text, is_junk
from datasets.prepare.readers.base import HINT, PICTURE, Columns, Head, Reader, find_id, plain
from datasets.prepare.readers.lines import JsonArray, JsonLines, KeyedJson, SequenceText
from datasets.prepare.readers.tables import HEADERLESS, AmazonRatings, Parquet, Table
from datasets.records import RecordFile, parse_record

if TYPE_CHECKING:
    import pandas as pd


READERS: tuple[Reader, ...] = (
    Parquet(),  # the only one that reads folders
    KeyedJson(),
    JsonArray(),
    JsonLines(),
    *HEADERLESS,
    AmazonRatings(),
    SequenceText(),
    Table(),
)


def find_reader(path: Path) -> Reader:
    """Return the reader of a file's format. Raises InputError if there is none."""
    head = Head.of(path)
    if path.is_dir():
        if not READERS[0].recognises(head):
            raise InputError(f"{path} is a folder without parquet files; give one of its files")
        return READERS[0]
    if not head.lines or head.text.strip() in ("[]", "{}"):
        raise InputError(f"{path} is empty; {HINT}")
    for reader in READERS:
        if reader.recognises(head):
            return reader
    rest = Head(path, "\n".join(head.lines[1:]).encode())
    for reader in HEADERLESS:
        if rest.lines and reader.recognises(rest):
            raise InputError(
                f"{path}:1: {head.lines[0][:60]!r} is not {reader.separator.join(reader.fields)}, as the lines below "
                f"it are; correct or remove it"
            )
    names = ", ".join(reader.name for reader in READERS)
    raise InputError(f"{path} is of no known format (it begins with {head.lines[0][:60]!r}); accepted are {names}")


# --------------------------------------------------------------------------------------------------------------- events


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


def read_events(path: Path, columns: Columns | None = None) -> Events:
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
    """Open a file of events."""
    return RecordFile(
        path,
        f"{HINT}, with ids as text or whole numbers, and times as numbers or ISO 8601 text such as 2024-05-31T10:00:00",
    )


def event_chunks(file: RecordFile, columns: Columns | None = None) -> Iterator[Chunk]:
    """Yield the events with a user, an item and a time, and count the others in `file`."""
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
    if isinstance(value, Decimal):  # of parquet
        return str(int(value)) if value == value.to_integral_value() else None
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
            if pd.api.types.infer_dtype(column, skipna=True) == "string":
                column = column.str.removesuffix(" UTC")
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


# ---------------------------------------------------------------------------------------------------------------- items
# Attributes get the names of Amazon's 2014 release: title, price, brand, categories, description, and images for
# addresses of pictures. Every other attribute keeps its name, so that --item_attributes can name it.

# Our name of an attribute -> the usual names, best first, without case and signs.
NAMES = {
    "title": ("title", "name", "itemname", "productname", "producttitle"),
    "price": ("price",),
    "brand": ("brand", "store", "manufacturer", "vendor"),
    "categories": ("categories", "category", "genres", "maincategory", "maincat"),
    "description": ("description",),
    "features": ("features", "feature"),
    "main_category": ("maincategory", "maincat"),
}
# Ids, and lists of other products and of films: long, and of no use as text.
LEFT_OUT = {"asin", "parentasin", "imurl", "imageurl", "imageurlhighres", "images", "related", "alsobuy", "alsoview",
            "alsobought", "alsoviewed", "similaritem", "videos"}  # fmt: skip
EVENT_KEYS = {"reviewerid", "userid", "reviewtext"}  # a record with one of these is an event
ID_IN_LINE = re.compile(r"""asin["']\s*:(?:\s*(["'])([\w-]+)\1)?""")  # an odd id gives an empty one


@dataclass
class Items:
    """The wanted items that the file has."""

    records: dict[str, str]  # by id, as JSON
    pictures: dict[str, str]  # by id: the path of a picture, as the file names it
    notes: list[str]  # what was left out, with counts


def read_items(path: Path, wanted: Set[str], columns: Columns | None = None) -> Items:
    """Read the items with one of the `wanted` ids. The last record of an id counts.

    columns: `id` and `picture` name the file's columns. Raises InputError if the file is damaged or holds something
    else.
    """
    file, columns = RecordFile(path, HINT), columns or {}
    found, junk = Items({}, {}, []), dict[str, list[str]]()
    reader = find_reader(path)
    records = _wanted_lines(file, wanted, columns) if isinstance(reader, JsonLines) else reader.items(file, columns)
    for record in tqdm(records, desc=f"reading {path.name}", unit="item", unit_scale=True, disable=None):
        item = item_id(record, columns)
        if item is None or any(plain(key) in EVENT_KEYS for key in record):
            file.count_bad(problem="no id" if item is None else "an event")
        elif item in wanted:
            try:
                known = attributes(record, columns)
                kept = item_record(item, known, picture_urls(record, columns))
                found.records[item] = json.dumps(kept)
                junk[item] = [name for name in known.keys() - kept.keys() if is_junk(known, name)]
            except (TypeError, ValueError, RecursionError):  # a literal may hold bytes, sets and anything nested
                file.count_bad(problem=f"item {item!r} has bytes, a set or other values that JSON lacks")
                continue
            if picture := _picture_path(record, columns):
                found.pictures[item] = picture
    found.notes += file.check("items with an id")
    counts = Counter(name for names in junk.values() for name in names)
    found.notes += [
        f"{name}: {counts[name]:,} of {len(found.records):,} items have only markup, code or words for nothing: missing"
        for name in sorted(counts)
    ]
    return found


def _wanted_lines(file: RecordFile, wanted: Set[str], columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield the records of JSON lines. Most of Amazon's items are not wanted: their lines are not parsed."""
    of_amazon: bool | None = None
    for line in file.texts():
        ids = {item for _, item in ID_IN_LINE.findall(line)} if of_amazon else {""}
        if ids and "" not in ids and wanted.isdisjoint(ids) and line.endswith("}"):
            continue
        record = parse_record(line)
        if record is None:
            file.count_bad(problem=repr(line[:60]))
        else:
            if of_amazon is None:
                of_amazon = plain(find_id(record, columns)) in ("asin", "parentasin")
            yield record


def item_id(record: Mapping[str, Any], columns: Columns) -> str | None:
    """Return the id of an item, None if it has none. A parent product comes before its variant."""
    key = find_id(record, columns)
    value = record[key] if key else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value) or None
    return None


def item_record(item: str, known: dict[str, Any], urls: list[str]) -> dict[str, Any]:
    """Return what the prepared metadata hold: asin, the attributes with a text, and images (addresses)."""
    with_text = {name: value for name, value in known.items() if attribute_text(known, name)}
    return {"asin": item} | with_text | ({"images": urls} if urls else {})


def attributes(record: Mapping[str, Any], columns: Columns | None = None) -> dict[str, Any]:
    """Return the attributes of a raw record under our names, as they are."""
    by_plain = {plain(key): key for key in reversed(list(record))}
    known, used = {}, {find_id(record, columns or {}), *_picture_keys(record, columns)}
    for name, usual in NAMES.items():
        keys = [by_plain[key] for key in usual if key in by_plain]
        if keys:
            with_text = (key for key in keys if len(keys) > 1 and attribute_text({name: record[key]}, name))
            best = next(with_text, keys[0])
            known[name] = record[best]
            used |= {best} if name != "brand" or plain(best) == "brand" else set()
    if isinstance(known.get("categories"), str) and "|" in known["categories"]:
        known["categories"] = known["categories"].split("|")  # MovieLens: Comedy|Drama
    others = {key: _unpack(value) for key, value in record.items() if key not in used and plain(key) not in LEFT_OUT}
    return others | known


def _unpack(value: Any) -> Any:
    """Return an object that was written as JSON text, as Hugging Face's tables hold `details`."""
    return (parse_record(value) or value) if isinstance(value, str) and value.startswith("{") else value


# ------------------------------------------------------------------------------------------------------------- pictures

MAX_PICTURES = 4  # addresses kept per item
MIN_SIDE = 256  # pixels; a smaller picture is a thumbnail
SIZE = re.compile(r"\._(?=[A-Z])([^/]*?)_(?=\.\w+$)")  # "._SX38_SY50_CR,0,0,38,50_.jpg", as Amazon's servers scale
SIDE = re.compile(r"[SU][A-Z](\d+)")


def picture_urls(record: Mapping[str, Any], columns: Columns | None = None) -> list[str]:
    """Return the addresses of an item's pictures, the one to fetch first in front.

    The main picture comes first. Before the address of a thumbnail stands the address of the full picture.
    """
    urls: list[Any] = []
    images = record.get("images")
    if isinstance(images, dict):  # {"large": [...], "thumb": [...]} instead of [{"large": ..., "thumb": ...}]
        columns_of = {size: column for size, column in images.items() if isinstance(column, list)}
        images = [
            {size: column[row] for size, column in columns_of.items() if row < len(column)}
            for row in range(max(map(len, columns_of.values()), default=0))
        ]
    if isinstance(images, list):
        sized = [image for image in images if isinstance(image, dict)]
        sized.sort(key=lambda image: image.get("variant") != "MAIN")
        urls += [image.get(size) for image in sized for size in ("large", "hi_res", "thumb")]
        urls += [image for image in images if isinstance(image, str)]
    for key in _picture_keys(record, columns):
        value = record[key]
        urls += value if isinstance(value, list) else [value]
    good = (url.strip() for url in urls if isinstance(url, str) and url.strip().startswith(("https://", "http://")))
    # Amazon's stand-in for "no picture" would be a picture that thousands of products share.
    both = (address for url in good if "/no-img-" not in url for address in (full_size(url), url))
    return list(dict.fromkeys(both))[:MAX_PICTURES]


def full_size(url: str) -> str:
    """Return the address without the size suffix of a thumbnail; other addresses as they are."""
    suffix = SIZE.search(url)
    sides = [int(side) for side in SIDE.findall(suffix[1])] if suffix else []
    return SIZE.sub("", url) if sides and max(sides) < MIN_SIDE else url


def _picture_keys(record: Mapping[str, Any], columns: Columns | None) -> list[str]:
    if columns and "picture" in columns:
        return [columns["picture"]] if columns["picture"] in record else []
    usual = ("imUrl", "imageURLHighRes", "imageURL", "image")
    others = [key for key in record if plain(key) in PICTURE and key not in (*usual, "images")]
    return [key for key in usual if key in record] + others


def _picture_path(record: Mapping[str, Any], columns: Columns) -> str | None:
    values = (record[key] for key in _picture_keys(record, columns))
    return next((v.strip() for v in values if isinstance(v, str) and v.strip() and "://" not in v), None)
