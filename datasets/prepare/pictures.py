"""Pictures of items: found in a folder or fetched, and listed in item2img.json.

    photos/<dataset_code>/                   the pictures; a fetched one is named <ASIN>.<jpg|png|...>
    <dataset_code>/item2img_dict.pkl         optional: ASIN -> path of a picture on any machine (VIP5 ships it)
    <dataset_code>/pictures.json             the manifest
    <dataset_code>/item2img.json             the pictures (datasets/catalog.py)

The manifest has one entry an item, by ASIN: {"file": name}, {"missing": reason} (the item has no picture) or
{"broken": reason} (it should have one).
"""

import asyncio
import hashlib
import io
import pickle
import pickletools
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from common.errors import InputError
from common.files import cannot_write, read_json, replacing, write_json
from datasets.features.image import MAX_PIXELS
from datasets.items import ITEM2IMG, MANIFEST, read_item2img
from datasets.prepare.http import POLICY, Client, FetchError, Policy, printable

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tiff"}
READ = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tiff", ".tif")  # what counts as a picture, best first
MAX_BYTES = 20_000_000  # of a picture's file
DECODED_AT_ONCE = 4  # bounds the memory: a picture of MAX_PIXELS takes 150 MB
MAX_PICKLE = 1 << 28  # bytes
NO_URL = "no URL in the metadata"

Manifest = dict[str, dict[str, str]]


@dataclass(frozen=True)
class FetchOptions:
    """How pictures are fetched: `workers` at a time, at most `per_second`."""

    workers: int
    per_second: float
    allow_private: bool = False  # fetch from private and reserved addresses too
    policy: Policy = POLICY


def prepare_pictures(
    asins: list[str],
    urls: dict[str, list[str]],
    photos: Path,
    dataset_folder: Path,
    options: FetchOptions | None,
    log: Callable[[str], None] = print,
) -> Manifest:
    """Return the manifest of items 1..N (`asins`, in this order), and write it and item2img.json.

    Pictures in `photos` stay: those in item2img.json, those of the last manifest, those that item2img_dict.pkl names
    and those named by ASIN. The others are fetched from the first of their `urls` that serves a picture, so a killed
    run goes on where it was. Without `options` nothing is fetched, and the reasons of the last manifest stay.

    Raises InputError for a file that cannot be read, a folder that cannot be written and a full disk.
    """
    photos, dataset_folder = Path(photos), Path(dataset_folder)
    before = _read_manifest(dataset_folder / MANIFEST)
    by_user = read_item2img(dataset_folder, photos, asins, manifest=before) or {}
    pickled = dataset_folder / "item2img_dict.pkl"
    manifest = find_pictures(asins, photos, pickled if pickled.exists() else None)
    for asin in asins:
        old = before.get(asin, {})
        if asin in by_user:
            missing = {"broken": f"{ITEM2IMG} lists {printable(by_user[asin])}, which does not exist"}
            manifest[asin] = {"file": by_user[asin]} if is_picture(photos, by_user[asin]) else missing
        elif is_picture(photos, old.get("file", "")):
            manifest[asin] = old
    kept = sum("file" in entry for entry in manifest.values())
    rest = [asin for asin in asins if "file" not in manifest[asin] and asin not in by_user]
    if options:
        manifest |= fetch_pictures({asin: urls.get(asin) or [] for asin in rest}, photos, options)
    for asin in rest if not options else ():
        if asin in before and "file" not in before[asin]:
            manifest[asin] = before[asin]
        elif urls.get(asin):
            manifest[asin] = {"missing": "not fetched"}
    write_json(dataset_folder / MANIFEST, manifest)
    item2img = {asin: entry["file"] for asin, entry in manifest.items() if "file" in entry} | by_user
    write_json(dataset_folder / ITEM2IMG, {asin: item2img[asin] for asin in asins if asin in item2img})
    count = Counter(next(iter(entry)) for entry in manifest.values())
    log(
        f"pictures: {count['file']:,} of {len(asins):,} items ({kept:,} were there, {count['file'] - kept:,} fetched), "
        f"{count['missing']:,} missing, {count['broken']:,} broken; {dataset_folder / MANIFEST} says why"
    )
    return manifest


# ------------------------------------------------------------------------------------------------------- fetching


def fetch_pictures(urls: dict[str, list[str]], folder: Path, options: FetchOptions) -> Manifest:
    """Fetch a picture for every item (ASIN -> URLs, best first) into `folder`, and return their manifest.

    A picture is decoded completely before it gets its name, `file_stem` and the suffix of its format. Raises InputError
    if the folder cannot be written.
    """
    from PIL import Image

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in folder.glob(".*.????????.tmp"):  # named by `replacing`
            left_by_a_kill.unlink()
    except OSError as error:
        raise cannot_write(folder, error) from error
    Image.init()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")  # about pictures that are refused, or read anyway
        return asyncio.run(_fetch_all(urls, folder, options))


async def _fetch_all(urls: dict[str, list[str]], folder: Path, options: FetchOptions) -> Manifest:
    manifest: Manifest = {asin: {"missing": NO_URL} for asin in urls}
    wanted = [asin for asin in urls if urls[asin]]
    queue, decoders = iter(wanted), asyncio.Semaphore(DECODED_AT_ONCE)
    with tqdm(total=len(wanted), desc="fetching pictures", unit="picture", disable=None) as bar:
        async with Client(options.policy, options.per_second, options.allow_private) as client:

            async def work() -> None:
                for asin in queue:
                    manifest[asin] = await _fetch_picture(client, urls[asin], folder / file_stem(asin), decoders)
                    bar.update()

            await asyncio.gather(*(work() for _ in range(options.workers)))
    return manifest


async def _fetch_picture(client: Client, urls: list[str], stem: Path, decoders: asyncio.Semaphore) -> dict[str, str]:
    reasons, kind = [], "missing"
    for url in urls:
        try:
            data = await client.get(str(url).strip(), MAX_BYTES)
            async with decoders:
                path = stem.with_name(stem.name + await asyncio.to_thread(_decode, data))
            await asyncio.to_thread(_write, path, data)
            return {"file": path.name}
        except FetchError as error:
            reasons.append(f"{printable(url)}: {error}")
            kind = kind if error.gone else "broken"
    return {kind: "; ".join(reasons)}


def _decode(data: bytes) -> str:
    """Return the suffix for a picture. Raises FetchError for anything that does not decode completely."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=tuple(SUFFIXES)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise FetchError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
            picture.load()
            return SUFFIXES.get(str(picture.format), ".jpg")  # MPO: several JPEGs in one file
    except FetchError:
        raise
    except UnidentifiedImageError:
        raise FetchError("not a picture of a known format") from None
    except Exception as error:  # decoders raise anything
        raise FetchError(f"the picture cannot be read ({printable(error)})") from None


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def file_stem(asin: str) -> str:
    """Return a picture's file name without suffix: an ASIN of Amazon's form, or the digest of any other id. So neither
    paths nor names that differ in case alone reach the file system."""
    if re.fullmatch(r"[A-Z0-9]{1,32}", asin):
        return asin
    return f"item-{hashlib.sha256(asin.encode('utf-8', 'surrogatepass')).hexdigest()[:20]}"


# ------------------------------------------------------------------------------------------------ existing pictures


def find_pictures(asins: list[str], photos: Path, pickled: Path | None = None) -> Manifest:
    """Return the manifest of the pictures in `photos`, which are not decoded.

    pickled: maps ASINs to paths on any machine; the longest end of a path that exists below `photos` counts. Items
    without such a path have the file <ASIN>.<jpg|png|...>. Raises InputError for a pickle of anything but a dict of
    strings.
    """
    paths, files = _read_pickle(pickled) if pickled else {}, {}
    try:
        there = photos.iterdir() if photos.is_dir() else ()
        names = [path.name for path in there if path.suffix.lower() in READ and path.is_file()]
    except OSError as error:
        raise InputError(f"{photos} cannot be read ({error.strerror}); run where you may read it") from None
    for name in sorted(names, key=lambda name: (READ.index(Path(name).suffix.lower()), name), reverse=True):
        files[Path(name).stem] = name
    manifest: Manifest = {}
    for asin in asins:
        parts = PurePosixPath(paths.get(asin, "").replace("\\", "/")[-4096:].lstrip("/")).parts[-8:]
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        names = [*ends, files.get(asin, ""), files.get(file_stem(asin), "")]
        if file := next((name for name in names if is_picture(photos, name)), None):
            manifest[asin] = {"file": file}
        elif pickled and asin in paths:
            reason = f"{pickled.name} names {printable(paths[asin])}, which is not in {photos.name}/"
            manifest[asin] = {"missing": reason}
        else:
            manifest[asin] = {"missing": f"{NO_URL}, and no file of this name in {photos.name}/"}
    return manifest


def is_picture(photos: Path, name: str) -> bool:
    """Return whether `name` is a file below `photos`. Links out of it do not count."""
    try:
        path = photos / name
        return bool(name) and path.is_file() and path.resolve().is_relative_to(photos.resolve())
    except (OSError, ValueError):  # not a valid file name
        return False


def _read_manifest(path: Path) -> Manifest:
    hint = "delete it: it is made again from the pictures in the folder"
    manifest = read_json(path, hint) if path.exists() else {}
    for entry in manifest.values():
        one = isinstance(entry, dict) and len(entry) == 1 and entry.keys() <= {"file", "missing", "broken"}
        if not one or not all(isinstance(text, str) for text in entry.values()):
            raise InputError(f"{path} does not map items to one of file, missing, broken; {hint}")
    return manifest


# Opcodes of dicts and strings. The others are refused before anything is built: some call functions, and others make
# a few bytes take gigabytes.
OPCODES = {"PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "MEMOIZE", "PUT", "BINPUT",
           "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
           "STRING", "SHORT_BINSTRING", "BINSTRING"}  # fmt: skip


class _NoCalls(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _read_pickle(path: Path) -> dict[str, str]:
    hint = f"it must be a pickled dict of strings (ASIN -> path); {ITEM2IMG} can say the same in JSON"
    try:
        if path.stat().st_size > MAX_PICKLE:
            raise InputError(f"{path} has more than {MAX_PICKLE:,} bytes; {hint}")
        data = path.read_bytes()
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            too_far = opcode.name.endswith("PUT") and isinstance(argument, int) and argument > count  # fills the memory
            if opcode.name not in OPCODES or too_far:
                raise InputError(f"{path} holds more than a dict of strings: opcode {opcode.name}; {hint}")
        value = _NoCalls(io.BytesIO(data), encoding="utf-8").load()
    except InputError:
        raise
    except Exception as error:  # damaged bytes raise anything
        raise InputError(f"{path} cannot be read ({printable(error)}); {hint}") from None
    if type(value) is not dict or not all(type(part) is str for pair in value.items() for part in pair):
        raise InputError(f"{path} holds another type than a dict of strings; {hint}")
    return value
