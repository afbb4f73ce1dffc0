"""Schema of an export's config.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from common.schema import Count, Number, Positive

MAX_SIZE = 1 << 16

Width = Annotated[int, Meta(ge=1, le=1 << 20)]  # of features
Size = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,8}$")]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class StoredFile(Struct):
    """The size and checksum of a file."""

    bytes: Count
    sha256: Sha256


class Dataset(Struct):
    """The dataset of the training."""

    code: str
    digest: str


class ImageEncoder(Struct):
    """The encoder of the pictures."""

    encoder: str
    fingerprint: dict[str, Any]


class TextEncoder(ImageEncoder):
    """The encoder of the texts, and the metadata that they are made of."""

    commit: str | None
    attributes: Annotated[list[str], Meta(min_length=1)]


class FeatureFile(Struct):
    """Features that were read from a file."""

    name: str
    sha256: str
    dim: Width


class Features(Struct):
    """How the items' features were made, by datasets/features/description.py."""

    dim: Annotated[int, Meta(ge=0, le=1 << 20)]
    language: TextEncoder | None
    image: ImageEncoder | None
    files: list[FeatureFile] = []
    whitened: list[Width] = []


class PlaneRow(Struct, rename={"ndcg": "NDCG@10"}):
    """An encoder size of the run, with the metric of every table width; experiments/cut.py measures them."""

    encoder_ms: Number
    ndcg: dict[Size, Number]


class ExportConfig(Struct):
    """config.json, whose format and version are right."""

    size: Annotated[int, Meta(ge=1, le=MAX_SIZE)]
    sizes: Annotated[list[Annotated[int, Meta(ge=1, le=MAX_SIZE)]], Meta(min_length=1, max_length=1000)]
    num_blocks: Annotated[int, Meta(ge=1, le=1000)]
    max_len: Annotated[int, Meta(ge=1, le=1 << 20)]
    num_items: Positive
    dataset: Dataset
    features: Features
    quantize: Literal["none", "float16", "int8"]
    files: dict[str, StoredFile]
    post_norm: bool = False
    history_bias: Number = 0.0  # added to the scores of history items; 0: none
    table_width: Annotated[int, Meta(ge=1, le=MAX_SIZE)] | None = None  # of the table that is ranked; None: size
    num_removed: Count = 0
    run: str = ""
    commit: str | None = None
    metrics: dict[str, Number] | None = None
    plane: dict[Size, PlaneRow] = {}
