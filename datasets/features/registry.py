"""All modalities in the order of their features, their description in an export, and features of new products.

A new modality is a file beside this one and a name in REGISTRY. F feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import InputError
from datasets.features.arrays import FileModality
from datasets.features.image import ImageModality
from datasets.features.modality import Modality
from datasets.features.text import TextModality

if TYPE_CHECKING:
    from config import FeatureSettings

REGISTRY: tuple[type[Modality], ...] = (TextModality, ImageModality, FileModality)


def modalities(settings: FeatureSettings) -> list[Modality]:
    """Return the modalities that the settings ask for."""
    return [modality for kind in REGISTRY for modality in kind.from_settings(settings)]


# ---------------------------------------------------------------------------------------------------------- description
# How a model's features were made, for an export; and features of new products, made alike. F feature width.


def describe_features(settings: FeatureSettings, widths: Sequence[int]) -> dict[str, Any]:
    """Return how a model's features were made, for JSON. widths: of each part; empty for a model without features."""
    description: dict[str, Any] = {"dim": sum(widths), "normalisation": "each part of an item's vector has length 1"}
    description |= {kind.block: [] if kind.several else None for kind in REGISTRY}
    for modality, width in zip(modalities(settings) if widths else (), widths, strict=True):
        entry = modality.describe(width)
        if modality.several:
            description[modality.block].append(entry)
        else:
            description[modality.block] = entry
    return description


def described_modalities(description: Mapping[str, Any], encoders: Mapping[str, str | None]) -> list[Modality]:
    """Return the modalities of `describe_features`, in order.

    encoders: where encoders are now, by the setting that names them; None or missing: as described.
    """
    found: list[Modality] = []
    for kind in REGISTRY:
        block = description.get(kind.block)
        entries = block if kind.several else [block]
        found += [kind.from_description(entry, encoders.get(kind.flag)) for entry in entries or () if entry]
    return found


def embed_records(
    records: list[dict[str, Any]], description: Mapping[str, Any], modalities: Sequence[Modality]
) -> np.ndarray:
    """Return features [n, F] float32 of new products, made as `describe_features` says.

    A record has the attributes of the text, the path of a picture under `picture`, and the vector of each features
    file under its name. modalities: from `described_modalities`; each loads its encoder once. Raises InputError
    if an encoder is not the one of the training or a record lacks what it needs.
    """
    if not description["dim"] or not modalities:
        raise InputError("this model read no features, so there is nothing to embed")
    if not records:
        return np.zeros((0, description["dim"]), dtype=np.float32)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise InputError(f"record {number} is {record!r:.80}; give a dict with title, brand, ...")
        lacking = next((modality.required for modality in modalities if modality.required), "")
        if lacking and not any(modality.has_input(record) for modality in modalities):
            raise InputError(f"record {number} has {lacking}")
    return np.concatenate([modality.embed(records) for modality in modalities], axis=1)
