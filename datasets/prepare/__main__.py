"""Prepare a dataset: events and items of any known format to sequences, texts, pictures and features.

python -m datasets.prepare --dataset_code beauty                        # fetches everything that is missing
python -m datasets.prepare --dataset_code beauty --raw_root ~/amazon    # the raw files are there
python -m datasets.prepare --events shop.parquet --items products.csv --dataset_code shop
torchrun --nproc_per_node=2 -m datasets.prepare --dataset_code beauty --only features

Formats are recognised by content: JSON lines (Amazon 2014, 2018, 2023), JSON arrays, CSV and TSV, parquet or a folder
of parquet parts, Amazon's ratings without header, RecBole, MovieLens, LETTER, and text with a line `user item item ...`
per user; gzip and zstd are unpacked. Columns are found by usual names (user_id, item_id, timestamp, rating, ...) or
named by --columns. Times are numbers or ISO 8601 text.

It continues after an interruption. The result is the layout of datasets/catalog.py and a report, prepare_report.json.
"""

import argparse
import math
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from common import processes
from common.cli import add_switch, parse_args, run_cli
from common.errors import InputError
from common.files import cannot_write, remove_leftovers, write_json, write_text
from config import SECTIONS, Config, resolve
from datasets.catalog import (
    FILES,
    PAPER_SETS,
    REPORT,
    SPLIT,
    load_alike,
    load_catalog,
    prepare_command,
    read_report,
)
from datasets.items import ITEM2IMG, MANIFEST
from datasets.prepare.raw import FILTERS, in_words, not_known, prepare_data, summarise

BASE_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"  # Amazon's raw files of 2014
STEPS = ("data", "pictures", "features")
SETTINGS = (
    *("data_root", "use_language_encoder", "language_encoder", "item_attributes", "use_img_encoder", "features"),
    *("img_encoder", "features_root", "encoder_precision", "encoder_batch_size", "encoder_workers", "device"),
)
NO_ITEMS = "give --items, or train a model that knows items by their ids: --model_code lrurec"
BESIDE = ("raw", "photos", "features")  # what else lies in a data_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset_code", required=True, metavar="NAME", help=f"{', '.join(PAPER_SETS)}, or a name of your own"
    )
    group = parser.add_argument_group("steps")
    group.add_argument("--only", metavar="STEP,...", help="steps to do: data, pictures, features (default: all three)")
    add_switch(
        group, "overwrite", "replace data that were prepared from other files or with other flags (default: refuse)"
    )
    group = parser.add_argument_group("raw files")
    group.add_argument(
        "--raw_root",
        type=Path,
        metavar="FOLDER",
        help="where the raw files are; neither they nor pictures are fetched then (default: fetched into "
        "<data_root>/raw)",
    )
    group.add_argument(
        "--events",
        "--reviews",
        metavar="FILE",
        help="who had which item when: a file, or a folder of parquet parts, also below raw_root (default: the "
        "category's 5-core)",
    )
    group.add_argument(
        "--items",
        "--meta",
        metavar="FILE",
        help="the items' attributes and pictures; without it a model knows items by their ids alone",
    )
    group.add_argument(
        "--columns",
        type=_columns,
        default={},
        metavar="NAME=COLUMN,...",
        help="columns of user, item, time, rating in the events, of id, picture in the items (default: usual names)",
    )
    group.add_argument("--base_url", default=BASE_URL, metavar="URL", help=f"where to fetch them (default: {BASE_URL})")
    group = parser.add_argument_group("which events count")
    default = "(default: %(default)s)"
    group.add_argument("--min_uc", type=_count, metavar="N", help=f"minimum number of events of a user {default}")
    group.add_argument("--min_sc", type=_count, metavar="N", help=f"minimum number of events of an item {default}")
    group.add_argument("--min_rating", type=_rating, metavar="X", help=f"leave out ratings below this {default}")
    group.add_argument(
        "--repeats", choices=("keep", "drop"), help=f"keep or drop a user's later events with the same item {default}"
    )
    group.add_argument(
        "--ties",
        choices=("file", "shuffle", "drop_user"),
        help="order of a user's events at the same time: as in the file, or shuffled; or leave out users whose last "
        f"two events tie {default}",
    )
    group.add_argument(
        "--counts",
        choices=("memory", "duckdb"),
        default="memory",
        help="where the filters are computed: in memory, or on disk for events that do not fit there, with the "
        f"package duckdb; the data are the same {default}",
    )
    parser.set_defaults(**FILTERS)
    group = parser.add_argument_group("the split")
    group.add_argument(
        "--split",
        choices=("leave-one-out", "time"),
        default="leave-one-out",
        help="each user's last two events are targets, or by time: nothing after --val_from is trained on, and a "
        f"user's first event of each period is a target {default}",
    )
    group.add_argument(
        "--val_from", type=_moment, metavar="DATE", help="validation begins: ISO 8601 text, or a number as in the file"
    )
    group.add_argument("--test_from", type=_moment, metavar="DATE", help="the test begins, as --val_from")
    group = parser.add_argument_group("pictures")
    group.add_argument("--picture_workers", type=_count, metavar="N", help=f"pictures fetched at a time {default}")
    group.add_argument(
        "--pictures_per_second", type=_rate, metavar="X", help=f"maximum number of pictures fetched a second {default}"
    )
    add_switch(
        group,
        "allow_private_addresses",
        "fetch pictures from private, loopback and reserved addresses too (default: refuse, as metadata may name any)",
    )
    parser.set_defaults(picture_workers=24, pictures_per_second=200.0)


def main(argv: Sequence[str] | None = None) -> Path:
    """Prepare a dataset and return its folder."""
    flags, arguments = parse_args(argv, __doc__, SECTIONS, add_arguments, SETTINGS)
    config, _ = resolve(flags | {"dataset_code": arguments.dataset_code})
    command = f"python -m datasets.prepare {shlex.join(sys.argv[1:] if argv is None else argv)}"
    steps = _steps(arguments, config)
    folder = Path(config.data_root) / config.dataset_code
    _check_dataset(config.dataset_code)
    if "data" not in steps:
        load_alike(lambda: load_catalog(config.data_root, config.dataset_code))  # raises before anything is made
    elif not (config.dataset_code in PAPER_SETS or arguments.events or folder.exists()):
        raise InputError(not_known(config.dataset_code))
    first = processes.rank() == 0  # the others of torchrun share in the encoding
    changes = first and steps != ("features",)
    with only_one(folder) if changes else nullcontext():

        def prepare() -> None:
            if "data" in steps:
                prepare_data(config, arguments, folder, command)
            if "pictures" in steps:
                fetch_all_pictures(config, arguments, folder)
            report(config, folder, needed=changes)

        processes.on_main_process(prepare)
        if "features" in steps:
            encode(config)
    return folder


def _steps(arguments: argparse.Namespace, config: Config) -> tuple[str, ...]:
    """Return the steps to run. Raises InputError for flags of steps that are left out."""
    if [bool(arguments.val_from), bool(arguments.test_from)] != [arguments.split == "time"] * 2:
        raise InputError("a split by time needs --split time --val_from DATE --test_from DATE; others take no dates")
    if arguments.only is None:
        return STEPS if config.use_img_encoder else ("data", "features")
    steps = tuple(step.strip() for step in arguments.only.split(",") if step.strip())
    if not steps or set(steps) - set(STEPS):
        raise InputError(
            f"--only {arguments.only!r}: give one or more of {', '.join(STEPS)}, such as --only pictures,features"
        )
    if "pictures" in steps and not config.use_img_encoder:
        raise InputError("--only pictures and --no-use_img_encoder: leave out one of the two")
    given = [name for name in ("overwrite", "events", "items", "columns") if getattr(arguments, name)]
    given += ["counts"] if arguments.counts != "memory" else []
    given += ["split"] if arguments.split == "time" else []
    given += [name for name, usual in FILTERS.items() if getattr(arguments, name) != usual]
    given += ["raw_root"] if arguments.raw_root and "pictures" not in steps else []
    if given and "data" not in steps:
        raise InputError(f"--{given[0]} is for the data, which --only {arguments.only} leaves out")
    return steps


def _check_dataset(dataset_code: str) -> None:
    if dataset_code == "demo":
        raise InputError("demo is built in and needs no preparing: python train.py")
    if dataset_code in BESIDE:
        raise InputError(
            f"--dataset_code {dataset_code!r}: a data_root has another folder of this name; choose another name"
        )


def _columns(text: str) -> dict[str, str]:
    from datasets.prepare.readers.base import NAMES, parse_columns

    try:
        return parse_columns(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form user=COLUMN,item=COLUMN,...; names are {', '.join(NAMES)}"
        ) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _rating(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")


def _moment(text: str) -> str:
    with suppress(ValueError):
        datetime.fromisoformat(text)
        return text
    with suppress(ValueError):
        if math.isfinite(float(text)):
            return text
    raise argparse.ArgumentTypeError(f"{text!r} is no date such as 2024-05-31 and no number")


def _rate(text: str) -> float:
    rate = _rating(text)
    if rate == 0:
        raise argparse.ArgumentTypeError("0 would fetch nothing")
    return rate


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the dataset's lock, which ends with the process. Raises InputError that names the holder."""
    from filelock import FileLock, Timeout

    holder = folder.with_name(f".{folder.name}.prepared_by")
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise InputError(f"{folder} is being prepared by {who}; wait for it, or end it and run this again") from None
    except OSError as error:
        raise cannot_write(folder.parent, error) from error
    try:
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
        remove_leftovers(folder.parent, holder.name)
        for name in (*FILES, SPLIT, REPORT, MANIFEST, ITEM2IMG):
            for left_by_a_kill in folder.glob(f".{name}.*.tmp"):  # no living process owns it, as the lock is held
                left_by_a_kill.unlink()
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


# ----------------------------------------------------------------------------------------------- pictures and features


def fetch_all_pictures(config: Config, arguments: argparse.Namespace, folder: Path) -> None:
    """Fetch missing pictures from the addresses in the metadata."""
    from datasets.prepare.pictures import FetchOptions, prepare_pictures
    from datasets.prepare.read import picture_urls

    catalog = load_catalog(config.data_root, config.dataset_code)
    urls = {asin: picture_urls(record) for asin, record in zip(catalog.asins, catalog.metadata, strict=True)}
    options = None
    if not arguments.raw_root:
        options = FetchOptions(
            arguments.picture_workers, arguments.pictures_per_second, arguments.allow_private_addresses
        )
    manifest = prepare_pictures(catalog.asins, urls, catalog.photos, folder, options)
    left = sum(bool(urls[asin]) and "missing" in manifest[asin] for asin in catalog.asins)
    if arguments.raw_root and left:
        command = prepare_command(Path(config.data_root), config.dataset_code, only="pictures")
        print(f"{left:,} pictures have an address and were not fetched; to fetch them: {command}", flush=True)


def encode(config: Config) -> None:
    """Cache the features, as train.py would."""
    from common.devices import resolve_device
    from datasets.features.load import load_features

    say = processes.print_main
    catalog = load_alike(lambda: load_catalog(config.data_root, config.dataset_code))
    has_pictures, has_text = processes.on_main_process(lambda: (any(catalog.pictures or []), any(catalog.metadata)))
    if config.use_img_encoder and config.branch != "image" and not has_pictures:
        config = replace(config, use_img_encoder=False)
        command = prepare_command(Path(config.data_root), config.dataset_code, only="pictures")
        say(f"there are no pictures, so {config.branch} alone is encoded; to fetch pictures: {command}")
    if config.use_language_encoder and not has_text:
        say(f"{config.dataset_code} has no metadata, so there is no text to encode; {NO_ITEMS}")
        return
    for part in load_features(config, catalog, resolve_device(config.device)):
        say(f"features of {part.shape[0]:,} items, {part.shape[1]} wide: {part.filename}")


def report(config: Config, folder: Path, needed: bool) -> None:
    """Read the dataset as train.py would, and print and write what it holds.

    A folder that cannot be written raises InputError only if the report is needed.
    """
    before = read_report(folder) or {}
    found = {
        "prepared": before.get("prepared"),  # None: by other means
        "summary": summarise(load_catalog(config.data_root, config.dataset_code)),
    }
    print(in_words(found, config.dataset_code), flush=True)
    try:
        write_json(folder / REPORT, found)
    except InputError:
        if needed:
            raise


if __name__ == "__main__":
    run_cli(main)
