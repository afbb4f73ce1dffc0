"""The card of a run's deployment, as benchmarks/deploy.py measures it: its table and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.tables import table
from trainer.plots import figure, shades


def card_table(card: dict[str, Any]) -> list[str]:
    """The card as a Markdown table, and what is beside it."""
    heads = ("size", "engine", "stored as", "MB on disk", "MB in memory", "load s", "p50 ms", "p95 ms", "event p50 ms",
             "256 users p50 ms", "256 users p95 ms", "Recall@10", "NDCG@10", "NDCG@10 lost", "same top 10",
             "same as torch")  # fmt: skip
    rows = []
    plain: dict[int, float] = {}
    for row in card["rows"]:
        whole = plain.setdefault(row["size"], row["NDCG@10"])
        cells = [str(row["size"]), row["engine"], "float32" if row["quantize"] == "none" else row["quantize"]]
        cells += [f"{row['bytes'] / 1e6:.2f}", f"{row['resident_mb']:.0f}", f"{row['load_s']:.2f}"]
        cells += [f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "step_p50_ms")]
        cells += [f"{row[name]:.0f}" for name in ("batch256_p50_ms", "batch256_p95_ms")]
        cells += [f"{row[name]:.4f}" for name in ("Recall@10", "NDCG@10")]
        cells += [f"{1 - row['NDCG@10'] / whole:.2%}" if whole else "", f"{row['same_top10']:.2%}"]
        cells += [f"{row['same_top10_as_torch']:.2%}" if "same_top10_as_torch" in row else ""]
        rows.append(cells)
    lines = table(heads, rows, text=(1, 2))
    if large := card["large_catalogue"]:
        lines += [
            f"Size {large['size']} (onnx, float16) before {large['items']:,} items, most of them made up: top 10 in "
            f"{large['p50_ms']:.1f} ms (p95 {large['p95_ms']:.1f}), {large['resident_mb']:.0f} MB in memory "
            f"({large['peak_mb']:.0f} at its peak, of 256 users), loaded in {large['load_s']:.2f} s.",
            "",
        ]
    added = [row["add_10000_s"] for row in card["rows"] if row["add_10000_s"] is not None]
    if added:
        lines += [f"10,000 items more: added in {min(added):.2f} to {max(added):.2f} s, depending on the size.", ""]
    return lines


def plot_card(card: dict[str, Any], path: Path) -> None:
    """NDCG@10 against bytes on disk and the time of one answer, a line per engine and storage, written as PNG."""
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
            for row in line:  # those of the last variant bear their sizes
                panel.annotate(str(row["size"]), (value(row), row["NDCG@10"]), (-4, 5), textcoords="offset points",
                               ha="right", fontsize=8, color=colour)  # fmt: skip
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_ylim(bottom=0)
            panel.set_xlabel(unit)
        panels[0].set_title("NDCG@10 of every size (numbers: dimensions)", loc="left")
        panels[1].legend(frameon=False, fontsize=8, loc="lower right")
