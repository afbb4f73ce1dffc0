"""Plan an experiment: its runs, and the state of each."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.settings import format_value
from config import EXTENSIONS, Config, resolve
from experiments.definition import Definition, Row, definitions, identity
from trainer.runs import (
    CONFIG,
    EVERY_SIZE,
    USER_RANKS,
    read_config,
    read_environment,
    result_file,
    unfinished,
    untrained,
)

if TYPE_CHECKING:
    from experiments.store import KeptRun

# "kept in part": one of the tests is missing, and so is the run's folder.
STATES = ("finished", "to keep", "to test", "kept in part", "to continue")


@dataclass
class Job:
    """A training with its tests, and its state."""

    names: list[str]  # experiment/row of all rows that it serves
    flags: dict[str, Any]
    config: Config
    data: str | None = None  # digest of the dataset; None if it is not prepared
    run: Path | None = None  # its folder below runs_root
    tests: bool = False  # whether a row needs its tests
    state: str = ""  # one of STATES, "to start", or a failure

    @property
    def label(self) -> str:
        return f"{self.config.dataset_code}, seed {self.config.seed}: {', '.join(self.names)}"


def chosen(arguments: argparse.Namespace) -> list[tuple[Definition, list[Row]]]:
    """Return the experiments and rows asked for. Raises InputError that names an unknown one."""
    known = definitions()
    names = list(known)
    if arguments.experiments != "all":
        names = [name.strip() for name in arguments.experiments.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"unknown experiment {name!r}; known are {', '.join(known)}, and all")
    picked = [(known[name], list(known[name].rows)) for name in names]
    if arguments.rows:
        rows = [name.strip() for name in arguments.rows.split(";")]
        there = dict.fromkeys(row.name for _, of_experiment in picked for row in of_experiment)
        if missing := [name for name in rows if name not in there]:
            raise InputError(f"unknown row {missing[0]!r} of {arguments.experiments}; known are {'; '.join(there)}")
        picked = [(definition, [row for row in all_rows if row.name in rows]) for definition, all_rows in picked]
    return picked


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of "42,43". Raises InputError for anything but integers."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"--seeds {text!r} must be integers with commas, such as 42,43,44") from None


def planned(
    experiments: list[tuple[Definition, list[Row]]],
    flags: dict[str, Any],
    seeds: list[int],
    datasets: list[str] | None = None,
) -> list[Job]:
    """Return a job for every seed, dataset and row; rows with the same training share a job.

    datasets: overrides those of the definitions. Raises InputError for a flag that contradicts a row.
    """
    jobs: list[Job] = []
    for definition, rows in experiments:
        for seed in seeds:
            for dataset in datasets or definition.datasets:
                for row in rows:
                    if clash := [name for name in row.settings if name in flags and flags[name] != row.settings[name]]:
                        raise InputError(
                            f"--{clash[0]} {format_value(flags[clash[0]])} contradicts {definition.name}, whose row "
                            f"{row.name!r} has {format_value(row.settings[clash[0]])}; leave the flag out"
                        )
                    own = {**flags, **row.settings, "dataset_code": dataset, "seed": seed}
                    config, _ = resolve(own)
                    extensions = [name for name in ("preset", *EXTENSIONS) if name in flags]
                    if extensions and not definition.fits(row, config):  # no table would show the run
                        raise InputError(
                            f"--{extensions[0]} {format_value(flags[extensions[0]])} contradicts {definition.name}, "
                            f"whose row {row.name!r} has no other extensions than the definition names"
                        )
                    same = [job for job in jobs if identity(job.config) == identity(config)]
                    if not same:
                        same = [Job([], own, config)]
                        jobs += same
                    same[0].names.append(f"{definition.name}/{row.name}")
                    same[0].tests |= not definition.validation
    return jobs


def set_data(jobs: list[Job]) -> list[str]:
    """Set every job's dataset digest; return why the other datasets cannot be used."""
    from datasets.catalog import load_catalog

    problems = []
    digests = {}
    for name, root in dict.fromkeys((job.config.dataset_code, job.config.data_root) for job in jobs):
        try:
            digests[name] = load_catalog(root, name).digest()
        except InputError as error:
            problems.append(str(error))
    for job in jobs:
        job.data = digests.get(job.config.dataset_code)
    return problems


def look_up(job: Job, kept: list[KeptRun]) -> None:
    """Set the job's state and run folder to those of its most advanced run, kept or not."""
    found: list[tuple[str, Path | None]] = [
        (_kept_state(run, job.tests), None) for run in kept if _same(job, run.config, run.data)
    ]
    folders, _ = run_folders(Path(job.config.runs_root))
    found += [(_state(run, job.tests), run) for run, config, data in folders if _same(job, config, data)]
    found = [pair for pair in found if pair[0]]
    job.state, job.run = min(found, key=lambda pair: STATES.index(pair[0]), default=("to start", None))


def _same(job: Job, config: Config, data: str | None) -> bool:
    """Return whether a run has the job's settings and data, as far as the digests are known."""
    return identity(config) == identity(job.config) and (data is None or job.data in (None, data))


def _kept_state(run: KeptRun, tests: bool) -> str:
    if not tests or run.complete():
        return "finished"
    return "kept in part" if run.tested else ""  # a kept run cannot be tested


def _state(run: Path, tests: bool) -> str:
    if unfinished(run) if tests else untrained(run):
        return "to continue"
    return "to test" if tests and missing_tests(run) else "to keep"


def missing_tests(run: Path) -> list[list[str]]:
    """Return the flags of eval.py for every test that a trained run lacks."""
    return [
        ["--mask_history"] if masked else []
        for masked in (False, True)
        if not all((run / result_file(name, masked)).exists() for name in (EVERY_SIZE, USER_RANKS))
    ]


def run_folders(runs_root: Path) -> tuple[list[tuple[Path, Config, str | None]], list[str]]:
    """Return every run folder with its settings and data digest, and why the others cannot be used."""
    folders, problems = [], []
    for path in sorted(runs_root.glob(f"*/*/{CONFIG}")):
        run = path.parent
        try:
            folders.append((run, read_config(run)[0], read_environment(run).get("data")))
        except InputError as error:  # such as settings of another version
            problems.append(str(error))
    return folders, problems


def summary(jobs: list[Job], problems: list[str]) -> str:
    """Return the number of jobs in each state, and the problems of their datasets."""
    states = Counter(job.state for job in jobs)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    return "\n".join([f"{len(jobs)} run{'' if len(jobs) == 1 else 's'}: {counted}", *problems])
