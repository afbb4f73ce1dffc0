"""What an item has: its text, from its metadata, and its picture. Serving uses this without a dataset.

A text reads "Title: ... Price: ... Brand: ... Categories: ...". Files that say which picture an item has:

    <dataset_code>/item2img.json       item id or ASIN -> path below photos/<dataset_code>/
    <dataset_code>/pictures.json       manifest of datasets/prepare/pictures.py: the status of every item's picture
    <dataset_code>/item2img_dict.pkl   ASIN -> path on any machine, as VIP5 ships it; read if there is no item2img.json

datasets/prepare/pictures.py writes item2img.json from the manifest; users with pictures of their own write it by hand.
"""

import html
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json

NO_TEXT = "unknown item"  # the text of an item without any known attribute
NOTHING = {"none", "nan", "null", "undefined", "n/a", "inf", "-inf", "infinity", "-infinity"}

_TAGS = (
    "a|b|i|u|p|s|br|hr|em|h[1-6]|li|ol|ul|dl|dt|dd|td|th|tr|div|img|sub|sup|pre|span|font|form|html|head|body|meta|link|"
    "table|tbody|thead|center|strong|small|big|script|style|input|button|iframe|noscript|label|section|object|embed|param"
)
# A "<" within a tag, or a dot within a selector of STYLE, ends the attempt that began at an earlier one, so long texts
# take linear time.
BLOCK = re.compile(r"<(script|style)\b[^<>]*>.*?(?:</\1\s*>|$)|<!--.*?(?:-->|$)", re.IGNORECASE | re.DOTALL)
TAG = re.compile(  # the last may be cut off
    rf"</?(?:{_TAGS})\b(?:\s[^<>]*|\s*/)?>|<(?:{_TAGS})\s[^<>=]*=[^<>]*$|</(?:{_TAGS})$", re.IGNORECASE
)
SCRIPT = re.compile(r"getTime\(|\bfunction\s*\w*\(|\bvar \w+ ?=|\bdocument\.\w+\(")
STYLE = re.compile(r"[.#][\w-](?:[\w\s:>,-]|[.#](?![\w-]))*\{\s*[a-z-]+\s*:[^{}]*(?:\}|$)")
BY_LINE = re.compile(r"^\s*by\s*\n\s*", re.IGNORECASE)  # "by\n    Microsoft", a brand on a page of 2018
MAX_ESCAPED = 8  # how often entities may be escaped; twice is common
MAX_PRICE = 40  # characters; a longer price is page code
MAX_DEPTH = 32  # of lists in lists; deeper ones are left out


def item_text(record: dict[str, Any], attributes: tuple[str, ...]) -> str:
    """Return the item's known attributes, in the given order, as one line; NO_TEXT if none is known."""
    fields = []
    for attribute in attributes:
        value = attribute_text(record, attribute)
        if value:
            fields.append(f"{attribute.capitalize()}: {value}")
    return " ".join(fields) or NO_TEXT


def attribute_text(record: dict[str, Any], attribute: str) -> str:
    """Return one attribute as clean text, "" if it is missing. A price needs a digit."""
    text = flat_text(record.get(attribute))
    if attribute == "price" and not (len(text) <= MAX_PRICE and any(c.isdigit() for c in text)):
        return ""
    return text


def is_junk(record: dict[str, Any], attribute: str) -> bool:
    """Return whether the attribute holds something, but only markup, code or words for nothing."""
    return not attribute_text(record, attribute) and any(
        leaf.strip() for leaf in _leaves(record.get(attribute), clean=False)
    )


def flat_text(value: Any) -> str:
    """Return a text, number, or nested list or dict of them as one line of clean text; "" for none."""
    if isinstance(value, str):
        return clean_text(value)
    # Amazon's category paths share their heads: name each category once, in order.
    return ", ".join(dict.fromkeys(_leaves(value)))


def as_json(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with text in place of what JSON lacks, such as a set or bytes in a Python literal."""
    return json.loads(json.dumps(record, default=flat_text, skipkeys=True))


def _leaves(value: Any, clean: bool = True, depth: int = 0) -> Iterator[str]:
    if depth > MAX_DEPTH:
        return
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)  # a set's own order differs from process to process
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, clean, depth + 1)
    elif isinstance(value, dict):
        for key, part in value.items():
            if text := ", ".join(dict.fromkeys(_leaves(part, clean, depth + 1))):
                yield f"{clean_text(str(key)) if clean else key}: {text}"
    elif value is not None and not (isinstance(value, float) and math.isnan(value)):
        text = clean_text(str(value)) if clean else str(value)
        if text:
            yield text


def clean_text(text: str) -> str:
    """Return a text without entities, markup and runs of blanks; "" if it is code or a word for nothing."""
    for _ in range(MAX_ESCAPED):
        if "&" not in text or (decoded := html.unescape(text)) == text:
            break
        text = decoded
    if "<" in text:
        text = TAG.sub(" ", BLOCK.sub(" ", text))
    if ("{" in text and STYLE.search(text)) or (("(" in text or "=" in text) and SCRIPT.search(text)):
        return ""
    text = " ".join(BY_LINE.sub("", text).split())
    text = text.encode("utf-8", "replace").decode()  # half an emoji is no text
    return "" if text.lower() in NOTHING else text


# ------------------------------------------------------------------------------------------------------------- pictures

ITEM2IMG = "item2img.json"
PICKLED = "item2img_dict.pkl"
MANIFEST = "pictures.json"
MAX_PATH = 3000  # characters of a path below the folder of pictures


def read_item2img(
    folder: Path,
    photos: Path,
    asins: list[str],
    manifest: Mapping[str, Mapping[str, str]] | None = None,
    notes: list[str] | None = None,
) -> dict[str, str] | None:
    """Return ASIN -> path below `photos`; None if the dataset's folder lists no pictures.

    asins: of items 1..N. manifest: its entries, and the pickled list, are left out. notes: gets a count of links that
    lead out of `photos`, which are left out. Raises InputError for an unknown item and for any other path out of it.
    """
    path, pickled = folder / ITEM2IMG, folder / PICKLED
    if not path.exists():
        if manifest is not None or not pickled.exists():
            return None
        from datasets.prepare.pictures import find_pictures

        found = find_pictures(asins, photos, pickled)
        return {asin: entry["file"] for asin, entry in found.items() if "file" in entry}
    hint = f"it maps an item id or ASIN to a path below {photos}"
    item2img = read_json(path, hint)
    if not all(isinstance(name, str) for name in item2img.values()):
        raise InputError(f"{path} must map strings to strings; {hint}")
    asin_of = {str(i): asin for i, asin in enumerate(asins, start=1)} | {asin: asin for asin in asins}
    inside, listed, links = photos.resolve(), {}, []
    for item, name in item2img.items():
        if manifest and manifest.get(item) == {"file": name}:
            continue
        if item not in asin_of:
            raise InputError(f"{path}: item {item!r} is not in datamaps.json; {hint}")
        parts = name.encode("utf-8", "surrogatepass").split(b"/")
        if len(name) > MAX_PATH or max(map(len, parts)) > 255:
            raise InputError(f"{path}: picture {name[:80]!r} of item {item!r} is too long for a file name; {hint}")
        place = Path(os.path.normpath(inside / name))
        try:
            target = (inside / name).resolve()
        except (OSError, ValueError, RuntimeError):  # a zero byte, or links in a circle
            target = Path()
        if not target.is_relative_to(inside):
            if "\0" in name or not place.is_relative_to(inside):
                raise InputError(f"{path}: picture {name!r} of item {item!r} lies outside {photos}; {hint}")
            links.append(name)
        else:
            listed[asin_of[item]] = str(target.relative_to(inside)) if Path(name).is_absolute() else name
    if links and notes is not None:
        notes.append(f"{len(links)} pictures are links to files outside {photos}: left out (the first: {links[0]!r})")
    return listed
