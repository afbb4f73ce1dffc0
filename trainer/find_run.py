"""Which run a command line means: the given folder, or the newest run that fits the flags."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import processes
from common.errors import InputError
from common.settings import format_value, is_runtime
from config import COUNTING, EXTENSIONS, NAMED_PRESETS, Config
from trainer.runs import (
    CONFIG,
    STATE,
    TIME,
    WEIGHTS,
    describe_run,
    no_weights,
    read_config,
    read_log,
    read_settings,
    unfinished,
)
from trainer.training_run import TrainingRun


def find_resumed(resume: str, flags: dict[str, Any]) -> TrainingRun:
    """Return the run that --resume names, with the runtime flags given now, and print which one it is.

    resume: a folder, or "latest" for the newest unfinished run that fits the flags. Raises InputError.
    """

    def find() -> tuple[Path, Config, dict[str, str]]:
        folder = Path(resume)
        if resume == "latest":
            runs_root = Path(flags.get("runs_root", Config.runs_root))
            folder = find_run(runs_root, flags, lambda run: "" if unfinished(run) else "is finished")
        saved, sources = read_config(folder)
        log = read_log(folder)
        trained = saved.model_code not in COUNTING and log and log[-1]["epoch"] > 1  # the first may be half written
        if trained and not (folder / STATE).exists():
            raise InputError(f"{folder} has no {STATE} to continue from, as kept results; train another run")
        sources |= {name: "flag" for name in flags if is_runtime(Config, name)}
        return folder, with_runtime_flags(saved, flags, folder), sources

    folder, config, sources = processes.on_main_process(find)
    processes.print_main(describe_run(folder))
    return TrainingRun(config, sources, folder)


def find_trained(run: str | Path | None, runs_root: Path, flags: dict[str, Any]) -> Path:
    """`run`, or without one the newest run that fits the flags and has weights; raises InputError as `find_run`, and
    where `run` has none."""

    def problem(run: Path) -> str:
        return "" if (run / WEIGHTS).exists() else f"has no {WEIGHTS} yet"

    if not run:
        return find_run(runs_root, flags, problem)
    read_config(Path(run))  # raises where it is no run
    if not (Path(run) / WEIGHTS).exists():
        raise no_weights(Path(run) / WEIGHTS)
    return Path(run)


def find_run(runs_root: Path, flags: dict[str, Any], problem: Callable[[Path], str]) -> Path:
    """The newest run whose settings equal the given flags (runtime flags aside) and that has no `problem`.

    Raises InputError that shows the newest runs and why each is not it.
    """
    wanted = {name: value for name, value in expand_preset(flags).items() if not is_runtime(Config, name)}
    near = []
    paths = list(runs_root.glob(f"*/*/{CONFIG}"))
    for path in sorted(paths, key=_begun, reverse=True):
        run = path.parent
        try:
            config, _ = read_config(run)
        except InputError as error:
            near.append(f"  {run}: {error}")
            continue
        differs = [f"{k} {format_value(getattr(config, k))}" for k, v in wanted.items() if getattr(config, k) != v]
        reason = ", ".join(differs) or problem(run)
        if not reason:
            return run
        near.append(f"  {run}: {reason}")
    asked = " ".join(f"--{k} {format_value(v)}" for k, v in flags.items() if not is_runtime(Config, k))
    if not near:
        raise InputError(f"there is no run below {runs_root.resolve()}; train one: python train.py")
    listed = "\n".join(near[:5])
    raise InputError(
        f"no run below {runs_root} {f'fits {asked}' if asked else 'can be taken'}. The newest ones, and why not:\n"
        f"{listed}"
    )


def _begun(path: Path) -> tuple[str, int]:
    """When the run of a config.json was begun: the time in its folder's name, where it still has one, and that of the
    file, for runs of the same second."""
    stat, name = path.stat(), path.parent.name
    found = re.match(r"\d{8}-\d{6}", name)
    return found[0] if found else time.strftime(TIME, time.localtime(stat.st_mtime)), stat.st_mtime_ns


def with_runtime_flags(config: Config, flags: dict[str, Any], run: Path) -> Config:
    """A run's settings with the runtime flags given now. Raises InputError if another flag differs from the run."""
    for name, value in expand_preset(flags).items():
        if not is_runtime(Config, name) and getattr(config, name) != value:
            given = name if name in flags else "preset"
            raise InputError(
                f"--{given} {format_value(flags[given])} differs from {run}, which has {name} "
                f"{format_value(getattr(config, name))}; "
                f"leave the flag out to use the run as it is"
            )
    return read_settings(vars(config) | {k: v for k, v in flags.items() if is_runtime(Config, k)})


def expand_preset(flags: dict[str, Any]) -> dict[str, Any]:
    """Replace --preset among flags by the settings that it names; "paper" names all extensions, switched off."""
    if "preset" not in flags:
        return flags
    named = NAMED_PRESETS[flags["preset"]] or {name: getattr(Config, name) for name in EXTENSIONS}
    return named | {name: value for name, value in flags.items() if name != "preset"}
