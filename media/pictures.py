"""Draw the README's figures: architecture, nested weights, metrics of the demo."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from common.files import replacing
from model.sizes import increments, nested_mask
from trainer.plots import plot_metric_by_size
from trainer.runs import EVERY_SIZE, read_metrics

FROZEN, LEARNED, NESTED, INK = "#e3e6ea", "#fbe3c0", "#cfe6e0", "#27313b"


def draw_architecture(path: Path) -> None:
    """Draw the model: from items and a user's history to scores."""
    figure, axes = plt.subplots(figsize=(11, 4.6), layout="constrained")
    axes.set_xlim(0, 110)
    axes.set_ylim(0, 46)
    axes.axis("off")

    def box(x: float, y: float, w: float, h: float, text: str, colour: str, size: float = 9) -> None:
        axes.add_patch(FancyBboxPatch((x, y), w, h, "round,pad=0,rounding_size=1", fc=colour, ec=INK, lw=1))
        axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.45)

    def arrow(*points: tuple[float, float]) -> None:
        for start, end in itertools.pairwise(points[:-1]):
            axes.plot(*zip(start, end, strict=True), color=INK, lw=1.1, solid_capstyle="round")
        axes.add_patch(
            FancyArrowPatch(
                points[-2], points[-1], arrowstyle="-|>", mutation_scale=11, lw=1.1, color=INK, shrinkA=0, shrinkB=0
            )
        )

    box(1, 33, 16, 7, "text\ntitle, price, brand, …", "white")
    box(1, 22, 16, 7, "picture", "white")
    box(22, 33, 16, 7, "text encoder\nbge, frozen", FROZEN)
    box(22, 22, 16, 7, "image encoder\nSigLIP, frozen", FROZEN)
    box(43, 27.5, 14, 7, "projection\nF → D", LEARNED)
    box(62, 26, 17, 10, "item table E\n[N+1, D]", LEARNED)
    arrow((17, 36.5), (22, 36.5))
    arrow((17, 25.5), (22, 25.5))
    arrow((38, 36.5), (40.5, 36.5), (40.5, 32.5), (43, 32.5))
    arrow((38, 25.5), (40.5, 25.5), (40.5, 29.5), (43, 29.5))
    arrow((57, 31), (62, 31))

    box(1, 5, 16, 8, "user history\ni₁ i₂ … iₖ", "white")
    box(22, 5, 14, 8, "embeddings\nrows of E", LEARNED)
    box(43, 1.5, 27, 15, "", "#f6faf9")
    axes.text(68, 3, "× blocks", ha="right", fontsize=8.5, color=INK)
    box(45, 10, 23, 4.6, "x + Dropout(LRU(LN(x)))", NESTED)
    box(45, 4.6, 23, 4.6, "x + FFN(LN(x))", NESTED)
    box(76, 5, 12, 8, "z\n[D]", LEARNED)
    box(93, 12, 16, 17, "scores of size m\nz[:m] · E[i, :m]\n\nranked against\nall N items", "white")
    arrow((17, 9), (22, 9))
    arrow((36, 9), (43, 9))
    arrow((70, 9), (76, 9))
    arrow((88, 9), (101, 9), (101, 12))
    arrow((79, 31), (86, 31), (86, 24), (93, 24))
    arrow((70.5, 26), (70.5, 20.5), (29, 20.5), (29, 13))

    for x, colour, text in (
        (1, FROZEN, "frozen"),
        (13, LEARNED, "sliced to m columns"),
        (36, NESTED, "nested weights"),
    ):
        axes.add_patch(Rectangle((x, 43), 2.2, 2.2, fc=colour, ec=INK, lw=0.8))
        axes.text(x + 3.2, 44.1, text, va="center", fontsize=8.5, color=INK)
    legend = "N items   F feature width   D largest size   z user state   LRU linear recurrent unit"
    axes.text(109, 44.1, legend, ha="right", va="center", fontsize=8.5, color=INK)
    _save(figure, path)


def draw_nesting(path: Path) -> None:
    """Draw a weight's mask: each leading square is the weight of a smaller model."""
    sizes = (8, 16, 32, 64)
    figure, panels = plt.subplots(1, len(sizes), figsize=(11, 3), layout="constrained")
    ranges, dim = increments(sizes), sizes[-1]
    shades = plt.get_cmap("viridis")([0.9 - 0.75 * j / (len(sizes) - 1) for j in range(len(sizes))])
    mask = nested_mask(sizes)
    for panel, m in zip(panels, sizes, strict=True):
        for j, (low, high) in enumerate(ranges):
            for inner_low, inner_high in ranges:
                if mask[low, inner_low]:
                    used = high <= m and inner_high <= m
                    panel.add_patch(
                        Rectangle(
                            (inner_low, low),
                            inner_high - inner_low,
                            high - low,
                            fc=shades[j],
                            alpha=1 if used else 0.12,
                        )
                    )
        panel.add_patch(Rectangle((0, 0), m, m, fill=False, ec=INK, lw=1.6))
        panel.set(xlim=(-1, dim + 1), ylim=(dim + 1, -1), aspect="equal", xticks=[0, *sizes], yticks=[0, *sizes])
        panel.set_xticklabels(["", *["" if s < 16 else s for s in sizes]], fontsize=7)
        panel.set_yticklabels(["", *["" if s < 16 else s for s in sizes]], fontsize=7)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
        panel.set_title(f"size {m}: W[:{m}, :{m}]", fontsize=9.5, color=INK)
    panels[0].set_ylabel("outputs", fontsize=8.5, color=INK)
    panels[0].set_xlabel("inputs", fontsize=8.5, color=INK)
    _save(figure, path)


def draw_demo(run: Path, path: Path) -> None:
    """Plot metrics against size from a demo run's files."""
    metrics = read_metrics(run / EVERY_SIZE, "give the folder of a finished run")
    results = {int(size): values for size, values in metrics.items()}
    ks = tuple(sorted({int(name.partition("@")[2]) for values in results.values() for name in values}))
    plot_metric_by_size(results, ks, "demo catalogue, text and pictures: one training, every size", path)


def _save(figure: plt.Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")
    plt.close(figure)
    print(path)
