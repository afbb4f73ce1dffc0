"""Models that only count: one epoch, nothing to train, nothing to resume."""

import time

import torch

from common import processes
from config import Config
from dataloader import eval_rows, train_items
from datasets.catalog import Sequences
from model.baselines.counting import Popularity
from trainer.checkpoint import save_weights
from trainer.evaluation import evaluate
from trainer.metrics import criterion, cut_offs
from trainer.runs import WEIGHTS
from trainer.training_run import TrainingRun


class CountingTrainer:
    """Counts the training items of all users, and writes the run's folder, as `Trainer` does."""

    def __init__(self, model: Popularity, sequences: Sequences, config: Config, run: TrainingRun) -> None:
        self.model, self.sequences, self.config, self.run = model, sequences, config, run

    def fit(self) -> None:
        """Count, validate, and write the weights and the log's only line."""
        model, config, started = self.model, self.config, time.perf_counter()
        users, items = (torch.as_tensor(part, device=model.counts.device) for part in train_items(self.sequences))
        model.count(users, items)
        counted = time.perf_counter()
        metrics = evaluate(
            model,
            eval_rows(self.sequences, config.lru_max_len, "val"),
            sizes=model.sizes,
            batch_size=config.val_batch_size,
            ks=cut_offs(config.metric_ks, config.best_metric),
            mask_history=config.val_mask_history,
        )
        record = {
            "epoch": 1,
            "step": 0,
            "train_seconds": round(counted - started, 3),
            "seconds": round(time.perf_counter() - started, 3),
            "best_epoch": 1,
            "val": {str(m): metrics[m] for m in metrics},
        }
        name, value = criterion(config.best_metric, config.val_mask_history), metrics[model.sizes[-1]]

        def write() -> None:
            save_weights(model, self.run.folder / WEIGHTS, {"epoch": "1"})
            line = f"counted in {record['train_seconds']:.1f} s: val {name} {value[config.best_metric]:.4f}"
            self.run.log.epoch(record, line)

        processes.on_main_process(write)
