"""Measure nightly updates: train on the first 90 % of the events, add the rest in ten slices by train.py --init_from.

python -m experiments.nightly --dataset_code beauty
python -m experiments.nightly --full "--preset plus --language_encoder lexical" --update "--num_epochs 1 --lr 3e-4"

The prepared files have the order of each user's events but no times. As a stand-in, a user's n events are spread evenly
over the time from 0 to 1, with a random phase. The catalogue of a night has the items that occurred until then. After
some nights a model is trained anew on the same data. It, the updated model and the first one, which gets no update, are
validated on that data. The test set is never read.
"""

from __future__ import annotations

import gzip
import itertools
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import train
from common.cli import Parser, run_cli
from common.files import write_json, write_text
from config import Config
from dataloader import eval_rows
from datasets.catalog import MIN_ITEMS, Catalog, load_catalog
from datasets.items import as_json
from trainer.evaluation import evaluate
from trainer.load_run import load_run
from trainer.runs import read_best_epoch

NIGHTS = 10
METRIC = "NDCG@10"
UPDATE = "--num_epochs 1 --epoch_steps 80 --lr 3e-4 --warmup_steps 10 --validate_untrained"


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train, update every night, train anew on some, and return a row for each night."""
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset_code", default="beauty", metavar="NAME", help="prepared dataset (default: beauty)")
    parser.add_argument(
        "--data_root", default=Config.data_root, metavar="FOLDER", help="location of the data (default: data)"
    )
    parser.add_argument(
        "--held_back", type=float, default=0.1, metavar="X", help="share of the events to add (default: 0.1)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("experiments/runs/nightly"),
        metavar="FOLDER",
        help="output folder (default: %(default)s)",
    )
    parser.add_argument(
        "--full",
        default="--preset plus",
        metavar="FLAGS",
        help="flags of the first training and of those anew (default: %(default)s)",
    )
    parser.add_argument("--update", default=UPDATE, metavar="FLAGS", help="flags of an update (default: %(default)s)")
    parser.add_argument(
        "--anew", default="10", metavar="N,N", help="nights that also train anew, from 1 to 10 (default: 10)"
    )
    arguments = parser.parse_args(argv)
    anew = {int(night) for night in arguments.anew.split(",")}

    catalog, out = load_catalog(arguments.data_root, arguments.dataset_code), arguments.out
    when = event_times(catalog)
    held_back = arguments.held_back
    write_night(catalog, when, 1 - held_back, 0, out)
    run, seconds = trained(f"--dataset_code {catalog.name} {arguments.full} --run_name full-0", 0, out)
    first, rows = run, [{"night": 0, "no_update": best(run), "updated": best(run), "seconds": seconds}]
    for night in range(1, NIGHTS + 1):
        write_night(catalog, when, 1 - held_back + held_back * night / NIGHTS, night, out)
        # Another seed draws other users.
        flags = f"--init_from {shlex.quote(str(run))} {arguments.update} --seed {42 + night} --run_name update-{night}"
        run, seconds = trained(flags, night, out)
        row = {"night": night, "updated": best(run), "seconds": seconds}
        if night in anew:
            full, seconds = trained(
                f"--dataset_code {catalog.name} {arguments.full} --run_name full-{night}", night, out
            )
            row |= {"anew": best(full), "anew_seconds": seconds, "no_update": validated(first, night, out)}
        rows.append(row)
        write_json(out / "nightly.json", {"metric": METRIC, "rows": rows})
    print_rows(rows)
    return rows


def event_times(catalog: Catalog) -> np.ndarray:
    """Return a time from 0 to 1 for every event, increasing in each user's history."""
    offsets = catalog.sequences.offsets
    lengths = np.diff(offsets)
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    phase = np.random.default_rng(0).random(len(lengths))
    return (position + np.repeat(phase, lengths)) / np.repeat(lengths, lengths)


def write_night(catalog: Catalog, when: np.ndarray, share: float, night: int, out: Path) -> None:
    """Write the dataset of a night: the first `share` of the events, and the items that occurred until then."""
    seen = when <= np.quantile(when, share)
    items, offsets = catalog.sequences.items, catalog.sequences.offsets
    kept = np.unique(items[seen])
    number = np.zeros(catalog.num_items + 1, dtype=np.int64)
    number[kept] = np.arange(1, len(kept) + 1)
    histories = [number[items[a:b][seen[a:b]]] for a, b in itertools.pairwise(offsets)]
    lines = [f"{user} {' '.join(map(str, v))}" for user, v in enumerate(histories, start=1) if len(v) >= MIN_ITEMS]
    folder = out / f"data-{night}" / catalog.name
    write_text(folder / "sequential_data.txt", "\n".join(lines) + "\n")
    write_json(folder / "datamaps.json", {"item2id": {catalog.asins[i - 1]: str(number[i]) for i in kept}})
    records = (as_json(catalog.metadata[i - 1] | {"asin": catalog.asins[i - 1]}) for i in kept)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "meta.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def trained(flags: str, night: int, out: Path) -> tuple[Path, float]:
    """Train on the data of a night without the test; return the run and the CPU seconds of all, features included."""
    started = time.process_time()
    where = f"--data_root {shlex.quote(str(out / f'data-{night}'))} --runs_root {shlex.quote(str(out))} --no-test"
    return train.main(shlex.split(f"{flags} {where}")), time.process_time() - started


def best(run: Path) -> float:
    """Return the validation metric of a run's best epoch at its largest size."""
    of_sizes = read_best_epoch(run)["val"]
    return of_sizes[max(of_sizes, key=int)][METRIC]


def validated(run: Path, night: int, out: Path) -> float:
    """Return the validation metric of a run as it is on the data of a night, at its largest size."""
    config, catalog, model = load_run(run, {"data_root": str(out / f"data-{night}")}, newer_data=True)
    metrics = evaluate(
        model,
        eval_rows(catalog.sequences, config.lru_max_len, "val"),
        sizes=model.sizes,
        batch_size=config.val_batch_size,
        ks=config.metric_ks,
        mask_history=config.val_mask_history,
    )
    return metrics[model.sizes[-1]][METRIC]


def print_rows(rows: list[dict[str, float]]) -> None:
    """Print the table."""
    print(f"night  updated  seconds  no update     anew  seconds   (validation {METRIC}; CPU seconds)")
    for row in rows:
        first = f"  {row['no_update']:9.4f}" if "no_update" in row else ""
        anew = f"  {row['anew']:7.4f}  {row['anew_seconds']:7.1f}" if "anew" in row else ""
        print(f"{row['night']:5d}  {row['updated']:7.4f}  {row['seconds']:7.1f}{first}{anew}")


if __name__ == "__main__":
    run_cli(main)
