"""The style of all figures, and the figure of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import replacing

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

STYLE: dict[RcKeyType, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                               "grid.color": "#e6e6e6", "axes.axisbelow": True}  # fmt: skip


@contextmanager
def figure(path: Path, panels: int, title: str) -> Iterator[list[Any]]:
    """Yield a row of axes to draw in, and save the figure as PNG at the end."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            1, panels, figsize=(9 if panels > 1 else 6.5, 3.8), layout="constrained", squeeze=False
        )
        try:
            yield list(axes[0])
            fig.suptitle(title, fontsize=11)
            with replacing(path) as temporary:
                fig.savefig(temporary, format="png", dpi=150)
        finally:
            plt.close(fig)


def size_axes(panel: Any, sizes: list[int]) -> None:
    """Show model sizes on a logarithmic x axis, and start the y axis at 0."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(m) for m in sizes])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("model size (dimensions)")


def shades(count: int) -> Any:
    """Return `count` colours from light to dark: [count, 4]."""
    import matplotlib.pyplot as plt

    return plt.get_cmap("viridis")([0.85 * (1 - i / max(1, count - 1)) for i in range(count)])


def plot_metric_by_size(results: dict[int, dict[str, float]], ks: tuple[int, ...], title: str, path: Path) -> None:
    """Plot Recall and NDCG against model size, one line per K, as PNG."""
    sizes = list(results)
    with figure(path, 2, title) as panels:
        for panel, metric in zip(panels, ("Recall", "NDCG"), strict=True):
            for k, colour in zip(ks, shades(len(ks)), strict=True):
                values = [results[m][f"{metric}@{k}"] for m in sizes]
                panel.plot(sizes, values, marker="o", markersize=4, color=colour)
                panel.annotate(f"@{k}", (sizes[-1], values[-1]), (7, -3), textcoords="offset points", color=colour)
            size_axes(panel, sizes)
            panel.set_title(f"{metric}@K", loc="left")
