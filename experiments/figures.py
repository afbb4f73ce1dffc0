"""Figures of the report, media/*.png, drawn from kept runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.definition import definitions
from experiments.deployment import plot_card
from experiments.paper import BY_SIZE, MASKED, PUBLISHED
from experiments.parameters import figure4
from experiments.rows import ResultRow, comparable, result_rows
from experiments.store import KeptRun
from trainer.plots import figure, size_axes

COLOURS = ("#1f6f78", "#d9822b", "#6b4c9a", "#3a7d44", "#a63d40", "#4a6fa5", "#8a6d3b", "#c2579a", "#7fb13d")
PAPER, INK = "#9aa0a6", "#3c4043"
PLUS = ("Recall@10", "NDCG@10" + MASKED)  # metrics of the figure of plus


def draw_figures(runs: list[KeptRun], media: Path) -> list[Path]:
    """Draw every figure that has runs, and return the files."""
    paths = [media / "parameters_saved.png"]
    draw_parameters(paths[0])
    for dataset in sorted({run.config.dataset_code for run in runs}):
        if curves := rows_of(runs, dataset, "sizes"):
            paths.append(media / f"sizes-{dataset}.png")
            draw_sizes(dataset, curves, alone(runs, dataset, "independent"), paths[-1])
        if curves := rows_of(runs, dataset, "plus"):
            paths.append(media / f"plus-{dataset}.png")
            draw_plus(dataset, curves, alone(runs, dataset, "plus_alone"), levels(runs, dataset), paths[-1])
        if points := rows_of(runs, dataset, "encoder_width"):
            paths.append(media / f"encoder_width-{dataset}.png")
            draw_encoder_width(dataset, points, paths[-1])
    for run in runs:
        if card := run.record.get("deployment"):
            paths.append(media / f"deploy-{run.config.dataset_code}.png")
            plot_card(card, paths[-1])
    return paths


def rows_of(runs: list[KeptRun], dataset: str, name: str) -> list[ResultRow]:
    """Return the rows that the report shows of an experiment."""
    definition = definitions()[name]
    return [row for group in comparable(definition, result_rows(definition, dataset, runs)) for row in group]


def alone(runs: list[KeptRun], dataset: str, name: str) -> list[ResultRow]:
    """Return the one-size models that an experiment compares with a nested one."""
    return [row for row in rows_of(runs, dataset, name) if len(row.config.mrl_hidden_sizes) == 1]


def levels(runs: list[KeptRun], dataset: str) -> dict[str, dict[str, float]]:
    """Return one-size models to compare with, drawn as horizontal lines: name -> metric -> value."""
    found = {
        f"{row.row.name}, {row.size}": {name: row.mean(name) for name in PLUS if row.values(name)}
        for row in rows_of(runs, dataset, "baselines")
        if row.row.name in ("SASRec", "LRURec")
    }
    if published := PUBLISHED["bsarec"].get(dataset):
        found["BSARec, published"] = published
    return found


def draw_sizes(dataset: str, curves: list[ResultRow], separate: list[ResultRow], path: Path) -> None:
    """Draw Recall@10 and NDCG@10 against size: the paper's curve, nested models, and models trained alone."""
    with figure(path, 2, f"{dataset}: one training, every size") as panels:
        for panel, name in zip(panels, ("Recall@10", "NDCG@10"), strict=True):
            for row, colour in zip(curves, COLOURS * len(curves), strict=False):
                draw_curve(panel, row, name, colour, label(row))
            paper = draw_beside(panel, dataset, name, curves, separate, "trained alone")
            panel.set_title(name if paper else f"{name} (not in the paper's figure)", loc="left")
        panels[0].legend(frameon=False, fontsize=8, loc="upper left")


def draw_plus(
    dataset: str, curves: list[ResultRow], separate: list[ResultRow], levels: dict[str, dict[str, float]], path: Path
) -> None:
    """Draw Recall and NDCG against size: the paper's curve, faithful and plus models, and one-size models."""
    several = len({row.config.language_encoder for row in curves}) > 1
    with figure(path, 2, f"{dataset}: Recall and NDCG against size") as panels:
        for panel, name in zip(panels, PLUS, strict=True):
            for row, colour in zip(curves, COLOURS * len(curves), strict=False):
                sizes = row.config.mrl_hidden_sizes
                label = f"{row.row.name}, {sizes[0]}..{sizes[-1]}"
                label += f" ({Path(row.config.language_encoder).name})" if several else ""
                draw_curve(panel, row, name, colour, label)
            draw_beside(panel, dataset, name, curves, separate, "plus, trained alone")
            for (of, values), style in zip(levels.items(), ("--", "-.", ":"), strict=False):
                if name in values:
                    panel.axhline(values[name], color=INK, linewidth=0.9, linestyle=style, label=of)
            panel.set_title(name.replace(MASKED, ", history masked"), loc="left")
        named: dict[str, Any] = {}  # labels of both panels, without repetition
        for panel in panels:
            handles, labels = panel.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        panels[0].figure.legend(
            named.values(), named.keys(), frameon=False, fontsize=8, ncols=3, loc="outside lower center"
        )


def draw_curve(panel: Any, row: ResultRow, name: str, colour: str, label: str) -> None:
    """Draw a test metric against size, averaged over seeds."""
    sizes = row.config.mrl_hidden_sizes
    panel.plot(sizes, [row.mean(name, size) for size in sizes], "o-", color=colour, markersize=4, label=label)


def draw_beside(
    panel: Any, dataset: str, name: str, curves: list[ResultRow], separate: list[ResultRow], label: str
) -> dict[int, float]:
    """Draw the paper's curve, which is returned, and models trained alone, and set the axes."""
    paper = {size: values[name] for size, values in BY_SIZE.get(dataset, {}).items() if name in values}
    if paper:
        points = zip(*paper.items(), strict=True)
        panel.plot(*points, "s--", color=PAPER, markersize=4, label="paper, text and pictures")
    if separate:
        means = [row.mean(name) for row in separate]
        panel.plot([row.size for row in separate], means, "x", color="black", label=label)
    size_axes(panel, sorted({*paper, *(m for row in curves for m in row.config.mrl_hidden_sizes)}))
    return paper


def label(row: ResultRow) -> str:
    """Return a short label for a curve of Figure 3."""
    encoder = f" ({Path(row.config.language_encoder).name})" if row.config.use_language_encoder else ""
    return f"{row.row.name}{encoder}, {row.runs[0].record['epochs']} epochs"


def draw_encoder_width(dataset: str, points: list[ResultRow], path: Path) -> None:
    """Draw NDCG@10 of the largest size against the width of the text encoder, with the paper's row as a line."""
    with figure(path, 1, f"{dataset}: NDCG@10 from text at 1024 dimensions") as [panel]:
        for row, colour in zip(points, COLOURS * len(points), strict=False):
            name, _, width = row.row.name.rpartition(", ")
            panel.plot([int(width)], [row.mean("NDCG@10")], "o", color=colour, label=name)
        paper = PUBLISHED["language"][dataset]["NDCG@10"]
        panel.axhline(paper, color=PAPER, linestyle="--", label="paper, bge-large (1024)")
        panel.set_xlabel("width of the encoder")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)


def draw_parameters(path: Path) -> None:
    """Draw Figure 4: the share of parameters that one training for all sizes saves."""
    with figure(path, 1, "Parameters that one training for all sizes saves") as [panel]:
        rows = figure4()
        names = ("the paper's formula", "numbers in files here", "without masked zeros")
        for i, (name, colour) in enumerate(zip(names, (PAPER, *COLOURS), strict=False)):
            places = [x + 0.27 * (i - 1) for x in range(len(rows))]
            bars = panel.bar(places, [100 * row[1 + i] for row in rows], width=0.25, color=colour, label=name)
            panel.bar_label(bars, fmt="%.1f", fontsize=7)
        panel.set_xticks(range(len(rows)), [f"128..{row[0]}" if row[0] > 128 else "128" for row in rows])
        panel.set_xlabel("sizes")
        panel.set_ylabel("parameters that separate models have more, %")
        panel.legend(frameon=False, fontsize=8)
