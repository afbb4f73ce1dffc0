"""Read text line by line: JSON of all kinds, and sequences with a line per user."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from common.errors import InputError
from common.files import MAX_DEPTH, is_deep
from datasets.prepare.readers.base import CHUNK, HINT, USUAL, Columns, Head, find_columns, find_id, no_events, plain
from datasets.records import MAX_LINE, MAX_MARKS, RecordFile, open_data, parse_record

if TYPE_CHECKING:
    import pandas as pd

SEQUENCE = re.compile(r"\d+(?:[ \t]+\d+)+")


class Histories:
    """Collects histories into chunks of events. An event's place in the file is its time."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, int, int]] = []
        self.count = 0

    def add(self, line: int, user: str, items: list[str]) -> None:
        self.rows += [(user, item, self.count + place, line) for place, item in enumerate(items)]
        self.count += len(items)

    def chunk(self, at_least: int = CHUNK) -> Iterator["pd.DataFrame"]:
        """Yield what was collected, if it is enough."""
        import pandas as pd

        if len(self.rows) >= at_least:
            yield pd.DataFrame(self.rows, columns=["user", "item", "time", "number"]).set_index("number")
            self.rows = []


class SequenceText:
    name = "text with a line `user item item ...` per user"

    def recognises(self, head: Head) -> bool:
        return all(SEQUENCE.fullmatch(line.strip()) for line in head.lines)

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        histories, seen = Histories(), set[str]()
        for line in file.texts():
            if not SEQUENCE.fullmatch(line):
                file.count_bad(problem=repr(line[:60]))
                continue
            user, *items = line.split()
            if user in seen:
                raise InputError(
                    f"{file.path}:{file.number}: a second line of user {user!r}; sequences have one line per user, and "
                    f"a table of events needs a header and a time: user,item,time"
                )
            seen.add(user)
            histories.add(file.number, user, items)
            yield from histories.chunk()
        yield from histories.chunk(at_least=1)

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        raise InputError(f"{file.path} holds sequences, not items; leave --items out or give the items' metadata")


# ----------------------------------------------------------------------------------------------------------- json files
# JSON: an object a line, an array of objects, or an object of all users or items.

LIST_OF_OBJECTS = re.compile(r"\[\s*\{")
KEYED = re.compile(r'\{\s*"\d+"\s*:\s*[\[{]')
LINES = 20_000  # records in a chunk
BEFORE = re.compile(r'[\s,]*(?:"((?:[^"\\]|\\.)*)"\s*:\s*)?')  # a value: in an object its key
PIECE = 1 << 20  # characters read at a time
FIELDS = ("user", "item", "time", "rating")


Batch = tuple[list[dict[str, Any]], list[int], Iterable[int]]  # records ({}: unreadable), hashes of lines, line numbers


def chunks(file: RecordFile, batches: Iterable[Batch], columns: Columns) -> Iterator["pd.DataFrame"]:
    """Yield the events of records, each with a hash that equal lines share."""
    import pandas as pd

    keys, seen = None, None
    cells: dict[str, list[Any]] = {name: [] for name in (*FIELDS, "line")}
    numbers_read: list[int] = []

    def frame() -> "pd.DataFrame":
        series = {name: pd.Series(cells[name], dtype=object) for name in FIELDS}  # ids may hold lone surrogates
        table = pd.DataFrame(series | {"line": cells["line"]}, copy=False)
        table.index = pd.Index(np.array(numbers_read))
        return table

    for records, hashes, numbers in batches:
        for record in records if keys is None else ():
            if record:
                seen = seen or record
                if keys := find_columns(file.path, record, columns):
                    break
        if keys is not None and "rating" not in keys:  # a record without a rating may come first
            names = dict.fromkeys(chain.from_iterable(records))
            named = [name for name in names if plain(name) in USUAL["rating"] and name not in keys.values()]
            keys |= {"rating": named[0]} if named else {}
        for name in FIELDS:
            key = keys.get(name, "") if keys else ""
            cells[name] += [record.get(key) for record in records]
        cells["line"] += hashes
        numbers_read += numbers
        if len(numbers_read) >= LINES:
            yield frame()
            cells, numbers_read = {name: [] for name in cells}, []
    if keys is None and seen is not None:
        raise no_events(file.path, seen)
    if numbers_read:
        yield frame()


class JsonLines:
    name = "JSON lines"

    def recognises(self, head: Head) -> bool:
        return any(line.startswith("{") for line in head.lines)

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        return chunks(file, self.batches(file), columns)

    def batches(self, file: RecordFile) -> Iterator[Batch]:
        for lines in file.blocks():
            try:
                records = list(map(orjson.loads, lines))
            except ValueError:
                records = []
            if set(map(type, records)) == {dict}:
                numbers = range(file.number + 1, file.number + len(lines) + 1)
                file.number += len(lines)
                file.lines += len(lines)
                yield records, list(map(hash, lines)), numbers
            else:  # one at a time: a literal, a blank line, or a line that is no object
                rows = [(parse_record(text) or {}, hash(line), file.number) for line, text in file.decode(lines)]
                yield [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        for line in file.texts():
            record = parse_record(line)
            if record is None:
                file.count_bad()
            else:
                yield record


def values(file: RecordFile, start: re.Pattern[str]) -> Iterator[tuple[str, Any]]:
    """Yield the values of the array or object that begins where `start` matches, each with its key ("" in an array).

    They are read in pieces. Raises InputError if the file was cut short or goes on behind the array or object, or a
    value is as large as no line may be.
    """
    decoder, closing = json.JSONDecoder(), "}" if start is KEYED else "]"
    with open_data(file.path, HINT, file) as raw:
        source = io.TextIOWrapper(raw, encoding="utf-8", errors="replace")
        text = source.read(PIECE)
        begin = start.search(text)
        assert begin is not None  # it was recognised by this
        place, is_whole = begin.start() + 1, not text[: begin.start()].strip("\ufeff \t\r\n")
        while True:
            key = BEFORE.match(text, place)
            assert key is not None  # matches anything
            if text.startswith(closing, key.end()):
                rest = text[key.end() + 1 :].strip()
                while is_whole and not rest and (more := source.read(PIECE)):
                    rest = more.strip()
                if is_whole and rest:
                    raise InputError(
                        f"{file.path} goes on after its first JSON array or object, with {rest[:40]!r}; write a single "
                        f"one, or an object a line"
                    )
                return
            try:
                name = json.loads(f'"{key[1] or ""}"')
                if start is KEYED and key[1] is None:
                    raise ValueError("it has no key")
                value, end = decoder.raw_decode(text, key.end())
                if end == len(text):
                    raise ValueError("the file ends here")  # or a number goes on
            except RecursionError:
                raise InputError(
                    f"{file.path}: value {file.number + 1} is nested too deep; at most {MAX_DEPTH} levels are read: "
                    "leave out what is not needed"
                ) from None
            except ValueError as error:
                text, place = text[place:], 0
                number = file.number + 1
                if len(text) > MAX_LINE or sum(map(text.count, ",[{")) > MAX_MARKS:
                    raise InputError(
                        f"{file.path}: value {number} has more than {MAX_LINE:,} characters or {MAX_MARKS:,} values; "
                        f"write an object a line, or leave out what is not needed"
                    ) from None
                more = source.read(PIECE)
                if not more:
                    raise InputError(
                        f"{file.path} is cut short or not JSON: value {number} cannot be read ({error}); {HINT}"
                    ) from None
                text += more
                continue
            place = end
            file.number += 1
            file.lines += 1
            yield name, value


class JsonArray:
    """`[{...}, {...}]`, or an object around it: `{"reviews": [{...}, ...]}`. It is read in pieces."""

    name = "a JSON array of objects"

    def recognises(self, head: Head) -> bool:
        text = head.text
        if text.startswith("["):
            return bool(LIST_OF_OBJECTS.match(text))
        if not text.startswith("{"):
            return False
        record = parse_record(head.lines[0])
        if record is None:  # the object goes over many lines, or beyond the beginning of the file
            return LIST_OF_OBJECTS.search(text) is not None and (len(head.lines) == 1 or head.lines[0].strip() == "{")
        is_one = len(head.lines) == 1 and find_id(record, {}) is None
        return is_one and any(isinstance(v, list) and v and isinstance(v[0], dict) for v in record.values())

    def records(self, file: RecordFile) -> Iterator[dict[str, Any] | None]:
        """Yield the objects of the array. Raises InputError if it was cut short."""
        for _, record in values(file, LIST_OF_OBJECTS):
            yield record if isinstance(record, dict) and not is_deep(record) else None

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        return chunks(file, self.batches(file), columns)

    def batches(self, file: RecordFile) -> Iterator[Batch]:
        found = self.records(file)
        while records := [record or {} for record in islice(found, LINES)]:
            numbers = range(file.number - len(records) + 1, file.number + 1)
            yield records, [hash(repr(record)) for record in records], numbers

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        for record in self.records(file):
            if record is None:
                file.count_bad(problem=f"no object, or nested over {MAX_DEPTH} deep")
            else:
                yield record


class KeyedJson:
    """One object of all users, {"0": [3, 7], ...}, or of all items, {"0": {...}, ...}, as LETTER writes them."""

    name = "LETTER's JSON"

    def recognises(self, head: Head) -> bool:
        return bool(KEYED.match(head.text))

    def pairs(self, file: RecordFile) -> Iterator[tuple[str, Any]]:
        """Yield the keys with their values. Keys that occur again are counted as bad."""
        seen: set[str] = set()
        for key, value in values(file, KEYED):
            if key in seen:
                file.count_bad(problem=f"{key!r} occurs twice")
            elif is_deep(value):
                file.count_bad(problem=f"{key!r} is nested over {MAX_DEPTH} deep")
            else:
                yield key, value
            seen.add(key)

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        histories = Histories()
        for user, items in self.pairs(file):
            if not (isinstance(items, list) and items and {*map(type, items)} <= {int, str}):
                file.count_bad(problem=f"{user!r} has no list of items")
                continue
            histories.add(file.number, user, list(map(str, items)))
            yield from histories.chunk()
        yield from histories.chunk(at_least=1)

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        for item, record in self.pairs(file):
            if isinstance(record, dict):
                yield {"item_id": item} | {k: v for k, v in record.items() if plain(k) != "itemid"}
            else:
                file.count_bad(problem=f"{item!r} is no object")
