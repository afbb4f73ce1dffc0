"""Frozen features of a catalogue's items, computed once and cached.

The cache is one safetensors file per dataset and encoder below <cache_root>/<dataset>/. Its name and header carry a key
of all that the features depend on: the encoder and its weights, the text template or preprocessing, and the ordered
items with their texts or pictures. A changed input is another key; a damaged file is noticed by its checksum and made
again. N items, F feature width.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from config import InputError
from datasets import encoders
from datasets.catalog import Catalog
from datasets.embedding import encode_pictures, encode_texts
from datasets.files import replacing, write_json
from datasets.text import NO_TEXT, item_text

CACHE_ROOT = Path("data/features")


def item_features(
    catalog: Catalog,
    *,
    language: str | None,
    image: str | None,
    attributes: tuple[str, ...],
    device: Any = "cpu",
    batch_size: int = 32,
    cache_root: Path = CACHE_ROOT,
    say: Callable[[str], None] = print,
) -> np.ndarray | None:
    """Features [N, F] float32 of items 1..N: the text's, the picture's or both side by side, each of length 1.

    language, image: names of encoders, or None for a branch that is off. None is returned where both are off.
    Raises InputError where an encoder cannot be had or the dataset has no pictures.
    """
    if image and catalog.pictures is None:
        raise InputError(
            f"{catalog.name} has no item2img.json, so there are no pictures for --img_encoder {image}; "
            f"--no-use_img_encoder trains on text alone"
        )
    parts = []
    if language:
        parts.append(_language_features(catalog, language, attributes, device, batch_size, cache_root, say))
    if image:
        parts.append(_image_features(catalog, image, device, batch_size, cache_root, say))
    return np.concatenate(parts, axis=1) if parts else None


def _language_features(catalog, name, attributes, device, batch_size, cache_root, say) -> np.ndarray:
    texts = [item_text(record, attributes) for record in catalog.metadata]
    if all(text == NO_TEXT for text in texts):
        known = sorted({key for record in catalog.metadata for key in record})
        raise InputError(
            f"--item_attributes {','.join(attributes)}: no item of {catalog.name} has any of them; its metadata has "
            f"{', '.join(known) or 'nothing'}"
        )
    absent = [a for a in attributes if all(item_text(record, (a,)) == NO_TEXT for record in catalog.metadata)]
    if absent:
        say(f"no item has {' or '.join(absent)}: left out of the texts")
    without = sum(text == NO_TEXT for text in texts)
    if without:
        say(f"{without} of {len(texts)} items have no text: encoded as {NO_TEXT!r}")
    key = {
        "kind": "language",
        **encoders.language_fingerprint(name),
        "items": _digest([*catalog.asins, *texts]),
    }

    def compute() -> np.ndarray:
        return encode_texts(encoders.language_encoder(name, device), texts, batch_size)

    path = _cache_path(cache_root, catalog.name, name, key)
    return _cached(path, key, lambda: encoders.hub_commit(name), compute, say)


def _image_features(catalog, name, device, batch_size, cache_root, say) -> np.ndarray:
    pictures = catalog.pictures
    key = {
        "kind": "image",
        **encoders.image_fingerprint(name),
        "items": _digest([*catalog.asins, *(_file_signature(picture, catalog.photos) for picture in pictures)]),
    }
    path = _cache_path(cache_root, catalog.name, name, key)
    broken: dict[str, str] = {}  # ASIN -> why its picture is not used

    def compute() -> np.ndarray:
        encoder = encoders.image_encoder(name, device)
        features = encode_pictures(encoder, pictures, catalog.asins, batch_size, broken)
        if not features.any():
            example = f" ({next(iter(broken.values()))})" if broken else ""
            raise InputError(
                f"none of {catalog.name}'s pictures can be read{example}; --no-use_img_encoder goes without"
            )
        if broken:
            write_json(path.with_suffix(".broken.json"), broken)
        return features

    features = _cached(path, key, lambda: None, compute, say)
    without = int((~features.any(axis=1)).sum())
    if without:
        say(f"{without} of {len(pictures)} items have no readable picture: zero vectors, named in "
            f"{path.with_suffix('.broken.json')}")  # fmt: skip
    return features


# ---------------------------------------------------------------------------------------------------------- the cache


def _cached(
    path: Path,
    key: dict[str, Any],
    commit: Callable[[], str | None],
    compute: Callable[[], np.ndarray],
    say: Callable[[str], None],
) -> np.ndarray:
    """The features at `path`, or `compute()` written there. `commit()`: what the hub's model is at now, if known; a
    first `compute()` may only just have fetched it."""
    if path.exists():
        features, problem = _read(path, key, commit())
        if features is not None:
            return features
        say(f"{path} is {problem}: made again")
    features = compute()
    _write(path, features, key, commit())
    return features


def _read(path: Path, key: dict[str, Any], commit: str | None) -> tuple[np.ndarray | None, str]:
    """(features, "") or (None, what is wrong with the file)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header, features = file.metadata() or {}, file.get_tensor("features")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        return None, f"damaged ({error})"
    if header.get("sha256") != hashlib.sha256(features.tobytes()).hexdigest():
        return None, "damaged (its checksum differs)"
    if header.get("key") != json.dumps(key, sort_keys=True):
        return None, "of another key"
    if commit and header.get("commit") not in ("", commit):
        return None, f"of another commit of the encoder ({header.get('commit')}, now {commit})"
    return features, ""


def _write(path: Path, features: np.ndarray, key: dict[str, Any], commit: str | None) -> None:
    from safetensors.numpy import save

    header = {
        "key": json.dumps(key, sort_keys=True),
        "commit": commit or "",
        "sha256": hashlib.sha256(features.tobytes()).hexdigest(),
    }
    with replacing(path) as temporary:
        temporary.write_bytes(save({"features": features}, header))


def _cache_path(cache_root: Path, dataset: str, encoder_name: str, key: dict[str, Any]) -> Path:
    last = Path(encoder_name).name or encoder_name
    short = re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-") or "encoder"
    return cache_root / dataset / f"{key['kind']}-{short}-{_digest([json.dumps(key, sort_keys=True)])[:16]}.safetensors"


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
