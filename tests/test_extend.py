"""The examples of model/README.md run, and do what they say."""

import re
from pathlib import Path

import pytest
import torch

import trainer.metrics
from config import ModelSettings, TrainingSettings
from dataloader import Batch
from model.loss import LOSSES
from model.registry import MODELS
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
    assert BLOCKS.keys() >= {"A model", "A loss", "A metric"}
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
    assert losses[-1] < 0.8 < losses[0]


@pytest.mark.skipif(not hasattr(trainer.metrics, "METRICS"), reason="trainer.metrics has no table of metrics yet")
def test_the_metric_is_one_number_per_user(monkeypatch):
    hit = run("A metric", trainer.metrics.METRICS, "Hit", monkeypatch)
    assert hit(torch.tensor([1.0, 10.0, 10.5]), 10).tolist() == [1, 1, 0]
