"""Features of a catalogue's items, computed once and cached. N items, F feature width.

The cache has one array per dataset and modality below <features_root>/<dataset>/, with a JSON file beside it
(cache.py). Both carry a key of everything that the features depend on: the encoder, its weights and precision, and the
ordered items with their inputs. A changed input changes the key. A damaged file fails its checksum and is made again.
Encoding continues after a kill. Under torchrun each rank of the first machine encodes a share, and the other machines
get the finished files from there: files of other processors would differ in rounding.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common import processes
from config import FeatureSettings
from datasets.catalog import Catalog
from datasets.features import cache, encode
from datasets.features.modality import Job, Modality, digest
from datasets.features.registry import modalities


def load_features(
    settings: FeatureSettings,
    catalog: Catalog,
    device: Any,
    trained_on: Collection[str] = (),
) -> list[np.memmap]:
    """Return features [N, F] of items 1..N for each modality: text, pictures, then files in the given order.

    Each array is mapped copy-on-write from its file, which is made first if it is missing: float16, or float32 if an
    earlier version made it. Under torchrun all ranks call this, and all return the same. Texts, pictures, files of
    vectors and encoders are read on the first machine only.

    trained_on: names of the files that a run was trained on; those are preferred. Raises InputError if an encoder or a
    file cannot be read, no item has an input, texts or files differ from those of `trained_on` (changed pictures are
    only reported, because their times count too), the disk is full, or another machine has a file of other content.
    """
    job = Job(settings, catalog, device, trained_on)
    files = processes.on_first_machine(lambda: _files(modalities(settings), job))
    if processes.machines() > 1:
        files = [_received(file, job) for file in files]
    return [np.load(file.path, mmap_mode="c") for file in files]


def _files(asked: Sequence[Modality], job: Job) -> list[cache.File]:
    """Return the modalities' cached files, made first if they are missing."""
    processes.start()
    inputs = [modality.inputs(job) for modality in asked]  # all are checked before one is encoded
    keys = [modality.key(job, given) for modality, given in zip(asked, inputs, strict=True)]
    for modality, key in zip(asked, keys, strict=True):
        if not any(file.path.exists() for file in _candidates(modality, key, job)):
            processes.on_main_process(modality.check_name)
    files = []
    for modality, key, given in zip(asked, keys, inputs, strict=True):
        files.append(_cached(modality, key, given, job))
        modality.note(files[-1], job)
    return files


def _received(file: cache.File, job: Job) -> cache.File:
    """Return this machine's own copy of a file of the first machine, sent from there if it is missing or damaged."""
    own = replace(file, path=_folder(job) / file.path.name)
    header: dict[str, Any] | None = None

    def find() -> None:
        nonlocal header
        cache.look_again(own.path)
        header, _ = cache.read(own.path, own.key, None)

    processes.on_each_machine(find)
    digest = header["sha256"] if header else file.header["sha256"]
    hint = f"remove it from {own.path.parent} on the machine where it is wrong, and it is made or sent again"
    processes.check_same(f"the feature file {own.path.name}", digest, hint)
    wanted = processes.local_rank() == 0 and header is None
    if processes.any_rank(wanted):
        processes.print_main(f"sending {file.path} to the machines that lack it")
        pieces = processes.pieces_of(file.path)

        def write() -> None:
            try:
                if wanted:
                    cache.receive(own, pieces)
            finally:
                for _ in pieces:  # every rank must take part to the end
                    pass

        processes.together(write)
    return own


def _cached(modality: Modality, key: dict[str, Any], inputs: Sequence[Any], job: Job) -> cache.File:
    """Return the cached file, made first if it is missing."""
    from filelock import FileLock

    def find(report: bool = False) -> cache.File:
        return cache.find(_candidates(modality, key, job), modality.commit(), job.trained_on, report)

    def compare_and_find() -> cache.File:
        names = [file.path.name for file in _candidates(modality, key, job)]
        if job.trained_on and not set(names) & set(job.trained_on):
            modality.refuse_change(job)
        return find()

    found = processes.on_main_process(compare_and_find)
    if found.header:
        return found
    lock = FileLock(_path(modality, key, job).with_suffix(".lock"))

    def find_alone() -> cache.File:
        cache.acquire(lock)
        return find(report=True)  # again: another process may have made it meanwhile

    try:
        found = processes.on_main_process(find_alone)
        return found if found.header else replace(found, header=modality.make(found, inputs, job))
    finally:
        lock.release()


def _candidates(modality: Modality, key: dict[str, Any], job: Job) -> list[cache.File]:
    """Return the files that would do; the first is made if none exists."""
    former = modality.former_key(key)
    keys = [key] if former == key else [key, former]
    if modality.has_precision():
        precisions = [job.settings.encoder_precision]
        if precisions == ["auto"]:
            best = encode.best_precision(job.device)
            precisions = [best, *(p for p in encode.DTYPES if p != best)]
        keys = [k | {"precision": p} for k in keys for p in precisions]
    return [cache.File(_path(modality, k, job), k) for k in keys]


def _path(modality: Modality, key: dict[str, Any], job: Job) -> Path:
    name = modality.cache_name(key)
    last = Path(name).name or name
    short = re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-") or "encoder"
    return _folder(job) / f"{modality.kind}-{short}-{digest([json.dumps(key, sort_keys=True)])[:16]}.npy"


def _folder(job: Job) -> Path:
    return job.cache_root / job.catalog.name
