"""Items' pictures: taken from a folder that is there, or fetched; and item2img.json, which datasets/catalog.py reads.

    photos/<dataset_code>/                   the pictures; a fetched one is <ASIN>.<jpg|png|...>
    <dataset_code>/item2img_dict.pkl         optional: ASIN -> a picture's path on some machine (as VIP5 ships it)
    <dataset_code>/pictures.json             the manifest
    <dataset_code>/item2img.json             ASIN -> picture below photos/<dataset_code>/

A manifest has for every item, by its ASIN, one of {"file": name}, {"missing": why} (there is no picture) and
{"broken": why} (there should be one).
"""

import io
import os
import pickle
import pickletools
import queue
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from config import InputError
from datasets.embedding import MAX_PIXELS
from datasets.fetch import PATIENCE, Fetcher, FetchError, Patience, shown
from datasets.files import cannot_write, read_json, replacing, write_json

SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "GIF": ".gif",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tiff",
}
FORMATS = tuple(name for name in SUFFIXES if name != "MPO")  # which Pillow finds behind JPEG's header
NAMED = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tiff", ".tif")  # what counts as a picture, in this order
MAX_BYTES = 20_000_000  # of a picture
LARGE = 4_000_000  # pixels; above, pictures are decoded one at a time, as they need memory
MAX_PICKLE = 1 << 28  # bytes
UNREACHABLE = 50  # URLs without any answer of any server, after which the others are not tried
NO_URL = "no URL in the metadata"

Manifest = dict[str, dict[str, str]]


def prepare_pictures(
    asins: list[str],
    urls: dict[str, list[str]],
    photos: Path,
    dataset_folder: Path,
    *,
    fetch: bool,
    workers: int = 24,
    per_second: float = 200,
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
    before = _read_manifest(dataset_folder / "pictures.json")
    listed = _read_item2img(dataset_folder / "item2img.json", asins, photos, before)
    pickled = dataset_folder / "item2img_dict.pkl"
    found = adopt_pictures(asins, photos, pickled if pickled.exists() else None)
    manifest: Manifest = {}
    for asin in asins:
        old = before.get(asin, {})
        if asin in listed:
            there = _is_picture(photos, listed[asin])
            problem = {"broken": f"item2img.json lists {shown(listed[asin])}, which is not there"}
            manifest[asin] = {"file": listed[asin]} if there else problem
        elif _is_picture(photos, old.get("file", "")):
            manifest[asin] = old
        elif "file" in found[asin]:
            manifest[asin] = found[asin]
    kept = sum("file" in entry for entry in manifest.values())
    rest = [asin for asin in asins if asin not in manifest]
    if fetch:
        files = {asin: entry["file"] for asin, entry in (before | manifest).items() if "file" in entry} | listed
        claimed = dict.fromkeys(_by_stem(photos), "") if before else {}  # of items that the catalogue had once
        names = _file_stems(asins, claimed | {Path(name).stem: asin for asin, name in files.items()})
        wanted = {asin: urls.get(asin) or [] for asin in rest}
        manifest |= fetch_pictures(
            wanted, photos, names=names, workers=workers, per_second=per_second, patience=patience
        )
    for asin in rest if not fetch else ():
        old = before.get(asin, {"file": ""})
        manifest[asin] = old if "file" not in old else {"missing": "not fetched"} if urls.get(asin) else found[asin]
    manifest = {asin: manifest[asin] for asin in asins}
    write_json(dataset_folder / "pictures.json", manifest)
    item2img = {asin: entry["file"] for asin, entry in manifest.items() if "file" in entry} | listed
    write_json(dataset_folder / "item2img.json", {asin: item2img[asin] for asin in asins if asin in item2img})
    count = Counter(next(iter(entry)) for entry in manifest.values())
    say(
        f"pictures: {count['file']:,} of {len(asins):,} items ({kept:,} were there, {count['file'] - kept:,} fetched), "
        f"{count['missing']:,} missing, {count['broken']:,} broken; {dataset_folder / 'pictures.json'} says why"
    )
    return manifest


# ------------------------------------------------------------------------------------------------ what is there already


def adopt_pictures(asins: list[str], photos: Path, pickled: Path | None = None) -> Manifest:
    """The manifest of what lies in `photos`, where nothing is decoded nor moved. pickled: a file that maps ASINs to
    paths of any machine, whose end, or file name alone, is looked for below `photos`. An item without a path there has
    the file called <ASIN>.<jpg|png|...>. Raises InputError for a pickle that holds anything but a dict of texts."""
    paths = _read_pickle(pickled) if pickled else {}
    by_stem, manifest = _by_stem(photos), {}
    for asin in asins:
        name = _below(photos, paths[asin]) if asin in paths else None
        name = name or by_stem.get(asin)
        if name and _is_picture(photos, name):
            manifest[asin] = {"file": name}
        elif asin in paths:
            manifest[asin] = {"missing": f"{pickled.name} names {shown(paths[asin])}, which is not in {photos.name}/"}
        else:
            manifest[asin] = {"missing": f"{NO_URL}, and no file of this name in {photos.name}/"}
    return manifest


def _by_stem(photos: Path) -> dict[str, str]:
    """The pictures right in a folder, by their names without the suffix."""
    if not photos.is_dir():
        return {}
    files: dict[str, str] = {}
    try:
        with os.scandir(photos) as entries:
            names = [e.name for e in entries if Path(e.name).suffix.lower() in NAMED and e.is_file()]
    except OSError as error:
        raise InputError(f"{photos} cannot be read ({error.strerror}); run where you may read it") from None
    for name in sorted(names, key=lambda name: (NAMED.index(Path(name).suffix.lower()), name)):
        files.setdefault(Path(name).stem, name)
    return files


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
    mends = "delete it: it is made again from what is in the folder"
    manifest = read_json(path, mends)
    kinds = ("file", "missing", "broken")
    if not isinstance(manifest, dict) or not all(
        isinstance(entry, dict) and len(entry) == 1 and all(k in kinds and isinstance(v, str) for k, v in entry.items())
        for entry in manifest.values()
    ):
        raise InputError(f"{path} is not a map of items to one of {', '.join(kinds)}; {mends}")
    return manifest


def _read_item2img(path: Path, asins: list[str], photos: Path, before: Manifest) -> dict[str, str]:
    """What the user listed: ASIN -> name, without what pictures.json says that an earlier run wrote."""
    if not path.exists():
        return {}
    mends = f"it maps an item id or ASIN to a path below {photos}"
    item2img = read_json(path, mends)
    if not isinstance(item2img, dict) or not all(isinstance(name, str) for name in item2img.values()):
        raise InputError(f"{path} is not a map of names; {mends}")
    asin_of = {str(i): asin for i, asin in enumerate(asins, start=1)} | {asin: asin for asin in asins}
    listed = {}
    for item, name in item2img.items():
        if before.get(item) == {"file": name}:
            continue
        if item not in asin_of:
            raise InputError(f"{path}: item {item!r} is not one of the {len(asins)} items; {mends}")
        if "\0" in name or not (photos / name).resolve().is_relative_to(photos.resolve()):
            raise InputError(f"{path}: picture {name!r} of item {item!r} lies outside {photos}; {mends}")
        listed[asin_of[item]] = name
    return listed


# The opcodes of dicts and texts. Others are refused before anything is loaded: besides calls there are opcodes that
# make a few bytes take gigabytes.
OPCODES = {"PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "MEMOIZE", "PUT", "BINPUT",
           "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
           "STRING", "SHORT_BINSTRING", "BINSTRING"}  # fmt: skip


class _DictsAndTexts(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _read_pickle(path: Path) -> dict[str, str]:
    mends = "a dict of texts (ASIN -> path) is read; item2img.json may say the same in JSON"
    try:
        if path.stat().st_size > MAX_PICKLE:
            raise InputError(f"{path} has more than {MAX_PICKLE:,} bytes; {mends}")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {mends}") from None
    try:
        texts: list[str] = []  # the last two: what a call by name names
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            memo = opcode.name.endswith("PUT") and argument > count
            if opcode.name not in OPCODES or memo:
                what = ", ".join(stack.name for stack in opcode.stack_after) or opcode.name
                if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                    what = argument or " ".join(texts)
                raise InputError(f"{path} holds more than a dict of texts: {shown(what)}; {mends}")
            if isinstance(argument, str):
                texts = [*texts[-1:], argument]
        value = _DictsAndTexts(io.BytesIO(data), encoding="utf-8").load()
    except InputError:
        raise
    except Exception as error:  # whatever damaged bytes raise
        raise InputError(f"{path} is no whole pickle ({shown(error)}); {mends}") from None
    if type(value) is not dict:
        raise InputError(f"{path} holds a {type(value).__name__}; {mends}")
    for kind in (type(part) for pair in value.items() for part in pair):
        if kind is not str:
            raise InputError(f"{path} holds a {kind.__name__} in its dict; {mends}")
    return value


# ------------------------------------------------------------------------------------------------------------- fetching


def fetch_pictures(
    urls: dict[str, list[str]],
    folder: Path,
    *,
    names: dict[str, str] | None = None,
    workers: int = 24,
    per_second: float = 200,
    patience: Patience = PATIENCE,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Manifest:
    """Fetch a picture for every item (ASIN -> candidates, the best first) and return the manifest of these items.

    A picture is decoded as a whole before it takes its name in `folder`, `names`[ASIN] and the suffix of its format;
    without `names` it is the ASIN, or item-<position> where that is unfit for a file. A picture that is there is not
    fetched again. Where no server at all answers, most are not tried. Raises InputError where the folder cannot be
    written.
    """
    from PIL import Image

    folder = Path(folder)
    names = names or _file_stems(list(urls), {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_temporaries(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    there, manifest, wanted = _by_stem(folder), {}, []
    for asin, candidates in urls.items():
        if names[asin] in there:
            manifest[asin] = {"file": there[names[asin]]}
        elif not candidates:
            manifest[asin] = {"missing": NO_URL}
        else:
            wanted.append(asin)
    fetcher, large = Fetcher(patience, per_second), threading.Lock()

    def work(asin: str) -> dict[str, str]:
        return _fetch_picture(fetcher, urls[asin], folder / names[asin], max_bytes, max_pixels, large)

    with tqdm(total=len(wanted), desc="fetching pictures", unit="picture", disable=None) as bar:

        def done(asin: str, entry: dict[str, str]) -> bool:
            """Whether to go on."""
            manifest[asin] = entry
            bar.update()
            return fetcher.answered or fetcher.unreached < UNREACHABLE

        Image.init()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\b")  # of pictures that are refused or read all the same
            _in_threads(work, wanted, workers, fetcher.stop, done)
    why = f"not tried, as nothing could be reached for {UNREACHABLE} others; see whether the network and the proxy work"
    return {asin: manifest.get(asin, {"broken": why}) for asin in urls}


def _file_stems(asins: list[str], claimed: dict[str, str]) -> dict[str, str]:
    """ASIN -> file name without suffix. An ASIN of other signs than Amazon's becomes the item's number: a path, or two
    that differ by case alone, never reach the file system. claimed: the item whose picture has a name already."""
    stems, others = {}, set(asins)
    for number, asin in enumerate(asins, start=1):
        stem = asin if re.fullmatch(r"[A-Z0-9]{1,32}", asin) else f"item-{number}"
        while stem != asin and (stem in others or claimed.get(stem, asin) != asin):  # the name says another item
            stem += "_"
        stems[asin] = stem
    return stems


def _clear_temporaries(folder: Path) -> None:
    """Remove what a killed run left, by the names that `replacing` gives."""
    suffixes = "|".join(suffix[1:] for suffix in SUFFIXES.values())
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.([A-Z0-9]{{1,32}}|item-\d+_*)\.({suffixes})\.\w{{8}}\.tmp", path.name):
            path.unlink()


def _fetch_picture(
    fetcher: Fetcher, urls: list[str], stem: Path, max_bytes: int, max_pixels: int, large: threading.Lock
) -> dict[str, str]:
    """The manifest's entry of one item."""
    reasons, kind = [], "missing"
    for url in urls:
        try:
            data = fetcher.get(str(url).strip(), max_bytes)
            suffix = _checked_suffix(data, max_pixels, large)
        except FetchError as error:
            reasons.append(f"{shown(url)}: {error}")
            kind = kind if error.gone else "broken"
            continue
        path = stem.with_name(stem.name + suffix)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
        return {"file": path.name}
    return {kind: "; ".join(reasons)}


def _checked_suffix(data: bytes, max_pixels: int, large: threading.Lock) -> str:
    """The suffix for the picture in `data`, once it is decoded as a whole. Raises FetchError where it is not one."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            pixels = picture.width * picture.height
            if pixels > max_pixels:
                raise FetchError(f"{picture.width} x {picture.height} pixels, more than {max_pixels:,}")
            with large if pixels > LARGE else nullcontext():
                picture.load()
            return SUFFIXES[picture.format]
    except FetchError:
        raise
    except UnidentifiedImageError:
        raise FetchError("not a picture of a known format") from None
    except Exception as error:  # whatever a format's decoder raises
        raise FetchError(f"the picture cannot be read ({shown(error)})") from None


def _in_threads(
    work: Callable[[str], Any],
    tasks: Iterable[str],
    workers: int,
    stop: threading.Event,
    done: Callable[[str, Any], bool],
) -> None:
    """done(task, work(task)) in this thread for every task, until it returns False; the first error ends it all. The
    threads are daemons, so that after Ctrl-C no answer of a server is waited for."""
    todo: queue.SimpleQueue = queue.SimpleQueue()
    results: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        while (task := todo.get()) is not None and not stop.is_set():
            try:
                results.put((task, work(task), None))
            except BaseException as error:  # raised where it is seen
                results.put((task, None, error))

    def collect() -> bool:
        task, result, error = results.get()
        if error is not None:
            raise error
        return done(task, result)

    threads: list[threading.Thread] = []
    try:
        for _ in range(workers):
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            threads.append(thread)
        pending, going = 0, True
        for task in tasks:
            if pending == 2 * workers:
                pending, going = pending - 1, collect()
                if not going:
                    return
            todo.put(task)
            pending += 1
        while pending and going:
            pending, going = pending - 1, collect()
    finally:
        stop.set()
        for _ in threads:
            todo.put(None)
        until = time.monotonic() + 1
        for thread in threads:
            thread.join(max(0, until - time.monotonic()))
