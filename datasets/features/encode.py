"""Texts and pictures to features, by batches: of a whole catalogue (datasets/features/load.py), and of new products.

F: feature width, n: texts, pictures or products, B: those of a batch.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import processes
from common.errors import InputError
from datasets.features import encoders
from datasets.features.encoders import Encoder
from datasets.text import NO_TEXT, item_text

MAX_PIXELS = 50_000_000  # a picture that claims more is not decoded
NO_PICTURE = "no picture listed"
BATCHES_A_WORKER = 32  # a worker takes about six seconds to start, so it is not started for fewer
AHEAD = 2  # batches that a worker process has ready; all that memory depends on, however many pictures there are


def text_batches(texts: Sequence[Any], batch_size: int) -> list[np.ndarray]:
    """The rows of each batch of tokenized texts, longest first: of like length, so that little padding is read."""
    longest_first = np.argsort([-len(text) for text in texts], kind="stable")
    return np.split(longest_first, range(batch_size, len(texts), batch_size))


def picture_batches(count: int, batch_size: int) -> list[np.ndarray]:
    """The rows of each batch, in order."""
    return np.split(np.arange(count), range(batch_size, count, batch_size))


def read_texts(prepare: Callable, texts: list[Any]) -> tuple[int, list[int], Any]:
    """(B, the rows of the batch that are encoded, what the encoder's `forward` takes): of tokenized texts, all."""
    return len(texts), list(range(len(texts))), prepare(texts)


def read_pictures(prepare: Callable, paths: list[Path | None]) -> tuple[int, list[int], Any]:
    """As `read_texts`, of the pictures that can be read; they are decoded one after another."""
    kept: list[int] = []

    def readable() -> Iterator[Any]:
        for row, path in enumerate(paths):
            picture, _ = open_picture(path)
            if picture is not None:
                kept.append(row)
                yield picture

    pictures = readable()
    first = list(itertools.islice(pictures, 1))
    return len(paths), kept, prepare(itertools.chain(first, pictures)) if first else None


def open_picture(path: Path | None) -> tuple[Any | None, str]:
    """(the decoded picture, ""), or (None, why it cannot be read)."""
    from PIL import Image

    if path is None:
        return None, NO_PICTURE
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
            return picture.convert("RGB"), ""
    except Exception as error:  # whatever a format's decoder raises
        return None, f"{path.name}: {error}"


def unreadable(asins: list[str], pictures: Sequence[Path | None], features: np.ndarray) -> dict[str, str]:
    """ASIN -> why its picture is not used, of all that have a zero vector. Asked again at the end, rather than noted
    on the way, it outlasts a kill."""
    reasons = {}
    for start in range(0, len(features), 4096):
        for row in (start + np.flatnonzero(~features[start : start + 4096].any(axis=1))).tolist():
            reasons[asins[row]] = open_picture(pictures[row])[1] or "it could not be read at first"
    return reasons


def encode_batches(
    encoder: Encoder, read: Callable, batches: Iterable[list[Any]], *, workers: int = 0
) -> Iterator[np.ndarray]:
    """Features [B, F] float32 of each batch, in order; zeros where a picture cannot be read.

    read: `read_texts` or `read_pictures`. workers: processes that read ahead of the encoder; 0 reads in this one, to
    the same bits. Raises InputError for features that are not finite, and where a worker was killed.
    """
    for size, kept, prepared in _ahead(partial(read, encoder.prepare), batches, workers, encoder.on_gpu):
        features = np.zeros((size, encoder.dim), dtype=np.float32)
        if kept:
            features[kept] = encoder.forward(prepared)
        if not np.isfinite(features).all():
            raise InputError(
                f"the encoder {encoder.fingerprint} gave features that are not finite; its weights are damaged, or "
                f"need --encoder_precision fp32"
            )
        yield features


def num_workers(workers: int, batches: int) -> int:
    """How many of so many workers are, for a share of so many batches, on the cores that this rank has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(workers, cores // processes.on_this_machine() - 1, batches // BATCHES_A_WORKER))


def _ahead(read: Callable, batches: Iterable[list[Any]], workers: int, pin_memory: bool) -> Iterator[Any]:
    """`read` of each batch."""
    if not workers:
        yield from map(read, batches)
        return
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Itself(),  # type: ignore[arg-type]  # whatever has a __getitem__ is a data set to it
        sampler=batches,
        batch_size=None,
        collate_fn=read,
        num_workers=workers,
        prefetch_factor=AHEAD,
        multiprocessing_context="spawn",  # a fork of a process that has computed with threads may hang
        pin_memory=pin_memory,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # an error in `read` names the worker further on
            raise
        raise InputError(
            f"a process that reads ahead of the encoder was killed ({str(error).splitlines()[0]}), for want of memory "
            f"most likely; give fewer --encoder_workers (0 for none) or a smaller --encoder_batch_size. What was "
            f"encoded is kept"
        ) from error


class _Itself:
    """The data set that DataLoader asks for: the sampler gives whole batches, so that no worker holds the rest."""

    def __getitem__(self, batch: list[Any]) -> list[Any]:
        return batch


def encode_all(encoder: Encoder, read: Callable, items: Sequence[Any], rows: list[np.ndarray]) -> np.ndarray:
    """[n, F] in memory, of texts or pictures in batches of these rows."""
    features = np.zeros((len(items), encoder.dim), dtype=np.float32)
    batches = ([items[row] for row in batch] for batch in rows)
    for batch, encoded in zip(rows, encode_batches(encoder, read, progress(batches, len(rows))), strict=True):
        features[batch] = encoded
    return features


def progress(batches: Iterable[Any], count: int) -> Iterable[Any]:
    """Show a progress bar over the batches on rank 0, if tqdm is installed (serving does without)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return tqdm(batches, "encoding", count, unit="batch", disable=True if processes.rank() else None)


# ------------------------------------------------------------------------------------------------------- new products


def feature_recipe(language: str | None, image: str | None, attributes: tuple[str, ...], dim: int) -> dict[str, Any]:
    """How a model's features [N, dim] were made, in words that JSON can hold, for `embed_records`. language, image: the
    encoders' names, None for a branch that is off; dim: 0 without features."""
    recipe: dict[str, Any] = {"dim": dim, "normalisation": "each encoder's vector has length 1"}
    recipe["language"] = language and {
        "encoder": language,
        "fingerprint": encoders.language_fingerprint(language),
        "commit": encoders.hub_commit(language),
        "attributes": list(attributes),
        "text": item_text({name: f"<{name}>" for name in attributes}, attributes),
    }
    recipe["image"] = image and {"encoder": image, "fingerprint": encoders.image_fingerprint(image)}
    return recipe


def embed_records(
    records: list[dict[str, Any]], recipe: dict[str, Any], *, language: str | None = None, image: str | None = None
) -> np.ndarray:
    """Features [n, F] of new products as `feature_recipe` says. A record has the attributes of the text, and under
    `picture` the path of one. language, image: where the encoders lie now, if not where the recipe says.

    Raises InputError for encoders that are not those of the recipe, and for records that lack what they need.
    """
    if not recipe["dim"]:
        raise InputError("this model read no features, so there is nothing to embed")
    if not records:
        return np.zeros((0, recipe["dim"]), dtype=np.float32)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise InputError(f"record {number} is {record!r:.80}; give a dict with title, brand, ...")
    # A data frame has NaN where there is no path.
    paths = [record.get("picture") for record in records]
    pictures = [Path(path) if path and isinstance(path, str | Path) else None for path in paths]
    parts = []
    if recipe["language"]:
        name, attributes = language or recipe["language"]["encoder"], tuple(recipe["language"]["attributes"])
        _check_encoder("language_encoder", name, encoders.language_fingerprint(name), recipe["language"])
        texts = [item_text(record, attributes) for record in records]
        for number, (text, picture) in enumerate(zip(texts, pictures, strict=True), start=1):
            if text == NO_TEXT and not (recipe["image"] and picture):
                raise InputError(f"record {number} has no text; give it one of {', '.join(attributes)}")
        if name == recipe["language"]["encoder"] and recipe["language"]["commit"] and "@" not in name:
            name = f"{name}@{recipe['language']['commit']}"  # the hub's model may have moved on
        encoder = encoders.language_encoder(name, "cpu")
        tokenized = encoder.tokenize(texts)
        parts.append(encode_all(encoder, read_texts, tokenized, text_batches(tokenized, 32)))
    if recipe["image"]:
        name = image or recipe["image"]["encoder"]
        _check_encoder("img_encoder", name, encoders.image_fingerprint(name), recipe["image"])
        encoder = encoders.image_encoder(name, "cpu")
        parts.append(encode_all(encoder, read_pictures, pictures, picture_batches(len(pictures), 32)))
        for number, (path, row) in enumerate(zip(pictures, parts[-1], strict=True), start=1):
            if path is not None and not row.any():  # without a path it is a zero vector, as in training
                raise InputError(
                    f"the picture of record {number} cannot be read ({open_picture(path)[1]}); give another, or none"
                )
    return np.concatenate(parts, axis=1)


def _check_encoder(argument: str, name: str, fingerprint: dict[str, Any], recipe: dict[str, Any]) -> None:
    if fingerprint == recipe["fingerprint"] or name == f"{recipe['encoder']}@{recipe.get('commit')}":
        return
    if name == recipe["encoder"] and argument == "language_encoder" and not Path(name).exists():
        raise InputError(f"the encoder {name!r} is not there any more; give the folder it is in now as {argument}")
    raise InputError(
        f"the encoder {name!r} is not {recipe['encoder']!r}, which the model was trained on (its weights or settings "
        f"differ); give the path of that one as {argument}"
    )
