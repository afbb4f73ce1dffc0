"""What an experiment's runs are, what there is of them already, and about how long the rest takes."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.settings import format_value
from config import EXTENSIONS, Config, resolve
from datasets.catalog import Catalog, load_catalog
from experiments import estimate
from experiments.definition import Definition, Row, definitions, identity
from experiments.kept import same_run
from trainer.runs import read_log


@dataclass
class Job:
    """A training with its test, and what there is of it."""

    names: list[str]  # experiment/row of those that it is for
    flags: dict[str, Any]
    config: Config
    data: str | None = None  # the digest of its dataset, where that is prepared
    run: Path | None = None  # its folder, once there is one
    tests: bool = False  # whether one of those is about the test set
    state: str = ""  # as kept.same_run says it, or what failed
    seconds: float | None = None  # of training still to go, at most; None: not known

    @property
    def label(self) -> str:
        return f"{self.config.dataset_code}, seed {self.config.seed}: {', '.join(self.names)}"

    @property
    def to_train(self) -> bool:
        return self.state in ("to start", "to continue")

    def set_time(self, per_epoch: float | None) -> None:
        """Set how long the epochs that are left take."""
        if per_epoch is not None:
            done = read_log(self.run)[-1:] if self.run else []
            self.seconds = per_epoch * (self.config.num_epochs - (done[0]["epoch"] if done else 0))


def chosen(arguments: argparse.Namespace) -> list[tuple[Definition, list[Row]]]:
    """The experiments and rows that were asked for. Raises InputError that names an unknown one."""
    known = definitions()
    names = list(known)
    if arguments.experiments != "all":
        names = [name.strip() for name in arguments.experiments.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"there is no experiment {name!r}; there are {', '.join(known)}, and all")
    picked = [(known[name], list(known[name].rows)) for name in names]
    if arguments.rows:
        rows = [name.strip() for name in arguments.rows.split(";")]
        there = dict.fromkeys(row.name for _, of_experiment in picked for row in of_experiment)
        if missing := [name for name in rows if name not in there]:
            raise InputError(f"there is no row {missing[0]!r} in {arguments.experiments}; there are {'; '.join(there)}")
        picked = [(definition, [row for row in all_rows if row.name in rows]) for definition, all_rows in picked]
    return picked


def seeds_of(text: str) -> list[int]:
    """The seeds of "42,43". Raises InputError for what is no whole number."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"--seeds {text!r} must be whole numbers with commas, such as 42,43,44") from None


def planned(experiments: list[tuple[Definition, list[Row]]], flags: dict[str, Any], seeds: list[int]) -> list[Job]:
    """A job for every seed, dataset and row; rows that ask for the same training share one."""
    jobs: list[Job] = []
    asked = list(dict.fromkeys(flags["dataset_code"].split(","))) if "dataset_code" in flags else None
    for definition, rows in experiments:
        for seed in seeds:
            for dataset in asked or definition.datasets:
                for row in rows:
                    if clash := [name for name in row.settings if name in flags and flags[name] != row.settings[name]]:
                        raise InputError(
                            f"--{clash[0]} {format_value(flags[clash[0]])} is not free in {definition.name}: its row "
                            f"{row.name!r} has {format_value(row.settings[clash[0]])}"
                        )
                    own = {**flags, **row.settings, "dataset_code": dataset, "seed": seed}
                    config, _ = resolve(own)
                    beyond = [name for name in ("preset", *EXTENSIONS) if name in flags]
                    if beyond and not definition.fits(row, config):  # its run would be shown in no table
                        raise InputError(
                            f"--{beyond[0]} {format_value(flags[beyond[0]])} is not free in {definition.name}: its row "
                            f"{row.name!r} has nothing beyond the paper but what the definition names"
                        )
                    name = f"{definition.name}/{row.name}"
                    same = [job for job in jobs if identity(job.config) == identity(config)]
                    if not same:
                        same = [Job([], own, config)]
                        jobs += same
                    same[0].names.append(name)
                    same[0].tests |= not definition.validation
    return jobs


def prepared(jobs: list[Job]) -> tuple[dict[str, Catalog], list[str]]:
    """The datasets of the jobs that are prepared, by name, and why the others are not; every job is told which data it
    is on."""
    catalogs: dict[str, Catalog] = {}
    problems = []
    for name, root in dict.fromkeys((job.config.dataset_code, job.config.data_root) for job in jobs):
        try:
            catalogs[name] = load_catalog(root, name)
        except InputError as error:
            problems.append(str(error))
    for job in jobs:
        if job.config.dataset_code in catalogs:
            job.data = catalogs[job.config.dataset_code].digest()
    return catalogs, problems


def look_up(job: Job, results: Path) -> None:
    """Find the job's run, what is to be done with it, and how long that takes at most by an earlier run."""
    runs_root = Path(job.config.runs_root)
    try:
        job.run, job.state = same_run(job.config, runs_root, results, job.data, job.tests)
    except InputError as error:
        job.state = f"failed: {error}"
    if job.to_train:
        job.set_time(estimate.earlier(job.config, runs_root, results))


def measure(jobs: list[Job], catalogs: dict[str, Catalog]) -> None:
    """Time a few steps for the jobs that no earlier run is like, once for all that do the same work."""
    per_epoch: dict[tuple, float] = {}
    for job in jobs:
        if job.to_train and job.seconds is None and job.config.dataset_code in catalogs:
            work = estimate.work(job.config)
            if work not in per_epoch:
                print(f"measuring a few steps: {job.label}", file=sys.stderr, flush=True)
                per_epoch[work] = estimate.measured(job.config, catalogs[job.config.dataset_code])
            job.set_time(per_epoch[work])


def summary(jobs: list[Job], problems: list[str]) -> str:
    """How many jobs there are in which state, how long what is left takes, and the problems of their datasets."""
    states = Counter(job.state for job in jobs)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    text = f"{len(jobs)} run{'' if len(jobs) == 1 else 's'}: {counted}"
    training = [job for job in jobs if job.to_train]
    known = [job.seconds for job in training if job.seconds is not None]
    if known:
        text += f"; {duration(sum(known))} at most for {len(known)} of them, one at a time"
    if len(known) < len(training):
        text += f"; not known how long for {len(training) - len(known)}"
    return "\n".join([text, *problems])


def duration(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None:
        return ""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
