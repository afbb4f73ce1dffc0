"""How long an epoch takes, for a dry run: by an earlier run that does the same work, or measured here."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from config import COUNTING, Config
from datasets.catalog import Catalog, Sequences
from experiments.kept import readable_runs
from trainer.runs import read_log

STEPS = 4  # of training and of validation, in a measurement
FEATURES = 1024  # columns of made-up features for text and for pictures, the width of the paper's text encoder
WORK = ("dataset_code", "model_code", "mrl_hidden_sizes", "lru_num_blocks", "train_batch_size", "num_negatives",
        "precision", "branch")  # fmt: skip


def work(config: Config) -> tuple[Any, ...]:
    """What the time of an epoch depends on most."""
    return tuple(getattr(config, name) for name in WORK)


def earlier(config: Config, runs_root: Path, results: Path) -> float | None:
    """Seconds of an epoch in the newest run, kept or not, that does the same work in one; None where there is none."""
    alike = [
        (run.name.removeprefix(f"{other.dataset_code}-"), run)  # its time and name, kept or not
        for run, other in readable_runs(runs_root, results)
        if work(other) == work(config)
    ]
    for _, run in sorted(alike, reverse=True):
        try:
            last = read_log(run)[-1:]
        except InputError:  # damaged
            continue
        if last:
            return last[0]["seconds"] / last[0]["epoch"]
    return None


def measured(config: Config, catalog: Catalog) -> float:
    """Seconds of an epoch: by a few steps and batches of validation, at their second time, with made-up features, so
    that nothing has to be encoded or downloaded. Counting takes none."""
    if config.model_code in COUNTING:
        return 0.0
    import torch

    from common.devices import resolve_device
    from dataloader import eval_rows
    from trainer.runlog import RunLog
    from trainer.step import Trainable
    from trainer.wiring import build_model, build_trainer

    users = len(catalog.sequences)
    few = replace(catalog, sequences=_some(catalog.sequences, min(users, STEPS * config.train_batch_size)))
    branches = (config.use_language_encoder, config.use_img_encoder)
    rows_of_length_1 = np.random.default_rng(0).normal(size=(catalog.num_items, FEATURES)) / np.sqrt(FEATURES)
    features = [rows_of_length_1.astype(np.float16) for used in branches if used]  # others take longer
    device = resolve_device(config.device)
    torch.manual_seed(0)
    model = build_model(config, catalog.num_items, features).to(device)
    assert isinstance(model, Trainable)  # of those that count there is nothing to measure
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        log = RunLog(Path(folder), [])
        short = replace(config, num_epochs=2, early_stopping=False)
        trainer = build_trainer(short, few, model, Path(folder), log, device)
        rows = eval_rows(catalog.sequences, config.lru_max_len, "val")
        trainer.val_rows = rows.part(0, STEPS * config.val_batch_size)
        trainer.fit()
    first, second = log.records
    validating = second["seconds"] - first["seconds"] - second["train_seconds"]
    return second["train_seconds"] * users / len(few.sequences) + validating * users / len(trainer.val_rows)


def _some(sequences: Sequences, users: int) -> Sequences:
    """Users from all of a dataset, evenly: those of one end may be shorter than the rest."""
    chosen = np.linspace(0, len(sequences) - 1, users).astype(int)
    rows = [sequences.of(user) for user in chosen]
    return Sequences(np.concatenate(rows), np.concatenate([[0], np.cumsum([len(row) for row in rows])]))
