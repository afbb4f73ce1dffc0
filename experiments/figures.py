"""Draw figures into media/: those of the report from kept runs, the deployment card, and the method's architecture.

python -m experiments.figures                                  # the architecture: architecture.png
python -m experiments.figures --demo_run experiments/runs/...  # also demo.png, the curve of a run of the demo
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import Parser, run_cli
from experiments import MEDIA
from experiments.definition import definitions
from experiments.paper import BEST, BY_SIZE, MASKED, PUBLISHED
from experiments.store import KeptRun
from trainer.plots import COLOURS, INK, SMALL, draw_level, figure, label_lines, shades, size_axes
from trainer.runs import EVERY_SIZE

if TYPE_CHECKING:
    from experiments.tables import ResultRow

PROTOCOLS = {"Recall@10": "history kept", "NDCG@10" + MASKED: "history masked"}  # metrics of the figure of plus
LINES = {"-": "", "--": " (dashed)", ":": " (dotted)"}  # of several curves of one model -> what the label says


def draw_figures(runs: list[KeptRun], media: Path) -> list[Path]:
    """Draw every figure that has runs, and return the files."""
    paths = []
    datasets = sorted({run.config.dataset_code for run in runs})
    for dataset in datasets:
        if curves := rows_of(runs, dataset, "sizes"):
            paths.append(media / f"sizes-{dataset}.png")
            draw_sizes(dataset, curves, alone(runs, dataset, "independent"), paths[-1])
        if points := rows_of(runs, dataset, "encoder_width"):
            paths.append(media / f"encoder_width-{dataset}.png")
            draw_encoder_width(dataset, points, paths[-1])
    if of_plus := {dataset: curves for dataset in datasets if (curves := rows_of_plus(runs, dataset))}:
        paths.append(media / "plus.png")
        draw_plus(of_plus, runs, paths[-1])
    for run in runs:
        if card := run.record.get("deployment"):
            paths.append(media / f"deploy-{run.config.dataset_code}.png")
            plot_card(card, paths[-1])
    return paths


def rows_of(runs: list[KeptRun], dataset: str, name: str) -> list[ResultRow]:
    """Return the rows that the report shows of an experiment."""
    from experiments.tables import comparable, result_rows

    definition = definitions()[name]
    return [row for group in comparable(definition, result_rows(definition, dataset, runs)) for row in group]


def rows_of_plus(runs: list[KeptRun], dataset: str) -> list[ResultRow]:
    """Return the rows of the figure of plus: those that the report shows, or all of plus if it has no partner."""
    from experiments.tables import result_rows

    found = rows_of(runs, dataset, "plus") or [
        row for row in result_rows(definitions()["plus"], dataset, runs) if row.row.name.startswith("plus")
    ]
    return [row for row in found if row.config.mrl_hidden_sizes[-1] <= 256]


def alone(runs: list[KeptRun], dataset: str, name: str) -> list[ResultRow]:
    """Return the one-size models that an experiment compares with a nested one."""
    return [row for row in rows_of(runs, dataset, name) if len(row.config.mrl_hidden_sizes) == 1]


def levels(runs: list[KeptRun], dataset: str, name: str) -> dict[str, float]:
    """Return one-size models to compare a metric with, drawn as horizontal lines: label -> value."""
    protocol = "masked" if name.endswith(MASKED) else "kept"
    column = ("Recall@10", "NDCG@10").index(name.removesuffix(MASKED))
    found = {}
    for row in rows_of(runs, dataset, "baselines"):
        if row.row.name == "SASRec" and row.values(name):
            found[f"SASRec, {row.size}"] = row.mean(name)
    scores = [value for *_, of in BEST[protocol] if dataset in of and (value := of[dataset][column])]
    return found | ({"best published": max(scores)} if scores else {})


def draw_sizes(dataset: str, curves: list[ResultRow], separate: list[ResultRow], path: Path) -> None:
    """Draw Recall@10 and NDCG@10 against size: the paper's curve, nested models, and models trained alone."""
    parts = [
        (row.row.name, Path(row.config.language_encoder).name, f"{row.runs[0].record['epochs']} epochs")
        for row in curves
    ]
    common = [i for i in range(3) if len({part[i] for part in parts}) == 1 and (i < 2 or len(parts) > 1)]
    labels = [", ".join(part[i] for i in range(3) if i not in common) or part[0] for part in parts]
    title = ", ".join([dataset, *(parts[0][i] for i in common)])
    title += f": one training, every size{' (crosses: trained alone)' if separate else ''}"
    with figure(path, 1, title, rows=2, height=3) as panels:
        for panel, name in zip(panels, ("Recall@10", "NDCG@10"), strict=True):
            draw_curves(panel, dataset, name, list(zip(curves, labels, strict=True)), separate)
            panel.set_title(f"{name}, history kept", loc="left")


def draw_plus(of_plus: dict[str, list[ResultRow]], runs: list[KeptRun], path: Path) -> None:
    """Draw plus against size, a row of panels per dataset: faithful models, one-size models and the best published."""
    title = "The preset plus, every size of one training (crosses: each size trained alone)"
    with figure(path, len(PROTOCOLS), title, rows=len(of_plus), height=2.9) as panels:
        places = iter(panels)
        for dataset, curves in of_plus.items():
            separate = alone(runs, dataset, "plus_alone")
            for name, protocol in PROTOCOLS.items():
                panel = next(places)
                shown = [
                    (row, row.row.name.removesuffix(", sampled softmax").replace(" by three", "")) for row in curves
                ]
                draw_curves(panel, dataset, name, shown, separate, levels(runs, dataset, name))
                short = protocol.removeprefix("history ")
                panel.set_title(f"{dataset}: {name.removesuffix(MASKED)}, {short}", loc="left")


def draw_curves(
    panel: Any,
    dataset: str,
    name: str,
    curves: list[tuple[ResultRow, str]],
    separate: list[ResultRow],
    levels: dict[str, float] | None = None,
) -> None:
    """Draw a test metric against size: rows with labels, the paper's curve, models trained alone, and levels.

    Means over seeds; with several seeds, error bars of one standard deviation.
    """
    ends, drawn = [], dict.fromkeys(COLOURS, 0)
    for row, text in curves:
        model, sizes = ("plus" if row.row.name.startswith("plus") else "fmrlrec"), row.config.mrl_hidden_sizes
        values = [row.mean(name, size) for size in sizes]
        style = list(LINES)[drawn[model] % len(LINES)]
        panel.errorbar(sizes, values, _deviations(row, name, sizes), fmt="o", ls=style, color=COLOURS[model], capsize=3)
        drawn[model] += 1
        if np.isfinite(values[-1]):
            ends.append((values[-1], text + LINES[style], COLOURS[model]))
    paper = {size: values[name] for size, values in BY_SIZE.get(dataset, {}).items() if name in values}
    if paper:
        panel.plot(list(paper), list(paper.values()), "s-", color=COLOURS["paper"])
        ends.append((paper[max(paper)], "paper", COLOURS["paper"]))
    for row in separate:
        panel.errorbar(
            row.size, row.mean(name), _deviations(row, name, [row.size]), fmt="x", color="black", ms=6, zorder=3
        )
    ends += [draw_level(panel, value, text) for text, value in (levels or {}).items()]
    size_axes(panel, sorted({*paper, *(m for row, _ in curves for m in row.config.mrl_hidden_sizes)}))
    label_lines(panel, ends)


def _deviations(row: ResultRow, name: str, sizes: tuple[int, ...] | list[int]) -> list[float] | None:
    """Return the standard deviation over seeds at every size; None with one seed."""
    return [float(np.std(row.values(name, m), ddof=1)) for m in sizes] if len(row.values(name)) > 1 else None


def draw_encoder_width(dataset: str, points: list[ResultRow], path: Path) -> None:
    """Draw NDCG@10 of the largest size against the width of the text encoder, with the paper's row as a line."""
    with figure(path, 1, f"{dataset}: NDCG@10 from text at 1024 dimensions, history kept") as [panel]:
        for row in points:
            name, _, width = row.row.name.rpartition(", ")
            panel.plot([int(width)], [row.mean("NDCG@10")], "o", color=COLOURS["fmrlrec"])
            panel.annotate(name, (int(width), row.mean("NDCG@10")), (6, -3), textcoords="offset points", fontsize=9)
        panel.set_ylim(bottom=0)
        label_lines(panel, [draw_level(panel, PUBLISHED["language"][dataset]["NDCG@10"], "paper, bge-large")])
        panel.set_xlabel("width of the encoder")


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
        panels[0].set_title("NDCG@10 of every size, history kept (numbers: dimensions)", loc="left")
        panels[1].legend(frameon=False, fontsize=8, loc="lower right")


# --------------------------------------------------------------------------------------------------------- architecture
# The command draws this figure; experiments.report draws the others. It needs no kept results.

FROZEN, LEARNED, NESTED = "#e3e6ea", "#fbe3c0", "#cfe6e0"
SIZES = (8, 16, 32, 64)  # of the drawn weights


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the architecture, and copy a run's curve if asked to."""
    parser = Parser(description="Draw the figure of the architecture.")
    parser.add_argument("--demo_run", type=Path, metavar="FOLDER", help="also copy the curve of this run to demo.png")
    parser.add_argument("--out", type=Path, default=MEDIA, metavar="FOLDER", help="output folder (default: media)")
    arguments = parser.parse_args(argv)

    draw_architecture(arguments.out / "architecture.png")
    if arguments.demo_run:
        shutil.copyfile(arguments.demo_run / Path(EVERY_SIZE).with_suffix(".png"), arguments.out / "demo.png")


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
            tip: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
            axes.add_patch(FancyArrowPatch(points[-2], points[-1], lw=1.1, color=INK, **tip))

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
        words = "Each weight of a block is nested:\nits corner W[:m, :m] is the\nweight of the model of size m.\n"
        text(19, 6, words + "White is always zero.")
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

    from model.base import increments, nested_mask

    unit, mask = side / sizes[-1], nested_mask(sizes)
    for (low, high), colour in zip(increments(sizes), shades(len(sizes)), strict=True):
        for first, end in increments(sizes):
            if mask[low, first]:
                corner = x + unit * first, y + side - unit * high
                axes.add_patch(Rectangle(corner, unit * (end - first), unit * (high - low), fc=colour))
    for m in sizes:
        axes.add_patch(Rectangle((x, y + side - unit * m), unit * m, unit * m, fill=False, ec=INK, lw=1.2))


if __name__ == "__main__":
    run_cli(main)
