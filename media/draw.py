"""Draw the README's figures that need no saved results.

python -m media.draw                                  # architecture.png and nesting.png
python -m media.draw --demo_run experiments/runs/...  # also demo.png, the curve of a run of the demo
"""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser, run_cli
from trainer.plots import INK, SMALL, figure, shades
from trainer.runs import EVERY_SIZE

MEDIA = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures into media/."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo_run", type=Path, metavar="FOLDER", help="also copy the curve of this run to demo.png")
    parser.add_argument("--out", type=Path, default=MEDIA, metavar="FOLDER", help="output folder (default: media)")
    arguments = parser.parse_args(argv)

    draw_architecture(arguments.out / "architecture.png")
    draw_nesting(arguments.out / "nesting.png")
    if arguments.demo_run:
        shutil.copyfile(arguments.demo_run / Path(EVERY_SIZE).with_suffix(".png"), arguments.out / "demo.png")


# ------------------------------------------------------------------------------------------------------------- pictures
# Draw the README's figures of the method: architecture and nested weights.

FROZEN, LEARNED, NESTED = "#e3e6ea", "#fbe3c0", "#cfe6e0"
SIZES = (8, 16, 32, 64)  # of the drawn weights


def draw_architecture(path: Path) -> None:
    """Draw the model, a nested weight, and the loss over the sizes."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

    with figure(path, 2, height=5.4) as [axes, unused]:
        unused.remove()
        axes.set_position([0, 0, 1, 1])
        axes.set_in_layout(False)
        axes.set(xlim=(-1, 101), ylim=(-2, 68))
        axes.axis("off")

        def text(x: float, y: float, words: str, **options: Any) -> None:
            axes.text(x, y, words, fontsize=SMALL, color=INK, va="center", linespacing=1.4, **options)

        def box(x: float, y: float, w: float, h: float, words: str, colour: str) -> None:
            axes.add_patch(FancyBboxPatch((x, y), w, h, "round,pad=0,rounding_size=1", fc=colour, ec=INK, lw=1))
            text(x + w / 2, y + h / 2, words, ha="center")

        def arrow(*points: tuple[float, float]) -> None:
            for start, end in itertools.pairwise(points[:-1]):
                axes.plot(*zip(start, end, strict=True), color=INK, lw=1.1, solid_capstyle="round")
            options: dict[str, Any] = {
                "arrowstyle": "-|>",
                "mutation_scale": 11,
                "lw": 1.1,
                "color": INK,
                "shrinkA": 0,
                "shrinkB": 0,
            }
            axes.add_patch(FancyArrowPatch(points[-2], points[-1], **options))

        box(0, 57, 15, 8, "item text", "white")
        box(0, 46, 15, 8, "item picture", "white")
        box(20, 57, 18, 8, "text encoder", FROZEN)
        box(20, 46, 18, 8, "image encoder", FROZEN)
        box(46, 51.5, 16, 8, "projection\nF → D", LEARNED)
        box(70, 51.5, 17, 8, "item table E\n[N+1, D]", LEARNED)
        for y, bend in ((61, 57.5), (50, 53.5)):
            arrow((15, y), (20, y))
            arrow((38, y), (42, y), (42, bend), (46, bend))
        arrow((62, 55.5), (70, 55.5))
        arrow((78.5, 51.5), (78.5, 42.5), (29, 42.5), (29, 36.5))

        box(0, 27.5, 15, 9, "user history\ni₁ i₂ … iₖ", "white")
        box(20, 27.5, 18, 9, "rows of E", LEARNED)
        box(46, 24, 31, 16, "", "#f6faf9")
        box(47.5, 32.5, 28, 6, "x + Dropout(LRU(LN(x)))", NESTED)
        box(47.5, 25.5, 28, 6, "x + FFN(LN(x))", NESTED)
        text(77.5, 38.5, "× blocks")
        box(86, 27.5, 14, 9, "user state z\n[D]", LEARNED)
        for start, end in ((15, 20), (38, 46), (77, 86)):
            arrow((start, 32), (end, 32))

        draw_mask(axes, SIZES, 1, 0, 16)
        text(19, 5, "Each weight of a block is nested:\nits corner W[:m, :m] is the\nweight of the model of size m.")
        arrow((52, 24), (52, 20.5), (9, 20.5), (9, 16.5))
        text(62, 17.2, "One training minimises the sum of these:")
        for j, (m, colour) in enumerate(zip(("8", "16", "…", "D"), shades(4), strict=True)):
            axes.add_patch(Rectangle((62, 11.6 - 4.1 * j), 1.5 * 2**j, 2.6, fc=colour))
            text(76, 12.9 - 4.1 * j, "…" if m == "…" else f"loss of z[:{m}] · E[:, :{m}]ᵀ")
        arrow((93, 27.5), (93, 19.5))

        legend = ((66, FROZEN, "frozen"), (63.5, LEARNED, "sliced to m columns"), (61, NESTED, "nested"))
        for middle, colour, words in legend:
            axes.add_patch(Rectangle((79, middle - 0.9), 1.8, 1.8, fc=colour, ec=INK, lw=0.8))
            text(82, middle, words)


def draw_mask(axes: Any, sizes: tuple[int, ...], x: float, y: float, side: float) -> None:
    """Draw a nested weight in a square: a colour for what each size adds, and a frame around each size."""
    from matplotlib.patches import Rectangle

    from model.sizes import increments, nested_mask

    unit, mask = side / sizes[-1], nested_mask(sizes)
    for (low, high), colour in zip(increments(sizes), shades(len(sizes)), strict=True):
        for first, end in increments(sizes):
            if mask[low, first]:
                corner = x + unit * first, y + side - unit * high
                axes.add_patch(Rectangle(corner, unit * (end - first), unit * (high - low), fc=colour))
    for m in sizes:
        axes.add_patch(Rectangle((x, y + side - unit * m), unit * m, unit * m, fill=False, ec=INK, lw=1.2))


def draw_nesting(path: Path) -> None:
    """Draw a weight's mask: each leading square is the weight of a smaller model."""
    from model.sizes import increments

    with figure(path, 1, height=3) as [panel]:
        panel.set(xlim=(-8, 140), ylim=(-2, 70), aspect="equal")
        panel.axis("off")
        draw_mask(panel, SIZES, 0, 0, SIZES[-1])
        panel.text(32, 65.5, "inputs", ha="center", fontsize=SMALL, color=INK)
        panel.text(-2, 32, "outputs", rotation=90, va="center", ha="right", fontsize=SMALL, color=INK)
        for (low, high), m, colour in zip(increments(SIZES), SIZES, shades(len(SIZES)), strict=True):
            words = f"size {m}: the square W[:{m}, :{m}]"
            panel.text(68, 64 - (low + high) / 2, words, va="center", fontsize=SMALL, color=colour)
        panel.text(68, 2, "white: always zero, so a size\nnever reads a larger one", fontsize=SMALL, color=INK)


if __name__ == "__main__":
    run_cli(main)
