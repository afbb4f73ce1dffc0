"""Log a run: a printed line and a JSON line per epoch, its curves, Weights & Biases and TensorBoard."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import write_text
from config import Config
from trainer.plots import plot_training
from trainer.runs import LOG, TRAINING_PICTURE, describe_model


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


def check_tensorboard() -> None:
    """Raise InputError if tensorboard is not installed."""
    if not find_spec("tensorboard"):
        raise InputError('--use_tensorboard needs the package tensorboard: pip install "tensorboard>=2.18,<3"')


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
