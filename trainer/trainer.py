"""The training loop: epochs of steps, validation after each, the best epoch kept, early stopping.

Under torchrun every rank holds the whole model, except a large item embedding, whose rows are spread, and computes its
share of each batch. Gradients and losses are summed to the same bits on all ranks, so weights, schedule and stopping
agree on all; rank 0 alone writes.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from common import processes
from common.errors import InputError
from config import Config
from dataloader import Batch, TrainLoader, eval_rows, train_items, train_rows
from datasets.catalog import Sequences
from model.base import CountingModel, SequenceModel
from model.extensions.objective import Teachers, adjusted_prior
from model.extensions.sampled_loss import NegativeSampler
from trainer.checkpoint import save_state, save_tensors, save_weights
from trainer.evaluation import criterion, cut_offs, evaluate, set_new_item_scale
from trainer.runs import STATE, WEIGHTS, is_finished
from trainer.sparse_rows import sparse_rows
from trainer.step import GraphedStep, Step, WeightAverage, build_optimizer
from trainer.training_run import TrainingRun

CHECK_EVERY = 50  # steps between checks that the losses are finite: a check makes a GPU wait
LINE_EVERY = 60.0  # seconds between progress lines where there is no terminal


@dataclass
class Progress:
    """How far a run is. With weights, optimizer and random states this is all that resuming needs."""

    epoch: int = 0  # finished ones
    step: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    seconds: float = 0.0
    # Of the unfinished epoch:
    batch: int = 0  # steps
    loss: float = 0.0  # sum over the steps
    clipped: float = 0.0  # clipped steps
    train_seconds: float = 0.0

    def start_epoch(self) -> None:
        """Forget the epoch that ended."""
        self.batch, self.loss, self.clipped, self.train_seconds = 0, 0.0, 0.0, 0.0


class Trainer:
    """Trains a model on the training items of all users, and writes the run's folder."""

    def __init__(
        self,
        model: SequenceModel,
        sequences: Sequences,
        config: Config,
        run: TrainingRun,
        teachers: Teachers | None = None,
    ) -> None:
        """Resumes if the run has a state of finished epochs. teachers: trained models to learn from."""
        device = next(model.parameters()).device
        rows = train_rows(sequences, config.lru_max_len, config.first_item_label)
        ranks = processes.rank(), processes.world_size()
        self.model, self.config, self.run = model, config, run
        self.loader = TrainLoader(rows, config.train_batch_size, config.seed, device, *ranks)
        self.val_rows = eval_rows(sequences, config.lru_max_len, "val")
        if model.items.gate:
            model.items.gate.trained.copy_(self.loader.token_counts(model.num_items) > 0)
        self.step = build_step(model, self.loader, config, teachers)
        self.average = WeightAverage(model, config.ema_decay, self.step.rows) if config.ema_decay else None
        self.patience = config.early_stopping_patience if config.early_stopping else None
        self.criterion = criterion(config.best_metric, config.val_mask_history)
        self.progress, self._started, self._saved = Progress(), 0.0, ""
        if config.enable_lr_schedule and config.warmup_steps >= self.num_steps:
            processes.print_main(
                f"--warmup_steps {config.warmup_steps}: the {self.num_steps} steps of this training all warm up, and "
                f"none has the learning rate of {config.lr}"
            )
        if run.state:
            self.load_state(run.state)
            run.state = None  # it may be large

    @property
    def epoch_steps(self) -> int:
        """Return the steps of an epoch."""
        return min(self.config.epoch_steps or len(self.loader), len(self.loader))

    @property
    def num_steps(self) -> int:
        """Steps of num_epochs."""
        return self.config.num_epochs * self.epoch_steps

    @property
    def eval_model(self) -> SequenceModel:
        """The model that is validated and saved: the average of the weights, if there is one."""
        return self.average.model if self.average else self.model

    def fit(self) -> Progress:
        """Train to the end. Raises InputError if loss or weights are not finite; the last good checkpoint stays."""
        if self.config.validate_untrained and self.progress.step == 0:
            self.run.log.records.clear()  # of a run that was cut off in its first epoch
            self._keep(None, self.validate(), 0.0, 0.0)
        while not self.finished():
            self._started = time.perf_counter() - self.progress.train_seconds
            self.model.train()
            self.step.clipped.fill_(self.progress.clipped)
            losses: list[Tensor] = []
            for batch in self._batches(losses):
                self._set_learning_rate()
                self.progress.step += 1
                losses.append(self.step(batch))
                if self.average:
                    self.average.update(self.model, self.progress.step)
            if self.step.rows:
                self.step.rows.catch_up()
            self._check_weights()
            loss, trained = self.progress.loss / self.epoch_steps, time.perf_counter() - self._started
            metrics = self.validate()
            both = time.perf_counter() - self._started
            self.progress.epoch += 1
            self.progress.seconds += both
            self.progress.start_epoch()
            self._keep(loss, metrics, trained, both - trained)
            self._saved = f"epoch {self.progress.epoch}"
        if self.step.rows:
            self.step.rows.end()
        processes.print_main(f"best epoch {self.progress.best_epoch}: val {self.criterion} {self.progress.best:.4f}")
        return self.progress

    def finished(self) -> bool:
        """Return whether there is nothing left to train."""
        progress = self.progress
        return is_finished(progress.epoch, progress.best_epoch, self.config.num_epochs, self.patience)

    def validate(self) -> dict[int, dict[str, float]]:
        """Return the validation metrics of every size."""
        config, rows = self.config, self.step.rows
        with rows.reading(self.eval_model.items) if rows else contextlib.nullcontext():
            set_new_item_scale(self.eval_model)
            return evaluate(
                self.eval_model,
                self.val_rows,
                sizes=self.model.sizes,
                batch_size=config.val_batch_size,
                ks=cut_offs(config.metric_ks, config.best_metric),
                mask_history=config.val_mask_history,
            )

    def _batches(self, losses: list[Tensor]) -> Iterator[Batch]:
        """Yield the rest of an epoch, and check the `losses` of the steps, show progress and save on the way."""
        progress, number, count = self.progress, self.progress.epoch + 1, self.epoch_steps
        alone, save_every = processes.world_size() == 1, 60 * self.config.save_every_minutes or math.inf
        printed = saved = time.perf_counter()
        batches = itertools.islice(self.loader.epoch(number), progress.batch, count)
        with _progress_bar(f"epoch {number}", progress.batch, count) as bar:
            for batch in batches:
                yield batch
                bar.update()
                progress.batch += 1
                now = time.perf_counter()
                full, last, due = len(losses) == CHECK_EVERY, progress.batch == count, now - saved >= save_every
                if full or last or (alone and due):
                    self._check(losses)
                    bar.set_postfix(loss=f"{progress.loss / progress.batch:.4f}")
                    if not last and processes.on_main_process(partial(bool, due)):
                        self._save_within_epoch()
                        saved = time.perf_counter()
                if bar.disable and not last and now - printed >= LINE_EVERY:
                    self._print_progress(now, len(losses))
                    printed = now

    def _set_learning_rate(self) -> None:
        lr = self.lr_at(self.progress.step)
        for group in self.step.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, from 0: linear warm-up, then half a cosine to 0; or the constant rate."""
        config = self.config
        if not config.enable_lr_schedule:
            return config.lr
        if step < config.warmup_steps:
            return config.lr * (step + (not config.warmup_from_zero)) / config.warmup_steps
        steps = max(1, self.num_steps - config.warmup_steps)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / steps)))

    def _check(self, losses: list[Tensor]) -> None:
        """Count the losses and clear the list. Raises InputError that names the step of one that is not finite."""
        values = processes.add_up(torch.stack(losses)).tolist()
        losses.clear()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                self._give_up(f"the loss is {value}", self.progress.step - len(values) + i + 1)
            self.progress.loss += value

    def _save_within_epoch(self) -> None:
        self._check_weights()
        self.progress.clipped = float(self.step.clipped)
        self.progress.train_seconds = time.perf_counter() - self._started
        self._save_state()
        self._saved = f"epoch {self.progress.epoch}, step {self.progress.batch}"

    def _save_state(self) -> None:
        state = self.state()
        processes.on_main_process(lambda: save_state(self.run.folder / STATE, state))

    def _print_progress(self, now: float, unchecked: int) -> None:
        """Print a line in place of a progress bar. unchecked: steps whose losses are not counted yet."""
        progress, count = self.progress, self.epoch_steps
        rate = progress.batch / (now - self._started)
        counted = progress.batch - unchecked
        loss = f"  loss {progress.loss / counted:.4f}" if counted else ""  # counted every CHECK_EVERY steps
        processes.print_main(
            f"epoch {progress.epoch + 1:3d}  step {progress.batch}/{count}{loss}  {rate:.1f} steps/s  "
            f"{(count - progress.batch) / rate / 60:.1f} min left in the epoch"
        )

    def _check_weights(self) -> None:
        """Raise InputError if the epoch's last update, after which no loss was computed, broke the weights."""
        rows = self.step.rows
        weights = (rows.rows if rows and p is rows.weight else p for p in self.model.parameters())
        if processes.any_rank(not torch.stack([torch.isfinite(p).all() for p in weights]).all()):
            self._give_up("weights are not finite", self.progress.step)

    def _give_up(self, what: str, step: int) -> NoReturn:
        epoch, saved = self.progress.epoch, self._saved
        kept = f"the state after {saved} is kept in {self.run.folder}" if saved else "no epoch was finished"
        raise InputError(
            f"{what} at step {step} (epoch {epoch + 1}); {kept}. Try a smaller --lr or --max_grad_norm, or more "
            f"--warmup_steps"
        )

    def _keep(
        self, loss: float | None, metrics: dict[int, dict[str, float]], train_seconds: float, val_seconds: float
    ) -> None:
        """Note whether the epoch is the best one, and write its checkpoints and log."""
        progress, value = self.progress, metrics[self.model.sizes[-1]][self.config.best_metric]
        if value > progress.best:
            progress.best, progress.best_epoch = value, progress.epoch
        if progress.best_epoch == progress.epoch:
            self._save_weights()
        processes.on_main_process(lambda: self._write(loss, metrics, train_seconds, val_seconds))
        if progress.epoch:
            self._save_state()

    def _save_weights(self) -> None:
        weights, path = self._weights(self.eval_model), self.run.folder / WEIGHTS
        processes.on_main_process(lambda: save_tensors(weights, path, {"epoch": str(self.progress.epoch)}))

    def _write(
        self, loss: float | None, metrics: dict[int, dict[str, float]], train_seconds: float, val_seconds: float
    ) -> None:
        progress = self.progress
        record = {
            "epoch": progress.epoch,
            "step": progress.step,
            "loss": loss,
            "lr": self.lr_at(max(0, progress.step - 1)),
            "clipped": round(float(self.step.clipped) / self.epoch_steps, 4),  # share of the steps
            "train_seconds": round(train_seconds, 3),
            "val_seconds": round(val_seconds, 3),
            "seconds": round(progress.seconds, 3),
            "best_epoch": progress.best_epoch,
            "val": {str(m): metrics[m] for m in metrics},
        }
        self.run.log.epoch(record, self._line(record) + metrics_line(record, self.config))

    def _line(self, record: dict[str, Any]) -> str:
        progress, value = self.progress, record["val"][str(self.model.sizes[-1])][self.config.best_metric]
        best = " *" if progress.best_epoch == progress.epoch else "  "
        if not progress.epoch:
            return f"untrained: val {self.criterion} {value:.4f}"
        per_epoch = progress.seconds / progress.epoch
        rate = self.epoch_steps / max(record["train_seconds"], 1e-9)
        eta = per_epoch * (self.config.num_epochs - progress.epoch)
        return (
            f"epoch {progress.epoch:3d}/{self.config.num_epochs}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"val {self.criterion} {value:.4f}{best}  {rate:.1f} steps/s  "
            f"train {record['train_seconds']:.1f} s  val {record['val_seconds']:.1f} s  "
            f"at most {eta / 60:.1f} min left"
        )

    def _weights(self, model: SequenceModel) -> dict[str, Tensor]:
        """Return the weights of the model or of its average, complete on rank 0. Every rank takes part in it."""
        rows, weights, learned = self.step.rows, model.state_dict(), model.items.learned
        if rows and learned is not None:
            (name,) = (name for name, weight in model.named_parameters() if weight is learned)
            weights[name] = rows.gather(rows.stored(learned))
        return weights

    def state(self) -> dict[str, Any]:
        """Return all that resuming needs. Every rank takes part in it."""
        device, rows = self.loader.device, self.step.rows
        return {
            "model": self._weights(self.model),
            "average": self._weights(self.average.model) if self.average else None,
            "optimizer": self.step.optimizer.state_dict(),
            "rows": rows.state() if rows else None,
            "progress": vars(self.progress).copy(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`. Raises InputError if it is another model's."""
        models = {"model": self.model} | ({"average": self.average.model} if self.average else {})
        rows = self.step.rows
        learned = [weight for model in models.values() if (weight := model.items.learned) is not None]
        try:
            with rows.loading(*learned) if rows else contextlib.nullcontext():
                for name, model in models.items():
                    model.load_state_dict(state[name])
        except RuntimeError as error:
            raise InputError(f"{self.run.folder / STATE} does not fit the model of config.json: {error}") from None
        if (state.get("rows") is None) != (rows is None):
            device = "another device" if rows else "a CPU"
            raise InputError(
                f"{self.run.folder / STATE} is of a training on {device}, where --item_embedding_updates auto chose "
                f"otherwise; resume it there (--device), or train another run"
            )
        if rows:
            rows.load_state(state["rows"])
        own = [{name: group[name] for name in ("lr", "capturable")} for group in self.step.optimizer.param_groups]
        self.step.optimizer.load_state_dict(state["optimizer"])
        for group, of_device in zip(self.step.optimizer.param_groups, own, strict=True):
            group |= of_device  # the state may come from another device
        self.progress = Progress(**state["progress"])
        self._saved = "the last checkpoint"
        torch.set_rng_state(state["rng"])
        if self.loader.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.loader.device)


def build_step(
    model: SequenceModel, loader: TrainLoader, config: Config, teachers: Teachers | None = None
) -> Step | GraphedStep:
    """Return the training step: as CUDA graphs on GPUs, with sampled negatives if the settings ask for them."""
    sampled = 0 < config.num_negatives < model.num_items
    if config.num_negatives and not sampled:
        processes.print_main(
            f"--num_negatives {config.num_negatives}: there are only {model.num_items} items, so all are scored"
        )
    counts = loader.label_counts(model.num_items)
    sampler = NegativeSampler(counts, config.num_negatives) if sampled else None
    prior = adjusted_prior(counts, config.logit_adjustment) if config.logit_adjustment else None
    if teachers:
        teachers.add_priors(counts, prior)
    rows = sparse_rows(model, config, sampled)
    step = Step(model, build_optimizer(model, config, rows), config, sampler, rows, teachers, prior)
    static = all(each.static_shapes for each in (model, *(teachers.models if teachers else ())))
    # Other losses, such as the plain one, may read numbers from the GPU, which a graph cannot.
    graphed = loader.device.type == "cuda" and static and config.loss == "fast" and not rows
    return GraphedStep(step) if graphed else step


def metrics_line(record: dict[str, Any], config: Config) -> str:
    """Return a further line with all validation metrics of the largest size; "" unless --print_val_metrics."""
    size = str(config.mrl_hidden_sizes[-1])
    values = "  ".join(f"{name} {value:.4f}" for name, value in record["val"][size].items())
    return f"\n  size {size}: {values}" if config.print_val_metrics else ""


def _progress_bar(title: str, done: int, count: int) -> tqdm:
    hidden = True if processes.rank() else None  # None: tqdm is silent if stderr is no terminal
    return tqdm(total=count, initial=done, desc=title, leave=False, unit="step", disable=hidden)


# ------------------------------------------------------------------------------------------------------------- counting
# Models that only count: one epoch, nothing to train, nothing to resume.


class CountingTrainer:
    """Counts the training items of all users, and writes the run's folder, as `Trainer` does."""

    def __init__(self, model: CountingModel, sequences: Sequences, config: Config, run: TrainingRun) -> None:
        self.model, self.sequences, self.config, self.run = model, sequences, config, run

    def fit(self) -> None:
        """Count, validate, and write the weights and the log's only line."""
        model, config, started = self.model, self.config, time.perf_counter()
        device = next(model.buffers()).device
        users, items = (torch.as_tensor(part, device=device) for part in train_items(self.sequences))
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
            "val_seconds": round(time.perf_counter() - counted, 3),
            "seconds": round(time.perf_counter() - started, 3),
            "best_epoch": 1,
            "val": {str(m): metrics[m] for m in metrics},
        }
        name, value = criterion(config.best_metric, config.val_mask_history), metrics[model.sizes[-1]]

        def write() -> None:
            save_weights(model, self.run.folder / WEIGHTS, {"epoch": "1"})
            line = f"counted in {record['train_seconds']:.1f} s: val {name} {value[config.best_metric]:.4f}"
            self.run.log.epoch(record, line + metrics_line(record, config))

        processes.on_main_process(write)
