"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.files import replacing

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

STYLE: dict[RcKeyType, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                               "grid.color": "#e6e6e6", "axes.axisbelow": True}  # fmt: skip


def plot_metric_by_size(results: dict[int, dict[str, float]], ks: tuple[int, ...], title: str, path: Path) -> None:
    """Recall and NDCG against model size, a line per K, written as PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sizes = list(results)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        colours = plt.get_cmap("viridis")([0.78 - 0.75 * i / max(1, len(ks) - 1) for i in range(len(ks))])
        for panel, metric in zip(panels, ("Recall", "NDCG"), strict=True):
            for k, colour in zip(ks, colours, strict=True):
                values = [results[m][f"{metric}@{k}"] for m in sizes]
                panel.plot(sizes, values, marker="o", markersize=4, color=colour)
                panel.annotate(f"@{k}", (sizes[-1], values[-1]), (7, -3), textcoords="offset points", color=colour)
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(m) for m in sizes])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.set_xlabel("model size (dimensions)")
            panel.set_title(f"{metric}@K", loc="left")
        figure.suptitle(title, fontsize=11)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        plt.close(figure)


def plot_deployment(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """NDCG@10 against bytes on disk and against the time of one answer, a line per engine and storage, written as PNG.
    rows: as benchmarks/deploy.py measures them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    variants = list(dict.fromkeys((row["engine"], row["quantize"]) for row in rows))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
        colours = plt.get_cmap("viridis")([0.85 - 0.85 * i / max(1, len(variants) - 1) for i in range(len(variants))])
        for panel, unit, value in (
            (panels[0], "MB on disk", lambda row: row["bytes"] / 1e6),
            (panels[1], "ms for one user's top 10 (median)", lambda row: row["p50_ms"]),
        ):
            for variant, colour in zip(variants, colours, strict=True):
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
        figure.suptitle(title, fontsize=11)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        plt.close(figure)
