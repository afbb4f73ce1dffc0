"""Prepare a dataset: Amazon's raw files to sequences, metadata, pictures and features.

python -m datasets.prepare --dataset_code beauty                        # fetches everything that is not here
python -m datasets.prepare --dataset_code beauty --raw_root ~/amazon    # raw files that are here already
python -m datasets.prepare --dataset_code office --raw_root ~/amazon --reviews R.json.gz --meta M.json.gz
torchrun --nproc_per_node=2 -m datasets.prepare --dataset_code beauty --only features

It goes on where it was cut off. The result is the layout of datasets/catalog.py, and a report, prepare_report.json.
"""

import argparse
import difflib
import gzip
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from config import Config, InputError, parse_args, resolve, run_cli
from datasets import ranks
from datasets.amazon import BASE_URL, PAPER_SETS, picture_urls, raw_names, read_products, read_reviews
from datasets.catalog import FILES, REPORT, load_catalog, prepare_command
from datasets.files import cannot_write, read_json, replacing, sha256, write_json, write_text
from datasets.sequences import make_sequences
from datasets.summary import in_words, summarise

STEPS = ("data", "pictures", "features")
SETTINGS = (
    *("dataset_code", "data_root", "use_language_encoder", "language_encoder", "item_attributes", "use_img_encoder"),
    *("img_encoder", "encoder_precision", "encoder_batch_size", "encoder_workers", "device"),
)
VERSION = 1  # of what is made from raw files: another one is made anew


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("steps")
    group.add_argument(
        "--only", default=",".join(STEPS), metavar="STEP,...", help="of data, pictures, features (default: all three)"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="make the data anew where they were made otherwise (default: refuse)"
    )
    group = parser.add_argument_group("raw files")
    group.add_argument(
        "--raw_root",
        type=Path,
        metavar="FOLDER",
        help="where the raw files are; nothing is fetched then, neither they nor pictures (default: fetch into "
        "<data_root>/raw)",
    )
    group.add_argument("--reviews", metavar="FILE", help="the reviews, below raw_root (default: the category's 5-core)")
    group.add_argument("--meta", metavar="FILE", help="the products' metadata, below raw_root")
    group.add_argument("--base_url", default=BASE_URL, metavar="URL", help=f"where to fetch them (default: {BASE_URL})")
    group = parser.add_argument_group("which reviews count")
    group.add_argument("--min_uc", type=_count, default=5, metavar="N", help="reviews of a user at least (default: 5)")
    group.add_argument("--min_sc", type=_count, default=5, metavar="N", help="reviews of an item at least (default: 5)")
    group.add_argument(
        "--min_rating", type=float, default=0.0, metavar="X", help="leave out ratings below this (default: 0, none)"
    )
    group.add_argument(
        "--repeats",
        choices=("keep", "drop"),
        default="keep",
        help="the later reviews of a user for the same item (default: keep)",
    )
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--picture_workers", type=_count, default=24, metavar="N", help="fetched at a time (default: 24)"
    )
    group.add_argument(
        "--pictures_per_second", type=float, default=200.0, metavar="X", help="fetched at most (default: 200)"
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Prepare a dataset and return its folder."""
    flags, arguments = parse_args(argv, __doc__, add_arguments, SETTINGS)
    config, _ = resolve(flags)
    steps = _steps(arguments.only)
    _check_dataset(flags)
    folder = Path(config.data_root) / config.dataset_code
    if "data" not in steps:
        load_catalog(config.data_root, config.dataset_code)  # says what is missing before anything is made
    elif not (config.dataset_code in PAPER_SETS or (arguments.reviews and arguments.meta) or folder.exists()):
        raise InputError(_not_known(config.dataset_code))
    first = ranks.rank() == 0  # the others of torchrun share in the encoding
    with only_one(folder) if first else nullcontext():
        if first:
            if "data" in steps:
                prepare_data(config, arguments, folder)
            if "pictures" in steps and config.use_img_encoder:
                fetch_all_pictures(config, arguments, folder)
            print(in_words(write_report(config, folder), config.dataset_code), flush=True)
        ranks.barrier()
        if "features" in steps:
            encode(config)
    return folder


def _steps(text: str) -> tuple[str, ...]:
    steps = tuple(step.strip() for step in text.split(",") if step.strip())
    unknown = [step for step in steps if step not in STEPS]
    if unknown or not steps:
        raise InputError(f"--only {text!r}: give one or more of {', '.join(STEPS)}, such as --only pictures,features")
    return steps


def _check_dataset(flags: dict[str, Any]) -> None:
    if "dataset_code" not in flags:
        raise InputError(
            f"--dataset_code is missing: {', '.join(PAPER_SETS)}, or a name of your own with --reviews and --meta"
        )
    if flags["dataset_code"] == "demo":
        raise InputError("demo is built in and needs no preparing: python train.py")


def _not_known(dataset_code: str) -> str:
    near = difflib.get_close_matches(dataset_code, PAPER_SETS, n=1)
    return (
        f"--dataset_code {dataset_code!r} is none of {', '.join(PAPER_SETS)}"
        + (f" (did you mean {near[0]}?)" if near else "")
        + "; to prepare another dataset, give its files: --raw_root FOLDER --reviews FILE --meta FILE"
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the dataset's lock. Raises InputError that says who holds it. The lock ends with the process."""
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
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


# --------------------------------------------------------------------------------------------------------------- data


def prepare_data(config: Config, arguments: argparse.Namespace, folder: Path) -> None:
    """Raw files to the three files of the layout, unless they are there, made in the same way."""
    recipe: dict[str, Any] = {"version": VERSION} | {
        name: getattr(arguments, name) for name in ("min_uc", "min_sc", "min_rating", "repeats")
    }
    asked = arguments.raw_root or arguments.reviews or arguments.meta
    if not asked and _is_prepared(folder, recipe, arguments.overwrite):
        return
    reviews_file, meta_file = raw_files(config, arguments)
    recipe |= {"reviews": _named(reviews_file), "meta": _named(meta_file)}
    if asked and _is_prepared(folder, recipe, arguments.overwrite):
        return
    reviews = read_reviews(reviews_file)
    made = make_sequences(
        reviews,
        min_uc=arguments.min_uc,
        min_sc=arguments.min_sc,
        min_rating=arguments.min_rating,
        repeats=arguments.repeats,
    )
    notes = reviews.notes
    del reviews  # a third of the memory
    products, more = read_products(meta_file, frozenset(made.items))
    if not products:
        raise InputError(f"{meta_file} has none of the {len(made.items):,} items of {reviews_file.name}; give the "
                         f"metadata of the same category and release: --meta FILE")  # fmt: skip

    write_json(folder / REPORT, {"prepared": "unfinished"})  # until the three files belong together
    for stale in ("item2img.json", "pictures.json"):  # of other items; the pictures themselves stay
        (folder / stale).unlink(missing_ok=True)
    with replacing(folder / FILES[0]) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in range(len(made.sequences)):
            file.write(f"{row + 1} {' '.join(map(str, made.sequences.of(row).tolist()))}\n")
    maps = {
        name: {text: str(number) for number, text in enumerate(ids, start=1)}
        for name, ids in (("user2id", made.users), ("item2id", made.items))
    }
    maps |= {f"id2{name}": {number: text for text, number in maps[f"{name}2id"].items()} for name in ("user", "item")}
    write_text(folder / FILES[1], json.dumps(maps))
    with (
        replacing(folder / FILES[2]) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as file,  # no name and time in it: the same bytes each time
    ):
        for asin in made.items:
            if asin in products:
                file.write(json.dumps(products[asin]).encode() + b"\n")
    files = {name: sha256(folder / name) for name in FILES}
    prepared = {"recipe": recipe, "files": files, "filters": made.filters, "notes": [*notes, *more]}
    write_json(folder / REPORT, {"prepared": prepared})


def _is_prepared(folder: Path, recipe: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds what the recipe makes. Raises InputError where it holds something else, unless that is
    to be overwritten."""
    report = read_json(folder / REPORT, "remove it") if (folder / REPORT).exists() else None
    prepared = report["prepared"] if report else None
    if prepared == "unfinished" or overwrite:
        return False
    if prepared is None:
        if not any((folder / name).exists() for name in FILES):
            return False
        difference = "files that were made by other means"
    else:
        changed = [
            name for name in FILES if not (folder / name).exists() or sha256(folder / name) != prepared["files"][name]
        ]
        others = [f"{k} {prepared['recipe'].get(k)!r}" for k, v in recipe.items() if prepared["recipe"].get(k) != v]
        if not changed and not others:
            print(f"{folder} is prepared already", flush=True)
            return True
        difference = f"data that were made with {', '.join(others)}" if others else f"{changed[0]}, changed since"
    raise InputError(f"{folder} holds {difference}; --overwrite makes them anew, --only pictures,features keeps them")


def _named(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": sha256(path)}


def raw_files(config: Config, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The files of reviews and of metadata, fetched where they are not here and may be fetched."""
    from datasets.fetch import check_file, fetch_file

    root = arguments.raw_root or Path(config.data_root) / "raw"
    if arguments.raw_root and not root.is_dir():
        raise InputError(f"--raw_root {root} is not a folder; give the one that holds the raw files")
    paper = PAPER_SETS.get(config.dataset_code)
    names = raw_names(paper.category) if paper else ((), ())
    found = []
    for flag, given, usual in zip(("reviews", "meta"), (arguments.reviews, arguments.meta), names, strict=True):
        if not given and not usual:
            raise InputError(_not_known(config.dataset_code))
        paths = [root / name for name in ((given,) if given else usual)]
        path = next((path for path in paths if path.is_file()), None)
        if path is None and not arguments.raw_root and not given:
            path = paths[0]
            fetch_file(f"{arguments.base_url.rstrip('/')}/{path.name}", path, say=print)
        if path is None:
            here = ", ".join(sorted(p.name for p in root.glob("*.json*"))[:8]) if root.is_dir() else ""
            wanted = " or ".join(path.name for path in paths)
            raise InputError(
                f"{wanted} is not in {root} ({here or 'which has no .json files'}); name it: --{flag} FILE"
            )
        check_file(path)
        found.append(path)
    return found[0], found[1]


# ----------------------------------------------------------------------------------------------- pictures and features


def fetch_all_pictures(config: Config, arguments: argparse.Namespace, folder: Path) -> None:
    """Pictures that are not here, from the addresses in the metadata."""
    from datasets.pictures import prepare_pictures

    catalog = load_catalog(config.data_root, config.dataset_code)
    urls = {asin: picture_urls(record) for asin, record in zip(catalog.asins, catalog.metadata, strict=True)}
    manifest = prepare_pictures(
        catalog.asins,
        urls,
        catalog.photos,
        folder,
        fetch=not arguments.raw_root,
        workers=arguments.picture_workers,
        per_second=arguments.pictures_per_second,
    )
    left = sum(bool(urls[asin]) and "missing" in manifest[asin] for asin in catalog.asins)
    if arguments.raw_root and left:
        command = prepare_command(Path(config.data_root), config.dataset_code, only="pictures")
        print(f"{left:,} pictures have an address and were not fetched; to fetch them: {command}", flush=True)


def encode(config: Config) -> None:
    """Cache the features of text and pictures, as train.py would."""
    from datasets.device import resolve_device
    from datasets.features import feature_files

    parts = feature_files(
        load_catalog(config.data_root, config.dataset_code),
        language=config.language_encoder if config.use_language_encoder else None,
        image=config.img_encoder if config.use_img_encoder else None,
        attributes=config.item_attributes,
        device=resolve_device(config.device),
        batch_size=config.encoder_batch_size,
        precision=config.encoder_precision,
        workers=config.encoder_workers,
    )
    for part in parts if ranks.rank() == 0 else ():
        print(f"features of {part.shape[0]:,} items, {part.shape[1]} wide: {part.filename}", flush=True)


def write_report(config: Config, folder: Path) -> dict[str, Any]:
    """Read the dataset as train.py would, and write down what it holds."""
    before = read_json(folder / REPORT, "remove it") if (folder / REPORT).exists() else {}
    report = {
        "prepared": before.get("prepared"),  # None: by other means
        "summary": summarise(load_catalog(config.data_root, config.dataset_code)),
    }
    write_json(folder / REPORT, report)
    return report


if __name__ == "__main__":
    run_cli(main)
