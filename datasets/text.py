"""An item's text, from its metadata: "Title: ... Price: ... Brand: ... Categories: ..."."""

import html
import math
from collections.abc import Iterator
from typing import Any

NO_TEXT = "unknown item"  # the text of an item of which no attribute is known


def item_text(record: dict[str, Any], attributes: tuple[str, ...]) -> str:
    """The attributes that the item has, in the given order, as one line. HTML entities are decoded, nested lists such
    as Amazon's category paths are joined."""
    parts = []
    for attribute in attributes:
        value = flat_text(record.get(attribute))
        if value:
            parts.append(f"{attribute.capitalize()}: {value}")
    return " ".join(parts) or NO_TEXT


def flat_text(value: Any) -> str:
    """A text, number or nested list of them as one line; "" for none."""
    # Amazon's category paths share their heads: name each category once, in order.
    return ", ".join(dict.fromkeys(_leaves(value)))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif value is not None and not (isinstance(value, float) and math.isnan(value)):
        text = " ".join(html.unescape(str(value)).split())
        text = text.encode("utf-8", "replace").decode()  # half an emoji is no text
        if text:
            yield text
