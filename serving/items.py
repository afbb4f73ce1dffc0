"""Item ids and titles of an export, stored as arrays so that millions load at once. N: number of items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.errors import InputError, shown
from common.files import MAX_ID

ItemId = str | int  # the dataset's id, or the item's number (serving/catalogue.py)


@dataclass(frozen=True)
class Items:
    """The ids and titles of items 1..N."""

    ids: np.ndarray  # [N] bytes, UTF-8
    titles: np.ndarray  # [bytes] uint8, UTF-8, concatenated
    title_ends: np.ndarray  # [N] int64

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, item: int) -> str:
        return self.ids[item - 1].decode("utf-8", "replace")

    def title(self, item: int) -> str:
        start = self.title_ends[item - 2] if item > 1 else 0
        return self.titles[start : self.title_ends[item - 1]].tobytes().decode("utf-8", "replace")

    def find(self, ids: Sequence[str]) -> list[int]:
        """Return the number of each id, 0 if it is unknown."""
        if not len(self) or not ids:
            return [0] * len(ids)
        encoded = (item.encode("utf-8", "surrogatepass") for item in ids)
        keys = np.array(
            [b"" if b"\0" in key or len(key) > self.ids.itemsize else key for key in encoded], dtype=self.ids.dtype
        )
        at = np.minimum(np.searchsorted(self.ids, keys, sorter=self._order), len(self) - 1)
        found = self._order[at]
        return np.where((self.ids[found] == keys) & (keys != b""), found + 1, 0).tolist()

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.ids)

    @cached_property
    def numeric(self) -> bool:
        """Whether every id is a whole number, such as "4711"."""
        characters = self.ids.view(np.uint8)
        digits = ((characters >= ord("0")) & (characters <= ord("9"))) | (characters == 0)
        return len(self) > 0 and bool(digits.all())

    def extended(self, more: Items) -> Items:
        """Return these items with `more` appended."""
        ends = np.concatenate([self.title_ends, more.title_ends + len(self.titles)])
        return Items(np.concatenate([self.ids, more.ids]), np.concatenate([self.titles, more.titles]), ends)


def make_items(ids: Iterable[str], titles: Iterable[str]) -> Items:
    """Return Items with these ids and titles. Raises InputError for an invalid or duplicate id and an invalid title."""
    ids, titles = list(ids), list(titles)
    if len(titles) != len(ids):
        raise InputError(f"{len(titles)} titles for {len(ids)} items; give one per item, '' if it has none")
    seen: set[str] = set()
    for item, title in zip(ids, titles, strict=True):
        if not isinstance(item, str) or not 1 <= len(_utf8(item)) <= MAX_ID or "\0" in item:
            raise InputError(f"item id {shown(item)} must be a string of 1 to {MAX_ID} bytes in UTF-8 without NUL")
        if item in seen:
            raise InputError(f"item id {shown(item)} occurs twice; ids must be unique")
        if not isinstance(title, str):
            raise InputError(f"the title of item {shown(item)} is {shown(title)}; give a string, '' if it has none")
        seen.add(item)
    encoded = [title.encode("utf-8", "replace") for title in titles]
    return Items(
        np.array([item.encode() for item in ids], dtype=np.bytes_),
        np.frombuffer(b"".join(encoded), dtype=np.uint8),
        np.cumsum([len(title) for title in encoded], dtype=np.int64),
    )


def _utf8(text: str) -> bytes:
    """Encode a string; b"" if it has a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return b""
