"""JSON: an object a line, an array of objects, or an object of all users or items."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.files import is_deep, parse_json
from datasets.prepare.readers.base import HINT, Head
from datasets.prepare.readers.columns import Columns, find_columns, find_id, no_events, plain
from datasets.prepare.readers.text import Histories
from datasets.records import MAX_LINE, RecordFile, open_data, parse_record

if TYPE_CHECKING:
    import pandas as pd

LIST_OF_OBJECTS = re.compile(r"\[\s*\{")
KEYED = re.compile(r'\{\s*"\d+"\s*:\s*[\[{]')
LINES = 50_000  # records in a chunk
PIECE = 1 << 20  # characters read at a time
FIELDS = ("user", "item", "time", "rating")


def chunks(
    file: RecordFile, records: Iterable[tuple[dict[str, Any] | None, int]], columns: Columns
) -> Iterator["pd.DataFrame"]:
    """Yield the events of records, each with a hash that equal lines share. A record that is None is a bad line."""
    import pandas as pd

    keys, seen = None, None
    rows: list[tuple[Any, ...]] = []

    def frame() -> "pd.DataFrame":
        *fields, numbers = zip(*rows, strict=True)
        series = [pd.Series(column, dtype=object) for column in fields[:4]]  # ids may hold lone surrogates
        return pd.DataFrame(dict(zip(FIELDS, series, strict=True)) | {"line": fields[4]}).set_index(pd.Index(numbers))

    for record, line in records:
        if record and keys is None:
            seen = seen or record
            keys = find_columns(file.path, record, columns)
            names = [keys.get(name, "") for name in FIELDS] if keys else []
        if record is None or keys is None:
            rows.append((None, None, None, None, line, file.number))
        else:
            rows.append((*map(record.get, names), line, file.number))
        if len(rows) == LINES:
            yield frame()
            rows = []
    if keys is None and seen is not None:
        raise no_events(file.path, seen)
    if rows:
        yield frame()


class JsonLines:
    name = "JSON lines"

    def recognises(self, head: Head) -> bool:
        return any(line.startswith("{") for line in head.lines)

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        return chunks(file, ((parse_record(line), hash(line)) for line in file.texts()), columns)

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        for line in file.texts():
            record = parse_record(line)
            if record is None:
                file.count_bad()
            else:
                yield record


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
        decoder, blanks = json.JSONDecoder(), re.compile(r"[\s,]*")
        with open_data(file.path, HINT, file) as raw:
            source = io.TextIOWrapper(raw, encoding="utf-8", errors="replace")
            text = source.read(PIECE)
            start = LIST_OF_OBJECTS.search(text)
            assert start is not None  # it was recognised by this
            place = start.start() + 1
            while True:
                place = blanks.match(text, place).end()  # type: ignore[union-attr]  # matches anything
                if text.startswith("]", place):
                    return
                try:
                    record, place = decoder.raw_decode(text, place)
                except (ValueError, RecursionError) as error:
                    text, place = text[place:], 0
                    more = source.read(max(PIECE, len(text))) if len(text) < MAX_LINE else ""
                    if not more:
                        raise InputError(
                            f"{file.path} is no whole JSON array: object {file.number + 1} cannot be read ({error}); "
                            f"{HINT}"
                        ) from None
                    text += more
                    continue
                file.number += 1
                file.lines += 1
                yield record if isinstance(record, dict) and not is_deep(record) else None

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        hashed = ((record, hash(repr(record))) for record in self.records(file))
        return chunks(file, hashed, columns)

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        for record in self.records(file):
            if record is None:
                file.count_bad()
            else:
                yield record


class KeyedJson:
    """One object of all users, {"0": [3, 7], ...}, or of all items, {"0": {...}, ...}, as LETTER writes them."""

    name = "LETTER's JSON"

    def recognises(self, head: Head) -> bool:
        return bool(KEYED.match(head.text))

    def pairs(self, file: RecordFile) -> Iterator[tuple[str, Any]]:
        with open_data(file.path, HINT) as raw:
            try:
                found = parse_json(raw.read().decode("utf-8-sig"))
            except ValueError as error:
                raise InputError(f"{file.path} is not JSON ({error}); {HINT}") from None
        for key, value in found.items():
            file.lines += 1
            file.number += 1
            yield key, value

    def events(self, file: RecordFile, columns: Columns) -> Iterator["pd.DataFrame"]:
        histories = Histories()
        for user, items in self.pairs(file):
            if not isinstance(items, list) or not all(isinstance(item, int | str) for item in items):
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
