"""Train fMRLRec once, for every size; or a baseline.

python train.py                                                     # the built-in demo catalogue
python train.py --dataset_code=beauty --lru_dropout=0.6 ...         # a prepared dataset
python train.py --dataset_code=beauty --model_code=sasrec           # a baseline, in the same harness
python train.py --resume experiments/runs/beauty/...                # continue a run that was cut off
torchrun --nproc_per_node=4 train.py --dataset_code=beauty ...      # on 4 GPUs, which share every batch out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from common import processes
from common.cli import parse_args, run_cli
from common.errors import InputError
from common.settings import format_value, is_runtime
from config import ALL_PRESETS, COUNTING, SECTIONS, Config, ineffective_settings, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue the run in this folder, or 'latest': the newest unfinished one that fits the flags",
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, test every size, and return the run's folder."""
    flags, arguments = parse_args(argv, __doc__.splitlines()[0], SECTIONS, add_arguments, presets=ALL_PRESETS)
    # Heavy imports wait until the flags are known to be good, so that --help answers at once.
    if not arguments.resume:
        config, sources = resolve(flags)
    import torch

    from common.devices import device_name, resolve_device
    from dataloader import eval_rows
    from model import count_parameters
    from model.base import CountingModel
    from trainer.checkpoint import load_state, load_weights
    from trainer.counting import count
    from trainer.runlog import RunLog, start_wandb
    from trainer.runs import STATE, WEIGHTS, create_run, describe_run, note_resumed, read_log, run_lock
    from trainer.wiring import build_model, build_trainer, load_data, test_run

    run = None
    if arguments.resume:
        run, config, sources = processes.on_main_process(lambda: find_resumed(arguments.resume, flags))
        processes.print_main(describe_run(run))
    device = resolve_device(config.device)
    catalog, features = load_data(config, device, run)
    torch.manual_seed(config.seed)
    model = build_model(config, catalog.num_items, features).to(device)
    if run is None:
        files = [Path(str(part.filename)).name for part in features]
        run = processes.on_main_process(
            lambda: create_run(config, sources, device_name(device), catalog.digest(), files)
        )
    print_settings(config, sources)
    processes.print_main(f"{count_parameters(model):,} trainable parameters on {device_name(device)}; run folder {run}")

    try:
        with ExitStack() as claim:
            processes.on_main_process(lambda: claim.enter_context(run_lock(run)))
            if arguments.resume:
                processes.on_main_process(lambda: note_resumed(run, device_name(device)))
            state = processes.on_main_process(partial(load_state, run / STATE)) if arguments.resume else None
            done = state["progress"]["epoch"] if state else 0
            log = RunLog(
                run,
                [record for record in processes.on_main_process(partial(read_log, run)) if record["epoch"] <= done],
                start_wandb(run, vars(config)) if config.use_wandb and processes.rank() == 0 else None,
            )
            if isinstance(model, CountingModel):  # it only counts
                count(
                    model,
                    catalog.sequences,
                    eval_rows(catalog.sequences, config.lru_max_len, "val"),
                    run,
                    log,
                    batch_size=config.val_batch_size,
                    ks=config.metric_ks,
                    best_metric=config.best_metric,
                    mask_history=config.val_mask_history,
                )
            else:
                trainer = build_trainer(config, catalog, model, run, log, device)
                if state:
                    trainer.load_state(state)
                if arguments.resume:
                    processes.print_main(
                        f"continuing after epoch {done}" if state else "no epoch was finished: from the start"
                    )
                progress = trainer.fit()
                processes.print_main(f"best epoch {progress.best_epoch}: val {trainer.criterion} {progress.best:.4f}")
            load_weights(model, run / WEIGHTS)
            results = test_run(config, catalog, model, run, mask_history=False) if config.test else {}
    except KeyboardInterrupt:
        if processes.rank() == 0:
            print(f"\ncontinue with: {processes.command()} train.py --resume {run}", file=sys.stderr)
        raise
    log.finish({f"test/{size}/{name}": value for size, metrics in results.items() for name, value in metrics.items()})
    return run


def find_resumed(resume: str, flags: dict[str, Any]) -> tuple[Path, Config, dict[str, str]]:
    """The run that `--resume` names, its settings with the runtime flags given now, and where each came from."""
    from trainer.runs import STATE, find_run, read_config, read_log, unfinished, with_runtime_flags

    run = Path(resume)
    if resume == "latest":
        runs_root = Path(flags.get("runs_root", Config.runs_root))
        run = find_run(runs_root, flags, lambda run: "" if unfinished(run) else "is finished")
    saved, sources = read_config(run)
    trained = saved.model_code not in COUNTING and len(read_log(run)) > 1  # a first epoch may be cut off as it is kept
    if trained and not (run / STATE).exists():
        raise InputError(f"{run} has no {STATE} to go on from, as runs that are kept as results; train another one")
    return (
        run,
        with_runtime_flags(saved, flags, run),
        sources | {name: "flag" for name in flags if is_runtime(Config, name)},
    )


def print_settings(config: Config, sources: dict[str, str]) -> None:
    """The settings, those that are no defaults with where they come from, and whether a flag is of no effect."""
    idle = ineffective_settings(config)
    for name, value in vars(config).items():
        source = sources.get(name, "default")
        if source == "flag" and name in idle:
            source = "flag; with the other settings it has no effect"
        processes.print_main(f"  {name:24} {format_value(value)}{'' if source == 'default' else f'   ({source})'}")


if __name__ == "__main__":
    run_cli(main)
