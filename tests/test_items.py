"""Rows of the item table: a learned embedding V beside the projection, and whitened features."""

import numpy as np
import pytest
import torch

from config import ModelSettings, TrainingSettings
from dataloader import TrainLoader, train_rows
from datasets.catalog import Sequences
from model import FMRLRec, count_parameters, slice_model
from model import items as items_module
from model.extensions import whitening as whitening_module
from model.extensions.sampled_loss import SAMPLED_LOSSES, NegativeSampler, Sample
from model.extensions.whitening import Whitening, fit_whitening, whiten
from model.loss import LOSSES
from serving.weights import whitened
from tests.made_up import NoUpdate
from trainer.step import Step, build_optimizer

NUM_ITEMS, WIDTHS, SIZES = 23, (5, 3), (2, 4, 8)
CPU = torch.device("cpu")


def make_model(embedding=SIZES[-1], seed=0):
    """Return a model without dropout; V is zero, as before training."""
    torch.manual_seed(seed)
    features = [torch.randn(NUM_ITEMS, width) for width in WIDTHS]
    options = {"item_embedding": embedding, "lru_dropout": 0.0, "lru_attn_dropout": 0.0}
    return FMRLRec(NUM_ITEMS, features, ModelSettings(mrl_hidden_sizes=SIZES, lru_r_max=0.9, **options))


def with_embeddings(embedding=SIZES[-1]):
    """Return a model in float64 with a random V."""
    model = make_model(embedding).double()
    torch.nn.init.uniform_(model.items.V, -1, 1)
    return model


def batch_of(users=20):
    random = np.random.default_rng(0)
    lengths = random.integers(3, 12, size=users)
    sequences = Sequences(random.integers(1, NUM_ITEMS + 1, size=lengths.sum()), np.cumsum([0, *lengths]))
    loader = TrainLoader(train_rows(sequences, 20), users, 0, CPU)
    return next(loader.epoch(1)), loader.label_counts(NUM_ITEMS)


def test_an_embedding_starts_at_zero_and_ends_at_a_size():
    content, model = make_model(embedding=0), make_model()
    assert [make_model(embedding=width).items.V.shape[1] for width in (1, 3, 100)] == [2, 2, 8]
    assert count_parameters(make_model(4)) - count_parameters(content) == (NUM_ITEMS + 1) * 4
    with pytest.raises(ValueError, match="a learned item table takes no item embedding"):
        FMRLRec(NUM_ITEMS, None, ModelSettings(mrl_hidden_sizes=SIZES, item_embedding=SIZES[-1]))
    assert torch.equal(model.item_table(), content.item_table())
    for name, weight in content.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize(("embedding", "rows"), [(2, 7), (8, 2**14)])
def test_an_item_is_its_projection_plus_its_embedding_in_the_first_dimensions(monkeypatch, rows, embedding):
    monkeypatch.setattr(items_module, "ROWS", rows)
    items = with_embeddings(embedding=embedding).items
    whole = torch.cat([torch.zeros(1, sum(WIDTHS)).double(), torch.cat(items.features, dim=1)])
    expected = whole @ items.projection.weight.T + items.projection.bias
    expected[:, :embedding] += items.V
    torch.testing.assert_close(items.everything(), expected)
    some = torch.tensor([0, 5, 5, NUM_ITEMS])
    torch.testing.assert_close(items(some), expected[some])


@pytest.mark.parametrize(("embedding", "size"), [(4, 2), (4, 8), (8, 4)])
def test_a_slice_keeps_the_embeddings_first_dimensions(embedding, size):
    model = with_embeddings(embedding=embedding)
    small = slice_model(model, size)
    assert torch.equal(small.items.V, model.items.V[:, :size])
    torch.testing.assert_close(small.item_table(), model.item_table()[:, :size])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("embedding", [4, 8])
@pytest.mark.parametrize("negatives", [0, 9])
def test_a_step_has_the_loss_and_the_gradient_of_V_of_the_plain_loss(negatives, embedding, loss):
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


@pytest.mark.parametrize(("precision", "embedding", "negatives"), [("fp32", 4, 0), ("bf16", 4, 0), ("bf16", 8, 9)])
def test_steps_train_the_embeddings_in_every_precision(precision, negatives, embedding):
    trained, (batch, counts) = make_model(embedding).train(), batch_of()
    settings = TrainingSettings(lr=1e-2, precision=precision)
    sampler = NegativeSampler(counts, negatives) if negatives else None
    step = Step(trained, build_optimizer(trained, settings), settings, sampler)
    losses = [step(batch).item() for _ in range(12)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert trained.items.V.dtype == torch.float32
    assert trained.items.V.isfinite().all() and trained.items.V.abs().amax(dim=1).min() > 0


# ---------------------------------------------------------------------------------------------------- whitened features


def features_of(items=200, width=12, rank=12, seed=0):
    """Return features [items, width] float64 of very different variances, far from the origin."""
    random = np.random.default_rng(seed)
    directions = np.linalg.qr(random.normal(size=(width, width)))[0][:rank] * np.logspace(0, -2, rank)[:, None]
    return torch.from_numpy(random.normal(size=(items, rank)) @ directions + random.normal(size=width))


def whitened_plain(features: np.ndarray) -> np.ndarray:
    """Return the left singular vectors of the centred features, rotated back, of length 1."""
    left, singular, right = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    varies = singular > 2e-3 * singular[0]
    y = left[:, varies] @ right[varies]
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def made(features):
    return whiten(features, *fit_whitening(features))


@pytest.mark.parametrize(("items", "rank", "rows"), [(200, 12, 7), (200, 5, 2**14), (8, 12, 2**14)])
def test_features_of_any_rank_are_whitened_as_defined(monkeypatch, items, rank, rows):
    monkeypatch.setattr(whitening_module, "ROWS", rows)
    features = features_of(items, rank=rank)
    torch.testing.assert_close(made(features), torch.from_numpy(whitened_plain(features.numpy())), rtol=1e-7, atol=1e-7)
    mean, matrix = fit_whitening(features)
    y = (features - mean) @ matrix
    variances = torch.linalg.eigvalsh(y.T @ y / items)
    torch.testing.assert_close(variances, (variances > 0.5).double())  # 1, or 0 beyond the rank


@pytest.mark.parametrize(("items", "value"), [(9, 0.3), (9, 0.0), (1, 1.0), (0, 1.0)])
def test_features_that_do_not_vary_become_zero(items, value):
    assert torch.equal(made(torch.full((items, 4), value).double()), torch.zeros(items, 4).double())


def test_an_item_without_features_stays_zero_and_does_not_affect_others():
    features = features_of()
    without = torch.cat([features[:5], torch.zeros(3, 12), features[5:]])
    found = made(without)
    assert not found[5:8].any()
    torch.testing.assert_close(found[[*range(5), *range(8, 203)]], made(features))


def test_rounding_to_half_precision_adds_no_direction():
    features = torch.nn.functional.normalize(features_of(500, 200, rank=6), dim=1)
    ranks = [torch.linalg.matrix_rank(fit_whitening(of_type)[1]).item() for of_type in (features.half(), features)]
    assert ranks == [7, 7]  # the six, and one that the length of 1 adds
    cosine = torch.nn.functional.cosine_similarity(made(features.half().double()), made(features))
    assert cosine.min() > 0.995


def whitened_model(features, fit=True):
    torch.manual_seed(0)
    whitening = Whitening(features, fit)
    settings = ModelSettings(mrl_hidden_sizes=SIZES, lru_num_blocks=1)
    return FMRLRec(len(features[0]), whitening.features(), settings, whitening)


def parts(seed=0):
    return [features_of(60, 12, seed=seed).half(), features_of(60, 6, rank=6, seed=seed + 1).float()]


def test_every_encoder_is_whitened_alone_in_its_own_type():
    found = whitened_model(parts()).items.features
    assert [part.dtype for part in found] == [torch.float16, torch.float32]
    for part, raw in zip(found, parts(), strict=True):
        torch.testing.assert_close(part.double(), made(raw.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fit", [True, False])
def test_the_transform_is_saved_and_loaded_with_the_weights(fit):
    saved, other = whitened_model(parts()), whitened_model(parts(), fit)
    state = saved.state_dict()
    assert {name for name in state if "whitening" in name} == {
        f"items.whitening.{part}_{i}" for part in ("mean", "matrix") for i in (0, 1)
    }
    state = {name: 2 * value if name.endswith("mean_0") else value for name, value in state.items()}
    factors = other.items.factors(torch.float32).features
    other.load_state_dict(state)
    expected = whiten(parts()[0].float(), 2 * saved.items.whitening.mean_0, saved.items.whitening.matrix_0)
    assert torch.equal(other.items.features[0], expected.half())
    assert torch.equal(other.items.features[1], saved.items.features[1])
    assert not torch.equal(other.items.factors(torch.float32).features, factors)
    small = slice_model(other, 4)
    assert small.items.whitening is other.items.whitening
    torch.testing.assert_close(small.item_table(), other.item_table()[:, :4])


def test_a_server_without_torch_whitens_new_products_the_same():
    model = whitened_model(parts())
    weights = {
        f"whitening.{i}.{name}": value.numpy()
        for i, transform in enumerate(model.items.whitening.transforms())
        for name, value in zip(("mean", "matrix"), transform, strict=True)
    }
    new = [part[:9].float() for part in parts(seed=7)]
    new[1][4] = 0
    found = whitened(torch.cat(new, dim=1).numpy(), weights)
    transforms = model.items.whitening.transforms()
    expected = torch.cat([whiten(part, *how) for part, how in zip(new, transforms, strict=True)], dim=1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_sparse_features_are_whitened(seed):
    """Ten items of a dozen words among 1,024: in most directions without variance eigh often fails."""
    random = torch.Generator().manual_seed(seed)
    features = torch.zeros(10, 1024)
    for row in features:
        row[torch.randint(0, 1024, (12,), generator=random)] = torch.randn(12, generator=random)
    mean, matrix = fit_whitening(features)
    rows = (features.double() - mean) @ matrix
    torch.testing.assert_close(rows @ rows.T / 10, torch.eye(10).double() - 0.1)  # of rank 9, all as strong
