"""What the experiments are: definitions/*.toml, and which settings two runs may differ in and still be the same.

title, text             what the report says
datasets                on which it is run
settings                every row has them
rows                    name -> its own settings, a preset standing for those it names; beside them published, a key
                        of paper.py, and size, the one whose metrics are meant (the largest where none is given)
compare                 pairs of rows that a bootstrap over users compares
every_size              the report shows all sizes of a row, one below the other, beside the paper's curve
by_size                 the report shows all sizes of a row side by side, with the history masked
by_popularity           the report tells users apart by how often their item was trained on
validation              settings are chosen by it: its runs leave the test set unread, the report shows their validation
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.settings import check_types, format_value, is_runtime
from config import EXTENSIONS, NAMED_PRESETS, Config, ineffective_settings, resolve, size_within
from experiments.paper import PUBLISHED

FOLDER = Path(__file__).parent / "definitions"


@dataclass(frozen=True)
class Row:
    """A line of an experiment's table."""

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
    validation: bool = False

    def varied(self) -> set[str]:
        """The settings that make its rows differ. Where it is the model, all: each is trained in a way of its own."""
        named = {name for row in self.rows for name in row.settings}
        values = {name: [row.settings.get(name) for row in self.rows] for name in named}
        varied = {name for name in named if any(value != values[name][0] for value in values[name])}
        if "mrl_hidden_sizes" in varied:
            varied.add("item_embedding")  # what it comes to depends on them
        if "enable_lr_schedule" in varied:
            varied.add("warmup_steps")  # read with it alone
        return set(Config.__dataclass_fields__) if "model_code" in varied else varied

    def fits(self, row: Row, config: Config) -> bool:
        """Whether a run with these settings is one of this row's. What is beyond the paper a row has to name."""
        settings = {name: getattr(Config, name) for name in EXTENSIONS} | row.settings
        embedded = size_within(config.mrl_hidden_sizes, settings.pop("item_embedding"))
        return embedded == config.embedded and all(getattr(config, name) == v for name, v in settings.items())


def definitions() -> dict[str, Definition]:
    """name -> definition. Raises InputError that names the file and what in it cannot be used."""
    return {path.stem: read_definition(path) for path in sorted(FOLDER.glob("*.toml"))}


def read_definition(path: Path) -> Definition:
    """The definition in one file."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        settings = found.pop("settings", {})
        rows = tuple(_row(name, settings | row) for name, row in found.pop("rows").items())
        found |= {"datasets": tuple(found["datasets"]), "compare": tuple(map(tuple, found.get("compare", ())))}
        definition = Definition(name=path.stem, rows=rows, **found)
    except KeyError as error:
        raise InputError(f"{path} is no experiment: it has no {error}") from None
    except (InputError, tomllib.TOMLDecodeError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no experiment: {error}") from None
    unknown = {name for pair in definition.compare for name in pair} - {row.name for row in rows}
    if unknown:
        raise InputError(f"{path} compares {sorted(unknown)}, which are none of its rows")
    return definition


def _row(name: str, values: dict[str, Any]) -> Row:
    aside = {key: values.pop(key) for key in ("published", "size") if key in values}
    settings = check_types(Config, values, f"row {name!r}")
    config, _ = resolve(settings)  # raises where a value cannot be used
    if (size := aside.get("size")) is not None and size not in config.mrl_hidden_sizes:
        raise InputError(
            f"row {name!r} has size {size!r}, which is none of its sizes {format_value(config.mrl_hidden_sizes)}"
        )
    if aside.get("published", "") not in ("", *PUBLISHED):
        raise InputError(f"row {name!r} has published {aside['published']!r}; there are {', '.join(PUBLISHED)}")
    settings = NAMED_PRESETS[settings.pop("preset", "paper")] | settings
    return Row(name, settings, **aside)


def identity(config: Config) -> dict[str, Any]:
    """What decides a run's result: its settings but those that say how to run, and those that it does not read."""
    values = vars(config) | {"item_embedding": config.embedded}  # what it comes to with these sizes
    aside = {"run_name", "preset", *ineffective_settings(config)}
    return {name: value for name, value in values.items() if name not in aside and not is_runtime(Config, name)}


def unusual(config: Config, aside: set[str] | frozenset[str] = frozenset()) -> dict[str, Any]:
    """The settings that decide a run's result and are not the defaults and presets of its dataset and model."""
    usual, _ = resolve({"dataset_code": config.dataset_code, "model_code": config.model_code})
    of_run = identity(config)
    return {name: v for name, v in of_run.items() if v != getattr(usual, name) and name not in aside}
