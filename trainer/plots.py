"""The style of all figures, and the figures of a run: metrics against size, and its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import replacing

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# A model has one colour in every figure. All are told apart by the colour-blind, and are dark enough for text.
COLOURS = {"fmrlrec": "#c24a00", "plus": "#0069a8", "paper": "#6b7280", "sasrec": "#00795a", "lrurec": "#b0568f",
           "published": "#7a1f4f", "popularity": "#8a6100"}  # fmt: skip
INK = "#27313b"
WIDTH, DPI, SMALL = 8.3, 150, 9  # inches, as wide as GitHub shows a figure; dots per inch; font size of labels
LABELLED = 5  # most curves in a panel
STYLE: dict[RcKeyType, Any] = {"font.size": 10, "axes.titlesize": 10.5, "axes.spines.top": False,
                               "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
                               "axes.axisbelow": True, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
                               "lines.markersize": 4}  # fmt: skip


@contextmanager
def figure(path: Path, panels: int, title: str = "", *, rows: int = 1, height: float = 3.6) -> Iterator[list[Any]]:
    """Yield the axes of rows of panels, and save the figure as PNG at the end. height: inches of a row."""
    import matplotlib
    import numpy as np
    from PIL import Image

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with plt.rc_context(STYLE):
        width = WIDTH if panels > 1 else 0.8 * WIDTH
        fig, axes = plt.subplots(rows, panels, figsize=(width, rows * height), layout="constrained", squeeze=False)
        try:
            yield list(axes.flat)
            fig.suptitle(title, fontsize=11, color=INK)
            fig.set_dpi(DPI)
            canvas = FigureCanvasAgg(fig)
            canvas.draw()
            image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize()
            with replacing(path) as temporary:
                image.save(temporary, "png", optimize=True)  # half the bytes of matplotlib's own
        finally:
            plt.close(fig)


def size_axes(panel: Any, sizes: Sequence[int]) -> None:
    """Show model sizes on a logarithmic x axis, and start the y axis at 0."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(m) for m in sizes], fontsize=SMALL if len(sizes) < 8 else SMALL - 2)
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("model size (dimensions)")


def label_lines(panel: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write labels (y, text, colour) right of a panel, moved apart where they would overlap."""
    if not ends:
        return
    low, high = panel.get_ylim()
    gap = 1.25 * SMALL / 72 / (panel.figure.get_figheight() / panel.get_gridspec().nrows * 0.72)  # a line of text
    ordered = sorted(ends)
    places = [(y - low) / (high - low) for y, *_ in ordered]
    for _ in range(100):  # push neighbours apart, half of the overlap each, below the title
        places[-1] = min(places[-1], 0.98)
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 1e-6:
                places[i], places[i + 1] = places[i] - overlap / 2, places[i + 1] + overlap / 2
    for (_, text, colour), place in zip(ordered, places, strict=True):
        panel.text(1.02, place, text, color=colour, fontsize=SMALL, va="center", transform=panel.transAxes)


def draw_level(panel: Any, value: float, name: str) -> tuple[float, str, str]:
    """Draw a baseline as a horizontal line, in the colour of its model, and return its label."""
    colour = COLOURS.get(name.partition(",")[0].lower(), COLOURS["published"])
    panel.axhline(value, color=colour, linewidth=1.1, linestyle="--")
    return value, name, colour


def shades(count: int) -> list[str]:
    """Return `count` colours from light to dark, for steps of one quantity."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.75 * (1 - i / max(1, count - 1)))) for i in range(count)]


def plot_metric_by_size(
    results: dict[int, dict[str, float]],
    ks: Sequence[int],
    title: str,
    path: Path,
    popularity: dict[str, float] | None = None,
) -> None:
    """Plot Recall and NDCG against model size as PNG, one line per K; a model of one size has bars.

    popularity: metrics of ranking by popularity, drawn at the second K as a line.
    """
    sizes, ks = list(results), list(ks)[: LABELLED - 1]
    reference = ks[min(1, len(ks) - 1)]
    with figure(path, 2, title) as panels:
        for panel, metric in zip(panels, ("Recall", "NDCG"), strict=True):
            ends = []
            colours = shades(len(ks))
            if len(sizes) == 1:
                bars = panel.bar([f"@{k}" for k in ks], [results[sizes[0]][f"{metric}@{k}"] for k in ks], color=colours)
                panel.bar_label(bars, fmt="%.3f", fontsize=SMALL)
                panel.set_xlabel(f"K, size {sizes[0]}")
            else:
                for k, colour in zip(ks, colours, strict=True):
                    values = [results[m][f"{metric}@{k}"] for m in sizes]
                    panel.plot(sizes, values, "o-", color=colour)
                    ends.append((values[-1], f"@{k}", colour))
                size_axes(panel, sizes)
            if popularity:
                name = f"{metric}@{reference}"
                ends.append(draw_level(panel, popularity[name], f"popularity, @{reference}"))
            label_lines(panel, ends)
            panel.set_title(f"{metric}@K", loc="left")


def plot_training(records: Sequence[dict[str, Any]], metric: str, title: str, path: Path) -> None:
    """Plot the loss and the validation metric of up to five sizes against the epoch, as PNG; nothing without a loss.

    records: lines of log.jsonl.
    """
    trained = [record for record in records if record.get("loss") is not None]
    if not trained:
        return
    sizes = [int(m) for m in trained[-1]["val"]]
    count = min(LABELLED, len(sizes))
    shown = [sizes[-1 - round(i * (len(sizes) - 1) / max(1, count - 1))] for i in range(count)][::-1]
    with figure(path, 2, title) as (left, right):
        left.plot([r["epoch"] for r in trained], [r["loss"] for r in trained], "o-", color=INK)
        left.set_title("training loss", loc="left")
        ends, epochs = [], [r["epoch"] for r in records]
        for m, colour in zip(shown, shades(count), strict=True):
            values = [r["val"][str(m)][metric] for r in records]
            right.plot(epochs, values, "o-", color=colour)
            ends.append((values[-1], f"size {m}", colour))
        right.axvline(best := records[-1]["best_epoch"], color=INK, linewidth=1, linestyle=":")
        right.set_title(f"validation {metric} (dotted: best epoch, {best})", loc="left")
        right.set_ylim(bottom=0)
        label_lines(right, ends)
        for panel in (left, right):
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
