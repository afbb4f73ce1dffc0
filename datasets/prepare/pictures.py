"""Items' pictures: taken from a folder that is there, or fetched; and item2img.json, which lists them.

    photos/<dataset_code>/                   the pictures; a fetched one is <ASIN>.<jpg|png|...>
    <dataset_code>/item2img_dict.pkl         optional: ASIN -> a picture's path on some machine (as VIP5 ships it)
    <dataset_code>/pictures.json             the manifest
    <dataset_code>/item2img.json             the pictures (datasets/item2img.py)

A manifest has for every item, by its ASIN, one of {"file": name}, {"missing": why} (there is no picture) and
{"broken": why} (there should be one).
"""

import io
import pickle
import pickletools
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import InputError
from common.files import read_json, write_json
from datasets.item2img import ITEM2IMG, MANIFEST, read_item2img
from datasets.prepare.picture_fetch import NO_URL, PER_SECOND, WORKERS, Manifest, by_stem, fetch_pictures, file_stem
from datasets.prepare.web import PATIENCE, Patience, shown

MAX_PICKLE = 1 << 28  # bytes


def prepare_pictures(
    asins: list[str],
    urls: dict[str, list[str]],
    photos: Path,
    dataset_folder: Path,
    *,
    fetch: bool,
    workers: int = WORKERS,
    per_second: float = PER_SECOND,
    say: Callable[[str], None] = print,
    patience: Patience = PATIENCE,
) -> Manifest:
    """The manifest of items 1..N (`asins`, in this order), written to pictures.json in `dataset_folder`, and from it
    item2img.json.

    What is in `photos` already stays: what item2img.json lists, what was fetched before, what item2img_dict.pkl names
    and what is called by an ASIN. With `fetch` the others are fetched, from the first of their `urls` that gives a
    picture; without, the reasons of an earlier fetch are kept.

    Raises InputError for a file that cannot be read, a folder that cannot be written and a full disk.
    """
    photos, dataset_folder = Path(photos), Path(dataset_folder)
    before = _read_manifest(dataset_folder / MANIFEST)
    listed = read_item2img(dataset_folder, photos, asins, written=before) or {}  # by the user
    pickled = dataset_folder / "item2img_dict.pkl"
    found = adopt_pictures(asins, photos, pickled if pickled.exists() else None)
    manifest: Manifest = {}
    for asin in asins:
        old = before.get(asin, {})
        if asin in listed:
            there = _is_picture(photos, listed[asin])
            problem = {"broken": f"{ITEM2IMG} lists {shown(listed[asin])}, which is not there"}
            manifest[asin] = {"file": listed[asin]} if there else problem
        elif _is_picture(photos, old.get("file", "")):
            manifest[asin] = old
        elif "file" in found[asin]:
            manifest[asin] = found[asin]
    kept = sum("file" in entry for entry in manifest.values())
    rest = [asin for asin in asins if asin not in manifest]
    if fetch:
        wanted = {asin: urls.get(asin) or [] for asin in rest}
        manifest |= fetch_pictures(wanted, photos, workers=workers, per_second=per_second, patience=patience)
    for asin in rest if not fetch else ():
        old = before.get(asin, {"file": ""})
        manifest[asin] = old if "file" not in old else {"missing": "not fetched"} if urls.get(asin) else found[asin]
    manifest = {asin: manifest[asin] for asin in asins}
    write_json(dataset_folder / MANIFEST, manifest)
    item2img = {asin: entry["file"] for asin, entry in manifest.items() if "file" in entry} | listed
    write_json(dataset_folder / ITEM2IMG, {asin: item2img[asin] for asin in asins if asin in item2img})
    count = Counter(next(iter(entry)) for entry in manifest.values())
    say(
        f"pictures: {count['file']:,} of {len(asins):,} items ({kept:,} were there, {count['file'] - kept:,} fetched), "
        f"{count['missing']:,} missing, {count['broken']:,} broken; {dataset_folder / MANIFEST} says why"
    )
    return manifest


# ------------------------------------------------------------------------------------------------ what is there already


def adopt_pictures(asins: list[str], photos: Path, pickled: Path | None = None) -> Manifest:
    """The manifest of what lies in `photos`, where nothing is decoded nor moved. pickled: a file that maps ASINs to
    paths of any machine, whose end, or file name alone, is looked for below `photos`. An item without a path there has
    the file called <ASIN>.<jpg|png|...>. Raises InputError for a pickle that holds anything but a dict of texts."""
    paths = _read_pickle(pickled) if pickled else {}
    files, manifest = by_stem(photos), {}
    for asin in asins:
        name = _below(photos, paths[asin]) if asin in paths else None
        name = name or files.get(asin) or files.get(file_stem(asin))
        if name and _is_picture(photos, name):
            manifest[asin] = {"file": name}
        elif pickled and asin in paths:
            manifest[asin] = {"missing": f"{pickled.name} names {shown(paths[asin])}, which is not in {photos.name}/"}
        else:
            manifest[asin] = {"missing": f"{NO_URL}, and no file of this name in {photos.name}/"}
    return manifest


def _below(photos: Path, path: str) -> str | None:
    """The longest end of `path` that is a file below `photos`."""
    parts = PurePosixPath(path.replace("\\", "/")[-4096:]).parts[-8:]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if not end.startswith("/") and _is_picture(photos, end)), None)


def _is_picture(photos: Path, name: str) -> bool:
    """Whether there is such a file below `photos`, where links do not leave it."""
    try:
        path = photos / name
        return bool(name) and path.is_file() and path.resolve().is_relative_to(photos.resolve())
    except (OSError, ValueError):  # no name that a file can have
        return False


def _read_manifest(path: Path) -> Manifest:
    if not path.exists():
        return {}
    hint = "delete it: it is made again from what is in the folder"
    manifest = read_json(path, hint)
    kinds = ("file", "missing", "broken")
    if not all(
        isinstance(entry, dict) and len(entry) == 1 and all(k in kinds and isinstance(v, str) for k, v in entry.items())
        for entry in manifest.values()
    ):
        raise InputError(f"{path} is not a map of items to one of {', '.join(kinds)}; {hint}")
    return manifest


# The opcodes of dicts and texts. Others are refused before anything is loaded: besides calls there are opcodes that
# make a few bytes take gigabytes.
OPCODES = {"PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "MEMOIZE", "PUT", "BINPUT",
           "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
           "STRING", "SHORT_BINSTRING", "BINSTRING"}  # fmt: skip


class _DictsAndTexts(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _read_pickle(path: Path) -> dict[str, str]:
    hint = f"a dict of texts (ASIN -> path) is read; {ITEM2IMG} may say the same in JSON"
    try:
        if path.stat().st_size > MAX_PICKLE:
            raise InputError(f"{path} has more than {MAX_PICKLE:,} bytes; {hint}")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {hint}") from None
    try:
        texts: list[str] = []  # the last two: what a call by name names
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            memo = opcode.name.endswith("PUT") and isinstance(argument, int) and argument > count
            if opcode.name not in OPCODES or memo:
                what = ", ".join(stack.name for stack in opcode.stack_after) or opcode.name
                if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                    what = argument or " ".join(texts)
                raise InputError(f"{path} holds more than a dict of texts: {shown(what)}; {hint}")
            if isinstance(argument, str):
                texts = [*texts[-1:], argument]
        value = _DictsAndTexts(io.BytesIO(data), encoding="utf-8").load()
    except InputError:
        raise
    except Exception as error:  # whatever damaged bytes raise
        raise InputError(f"{path} is no whole pickle ({shown(error)}); {hint}") from None
    if type(value) is not dict:
        raise InputError(f"{path} holds a {type(value).__name__}; {hint}")
    for kind in (type(part) for pair in value.items() for part in pair):
        if kind is not str:
            raise InputError(f"{path} holds a {kind.__name__} in its dict; {hint}")
    return value
