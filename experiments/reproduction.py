"""REPORT.md: the reproduction in the form of a report, written from report_template.md and kept results.

A template has fields in double braces:

{{dataset; experiment; row; size; metric}}             the test metric of the kept row, mean ± sd over seeds
{{dataset; experiment; row; size; metric; against KEY}}    its difference from paper.PUBLISHED[KEY]
{{dataset; experiment; row; setting NAME}}             a setting of the row
{{dataset; experiment; row - row; metric}}             the difference of two rows at their sizes, with p values

Rows that were not run read "not run".
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from common.errors import InputError
from common.settings import format_value
from config import Config
from experiments.best import ours
from experiments.definition import definitions
from experiments.paper import PUBLISHED
from experiments.rows import comparable, result_rows
from experiments.tables import difference, mean_sd

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
    """Return the difference of two rows with otherwise equal settings, of the most seeds."""
    definition = definitions()[experiment]
    groups = comparable(definition, result_rows(definition, dataset, runs))
    pairs = [[row for name in pair for row in group if row.row.name == name] for group in groups]
    pairs = [rows for rows in pairs if len(rows) == 2]
    a, b = max(pairs, key=lambda rows: min(len(row.runs) for row in rows), default=(None, None))
    cells = difference(a, b, metric) if a and b else {}
    if not cells:
        return NOT_RUN
    seeds = f", over seeds {cells['p over seeds']}" if cells["p over seeds"] else ", one seed"
    return f"{cells['difference']}, p over users {cells['p over users']}{seeds}"
