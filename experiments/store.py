"""Kept results of finished runs, in a folder of few files that the report reads.

metrics.csv           a line per run, split, protocol and size, a column per metric. split: val (the best epoch) or
                      test. protocol: kept or masked (the user's history is excluded from the candidates)
runs.jsonl            a line per run: settings and their sources, environment, epochs and times; deployment,
                      cold_items and cut if they were measured
ranks.npz             the rank of every user's target, for runs that an experiment compares user by user
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from common.errors import InputError
from common.files import Count, Number, Positive, check_schema, read_json, read_json_lines, replacing, write_text
from common.settings import check_types
from config import Config
from experiments.definition import compares_users
from experiments.paper import MASKED
from trainer.runs import (
    COLD_ITEMS,
    CUT,
    DEPLOYMENT,
    EVERY_SIZE,
    TRAINED,
    USER_RANKS,
    Cut,
    DeployedSize,
    Environment,
    decoded,
    read_arrays,
    read_best_epoch,
    read_config,
    read_environment,
    read_log,
    read_metrics,
    result_file,
    unfinished,
    untrained,
)

if TYPE_CHECKING:
    import pandas as pd

METRICS, RUNS, RANKS = "metrics.csv", "runs.jsonl", "ranks.npz"
KEYS = ["run", "dataset", "split", "protocol", "size"]  # columns of metrics.csv; the others are metrics
SPLITS, PROTOCOLS = ("val", "test"), ("kept", "masked")
DIGITS = "%.8f"  # of a metric
EXTRAS = {"deployment": DEPLOYMENT, "cold_items": COLD_ITEMS, "cut": CUT}
HINT = "restore it from version control, or remove the line and keep its run again"


class MeasuredSize(DeployedSize, rename={"ndcg": "NDCG@10", "recall": "Recall@10"}):
    """A row of deploy.json, as benchmarks/deploy.py writes it."""

    resident_mb: Number
    load_s: Number
    p95_ms: Number
    step_p50_ms: Number
    batch256_p50_ms: Number
    batch256_p95_ms: Number
    add_10000_s: Number | None
    recall: Number
    same_top10: Number
    same_top10_as_torch: Number | None = None


class LargeCatalogue(Struct):
    """The measurement of a large catalogue in deploy.json."""

    size: Positive
    items: Count
    p50_ms: Number
    p95_ms: Number
    resident_mb: Number
    peak_mb: Number
    load_s: Number


class Facts(Environment, kw_only=True):
    """The environment that the report needs."""

    command: list[str]
    commit: str | None
    uncommitted_changes: bool
    device: str
    versions: dict[str, str | None]


class Machine(Struct):
    """What deploy.json was measured with."""

    device: str
    commit: str | None
    versions: dict[str, str | None]


class Card(Struct):
    """deploy.json."""

    dataset: str
    users: Count
    environment: Machine
    rows: Annotated[list[MeasuredSize], Meta(min_length=1)]
    large_catalogue: LargeCatalogue | None


class ColdItems(Struct):
    """cold_items.json."""

    size: Positive
    items: Count
    held_out: Count
    users: dict[str, dict[str, Number]]


class Record(Struct):
    """A line of runs.jsonl."""

    run: str
    settings: dict[str, Any]
    sources: dict[str, str]
    environment: Facts
    epochs: Positive
    best_epoch: Count
    seconds: Number
    train_seconds: Number
    deployment: Card | None = None
    cold_items: ColdItems | None = None
    cut: Cut | None = None


@dataclass(frozen=True, eq=False)
class KeptRun:
    """A kept run: its settings, how it was made, and its metrics by size.

    test, validation: indexed by size, a column per metric. Metrics with the history masked end in MASKED.
    """

    name: str
    config: Config
    record: dict[str, Any]
    test: pd.DataFrame
    validation: pd.DataFrame
    results: Path = field(repr=False)

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Return the environment of the run's start and of every resume."""
        environment = self.record["environment"]
        return [environment, *environment.get("resumed", [])]

    @property
    def data(self) -> str | None:
        """Return the digest of the dataset; None for runs older than the digest."""
        return self.record["environment"].get("data")

    @property
    def tested(self) -> bool:
        return any(not name.endswith(MASKED) for name in self.test.columns)

    def complete(self) -> bool:
        """Return whether both tests are kept, with user ranks if an experiment compares them."""
        if not self.tested or not any(name.endswith(MASKED) for name in self.test.columns):
            return False
        return not compares_users(self.config) or all(self.ranks(masked) for masked in (False, True))

    def ranks(self, masked: bool = False) -> dict[int, np.ndarray] | None:
        """Return size -> the rank of every user [U], infinite beyond the last cut-off; None if not kept."""
        prefix = f"{self.name}/{PROTOCOLS[masked]}/"
        arrays = _arrays(self.results / RANKS)
        found = {name: saved for name, saved in arrays.items() if name.startswith(prefix)}
        return {int(name.removeprefix(prefix)): decoded(saved) for name, saved in found.items()} or None

    def times_trained(self) -> np.ndarray:
        """Return how often every user's target occurs in training [U]."""
        return _arrays(self.results / RANKS)[f"{TRAINED}/{self.data}"].astype(np.int64)


def kept_runs(results: Path) -> list[KeptRun]:
    """Return all kept runs, sorted by name; none if the store does not exist yet.

    Raises InputError that names the damaged file and line.
    """
    if not (results / RUNS).exists():
        return []
    records = _read_records(results / RUNS)
    metrics = _read_metrics(results / METRICS).groupby("run")
    runs = []
    for number, (name, record) in enumerate(records.items(), start=1):
        where = f"{results / RUNS}:{number}"
        try:
            config = Config(**check_types(Config, record["settings"], "its settings"))
        except InputError as error:
            raise InputError(f"{where} (run {name}): {error}; {HINT}") from None
        if name not in metrics.groups:
            raise InputError(f"{where}: {results / METRICS} has no line of run {name}; {HINT}")
        rows = metrics.get_group(name)
        test, masked = (_by_size(rows, "test", protocol) for protocol in PROTOCOLS)
        test = test.join(masked.add_suffix(MASKED), how="outer")
        validation = _by_size(rows, "val", PROTOCOLS[config.val_mask_history])
        runs.append(KeptRun(name, config, record, test, validation, results))
    return sorted(runs, key=lambda run: run.name)


def keep(run: Path, results: Path, tests: bool = True) -> None:
    """Add a finished run to the store, or replace its lines if it has gained results.

    tests: whether a run that asked for a test must have it. Raises InputError for an unfinished run, for a run that
    is kept already, and if another run of the same name is kept.
    """
    from filelock import FileLock

    config, sources = read_config(run)
    if progress := unfinished(run) if tests else untrained(run):
        raise InputError(f"{run} is not finished ({progress}); train.py --resume {shlex.quote(str(run))} finishes it")
    name = f"{config.dataset_code}-{run.name}"
    record = _record(name, run, config, sources)
    check_schema(record, Record, f"the record of {run}", "train it again")
    rows = _metric_rows(name, run, config)
    results.mkdir(parents=True, exist_ok=True)
    with FileLock(results.with_name(f".{results.name}.lock")):
        records = _read_records(results / RUNS) if (results / RUNS).exists() else {}
        before = records.get(name)
        if before and before["environment"].get("started") != record["environment"].get("started"):
            raise InputError(f"another run is kept as {name}; rename {run}, or remove its lines from {results}")
        records[name] = (before or {}) | record
        changed = _keep_ranks(name, run, config, record["environment"].get("data"), results)
        changed |= _keep_metrics(name, rows, results / METRICS)
        if not changed and records[name] == before:
            raise InputError(f"{name} is kept already in {results}, and {run} has nothing new")
        # runs.jsonl comes last: with its line the run is kept.
        lines = [json.dumps(records[name], ensure_ascii=False) for name in sorted(records)]
        write_text(results / RUNS, "\n".join(lines) + "\n")


def _record(name: str, run: Path, config: Config, sources: dict[str, str]) -> dict[str, Any]:
    """Return a run's line of runs.jsonl."""
    log = read_log(run)
    last = log[-1]
    record = {
        "run": name,
        "settings": vars(config),
        "sources": sources,
        "environment": read_environment(run),
        "epochs": last["epoch"],
        "best_epoch": last["best_epoch"],
        "seconds": last["seconds"],
        "train_seconds": last["train_seconds"],
    }
    record |= {key: read_json(run / file, "measure it again") for key, file in EXTRAS.items() if (run / file).exists()}
    return json.loads(json.dumps(record))  # tuples as lists


def _metric_rows(name: str, run: Path, config: Config) -> list[dict[str, Any]]:
    """Return a run's lines of metrics.csv: the best epoch's validation, and the tests that were made."""
    best = read_best_epoch(run)
    found = {("val", PROTOCOLS[config.val_mask_history]): best.get("val", {})}
    for masked, protocol in enumerate(PROTOCOLS):
        path = run / result_file(EVERY_SIZE, bool(masked))
        if path.exists():
            found["test", protocol] = read_metrics(path, "test the run again")
    by_time = read_environment(run).get("split")
    dataset = f"{config.dataset_code}, {by_time}" if by_time else config.dataset_code
    return [
        dict(zip(KEYS, (name, dataset, split, protocol, int(size)), strict=True)) | metrics
        for (split, protocol), by_size in found.items()
        for size, metrics in by_size.items()
    ]


def _keep_metrics(name: str, rows: list[dict[str, Any]], path: Path) -> bool:
    """Write a run's lines of metrics.csv in place of its earlier ones; return whether anything changed."""
    import pandas as pd

    before = path.read_text(encoding="utf-8") if path.exists() else ""
    frames = [pd.DataFrame(rows)]
    if before:
        kept = _read_metrics(path)
        frames = [kept[kept["run"] != name], *frames]
    text = pd.concat(frames).sort_values(KEYS).to_csv(index=False, float_format=DIGITS, lineterminator="\n")
    if text != before:
        write_text(path, text)
    return text != before


def _keep_ranks(name: str, run: Path, config: Config, data: str | None, results: Path) -> bool:
    """Add the ranks of a run's users if an experiment compares them; return whether anything changed."""
    if not compares_users(config) or data is None:
        return False
    path = results / RANKS
    before = _arrays(path)
    found: dict[str, np.ndarray] = {}
    for masked, protocol in enumerate(PROTOCOLS):
        arrays = dict(_arrays(run / result_file(USER_RANKS, bool(masked))))
        if arrays:
            found[f"{TRAINED}/{data}"] = arrays.pop(TRAINED)
            found |= {f"{name}/{protocol}/{size}": doubled for size, doubled in arrays.items()}
    if all(key in before and np.array_equal(before[key], array) for key, array in found.items()):
        return False
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **before | found)  # type: ignore[arg-type]  # none of the names is allow_pickle
    return True


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a .npz file; none if it does not exist."""
    return _load_arrays(path, path.stat().st_mtime_ns) if path.exists() else {}


@lru_cache(maxsize=4)
def _load_arrays(path: Path, modified: int) -> dict[str, np.ndarray]:
    return read_arrays(path, HINT)


def _by_size(rows: pd.DataFrame, split: str, protocol: str) -> pd.DataFrame:
    """Return the metrics of one split and protocol, indexed by size; no columns if there are none."""
    found = rows[(rows["split"] == split) & (rows["protocol"] == protocol)].set_index("size").drop(columns=KEYS[:-1])
    return found.dropna(axis="columns", how="all")


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Return name -> line of runs.jsonl, in the file's order."""
    records: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(read_json_lines(path, Record, HINT), start=1):
        if record["run"] in records:
            raise InputError(f"{path}:{number} repeats run {record['run']}; {HINT}")
        records[record["run"]] = record
    return records


def _read_metrics(path: Path) -> pd.DataFrame:
    """Return metrics.csv, with sizes as integers and metrics as floats (NaN if empty)."""
    import pandas as pd

    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise InputError(f"{path} cannot be read ({str(error).strip()}); {HINT}") from None
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first cells for an index
        raise InputError(f"{path}:2 has more cells than the header; {HINT}")
    if missing := [name for name in KEYS if name not in frame.columns]:
        raise InputError(f"{path} has no column {missing[0]!r}; {HINT}")
    metrics = frame.columns.drop(KEYS)
    text = frame[["size", *metrics]]
    frame[text.columns] = text.apply(pd.to_numeric, errors="coerce")
    problems = {
        "names no run": frame["run"] == "",
        f"has a split other than {' and '.join(SPLITS)}": ~frame["split"].isin(SPLITS),
        f"has a protocol other than {' and '.join(PROTOCOLS)}": ~frame["protocol"].isin(PROTOCOLS),
        "has a size that is no whole number from 1": ~(frame["size"] >= 1) | (frame["size"] % 1 != 0),
        "has a metric that is no number": ((frame[metrics].isna() & (text[metrics] != ""))
                                           | np.isinf(frame[metrics])).any(axis="columns"),
        "repeats another line's run, split, protocol and size": frame.duplicated(KEYS),
    }  # fmt: skip
    for problem, rows in problems.items():
        if rows.any():
            raise InputError(f"{path}:{int(rows.idxmax()) + 2} {problem}; {HINT}")
    return frame.astype({"size": int} | dict.fromkeys(metrics, float))
