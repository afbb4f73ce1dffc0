"""Rows of an experiment's tables: which kept runs belong to which row, and which rows are comparable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from config import Config
from experiments.definition import Definition, Row, identity
from experiments.paper import MASKED, PUBLISHED
from experiments.significance import user_metrics
from experiments.store import KeptRun

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ResultRow:
    """Runs of one row with the same settings, one per seed."""

    row: Row
    runs: tuple[KeptRun, ...]
    number: int = 0  # counts the row's entries if it has several in a table

    @property
    def name(self) -> str:
        return f"{self.row.name} ({self.number})" if self.number else self.row.name

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def size(self) -> int:
        return self.row.size or self.config.mrl_hidden_sizes[-1]

    def values(self, metric: str, size: int | None = None) -> list[float]:
        """Return a test metric of every seed that has it."""
        return [
            run.test.at[size or self.size, metric]
            for run in self.runs
            if metric in run.test.columns and (size or self.size) in run.test.index
        ]

    def mean(self, metric: str, size: int | None = None) -> float:
        """Return the mean of a test metric over seeds; NaN if no seed has it."""
        return float(np.mean(self.values(metric, size) or [np.nan]))

    def published(self, metric: str) -> float | None:
        return PUBLISHED.get(self.row.published, {}).get(self.config.dataset_code, {}).get(metric)

    def of_users(self, metric: str) -> np.ndarray | None:
        """Return a test metric of every user [U], averaged over seeds.

        None if a seed lacks the metric or its users' ranks, or if the dataset's digest is unknown.
        """
        if len(self.values(metric)) < len(self.runs) or self.runs[0].data is None:
            return None
        ranks = [run.ranks(metric.endswith(MASKED)) for run in self.runs]
        if not all(ranks):
            return None
        of_seeds = [user_metrics(found[self.size], metric.removesuffix(MASKED)) for found in ranks if found]
        return np.mean(of_seeds, axis=0)


def frame(group: list[ResultRow], split: str = "test") -> pd.DataFrame:
    """Return the metrics of a group, indexed by row name, seed and size."""
    import pandas as pd

    runs = {(row.name, run.config.seed): run for row in group for run in row.runs}
    of_runs = {key: run.test if split == "test" else run.validation for key, run in runs.items()}
    return pd.concat(of_runs, names=["row", "seed", "size"])


def result_rows(definition: Definition, dataset: str, runs: Iterable[KeptRun]) -> list[ResultRow]:
    """Return the rows of an experiment on a dataset that have runs, in the definition's order.

    If two runs have the same settings and seed, the one with the later name counts.
    """
    found: dict[tuple, dict[int, KeptRun]] = {}
    for run in runs:
        if run.config.dataset_code != dataset or not (definition.validation or run.tested):
            continue
        for index, row in enumerate(definition.rows):
            if definition.fits(row, run.config):
                settings = {name: value for name, value in identity(run.config).items() if name != "seed"}
                found.setdefault((index, run.data, *sorted(settings.items())), {})[run.config.seed] = run
    ordered = sorted(found.items(), key=lambda pair: pair[0][0])
    return [ResultRow(definition.rows[key[0]], tuple(dict(sorted(seeds.items())).values())) for key, seeds in ordered]


def comparable(definition: Definition, rows: list[ResultRow]) -> list[list[ResultRow]]:
    """Return the rows in groups that share the dataset and every setting that the experiment does not vary.

    Leaves out rows whose partners in `compare` have no run and groups without any pair, unless they have published
    values, and one-size models if the experiment shows every size.
    """
    groups: dict[tuple, list[ResultRow]] = {}
    for row in rows:
        if definition.every_size and len(row.config.mrl_hidden_sizes) == 1:
            continue
        same = {name: v for name, v in identity(row.config).items() if name not in definition.varied() | {"seed"}}
        groups.setdefault((row.runs[0].data, *sorted(same.items())), []).append(row)
    shown = []
    for group in groups.values():
        names = {row.row.name for row in group}
        if definition.every_size:
            pairs = any(names >= set(pair) for pair in definition.compare)
            shown += [numbered(group)] if pairs or not definition.compare else []
            continue
        if definition.validation:
            shown += [numbered(group)] if len(names) > 1 else []
            continue
        complete = {name for pair in definition.compare if names >= set(pair) for name in pair}
        waiting = {name for pair in definition.compare for name in pair} - complete
        kept = [row for row in group if row.row.name not in waiting or row.row.published]
        if complete or any(row.row.published for row in kept):
            shown.append(numbered(kept))
    return shown


def numbered(group: list[ResultRow]) -> list[ResultRow]:
    """Number the entries of every row that has several, so that their names differ."""
    of_row = Counter(row.row.name for row in group)
    seen: Counter[str] = Counter()
    found = []
    for row in group:
        seen[row.row.name] += 1
        found.append(replace(row, number=seen[row.row.name]) if of_row[row.row.name] > 1 else row)
    return found
