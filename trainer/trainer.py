"""The training loop: the learning rate, validation every epoch, the best epoch kept, early stopping.

Under torchrun every rank has the whole model and computes its share of each batch. What the ranks add up, gradients and
losses, has the same bits on each, so weights, schedule and stopping stay the same on all; rank 0 alone writes.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from common import processes
from common.errors import InputError
from dataloader import Batch, EvalRows, TrainLoader
from trainer.averaging import WeightAverage
from trainer.checkpoint import save_state, save_weights
from trainer.evaluation import evaluate
from trainer.metrics import criterion, cut_offs
from trainer.runlog import RunLog
from trainer.runs import STATE, WEIGHTS, is_finished
from trainer.step import GraphedStep, Step, Trainable

CHECK_EVERY = 50  # steps between looks at whether the losses are finite: a look makes a GPU wait


@dataclass
class Progress:
    """How far a run is; with weights, optimizer and random states, all that resuming needs."""

    epoch: int = 0  # finished ones
    step: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    seconds: float = 0.0


@dataclass
class Trainer:
    """Repeats a step and keeps the run folder. `fit` runs until num_epochs or until validation stops improving."""

    step: Step | GraphedStep
    loader: TrainLoader
    val_rows: EvalRows
    run: Path
    log: RunLog
    num_epochs: int
    lr: float
    warmup_steps: int
    schedule: bool
    patience: int | None  # None: no early stopping
    val_batch_size: int
    metric_ks: tuple[int, ...]
    best_metric: str
    mask_history: bool = False  # in validation
    ema_decay: float = 0.0  # of the weights; 0: no average
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.average = WeightAverage(self.model, self.ema_decay) if self.ema_decay else None

    @property
    def model(self) -> Trainable:
        """What is trained."""
        return self.step.model

    @property
    def kept(self) -> Trainable:
        """What is validated, and kept where it is the best: the average of the weights, where there is one."""
        return self.average.model if self.average else self.model

    @property
    def criterion(self) -> str:
        """What picks the best epoch, in words."""
        return criterion(self.best_metric, self.mask_history)

    def fit(self) -> Progress:
        """Train to the end. Raises InputError if loss or weights are not finite; the last good checkpoint stays."""
        while not self.finished():
            started = time.perf_counter()
            loss = self._train_epoch()
            self._check_weights()
            trained = time.perf_counter()
            metrics = self.validate()
            self.progress.epoch += 1
            self.progress.seconds += time.perf_counter() - started
            self._keep(loss, metrics, trained - started)
        return self.progress

    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return is_finished(self.progress.epoch, self.progress.best_epoch, self.num_epochs, self.patience)

    def validate(self) -> dict[int, dict[str, float]]:
        """Validation metrics of every size."""
        return evaluate(
            self.kept,
            self.val_rows,
            sizes=self.model.sizes,
            batch_size=self.val_batch_size,
            ks=cut_offs(self.metric_ks, self.best_metric),
            mask_history=self.mask_history,
        )

    def _train_epoch(self) -> float:
        """One pass over the users. Returns the mean loss of its steps."""
        self.model.train()
        number = self.progress.epoch + 1
        total, losses = 0.0, []
        batches = tqdm(
            self.loader.epoch(number),
            f"epoch {number}",
            len(self.loader),
            leave=False,
            unit="step",
            disable=True if processes.rank() else None,
        )
        for i, batch in enumerate(batches, start=1):
            losses.append(self._update(batch))
            if len(losses) == CHECK_EVERY or i == len(self.loader):
                total += self._check(losses)
                losses = []
                batches.set_postfix(loss=f"{total / i:.4f}")
        return total / len(self.loader)

    def _update(self, batch: Batch) -> Tensor:
        lr = self.lr_at(self.progress.step)
        for group in self.step.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.progress.step += 1
        loss = self.step(batch)
        if self.average:
            self.average.update(self.model, self.progress.step)
        return loss

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a half cosine to 0 at the end of num_epochs; or always
        the same."""
        if not self.schedule:
            return self.lr
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        steps = max(1, self.num_epochs * len(self.loader) - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warmup_steps) / steps)))

    def _check(self, losses: list[Tensor]) -> float:
        """The sum of the losses. Raises InputError that names the step where one is not finite."""
        values = processes.add_up(torch.stack(losses)).tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                self._give_up(f"the loss is {value}", self.progress.step - len(values) + i + 1)
        return sum(values)

    def _check_weights(self) -> None:
        """Raise InputError where the epoch's last update, after which no loss was computed, broke the weights."""
        if not torch.stack([torch.isfinite(p).all() for p in self.model.parameters()]).all():
            self._give_up("weights are not finite", self.progress.step)

    def _give_up(self, what: str, step: int) -> NoReturn:
        epoch = self.progress.epoch
        kept = f"the state after epoch {epoch} is kept in {self.run}" if epoch else "no epoch was finished"
        raise InputError(
            f"{what} at step {step} (epoch {epoch + 1}); {kept}. Try a smaller --lr or --max_grad_norm, or more "
            f"--warmup_steps"
        )

    def _keep(self, loss: float, metrics: dict[int, dict[str, float]], train_seconds: float) -> None:
        """Note whether the epoch is the best one; write its checkpoints and log."""
        progress, value = self.progress, metrics[self.model.sizes[-1]][self.best_metric]
        if value > progress.best:
            progress.best, progress.best_epoch = value, progress.epoch
        processes.on_main_process(lambda: self._write(loss, metrics, train_seconds))

    def _write(self, loss: float, metrics: dict[int, dict[str, float]], train_seconds: float) -> None:
        progress = self.progress
        if progress.best_epoch == progress.epoch:
            save_weights(self.kept, self.run / WEIGHTS, {"epoch": str(progress.epoch)})
        record = {
            "epoch": progress.epoch,
            "step": progress.step,
            "loss": loss,
            "lr": self.lr_at(progress.step - 1),
            "train_seconds": round(train_seconds, 3),
            "seconds": round(progress.seconds, 3),
            "best_epoch": progress.best_epoch,
            "val": {str(m): metrics[m] for m in metrics},
        }
        self.log.epoch(record, self._line(record))
        save_state(self.run / STATE, self.state())

    def _line(self, record: dict[str, Any]) -> str:
        progress, value = self.progress, record["val"][str(self.model.sizes[-1])][self.best_metric]
        best = " *" if progress.best_epoch == progress.epoch else "  "
        per_epoch = progress.seconds / progress.epoch
        rate = len(self.loader) / max(record["train_seconds"], 1e-9)
        eta = per_epoch * (self.num_epochs - progress.epoch)
        return (
            f"epoch {progress.epoch:3d}/{self.num_epochs}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"val {self.criterion} {value:.4f}{best}  {rate:.1f} steps/s  {per_epoch:.1f} s/epoch  "
            f"at most {eta / 60:.1f} min left"
        )

    def state(self) -> dict[str, Any]:
        """All that resuming needs."""
        device = self.loader.device
        return {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "optimizer": self.step.optimizer.state_dict(),
            "progress": vars(self.progress).copy(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`. Raises InputError for that of another model."""
        try:
            self.model.load_state_dict(state["model"])
            if self.average:
                self.average.model.load_state_dict(state["average"])
        except RuntimeError as error:
            raise InputError(f"{self.run / STATE} does not fit the model of config.json: {error}") from None
        own = [{name: group[name] for name in ("lr", "capturable")} for group in self.step.optimizer.param_groups]
        self.step.optimizer.load_state_dict(state["optimizer"])
        for group, of_device in zip(self.step.optimizer.param_groups, own, strict=True):
            group |= of_device  # not what another device wrote
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])
        if self.loader.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.loader.device)
