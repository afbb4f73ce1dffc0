"""Texts and pictures to features, by batches: of a whole catalogue (datasets/features.py), and of new products.

F: feature width, n: texts, pictures or products.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import InputError
from datasets import encoders
from datasets.encoders import Encoder
from datasets.text import NO_TEXT, item_text

MAX_PIXELS = 50_000_000  # a picture that claims more is not decoded
NO_PICTURE = "no picture listed"


def encode_texts(encoder: Encoder, texts: list[str], batch_size: int) -> np.ndarray:
    """[n, F]; texts of like length are encoded together."""
    longest_first = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    batches = ((rows, [texts[row] for row in rows]) for rows in _chunks(longest_first, batch_size))
    return _encode(encoder, batches, len(texts), "encoding texts")


def encode_pictures(
    encoder: Encoder, pictures: list[Path | None], names: list[str], batch_size: int, broken: dict[str, str]
) -> np.ndarray:
    """[n, F]; a zero vector where a picture is absent or not readable, with the reason in `broken` under its name."""

    def batches():
        for rows in _chunks(range(len(pictures)), batch_size):
            opened = [(row, _open_picture(pictures[row], names[row], broken)) for row in rows]
            readable = [(row, picture) for row, picture in opened if picture is not None]
            yield [row for row, _ in readable], [picture for _, picture in readable]

    return _encode(encoder, batches(), len(pictures), "encoding pictures")


def _open_picture(path: Path | None, name: str, broken: dict[str, str]) -> Any | None:
    """The decoded picture, or None with the reason noted in `broken`."""
    from PIL import Image

    if path is None:
        broken[name] = NO_PICTURE
        return None
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
            return picture.convert("RGB")
    except Exception as error:  # whatever a format's decoder raises
        broken[name] = f"{path.name}: {error}"
        return None


def _encode(encoder: Encoder, batches: Iterable[tuple[list[int], list[Any]]], count: int, what: str) -> np.ndarray:
    features = np.zeros((count, encoder.dim), dtype=np.float32)
    with tqdm(total=count, desc=what, unit="item", disable=None) as bar:
        for rows, batch in batches:
            if rows:
                features[rows] = encoder.encode(batch)
            bar.update(len(rows))
    if not np.isfinite(features).all():
        raise InputError(
            f"the encoder {encoder.fingerprint} gave features that are not finite; its weights are damaged"
        )
    return features


def _chunks(rows: Any, size: int) -> Iterable[list[int]]:
    rows = list(rows)
    return (rows[start : start + size] for start in range(0, len(rows), size))


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
        parts.append(encode_texts(encoders.language_encoder(name, "cpu"), texts, batch_size=32))
    if recipe["image"]:
        name, broken = image or recipe["image"]["encoder"], {}
        _check_encoder("img_encoder", name, encoders.image_fingerprint(name), recipe["image"])
        names = [f"record {number}" for number in range(1, len(records) + 1)]
        parts.append(encode_pictures(encoders.image_encoder(name, "cpu"), pictures, names, 32, broken))
        for record, why in broken.items():
            if why != NO_PICTURE:  # which is a zero vector, as in training
                raise InputError(f"the picture of {record} cannot be read ({why}); give another, or none")
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
