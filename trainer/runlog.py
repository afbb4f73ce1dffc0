"""Log a run: a printed line and a JSON line per epoch, and Weights & Biases."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from common.files import write_text
from trainer.runs import LOG


class RunLog:
    """The log of a run.

    Rewrites log.jsonl every epoch, so a resumed run lists each epoch once.
    """

    def __init__(self, run: Path, records: list[dict[str, Any]], wandb_run: Any | None = None) -> None:
        self.path, self.records, self.wandb_run = run / LOG, records, wandb_run

    def epoch(self, record: dict[str, Any], line: str) -> None:
        """Save an epoch's record and print its line."""
        self.records.append(record)
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records))
        print(line, flush=True)
        if self.wandb_run:
            self.wandb_run.log(record, step=record["epoch"])

    def finish(self, results: dict[int, dict[str, float]]) -> None:
        """Send the test metrics (size -> metrics) to Weights & Biases and finish its run."""
        if self.wandb_run:
            metrics = {f"test/{m}/{name}": value for m in results for name, value in results[m].items()}
            self.wandb_run.summary.update(metrics)
            self.wandb_run.finish()


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
