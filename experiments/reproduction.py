"""REPORT.md: the reproduction in the form of a report, written from report_template.md and kept results.

A template has fields in double braces:

{{dataset; experiment; row; size; metric}}             the test metric of the kept row, mean ± sd over seeds
{{dataset; experiment; row; size; metric; against KEY}}    its difference from paper.PUBLISHED[KEY]
{{dataset; experiment; row; setting NAME}}             a setting of the row
{{dataset; experiment; row - row; metric}}             the difference of two rows at their sizes, with p values

Rows that were not run read "not run".
"""

from __future__ import annotations

import itertools
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.errors import InputError
from common.settings import format_value
from config import Config
from experiments.definition import definitions
from experiments.paper import BEST, MASKED, PUBLISHED, SAVED
from experiments.tables import ResultRow, comparable, difference, markdown, mean_sd, result_rows

if TYPE_CHECKING:
    from experiments.store import KeptRun

TEMPLATE = Path(__file__).parent / "report_template.md"
NOT_RUN = "not run"


def write_reproduction(runs: list[KeptRun], template: Path = TEMPLATE) -> str:
    """Return the text of REPORT.md. Raises InputError that names an invalid field."""
    text = template.read_text(encoding="utf-8")
    text = re.sub(r"\{\{(.*?)\}\}", lambda match: field_text(match.group(1), runs), text, flags=re.DOTALL)
    blocks = [block if re.match(r"[|#\d]", block) else textwrap.fill(block, 120) for block in text.split("\n\n")]
    return "\n\n".join(blocks).rstrip() + "\n"


def field_text(field: str, runs: list[KeptRun]) -> str:
    """Return the text in place of one field."""
    dataset, experiment, name, *rest = [part.strip() for part in field.split(";")]
    if experiment not in definitions():
        raise InputError(f"unknown experiment {experiment!r} in {{{{{field}}}}}; known are {', '.join(definitions())}")
    known = [row.name for row in definitions()[experiment].rows]
    pair = [name] if name in known else name.split(" - ")
    if unknown := [row for row in pair if row not in known]:
        raise InputError(f"unknown row {unknown[0]!r} in {{{{{field}}}}}; known are {'; '.join(known)}")
    if len(pair) == 2:
        return _difference(runs, dataset, experiment, pair, rest[0])
    if not (row := ours(runs, dataset, experiment, name)):
        return NOT_RUN
    if rest[0].startswith("setting "):
        setting = rest[0].removeprefix("setting ")
        if setting not in Config.__dataclass_fields__:
            raise InputError(f"unknown setting {setting!r} in {{{{{field}}}}}")
        return format_value(getattr(row.config, setting))
    size, metric = int(rest[0]), rest[1]
    if not (values := row.values(metric, size)):
        return NOT_RUN
    if len(rest) == 2:
        return mean_sd(pd.Series(values))
    published = PUBLISHED[rest[2].removeprefix("against ")][dataset][metric]
    return f"{row.mean(metric, size) / published - 1:+.1%}"


def _difference(runs: list[KeptRun], dataset: str, experiment: str, pair: list[str], metric: str) -> str:
    """Return the difference of two rows with otherwise equal settings, of the most seeds, the newest of them."""
    definition = definitions()[experiment]
    groups = comparable(definition, result_rows(definition, dataset, runs))
    named = [[[row for row in group if row.row.name == name] for name in pair] for group in groups]
    pairs = [rows for of_group in named for rows in itertools.product(*of_group)]
    a, b = max(
        pairs, key=lambda rows: (min(len(row.runs) for row in rows), rows[0].runs[-1].name), default=(None, None)
    )
    cells = difference(a, b, metric) if a and b else {}
    if not cells:
        return NOT_RUN
    seeds = f", over seeds {cells['p over seeds']}" if cells["p over seeds"] else ", one seed"
    return f"{cells['difference']}, p over users {cells['p over users']}{seeds}"


# ----------------------------------------------------------------------------------------------------------------- best
# The report's comparison with the best published results, per dataset and protocol.

DATASETS = ("beauty", "clothing", "sports", "toys")
METRICS = ("Recall@10", "NDCG@10")
# Our rows: experiment, row, what the model reads besides ids.
OURS = (
    ("plus", "plus, taught by three"),
    ("plus", "plus"),
    ("plus", "plus without bias"),
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


def best_section(runs: list[KeptRun]) -> list[str]:
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


# ----------------------------------------------------------------------------------------------------------- parameters
# How many parameters one nested training saves: the paper's Figure 4, and the same for the models here.

FIRST = 128  # the smallest size that the figure counts
FEATURES = 2048  # bge-large's and SigLIP's, side by side


def by_the_paper(dim: int) -> int:
    """Return the parameters of a 2-block model as the figure counts them, which reproduces it to the digit.

    A block has 5 square weights, 5 biases and 3 vectors of the LRU; a complex number counts once. LayerNorms, the
    projection and the item table do not count.
    """
    return 2 * (5 * dim**2 + 5 * dim + 3 * dim)


def stored(dim: int, projection: bool = True) -> int:
    """Return the numbers in the file of a 2-block model here.

    A complex number counts twice, and masked zeros count. projection: include the projection of the paper's encoders.
    """
    square, vector = 3 + 4, 3 + 3 + 3 + 4  # feed-forward, B and C; their biases, ν θ γ, LayerNorms
    return 2 * (square * dim**2 + vector * dim) + projection * (FEATURES + 1) * dim


def unmasked(sizes: tuple[int, ...], projection: bool = True) -> int:
    """Return the parameters of a model here as model.count_parameters does: complex ones once, masked ones not."""
    dim, below = sizes[-1], (0, *sizes)
    square = sum((high - low) * high for low, high in zip(below, sizes, strict=False))
    return 2 * (5 * square + 5 * dim + 3 * dim + 4 * dim) + projection * (FEATURES + 1) * dim


def saved(of_separate: list[int], of_one: int) -> float:
    """Return the figure's R_s: the extra parameters of separate models, relative to the one nested model."""
    return sum(of_separate) / of_one - 1


def figure4() -> list[tuple[int, float, float, float]]:
    """Return (largest size, R_s by the paper's formula, R_s of the files here, R_s of the unmasked parameters)."""
    rows = []
    for largest in SAVED:
        sizes = tuple(FIRST * 2**i for i in range((largest // FIRST).bit_length()))
        rows.append(
            (
                largest,
                saved([by_the_paper(m) for m in sizes], by_the_paper(largest)),
                saved([stored(m) for m in sizes], stored(largest)),
                saved([unmasked((m,)) for m in sizes], unmasked(sizes)),
            )
        )
    return rows


def parameters_section() -> list[str]:
    """Return the figure's part of the report as Markdown lines."""
    columns = ["sizes", "its formula", "files here", "without masked zeros"]
    table = pd.DataFrame(figure4(), columns=columns)
    table.insert(1, "paper", SAVED.values())
    sizes = [f"{FIRST}..{largest}" if largest > FIRST else f"{FIRST}" for largest in table.pop("sizes")]
    table = table.map("{:.2%}".format)
    table.insert(0, "sizes", sizes)
    return [
        "## Figure 4: parameters that one training for all sizes saves",
        "",
        "Separate models of every size hold this many more parameters than the one nested model. The paper's formula "
        "counts five square weights a block. A file here holds B and C twice (real and imaginary parts), LayerNorms, "
        f"and the projection of {FEATURES} features, which grows with the size and not with its square. The last "
        "column counts complex numbers once and leaves out the zeros that the mask makes in the nested model.",
        "",
        *markdown(table),
        "![Parameters saved](../media/parameters_saved.png)",
        "",
    ]
