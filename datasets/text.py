"""Build an item's text from metadata: "Title: ... Price: ... Brand: ..."."""

import html
import math
from collections.abc import Iterator
from typing import Any

NO_TEXT = "unknown item"  # the text of an item without any attribute


def item_text(record: dict[str, Any], attributes: tuple[str, ...]) -> str:
    """Return the item's attributes in the given order as one line.

    Decodes HTML entities and joins nested lists such as Amazon's category paths.
    """
    fields = []
    for attribute in attributes:
        value = flat_text(record.get(attribute))
        if value:
            fields.append(f"{attribute.capitalize()}: {value}")
    return " ".join(fields) or NO_TEXT


def flat_text(value: Any) -> str:
    """Return a text, number or nested list of them as one line, "" if empty."""
    # Amazon's category paths share prefixes: keep each category once, in order.
    return ", ".join(dict.fromkeys(_leaves(value)))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for element in value:
            yield from _leaves(element)
    elif value is not None and not (isinstance(value, float) and math.isnan(value)):
        text = " ".join(html.unescape(str(value)).split())
        text = text.encode("utf-8", "replace").decode()  # replaces lone surrogates
        if text:
            yield text
