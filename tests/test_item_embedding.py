"""A learned embedding V beside the projection of an item's features: table, loss, steps."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model.loss
from config import ModelSettings, TrainingSettings
from dataloader import TrainLoader, train_rows
from datasets.catalog import Sequences
from model import FMRLRec, count_parameters, slice_model
from model import items as items_module
from model.extensions.sampled_loss import NegativeSampler, sampled_matryoshka_cross_entropy_plain
from model.loss import Factors, columns_multiplied_out, matryoshka_cross_entropy, matryoshka_cross_entropy_plain
from tests.made_up import NoUpdate
from trainer.step import Step, build_optimizer

NUM_ITEMS, WIDTHS, SIZES = 23, (5, 3), (2, 4, 8)
CPU = torch.device("cpu")


def make_model(embedding=SIZES[-1], seed=0):
    """A model without dropout, whose V, where it has one, is zero as at the start of a training."""
    torch.manual_seed(seed)
    features = [torch.randn(NUM_ITEMS, width) for width in WIDTHS]
    options = {"item_embedding": embedding, "lru_dropout": 0.0, "lru_attn_dropout": 0.0}
    return FMRLRec(NUM_ITEMS, features, ModelSettings(mrl_hidden_sizes=SIZES, lru_r_max=0.9, **options))


def with_embeddings(embedding=SIZES[-1]):
    """The same, in float64, with a V of random numbers."""
    found = make_model(embedding).double()
    with torch.no_grad():
        found.items.V.uniform_(-1, 1)
    return found


def batch_of(users=20):
    random = np.random.default_rng(0)
    lengths = random.integers(3, 12, size=users)
    sequences = Sequences(random.integers(1, NUM_ITEMS + 1, size=lengths.sum()), np.cumsum([0, *lengths]))
    loader = TrainLoader(train_rows(sequences, 20), users, 0, CPU)
    return next(loader.epoch(1)), loader.label_counts(NUM_ITEMS)


# ------------------------------------------------------------------------------------------------------------ the table


def test_training_starts_from_the_model_of_content_alone():
    content, model_ = make_model(embedding=0), make_model()
    assert torch.equal(model_.item_table(), content.item_table())
    for name, weight in content.state_dict().items():
        assert torch.equal(model_.state_dict()[name], weight)


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


@pytest.mark.parametrize("embedding", SIZES)
def test_every_item_and_the_begin_of_a_sequence_have_as_many_parameters_more_as_it_has_dimensions(embedding):
    more = count_parameters(make_model(embedding)) - count_parameters(make_model(embedding=0))
    assert more == (NUM_ITEMS + 1) * embedding


@pytest.mark.parametrize("embedding", SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_a_slice_keeps_the_embeddings_first_dimensions(embedding, size):
    model_ = with_embeddings(embedding=embedding)
    small = slice_model(model_, size)
    assert torch.equal(small.items.V, model_.items.V[:, :size])
    torch.testing.assert_close(small.item_table(), model_.item_table()[:, :size])


def test_an_embedding_ends_where_a_size_does():
    assert [make_model(embedding=width).items.V.shape[1] for width in (1, 3, 100)] == [2, 2, 8]


def test_a_learned_table_takes_no_embedding():
    with pytest.raises(ValueError, match="a learned item table has nothing that an embedding could be added to"):
        FMRLRec(NUM_ITEMS, None, ModelSettings(mrl_hidden_sizes=SIZES, item_embedding=SIZES[-1]))


# ------------------------------------------------------------------------------------------------------------- the loss

FACTORED = [
    (5, 40, (2, 4, 16), 9),  # few positions: wide increments stay a product
    (60, 12, (2, 5), 30),  # many: all are multiplied out
    (31, 20, (1, 3, 40), 7),
]  # labelled positions T, items N, sizes, feature width F


@pytest.mark.parametrize("embedded", [0, 1, -1])  # V ends at which of the sizes
@pytest.mark.parametrize("held", [9, 1000])
@pytest.mark.parametrize("shape", FACTORED, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_loss_of_a_product_and_embeddings_is_that_of_their_sum(
    monkeypatch, shape, dtype, tolerance, held, embedded
):
    positions, items, sizes, width = shape
    dimensions = sizes[embedded]
    random = torch.Generator().manual_seed(0)
    z, features, weight, V = (
        torch.randn(*of, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
        for of in ((positions, sizes[-1]), (items + 1, width), (sizes[-1], width), (items + 1, dimensions))
    )
    labels = torch.randint(0, items + 1, (positions,), generator=random)
    monkeypatch.setattr(model.loss, "LEAST", 1)
    monkeypatch.setattr(model.loss, "CHUNK_BYTES", held * (items + 1) * len(sizes) * z.itemsize)
    fast = matryoshka_cross_entropy(z, Factors(features.detach(), weight, V), labels, sizes)
    table = F.linear(features, weight) + F.pad(V, (0, sizes[-1] - dimensions))
    plain = matryoshka_cross_entropy_plain(z, table, labels, sizes)
    fast, plain = ([value, *torch.autograd.grad(value, (z, weight, V))] for value in (fast, plain))
    for f, p in zip(fast, plain, strict=True):
        assert (f - p).abs().max() <= tolerance * p.abs().max()


def test_in_bfloat16_it_errs_no_more_than_twice_its_plain_twin():
    random = torch.Generator().manual_seed(0)
    z, features, weight, V = (
        torch.randn(*of, generator=random, dtype=torch.float64).requires_grad_()
        for of in ((31, 40), (21, 7), (40, 7), (21, 40))
    )
    labels, sizes = torch.randint(1, 21, (31,), generator=random), (1, 3, 40)
    exact = matryoshka_cross_entropy_plain(z, F.linear(features, weight) + V, labels, sizes)
    exact = torch.autograd.grad(exact, (z, weight, V))
    z, weight, V = (x.detach().float().requires_grad_() for x in (z, weight, V))
    features = features.detach().bfloat16()
    fast = matryoshka_cross_entropy(z, Factors(features, weight, V), labels, sizes)
    plain = matryoshka_cross_entropy_plain(z, F.linear(features, weight.bfloat16()) + V.bfloat16(), labels, sizes)
    fast, plain = (torch.autograd.grad(value, (z, weight, V)) for value in (fast, plain))
    for f, p, e in zip(fast, plain, exact, strict=True):
        assert f.dtype == torch.float32
        assert (f - e).abs().mean() <= 2 * (p - e).abs().mean()


def multiplications(positions, width, sizes, out, embedded):
    """For an item with a V in the first `embedded` dimensions, where the first `out` columns of its projection are
    multiplied out."""
    total = 0
    for low, high in pairwise((0, *sizes)):
        if high <= max(out, embedded):
            total += 3 * positions * (high - low)  # logits, and the gradients of both their sides
        total += 2 * width * (high - low) if high <= out else 2 * width * positions
    return total


def test_what_is_multiplied_out_is_the_cheapest_by_counting_every_product():
    random = torch.Generator().manual_seed(0)
    for _ in range(300):
        positions, width, *parts = torch.randint(1, 200, (6,), generator=random).tolist()
        sizes = tuple(accumulate(parts))
        for embedded in (0, *sizes):
            costs = {out: multiplications(positions, width, sizes, out, embedded) for out in (0, *sizes)}
            assert costs[columns_multiplied_out(positions, width, sizes, embedded)] == min(costs.values())


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("embedding", [4, 8])
@pytest.mark.parametrize("negatives", [0, 9])
def test_a_step_reads_and_predicts_items_with_their_embeddings(negatives, embedding):
    trained, (batch, counts) = with_embeddings(embedding).train(), batch_of()
    sampler = NegativeSampler(counts, negatives) if negatives else None
    torch.manual_seed(3)
    loss = Step(trained, NoUpdate(), TrainingSettings(max_grad_norm=0), sampler)(batch)
    by_V = trained.items.V.grad

    torch.manual_seed(3)
    table = trained.item_table()
    z = trained.encode(table[batch.tokens], batch.position, batch.longest)
    if negatives:
        drawn, log_kq = sampler.draw()
        expected = sampled_matryoshka_cross_entropy_plain(
            z, table[batch.labels], table[drawn], batch.labels, drawn, log_kq, SIZES
        )
    else:
        expected = matryoshka_cross_entropy_plain(z, table, batch.labels, SIZES)
    torch.testing.assert_close(loss, expected.detach())
    (expected,) = torch.autograd.grad(expected, trained.items.V)
    torch.testing.assert_close(by_V, expected)
    assert by_V.any(dim=1).all()


@pytest.mark.parametrize("embedding", [4, 8])
@pytest.mark.parametrize("negatives", [0, 9])
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
