"""Search settings of an experiment's row by validation, with Optuna; the test set is never read.

python -m experiments.tune table3 --row language --dataset_code beauty --trials 20 \\
    --range lr=1e-4..1e-2:log --choice lru_num_blocks=1,2

Runs whose validation metric is below the median at an epoch are stopped. The trials lie in an SQLite file: the same
command continues an interrupted search, up to N trials in all.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_args, run_cli
from common.errors import InputError
from common.settings import format_value, is_runtime
from config import SECTIONS, Config, resolve
from experiments.definition import chosen

if TYPE_CHECKING:
    import optuna

Space = dict[str, tuple]  # setting -> ("range", low, high, logarithmic) or ("choice", texts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiments", metavar="NAME", help="an experiment of experiments/definitions.toml")
    parser.add_argument(
        "--row", dest="rows", metavar="ROW", help="the row to start from (default: the experiment's first)"
    )
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="trials in all (default: 20)")
    parser.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="NAME=LOW..HIGH[:log]",
        help="search a number; repeat the flag for more settings",
    )
    parser.add_argument(
        "--choice", action="append", default=[], metavar="NAME=A,B", help="search values; A;B if a value has commas"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, str]:
    """Run the missing trials, draw their history, and print and return the best settings."""
    flags, arguments = parse_args(argv, __doc__.splitlines()[0], SECTIONS, add_arguments)
    try:
        import optuna
    except ImportError:
        raise InputError('experiments.tune needs the package optuna: pip install "optuna>=4.2,<5"') from None
    definition, row = next((definition, rows[0]) for definition, rows in chosen(arguments) if rows)
    space = parse_space(arguments.range, arguments.choice)
    settings = {"dataset_code": definition.datasets[0]} | row.settings | flags
    settings = {name: value for name, value in settings.items() if name not in space}
    for name, (kind, *values) in space.items():  # fail before the first trial
        for value in values[0] if kind == "choice" else values[:2]:
            resolve(settings | parse_args([f"--{name}={value}"], "", SECTIONS)[0])
    fixed = {name: format_value(value) for name, value in settings.items()}
    config, _ = resolve(settings)
    if len(config.teachers) != row.taught_by:
        raise InputError(f"row {row.name!r} has {row.taught_by} teachers; give as many runs by --teachers RUN,RUN")
    name = re.sub("[^A-Za-z0-9.-]", "_", f"tune-{definition.name}-{row.name}-{config.dataset_code}")
    path = Path(config.runs_root) / f"{name}.sqlite3"
    path.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{path}", study_name=name, direction="maximize", load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(),
    )  # fmt: skip
    asked = {name: value for name, value in fixed.items() if not is_runtime(Config, name)}
    if study.user_attrs.get("settings", asked) != asked:
        raise InputError(f"{path} holds a search with other settings, {study.user_attrs['settings']}; move it away")
    study.set_user_attr("settings", asked)
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
    missing = max(0, arguments.trials - len(done(study)))
    try:
        study.optimize(lambda trial: train_trial(trial, space, fixed, config), missing)
    except ValueError as error:  # another search space
        raise InputError(f"{path} holds another search ({error}); move it away") from None
    if all(trial.value is None for trial in study.trials):
        raise InputError(f"{path} has no finished trial; give more --trials")
    draw_history(study, config, path.with_suffix(".png"))
    best = fixed | {name: str(value) for name, value in study.best_params.items()}
    print(f"{len(done(study))} trials in {path} and {path.with_suffix('.png').name}")
    print(f"best: val {config.best_metric} {study.best_value:.4f}, trial {study.best_trial.number}")
    print(shlex.join(["python", "train.py", *(f"--{name}={value}" for name, value in best.items())]))
    return best


def parse_space(ranges: Sequence[str], choices: Sequence[str]) -> Space:
    """Return the search space of --range and --choice flags. Raises InputError for an invalid one."""
    space: Space = {}
    for text in ranges:
        name, _, limits = text.partition("=")
        limits, _, scale = limits.partition(":")
        kind = type(getattr(Config, name, ""))
        number: Callable[[str], float] = int if kind is int else float
        try:
            low, high = (number(limit) for limit in limits.split(".."))
            valid = kind in (int, float) and low < high and scale in ("", "log") and (low > 0 or not scale)
        except ValueError:
            valid = False
        if not valid:
            raise InputError(f"--range {text!r} must be a setting with numbers LOW < HIGH, such as lr=1e-4..1e-2:log")
        space[name] = ("range", low, high, bool(scale))
    for text in choices:
        name, _, values = text.partition("=")
        texts = [value.strip() for value in values.split(";" if ";" in values else ",")]
        if name not in Config.__dataclass_fields__ or not all(texts):
            raise InputError(f"--choice {text!r} must be a setting with values, such as lru_num_blocks=1,2")
        space[name] = ("choice", texts)
    if not space:
        raise InputError("nothing to search; give --range lr=1e-4..1e-2:log or --choice lru_num_blocks=1,2")
    return space


def train_trial(trial: optuna.Trial, space: Space, fixed: dict[str, str], config: Config) -> float:
    """Train with a trial's settings, and return the best validation metric; stop it where the pruner says so."""
    import optuna

    import train

    given = dict(fixed)
    for name, (kind, *values) in space.items():
        if kind == "choice":
            given[name] = trial.suggest_categorical(name, values[0])
        else:
            suggest: Any = trial.suggest_int if isinstance(values[0], int) else trial.suggest_float
            given[name] = str(suggest(name, *values[:2], log=values[2]))
    found: list[float] = []

    def report(record: dict[str, Any]) -> None:
        by_size = list(record["val"].values())
        found.append(by_size[-1][config.best_metric])
        trial.report(found[-1], record["epoch"])
        if trial.should_prune():
            raise optuna.TrialPruned

    flags = [f"--{name}={value}" for name, value in given.items() if name not in ("test", "run_name")]
    try:
        train.main([*flags, "--no-test", f"--run_name=tune-{trial.number}"], report)
    except InputError:
        if not found:  # every other trial would fail alike
            raise
        raise optuna.TrialPruned from None  # such as a loss that is not finite
    return max(found)


def done(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that were trained to their end or pruned."""
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]


def draw_history(study: optuna.Study, config: Config, path: Path) -> None:
    """Draw every trial's best validation metric and the best so far, as PNG."""
    from trainer.plots import COLOURS, INK, figure

    best: list[float] = []
    colours = {"COMPLETE": COLOURS["fmrlrec"], "PRUNED": COLOURS["paper"]}
    with figure(path, 1, f"{study.study_name}: validation {config.best_metric}") as [panel]:
        for place, trial in enumerate(done(study), start=1):
            value = max(trial.intermediate_values.values())
            panel.plot(place, value, "ox"[trial.value is None], color=colours[trial.state.name])
            best.append(max([*best[-1:], value]))
        panel.step(range(1, len(best) + 1), best, where="post", color=INK)
        panel.set_xlabel("trial (crosses: pruned; line: best so far)")


if __name__ == "__main__":
    run_cli(main)
