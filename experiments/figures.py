"""The figures of the report, media/*.png, from kept runs alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from experiments.definition import definitions
from experiments.kept import KeptRun
from experiments.lines import Line, comparable, lines
from experiments.paper import BY_SIZE, MASKED, PUBLISHED
from experiments.parameters import figure4
from trainer.plots import figure, size_axes

COLOURS = ("#1f6f78", "#d9822b", "#6b4c9a", "#3a7d44", "#a63d40", "#4a6fa5", "#8a6d3b", "#c2579a", "#7fb13d")
PAPER, INK = "#9aa0a6", "#3c4043"
PLUS = ("Recall@10", "NDCG@10" + MASKED)  # what the curves of plus show


def draw_figures(runs: list[KeptRun], media: Path) -> list[Path]:
    """Draw what there are runs for, and return the files."""
    paths = [media / "parameters_saved.png"]
    draw_parameters(paths[0])
    for dataset in sorted({run.config.dataset_code for run in runs}):
        if curves := of_definition(runs, dataset, "sizes"):
            paths.append(media / f"sizes-{dataset}.png")
            draw_sizes(dataset, curves, alone(runs, dataset, "independent"), paths[-1])
        if curves := of_definition(runs, dataset, "plus"):
            paths.append(media / f"plus-{dataset}.png")
            draw_plus(dataset, curves, alone(runs, dataset, "plus_alone"), levels(runs, dataset), paths[-1])
    return paths


def of_definition(runs: list[KeptRun], dataset: str, name: str) -> list[Line]:
    """The lines of an experiment that may be shown."""
    definition = definitions()[name]
    return [line for group in comparable(definition, lines(definition, dataset, runs)) for line in group]


def alone(runs: list[KeptRun], dataset: str, name: str) -> list[Line]:
    """The models of one size, where an experiment compares them with a nested one."""
    return [line for line in of_definition(runs, dataset, name) if len(line.config.mrl_hidden_sizes) == 1]


def levels(runs: list[KeptRun], dataset: str) -> dict[str, dict[str, float]]:
    """Models of one size that others are held against: name -> metric -> value."""
    found = {}
    for line in of_definition(runs, dataset, "baselines"):
        if line.row.name in ("SASRec", "LRURec"):
            values = {name: line.values(name) for name in PLUS}
            found[f"{line.row.name}, {line.size}"] = {n: statistics.mean(of) for n, of in values.items() if of}
    if published := PUBLISHED["bsarec"].get(dataset):
        found["BSARec, published"] = published
    return found


def draw_sizes(dataset: str, curves: list[Line], separate: list[Line], path: Path) -> None:
    """Recall@10 and NDCG@10 against size: the paper's curve, every nested training, and models trained alone."""
    with figure(path, 2, f"{dataset}: one training, every size") as panels:
        for panel, name in zip(panels, ("Recall@10", "NDCG@10"), strict=True):
            for line, colour in zip(curves, COLOURS * len(curves), strict=False):
                draw_line(panel, line, name, colour, label(line))
            paper = draw_beside(panel, dataset, name, curves, separate, "trained alone")
            panel.set_title(name if paper else f"{name} (not in the paper's figure)", loc="left")
        panels[0].legend(frameon=False, fontsize=8, loc="upper left")


def draw_plus(
    dataset: str, curves: list[Line], separate: list[Line], levels: dict[str, dict[str, float]], path: Path
) -> None:
    """Recall and NDCG against size of faithful and plus models, beside the paper's curve and models of one size."""
    several = len({line.config.language_encoder for line in curves}) > 1
    with figure(path, 2, f"{dataset}: Recall and NDCG against size") as panels:
        for panel, name in zip(panels, PLUS, strict=True):
            for line, colour in zip(curves, COLOURS * len(curves), strict=False):
                sizes = line.config.mrl_hidden_sizes
                label = f"{line.row.name}, {sizes[0]}..{sizes[-1]}"
                label += f" ({Path(line.config.language_encoder).name})" if several else ""
                draw_line(panel, line, name, colour, label)
            draw_beside(panel, dataset, name, curves, separate, "plus, trained alone")
            for (of, values), style in zip(levels.items(), ("--", "-.", ":"), strict=False):
                if name in values:
                    panel.axhline(values[name], color=INK, linewidth=0.9, linestyle=style, label=of)
            panel.set_title(name.replace(MASKED, ", history masked"), loc="left")
        named: dict[str, Any] = {}  # of both panels, once
        for panel in panels:
            handles, labels = panel.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        panels[0].figure.legend(
            named.values(), named.keys(), frameon=False, fontsize=8, ncols=3, loc="outside lower center"
        )


def draw_line(panel: Any, line: Line, name: str, colour: str, label: str) -> None:
    """A test metric against size, a mean over seeds."""
    sizes = line.config.mrl_hidden_sizes
    means = [statistics.mean(line.values(name, size) or [math.nan]) for size in sizes]
    panel.plot(sizes, means, "o-", color=colour, markersize=4, label=label)


def draw_beside(
    panel: Any, dataset: str, name: str, curves: list[Line], separate: list[Line], label: str
) -> dict[int, float]:
    """The paper's curve, which is returned, and models trained alone; and the axes of all."""
    paper = {size: values[name] for size, values in BY_SIZE.get(dataset, {}).items() if name in values}
    if paper:
        points = zip(*paper.items(), strict=True)
        panel.plot(*points, "s--", color=PAPER, markersize=4, label="paper, text and pictures")
    if separate:
        means = [statistics.mean(line.values(name) or [math.nan]) for line in separate]
        panel.plot([line.size for line in separate], means, "x", color="black", label=label)
    size_axes(panel, sorted({*paper, *(m for line in curves for m in line.config.mrl_hidden_sizes)}))
    return paper


def label(line: Line) -> str:
    """A line of Figure 3 in a few words."""
    config = line.config
    encoder = Path(config.language_encoder).name
    of_text = f" ({encoder})" if config.use_language_encoder else ""
    return f"{line.row.name}{of_text}, {line.runs[0].log[-1]['epoch']} epochs"


def draw_parameters(path: Path) -> None:
    """Figure 4: the share of parameters that one training for all sizes saves."""
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
