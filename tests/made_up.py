"""Make models of random weights and catalogues without files for tests."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from common.files import sha256, write_json
from config import Config, ModelSettings
from datasets.catalog import Catalog, Sequences, load_catalog
from model import FMRLRec
from model.extensions.history import TIMES
from serving import Recommender
from serving.export import export_size
from tests.prepared import item_features, write_prepared
from trainer.runs import WEIGHTS, read_log
from trainer.training_run import RunLog, TrainingRun

NEAR_1 = (0.9, 0.999)  # a ring of eigenvalues that forget slowly: every step of a history counts


def with_random_weights(model: FMRLRec, largest: float = 0.4) -> FMRLRec:
    """Draw every weight of a model anew, masked ones too, but its eigenvalues, and return it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("nu_log", "theta_log")):
                parameter.uniform_(-largest, largest)
    return model


def random_model(
    sizes: tuple[int, ...],
    num_blocks: int = 2,
    *,
    num_items: int = 30,
    features: np.ndarray | Sequence[np.ndarray] | None = None,
    ring: tuple[float, float] = (0.3, 0.9),
    seed: int = 0,
    history_bias: Sequence[float] = (),
    **settings,
) -> FMRLRec:
    """Return a model of random weights with eigenvalues on the ring. history_bias: of each size; empty: none."""
    torch.manual_seed(seed)
    parts = [features] if isinstance(features, np.ndarray | torch.Tensor) else features
    model = FMRLRec(
        num_items,
        parts and [torch.as_tensor(part) for part in parts],
        ModelSettings(
            mrl_hidden_sizes=sizes,
            lru_num_blocks=num_blocks,
            lru_r_min=ring[0],
            lru_r_max=ring[1],
            history_bias=bool(history_bias),
            **settings,
        ),
    )
    model = with_random_weights(model).eval()
    if model.history_bias is not None:
        model.history_bias.data = torch.tensor(history_bias) / TIMES
    return model


def as_sequences(histories: Sequence[Sequence[int]]) -> Sequences:
    """Return the histories, one per user, as Sequences."""
    return Sequences(np.concatenate(histories).astype(np.int64), np.cumsum([0, *map(len, histories)]))


def made_up_catalog(num_items: int) -> Catalog:
    """Return a catalogue of items A1, A2, ... with the titles Item 1, Item 2, ..."""
    ids, records = [f"A{i}" for i in range(1, num_items + 1)], [{"title": f"Item {i}"} for i in range(1, num_items + 1)]
    return Catalog("made-up", as_sequences([[1]]), ids, records, None, Path("photos"), [])


def made_up_run(folder: Path, config: Config) -> TrainingRun:
    """Return a run in a folder, with the log in that folder."""
    folder.mkdir(exist_ok=True)
    run = TrainingRun(config, {})
    run.folder, run.log = folder, RunLog(folder, read_log(folder))
    return run


def write_plane(run: Path, sizes: Sequence[int], num_items: int) -> None:
    """Write a cut.json of made-up metrics of all encoder sizes and table widths, as experiments.cut does."""
    plane = [
        {"size": m, "width": w, "table_bytes": 4 * (num_items + 1) * w, "encoder_ms": m / 100}
        | {protocol: {"NDCG@10": m * w / 10_000, "Recall@10": m * w / 5_000} for protocol in ("kept", "masked")}
        for m in sizes
        for w in sizes
        if w <= m
    ]
    write_json(run / "cut.json", {"kept": {}, "masked": {}, "weights": sha256(run / WEIGHTS), "plane": plane})


class NoUpdate:
    """An optimizer that leaves weights and gradients as they are."""

    def step(self) -> None: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...


# ------------------------------------------------------------------------------------------------------------- exported
# Small exports for tests, a shop that is exported, and comparisons of answers.

ENGINES, KINDS = ("torch", "onnx"), ("none", "float16", "int8")
ATTRIBUTES = ("title", "price", "brand", "categories")
N, MAX_LEN = 20, 5
HALF = np.finfo(np.float16).eps  # features of the training are rounded to float16, those of new products are not
# Ids neither in order nor of one length.
IDS = [f"{'QBXA'[i % 4]}{(i * 7) % N}{'-long' * (i % 3)}" for i in range(N)]

# Two engines, or two ways to the same state, sum in another order; with int8 that can move an activation by one of its
# 127 steps.
SAME = {"none": 1e-5, "float16": 1e-5, "int8": 5e-3}


def write_export(
    folder: Path,
    model: FMRLRec,
    catalog: Catalog | None = None,
    *,
    size: int | None = None,
    max_len: int = 7,
    quantize: str = "none",
    format: str = "onnx",
    index: str | None = None,
    overwrite: bool = False,
    cut: dict | None = None,
    **settings,
) -> Path:
    """Export a model at a size, its largest by default.

    cut: table_width and users of `export_size`. settings: of the run, where they matter.
    """
    by_text = {"use_language_encoder": hasattr(model.items, "projection"), "use_img_encoder": False}
    config = Config(
        **{"language_encoder": "lexical", "img_encoder": "pixel", **by_text, **settings},
        dataset_code="made-up",
        mrl_hidden_sizes=model.sizes,
        lru_max_len=max_len,
        lru_num_blocks=len(model.blocks),
    )
    export_size(
        model,
        size or model.sizes[-1],
        folder,
        config=config,
        catalog=catalog or made_up_catalog(model.num_items),
        run=folder.parent / "no-such-run",
        format=format,
        quantize=quantize,
        index=index,
        overwrite=overwrite,
        **(cut or {}),
    )
    return folder


class Shop:
    """A dataset of 20 products with texts and pictures, a model that reads them, and its exports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        catalog = load_catalog(write_prepared(root, users=5, items=N, pictures=True).parent, "tiny")
        self.catalog = dataclasses.replace(catalog, asins=IDS)
        self.features = item_features(
            self.catalog, language="lexical", image="pixel", attributes=ATTRIBUTES, cache_root=root
        )
        self.model = random_model((4, 12), num_items=N, features=np.split(self.features, [1024], axis=1), ring=NEAR_1)
        self.records = [
            record | {"picture": str(picture)}
            for record, picture in zip(self.catalog.metadata, self.catalog.pictures, strict=True)
        ]

    def export(self, kind: str = "none", format: str = "onnx") -> Path:
        folder = self.root / f"{kind}-{format}"
        if not folder.exists():
            write_export(
                folder,
                self.model,
                self.catalog,
                max_len=MAX_LEN,
                quantize=kind,
                format=format,
                use_img_encoder=True,
                item_attributes=ATTRIBUTES,
            )
        return folder

    def open(self, engine: str, kind: str = "none") -> Recommender:
        return Recommender.from_pretrained(self.export(kind), engine, threads=1)

    def first(self, engine: str, kind: str, n: int) -> Recommender:
        """Open the same model with a catalogue of the first n products."""
        folder = self.root / f"{kind}-first-{n}"
        if not folder.exists():
            model = random_model(
                (4, 12), num_items=n, features=np.split(self.features[:n], [1024], axis=1), ring=NEAR_1
            )
            model.load_state_dict(self.model.state_dict())
            catalog = dataclasses.replace(self.catalog, asins=IDS[:n], metadata=self.catalog.metadata[:n])
            write_export(folder, model, catalog, max_len=MAX_LEN, quantize=kind, use_img_encoder=True)
        return Recommender.from_pretrained(folder, engine, threads=1)

    def scores(self, history: list[int]) -> np.ndarray:
        """Return the model's own scores [N+1] after a history."""
        tokens = torch.tensor(history or [0])
        with torch.no_grad():
            table = self.model.item_table()
            return (table @ self.model.encode(table[tokens], torch.arange(len(tokens)), len(tokens))[-1]).numpy()


def assert_same_answer(actual, expected, tolerance=1e-5):
    """Compare scores up to `tolerance` times the largest, and items unless their scores are as close."""
    unit = tolerance * np.abs(expected.scores).max()
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=0, atol=unit)
    of_item = dict(zip(expected.numbers, expected.scores, strict=True))
    for item, score in zip(actual.numbers[:-1], actual.scores, strict=False):  # the last may be a tie with the next
        assert score == pytest.approx(of_item[item], abs=2 * unit)


def everything(r: Recommender, history, **options):
    """Return the ranking of all items after a history."""
    [answer] = r.recommend([history], **{"top_k": len(r), "exclude_history": False} | options)
    return answer
