"""The examples of model/README.md run, and do what they say."""

import re
from pathlib import Path

import numpy as np
import torch

import trainer.metrics
from config import FeatureSettings, ModelSettings, TrainingSettings
from dataloader import Batch
from datasets.catalog import load_catalog
from datasets.features import description, registry
from datasets.features.modality import Modality
from model.loss import LOSSES
from model.registry import MODELS
from tests.prepared import feature_parts, write_prepared
from trainer.step import Step

PAGE = (Path(__file__).parents[1] / "model/README.md").read_text(encoding="utf-8").partition("## Extend it")[2]
BLOCKS = dict(re.findall(r"^### (.*?)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
POSITION = torch.tensor([0, 1, 2, 0, 1])


def run(heading, registry, name, monkeypatch):
    """Run an example; return what it adds to the registry, which is restored afterwards."""
    monkeypatch.setitem(registry, name, None)
    exec(BLOCKS[heading], {})
    return registry[name]


def step_losses(model, **options):
    tokens, labels = torch.tensor([1, 2, 3, 2, 3]), torch.tensor([2, 3, 0, 3, 4])
    batch = Batch(tokens, labels, POSITION, 3, (0, 5), torch.tensor(4))
    step = Step(model, torch.optim.Adam(model.parameters(), lr=0.05), TrainingSettings(**options))
    return [step(batch).item() for _ in range(40)]


def test_the_examples_are_short():
    assert BLOCKS.keys() == {"A model", "A loss", "A metric", "A modality"}
    for block in BLOCKS.values():
        assert len([line for line in block.splitlines() if line.strip()]) < 20


def test_the_model_is_trained_like_any_other(monkeypatch):
    torch.manual_seed(0)
    model = run("A model", MODELS, "last_item", monkeypatch)(5, [], ModelSettings(mrl_hidden_sizes=(8,)))
    losses = step_losses(model)
    assert losses[-1] < 0.5 < losses[0]
    z, at = model.encode(model.item_table()[[1, 2, 3, 2, 3]], POSITION, 3), torch.tensor([2, 4])
    assert torch.equal(model.encode(model.item_table()[[1, 2, 3, 2, 3]], POSITION, 3, at), z[at])


def test_the_loss_trains_a_nested_model(monkeypatch):
    torch.manual_seed(0)
    run("A loss", LOSSES, "smoothed", monkeypatch)
    settings = ModelSettings(mrl_hidden_sizes=(4, 8), lru_dropout=0.0, lru_attn_dropout=0.0)
    losses = step_losses(MODELS["fmrlrec"](5, [torch.randn(5, 6)], settings), loss="smoothed")
    assert losses[-1] < 1.6 < losses[0]  # the sum of two sizes


def test_the_metric_is_one_number_per_user(monkeypatch):
    hit = run("A metric", trainer.metrics.METRICS, "Hit", monkeypatch)
    assert hit(torch.tensor([1.0, 10.0, 10.5]), 10).tolist() == [1, 1, 0]


def test_the_modality_is_cached_and_made_alike_for_new_products(tmp_path, monkeypatch):
    write_prepared(tmp_path, "tiny")
    catalog = load_catalog(tmp_path, "tiny")
    definitions: dict = {}
    exec(BLOCKS["A modality"], definitions)
    listed: tuple[type[Modality], ...] = (*registry.REGISTRY, definitions["Brand"])
    for module in (registry, description):
        monkeypatch.setattr(module, "REGISTRY", listed)

    text, brands = feature_parts(catalog, language="lexical", cache_root=tmp_path / "features")
    assert len(list(tmp_path.glob("features/tiny/brand-lexical-*.npy"))) == 1
    assert len(np.unique(brands, axis=0)) == len({record.get("brand") for record in catalog.metadata})

    settings = FeatureSettings(language_encoder="lexical", use_img_encoder=False)
    described = description.describe_features(settings, [text.shape[1], brands.shape[1]])
    made = description.embed_records(catalog.metadata, described, description.described_modalities(described, {}))
    np.testing.assert_allclose(made, np.concatenate([text, brands], axis=1), atol=1e-3)
