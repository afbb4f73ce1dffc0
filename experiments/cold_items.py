"""Test recommendations of new items: hold items out, train on the rest, add them to an export.

python -m experiments.cold_items make --dataset_code beauty      # data/beauty-cold: a twentieth of the items held out
python train.py --dataset_code beauty-cold ...
python -m serving.export --run experiments/runs/beauty-cold/... --out exports/beauty-cold
python -m experiments.cold_items test exports/beauty-cold --out experiments/runs/beauty-cold/.../cold_items.json

beauty-cold has texts but no pictures, and no presets: give beauty's as flags.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from common.cli import Parser, run_cli
from common.errors import InputError
from common.files import MAX_ID, check_schema, read_json, replacing, write_json, write_text
from config import Config
from datasets.catalog import MIN_ITEMS, Catalog, load_catalog
from datasets.items import as_json

if TYPE_CHECKING:
    from experiments.store import KeptRun

HELD_OUT = "held_out.json"
KS = (10, 50, 100)
HINT = "python -m experiments.cold_items make writes it"


class HeldItem(Struct):
    """Metadata of a held-out item; other attributes are texts."""

    asin: Annotated[str, Meta(min_length=1, max_length=MAX_ID)]


class ColdUser(Struct):
    """A user whose last item is held out."""

    history: list[str]
    target: str


class HeldOut(Struct):
    """held_out.json; its other fields are written and never read."""

    items: Annotated[list[HeldItem], Meta(min_length=1)]
    users: Annotated[list[ColdUser], Meta(min_length=1)]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Make the dataset, or test an export of a run on it; return what was written."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write <data_root>/<dataset_code>-cold")
    make.add_argument("--dataset_code", default="beauty", metavar="NAME", help="prepared dataset (default: beauty)")
    make.add_argument("--from_root", metavar="FOLDER", help="data root of the whole dataset (default: %(default)s)")
    make.add_argument("--data_root", metavar="FOLDER", help="data root to write to (default: %(default)s)")
    make.set_defaults(from_root=Config.data_root, data_root=Config.data_root)
    make.add_argument(
        "--share", type=float, default=0.05, metavar="X", help="share of the items to hold out (default: 0.05)"
    )
    make.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the choice (default: 0)")
    test = commands.add_parser("test", help="add the held-out items to an export and rank them")
    test.add_argument("export", metavar="EXPORT", help="export of a run on the dataset that make wrote")
    test.add_argument(
        "--data_root", default=Config.data_root, metavar="FOLDER", help="location of the data (default: data)"
    )
    test.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    arguments = parser.parse_args(argv)
    if arguments.command == "make":
        if not 0 < arguments.share < 1:
            raise InputError(f"--share {arguments.share} must lie between 0 and 1")
        if arguments.seed < 0:
            raise InputError(f"--seed {arguments.seed} must be at least 0")
        catalog = load_catalog(arguments.from_root, arguments.dataset_code)
        if catalog.sequences.cuts is not None:
            raise InputError(
                f"{arguments.dataset_code} is split by {catalog.sequences.split}, and cold items are held out of a "
                "leave-one-out split; prepare it with --split leave-one-out"
            )
        return hold_out(catalog, arguments.share, arguments.seed, Path(arguments.data_root))
    found = reach(arguments.export, Path(arguments.data_root))
    for users, result in found["users"].items():
        recalls = "  ".join(f"Recall@{k} {result[f'Recall@{k}']:.4f}" for k in KS)
        print(f"{users:15} {result['count']:6,} users  {recalls}")
    if arguments.out:
        write_json(arguments.out, found)
    return found


def hold_out(catalog: Catalog, share: float, seed: int, data_root: Path) -> dict[str, Any]:
    """Write the dataset without a random share of its items, and held_out.json.

    held_out.json has the held-out items and the users whose last item is one of them, with their earlier history.
    """
    held = np.zeros(catalog.num_items + 1, dtype=bool)
    held[1 + np.random.default_rng(seed).permutation(catalog.num_items)[: round(share * catalog.num_items)]] = True
    if not held.any():
        raise InputError(f"--share {share} of {catalog.num_items:,} items rounds to 0 items; give a larger share")
    number = np.where(held, 0, np.cumsum(~held) - 1)  # new number of every item that stays, from 1
    lines: list[str] = []
    users = []
    for row in range(len(catalog.sequences)):
        items = catalog.sequences.of(row)
        kept = items[~held[items]]
        if len(kept) >= MIN_ITEMS:
            lines.append(f"{len(lines) + 1} {' '.join(map(str, number[kept]))}\n")
        if held[items[-1]] and len(kept):
            users.append({"history": [catalog.asins[i - 1] for i in kept], "target": catalog.asins[items[-1] - 1]})
    folder = data_root / f"{catalog.name}-cold"
    stay = [i for i in range(1, catalog.num_items + 1) if not held[i]]
    item2id = {catalog.asins[i - 1]: str(number[i]) for i in stay}
    write_text(folder / "sequential_data.txt", "".join(lines))
    write_json(folder / "datamaps.json", {"item2id": item2id})
    records = [as_json(catalog.metadata[i - 1] | {"asin": catalog.asins[i - 1]}) for i in stay]
    with replacing(folder / "meta.json.gz") as temporary:
        temporary.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode(), mtime=0))
    out = [as_json(catalog.metadata[i - 1] | {"asin": catalog.asins[i - 1]}) for i in np.flatnonzero(held).tolist()]
    found = {"of": catalog.name, "share": share, "seed": seed, "items": out, "users": users}
    write_json(folder / HELD_OUT, found)
    held_out = f"{len(out):,} items held out, the last of {len(users):,} users"
    print(f"{folder}: {len(lines):,} users, {len(stay):,} items; {held_out}")
    return found


def reach(export: str, data_root: Path) -> dict[str, Any]:
    """Return Recall of held-out items added to an export, and of trained items, each among all items."""
    from dataloader import eval_rows, times_trained
    from serving import Recommender

    recommender = Recommender.from_pretrained(export)
    dataset = recommender.config["dataset"]["code"]
    catalog = load_catalog(data_root, dataset)
    path = data_root / dataset / HELD_OUT
    held = check_schema(read_json(path, HINT), HeldOut, path, HINT)
    ids = [record["asin"] for record in held["items"]]
    recommender.add_items(ids, recommender.embed_items(held["items"]))
    rows = eval_rows(catalog.sequences, recommender.config["max_len"], "test")
    trained = times_trained(catalog.sequences, catalog.num_items) > 0
    histories = [
        [catalog.asins[item - 1] for item in catalog.sequences.of(row)[:-1]] for row in range(len(rows.targets))
    ]
    warm = [(histories[row], int(target)) for row, target in enumerate(rows.targets) if trained[target]]
    cold = [(user["history"], user["target"]) for user in held["users"]]
    users = {"never trained": cold, "trained": warm}
    return {
        "dataset": dataset,
        "run": recommender.config["run"],
        "size": recommender.config["size"],
        "items": len(recommender),
        "held_out": len(ids),
        "users": {name: recalls(recommender, pairs) for name, pairs in users.items()}
        | {"chance": {"count": len(cold)} | {f"Recall@{k}": k / len(recommender) for k in KS}},
    }


def recalls(recommender: Any, pairs: list[tuple[list, str | int]]) -> dict[str, float]:
    """Return Recall@K of (history, target) pairs, ranked among all items, history items included."""
    top_k = min(max(KS), len(recommender))
    answers = recommender.recommend([history for history, _ in pairs], top_k=top_k, exclude_history=False)
    hits = np.zeros((len(pairs), top_k), dtype=bool)
    for row, (answer, (_, target)) in enumerate(zip(answers, pairs, strict=True)):
        hits[row] = np.array(answer.ids if isinstance(target, str) else answer.numbers) == target
    return {"count": len(pairs)} | {f"Recall@{k}": float(hits[:, :k].any(axis=1).mean()) for k in KS}


def section(runs: list[KeptRun]) -> list[str]:
    """Return the report's part on cold items as Markdown lines; empty if no run was tested for it."""
    import pandas as pd

    from experiments.tables import markdown

    lines: list[str] = []
    for run in runs:
        if found := run.record.get("cold_items"):
            users = pd.DataFrame(found["users"]).T
            counts = users.pop("count").map("{:,.0f}".format)
            table = users.map("{:.4f}".format)
            table.insert(0, "users", counts)
            table.insert(0, "last item", table.index)
            lines += [
                f"### cold_items of {run.name}",
                "",
                f"{found['held_out']:,} of {found['items']:,} items were held out; size {found['size']}.",
                "",
                *markdown(table),
            ]
    heading = [
        "## Items that no training saw",
        "",
        "`python -m experiments.cold_items` holds items out of training and adds them to an export by their features "
        "alone. The target is ranked among all items: the last item of a user if it was held out (*never trained*), "
        f"and the last of the other items, of users with at least {MIN_ITEMS} of them (*trained*).",
        "",
    ]
    return [*heading, *lines] if lines else []


if __name__ == "__main__":
    run_cli(main)
