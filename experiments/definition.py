"""Experiments, as tables of definitions.toml, and which settings make two runs the same.

title, text             shown in the report
datasets                the datasets it runs on by default
settings                shared by all rows
rows                    name -> the row's own settings (a preset stands for the settings it names), and optionally
                        published, a key of paper.PUBLISHED, size, the size to report (default: the largest), and
                        taught_by, the number of runs in --teachers
compare                 pairs of rows to compare user by user
every_size              report all sizes below each other, beside the paper's Figure 3
by_size                 report all sizes side by side, with the history masked
by_popularity           report users by how often their target occurs in training
by_cut                  report the widths that experiments.cut made of a row's run, beside its own sizes
validation              report validation only; its runs are never tested
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.files import read_text
from common.settings import check_types, format_value, is_runtime
from config import EXTENSIONS, NAMED_PRESETS, Config, resolve, size_within
from experiments.paper import PUBLISHED
from trainer.runs import (
    CONFIG,
    EVERY_SIZE,
    USER_RANKS,
    ineffective_settings,
    read_config,
    read_environment,
    result_file,
    unfinished,
    untrained,
)

if TYPE_CHECKING:
    from experiments.store import KeptRun

FILE = Path(__file__).parent / "definitions.toml"
MAX_BYTES = 1 << 15  # of the file of definitions; long dotted keys take quadratic time


@dataclass(frozen=True)
class Row:
    """A row of an experiment's table: the settings that its runs have."""

    name: str
    settings: dict[str, Any]
    published: str = ""
    size: int | None = None
    taught_by: int = 0


@dataclass(frozen=True)
class Definition:
    """An experiment."""

    name: str
    title: str
    text: str
    datasets: tuple[str, ...]
    rows: tuple[Row, ...]
    compare: tuple[tuple[str, str], ...] = ()
    every_size: bool = False
    by_size: bool = False
    by_popularity: bool = False
    by_cut: bool = False
    validation: bool = False

    def varied(self) -> set[str]:
        """Return the settings in which its rows differ; all settings if they differ in the model."""
        named = {name for row in self.rows for name in row.settings}
        values = {name: [row.settings.get(name) for row in self.rows] for name in named}
        varied = {name for name in named if any(value != values[name][0] for value in values[name])}
        if "mrl_hidden_sizes" in varied:
            varied.add("item_embedding")  # is rounded down to one of them
        if "enable_lr_schedule" in varied:
            varied.add("warmup_steps")  # has no effect without the schedule
        if any(row.taught_by for row in self.rows):
            varied.add("teachers")
        if "num_negatives" in varied:
            varied.add("item_embedding_updates")  # has no effect with the exact softmax
        return set(Config.__dataclass_fields__) if "model_code" in varied else varied

    def fits(self, row: Row, config: Config) -> bool:
        """Return whether a run with these settings belongs to the row.

        An extension that the row does not name must have its default.
        """
        settings = {name: getattr(Config, name) for name in EXTENSIONS if name != "teachers"} | row.settings
        if len(config.teachers) != row.taught_by:
            return False
        embedded = size_within(config.mrl_hidden_sizes, settings.pop("item_embedding"))
        return embedded == config.embedded and all(getattr(config, name) == v for name, v in settings.items())


@cache
def definitions() -> dict[str, Definition]:
    """Return name -> definition."""
    return read_definitions(FILE)


def read_definitions(path: Path) -> dict[str, Definition]:
    """Return the experiments of a file. Raises InputError that names the file, the invalid experiment and why."""
    try:
        tables = tomllib.loads(read_text(path, "restore it from version control", MAX_BYTES))
    except (ValueError, RecursionError) as error:  # ValueError: also of integers over 4,300 digits
        raise InputError(f"{path} is not valid TOML: {error}") from None
    return {name: _definition(name, table, f"{path}: experiment {name!r}") for name, table in tables.items()}


def _definition(name: str, table: Any, where: str) -> Definition:
    try:
        found = dict(table)
        settings = found.pop("settings", {})
        rows = tuple(_row(row, settings | values) for row, values in found.pop("rows").items())
        found |= {"datasets": tuple(found["datasets"]), "compare": tuple(map(tuple, found.get("compare", ())))}
        definition = Definition(name=name, rows=rows, **found)
    except KeyError as error:
        raise InputError(f"{where} lacks {error}") from None
    except (InputError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where} is invalid: {error}") from None
    unknown = {name for pair in definition.compare for name in pair} - {row.name for row in rows}
    if unknown:
        raise InputError(f"{where} compares unknown rows {sorted(unknown)}; its rows are {[row.name for row in rows]}")
    return definition


def _row(name: str, values: dict[str, Any]) -> Row:
    own = {key: values.pop(key) for key in ("published", "size", "taught_by") if key in values}
    settings = check_types(Config, values, f"row {name!r}")
    config, _ = resolve(settings)  # raises for an invalid value
    if (size := own.get("size")) is not None and size not in config.mrl_hidden_sizes:
        raise InputError(f"row {name!r} has size {size!r}; its sizes are {format_value(config.mrl_hidden_sizes)}")
    if own.get("published", "") not in ("", *PUBLISHED):
        raise InputError(f"row {name!r} has published {own['published']!r}; known are {', '.join(PUBLISHED)}")
    settings = NAMED_PRESETS[settings.pop("preset", "paper")] | settings
    return Row(name, settings, **own)


def compares_users(config: Config) -> bool:
    """Return whether an experiment compares the users of a run with these settings."""
    return any(
        definition.fits(row, config)
        for definition in definitions().values()
        for row in definition.rows
        if definition.by_popularity or any(row.name in pair for pair in definition.compare)
    )


def identity(config: Config) -> dict[str, Any]:
    """Return the settings that affect a run's result."""
    values = vars(config) | {"item_embedding": config.embedded}  # rounded down to a size
    ignored = {"run_name", "preset", *ineffective_settings(config)}
    return {name: value for name, value in values.items() if name not in ignored and not is_runtime(Config, name)}


def unusual(config: Config, ignored: set[str] | frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return the settings that affect a run's result and differ from the presets of its dataset and model."""
    usual, _ = resolve({"dataset_code": config.dataset_code, "model_code": config.model_code})
    return {name: v for name, v in identity(config).items() if v != getattr(usual, name) and name not in ignored}


# ----------------------------------------------------------------------------------------------------------------- plan
# Plan an experiment: its runs, and the state of each.

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
    if not flags.get("teachers"):
        experiments = [(definition, without_teachers(definition, rows)) for definition, rows in experiments]
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


def without_teachers(definition: Definition, rows: list[Row]) -> list[Row]:
    """Return the rows that need no --teachers, and name the others on stderr."""
    for row in rows:
        if row.taught_by:
            needs = f"{definition.name}/{row.name} learns from {row.taught_by} trained runs; name them by --teachers"
            print(f"left out: {needs}", file=sys.stderr)
    return [row for row in rows if not row.taught_by]


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


def missing_encoders(jobs: list[Job]) -> list[str]:
    """Return a line for each encoder that runs to start read by and that is not on this disk."""
    from datasets.features.load import modalities
    from datasets.features.modality import EncodedModality

    configs = [job.config for job in jobs if job.state == "to start" and job.config.model_code == "fmrlrec"]
    found = (modality for config in configs for modality in modalities(config))
    encoders = {modality.encoder: modality for modality in found if isinstance(modality, EncodedModality)}
    return [
        f"--{modality.flag} {name} is not on this disk; train.py downloads it unless its features are cached. Without "
        f"network, give local files or {modality.built_in!r}, which needs no download"
        for name, modality in encoders.items()
        if not modality.on_disk()
    ]


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
