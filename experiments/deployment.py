"""The deployment card of a run, as benchmarks/deploy.py measures it: its table and its figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.tables import markdown
from trainer.plots import figure, shades

if TYPE_CHECKING:
    from experiments.store import KeptRun

DIGITS = {"resident_mb": "MB in memory 0", "load_s": "load s 2", "p50_ms": "p50 ms 2", "p95_ms": "p95 ms 2",
          "step_p50_ms": "event p50 ms 2", "batch256_p50_ms": "256 users p50 ms 0",
          "batch256_p95_ms": "256 users p95 ms 0", "Recall@10": "Recall@10 4", "NDCG@10": "NDCG@10 4"}  # fmt: skip


def card_table(card: dict[str, Any]) -> list[str]:
    """Return the card as Markdown lines: a table, and sentences on large catalogues."""
    rows = pd.DataFrame(card["rows"])
    full = rows.groupby("size")["NDCG@10"].transform("first")
    table = pd.DataFrame(
        {
            "size": rows["size"].map(str),
            "engine": rows["engine"],
            "stored as": rows["quantize"].replace("none", "float32"),
            "MB on disk": (rows["bytes"] / 1e6).map("{:.2f}".format),
        }
    )
    for name, column in DIGITS.items():
        heading, _, digits = column.rpartition(" ")
        table[heading] = rows[name].map(f"{{:.{digits}f}}".format)
    by_torch = rows["same_top10_as_torch"] if "same_top10_as_torch" in rows else pd.Series(index=rows.index)
    for heading, shares in {
        "NDCG@10 lost": (1 - rows["NDCG@10"] / full).where(full > 0),
        "same top 10": rows["same_top10"],
        "same as torch": by_torch,
    }.items():
        table[heading] = ["" if pd.isna(share) else f"{share:.2%}" for share in shares]
    lines = markdown(table, text=(1, 2))
    if large := card["large_catalogue"]:
        lines += [
            f"Size {large['size']} (onnx, float16) with {large['items']:,} items, most of them made up: top 10 in "
            f"{large['p50_ms']:.1f} ms (p95 {large['p95_ms']:.1f}), {large['resident_mb']:.0f} MB in memory (peak "
            f"{large['peak_mb']:.0f}, with 256 users), loaded in {large['load_s']:.2f} s.",
            "",
        ]
    added = [row["add_10000_s"] for row in card["rows"] if row["add_10000_s"] is not None]
    if added:
        lines += [f"Adding 10,000 items takes {min(added):.2f} to {max(added):.2f} s, depending on the size.", ""]
    return lines


def section(runs: list[KeptRun]) -> list[str]:
    """Return the report's part on deployment as Markdown lines; empty if no run has a card."""
    lines: list[str] = []
    for run in runs:
        if card := run.record.get("deployment"):
            environment, versions = card["environment"], card["environment"]["versions"]
            lines += [
                f"### deploy of {run.name}",
                "",
                *card_table(card),
                f"- {card['users']:,} users; {environment['device']}; torch {versions['torch']}, onnxruntime "
                f"{versions['onnxruntime']}; commit `{(environment['commit'] or 'unknown')[:10]}`.",
                "",
                f"![NDCG@10 against bytes and time](../media/deploy-{run.config.dataset_code}.png)",
                "",
            ]
    heading = [
        "## What every size costs to serve",
        "",
        "`python -m benchmarks.deploy` measures the time of one answer (p50, p95), of one event with the answer after "
        "it, and of 256 users together. Metrics keep the history as candidates. *Same top 10*: the share of users who "
        "get the same ten items as from float32 in torch; *same as torch*: as from torch on the same file.",
        "",
    ]
    return [*heading, *lines] if lines else []


def plot_card(card: dict[str, Any], path: Path) -> None:
    """Draw NDCG@10 against bytes on disk and the time of one answer, a line per engine and storage, as PNG."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = card["rows"]
    variants = list(dict.fromkeys((row["engine"], row["quantize"]) for row in rows))
    with figure(path, 2, f"{card['dataset']}: one user on one core") as panels:
        panels[1].sharey(panels[0])
        panels[1].tick_params(labelleft=False)
        for panel, unit, value in (
            (panels[0], "MB on disk", lambda row: row["bytes"] / 1e6),
            (panels[1], "ms for one user's top 10 (median)", lambda row: row["p50_ms"]),
        ):
            for variant, colour in zip(variants, shades(len(variants)), strict=True):
                line = [row for row in rows if (row["engine"], row["quantize"]) == variant]
                label = f"{variant[0]}, {'float32' if variant[1] == 'none' else variant[1]}"
                panel.plot([value(row) for row in line], [row["NDCG@10"] for row in line], marker="o", markersize=4,
                           color=colour, label=label)  # fmt: skip
            for row in line:  # only the last variant shows its sizes
                panel.annotate(str(row["size"]), (value(row), row["NDCG@10"]), (-4, 5), textcoords="offset points",
                               ha="right", fontsize=8, color=colour)  # fmt: skip
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_ylim(0, 1.12 * max(row["NDCG@10"] for row in rows) or None)
            panel.set_xlabel(unit)
        panels[0].set_title("NDCG@10 of every size (numbers: dimensions)", loc="left")
        panels[1].legend(frameon=False, fontsize=8, loc="lower right")
