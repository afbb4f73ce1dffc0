"""The lines of an experiment's tables and curves: which kept runs are of which row, and which lines compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from config import Config
from experiments.definition import Definition, Row, identity
from experiments.kept import KeptRun
from experiments.paper import MASKED, PUBLISHED
from experiments.significance import user_metrics


@dataclass(frozen=True)
class Line:
    """Runs of a row that have the same settings, of several seeds."""

    row: Row
    runs: tuple[KeptRun, ...]
    number: int = 0  # which one of its row, where a table has several

    @property
    def name(self) -> str:
        return f"{self.row.name} ({self.number})" if self.number else self.row.name

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def size(self) -> int:
        return self.row.size or self.config.mrl_hidden_sizes[-1]

    def values(self, name: str, size: int | None = None) -> list[float]:
        """A test metric of every seed; a name that ends in MASKED is that of the other protocol."""
        of_runs = [run.metrics(name.endswith(MASKED)).get(size or self.size, {}) for run in self.runs]
        return [metrics[name.removesuffix(MASKED)] for metrics in of_runs if name.removesuffix(MASKED) in metrics]

    def published(self, name: str) -> float | None:
        return PUBLISHED.get(self.row.published, {}).get(self.config.dataset_code, {}).get(name)

    def of_users(self, name: str) -> np.ndarray | None:
        """A test metric of every user, a mean over seeds: [U]; None where ranks were not kept, or not as far as
        that, or it is not known whose."""
        if len(self.values(name)) < len(self.runs) or self.runs[0].data is None:
            return None
        ranks = [run.ranks(name.endswith(MASKED)) for run in self.runs]
        if any(found is None for found in ranks):
            return None
        of_seeds = [user_metrics(found[0][self.size], name.removesuffix(MASKED)) for found in ranks if found]
        return np.mean(of_seeds, axis=0)


def lines(definition: Definition, dataset: str, runs: Iterable[KeptRun]) -> list[Line]:
    """What was run of an experiment on a dataset, in the order of its rows. Of two runs that differ in nothing, the
    newer counts."""
    found: dict[tuple, dict[int, KeptRun]] = {}
    for run in runs:
        for index, row in enumerate(definition.rows):
            if not (definition.validation or run.tested):
                continue
            if run.config.dataset_code == dataset and definition.fits(row, run.config):
                settings = {name: value for name, value in identity(run.config).items() if name != "seed"}
                found.setdefault((index, run.data, *sorted(settings.items())), {})[run.config.seed] = run
    ordered = sorted(found.items(), key=lambda pair: pair[0][0])
    return [Line(definition.rows[key[0]], tuple(dict(sorted(of_seeds.items())).values())) for key, of_seeds in ordered]


def comparable(definition: Definition, of_dataset: list[Line]) -> list[list[Line]]:
    """The lines in groups, each on the same data, that differ in what the experiment varies alone. Left out is what
    compares nothing: a line whose partners were not run, and a group without any pair, unless there is a published
    value for it; and a model of one size, where all sizes are shown."""
    groups: dict[tuple, list[Line]] = {}
    for line in of_dataset:
        if definition.every_size and len(line.config.mrl_hidden_sizes) == 1:
            continue
        same = {name: v for name, v in identity(line.config).items() if name not in definition.varied() | {"seed"}}
        groups.setdefault((line.runs[0].data, *sorted(same.items())), []).append(line)
    shown = []
    for group in groups.values():
        names = {line.row.name for line in group}
        if definition.every_size:
            pairs = any(names >= set(pair) for pair in definition.compare)
            shown += [group] if pairs or not definition.compare else []
            continue
        if definition.validation:
            shown += [numbered(group)] if len(names) > 1 else []
            continue
        complete = {name for pair in definition.compare if names >= set(pair) for name in pair}
        waiting = {name for pair in definition.compare for name in pair} - complete
        kept = [line for line in group if line.row.name not in waiting or line.row.published]
        if complete or any(line.row.published for line in kept):
            shown.append(numbered(kept))
    return shown


def numbered(group: list[Line]) -> list[Line]:
    """The lines, with a number where a row has several: by it a table's lines and the notes below find each other."""
    of_row = Counter(line.row.name for line in group)
    seen: Counter[str] = Counter()
    found = []
    for line in group:
        seen[line.row.name] += 1
        found.append(replace(line, number=seen[line.row.name]) if of_row[line.row.name] > 1 else line)
    return found
