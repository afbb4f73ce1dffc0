"""Pictures from the web: many at a time, each decoded before it takes its name."""

import hashlib
import io
import os
import queue
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import InputError
from common.files import cannot_write, replacing
from datasets.features.image import MAX_PIXELS
from datasets.prepare.web import PATIENCE, Fetcher, FetchError, Patience, shown

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
WORKERS, PER_SECOND = 24, 200.0  # fetched at a time, and at most
MAX_BYTES = 20_000_000  # of a picture
LARGE = 4_000_000  # pixels; above, pictures are decoded one at a time, as they need memory
UNREACHABLE = 50  # URLs without any answer of any server, after which the others are not tried
NO_URL = "no URL in the metadata"

Manifest = dict[str, dict[str, str]]


def fetch_pictures(
    urls: dict[str, list[str]],
    folder: Path,
    *,
    workers: int = WORKERS,
    per_second: float = PER_SECOND,
    patience: Patience = PATIENCE,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Manifest:
    """Fetch a picture for every item (ASIN -> candidates, the best first) and return the manifest of these items.

    A picture is decoded as a whole before it takes its name in `folder`, `file_stem` and the suffix of its format. One
    that is there is not fetched again. Where no server at all answers, most are not tried. Raises InputError where the
    folder cannot be written.
    """
    from PIL import Image

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_temporaries(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    there, manifest, wanted = by_stem(folder), {}, []
    for asin, candidates in urls.items():
        if file_stem(asin) in there:
            manifest[asin] = {"file": there[file_stem(asin)]}
        elif not candidates:
            manifest[asin] = {"missing": NO_URL}
        else:
            wanted.append(asin)
    fetcher, large = Fetcher(patience, per_second), threading.Lock()

    def work(asin: str) -> dict[str, str]:
        return _fetch_picture(fetcher, urls[asin], folder / file_stem(asin), max_bytes, max_pixels, large)

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


def by_stem(photos: Path) -> dict[str, str]:
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


def file_stem(asin: str) -> str:
    """The name of an item's picture without suffix: its id, or for one of other signs than Amazon's its digest. So no
    path, and no two names that differ by case alone, reach the file system."""
    if re.fullmatch(r"[A-Z0-9]{1,32}", asin):
        return asin
    return f"item-{hashlib.sha256(asin.encode('utf-8', 'surrogatepass')).hexdigest()[:20]}"


def _clear_temporaries(folder: Path) -> None:
    """Remove what a killed run left, by the names that `replacing` gives."""
    suffixes = "|".join(suffix[1:] for suffix in SUFFIXES.values())
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.([A-Z0-9]{{1,32}}|item-[0-9a-f]{{20}})\.({suffixes})\.\w{{8}}\.tmp", path.name):
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
            assert picture.format is not None  # of what was opened
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
