"""A run that is being trained: its settings, folder, lock and log. Rank 0 alone touches files."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import processes
from common.devices import device_name
from common.errors import InputError
from common.files import write_text
from common.settings import format_value, is_runtime
from config import Config
from datasets.catalog import Catalog
from model.base import CountingModel, SequenceModel
from trainer.checkpoint import RunItems, keep_table, load_state, load_weights, write_items
from trainer.plots import plot_training
from trainer.runs import (
    ITEMS,
    LOG,
    STATE,
    TRAINING_PICTURE,
    WEIGHTS,
    check_data,
    create_run,
    describe_model,
    features_of,
    ineffective_settings,
    note_resumed,
    read_log,
    run_lock,
)
from trainer.step import find_loss


class TrainingRun:
    """A run between the command line and its last epoch. A new one gets its folder when training begins."""

    folder: Path
    log: RunLog
    on_epoch: Callable[[dict[str, Any]], None] | None = None  # called with each record of the log

    def __init__(self, config: Config, sources: dict[str, str], resumed: Path | None = None) -> None:
        """sources: where each setting came from. resumed: the folder of the run to continue; None: a new run."""
        self.config, self.sources, self.resumed = config, sources, resumed
        check_loggers(config)
        self.state: dict[str, Any] | None = None  # of the finished epochs

    def check(self, catalog: Catalog) -> None:
        """Raise InputError if the resumed run was trained on another dataset, or if there is no such loss."""
        find_loss(self.config, sampled=0 < self.config.num_negatives < catalog.num_items)
        if resumed := self.resumed:
            processes.on_main_process(lambda: check_data(resumed, catalog.digest()))

    @property
    def features(self) -> Sequence[str]:
        """Names of the feature files that the resumed run was trained on."""
        resumed = self.resumed
        return processes.on_main_process(lambda: features_of(resumed)) if resumed else ()

    @contextmanager
    def training(
        self, device: torch.device, catalog: Catalog, features: Sequence[np.memmap], num_parameters: int
    ) -> Iterator[None]:
        """Make or resume the folder, hold its lock, and print the settings. Ctrl-C prints how to continue.

        Raises InputError that names a machine whose flags are others.
        """
        trained = [f"{name}={value}" for name, value in vars(self.config).items() if not is_runtime(Config, name)]
        digest = hashlib.sha256(" ".join(trained).encode()).hexdigest()
        processes.check_same("the settings", digest, "start the same command on every machine")
        files = [Path(str(part.filename)).name for part in features]
        make = partial(
            create_run, self.config, self.sources, device_name(device), catalog.digest(), catalog.sequences.split, files
        )
        self.folder = self.resumed or processes.on_main_process(make)
        self._print_settings()
        processes.print_main(f"{num_parameters:,} trainable parameters on {device_name(device)}; run {self.folder}")
        try:
            with ExitStack() as lock:
                processes.on_main_process(lambda: lock.enter_context(run_lock(self.folder)))
                processes.on_main_process(lambda: self._keep_items(catalog))
                self._open_log(device)
                yield
        except KeyboardInterrupt:
            if processes.rank() == 0:
                print(
                    f"\ncontinue with: {processes.command()} train.py --resume {shlex.quote(str(self.folder))}",
                    file=sys.stderr,
                )
            raise

    def _keep_items(self, catalog: Catalog) -> None:
        if not (self.folder / ITEMS).exists():  # also in a resumed run of an earlier version
            write_items(self.folder, RunItems.of(catalog))

    def _open_log(self, device: torch.device) -> None:
        if self.resumed:
            processes.on_main_process(lambda: note_resumed(self.folder, device_name(device)))
            self.state = processes.on_main_process(partial(load_state, self.folder / STATE))
        done = self.state["progress"]["epoch"] if self.state else 0
        records = processes.on_main_process(partial(read_log, self.folder))
        wandb_run = tensorboard = None
        if self.config.use_wandb and processes.rank() == 0:
            wandb_run = start_wandb(self.folder, vars(self.config))
        if self.config.use_tensorboard and processes.rank() == 0:
            tensorboard = start_tensorboard(self.folder, done)
        done_records = [record for record in records if record["epoch"] <= done]
        self.log = RunLog(self.folder, done_records, wandb_run, tensorboard, self.on_epoch)
        if self.resumed:
            step = self.state["progress"].get("batch", 0) if self.state else 0
            started = f"continuing after epoch {done}{f', step {step}' if step else ''}"
            processes.print_main(started if self.state else "no epoch was finished: from the start")

    def _print_settings(self) -> None:
        """Print every setting, and where it came from unless it is the default."""
        ineffective = ineffective_settings(self.config)
        for name, value in vars(self.config).items():
            source = self.sources.get(name, "default")
            if source == "flag" and name in ineffective:
                source = "flag; without effect, given the other settings"
            processes.print_main(f"  {name:24} {format_value(value)}{'' if source == 'default' else f'   ({source})'}")

    def plot_training(self) -> None:
        """Draw the curves of loss and validation into the run's folder."""
        processes.on_main_process(lambda: self.log.plot(self.config))

    def keep_table(self, model: SequenceModel | CountingModel) -> None:
        """Keep the item table of the best weights, so that an export needs no dataset."""
        processes.on_main_process(lambda: keep_table(self.folder, model))

    def load_best(self, model: nn.Module) -> None:
        """Load the weights of the best epoch."""
        load_weights(model, self.folder / WEIGHTS)


# --------------------------------------------------------------------------------------------------------------- runlog
# Log a run: a printed line and a JSON line per epoch, its curves, Weights & Biases and TensorBoard.


class RunLog:
    """The log of a run.

    Rewrites log.jsonl every epoch, so a resumed run lists each epoch once.
    """

    def __init__(
        self,
        run: Path,
        records: list[dict[str, Any]],
        wandb_run: Any | None = None,
        tensorboard: Any | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """wandb_run, tensorboard: a run of wandb and a SummaryWriter; None: not used. on_epoch: called with records."""
        self.path, self.records, self.on_epoch = run / LOG, records, on_epoch
        self.wandb_run, self.tensorboard = wandb_run, tensorboard

    def epoch(self, record: dict[str, Any], line: str) -> None:
        """Save an epoch's record and print its line."""
        self.records.append(record)
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records))
        print(line, flush=True)
        if self.wandb_run:
            self.wandb_run.log(record, step=record["epoch"])
        if self.tensorboard:
            for name, value in scalars(record):
                self.tensorboard.add_scalar(name, value, record["epoch"])
            self.tensorboard.flush()
        if self.on_epoch:
            self.on_epoch(record)

    def plot(self, config: Config) -> None:
        """Draw loss and validation by epoch into the run's folder."""
        title = f"{config.dataset_code}, {describe_model(config)}"
        masked = ", history masked" if config.val_mask_history else ""
        plot_training(self.records, config.best_metric, title + masked, self.path.with_name(TRAINING_PICTURE))

    def finish(self, results: dict[int, dict[str, float]]) -> None:
        """Send the test metrics (size -> metrics) to Weights & Biases and TensorBoard, and close them."""
        if self.wandb_run:
            self.wandb_run.summary.update(dict(scalars(results, "test/")))
            self.wandb_run.finish()
        if self.tensorboard:
            for name, value in scalars(results, "test/"):
                self.tensorboard.add_scalar(name, value, self.records[-1]["best_epoch"])
            self.tensorboard.close()


def scalars(values: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a nested dict, each with the names of the dicts around it: val/8/NDCG@10."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", value


def check_loggers(config: Config) -> None:
    """Raise InputError if wandb or tensorboard is asked for and not installed."""
    if config.use_tensorboard and not find_spec("tensorboard"):
        raise InputError('--use_tensorboard needs the package tensorboard: pip install "tensorboard>=2.18,<3"')
    if config.use_wandb and not find_spec("wandb"):
        raise InputError('--use_wandb needs the package wandb: pip install "wandb>=0.18,<1"')


def start_tensorboard(run: Path, epoch: int) -> Any:
    """Return a SummaryWriter for the run's folder tensorboard/, which drops what it has of later epochs."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run / "tensorboard", purge_step=epoch + 1)


def start_wandb(run: Path, settings: dict[str, Any]) -> Any:
    """Start a wandb run in the run's folder.

    WANDB_MODE sets its mode; by default it is online with an API key, else offline.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    start = partial(wandb.init, project="fmrlrec", name=run.name, id=run.name, dir=run, config=settings, resume="allow")
    try:
        return start(mode=mode)  # type: ignore[arg-type]  # wandb checks the user's mode
    except wandb.Error as error:
        print(f"Weights & Biases cannot be reached ({error}); logging offline below {run / 'wandb'}", flush=True)
        return start(mode="offline")
