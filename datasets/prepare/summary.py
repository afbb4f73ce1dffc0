"""The report of datasets.prepare: what a prepared dataset holds, in numbers and in words."""

from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np

from datasets.catalog import Catalog
from datasets.prepare.amazon import PAPER_SETS
from datasets.text import attribute_text, is_junk

ATTRIBUTES = ("title", "price", "brand", "categories", "description")
NO_TEXT = {"asin", "images", "imUrl", "related"}  # of the metadata, no attributes to encode
SIDES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}
SAMPLED = 2_000  # pictures whose size is read
SMALL = 64  # pixels; the encoders read about 250
QUANTILES = {"shortest": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "longest": 1.0}


def summarise(catalog: Catalog) -> dict[str, Any]:
    """Return counts, quantiles of the histories' lengths and of the pictures' sizes, the share of items with each
    attribute, and for the paper's datasets its Table 1 and a warning for every count that differs."""
    lengths = np.diff(catalog.sequences.offsets)
    counts = {
        "users": len(catalog.sequences),
        "items": catalog.num_items,
        "pictures": None if catalog.pictures is None else sum(p is not None and p.is_file() for p in catalog.pictures),
        "interactions": int(lengths.sum()),
    }
    known, junk = Counter[str](dict.fromkeys(ATTRIBUTES, 0)), Counter[str]()
    for record in catalog.metadata:
        for name in record.keys() - NO_TEXT:
            if attribute_text(record, name):
                known[name] += 1
            elif is_junk(record, name):
                junk[name] += 1
    if counts["pictures"] is not None:
        known["picture"] = counts["pictures"]
    paper = PAPER_SETS.get(catalog.name)
    table = {name: getattr(paper, name) for name in counts} if paper else None
    return {
        "counts": counts,
        "history_lengths": {name: float(np.quantile(lengths, q)) for name, q in QUANTILES.items()},
        "items_with": {name: round(known[name] / catalog.num_items, 4) for name in sorted(known, key=_order)},
        "items_without_metadata": sum(not record for record in catalog.metadata),
        "picture_sides": _sides(catalog),
        "notes": catalog.notes
        + [
            f"{name}: {count:,} items have only markup, code or words for nothing: missing"
            for name, count in sorted(junk.items())
        ],
        "paper_table_1": table,
        "warnings": [
            f"{number:,} {name}, but the paper's Table 1 has {table[name]:,}"
            for name, number in counts.items()
            if table and number is not None and number != table[name]
        ],
    }


def _order(name: str) -> tuple[int, str]:
    """Sort the paper's attributes first, then the picture, then others by name."""
    first = (*ATTRIBUTES, "picture")
    return (first.index(name), "") if name in first else (len(first), name)


def _sides(catalog: Catalog) -> dict[str, float] | None:
    """Return quantiles of the pictures' shorter side in pixels, and the share below SMALL; None without pictures."""
    pictures = [path for path in catalog.pictures or [] if path is not None and path.is_file()]
    if not pictures:
        return None
    from PIL import Image

    sides = []
    for path in pictures[:: -(-len(pictures) // SAMPLED)]:
        with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError), Image.open(path) as picture:
            sides.append(min(picture.size))
    if not sides:
        return None
    shares = {name: float(np.quantile(sides, q)) for name, q in SIDES.items()}
    return shares | {"small": round(float(np.mean(np.array(sides) < SMALL)), 4)}


def in_words(report: dict[str, Any], dataset_code: str) -> str:
    """Return a report in lines for people."""
    summary = report["summary"]
    lines = []
    if filters := (report["prepared"] or {}).get("filters"):
        width = max(len(step["after"]) for step in filters)
        lines.append(f"{'after':{width}} {'users':>12} {'items':>12} {'interactions':>14}")
        lines += [
            f"{step['after']:{width}} {step['users']:12,} {step['items']:12,} {step['interactions']:14,}"
            for step in filters
        ]
    counts = ", ".join(f"{number:,} {name}" for name, number in summary["counts"].items() if number is not None)
    lines.append(f"{dataset_code}: {counts}")
    lines.append("history lengths: " + ", ".join(f"{name} {n:g}" for name, n in summary["history_lengths"].items()))
    lines.append("items with " + ", ".join(f"{name} {share:.1%}" for name, share in summary["items_with"].items()))
    if sides := summary["picture_sides"]:
        small = f"; {sides['small']:.1%} are smaller than {SMALL} pixels" if sides["small"] else ""
        lines.append("pictures' shorter side: " + ", ".join(f"{name} {sides[name]:g}" for name in SIDES) + small)
    lines += [f"note: {note}" for note in [*(report["prepared"] or {}).get("notes", []), *summary["notes"]]]
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    if summary["paper_table_1"] and not summary["warnings"]:
        lines.append("the counts are those of the paper's Table 1")
    return "\n".join(lines)
