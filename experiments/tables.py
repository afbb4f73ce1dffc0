"""The text of RESULTS.md (experiments, best published results, cost of serving, Figure 4) and of REPORT.md."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from common.errors import InputError
from common.settings import format_value
from config import Config
from experiments.definition import Definition, Row, definitions, identity, unusual
from experiments.paper import BEST, BY_SIZE, COLUMNS, ENCODERS, MASKED, PUBLISHED, SAVED
from experiments.store import KeptRun
from trainer.runs import BINS, describe_model

WITHOUT_HISTORY = ("NDCG@10" + MASKED, "Recall@10" + MASKED)
OF_SIZES = ("Recall@10", "NDCG@10", "Recall@20", "Recall@50", "NDCG@10" + MASKED)
PICTURED = ("sizes", "plus", "encoder_width")  # experiments with a figure (experiments/figures.py)


def section(definition: Definition, runs: list[KeptRun]) -> list[str]:
    """Return an experiment's part of the report as Markdown lines; empty if it has no runs."""
    parts: list[str] = []
    for dataset in sorted({run.config.dataset_code for run in runs}):
        groups = comparable(definition, result_rows(definition, dataset, runs))
        for group, heading in zip(groups, headings(definition, dataset, groups), strict=True):
            parts += [f"### {heading}", ""]
            if definition.validation or definition.by_size:
                parts += by_size(group, definition.validation)
            elif definition.every_size:
                parts += every_size(group)
            else:
                parts += results(group, COLUMNS) + results(group, WITHOUT_HISTORY)
            parts += compared(definition, group)
            if definition.by_cut:
                parts += by_cut(group)
            if definition.by_popularity:
                parts += by_popularity(group)
            parts += provenance(definition, group)
        if definition.name in PICTURED and groups:
            picture = "plus" if definition.name == "plus" else f"{definition.name}-{dataset}"
            parts += [f"![Metrics against size](../media/{picture}.png)", ""]
    return [f"## {definition.title}", "", definition.text, "", *parts] if parts else []


def headings(definition: Definition, dataset: str, groups: list[list[ResultRow]]) -> list[str]:
    """Return a heading per group: the experiment, the dataset, and the settings that tell the groups apart."""
    of_groups = [
        {"data": (group[0].runs[0].data or "unknown")[:10]}
        | (_identity_of_group(definition, group) if "model_code" not in definition.varied() else {})
        for group in groups
    ]
    names = list(dict.fromkeys(name for settings in of_groups for name in settings))
    differing = [name for name in names if len({str(settings.get(name)) for settings in of_groups}) > 1]
    return [
        ", ".join(
            [
                f"{definition.name} on {dataset}{by_time(group)}",
                *(f"{n} {format_value(s.get(n, 'default'))}" for n in differing),
            ]
        )
        for s, group in zip(of_groups, groups, strict=True)
    ]


def by_time(group: list[ResultRow]) -> str:
    """Return the name of a group's split, if it is not leave-one-out; a group has one dataset and thus one split."""
    split = group[0].runs[0].record["environment"].get("split")
    return f", split by {split}" if split else ""


def _identity_of_group(definition: Definition, group: list[ResultRow]) -> dict[str, Any]:
    return unusual(group[0].config, definition.varied() | {"seed"})


def group_settings(definition: Definition, group: list[ResultRow]) -> str:
    """Return the settings of all rows of a group that differ from the presets of the dataset."""
    if "model_code" in definition.varied():
        return "each model has its own"
    return settings_text(_identity_of_group(definition, group)) or "the dataset's presets"


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as a list for readers."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in settings.items())


def markdown(table: pd.DataFrame, text: Sequence[int] = (0,)) -> list[str]:
    """Return a table of strings as Markdown lines. text: the left-aligned columns."""
    ruler = ["---" if column in text else "---:" for column in range(table.shape[1])]
    return [*(f"| {' | '.join(cells)} |" for cells in (table.columns, ruler, *table.to_numpy())), ""]


def mean_sd(values: pd.Series) -> str:
    """Return the mean, with the standard deviation if there are several values; NaN is ignored."""
    values = values.dropna()
    if values.empty:
        return ""
    return f"{values.mean():.4f}" + (f" ± {values.std():.4f}" if len(values) > 1 else "")


def results(group: list[ResultRow], metrics: Sequence[str]) -> list[str]:
    """Return a table of metrics by row, each beside its published value if a row has one."""
    found = frame(group).reindex(columns=list(metrics))
    size = found.index.get_level_values("row").map({row.name: row.size for row in group})
    found = found[found.index.get_level_values("size") == size]
    if found.isna().all(axis=None):
        return []
    of_rows = found.groupby("row", sort=False)
    means, sds, counts = of_rows.mean(), of_rows.agg(mean_sd), of_rows.count()
    columns: list[tuple[str, list[str]]] = [("", [row.name for row in group])]
    columns.append(("seeds", [str(len(row.runs)) for row in group]))
    for metric in metrics:
        seeds = {row.name: counts.at[row.name, metric] for row in group}
        notes = [f" ({seeds[r.name]} of them)" if 0 < seeds[r.name] < len(r.runs) else "" for r in group]
        cells = [sds.at[row.name, metric] + note for row, note in zip(group, notes, strict=True)]
        columns.append((metric.replace(MASKED, ", history masked"), cells))
        published = [row.published(metric) for row in group]
        if any(value is not None for value in published):
            columns.append(("published", ["" if value is None else f"{value:.4f}" for value in published]))
            shares = [means.at[r.name, metric] / (p or np.nan) - 1 for r, p in zip(group, published, strict=True)]
            columns.append(("difference", ["" if np.isnan(share) else f"{share:+.1%}" for share in shares]))
    return markdown(_table(columns))


def _table(columns: list[tuple[str, list[str]]]) -> pd.DataFrame:
    """Return a table of columns, whose names may repeat."""
    table = pd.concat([pd.Series(cells) for _, cells in columns], axis="columns")
    return table.set_axis([name for name, _ in columns], axis="columns")


def by_size(group: list[ResultRow], validation: bool) -> list[str]:
    """Return NDCG@10 of every size side by side, the largest size's Recall@10, and the seconds of an epoch.

    The metrics are those of validation, or of the test with the history masked.
    """
    suffix = "" if validation else MASKED
    found = frame(group, "val" if validation else "test")
    names = [row.name for row in group]
    ndcg = found["NDCG@10" + suffix].groupby(["row", "size"]).agg(mean_sd).unstack("size", fill_value="").loc[names]
    largest = found["Recall@10" + suffix].groupby(["row", "seed"]).last().groupby("row").agg(mean_sd).loc[names]
    seconds = [np.mean([run.record["seconds"] / run.record["epochs"] for run in row.runs]) for row in group]
    table = ndcg.rename(columns=str)
    table.insert(0, "seeds", [str(len(row.runs)) for row in group])
    title = "validation NDCG@10 by size" if validation else "NDCG@10 by size, history masked"
    table.insert(0, title, names)
    table["Recall@10, largest" + ("" if validation else ", history masked")] = largest
    table["s an epoch"] = [f"{value:.0f}" for value in seconds]
    return markdown(table)


def every_size(group: list[ResultRow]) -> list[str]:
    """Return a table of every row and size, beside the paper's Figure 3 if it has the dataset."""
    table = frame(group).reindex(columns=list(OF_SIZES)).groupby(["row", "size"], sort=False).agg(mean_sd)
    figure = pd.DataFrame(BY_SIZE.get(group[0].config.dataset_code, {})).T
    for metric in figure:
        table[f"paper, {metric}"] = [
            f"{figure.at[size, metric]:.4f}" if size in figure.index else "" for _, size in table.index
        ]
    table = table.rename(columns=lambda name: name.replace(MASKED, ", history masked")).reset_index()
    return markdown(table.astype({"size": str}).rename(columns={"row": ""}))


def compared(definition: Definition, group: list[ResultRow]) -> list[str]:
    """Return the differences of the rows that the experiment compares, with their p values over users and seeds."""
    found = [
        difference(a, b, metric)
        for first, second in definition.compare
        for a in group
        for b in group
        if (a.row.name, b.row.name) == (first, second)
        for metric in ("NDCG@10", WITHOUT_HISTORY[0])
    ]
    table = pd.DataFrame([cells for cells in found if cells])
    if table.empty:
        return []
    if not table["p over seeds"].any():
        table = table.drop(columns=["t over seeds", "p over seeds"])
    return markdown(table)


def difference(a: ResultRow, b: ResultRow, metric: str) -> dict[str, str]:
    """Return a's metric minus b's; empty if ranks were not kept or the users are not the same."""
    of_a, of_b = a.of_users(metric), b.of_users(metric)
    if of_a is None or of_b is None or a.runs[0].data != b.runs[0].data:
        return {}
    found = paired_bootstrap(of_a, of_b)
    relative = f" ({found.mean / of_b.mean():+.1%})" if of_b.mean() > 0 else ""
    seeds = welch_test(a.values(metric), b.values(metric))
    return {
        "compared": f"{a.name} - {b.name}",
        "metric": metric.replace(MASKED, ", history masked"),
        "difference": f"{found.mean:+.4f}{relative}",
        "95 % interval": f"{found.low:+.4f} .. {found.high:+.4f}",
        "p over users": f"{found.p:.4f}",
        "t over seeds": f"{seeds.t:+.2f}" if seeds else "",
        "p over seeds": f"{seeds.p:.4f}" if seeds else "",
    }


def by_cut(group: list[ResultRow]) -> list[str]:
    """Return NDCG@10 of the widths cut afterwards from the first seed that was cut, beside the run's own sizes."""
    table: dict[str, dict[str, str]] = {}  # column -> width -> cell
    for row in group:
        for run in [run for run in row.runs if "cut" in run.record][:1]:
            for protocol in ("kept", "masked"):
                for of, name in (("cut", f"{row.name}, cut"), ("nested", row.name)):
                    column = table.setdefault(f"{name}, history {protocol}", {})
                    for width, metrics in run.record["cut"][protocol][of].items():
                        column[width] = f"{metrics['NDCG@10']:.4f}"
    if not table:
        return []
    found = pd.DataFrame(table).fillna("")
    found = found.loc[sorted(found.index, key=int)]
    found.insert(0, "NDCG@10 by width", found.index)
    return markdown(found)


def by_popularity(group: list[ResultRow]) -> list[str]:
    """Return NDCG@10 and Recall@10 of users, binned by how often their target occurs in training."""
    of_users = {(row.name, name): row.of_users(name) for row in group for name in ("NDCG@10", "Recall@10")}
    users = pd.DataFrame({key: values for key, values in of_users.items() if values is not None})
    names = [row.name for row in group if {(row.name, "NDCG@10"), (row.name, "Recall@10")} <= set(users)]
    if not names:
        return []
    times = next(row for row in group if row.name == names[0]).runs[0].times_trained()
    bins = pd.cut(times, [*BINS.values(), np.inf], right=False, labels=list(BINS))
    binned = users.groupby(bins, observed=False)
    means, counts = binned.mean(), binned.size()
    table = pd.DataFrame({"by how often the target was in training": ["users", *names]})
    for name in BINS:
        for metric in ("NDCG@10", "Recall@10"):
            values = [means.at[name, (row, metric)] for row in names]
            cells = ["" if np.isnan(value) else f"{value:.4f}" for value in values]
            table[f"{metric}, {name}"] = [f"{counts[name]:,}", *cells]
    return markdown(table)


def provenance(definition: Definition, group: list[ResultRow]) -> list[str]:
    """Return how the rows were made: common settings, each row's seeds and own settings, devices and commits."""
    notes: dict[str, list[str]] = {}  # note -> the rows it is true of
    for row in group:
        seeds = [str(run.config.seed) for run in row.runs]
        parts = [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"]
        own = unusual(row.config, {"seed"}) if "model_code" in definition.varied() else {}
        if own := {name: value for name, value in own.items() if name not in row.row.settings}:
            parts.append(f"with {settings_text(own)}")
        if row.row.published and (unlike := unlike_paper(row.config, row.row.published)):
            parts.append(f"unlike the paper: {unlike}")
        notes.setdefault("; ".join(parts), []).append(row.name)
    environments = [environment for row in group for run in row.runs for environment in run.environments]
    return [
        f"- Settings: {group_settings(definition, group)}.",
        *(f"- {'All rows' if len(notes) == 1 else '; '.join(names)}: {how}." for how, names in notes.items()),
        f"- {where_made(environments)}.",
        "",
    ]


def where_made(environments: Sequence[Mapping[str, Any]]) -> str:
    """Return the devices, torch versions and commits of runs."""
    devices = dict.fromkeys(environment["device"] for environment in environments)
    versions = dict.fromkeys(f"torch {environment['versions']['torch']}" for environment in environments)
    commits = dict.fromkeys(f"`{(environment['commit'] or 'unknown')[:10]}`" for environment in environments)
    changed = " with uncommitted changes" if any(e["uncommitted_changes"] for e in environments) else ""
    return f"{', '.join(devices)}; {', '.join(versions)}; commit {', '.join(commits)}{changed}"


def unlike_paper(config: Config, published: str) -> str:
    """Return how a run's inputs and size differ from the paper's row `published` in paper.PUBLISHED."""
    parts = []
    if published == "both" and config.branch != "both":
        parts.append(f"{describe_model(config)} alone")
    for switch, encoder in (("use_language_encoder", "language_encoder"), ("use_img_encoder", "img_encoder")):
        if getattr(config, switch) and getattr(config, encoder) != ENCODERS[encoder]:
            parts.append(f"{encoder} {getattr(config, encoder)} instead of {ENCODERS[encoder]}")
    if config.model_code == "fmrlrec" and config.mrl_hidden_sizes[-1] != Config.mrl_hidden_sizes[-1]:
        parts.append(f"largest size {config.mrl_hidden_sizes[-1]} instead of {Config.mrl_hidden_sizes[-1]}")
    return ", ".join(parts)


# ----------------------------------------------------------------------------------------------------------------- rows
# Which kept runs belong to which row of an experiment, and which rows are comparable.


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


# --------------------------------------------------------------------------------------------------------- significance
# Whether one model is better than another: a paired bootstrap over users, and Welch's t test over seeds.
#
# The bootstrap (Efron and Tibshirani 1993; in information retrieval Sakai 2006) asks whether the difference of these
# trained models would hold for other users; Welch's test (1947), whether it would hold for other seeds. U users.

DRAWS = 10_000
AT_ONCE = 500  # draws held in memory at once


class Difference(NamedTuple):
    """Mean of a paired difference, its 95 % interval, and its two-sided p value."""

    mean: float
    low: float
    high: float
    p: float


def user_metrics(ranks: np.ndarray, name: str) -> np.ndarray:
    """Return Recall@K, NDCG@K or MRR@K of every user: ranks [U] from 1 -> [U].

    Their means equal the metrics of trainer/evaluation.py.
    """
    metric, _, k = name.partition("@")
    value = {"Recall": lambda: np.ones_like(ranks), "NDCG": lambda: 1 / np.log2(ranks + 1), "MRR": lambda: 1 / ranks}
    return np.where(ranks <= int(k), value[metric](), 0.0)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, draws: int = DRAWS) -> Difference:
    """Return the mean of a - b over users [U], with users resampled `draws` times.

    Users with equal differences are interchangeable, so a draw is multinomial over the distinct differences. p is
    twice the smaller share of draws on either side of 0 (a share of 0 counts as one draw).
    """
    values, counts = np.unique(a - b, return_counts=True)
    random = np.random.default_rng(0)
    parts = [min(AT_ONCE, draws - start) for start in range(0, draws, AT_ONCE)]
    drawn = np.concatenate([random.multinomial(len(a), counts / len(a), size=n) @ values for n in parts]) / len(a)
    low, high = np.quantile(drawn, [0.025, 0.975])
    below, above = (drawn <= 0).mean(), (drawn >= 0).mean()
    return Difference(
        float((a - b).mean()), float(low), float(high), float(min(1, 2 * max(min(below, above), 1 / draws)))
    )


class Welch(NamedTuple):
    """Welch's t statistic, its degrees of freedom, and its two-sided p value."""

    t: float
    freedom: float
    p: float


def welch_test(a: Sequence[float], b: Sequence[float]) -> Welch | None:
    """Compare the means of a metric over seeds; None with fewer than two seeds of either, or without any variance.

    Seeds are not paired: the same seed draws other weights for models of other shapes.
    """
    if min(len(a), len(b)) < 2 or not (variance := np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)):
        return None
    parts = [(np.var(x, ddof=1) / len(x)) ** 2 / (len(x) - 1) for x in (a, b)]
    t, freedom = (np.mean(a) - np.mean(b)) / np.sqrt(variance), variance**2 / sum(parts)
    return Welch(float(t), float(freedom), student_p(float(t), float(freedom)))


def student_p(t: float, freedom: float) -> float:
    """Return the two-sided p value of Student's t: the density's integral over |x| > |t|, with x = √ν tan φ."""

    def integral(start: float) -> float:
        steps = np.linspace(start, np.pi / 2, 20_001)
        return (np.cos((steps[1:] + steps[:-1]) / 2) ** (freedom - 1)).mean() * (np.pi / 2 - start)

    return float(integral(np.arctan(abs(t) / np.sqrt(freedom))) / integral(0.0))


# ------------------------------------------------------------------------------------------------------------ REPORT.md
# The reproduction in the form of a report, written from report_template.md and kept results. The template has fields in
# double braces:
#
#     {{dataset; experiment; row; size; metric}}                 the test metric of the kept row, mean ± sd over seeds
#     {{dataset; experiment; row; size; metric; against KEY}}    its difference from paper.PUBLISHED[KEY]
#     {{dataset; experiment; row; setting NAME}}                 a setting of the row
#     {{dataset; experiment; row - row; metric}}                 the difference of two rows at their sizes, with p
#
# Rows that were not run read "not run".

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
# Comparison with the best published results, per dataset and protocol.

DATASETS = ("beauty", "clothing", "sports", "toys")
METRICS = ("Recall@10", "NDCG@10")
# Our rows: experiment, row, what the model reads.
OURS = (
    ("plus", "taught and adjusted", "text, ids"),
    ("plus", "plus, taught by three", "text, ids"),
    ("plus", "plus", "text, ids"),
    ("plus", "plus without bias", "text, ids"),
    ("plus", "plus to 1024, exact softmax", "text, ids"),
    ("plus", "faithful to 1024", "text"),
    ("id_baselines", "plus without text, 256", "ids"),
    ("id_baselines", "SASRec, 256", "ids"),
    ("id_baselines", "LRURec, 256", "ids"),
)


def ours(runs: list[KeptRun], dataset: str, experiment: str, name: str) -> ResultRow | None:
    """Return the kept row of an experiment that has the most seeds, the newest of them; None if it was not run."""
    rows = [row for row in result_rows(definitions()[experiment], dataset, runs) if row.row.name == name]
    return max(rows, key=lambda row: (len(row.runs), row.runs[-1].name), default=None)


def best_section(runs: list[KeptRun]) -> list[str]:
    """Return the comparison with the best published results as Markdown lines."""
    lines = [
        "## Compared with the best published results",
        "",
        "Full ranking and leave-one-out on the same files; the two protocols are never mixed. The last two columns "
        "compare with the best published value of the column; a dash means not published.",
        "",
    ]
    for dataset in DATASETS:
        for protocol, published in BEST.items():
            lines += [
                f"### {dataset}, history {protocol}",
                "",
                *markdown(_best_table(runs, dataset, protocol, published)),
            ]
    return lines


def _best_table(runs: list[KeptRun], dataset: str, protocol: str, published: tuple) -> pd.DataFrame:
    known = [(name, inputs, scores[dataset]) for name, inputs, scores in published if dataset in scores]
    best = [max((value for *_, found in known if (value := found[i]) is not None), default=np.nan) for i in (0, 1)]
    rows = [[name, inputs, "", *("-" if value is None else f"{value:.4f}" for value in found), "", ""]
            for name, inputs, found in known]  # fmt: skip
    for experiment, name, inputs in OURS:
        found = ours(runs, dataset, experiment, name)
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


# ----------------------------------------------------------------------------------------------------------- deployment
# A run's deployment card, as benchmarks/deploy.py measures it. experiments/figures.py draws it.

DIGITS = {"resident_mb": "MB in memory 0", "load_s": "load s 2", "p50_ms": "p50 ms 2", "p95_ms": "p95 ms 2",
          "step_p50_ms": "event p50 ms 2", "batch256_p50_ms": "256 users p50 ms 0",
          "batch256_p95_ms": "256 users p95 ms 0", "Recall@10": "Recall@10 4", "NDCG@10": "NDCG@10 4"}  # fmt: skip


def card_table(card: dict[str, Any]) -> list[str]:
    """Return the card as Markdown lines: a table, and sentences on large catalogues."""
    rows = pd.DataFrame(card["rows"])
    full = rows.groupby("size")["NDCG@10"].transform("first")
    table = pd.DataFrame(
        {
            "size": rows["size"].map(str),
            "engine": rows["engine"],
            "stored as": rows["quantize"].replace("none", "float32"),
            "MB on disk": (rows["bytes"] / 1e6).map("{:.2f}".format),
        }
    )
    for name, column in DIGITS.items():
        heading, _, digits = column.rpartition(" ")
        table[heading] = rows[name].map(f"{{:.{digits}f}}".format)
    by_torch = rows["same_top10_as_torch"] if "same_top10_as_torch" in rows else pd.Series(index=rows.index)
    for heading, shares in {
        "NDCG@10 lost": (1 - rows["NDCG@10"] / full).where(full > 0),
        "same top 10": rows["same_top10"],
        "same as torch": by_torch,
    }.items():
        table[heading] = ["" if pd.isna(share) else f"{share:.2%}" for share in shares]
    lines = markdown(table, text=(1, 2))
    if large := card["large_catalogue"]:
        lines += [
            f"Size {large['size']} (onnx, float16) with {large['items']:,} items, most of them made up: top 10 in "
            f"{large['p50_ms']:.1f} ms (p95 {large['p95_ms']:.1f}), {large['resident_mb']:.0f} MB in memory (peak "
            f"{large['peak_mb']:.0f}, with 256 users), loaded in {large['load_s']:.2f} s.",
            "",
        ]
    added = [row["add_10000_s"] for row in card["rows"] if row["add_10000_s"] is not None]
    if added:
        lines += [f"Adding 10,000 items takes {min(added):.2f} to {max(added):.2f} s, depending on the size.", ""]
    return lines


def deployment_section(runs: list[KeptRun]) -> list[str]:
    """Return the report's part on deployment as Markdown lines; empty if no run has a card."""
    lines: list[str] = []
    for run in runs:
        if card := run.record.get("deployment"):
            environment, versions = card["environment"], card["environment"]["versions"]
            lines += [
                f"### deploy of {run.name}",
                "",
                *card_table(card),
                f"- {card['users']:,} users; {environment['device']}; torch {versions['torch']}, onnxruntime "
                f"{versions['onnxruntime']}; commit `{(environment['commit'] or 'unknown')[:10]}`.",
                "",
                f"![NDCG@10 against bytes and time](../media/deploy-{run.config.dataset_code}.png)",
                "",
            ]
    heading = [
        "## What every size costs to serve",
        "",
        "`python -m benchmarks.deploy` measures the time of one answer (p50, p95), of one event with the answer after "
        "it, and of 256 users together. Metrics keep the history as candidates. *Same top 10*: the share of users who "
        "get the same ten items as from float32 in torch; *same as torch*: as from torch on the same file.",
        "",
    ]
    return [*heading, *lines] if lines else []


# ----------------------------------------------------------------------------------------------------------- parameters
# How many parameters one nested training saves: the paper's Figure 4, and the same for the models here.

SMALLEST = 128  # the smallest size that the figure counts
PAPER_FEATURES = 2048  # bge-large's and SigLIP's, side by side


def paper_parameters(dim: int) -> int:
    """Return the parameters of a 2-block model as the figure counts them, which reproduces it to the digit.

    A block has 5 square weights, 5 biases and 3 vectors of the LRU; a complex number counts once. LayerNorms, the
    projection and the item table do not count.
    """
    return 2 * (5 * dim**2 + 5 * dim + 3 * dim)


def stored_parameters(dim: int, projection: bool = True) -> int:
    """Return the numbers in the file of a 2-block model here.

    A complex number counts twice, and masked zeros count. projection: include the projection of the paper's encoders.
    """
    square, vector = 3 + 4, 3 + 3 + 3 + 4  # feed-forward, B and C; their biases, ν θ γ, LayerNorms
    return 2 * (square * dim**2 + vector * dim) + projection * (PAPER_FEATURES + 1) * dim


def unmasked_parameters(sizes: tuple[int, ...], projection: bool = True) -> int:
    """Return the parameters of a model here as model.count_parameters does: complex ones once, masked ones not."""
    dim, below = sizes[-1], (0, *sizes)
    square = sum((high - low) * high for low, high in zip(below, sizes, strict=False))
    return 2 * (5 * square + 5 * dim + 3 * dim + 4 * dim) + projection * (PAPER_FEATURES + 1) * dim


def share_saved(of_separate: list[int], of_one: int) -> float:
    """Return the figure's R_s: the extra parameters of separate models, relative to the one nested model."""
    return sum(of_separate) / of_one - 1


def figure4() -> list[tuple[int, float, float, float]]:
    """Return (largest size, R_s by the paper's formula, R_s of the files here, R_s of the unmasked parameters)."""
    rows = []
    for largest in SAVED:
        sizes = tuple(SMALLEST * 2**i for i in range((largest // SMALLEST).bit_length()))
        rows.append(
            (
                largest,
                share_saved([paper_parameters(m) for m in sizes], paper_parameters(largest)),
                share_saved([stored_parameters(m) for m in sizes], stored_parameters(largest)),
                share_saved([unmasked_parameters((m,)) for m in sizes], unmasked_parameters(sizes)),
            )
        )
    return rows


def parameters_section() -> list[str]:
    """Return the report's part on Figure 4 as Markdown lines."""
    columns = ["sizes", "its formula", "files here", "without masked zeros"]
    table = pd.DataFrame(figure4(), columns=columns)
    table.insert(1, "paper", SAVED.values())
    sizes = [f"{SMALLEST}..{largest}" if largest > SMALLEST else f"{SMALLEST}" for largest in table.pop("sizes")]
    table = table.map("{:.2%}".format)
    table.insert(0, "sizes", sizes)
    return [
        "## Figure 4: parameters that one training for all sizes saves",
        "",
        "Separate models of every size hold this many more parameters than the one nested model. The paper's formula "
        "counts five square weights a block. A file here holds B and C twice (real and imaginary parts), LayerNorms, "
        f"and the projection of {PAPER_FEATURES} features, which grows with the size and not with its square. The last "
        "column counts complex numbers once and leaves out the zeros that the mask makes in the nested model.",
        "",
        *markdown(table),
    ]
