"""The tables of an experiment, from kept runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import Any

import numpy as np

from common.settings import format_value
from config import Config
from experiments.definition import Definition, unusual
from experiments.kept import KeptRun
from experiments.lines import Line, comparable, lines
from experiments.paper import BY_SIZE, COLUMNS, ENCODERS, MASKED
from experiments.significance import paired_bootstrap
from trainer.runs import describe_model

WITHOUT_HISTORY = ("NDCG@10" + MASKED, "Recall@10" + MASKED)
TRAINED = ((0, 0), (1, 5), (6, 20), (21, None))  # how often a target was in training, from .. to
PICTURED = ("sizes", "plus")  # the experiments of which experiments/figures.py draws a curve
OF_SIZES = ("Recall@10", "NDCG@10", "Recall@20", "Recall@50")


def section(definition: Definition, runs: list[KeptRun]) -> list[str]:
    """An experiment's part of the report, Markdown lines; none where nothing of it was run."""
    parts: list[str] = []
    for dataset in sorted({run.config.dataset_code for run in runs}):
        groups = comparable(definition, lines(definition, dataset, runs))
        for group in groups:
            parts += [f"### {dataset}: {common_settings(definition, group)}", ""]
            if definition.validation or definition.by_size:
                parts += by_size(group, definition.validation)
            elif definition.every_size:
                parts += every_size(group)
            else:
                parts += results(group, COLUMNS) + results(group, WITHOUT_HISTORY)
            parts += compared(definition, group)
            if definition.by_popularity:
                parts += by_popularity(group)
            parts += provenance(definition, group)
        if definition.name in PICTURED and groups:
            parts += [f"![Metrics against size](../media/{definition.name}-{dataset}.png)", ""]
    return [f"## {definition.title}", "", definition.text, "", *parts] if parts else []


def common_settings(definition: Definition, group: list[Line]) -> str:
    """What all lines of a group have that is no default or preset of the dataset."""
    if "model_code" in definition.varied():
        return "every model with settings of its own"
    same = unusual(group[0].config, definition.varied() | {"seed"})
    return settings_text(same) or "the dataset's settings"


def settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {format_value(value)}" for name, value in settings.items())


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], text: tuple[int, ...] = (0,)) -> list[str]:
    """Markdown; the columns `text` are text, the others numbers."""
    ruler = ["---" if i in text else "---:" for i in range(len(heads))]
    return [*(f"| {' | '.join(row)} |" for row in (heads, ruler, *rows)), ""]


def results(group: list[Line], names: tuple[str, ...]) -> list[str]:
    """A row for every line: each metric and, where there is one, the published value and the difference to it."""
    if not any(line.values(name) for line in group for name in names):
        return []
    heads, cells = ["", "seeds"], [[line.name, str(len(line.runs))] for line in group]
    for name in names:
        heads.append(name.replace(MASKED, ", history masked"))
        for row, line in zip(cells, group, strict=True):
            values = line.values(name)
            row.append(mean_sd(values) + (f" ({len(values)} of them)" if 0 < len(values) < len(line.runs) else ""))
        if any(line.published(name) is not None for line in group):
            heads += ["published", "difference"]
            for row, line in zip(cells, group, strict=True):
                row += against(line.values(name), line.published(name))
    return table(heads, cells)


def mean_sd(values: list[float]) -> str:
    """The mean, and of several values their standard deviation."""
    if not values:
        return ""
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{sd}"


def against(values: list[float], published: float | None) -> list[str]:
    if published is None:
        return ["", ""]
    return [f"{published:.4f}", f"{statistics.mean(values) / published - 1:+.1%}" if values else ""]


def by_size(group: list[Line], validation: bool) -> list[str]:
    """NDCG@10 of every size, Recall@10 of the largest, and the time of an epoch: in validation, or in the test with the
    history masked."""

    def values(line: Line, name: str, size: int) -> list[float]:
        if not validation:
            return line.values(name + MASKED, size)
        found = [run.validation() for run in line.runs]
        return [of_sizes[size].get(name, nan) for of_sizes in found if size in of_sizes]

    sizes = sorted({size for line in group for size in line.config.mrl_hidden_sizes})
    cells = []
    for line in group:
        row = [line.name, str(len(line.runs))]
        row += [mean_sd(values(line, "NDCG@10", size)) for size in sizes]
        row.append(mean_sd(values(line, "Recall@10", line.config.mrl_hidden_sizes[-1])))
        logs = [run.log[-1] for run in line.runs]
        row.append(f"{statistics.mean(log['seconds'] / log['epoch'] for log in logs):.0f}")
        cells.append(row)
    of, largest = "validation NDCG@10 by size", "Recall@10, largest"
    if not validation:
        of, largest = "NDCG@10 by size, history masked", f"{largest}, history masked"
    heads = [of, "seeds", *map(str, sizes), largest, "s an epoch"]
    return table(heads, cells)


def every_size(group: list[Line]) -> list[str]:
    """Every size of every line, beside the paper's Figure 3 where it shows the dataset."""
    heads, cells = ["", "size"], []
    figure = BY_SIZE.get(group[0].config.dataset_code, {})
    heads += [
        *OF_SIZES,
        "NDCG@10, history masked",
        *(f"paper, {name}" for name in OF_SIZES if figure and "NDCG" not in name),
    ]
    for line in group:
        for size in line.config.mrl_hidden_sizes:
            row = [
                line.name,
                str(size),
                *(mean_sd(line.values(name, size)) for name in (*OF_SIZES, WITHOUT_HISTORY[0])),
            ]
            paper = figure.get(size, {})
            row += [f"{paper[name]:.4f}" if name in paper else "" for name in OF_SIZES if figure and "NDCG" not in name]
            cells.append(row)
    return table(heads, cells)


def compared(definition: Definition, group: list[Line]) -> list[str]:
    """The paired bootstrap over users between the rows that the experiment compares."""
    cells = []
    for first, second in definition.compare:
        for a in (line for line in group if line.row.name == first):
            for b in (line for line in group if line.row.name == second):
                cells += [row for name in ("NDCG@10", *WITHOUT_HISTORY[:1]) if (row := difference(a, b, name))]
    if not cells:
        return []
    heads = ["paired bootstrap over users", "metric", "difference", "95 % interval", "p"]
    return table(heads, cells)


def difference(a: Line, b: Line, name: str) -> list[str]:
    """a's metric minus b's; empty where ranks were not kept or the two were not tested on the same users."""
    of_a, of_b = a.of_users(name), b.of_users(name)
    if of_a is None or of_b is None or a.runs[0].data != b.runs[0].data:
        return []
    found = paired_bootstrap(of_a, of_b)
    relative = f" ({found.mean / of_b.mean():+.1%})" if of_b.mean() > 0 else ""
    return [
        f"{a.name} - {b.name}",
        name.replace(MASKED, ", history masked"),
        f"{found.mean:+.4f}{relative}",
        f"{found.low:+.4f} .. {found.high:+.4f}",
        f"{found.p:.4f}",
    ]


def by_popularity(group: list[Line]) -> list[str]:
    """NDCG@10 and Recall@10 of users, told apart by how often the item that they had next was in training."""
    kept = []
    for line in group:
        ndcg, recall = line.of_users("NDCG@10"), line.of_users("Recall@10")
        if ndcg is not None and recall is not None:
            kept.append((line, (ndcg, recall)))
    if not kept:
        return []
    ranks = kept[0][0].runs[0].ranks()
    assert ranks is not None  # of_users read them
    _, times = ranks

    def within(low: int, high: int | None) -> np.ndarray:
        return (times >= low) & (times <= (times.max() if high is None else high))

    heads = ["by how often the target was in training"]
    counts = ["users"]
    for low, high in TRAINED:
        often = "never" if high == 0 else f"{low}-{high} times" if high else f"{low} times and more"
        heads += [f"NDCG@10, {often}", f"Recall@10, {often}"]
        counts += [f"{within(low, high).sum():,}"] * 2
    rows = [counts]
    for line, of_users in kept:
        row = [line.name]
        for low, high in TRAINED:
            some = within(low, high)
            row += [f"{values[some].mean():.4f}" if some.any() else "" for values in of_users]
        rows.append(row)
    return table(heads, rows)


def where_made(environments: Sequence[Mapping[str, Any]]) -> str:
    """The devices, versions and commits of runs."""
    devices = dict.fromkeys(environment["device"] for environment in environments)
    versions = dict.fromkeys(f"torch {environment['versions']['torch']}" for environment in environments)
    commits = dict.fromkeys(f"`{(environment['commit'] or 'unknown')[:10]}`" for environment in environments)
    changed = " with uncommitted changes" if any(e["uncommitted_changes"] for e in environments) else ""
    return f"{' and '.join(devices)}; {' and '.join(versions)}; commit {' and '.join(commits)}{changed}"


def provenance(definition: Definition, group: list[Line]) -> list[str]:
    """How every line was made."""
    notes: dict[str, list[str]] = {}  # how -> the rows made so
    for line in group:
        own = unusual(line.config, {"seed"}) if "model_code" in definition.varied() else {}
        own = {name: value for name, value in own.items() if name not in line.row.settings}
        logs = [run.log[-1] for run in line.runs]
        parts = [
            f"{', '.join(f'`{run.folder.name}`' for run in line.runs)}",
            plural(", ".join(str(log["epoch"]) for log in logs), "epoch"),
            f"best {', '.join(str(log['best_epoch']) for log in logs)}",
            plural(", ".join(str(round(log["seconds"] / 60)) for log in logs), "minute"),
            where_made([environment for run in line.runs for environment in run.environments]),
        ]
        if own:
            parts.append(f"with {settings_text(own)}")
        if line.row.published and (unlike := unlike_paper(line.config, line.row.published)):
            parts.append(f"unlike the paper: {unlike}")
        notes.setdefault("; ".join(parts), []).append(line.name)
    return [*(f"- {'; '.join(names)}: {how}." for how, names in notes.items()), ""]


def plural(number: str, unit: str) -> str:
    return f"{number} {unit}{'' if number == '1' else 's'}"


def unlike_paper(config: Config, published: str) -> str:
    """What a run could not use that the paper did, in its row `published` of paper.PUBLISHED."""
    parts = []
    if published == "both" and config.branch != "both":
        parts.append(f"{describe_model(config)} alone")
    for switch, encoder in (("use_language_encoder", "language_encoder"), ("use_img_encoder", "img_encoder")):
        if getattr(config, switch) and getattr(config, encoder) != ENCODERS[encoder]:
            parts.append(f"{encoder} {getattr(config, encoder)} instead of {ENCODERS[encoder]}")
    if config.model_code == "fmrlrec" and config.mrl_hidden_sizes[-1] != Config.mrl_hidden_sizes[-1]:
        parts.append(f"largest size {config.mrl_hidden_sizes[-1]} instead of {Config.mrl_hidden_sizes[-1]}")
    return ", ".join(parts)
