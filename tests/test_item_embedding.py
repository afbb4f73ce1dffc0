"""A learned embedding V beside the projection of an item's features: in the table, in a slice, in a step."""

import numpy as np
import pytest
import torch

from config import ModelSettings, TrainingSettings
from dataloader import TrainLoader, train_rows
from datasets.catalog import Sequences
from model import FMRLRec, count_parameters, slice_model
from model import items as items_module
from model.extensions.sampled_loss import SAMPLED_LOSSES, NegativeSampler, Sample
from model.loss import LOSSES
from tests.made_up import NoUpdate
from trainer.step import Step, build_optimizer

NUM_ITEMS, WIDTHS, SIZES = 23, (5, 3), (2, 4, 8)
CPU = torch.device("cpu")


def make_model(embedding=SIZES[-1], seed=0):
    """A model without dropout; V is zero, as before training."""
    torch.manual_seed(seed)
    features = [torch.randn(NUM_ITEMS, width) for width in WIDTHS]
    options = {"item_embedding": embedding, "lru_dropout": 0.0, "lru_attn_dropout": 0.0}
    return FMRLRec(NUM_ITEMS, features, ModelSettings(mrl_hidden_sizes=SIZES, lru_r_max=0.9, **options))


def with_embeddings(embedding=SIZES[-1]):
    """A model in float64 with a random V."""
    model = make_model(embedding).double()
    torch.nn.init.uniform_(model.items.V, -1, 1)
    return model


def batch_of(users=20):
    random = np.random.default_rng(0)
    lengths = random.integers(3, 12, size=users)
    sequences = Sequences(random.integers(1, NUM_ITEMS + 1, size=lengths.sum()), np.cumsum([0, *lengths]))
    loader = TrainLoader(train_rows(sequences, 20), users, 0, CPU)
    return next(loader.epoch(1)), loader.label_counts(NUM_ITEMS)


# ------------------------------------------------------------------------------------------------------------ the table


def test_training_starts_from_the_model_of_content_alone():
    content, model = make_model(embedding=0), make_model()
    assert torch.equal(model.item_table(), content.item_table())
    for name, weight in content.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize("embedding", SIZES)
@pytest.mark.parametrize("rows", [7, 2**14])
def test_an_item_is_its_projection_and_in_the_first_dimensions_its_embedding(monkeypatch, rows, embedding):
    monkeypatch.setattr(items_module, "ROWS", rows)
    items = with_embeddings(embedding=embedding).items
    whole = torch.cat([torch.zeros(1, sum(WIDTHS)).double(), torch.cat(items.features, dim=1)])
    expected = whole @ items.projection.weight.T + items.projection.bias
    expected[:, :embedding] += items.V
    torch.testing.assert_close(items.everything(), expected)
    some = torch.tensor([0, 5, 5, NUM_ITEMS])
    torch.testing.assert_close(items(some), expected[some])


def test_every_token_has_as_many_more_parameters_as_V_has_dimensions():
    assert count_parameters(make_model(4)) - count_parameters(make_model(embedding=0)) == (NUM_ITEMS + 1) * 4


@pytest.mark.parametrize("embedding", [4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_a_slice_keeps_the_embeddings_first_dimensions(embedding, size):
    model = with_embeddings(embedding=embedding)
    small = slice_model(model, size)
    assert torch.equal(small.items.V, model.items.V[:, :size])
    torch.testing.assert_close(small.item_table(), model.item_table()[:, :size])


def test_an_embedding_ends_where_a_size_does():
    assert [make_model(embedding=width).items.V.shape[1] for width in (1, 3, 100)] == [2, 2, 8]


def test_a_learned_table_takes_no_embedding():
    with pytest.raises(ValueError, match="a learned item table takes no item embedding"):
        FMRLRec(NUM_ITEMS, None, ModelSettings(mrl_hidden_sizes=SIZES, item_embedding=SIZES[-1]))


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("embedding", [4, 8])
@pytest.mark.parametrize("negatives", [0, 9])
def test_a_step_reads_and_predicts_items_with_their_embeddings(negatives, embedding, loss):
    trained, (batch, counts) = with_embeddings(embedding).train(), batch_of()
    sampler = NegativeSampler(counts, negatives) if negatives else None
    torch.manual_seed(3)
    settings = TrainingSettings(loss=loss, max_grad_norm=0)
    found = Step(trained, NoUpdate(), settings, sampler)(batch)
    by_V = trained.items.V.grad

    torch.manual_seed(3)
    table = trained.item_table()
    z = trained.encode(table[batch.tokens], batch.position, batch.longest)
    if negatives:
        drawn, log_kq = sampler.draw()
        table = Sample(table[batch.labels], table[drawn], drawn, log_kq)
    expected = (SAMPLED_LOSSES if negatives else LOSSES)["plain"](z, table, batch.labels, SIZES)
    torch.testing.assert_close(found, expected.detach())
    (expected,) = torch.autograd.grad(expected, trained.items.V)
    torch.testing.assert_close(by_V, expected)
    assert by_V.any(dim=1).all()


@pytest.mark.parametrize(("embedding", "negatives"), [(4, 0), (8, 9)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_train_the_embeddings_in_every_precision(precision, negatives, embedding):
    trained, (batch, counts) = make_model(embedding).train(), batch_of()
    settings = TrainingSettings(lr=1e-2, precision=precision)
    sampler = NegativeSampler(counts, negatives) if negatives else None
    step = Step(trained, build_optimizer(trained, settings), settings, sampler)
    losses = [step(batch).item() for _ in range(12)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert trained.items.V.dtype == torch.float32
    assert trained.items.V.isfinite().all() and trained.items.V.abs().amax(dim=1).min() > 0
