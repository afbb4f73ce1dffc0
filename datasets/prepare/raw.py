"""The data step of datasets.prepare: raw files to the files that datasets/catalog.py reads, and the report."""

import argparse
import difflib
import filecmp
import gzip
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, shown
from common.files import cannot_write, read_json, replacing, sha256, write_json, write_text
from config import Config
from datasets.catalog import FILES, PAPER_SETS, REPORT, SPLIT, Catalog, read_report
from datasets.items import ITEM2IMG, MANIFEST, attribute_text, is_junk

FILTERS = {"min_uc": 5, "min_sc": 5, "min_rating": 0.0, "repeats": "keep", "ties": "file"}
VERSION = 2  # of what is made from raw files: another one is made anew


def prepare_data(config: Config, arguments: argparse.Namespace, folder: Path, command: str) -> None:
    """Make the layout's files from raw files, unless they are there, made in the same way.

    command: what continues if this is cut off.
    """
    filters = {name: getattr(arguments, name) for name in FILTERS}
    columns = arguments.columns
    split = (arguments.val_from, arguments.test_from) if arguments.split == "time" else None
    recipe: dict[str, Any] = {"version": VERSION, **filters, "columns": columns}
    recipe |= {"split": list(split)} if split else {}
    asked = arguments.raw_root or arguments.events or arguments.items
    if not asked and _is_prepared(folder, recipe, arguments.overwrite):
        return
    events_file, items_file = raw_files(config, arguments)
    recipe["events"] = {"file": events_file.name, "sha256": checksum(events_file)}
    recipe["items"] = {"file": items_file.name, "sha256": checksum(items_file)} if items_file else None
    if asked and _is_prepared(folder, recipe, arguments.overwrite):
        return
    from datasets.prepare.read import Items, read_events, read_items
    from datasets.prepare.sequences import make_sequences

    if arguments.counts == "duckdb":
        from datasets.prepare.sequences import read_core

        folder.parent.mkdir(parents=True, exist_ok=True)
        events = read_core(events_file, columns, folder.with_name(f".{folder.name}.counts"), **filters)
    else:
        events = read_events(events_file, columns)
    made, notes = make_sequences(events, **filters, split=split), events.notes
    del events  # a third of the memory
    items = Items({}, {}, [])
    if items_file:
        items = read_items(items_file, frozenset(made.items), columns)
        if not items.records:
            raise InputError(
                f"{items_file} has none of the {len(made.items):,} items of {events_file.name}; give the items of the "
                f"same source: --items FILE, their ids in --columns id=..."
            )

    try:
        _forget_pictures(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    write_json(folder / REPORT, {"unfinished": command})  # until the files belong together
    with replacing(folder / FILES[0]) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in range(len(made.sequences)):
            file.write(f"{row + 1} {' '.join(map(str, made.sequences.of(row).tolist()))}\n")
    if split:
        assert made.sequences.cuts is not None
        write_json(folder / SPLIT, {"name": made.sequences.split, "cuts": made.sequences.cuts.tolist()})
    else:
        (folder / SPLIT).unlink(missing_ok=True)
    maps = {
        name: {text: str(number) for number, text in enumerate(ids, start=1)}
        for name, ids in (("user2id", made.users), ("item2id", made.items))
    }
    maps |= {f"id2{name}": {number: text for text, number in maps[f"{name}2id"].items()} for name in ("user", "item")}
    write_text(folder / FILES[1], json.dumps(maps))
    if items_file:
        with (
            replacing(folder / FILES[2]) as temporary,
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", 6, raw, mtime=0) as file,  # no name and time in it: the same bytes each time
        ):
            for item in made.items:
                if item in items.records:
                    file.write(items.records[item].encode() + b"\n")
        copied, found = copy_pictures(
            items.pictures, items_file.parent, Path(config.data_root) / "photos" / folder.name
        )
        notes += found
        if copied:
            write_json(folder / MANIFEST, {item: {"file": name} for item, name in copied.items()})
    else:
        (folder / FILES[2]).unlink(missing_ok=True)
    files = {name: sha256(folder / name) for name in (*FILES, SPLIT) if (folder / name).exists()}
    prepared = {
        "recipe": recipe, "files": files, "filters": made.filters, "notes": [*notes, *made.notes, *items.notes]
    }  # fmt: skip
    write_json(folder / REPORT, {"prepared": prepared})


def copy_pictures(pictures: Mapping[str, str], source: Path, photos: Path) -> tuple[dict[str, str], list[str]]:
    """Copy pictures that the table of items names by paths; return the copies' names by item, and notes.

    A path counts if it stays below `source`, the table's folder, and ends as a picture does.
    """
    if not pictures:
        return {}, []
    from datasets.prepare.pictures import READ, file_stem, is_picture

    copied, missing = {}, []
    for item, name in pictures.items():
        path = source / name
        if not is_picture(source, name) or path.suffix.lower() not in READ:
            missing.append(name)
            continue
        copy = photos / f"{file_stem(item)}{path.suffix.lower()}"
        if not copy.exists() or not filecmp.cmp(path, copy, shallow=False):
            with replacing(copy) as temporary:
                shutil.copyfile(path, temporary)
        copied[item] = copy.name
    found = f"pictures: {len(copied):,} of {len(pictures):,} paths copied to {photos}"
    others = f"; the others, such as {shown(missing[0])}, are no pictures below {source}" if missing else ""
    return copied, [found + others]


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's parquet parts. Raises InputError if it was fetched otherwise."""
    from datasets.prepare.http import check_file

    if not path.is_dir():
        return check_file(path)
    parts = (f"{part.relative_to(path)} {sha256(part)}\n" for part in sorted(path.rglob("*.parquet")))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _forget_pictures(folder: Path) -> None:
    """Set aside the lists of other items' pictures; the pictures themselves stay."""
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
    """Return whether the folder holds what the recipe makes.

    Raises InputError if it holds something else that may not be overwritten.
    """
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
        wanted = {"split": None} | recipe
        others = [f"{k} {prepared['recipe'].get(k)!r}" for k, v in wanted.items() if prepared["recipe"].get(k) != v]
        if not changed and not others:
            print(f"{folder} is prepared already", flush=True)
            return True
        difference = f"data that were made with {', '.join(others)}" if others else f"{changed[0]}, changed since"
    raise InputError(f"{folder} holds {difference}; --overwrite makes them anew, --only pictures,features keeps them")


def raw_files(config: Config, arguments: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the files of events and of items; they are fetched if they are missing and may be fetched.

    Only the paper's datasets need no flags, and only they need a file of items.
    """
    from datasets.prepare.http import fetch_file

    root = arguments.raw_root.expanduser() if arguments.raw_root else Path(config.data_root) / "raw"
    if arguments.raw_root and not root.is_dir():
        raise InputError(f"--raw_root {root} is not a folder; give the one that holds the raw files")
    paper = PAPER_SETS.get(config.dataset_code)
    names = raw_names(paper.category) if paper else ((), ())
    found: list[Path | None] = []
    for flag, given, usual in zip(("events", "items"), (arguments.events, arguments.items), names, strict=True):
        if not given and not usual:
            if flag == "events":
                raise InputError(not_known(config.dataset_code))
            found.append(None)
            continue
        mine = Path(given).expanduser() if given else None
        paths = [root / mine, mine] if mine else [root / name for name in usual]
        path = next((path for path in paths if path.is_file() or (mine and path.is_dir())), None)
        if path is None and not arguments.raw_root and not given:
            path = paths[0]
            fetch_file(f"{arguments.base_url.rstrip('/')}/{path.name}", path)
        if path is None:
            if mine and mine.is_absolute():
                raise InputError(f"--{flag} {given} does not exist; give the path of a file or of a folder of parts")
            here = ", ".join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else ""
            wanted = given or " or ".join(usual)
            where = f"{'in this folder or ' if given else ''}in {root} ({here or 'which is empty'})"
            raise InputError(f"{wanted} is not {where}; give its path: --{flag} FILE")
        found.append(path)
    events, items = found
    assert events is not None
    return events, items


def raw_names(category: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the published names of a category's reviews and metadata; the first is the one to fetch."""

    def files(*names: str) -> tuple[str, ...]:
        return tuple(f"{name}.json{gz}" for name in names for gz in (".gz", ""))

    return files(f"reviews_{category}_5", f"reviews_{category}"), files(f"meta_{category}")


def not_known(dataset_code: str) -> str:
    """Return the error for a dataset that is named without its files."""
    near = difflib.get_close_matches(dataset_code, PAPER_SETS, n=1)
    return (
        f"--dataset_code {dataset_code!r} is none of {', '.join(PAPER_SETS)}"
        + (f" (did you mean {near[0]}?)" if near else "")
        + "; to prepare another dataset, give its files: --events FILE, and --items FILE if there is one"
    )


# -------------------------------------------------------------------------------------------------------------- summary
# The report of datasets.prepare: what a prepared dataset holds, in numbers and in words.

ATTRIBUTES = ("title", "price", "brand", "categories", "description")
NO_TEXT = {"asin", "images", "imUrl", "related"}  # of the metadata, no attributes to encode
SIDES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}
SAMPLED = 2_000  # pictures whose size is read
SMALL = 64  # pixels; the encoders read about 250
QUANTILES = {"shortest": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "longest": 1.0}


def summarise(catalog: Catalog) -> dict[str, Any]:
    """Return counts, quantiles of the histories' lengths and of the pictures' sizes, the share of items with each
    attribute, and for the paper's datasets its Table 1 and a warning for every count that differs."""
    lengths = np.diff(catalog.sequences.offsets)
    counts = {
        "users": len(catalog.sequences),
        "items": catalog.num_items,
        "pictures": None if catalog.pictures is None else sum(p is not None and p.is_file() for p in catalog.pictures),
        "interactions": int(lengths.sum()),
    }
    known, junk = Counter[str](dict.fromkeys(ATTRIBUTES, 0)), Counter[str]()
    for record in catalog.metadata:
        for name in record.keys() - NO_TEXT:
            if attribute_text(record, name):
                known[name] += 1
            elif is_junk(record, name):
                junk[name] += 1
    if counts["pictures"] is not None:
        known["picture"] = counts["pictures"]
    paper = PAPER_SETS.get(catalog.name)
    table = {name: getattr(paper, name) for name in counts} if paper else None
    return {
        "counts": counts,
        "history_lengths": {name: float(np.quantile(lengths, q)) for name, q in QUANTILES.items()},
        "items_with": {name: round(known[name] / catalog.num_items, 4) for name in sorted(known, key=_order)},
        "items_without_metadata": sum(not record for record in catalog.metadata),
        "picture_sides": _sides(catalog),
        "notes": catalog.notes
        + [
            f"{name}: {count:,} items have only markup, code or words for nothing: missing"
            for name, count in sorted(junk.items())
        ],
        "paper_table_1": table,
        "warnings": [
            f"{number:,} {name}, but the paper's Table 1 has {table[name]:,}"
            for name, number in counts.items()
            if table and number is not None and number != table[name]
        ],
    }


def _order(name: str) -> tuple[int, str]:
    """Sort the paper's attributes first, then the picture, then others by name."""
    first = (*ATTRIBUTES, "picture")
    return (first.index(name), "") if name in first else (len(first), name)


def _sides(catalog: Catalog) -> dict[str, float] | None:
    """Return quantiles of the pictures' shorter side in pixels, and the share below SMALL; None without pictures."""
    pictures = [path for path in catalog.pictures or [] if path is not None and path.is_file()]
    if not pictures:
        return None
    from PIL import Image

    sides = []
    for path in pictures[:: -(-len(pictures) // SAMPLED)]:
        with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError), Image.open(path) as picture:
            sides.append(min(picture.size))
    if not sides:
        return None
    shares = {name: float(np.quantile(sides, q)) for name, q in SIDES.items()}
    return shares | {"small": round(float(np.mean(np.array(sides) < SMALL)), 4)}


def in_words(report: dict[str, Any], dataset_code: str) -> str:
    """Return a report in lines for people."""
    summary = report["summary"]
    lines = []
    if filters := (report["prepared"] or {}).get("filters"):
        width = max(len(step["after"]) for step in filters)
        lines.append(f"{'after':{width}} {'users':>12} {'items':>12} {'interactions':>14}")
        lines += [
            f"{step['after']:{width}} {step['users']:12,} {step['items']:12,} {step['interactions']:14,}"
            for step in filters
        ]
    counts = ", ".join(f"{number:,} {name}" for name, number in summary["counts"].items() if number is not None)
    lines.append(f"{dataset_code}: {counts}")
    lines.append("history lengths: " + ", ".join(f"{name} {n:g}" for name, n in summary["history_lengths"].items()))
    lines.append("items with " + ", ".join(f"{name} {share:.1%}" for name, share in summary["items_with"].items()))
    if sides := summary["picture_sides"]:
        small = f"; {sides['small']:.1%} are smaller than {SMALL} pixels" if sides["small"] else ""
        lines.append("pictures' shorter side: " + ", ".join(f"{name} {sides[name]:g}" for name in SIDES) + small)
    lines += [f"note: {note}" for note in [*(report["prepared"] or {}).get("notes", []), *summary["notes"]]]
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    if summary["paper_table_1"] and not summary["warnings"]:
        lines.append("the counts are those of the paper's Table 1")
    return "\n".join(lines)
