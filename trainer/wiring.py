"""From settings to what they describe: the data, the model and its trainer; and a trained run again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import processes
from common.devices import resolve_device
from config import Config
from dataloader import TrainLoader, eval_rows, times_trained, train_rows
from datasets.catalog import Catalog, describe, load_catalog
from datasets.demo import load_demo
from datasets.features.load import load_features
from model import registry
from model.extensions.sampled_loss import NegativeSampler
from trainer.checkpoint import load_weights
from trainer.evaluation import Model, test_every_size
from trainer.runlog import RunLog
from trainer.runs import WEIGHTS, check_data, describe_model, features_of, read_config, with_runtime_flags
from trainer.step import GraphedStep, Step, Trainable, build_optimizer
from trainer.trainer import Trainer


def load_data(config: Config, device: torch.device, run: Path | None = None) -> tuple[Catalog, list[np.memmap]]:
    """The catalogue and its items' features, [N, F] of each encoder, mapped from their files; the demo is made where it
    is missing. Raises InputError, before anything is encoded, where it is not what `run` was trained on.
    """
    if config.dataset_code == "demo" and Path(config.data_root).resolve() == Path(Config.data_root).resolve():
        catalog = load_demo()
    else:
        catalog = load_catalog(config.data_root, config.dataset_code)
    for line in (describe(catalog), *catalog.notes):
        processes.print_main(line)
    if run:
        processes.on_main_process(lambda: check_data(run, catalog.digest()))
    trained_on = processes.on_main_process(lambda: features_of(run)) if run else ()
    return catalog, load_features(config, catalog, device, trained_on)


def build_model(config: Config, num_items: int, features: Sequence[np.ndarray], loaded: bool = False) -> Model:
    """Return the model of the settings, freshly initialised. loaded: weights are loaded next, so nothing is fitted."""
    return registry.build_model(num_items, [torch.from_numpy(part) for part in features], config, fit=not loaded)


def build_step(config: Config, model: Trainable, loader: TrainLoader) -> Step | GraphedStep:
    """A training step of the model with the optimizer, loss and precision that the settings name."""
    sampled = 0 < config.num_negatives < model.num_items
    if config.num_negatives and not sampled:
        processes.print_main(
            f"all {model.num_items} items are scored, no more than the {config.num_negatives} asked for"
        )
    step = Step(
        model,
        build_optimizer(model, config.optimizer, config.lr, config.weight_decay, config.adam_epsilon),
        precision=config.precision,
        reduction=config.mrl_loss,
        distill=config.distill,
        loss=config.loss,
        max_grad_norm=config.max_grad_norm,
        sampler=NegativeSampler(loader.label_counts(model.num_items), config.num_negatives) if sampled else None,
    )
    alone_on_a_gpu = loader.device.type == "cuda" and processes.world_size() == 1
    return GraphedStep(step) if alone_on_a_gpu and model.static_shapes else step


def build_trainer(
    config: Config, catalog: Catalog, model: Trainable, run: Path, log: RunLog, device: torch.device
) -> Trainer:
    """What trains a model as the settings say."""
    loader = TrainLoader(
        train_rows(catalog.sequences, config.lru_max_len, config.first_item_label),
        config.train_batch_size,
        config.seed,
        device,
        processes.rank(),
        processes.world_size(),
    )
    steps = config.num_epochs * len(loader)
    if config.enable_lr_schedule and config.warmup_steps >= steps:
        processes.print_main(
            f"--warmup_steps {config.warmup_steps}: the {steps} steps of this training all warm up, and none has the "
            f"learning rate of {config.lr}"
        )
    return Trainer(
        step=build_step(config, model, loader),
        loader=loader,
        val_rows=eval_rows(catalog.sequences, config.lru_max_len, "val"),
        run=run,
        log=log,
        num_epochs=config.num_epochs,
        lr=config.lr,
        warmup_steps=config.warmup_steps,
        schedule=config.enable_lr_schedule,
        patience=config.early_stopping_patience if config.early_stopping else None,
        val_batch_size=config.val_batch_size,
        metric_ks=config.metric_ks,
        best_metric=config.best_metric,
        mask_history=config.val_mask_history,
        ema_decay=config.ema_decay,
    )


def load_run(run: str | Path, flags: dict[str, Any] | None = None) -> tuple[Config, Catalog, Model]:
    """A trained run: its settings, its catalogue, and its model with the weights of the best epoch.

    flags: settings that say how to run (device, batch sizes, data_root, ...) to use instead of the run's. Raises
    InputError where the folder is no run, a flag contradicts it, or the dataset is not the one it was trained on.
    """
    run = Path(run)
    saved, _ = read_config(run)
    config = with_runtime_flags(saved, flags or {}, run)
    device = resolve_device(config.device)
    catalog, features = load_data(config, device, run)
    model = build_model(config, catalog.num_items, features, loaded=True).to(device)
    load_weights(model, run / WEIGHTS)
    return config, catalog, model.eval()


def test_run(
    config: Config, catalog: Catalog, model: Model, run: Path, mask_history: bool, alone: bool = False
) -> dict[int, dict[str, float]]:
    """Test a model at every size and write what was found into the run's folder."""
    trained, _ = read_config(run)
    rows = eval_rows(catalog.sequences, config.lru_max_len, "test")
    return test_every_size(
        model,
        rows,
        run,
        batch_size=config.test_batch_size,
        ks=tuple(sorted({*config.metric_ks, *trained.metric_ks})),  # the run's files never lose a cut-off
        printed=config.metric_ks[:2],
        mask_history=mask_history,
        times_trained=times_trained(catalog.sequences, catalog.num_items)[rows.targets],
        title=f"{config.dataset_code}, {describe_model(config)}: test",
        alone=alone,
    )
