"""Train fMRLRec once, for every size; or a baseline.

python train.py                                                     # the built-in demo catalogue
python train.py --dataset_code=beauty --lru_dropout=0.6 ...         # a prepared dataset
python train.py --dataset_code=beauty --model_code=sasrec           # a baseline, in the same harness
python train.py --init_from experiments/runs/beauty/...              # a warm start: on newer data, or for more epochs
python train.py --resume experiments/runs/beauty/...                # continue a run that was cut off
torchrun --nproc_per_node=4 train.py --dataset_code=beauty ...      # on 4 GPUs, which share each batch
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.cli import parse_args, run_cli
from config import ALL_PRESETS, SECTIONS, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue the run in this folder, or 'latest': the newest unfinished one that fits the flags",
    )


def main(argv: Sequence[str] | None = None, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Train, test every size, and return the run's folder. on_epoch: called with each line of log.jsonl."""
    flags, arguments = parse_args(argv, __doc__.splitlines()[0], SECTIONS, add_arguments, presets=ALL_PRESETS)
    settings = None if arguments.resume or flags.get("init_from") else resolve(flags)
    if settings:
        from datasets.catalog import check_dataset

        check_dataset(settings[0])

    # Heavy imports wait until flags and dataset are known to be good, so that --help and errors come at once.
    import torch

    from common.devices import resolve_device
    from datasets.catalog import load_dataset
    from datasets.features.load import load_features
    from model import build_model, count_parameters
    from model.base import CountingModel
    from trainer.load_run import find_resumed, load_initial, load_teachers, warm_settings
    from trainer.testing import test_every_size
    from trainer.trainer import CountingTrainer, Trainer
    from trainer.training_run import TrainingRun

    if settings or not arguments.resume:
        run = TrainingRun(*(settings or warm_settings(flags)))
    else:
        run = find_resumed(arguments.resume, flags)
    run.on_epoch = on_epoch
    config = run.config
    device = resolve_device(config.device)

    catalog = load_dataset(config)
    run.check(catalog)
    features = load_features(config, catalog, device, run.features)  # each [N, F], from the cache
    teachers = load_teachers(config, catalog, device, run.resumed)

    torch.manual_seed(config.seed)
    parts, fresh = [torch.from_numpy(part) for part in features], not config.init_from
    model = build_model(catalog.num_items, parts, config, fit=fresh).to(device)

    with run.training(device, catalog, features, count_parameters(model)):
        if config.init_from and not run.state:
            load_initial(model, catalog, Path(config.init_from), run.folder)
        if isinstance(model, CountingModel):
            CountingTrainer(model, catalog.sequences, config, run).fit()
        else:
            Trainer(model, catalog.sequences, config, run, teachers).fit()
        run.load_best(model)
        run.keep_table(model)
        run.plot_training()
        results = test_every_size(model, catalog.sequences, config, run.folder) if config.test else {}
        run.log.finish(results)
    return run.folder


if __name__ == "__main__":
    run_cli(main)
