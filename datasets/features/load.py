"""Frozen features of a catalogue's items, computed once and cached.

The cache is one array per dataset and encoder below <cache_root>/<dataset>/, with a JSON file beside it
(datasets/features/cache.py). Its name and that file carry a key of all that the features depend on: the encoder, its
weights and precision, the text template or preprocessing, and the ordered items with their texts or pictures. A
changed input is another key; a damaged file is noticed by its checksum and made again. Encoding that was cut off goes
on where it was, and under torchrun each rank takes a share. N items, F feature width.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common import processes
from common.errors import InputError
from config import Config
from datasets.catalog import Catalog, prepare_command
from datasets.features import cache, encoders
from datasets.features import encode as embedding
from datasets.item2img import ITEM2IMG
from datasets.text import NO_TEXT, item_text

CACHE_ROOT = Path("data/features")


def load_features(config: Config, catalog: Catalog, device: Any, trained_on: Collection[str] = ()) -> list[np.memmap]:
    """The `feature_files` that the settings ask for."""
    return feature_files(
        catalog,
        language=config.language_encoder if config.use_language_encoder else None,
        image=config.img_encoder if config.use_img_encoder else None,
        attributes=config.item_attributes,
        device=device,
        batch_size=config.encoder_batch_size,
        precision=config.encoder_precision,
        workers=config.encoder_workers,
        trained_on=trained_on,
    )


def feature_files(
    catalog: Catalog,
    *,
    language: str | None,
    image: str | None,
    attributes: tuple[str, ...],
    device: Any = "cpu",
    batch_size: int = 32,
    precision: str = "fp32",
    workers: int = 0,
    trained_on: Collection[str] = (),
    cache_root: Path = CACHE_ROOT,
    say: Callable[[str], None] = print,
) -> list[np.memmap]:
    """Features [N, F] of the text and of the picture of items 1..N, each mapped from its file, which is made where
    there is none: float16, or float32 where an earlier version made it; what is written to one stays in memory. Under
    torchrun all ranks call this, each makes a share, and all return the same.

    language, image: names of encoders, or None for a branch that is off.
    precision: what an encoder with weights computes in: fp32, bf16, or auto: as the features that are there already,
        whichever were made first, otherwise the fastest that the device has.
    workers: processes at most that read ahead of the encoder; 0 for none.
    trained_on: the names of the files that a run read, if the features are for it: those are taken first.
    Raises InputError where an encoder cannot be had, the dataset has no pictures, the texts are not those of
    `trained_on` (other pictures are only said: also their times count), or the disk is full.
    """
    pictures = catalog.pictures or []
    if image and not any(pictures):
        raise InputError(_no_pictures(catalog, f"{ITEM2IMG} lists none" if catalog.pictures else f"no {ITEM2IMG}"))
    processes.start()
    if processes.rank():
        say = _silent
    how = _How(device, batch_size, precision, workers, trained_on, cache_root, say)
    parts = []
    if language:
        parts.append(_language_features(catalog, language, attributes, how))
    if image:
        parts.append(_image_features(catalog, pictures, image, how))
    return parts


@dataclass(frozen=True)
class _How:
    """The arguments of `feature_files` that do not say what is encoded."""

    device: Any
    batch_size: int
    precision: str
    workers: int
    trained_on: Collection[str]
    cache_root: Path
    say: Callable[[str], None]


def _language_features(catalog: Catalog, name: str, attributes: tuple[str, ...], how: _How) -> np.memmap:
    texts = [item_text(record, attributes) for record in catalog.metadata]
    if all(text == NO_TEXT for text in texts):
        known = sorted({key for record in catalog.metadata for key in record})
        raise InputError(
            f"--item_attributes {','.join(attributes)}: no item of {catalog.name} has any of them; its metadata has "
            f"{', '.join(known) or 'nothing'}"
        )
    absent = [a for a in attributes if all(item_text(record, (a,)) == NO_TEXT for record in catalog.metadata)]
    if absent:
        how.say(f"no item has {' or '.join(absent)}: left out of the texts")
    without = sum(text == NO_TEXT for text in texts)
    if without:
        how.say(f"{without} of {len(texts)} items have no text: encoded as {NO_TEXT!r}")
    key = {
        "kind": "language",
        **encoders.language_fingerprint(name),
        "items": _digest([*catalog.asins, *texts]),
    }
    found = _cached(catalog, name, key, texts, how)
    return np.load(found.path, mmap_mode="c")


def _image_features(catalog: Catalog, pictures: list[Path | None], name: str, how: _How) -> np.memmap:
    key = {
        "kind": "image",
        **encoders.image_fingerprint(name),
        "items": _digest([*catalog.asins, *(_file_signature(picture, catalog.photos) for picture in pictures)]),
    }
    found = _cached(catalog, name, key, pictures, how)
    without = len(found.header["broken"])
    if without:
        how.say(f"{without} of {len(pictures)} items have no readable picture: zero vectors, named in "
                f"{cache.sidecar(found.path)}")  # fmt: skip
    return np.load(found.path, mmap_mode="c")


# ---------------------------------------------------------------------------------------------------------- the cache


def _cached(catalog: Catalog, name: str, key: dict[str, Any], items: Sequence[Any], how: _How) -> cache.File:
    """The features of these texts or pictures, on disk; encoded where they are not there yet."""
    from filelock import FileLock

    def find(say: Callable[[str], None] = _silent) -> cache.File:
        return cache.find(_candidates(catalog, name, key, how), _commit(name, key), how.trained_on, say)

    def compare_and_find() -> cache.File:
        _compare(_candidates(catalog, name, key, how), how)
        return find()

    found = processes.on_main_process(compare_and_find)
    if found.header:
        return found
    lock = FileLock(_cache_path(how.cache_root, catalog.name, name, key).with_suffix(".lock"))

    def find_alone() -> cache.File:
        cache.acquire(lock, how.say)
        return find(how.say)  # again: another process may have made it meanwhile

    try:
        found = processes.on_main_process(find_alone)
        return found if found.header else _make(found, catalog, name, items, how)
    finally:
        lock.release()


def _commit(name: str, key: dict[str, Any]) -> str | None:
    return encoders.hub_commit(name) if key["kind"] == "language" else None


def _candidates(catalog: Catalog, name: str, key: dict[str, Any], how: _How) -> list[cache.File]:
    """The files that would do, first the one that is made if there is none."""
    if name in encoders.BUILT_IN:
        keys = [key]
    elif how.precision == "auto":
        best = encoders.best_precision(how.device)
        keys = [key | {"precision": p} for p in (best, *(p for p in encoders.DTYPES if p != best))]
    else:
        keys = [key | {"precision": how.precision}]
    return [cache.File(_cache_path(how.cache_root, catalog.name, name, k), k) for k in keys]


def _compare(candidates: list[cache.File], how: _How) -> None:
    """Raise InputError where features are of other texts than a run was trained on, say so where they are of other
    pictures."""
    if not how.trained_on or any(file.path.name in how.trained_on for file in candidates):
        return
    if candidates[0].key["kind"] == "image":
        how.say("the pictures or their encoder's weights are not those that the run was trained on, or were copied "
                "without their times")  # fmt: skip
        return
    raise InputError(
        "the items' texts, or their encoder's weights, are not those that the run was trained on; give its "
        "--data_root, or train anew"
    )


def _make(file: cache.File, catalog: Catalog, name: str, items: Sequence[Any], how: _How) -> cache.File:
    """Encode what is not encoded yet, this rank its share, and let rank 0 finish the file."""
    path, key, is_text = file.path, file.key, file.key["kind"] == "language"
    precision = key.get("precision", "fp32")
    if "precision" in key:
        how.say(
            f"encoding {len(items):,} {'texts' if is_text else 'pictures'} by {name} ({precision}, {how.device}), "
            f"once: {path}"
        )
    encoder = (encoders.language_encoder if is_text else encoders.image_encoder)(name, how.device, precision)
    if is_text:
        items = encoder.tokenize(items)
        rows = embedding.text_batches(items, how.batch_size)
    else:
        rows = embedding.picture_batches(len(items), how.batch_size)
    shape = (len(items), encoder.dim)
    header = {"key": key, "commit": _commit(name, key) or ""}
    order = hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest()
    plan = {**header, "shape": list(shape), "batch_size": how.batch_size, "order": order}
    todo = processes.on_main_process(lambda: cache.begin(path, plan, shape, rows))
    if len(todo) < len(rows):
        how.say(f"{len(rows) - len(todo)} of {len(rows)} batches were encoded before: going on")
    share = todo[processes.rank() :: processes.world_size()]
    batches = ([items[row] for row in rows[number]] for number in share)
    encoded = embedding.encode_batches(
        encoder,
        embedding.read_texts if is_text else embedding.read_pictures,
        embedding.progress(batches, len(share)),
        workers=embedding.num_workers(how.workers, len(share)) if encoder.slow_to_prepare else 0,
    )
    try:
        writer = cache.Writer(path)
        for number, features in zip(share, encoded, strict=True):
            writer.write(number, rows[number], features)
        processes.barrier()

        def finish() -> dict[str, Any]:
            broken = {} if is_text else embedding.unreadable(catalog.asins, items, cache.partial(path))
            if len(broken) == len(items):
                cache.drop(path)
                raise InputError(_no_pictures(catalog, next(iter(broken.values()))))
            return cache.finish(path, header | {"broken": broken}, rows)

        return replace(file, header=processes.on_main_process(finish))
    except BaseException:
        if processes.world_size() == 1:
            cache.drop_if_empty(path)
        raise


def _no_pictures(catalog: Catalog, why: str) -> str:
    command = prepare_command(catalog.photos.parents[1], catalog.name, only="pictures")
    return (
        f"{catalog.name} has no picture that can be read ({why}); --no-use_img_encoder goes without, and {command} "
        f"fetches those that the metadata has addresses of"
    )


def _silent(line: str) -> None:
    """Said by rank 0 alone."""


def _cache_path(cache_root: Path, dataset: str, encoder_name: str, key: dict[str, Any]) -> Path:
    last = Path(encoder_name).name or encoder_name
    short = re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-") or "encoder"
    return cache_root / dataset / f"{key['kind']}-{short}-{_digest([json.dumps(key, sort_keys=True)])[:16]}.npy"


def _digest(strings: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for string in strings:
        digest.update(string.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _file_signature(path: Path | None, photos: Path) -> str:
    try:
        stat = path.stat() if path else None
    except OSError:
        stat = None
    return f"{path.relative_to(photos)} {stat.st_size} {stat.st_mtime_ns}" if path and stat else ""
