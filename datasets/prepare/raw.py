"""The data step of datasets/prepare/__main__.py: raw files to the three files that datasets/catalog.py reads."""

import argparse
import difflib
import gzip
import json
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import cannot_write, read_json, replacing, sha256, write_json, write_text
from config import Config
from datasets.catalog import FILES, REPORT, read_report
from datasets.item2img import ITEM2IMG, MANIFEST
from datasets.prepare.amazon import PAPER_SETS, raw_names, read_products, read_reviews
from datasets.prepare.sequences import make_sequences

FILTERS = {"min_uc": 5, "min_sc": 5, "min_rating": 0.0, "repeats": "keep"}
VERSION = 1  # of what is made from raw files: another one is made anew


def prepare_data(config: Config, arguments: argparse.Namespace, folder: Path, command: str) -> None:
    """Raw files to the three files of the layout, unless they are there, made in the same way. command: what goes on
    where this is cut off."""
    filters = {name: getattr(arguments, name) for name in FILTERS}
    recipe: dict[str, Any] = {"version": VERSION, **filters}
    asked = arguments.raw_root or arguments.reviews or arguments.meta
    if not asked and _is_prepared(folder, recipe, arguments.overwrite):
        return
    (reviews_file, reviews_sum), (meta_file, meta_sum) = raw_files(config, arguments)
    recipe["reviews"] = {"file": reviews_file.name, "sha256": reviews_sum}
    recipe["meta"] = {"file": meta_file.name, "sha256": meta_sum}
    if asked and _is_prepared(folder, recipe, arguments.overwrite):
        return
    reviews = read_reviews(reviews_file)
    made, notes = make_sequences(reviews, **filters), reviews.notes
    del reviews  # a third of the memory
    products, more = read_products(meta_file, frozenset(made.items))
    if not products:
        raise InputError(
            f"{meta_file} has none of the {len(made.items):,} items of {reviews_file.name}; give the metadata of the "
            f"same category and release: --meta FILE"
        )

    try:
        _forget_pictures(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    write_json(folder / REPORT, {"unfinished": command})  # until the three files belong together
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
                file.write(products[asin].encode() + b"\n")
    files = {name: sha256(folder / name) for name in FILES}
    prepared = {"recipe": recipe, "files": files, "filters": made.filters, "notes": [*notes, *more]}
    write_json(folder / REPORT, {"prepared": prepared})


def _forget_pictures(folder: Path) -> None:
    """Set aside what names the pictures of other items; the pictures themselves stay."""
    before = read_report(folder)
    if not any((folder / name).exists() for name in FILES) or (before and "unfinished" in before):
        return
    listed, manifest = folder / ITEM2IMG, folder / MANIFEST
    if listed.exists():
        fetched = read_json(manifest, "remove it") if manifest.exists() else {}
        if all(fetched.get(asin) == {"file": name} for asin, name in read_json(listed, "remove it").items()):
            listed.unlink()
        else:
            listed.replace(folder / f"{ITEM2IMG}.old")
            print(f"{listed} was of the data before: it is {ITEM2IMG}.old now", flush=True)
    manifest.unlink(missing_ok=True)


def _is_prepared(folder: Path, recipe: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds what the recipe makes. Raises InputError where it holds something else, unless that is
    to be overwritten."""
    before = read_report(folder) or {}
    if "unfinished" in before or overwrite:
        return False
    prepared = before.get("prepared")
    if prepared is None:
        if not any((folder / name).exists() for name in FILES):
            return False
        difference = "files that were made by other means"
    else:
        files = prepared["files"].items()
        changed = [name for name, known in files if not (folder / name).exists() or sha256(folder / name) != known]
        others = [f"{k} {prepared['recipe'].get(k)!r}" for k, v in recipe.items() if prepared["recipe"].get(k) != v]
        if not changed and not others:
            print(f"{folder} is prepared already", flush=True)
            return True
        difference = f"data that were made with {', '.join(others)}" if others else f"{changed[0]}, changed since"
    raise InputError(f"{folder} holds {difference}; --overwrite makes them anew, --only pictures,features keeps them")


def raw_files(config: Config, arguments: argparse.Namespace) -> list[tuple[Path, str]]:
    """The files of reviews and of metadata and their SHA-256; fetched where they are not here and may be fetched."""
    from datasets.prepare.fetch import check_file, fetch_file

    root = arguments.raw_root.expanduser() if arguments.raw_root else Path(config.data_root) / "raw"
    if arguments.raw_root and not root.is_dir():
        raise InputError(f"--raw_root {root} is not a folder; give the one that holds the raw files")
    paper = PAPER_SETS.get(config.dataset_code)
    names = raw_names(paper.category) if paper else ((), ())
    found = []
    for flag, given, usual in zip(("reviews", "meta"), (arguments.reviews, arguments.meta), names, strict=True):
        if not given and not usual:
            raise InputError(not_known(config.dataset_code))
        mine = Path(given).expanduser() if given else None
        paths = [root / mine, mine] if mine else [root / name for name in usual]
        path = next((path for path in paths if path.is_file()), None)
        if path is None and not arguments.raw_root and not given:
            path = paths[0]
            fetch_file(f"{arguments.base_url.rstrip('/')}/{path.name}", path)
        if path is None:
            here = ", ".join(sorted(p.name for p in root.glob("*.json*"))[:8]) if root.is_dir() else ""
            wanted = given or " or ".join(usual)
            raise InputError(
                f"{wanted} is not in {root} ({here or 'which has no .json files'}); name it: --{flag} FILE"
            )
        found.append((path, check_file(path)))
    return found


def not_known(dataset_code: str) -> str:
    """What to tell a user who names a dataset without its files."""
    near = difflib.get_close_matches(dataset_code, PAPER_SETS, n=1)
    return (
        f"--dataset_code {dataset_code!r} is none of {', '.join(PAPER_SETS)}"
        + (f" (did you mean {near[0]}?)" if near else "")
        + "; to prepare another dataset, give its files: --raw_root FOLDER --reviews FILE --meta FILE"
    )
