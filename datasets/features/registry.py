"""All modalities, in the order of their features: a new one is a file beside this one and a name here."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
