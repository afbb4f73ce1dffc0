"""Experiments, as tables of definitions.toml, and which settings make two runs the same.

title, text             shown in the report
datasets                the datasets it runs on by default
settings                shared by all rows
rows                    name -> the row's own settings (a preset stands for the settings it names), and optionally
                        published, a key of paper.PUBLISHED, and size, the size to report (default: the largest)
compare                 pairs of rows to compare user by user
every_size              report all sizes below each other, beside the paper's Figure 3
by_size                 report all sizes side by side, with the history masked
by_popularity           report users by how often their target occurs in training
by_cut                  report the widths that experiments.cut made of a row's run, beside its own sizes
validation              report validation only; its runs are never tested
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_text
from common.settings import check_types, format_value, is_runtime
from config import EXTENSIONS, NAMED_PRESETS, Config, resolve, size_within
from experiments.paper import PUBLISHED
from trainer.runs import ineffective_settings

FILE = Path(__file__).parent / "definitions.toml"
MAX_BYTES = 1 << 15  # of the file of definitions; long dotted keys take quadratic time


@dataclass(frozen=True)
class Row:
    """A row of an experiment's table: the settings that its runs have."""

    name: str
    settings: dict[str, Any]
    published: str = ""
    size: int | None = None


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
        if "num_negatives" in varied:
            varied.add("item_embedding_updates")  # has no effect with the exact softmax
        return set(Config.__dataclass_fields__) if "model_code" in varied else varied

    def fits(self, row: Row, config: Config) -> bool:
        """Return whether a run with these settings belongs to the row.

        An extension that the row does not name must have its default.
        """
        settings = {name: getattr(Config, name) for name in EXTENSIONS} | row.settings
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
    own = {key: values.pop(key) for key in ("published", "size") if key in values}
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
