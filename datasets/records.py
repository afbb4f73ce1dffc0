"""Read files with one JSON object or Python literal per line, gzipped or not.

Nothing in a file is executed.
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from isal import igzip, isal_zlib  # three times as fast as gzip here

from common.errors import InputError

MAX_BAD_SHARE = 0.01  # maximum share of bad lines
MAX_LINE = 1 << 24  # bytes; a longer line is bad
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK": "a zip archive", b"BZ": "bzip2", b"\xfd7": "xz"}


@dataclass
class RecordFile:
    """Reader of one file of records that counts bad lines.

    hint: how to fix a missing or damaged file, the end of the error messages.
    """

    path: Path
    hint: str
    lines: int = 0  # non-blank lines
    bad: int = 0  # non-blank lines that are not the expected records
    not_utf8: int = 0  # non-blank lines that are not UTF-8 and were read as Windows-1252
    first_bad: list[int] = field(default_factory=list)  # numbers of the first bad lines
    number: int = 0  # number of the current line, from 1

    def texts(self) -> Iterator[str]:
        """Yield the non-blank lines. Raises InputError if the file is damaged."""
        try:
            with self.path.open("rb") as raw:
                start = raw.read(2)
                raw.seek(0)
                kind = next((kind for mark, kind in MARKS.items() if start == mark), None)
                if kind:
                    raise InputError(f"{self.path} is {kind}, not lines of UTF-8 (gzipped or not); {self.hint}")
                with igzip.open(raw) if start == b"\x1f\x8b" else raw as file:
                    for line in iter(lambda: file.readline(MAX_LINE), b""):
                        self.number += 1
                        text = self._decode(line).strip()
                        if text:
                            self.lines += 1
                            yield text
        except FileNotFoundError:
            raise InputError(f"{self.path} does not exist; {self.hint}") from None
        # igzip raises EOFError for a truncated file
        except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]  # typed as an instance, is a class
            raise InputError(f"{self.path} cannot be read beyond line {self.number} ({error}); {self.hint}") from None

    def _decode(self, line: bytes) -> str:
        try:
            return line.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            self.not_utf8 += 1
            return line.decode("cp1252", errors="replace")

    def count_bad(self) -> None:
        """Count the current line as bad."""
        self.bad += 1
        if len(self.first_bad) < 5:
            self.first_bad.append(self.number)

    def check(self, expected: str) -> list[str]:
        """Return messages about the lines that were left out or decoded differently.

        expected: what the lines should be. Raises InputError if the file is empty or more than 1% of its lines are bad.
        """
        if not self.lines:
            raise InputError(f"{self.path} is empty; {self.hint}")
        notes = []
        if self.bad:
            numbers = ", ".join(map(str, self.first_bad)) + (", ..." if self.bad > len(self.first_bad) else "")
            problem = f"{self.path.name}: {self.bad:,} of {self.lines:,} lines are not {expected} (lines {numbers})"
            if self.bad > MAX_BAD_SHARE * self.lines:
                raise InputError(f"{self.path.parent / problem}; more than {MAX_BAD_SHARE:.0%} is refused. {self.hint}")
            notes.append(problem)
        if self.not_utf8:
            notes.append(f"{self.path.name}: {self.not_utf8:,} lines are not UTF-8: read as Windows-1252")
        return notes


def parse_record(line: str) -> dict[str, Any] | None:
    """Return a line's JSON object or Python literal as a dict, or None."""
    for parse in (orjson.loads, json.loads, ast.literal_eval):  # orjson refuses NaN and lone surrogates
        try:
            record = parse(line)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return record if isinstance(record, dict) else None
    return None
