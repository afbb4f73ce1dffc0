"""The columns of events and items by their usual names, the beginning of a file, and the interface of a reader."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import InputError
from datasets.records import RecordFile, open_data

if TYPE_CHECKING:
    import pandas as pd

# Compared without case, blanks and signs: userId is user_id.
USUAL = {
    "user": ("userid", "user", "reviewerid", "visitorid", "customerid", "memberid"),
    "item": ("parentasin", "asin", "itemid", "item", "productid", "product", "movieid", "articleid", "sku"),
    "time": ("timestamp", "time", "eventtime", "unixreviewtime", "datetime", "date", "createdat"),
    "rating": ("rating", "overall", "stars", "score"),
}
# Columns of the table of items; `id` counts if there is no other.
ITEM_ID = (*USUAL["item"], "id")
PICTURE = ("picture", "image", "img", "photo", "imageurl", "pictureurl", "imurl", "imageurlhighres", "images")
NAMES = ("user", "item", "time", "rating", "id", "picture")
NEEDED = ("user", "item", "time")

Columns = Mapping[str, str]


@lru_cache(maxsize=10_000)
def plain(name: object) -> str:
    """Return a column's name as USUAL spells it."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def find_columns(path: Path, header: Iterable[object], given: Columns) -> dict[str, str] | None:
    """Return the columns of user, item, time and, if there is one, rating; None if one is missing.

    given: names from --columns. Raises InputError if one of them is absent or two columns could be the one.
    """
    names = list(map(str, header))
    check_given(path, names, {key: given[key] for key in USUAL if key in given})
    found = dict(given)
    for column, usual in USUAL.items():
        if column in given:
            continue
        candidates = [name for name in names if plain(name) in usual]
        parents = [name for name in candidates if plain(name) == "parentasin"]  # a product of several variants
        candidates = parents or candidates
        if len(candidates) > 1 and column in NEEDED:
            raise InputError(
                f"{path} has several columns for the {column}, {', '.join(map(repr, candidates))}; name one: "
                f"--columns {column}={candidates[0]}"
            )
        if candidates:
            found[column] = candidates[0]
    if not all(column in found for column in NEEDED):
        return None
    used = [found[column] for column in USUAL if column in found]
    if twice := next((name for name in used if names.count(name) > 1), None):
        raise InputError(f"{path} has two columns {twice!r}; rename one")
    if both := next((name for name in used if used.count(name) > 1), None):
        two = " and ".join(column for column in USUAL if found.get(column) == both)
        raise InputError(f"{path}: column {both!r} cannot be {two}; give each its own: --columns user=...,item=...")
    return found


def check_given(path: Path, names: list[str], given: Columns) -> None:
    """Raise InputError if a column named by --columns is not in the file."""
    for column, name in given.items():
        if name not in names:
            raise InputError(
                f"{path} has no column {name!r} (--columns {column}={name}); its columns are {shown(names)}"
            )


def no_events(path: Path, names: Iterable[object]) -> InputError:
    """Return the error for a file without the columns of events."""
    return InputError(
        f"{path} holds no events: it has the columns {shown(names)}, but a user, an item and a time are needed, such "
        f"as user_id, item_id, timestamp (or reviewerID, asin, unixReviewTime); name them: "
        f"--columns user=...,item=...,time=..., or add the header line if it is missing"
    )


def shown(header: Iterable[object]) -> str:
    """Return the first columns as an error shows them."""
    names = list(header)
    return ", ".join(map(repr, map(str, names[:12]))) + (", ..." if len(names) > 12 else "") if names else "none"


def find_id(header: Iterable[object], given: Columns) -> str | None:
    """Return the column of an item's id in a table of items; None if there is none."""
    names = list(map(str, header))
    if "id" in given:
        return given["id"] if given["id"] in names else None
    by_plain = {plain(name): name for name in reversed(names)}
    usual = (given["item"],) if given.get("item") in names else ()
    return next((name for name in (*usual, *(by_plain.get(name) for name in ITEM_ID)) if name), None)


def parse_columns(text: str) -> dict[str, str]:
    """Read --columns: "user=...,item=...,time=...". Raises ValueError for anything else."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() in NAMES and value.strip() for name, _, value in pairs):
        raise ValueError(text)
    return {name.strip(): value.strip() for name, _, value in pairs}


# --------------------------------------------------------------------------------------------------------------- reader

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
        return self._decoded.lstrip()

    @property
    def _decoded(self) -> str:
        return self.data.decode("utf-8", errors="replace").removeprefix("\ufeff")

    @property
    def lines(self) -> list[str]:
        """The first lines that are complete and not blank."""
        lines = self._decoded.lstrip(" \r\n").split("\n")  # a tab may follow the empty name of an index
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
