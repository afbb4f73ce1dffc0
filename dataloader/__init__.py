"""Turn sequences into leave-one-out splits and packed batches on a device."""

from dataloader.batches import (
    Batch,
    EvalBatch,
    EvalRows,
    TrainLoader,
    TrainRows,
    eval_batches,
    eval_rows,
    times_trained,
    train_items,
    train_rows,
)

__all__ = [
    "Batch",
    "EvalBatch",
    "EvalRows",
    "TrainLoader",
    "TrainRows",
    "eval_batches",
    "eval_rows",
    "times_trained",
    "train_items",
    "train_rows",
]
