"""Data files, read line by line and never executed: gzip, zstd or plain, each line JSON or a Python literal."""

import ast
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson
from isal import igzip, isal_zlib  # three times as fast as gzip here

from common.errors import InputError
from common.files import MAX_DEPTH, check_regular, is_deep

MAX_BAD_SHARE = 0.01  # of lines that cannot be used
MAX_LINE = 1 << 24  # bytes; a longer line cannot be used
BLOCK = 1 << 16  # bytes read at a time: parsed records stay in the cache
WRONG_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; bring the file itself: git lfs pull",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"BZh": "bzip2; unpack it: bunzip2 FILE",
    b"\xfd7z": "xz; unpack it: unxz FILE",
    b"7z": "a 7-Zip archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"SQLite format": "an SQLite database; export the table as CSV",
    b"\x89HDF": "an HDF5 file; save the table as CSV or parquet",
    b"ORC": "an ORC file; save the table as parquet",
    **dict.fromkeys(
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a pickle, which may run code; save it as CSV, parquet or JSON",
    ),
    b"<!DOCTYPE": "a web page, not the data; download the file itself",
    b"<html": "a web page, not the data; download the file itself",
}

# Parsing is bounded by what it costs, not by bytes alone: every value takes memory and time.
SHORT = 20_000  # characters; a shorter line is parsed without counting
MAX_MARKS = 1_000_000  # commas and opening brackets of a line
MAX_TOKENS = 100_000  # of a Python literal, whose syntax tree takes about a kilobyte for each
HUGE = re.compile(r"\b0[box]\w{2000}", re.IGNORECASE)  # a number with more digits than str() writes
TOKEN = re.compile(r"(\w*)(\'\'\'|\"\"\"|\'|\")|\w+|\S")  # group 2: a string begins
# What follows in a string, up to its end or 10,000 escapes, so that a match keeps few places to come back to.
# Possessive repeats would keep none, but match wrongly before Python 3.11.5.
IN_STRING = {
    q: re.compile(
        rf"[^{q[0]}\\]*(?:(?:\\.{rf'|{q[0]}(?!{q[0]}{q[0]})' * (len(q) == 3)})[^{q[0]}\\]*){{0,10000}}", re.DOTALL
    )
    for q in ("'", '"', "'''", '"""')
}


@contextmanager
def open_data(path: Path, hint: str, line: Any = None) -> Iterator[IO[bytes]]:
    """Open a data file for reading bytes; gzip and zstd are unpacked, whatever the file's name.

    Raises InputError if it is missing, damaged (then names `line.number`, if given) or of a kind that is not read.
    """
    check_regular(path, hint)
    try:
        with path.open("rb") as raw:
            start = raw.read(32)
            raw.seek(0)
            wrong = next((kind for mark, kind in WRONG_FILES.items() if start.startswith(mark)), None)
            if wrong:
                raise InputError(f"{path} is {wrong}")
            if start.startswith(b"\x1f\x8b"):
                with igzip.open(raw) as file:
                    yield file
            elif start.startswith(b"\x28\xb5\x2f\xfd"):
                import pyarrow  # type: ignore[import-untyped]

                with io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20) as file:
                    yield file
            else:
                yield raw
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {hint}") from None
    # igzip raises EOFError where a file was cut short
    except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]  # typed as an instance, is a class
        where = f" beyond line {line.number}" if line else ""
        raise InputError(f"{path} cannot be read{where} ({error}); {hint}") from None


@dataclass
class RecordFile:
    """Reads a file line by line and counts the lines that cannot be used.

    hint: what to do if the file is missing or damaged.
    """

    path: Path
    hint: str
    lines: int = 0  # not counting blank ones
    bad: int = 0  # of these, cannot be used
    not_utf8: int = 0  # of these, read as Windows-1252
    first_bad: list[int] = field(default_factory=list)
    number: int = 0  # of the current line, 1-based
    problem: str = ""  # of the first bad line

    def blocks(self) -> Iterator[list[bytes]]:
        """Yield the lines, many at a time. Raises InputError if the file cannot be read to its end."""
        with open_data(self.path, self.hint, self) as file:
            rest = b""
            while block := file.read(min(BLOCK, MAX_LINE)):
                *lines, rest = (rest + block).split(b"\n")
                if len(rest) >= MAX_LINE:
                    lines, rest = [*lines, rest], b""
                yield lines
            if rest:
                yield [rest]

    def texts(self) -> Iterator[str]:
        """Yield the lines without blank ones. Raises InputError if the file cannot be read to its end."""
        for lines in self.blocks():
            for _, text in self.decode(lines):
                yield text

    def decode(self, lines: list[bytes]) -> Iterator[tuple[bytes, str]]:
        """Yield the lines that are not blank, as bytes and as text, and count them."""
        for line in lines:
            self.number += 1
            text = self._decode(line).strip()
            if text:
                self.lines += 1
                yield line, text

    def _decode(self, line: bytes) -> str:
        try:
            return line.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            self.not_utf8 += 1
            return line.decode("cp1252", errors="replace")

    def count_bad(self, number: int | None = None, problem: str = "") -> None:
        """Count a line, by default the current one, as one that cannot be used."""
        self.bad += 1
        self.problem = self.problem or problem
        if len(self.first_bad) < 5:
            self.first_bad.append(self.number if number is None else number)

    def check(self, expected: str) -> list[str]:
        """Return notes on the lines that were left out. expected: what a line must be.

        Raises InputError if the file is empty or more than 1 % of its lines cannot be used.
        """
        if not self.lines:
            raise InputError(f"{self.path} is empty; {self.hint}")
        notes = []
        if self.bad:
            numbers = ", ".join(map(str, self.first_bad)) + (", ..." if self.bad > len(self.first_bad) else "")
            why = f"; the first: {self.problem}" if self.problem else ""
            problem = (
                f"{self.path.name}: {self.bad:,} of {self.lines:,} lines are not {expected} (lines {numbers}{why})"
            )
            if self.bad > MAX_BAD_SHARE * self.lines:
                raise InputError(f"{self.path.parent / problem}; more than {MAX_BAD_SHARE:.0%} is refused. {self.hint}")
            notes.append(problem)
        if self.not_utf8:
            notes.append(f"{self.path.name}: {self.not_utf8:,} lines are not UTF-8: read as Windows-1252")
        return notes


def parse_record(line: str) -> dict[str, Any] | None:
    """Return a line, JSON or a Python literal, as a dict.

    None if it is neither, has too many values or is nested over MAX_DEPTH deep. Nothing in it is executed.
    """
    if len(line) > SHORT and sum(map(line.count, ",[{")) > MAX_MARKS:
        return None
    may_be_deep = sum(map(line.count, "[{(")) > MAX_DEPTH
    for parse in (orjson.loads, json.loads, parse_literal):  # orjson refuses NaN and lone surrogates
        try:
            record = parse(line)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return record if isinstance(record, dict) and not (may_be_deep and is_deep(record)) else None
    return None


def tokens(text: str) -> Iterator[tuple[str, str]]:
    """Yield each token of a Python literal with its prefix, "" if it has none; of a string the prefix and the quote."""
    at = 0
    while token := TOKEN.search(text, at):
        yield token[0], token[1] or ""
        at, quote = token.end(), token[2]
        while quote:
            before, at = at, IN_STRING[quote].match(text, at).end()  # type: ignore[union-attr]  # it matches anything
            if text.startswith(quote, at):
                at, quote = at + len(quote), None
            elif at == before:  # the text ends in the string
                at, quote = len(text), None


def parse_literal(text: str) -> Any:
    """Return the value of a Python literal. Raises ValueError if it is none or has more than MAX_TOKENS tokens."""
    if len(text) > SHORT:
        for count, (token, prefix) in enumerate(tokens(text)):
            if count >= MAX_TOKENS or "f" in prefix.lower() or "t" in prefix.lower() or token == "#":
                raise ValueError(f"more than {MAX_TOKENS:,} tokens, a comment or a formatted string")
    if len(text) > 2000 and HUGE.search(text):
        raise ValueError("a number of thousands of digits")
    return ast.literal_eval(text)
