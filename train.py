"""Train fMRLRec once, for every size.

python train.py                                                     # the built-in demo catalogue
python train.py --dataset_code=beauty --lru_dropout=0.6 ...         # a prepared dataset
python train.py --resume experiments/runs/beauty/...                # continue a run that was cut off
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from config import Config, parse_args, resolve, run_cli, shown
from eval import build_model, load_data, test_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue the run in this folder, or 'latest': the newest unfinished one that fits the flags",
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, test every size, and return the run's folder."""
    flags, arguments = parse_args(argv, __doc__.splitlines()[0], add_arguments)
    # Heavy imports wait until the flags are known to be good, so that --help answers at once.
    if not arguments.resume:
        config, sources = resolve(flags)
    import torch

    from dataloader import TrainLoader, eval_rows, train_rows
    from datasets.device import device_name, resolve_device
    from model import count_parameters
    from trainer.checkpoint import load_state, load_weights
    from trainer.runlog import RunLog, start_wandb
    from trainer.runs import check_data, create_run, find_run, read_config, read_log, unfinished, with_runtime_flags
    from trainer.trainer import Trainer

    run = None
    if arguments.resume == "latest":
        run = find_run(
            Path(flags.get("runs_root", Config.runs_root)), flags, lambda run: "" if unfinished(run) else "is finished"
        )
    elif arguments.resume:
        run = Path(arguments.resume)
    if run:
        saved, sources = read_config(run)
        config = with_runtime_flags(saved, flags, run)
    device = resolve_device(config.device)
    catalog, features = load_data(config, device)
    if run:
        check_data(run, catalog.digest())
    state = load_state(run / "last.pt") if run else None
    torch.manual_seed(config.seed)
    model = build_model(config, catalog.num_items, features).to(device)
    if run is None:
        run = create_run(config, sources, device_name(device), catalog.digest())
    print_settings(config, sources)
    print(f"{count_parameters(model):,} trainable parameters on {device_name(device)}; run folder {run}", flush=True)

    done = state["progress"]["epoch"] if state else 0
    log = RunLog(
        run,
        [record for record in read_log(run) if record["epoch"] <= done],
        start_wandb(run, vars(config)) if config.use_wandb else None,
    )
    trainer = Trainer(
        model=model,
        loader=TrainLoader(
            train_rows(catalog.sequences, config.lru_max_len), config.train_batch_size, config.seed, device
        ),
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
    if arguments.resume:
        print(f"continuing after epoch {done}" if state else "no epoch was finished: from the start", flush=True)
    try:
        progress = trainer.fit()
        print(f"best epoch {progress.best_epoch}: val {config.best_metric} {progress.best:.4f}", flush=True)
        load_weights(model, run / "best.safetensors")
        results = test_run(config, catalog, model, run, mask_history=False)
    except KeyboardInterrupt:
        print(f"\ncontinue with: python train.py --resume {run}", file=sys.stderr)
        raise
    log.finish({f"test/{size}/{name}": value for size, metrics in results.items() for name, value in metrics.items()})
    return run


def print_settings(config: Config, sources: dict[str, str]) -> None:
    """The settings, those that are no defaults with where they come from."""
    for name, value in vars(config).items():
        source = sources.get(name, "default")
        print(f"  {name:24} {shown(value)}{'' if source == 'default' else f'   ({source})'}")


if __name__ == "__main__":
    run_cli(main)
