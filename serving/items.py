"""What an export can recommend: item ids and titles, as arrays, so that millions of them load at once. N items."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.errors import InputError

MAX_ID = 256  # bytes

ItemId = str | int  # an item's id as the dataset has it, or its number from 1 on


@dataclass(frozen=True)
class Items:
    """Item i (1..N) has ids[i - 1] and title(i)."""

    ids: np.ndarray  # [N] of bytes, UTF-8
    titles: np.ndarray  # [bytes] uint8, UTF-8, one after another
    title_ends: np.ndarray  # [N] int64

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, item: int) -> str:
        return self.ids[item - 1].decode()

    def title(self, item: int) -> str:
        start = self.title_ends[item - 2] if item > 1 else 0
        return self.titles[start : self.title_ends[item - 1]].tobytes().decode()

    def number(self, item: ItemId) -> int:
        """The number of an item given by id or number, 0 where it is unknown. Raises InputError for what is neither."""
        if isinstance(item, str):
            return self._find(item)
        if isinstance(item, bool) or not isinstance(item, int | np.integer):
            raise InputError(f"item {item!r:.80} must be an id (a text) or a number from 1 to {len(self)}")
        return int(item) if 1 <= item <= len(self) else 0

    def known(self, items: Iterable[ItemId]) -> tuple[list[int], list[ItemId]]:
        """(numbers of the known ones, the unknown ones)."""
        numbers = [(item, self.number(item)) for item in items]
        return [number for _, number in numbers if number], [item for item, number in numbers if not number]

    def unknown(self, items: list[ItemId]) -> str:
        """What is said of unknown items."""
        named = ", ".join(f"{item!r:.80}" for item in items[:5]) + (", ..." if len(items) > 5 else "")
        return f"unknown: {named} (of {len(self):,} items)"

    def _find(self, item: str) -> int:
        key = item.encode("utf-8", "surrogatepass")
        if not key or b"\0" in key or len(key) > self.ids.itemsize:
            return 0
        at = np.searchsorted(self.ids, key, sorter=self._order)
        found = at < len(self) and self.ids[self._order[at]] == key
        return int(self._order[at]) + 1 if found else 0

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.ids)

    def extended(self, more: Items) -> Items:
        """These items and then `more`."""
        ends = np.concatenate([self.title_ends, more.title_ends + len(self.titles)])
        return Items(np.concatenate([self.ids, more.ids]), np.concatenate([self.titles, more.titles]), ends)


def make_items(ids: Iterable[str], titles: Iterable[str]) -> Items:
    """Items of these ids and titles. Raises InputError for an id that cannot be stored or stands twice, and for a title
    that is no text."""
    ids, titles = list(ids), list(titles)
    if len(titles) != len(ids):
        raise InputError(f"{len(titles)} titles for {len(ids)} items; give one a piece, '' where there is none")
    seen: set[str] = set()
    for item, title in zip(ids, titles, strict=True):
        if not isinstance(item, str) or not 1 <= len(_utf8(item)) <= MAX_ID or "\0" in item:
            raise InputError(f"item id {item!r:.80} must be a text of 1 to {MAX_ID} bytes in UTF-8 without NUL")
        if item in seen:
            raise InputError(f"item id {item!r} stands twice; ids must be unique")
        if not isinstance(title, str):
            raise InputError(f"the title of item {item!r} is {title!r:.80}; give a text, '' where there is none")
        seen.add(item)
    encoded = [title.encode("utf-8", "replace") for title in titles]
    return Items(
        np.array([item.encode() for item in ids], dtype=np.bytes_),
        np.frombuffer(b"".join(encoded), dtype=np.uint8),
        np.cumsum([len(title) for title in encoded], dtype=np.int64),
    )


def _utf8(text: str) -> bytes:
    """The text's bytes; none where it has half of a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return b""
