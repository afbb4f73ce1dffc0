"""Frozen encoders: a text or a picture in, one L2-normalised feature vector out.

Text:     lexical, or any Hugging Face text encoder by name or local folder
Pictures: pixel, or any open_clip model as MODEL/PRETRAINED or MODEL/path-to-weights

Every encoder has a `fingerprint` (what its features depend on, for the cache), a width `dim`, and
`encode(batch) -> float32 array [len(batch), dim]`. F: feature width, B: batch.

`encode` is `forward(prepare(tokenize(batch)))`. Worker processes may do `prepare`, which holds no weights and can be
pickled; it reads its batch one by one, so that of many pictures only one is there decoded.
"""

from typing import Any

from datasets.features.encoders.base import DTYPES, Encoder, best_precision, normalised
from datasets.features.encoders.built_in import LexicalEncoder, PixelEncoder
from datasets.features.encoders.picture import OpenClipEncoder, open_clip_fingerprint
from datasets.features.encoders.text import TransformersEncoder, hub_commit, transformers_fingerprint

__all__ = [
    "BUILT_IN", "DTYPES", "Encoder", "LexicalEncoder", "OpenClipEncoder", "PixelEncoder", "TransformersEncoder",
    "best_precision", "hub_commit", "image_encoder", "image_fingerprint", "language_encoder", "language_fingerprint",
    "normalised",
]  # fmt: skip

BUILT_IN = ("lexical", "pixel")  # without weights, so of no precision


def language_encoder(name: str, device: Any, precision: str = "fp32") -> Encoder:
    """The text encoder of this name, computing in fp32, bf16 or fp16. Raises InputError where it cannot be had."""
    return LexicalEncoder() if name == "lexical" else TransformersEncoder(name, device, precision)


def image_encoder(name: str, device: Any, precision: str = "fp32") -> Encoder:
    """The picture encoder of this name, computing in fp32, bf16 or fp16. Raises InputError where it cannot be had."""
    return PixelEncoder() if name == "pixel" else OpenClipEncoder(name, device, precision)


def language_fingerprint(name: str) -> dict[str, Any]:
    """What text features depend on beside the texts; known without loading the encoder."""
    return LexicalEncoder.fingerprint if name == "lexical" else transformers_fingerprint(name)


def image_fingerprint(name: str) -> dict[str, Any]:
    """What picture features depend on beside the pictures; known without loading the encoder."""
    return PixelEncoder.fingerprint if name == "pixel" else open_clip_fingerprint(name)
