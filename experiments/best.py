"""The report's comparison with the best published results, per dataset and protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.definition import definitions
from experiments.paper import BEST, MASKED
from experiments.rows import ResultRow, result_rows
from experiments.tables import markdown, mean_sd

if TYPE_CHECKING:
    from experiments.store import KeptRun

DATASETS = ("beauty", "clothing", "sports", "toys")
METRICS = ("Recall@10", "NDCG@10")
# Our rows: experiment, row, what the model reads besides ids.
OURS = (
    ("plus", "plus"),
    ("plus", "plus to 1024, exact softmax"),
    ("plus", "faithful to 1024"),
    ("id_baselines", "plus without text, 256"),
    ("id_baselines", "SASRec, 256"),
    ("id_baselines", "LRURec, 256"),
)


def ours(runs: list[KeptRun], dataset: str, experiment: str, name: str) -> ResultRow | None:
    """Return the kept row of an experiment that has the most seeds, the newest of them; None if it was not run."""
    rows = [row for row in result_rows(definitions()[experiment], dataset, runs) if row.row.name == name]
    return max(rows, key=lambda row: (len(row.runs), row.runs[-1].name), default=None)


def section(runs: list[KeptRun]) -> list[str]:
    """Return the report's comparison with the best as Markdown lines."""
    lines = [
        "## Compared with the best published results",
        "",
        "Full ranking and leave-one-out on the same files; the two protocols are never mixed. The last two columns "
        "compare with the best published value of the column; a dash means not published.",
        "",
    ]
    for dataset in DATASETS:
        for protocol, published in BEST.items():
            lines += [f"### {dataset}, history {protocol}", "", *markdown(_table(runs, dataset, protocol, published))]
    return lines


def _table(runs: list[KeptRun], dataset: str, protocol: str, published: tuple) -> pd.DataFrame:
    known = [(name, inputs, scores[dataset]) for name, inputs, scores in published if dataset in scores]
    best = [max((value for *_, found in known if (value := found[i]) is not None), default=np.nan) for i in (0, 1)]
    rows = [[name, inputs, "", *("-" if value is None else f"{value:.4f}" for value in found), "", ""]
            for name, inputs, found in known]  # fmt: skip
    for experiment, name in OURS:
        found = ours(runs, dataset, experiment, name)
        inputs = "ids" if experiment == "id_baselines" else "text, ids" if name.startswith("plus") else "text"
        values = [found.values(metric + MASKED * (protocol == "masked")) if found else [] for metric in METRICS]
        means = [np.mean(of) if of else np.nan for of in values]
        cells = [mean_sd(pd.Series(of)) if of else "not run" for of in values]
        against = [
            "" if np.isnan(mean / top) else f"{mean / top - 1:+.1%}" for mean, top in zip(means, best, strict=True)
        ]
        seeds = str(len(values[0])) if values[0] else ""
        rows.append([f"**{name}**, here", inputs, seeds, *cells, *against])
    columns = ["", "reads", "seeds", *METRICS, "Recall@10 against the best", "NDCG@10 against the best"]
    return pd.DataFrame(rows, columns=columns)
