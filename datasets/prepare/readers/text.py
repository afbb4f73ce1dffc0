"""Sequences as S3Rec, P5 and this project write them: a line per user, `user item item ...`, oldest first."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from datasets.prepare.readers.base import CHUNK, Head
from datasets.prepare.readers.columns import Columns
from datasets.records import RecordFile

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
