"""What a reader of one format is, and the beginning of a file by which it is recognised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from datasets.prepare.readers.columns import Columns
from datasets.records import RecordFile, open_data

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 250_000  # events read at a time
HEAD = 1 << 16  # bytes by which a format is recognised
HINT = "give the whole file as it was published or exported"


@dataclass(frozen=True)
class Head:
    """The beginning of a file, unpacked."""

    path: Path
    data: bytes = b""  # empty for a folder

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", errors="replace").removeprefix("\ufeff").lstrip()

    @property
    def lines(self) -> list[str]:
        """The first lines that are complete and not blank."""
        lines = self.text.split("\n")
        whole = lines[:-1] if len(self.data) >= HEAD and len(lines) > 1 else lines
        return [line.rstrip("\r") for line in whole if line.strip()][:100]

    @classmethod
    def of(cls, path: Path) -> Head:
        """Read the beginning of a file; a folder has none."""
        if path.is_dir():
            return cls(path)
        with open_data(path, HINT) as file:
            return cls(path, file.read(HEAD))


class Reader(Protocol):
    """Reads one format. `file` counts lines, and those that cannot be used."""

    name: str  # of the format, as in an error

    def recognises(self, head: Head) -> bool:
        """Return whether the file is of this format."""

    def events(self, file: RecordFile, columns: Columns) -> Iterator[pd.DataFrame]:
        """Yield events in the file's order, raw: columns user, item, time and, if known, rating; the index is the line.

        A column `line`, if given, tells whether two events are copies of one line.
        """

    def items(self, file: RecordFile, columns: Columns) -> Iterator[dict[str, Any]]:
        """Yield a record for every item."""
