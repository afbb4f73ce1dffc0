"""The kept files of runs, results/<dataset>-<run>/: all that the report reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from config import Config, InputError
from datasets.files import read_json
from experiments.plan import trained
from trainer.runs import read_config, read_log, unfinished
from trainer.user_ranks import load_ranks

RESULTS = Path(__file__).parent / "results"
MASKED = "_history_masked"
TESTED = ("test_mrl_metrics.json", "test_ranks.npz")  # what a test writes, and with MASKED the one without the history
ALSO = ("deploy.json", "deploy.png", "cold_items.json")  # where they were made

Metrics = dict[int, dict[str, float]]  # size -> name -> value


@dataclass(frozen=True)
class KeptRun:
    """A run's kept files."""

    folder: Path
    config: Config

    @cached_property
    def environment(self) -> dict[str, Any]:
        return read_json(self.folder / "env.json", "keep the run again")

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        return read_log(self.folder)

    def metrics(self, masked: bool = False) -> Metrics:
        """The test metrics of every size; empty where that test was not made."""
        path = self.folder / f"test_mrl_metrics{MASKED * masked}.json"
        if masked and not path.exists():
            return {}
        return {int(size): values for size, values in read_json(path, "keep the run again").items()}

    def ranks(self, masked: bool = False) -> tuple[dict[int, np.ndarray], np.ndarray] | None:
        """size -> the rank of every user, and how often each user's item was trained on; None where it was not kept."""
        path = self.folder / f"test_ranks{MASKED * masked}.npz"
        return load_ranks(path) if path.exists() else None


def kept_runs(results: Path) -> list[KeptRun]:
    """All kept runs, by name."""
    folders = sorted(path.parent for path in results.glob("*/config.json"))
    return [KeptRun(folder, read_config(folder)[0]) for folder in folders]


def keep(run: Path, results: Path) -> None:
    """Copy a finished run's small files to <results>/<dataset>-<run>/. Raises InputError for an unfinished one."""
    config, _ = read_config(run)
    if progress := unfinished(run):
        raise InputError(f"{run} is not finished ({progress}); train.py --resume {run} finishes it")
    target = results / f"{config.dataset_code}-{run.name}"
    target.mkdir(parents=True, exist_ok=True)
    tests = [name.replace(".", f"{MASKED * masked}.") for name in TESTED for masked in (False, True)]
    for name in ("config.json", "env.json", "log.jsonl", "test_metrics.json", *tests, *ALSO):
        if (run / name).exists():
            shutil.copyfile(run / name, target / name)


def untested(run: Path) -> list[list[str]]:
    """The flags of eval.py for every test that a trained run still lacks."""
    return [
        ["--mask_history"] if masked else []
        for masked in (False, True)
        if not all((run / name.replace(".", f"{MASKED * masked}.")).exists() for name in TESTED)
    ]


def same_run(config: Config, runs_root: Path, results: Path) -> tuple[Path | None, str]:
    """The run, kept or not, that trains what these settings do, and what is to be done with it: "finished", "to keep",
    "to test", "to continue"; (None, "to start") where there is none. The furthest one, where there are several."""
    states = ("finished", "to keep", "to test", "to continue")
    found = [
        (_state(run, results), run) for run, other in _runs(runs_root, results) if trained(other) == trained(config)
    ]
    if not found:
        return None, "to start"
    state, run = min(found, key=lambda pair: states.index(pair[0]))
    return run, state


def _runs(runs_root: Path, results: Path) -> Iterator[tuple[Path, Config]]:
    """All runs whose settings can be read, kept ones first."""
    for path in (*sorted(results.glob("*/config.json")), *sorted(runs_root.glob("*/*/config.json"))):
        try:
            yield path.parent, read_config(path.parent)[0]
        except InputError:  # of another version of this code
            continue


def _state(run: Path, results: Path) -> str:
    if unfinished(run):
        return "to continue"
    if run.parent == results:
        return "finished"
    if untested(run):
        return "to test"
    return "to keep"


def epoch_seconds(config: Config, runs_root: Path, results: Path) -> float | None:
    """The time of an epoch in the newest run that does the same work in one; None where there is none."""
    work = (
        "dataset_code",
        "model_code",
        "mrl_hidden_sizes",
        "lru_num_blocks",
        "train_batch_size",
        "precision",
        "branch",
    )
    alike = [
        read_log(run)[-1]
        for run, other in _runs(runs_root, results)
        if all(getattr(config, name) == getattr(other, name) for name in work)
        and bool(config.num_negatives) == bool(other.num_negatives)
        and read_log(run)
    ]
    return alike[-1]["seconds"] / alike[-1]["epoch"] if alike else None
