"""Find the run that a command line means: a folder, or the newest match. Needs no torch, so errors come at once."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.settings import format_value, is_runtime
from config import EXTENSIONS, Config, named_preset
from trainer.runs import CONFIG, TIME, WEIGHTS, no_weights, read_config, read_settings


def find_trained(run: str | Path | None, runs_root: Path, flags: dict[str, Any]) -> Path:
    """Return `run`, or else the newest run with weights that matches the flags.

    Raises InputError if no run matches, or if `run` is not a run or has no weights.
    """

    def problem(run: Path) -> str:
        return "" if (run / WEIGHTS).exists() else f"has no {WEIGHTS} yet"

    if not run:
        return find_run(runs_root, flags, problem)
    read_config(Path(run))  # raises if it is not a run
    if not (Path(run) / WEIGHTS).exists():
        raise no_weights(Path(run) / WEIGHTS)
    return Path(run)


def find_run(runs_root: Path, flags: dict[str, Any], problem: Callable[[Path], str]) -> Path:
    """Return the newest run without a `problem` that matches the flags.

    problem: returns why a run cannot be used, or "". Raises InputError that lists the newest runs and why none matches.
    """
    rejected = []
    paths = list(runs_root.glob(f"*/*/{CONFIG}"))
    for path in sorted(paths, key=_started, reverse=True):
        run = path.parent
        try:
            config, _ = read_config(run)
        except InputError as error:
            rejected.append(f"  {run}: {error}")
            continue
        required = {k: v for k, v in expand_preset(flags, config.dataset_code).items() if not is_runtime(Config, k)}
        differs = [f"{k} {format_value(getattr(config, k))}" for k, v in required.items() if getattr(config, k) != v]
        reason = ", ".join(differs) or problem(run)
        if not reason:
            return run
        rejected.append(f"  {run}: {reason}")
    given = " ".join(f"--{k} {format_value(v)}" for k, v in flags.items() if not is_runtime(Config, k))
    if not rejected:
        raise InputError(f"there is no run below {runs_root.resolve()}; train one: python train.py")
    listed = "\n".join(rejected[:5])
    raise InputError(
        f"no run below {runs_root} {f'matches {given}' if given else 'can be used'}. The newest runs and the reasons:\n"
        f"{listed}"
    )


def _started(path: Path) -> tuple[str, int]:
    """Return the start time of a config.json's run as a sort key.

    The time in the folder's name comes first, or the file's time if the folder was renamed; the file's time orders runs
    of the same second.
    """
    stat, name = path.stat(), path.parent.name
    in_name = re.match(r"\d{8}-\d{6}", name)
    return in_name[0] if in_name else time.strftime(TIME, time.localtime(stat.st_mtime)), stat.st_mtime_ns


def with_runtime_flags(config: Config, flags: dict[str, Any], run: Path) -> Config:
    """Return a run's settings with the given runtime flags.

    Raises InputError if another flag differs from the run.
    """
    for name, value in expand_preset(flags, config.dataset_code).items():
        if not is_runtime(Config, name) and getattr(config, name) != value:
            given = name if name in flags else "preset"
            raise InputError(
                f"--{given} {format_value(flags[given])} differs from {run}, which has {name} "
                f"{format_value(getattr(config, name))}; "
                f"leave the flag out to use the run as it is"
            )
    return read_settings(vars(config) | {k: v for k, v in flags.items() if is_runtime(Config, k)})


def expand_preset(flags: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Replace --preset in flags by its settings on a dataset.

    "paper" stands for all extensions at their defaults.
    """
    if "preset" not in flags:
        return flags
    named = named_preset(flags["preset"], dataset) or {name: getattr(Config, name) for name in EXTENSIONS}
    return named | {name: value for name, value in flags.items() if name != "preset"}
