"""A run of a model that only counts: one epoch, in which there is nothing to train and nothing to resume."""

import time
from pathlib import Path

import torch

from common import processes
from dataloader import EvalRows, train_items
from datasets.catalog import Sequences
from model.base import CountingModel
from trainer.checkpoint import save_weights
from trainer.evaluation import evaluate
from trainer.metrics import criterion, cut_offs
from trainer.runlog import RunLog
from trainer.runs import WEIGHTS


def count(
    model: CountingModel,
    sequences: Sequences,
    val_rows: EvalRows,
    run: Path,
    log: RunLog,
    *,
    batch_size: int,
    ks: tuple[int, ...],
    best_metric: str,
    mask_history: bool,
) -> None:
    """Count what users had in training, validate, and write the run's weights and the line of its epoch."""
    started = time.perf_counter()
    device = next(model.buffers()).device
    model.count(*(torch.as_tensor(part, device=device) for part in train_items(sequences)))
    counted = time.perf_counter()
    ks = cut_offs(ks, best_metric)
    metrics = evaluate(model, val_rows, sizes=model.sizes, batch_size=batch_size, ks=ks, mask_history=mask_history)
    record = {
        "epoch": 1,
        "step": 0,
        "train_seconds": round(counted - started, 3),
        "seconds": round(time.perf_counter() - started, 3),
        "best_epoch": 1,
        "val": {str(m): metrics[m] for m in metrics},
    }

    def write() -> None:
        save_weights(model, run / WEIGHTS, {"epoch": "1"})
        value = f"val {criterion(best_metric, mask_history)} {metrics[model.sizes[-1]][best_metric]:.4f}"
        log.epoch(record, f"counted in {record['train_seconds']:.1f} s: {value}")

    processes.on_main_process(write)
