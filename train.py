"""Train fMRLRec once, for every size.

python train.py                                                     # the built-in demo catalogue
python train.py --dataset_code=beauty --lru_dropout=0.6 ...         # a prepared dataset
python train.py --resume experiments/runs/beauty/...                # continue a run that was cut off
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config, InputError, parse_args, run_cli, shown

if TYPE_CHECKING:
    import numpy as np
    import torch

    from datasets.catalog import Catalog
    from model import FMRLRec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", metavar="RUN", help="continue the run in this folder, or 'latest': the newest that fits the flags"
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, test every size, and return the run's folder."""
    config, sources, arguments = parse_args(argv, __doc__.splitlines()[0], add_arguments)
    # Heavy imports wait until the flags are known to be good, so that --help answers at once.
    import torch

    from dataloader import TrainLoader, eval_rows, train_rows
    from model import count_parameters
    from trainer.checkpoint import load_state, load_weights
    from trainer.device import device_name, resolve_device
    from trainer.evaluation import test_every_size
    from trainer.runlog import RunLog, start_wandb
    from trainer.runs import create_run, find_run, read_config, read_log, with_runtime_flags
    from trainer.trainer import Trainer

    run = None
    if arguments.resume:
        flags = {name: getattr(config, name) for name, source in sources.items() if source == "flag"}
        latest = arguments.resume == "latest"
        run = find_run(Path(config.runs_root), flags, "config.json") if latest else Path(arguments.resume)
        saved, sources = read_config(run)
        config = with_runtime_flags(saved, flags, run)
    device = resolve_device(config.device)
    catalog, features = load_data(config, device)
    state = load_state(run / "last.pt") if run else None
    if run is None:
        run = create_run(config, sources, device_name(device))
    print_settings(config, sources)

    torch.manual_seed(config.seed)
    model = build_model(config, catalog.num_items, features).to(device)
    print(f"{count_parameters(model):,} trainable parameters on {device_name(device)}; run folder {run}", flush=True)
    loader = TrainLoader(
        train_rows(catalog.sequences, config.lru_max_len), config.train_batch_size, config.seed, device
    )
    done = state["progress"]["epoch"] if state else 0
    log = RunLog(
        run,
        [record for record in read_log(run) if record["epoch"] <= done],
        start_wandb(run, vars(config)) if config.use_wandb else None,
    )
    trainer = Trainer(
        model=model,
        loader=loader,
        val_rows=eval_rows(catalog.sequences, config.lru_max_len, "val"),
        run=run,
        log=log,
        num_epochs=config.num_epochs,
        precision=config.precision,
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=config.warmup_steps,
        schedule=config.enable_lr_schedule,
        patience=config.early_stopping_patience if config.early_stopping else None,
        reduction=config.mrl_loss,
        val_batch_size=config.val_batch_size,
        metric_ks=config.metric_ks,
        best_metric=config.best_metric,
    )
    if state:
        trainer.load_state(state)
        print(f"continuing after epoch {done}", flush=True)
    try:
        progress = trainer.fit()
    except KeyboardInterrupt:
        raise InputError(f"interrupted; continue with: python train.py --resume {run}") from None
    print(f"best epoch {progress.best_epoch}: val {config.best_metric} {progress.best:.4f}", flush=True)

    load_weights(model, run / "best.safetensors")
    results = test_every_size(
        model,
        eval_rows(catalog.sequences, config.lru_max_len, "test"),
        run,
        batch_size=config.test_batch_size,
        ks=config.metric_ks,
        mask_history=False,
        title=f"{config.dataset_code}, {config.branch}: test",
    )
    log.finish({f"test/{size}/{name}": value for size, metrics in results.items() for name, value in metrics.items()})
    return run


def load_data(config: Config, device: torch.device) -> tuple[Catalog, np.ndarray | None]:
    """The catalogue and its items' features [N, F] (None without encoders); the demo is made where it is missing."""
    from datasets.catalog import describe, load_catalog
    from datasets.features import item_features

    data_root = config.data_root
    if config.dataset_code == "demo":
        from datasets.demo import DEMO_ROOT, prepare_demo

        data_root = prepare_demo(DEMO_ROOT)
    catalog = load_catalog(data_root, config.dataset_code)
    for line in (describe(catalog), *catalog.notes):
        print(line, flush=True)
    features = item_features(
        catalog,
        language=config.language_encoder if config.use_language_encoder else None,
        image=config.img_encoder if config.use_img_encoder else None,
        attributes=config.item_attributes,
        device=device,
        batch_size=config.encoder_batch_size,
    )
    return catalog, features


def build_model(config: Config, num_items: int, features: np.ndarray | None) -> FMRLRec:
    """The model that the settings describe, freshly initialised."""
    import torch

    from model import FMRLRec

    return FMRLRec(
        num_items,
        None if features is None else torch.from_numpy(features),
        config.mrl_hidden_sizes,
        num_blocks=config.lru_num_blocks,
        dropout=config.lru_dropout,
        attn_dropout=config.lru_attn_dropout,
        use_bias=config.lru_use_bias,
        r_min=config.lru_r_min,
        r_max=config.lru_r_max,
    )


def print_settings(config: Config, sources: dict[str, str]) -> None:
    """The settings, those that are no defaults with where they come from."""
    for name, value in vars(config).items():
        source = sources.get(name, "default")
        print(f"  {name:24} {shown(value)}{'' if source == 'default' else f'   ({source})'}")


if __name__ == "__main__":
    run_cli(main)
