"""Figures of the report, media/*.png, drawn from kept runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.definition import definitions
from experiments.deployment import plot_card
from experiments.paper import BEST, BY_SIZE, MASKED, PUBLISHED
from experiments.parameters import figure4
from experiments.rows import ResultRow, comparable, result_rows
from experiments.store import KeptRun
from trainer.plots import COLOURS, INK, draw_level, figure, label_lines, size_axes

PROTOCOLS = {"Recall@10": "history kept", "NDCG@10" + MASKED: "history masked"}  # metrics of the figure of plus
LINES = {"-": "", "--": " (dashed)", ":": " (dotted)"}  # of several curves of one model -> what the label says


def draw_figures(runs: list[KeptRun], media: Path) -> list[Path]:
    """Draw every figure that has runs, and return the files."""
    paths = [media / "parameters_saved.png"]
    draw_parameters(paths[0])
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
    definition = definitions()[name]
    return [row for group in comparable(definition, result_rows(definition, dataset, runs)) for row in group]


def rows_of_plus(runs: list[KeptRun], dataset: str) -> list[ResultRow]:
    """Return the rows of the figure of plus: those that the report shows, or plus alone if it has no partner."""
    found = rows_of(runs, dataset, "plus")
    return found or [row for row in result_rows(definitions()["plus"], dataset, runs) if row.row.name == "plus"]


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
    with figure(path, 2, title) as panels:
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
                shown = [(row, row.row.name.partition(",")[0].replace("plus to", "to")) for row in curves]
                draw_curves(panel, dataset, name, shown, separate, levels(runs, dataset, name))
                panel.set_title(f"{dataset}: {name.removesuffix(MASKED)}, {protocol}", loc="left")


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


def draw_parameters(path: Path) -> None:
    """Draw Figure 4: the share of parameters that one training for all sizes saves."""
    with figure(path, 1, "Parameters that separate models have more than one training for all sizes, %") as [panel]:
        rows = figure4()
        names = ("the paper's formula", "numbers in files here", "without masked zeros")
        for i, (name, colour) in enumerate(zip(names, (COLOURS["paper"], COLOURS["fmrlrec"], INK), strict=True)):
            places = [x + 0.27 * (i - 1) for x in range(len(rows))]
            bars = panel.bar(places, [100 * row[1 + i] for row in rows], width=0.25, color=colour, label=name)
            panel.bar_label(bars, fmt="%.0f", fontsize=8)
        panel.set_xticks(range(len(rows)), [f"128..{row[0]}" if row[0] > 128 else "128" for row in rows])
        panel.set_xlabel("sizes")
        panel.legend(frameon=False, fontsize=8)
