"""What a prepared dataset holds, in numbers and in words: the report of datasets/prepare/__main__.py."""

from typing import Any

import numpy as np

from datasets.catalog import Catalog
from datasets.prepare.amazon import PAPER_SETS
from datasets.text import flat_text

ATTRIBUTES = ("title", "price", "brand", "categories", "description")
QUANTILES = {"shortest": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "longest": 1.0}


def summarise(catalog: Catalog) -> dict[str, Any]:
    """Counts, quantiles of the histories' lengths, the share of items with each attribute, and for the paper's datasets
    its Table 1 and a warning for every count that differs."""
    lengths = np.diff(catalog.sequences.offsets)
    counts = {
        "users": len(catalog.sequences),
        "items": catalog.num_items,
        "pictures": None if catalog.pictures is None else sum(p is not None and p.is_file() for p in catalog.pictures),
        "interactions": int(lengths.sum()),
    }
    known = {a: sum(bool(flat_text(record.get(a))) for record in catalog.metadata) for a in ATTRIBUTES}
    if counts["pictures"] is not None:
        known["picture"] = counts["pictures"]
    paper = PAPER_SETS.get(catalog.name)
    table = {name: getattr(paper, name) for name in counts} if paper else None
    return {
        "counts": counts,
        "history_lengths": {name: float(np.quantile(lengths, q)) for name, q in QUANTILES.items()},
        "items_with": {name: round(number / catalog.num_items, 4) for name, number in known.items()},
        "items_without_metadata": sum(not record for record in catalog.metadata),
        "notes": catalog.notes,
        "paper_table_1": table,
        "warnings": [
            f"{number:,} {name}, but the paper's Table 1 has {table[name]:,}"
            for name, number in counts.items()
            if table and number is not None and number != table[name]
        ],
    }


def in_words(report: dict[str, Any], dataset_code: str) -> str:
    """A report in lines for people."""
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
    lines += [f"note: {note}" for note in [*(report["prepared"] or {}).get("notes", []), *summary["notes"]]]
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    if summary["paper_table_1"] and not summary["warnings"]:
        lines.append("the counts are those of the paper's Table 1")
    return "\n".join(lines)
