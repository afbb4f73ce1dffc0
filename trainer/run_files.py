"""Schemas of the JSON files in a run's folder."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from common.schema import Count, Number, Positive

Size = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,8}$")]
Metrics = dict[str, Number]
MetricsBySize = dict[Size, Metrics]  # test_mrl_metrics.json


class SavedSettings(Struct):
    """config.json; common/settings.py checks the settings themselves."""

    settings: dict[str, Any]
    sources: dict[str, str] = {}


class Environment(Struct):
    """env.json, and each resume in it."""

    started: str = ""
    command: list[str] = []
    commit: str | None = None
    uncommitted_changes: bool = False
    device: str = ""
    versions: dict[str, str | None] = {}
    data: str | None = None
    split: str | None = None
    features: list[str] = []
    resumed: list["Environment"] = []


class Epoch(Struct):
    """A line of log.jsonl."""

    epoch: Count
    best_epoch: Count
    seconds: Number
    train_seconds: Number
    val: MetricsBySize = {}


class DeployedSize(Struct, rename={"ndcg": "NDCG@10"}):
    """A row of deploy.json."""

    engine: str
    quantize: str
    size: Positive
    bytes: Count
    p50_ms: Number
    ndcg: Number


class Deployment(Struct):
    """deploy.json, as far as serving.export reads it."""

    weights: str
    rows: list[DeployedSize]


class TopTen(Struct, rename={"ndcg": "NDCG@10", "recall": "Recall@10"}):
    """Test metrics of a cell."""

    ndcg: Number
    recall: Number


class Cell(Struct):
    """An encoder size with an item table of some width, in cut.json."""

    size: Positive
    width: Positive
    table_bytes: Count
    encoder_ms: Number
    kept: TopTen
    masked: TopTen


class Cut(Struct):
    """cut.json. Files of earlier code have no weights and no plane."""

    kept: dict[str, MetricsBySize]  # cut, nested -> width
    masked: dict[str, MetricsBySize]
    weights: str = ""
    plane: list[Cell] = []
