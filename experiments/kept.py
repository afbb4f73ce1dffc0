"""The kept files of runs, results/<dataset>-<run>/: all that the report reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import read_json, replacing
from config import Config
from experiments.definition import identity
from trainer.runs import (
    COLD_ITEMS,
    CONFIG,
    DEPLOYMENT,
    DEPLOYMENT_PICTURE,
    ENVIRONMENT,
    EVERY_SIZE,
    LARGEST,
    LOG,
    USER_RANKS,
    check_data,
    of_test,
    read_config,
    read_log,
    unfinished,
    untrained,
)
from trainer.user_ranks import load_ranks

RESULTS = Path(__file__).parent / "results"
TESTED = (EVERY_SIZE, USER_RANKS)  # what is read of a test, with the history kept or masked
ALSO = (DEPLOYMENT, DEPLOYMENT_PICTURE, COLD_ITEMS)  # where they were made
FACTS = ("command", "commit", "uncommitted_changes", "device", "versions")  # of env.json, in the report

Metrics = dict[int, dict[str, float]]  # size -> name -> value


@dataclass(frozen=True)
class KeptRun:
    """A run's kept files."""

    folder: Path
    config: Config

    @cached_property
    def environment(self) -> dict[str, Any]:
        path = self.folder / ENVIRONMENT
        found = read_json(path, "keep the run again")
        if missing := [name for name in FACTS if name not in found]:
            raise InputError(f"{path} lacks {missing[0]!r}; keep the run again")
        return found

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Where and by which code it was trained: as it began, and as it was resumed."""
        return [self.environment, *self.environment.get("resumed", [])]

    @property
    def data(self) -> str | None:
        """The digest of the dataset; None of a run from before it was noted."""
        return self.environment.get("data")

    @property
    def tested(self) -> bool:
        return (self.folder / TESTED[0]).exists()

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        if not (found := read_log(self.folder)):
            raise InputError(f"{self.folder / LOG} is missing or empty; keep the run again")
        return found

    def metrics(self, masked: bool = False) -> Metrics:
        """The test metrics of every size; empty where that test was not made."""
        path = self.folder / of_test(EVERY_SIZE, masked)
        if masked and not path.exists():
            return {}
        return {int(size): values for size, values in read_json(path, "keep the run again").items()}

    def validation(self) -> Metrics:
        """The validation metrics of every size after the best epoch."""
        (best,) = (record for record in self.log if record["epoch"] == self.log[-1]["best_epoch"])
        return {int(size): values for size, values in best["val"].items()}

    def ranks(self, masked: bool = False) -> tuple[dict[int, np.ndarray], np.ndarray] | None:
        """size -> the rank of every user, and how often each user's item was trained on; None where it was not kept."""
        path = self.folder / of_test(USER_RANKS, masked)
        return load_ranks(path, "keep the run again") if path.exists() else None


def kept_runs(results: Path) -> list[KeptRun]:
    """All kept runs, by name."""
    folders = sorted(path.parent for path in results.glob(f"*/{CONFIG}"))
    return [KeptRun(folder, read_config(folder)[0]) for folder in folders]


def keep(run: Path, results: Path, tests: bool = True) -> None:
    """Copy a finished run's small files to <results>/<dataset>-<run>/. Raises InputError for an unfinished one. tests:
    whether one that asked for a test must have it."""
    config, _ = read_config(run)
    if progress := unfinished(run) if tests else untrained(run):
        raise InputError(f"{run} is not finished ({progress}); train.py --resume {run} finishes it")
    target = results / f"{config.dataset_code}-{run.name}"
    of_tests = [of_test(name, masked) for name in TESTED for masked in (False, True)]
    # CONFIG comes last: with it the folder is a kept run.
    for name in (ENVIRONMENT, LOG, LARGEST, *of_tests, *ALSO, CONFIG):
        if (run / name).exists():
            with replacing(target / name) as temporary:
                shutil.copyfile(run / name, temporary)


def untested(run: Path) -> list[list[str]]:
    """The flags of eval.py for every test that a trained run still lacks."""
    return [
        ["--mask_history"] if masked else []
        for masked in (False, True)
        if not all((run / of_test(name, masked)).exists() for name in TESTED)
    ]


def same_run(
    config: Config, runs_root: Path, results: Path, data: str | None = None, tests: bool = True
) -> tuple[Path | None, str]:
    """The run, kept or not, that trains what these settings do, and what is to be done with it: "finished", "to keep",
    "to test", "kept in part" (without one of its tests, and the run itself is gone), "to continue"; (None, "to start")
    where there is none. The furthest one, where there are several. data: the digest of the dataset as it is here; a run
    on another one is none of these. tests: whether it has to be tested."""
    states = ("finished", "to keep", "to test", "kept in part", "to continue")
    found = [
        (_state(run, results, tests), run)
        for run, other in readable_runs(runs_root, results)
        if identity(other) == identity(config) and _is_on(run, data)
    ]
    found = [pair for pair in found if pair[0]]
    if not found:
        return None, "to start"
    state, run = min(found, key=lambda pair: states.index(pair[0]))
    return run, state


def unusable(runs_root: Path, results: Path) -> list[str]:
    """Of every run, kept or not, that `same_run` cannot use, why."""
    problems = []
    for path in _configs(runs_root, results):
        try:
            read_config(path.parent)
            if path.parent.parent == results and (progress := untrained(path.parent)):
                problems.append(f"{path.parent} lacks files of its run ({progress})")
        except InputError as error:
            problems.append(str(error))
    return problems


def readable_runs(runs_root: Path, results: Path) -> Iterator[tuple[Path, Config]]:
    """All runs whose settings can be read, kept ones first."""
    for path in _configs(runs_root, results):
        try:
            yield path.parent, read_config(path.parent)[0]
        except InputError:  # of another version of this code
            continue


def _configs(runs_root: Path, results: Path) -> list[Path]:
    return [*sorted(results.glob(f"*/{CONFIG}")), *sorted(runs_root.glob(f"*/*/{CONFIG}"))]


def _is_on(run: Path, data: str | None) -> bool:
    """Whether a run is on the dataset of this digest, for all that is known."""
    try:
        if data is not None:
            check_data(run, data)
    except InputError:
        return False
    return True


def _state(run: Path, results: Path, tests: bool) -> str:
    kept = run.parent == results
    if unfinished(run) if tests else untrained(run):
        return "" if kept else "to continue"  # kept files alone cannot be trained on
    if tests and (lacking := untested(run)):
        if kept:
            return "kept in part" if [] not in lacking else ""  # and not tested either
        return "to test"
    return "finished" if kept else "to keep"
