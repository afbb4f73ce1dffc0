"""Whitened features: against their definition by a singular value decomposition, in a model, saved and loaded."""

import numpy as np
import pytest
import torch

from config import ModelSettings
from model import FMRLRec, slice_model
from model.extensions import whitening as whitening_module
from model.extensions.whitening import Whitening, fit_whitening, whiten
from serving.weights import whitened

SIZES = (2, 4, 8)


def features_of(items=200, width=12, rank=12, seed=0):
    """Features of directions of very different variance, far from the origin: [items, width] float64."""
    random = np.random.default_rng(seed)
    directions = np.linalg.qr(random.normal(size=(width, width)))[0][:rank] * np.logspace(0, -2, rank)[:, None]
    return torch.from_numpy(random.normal(size=(items, rank)) @ directions + random.normal(size=width))


def whitened_plain(features: np.ndarray) -> np.ndarray:
    """By definition: the left singular vectors of the centred features, rotated back, of length 1."""
    left, singular, right = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    varies = singular > 2e-3 * singular[0]
    y = left[:, varies] @ right[varies]
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def made(features):
    return whiten(features, *fit_whitening(features))


@pytest.mark.parametrize("rows", [7, 2**14])
@pytest.mark.parametrize(("items", "rank"), [(200, 12), (200, 5), (8, 12)])
def test_features_are_whitened_as_defined_whatever_their_rank(monkeypatch, items, rank, rows):
    monkeypatch.setattr(whitening_module, "ROWS", rows)
    features = features_of(items, rank=rank)
    torch.testing.assert_close(made(features), torch.from_numpy(whitened_plain(features.numpy())), rtol=1e-7, atol=1e-7)


def test_every_direction_has_the_same_variance_before_rows_are_of_length_1():
    features = features_of()
    mean, matrix = fit_whitening(features)
    y = (features - mean) @ matrix
    torch.testing.assert_close(y.T @ y / len(y), torch.eye(12).double())
    torch.testing.assert_close(made(features).norm(dim=1), torch.ones(200).double())


@pytest.mark.parametrize(("items", "value"), [(9, 0.3), (9, 0.0), (1, 1.0), (0, 1.0)])
def test_features_that_do_not_vary_become_zero(items, value):
    assert torch.equal(made(torch.full((items, 4), value).double()), torch.zeros(items, 4).double())


def test_an_item_without_a_picture_stays_zero_and_is_not_counted():
    features = features_of()
    without = torch.cat([features[:5], torch.zeros(3, 12), features[5:]])
    found = made(without)
    assert not found[5:8].any()
    torch.testing.assert_close(found[[*range(5), *range(8, 203)]], made(features))


def test_what_rounding_to_half_precision_adds_is_no_direction():
    features = torch.nn.functional.normalize(features_of(500, 200, rank=6), dim=1)
    ranks = [torch.linalg.matrix_rank(fit_whitening(of_type)[1]).item() for of_type in (features.half(), features)]
    assert ranks == [7, 7]  # the six, and one that the length of 1 adds
    cosine = torch.nn.functional.cosine_similarity(made(features.half().double()), made(features))
    assert cosine.min() > 0.995


def make_model(features, fit=True):
    torch.manual_seed(0)
    whitening = Whitening(features, fit)
    settings = ModelSettings(mrl_hidden_sizes=SIZES, lru_num_blocks=1)
    return FMRLRec(len(features[0]), whitening.features(), settings, whitening)


def parts(seed=0):
    return [features_of(60, 12, seed=seed).half(), features_of(60, 6, rank=6, seed=seed + 1).float()]


def test_every_encoder_is_whitened_alone_once_in_the_type_it_comes_in():
    found = make_model(parts()).items.features
    assert [part.dtype for part in found] == [torch.float16, torch.float32]
    for part, raw in zip(found, parts(), strict=True):
        torch.testing.assert_close(part.double(), made(raw.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fit", [True, False])
def test_the_transform_is_saved_with_the_weights_and_the_one_that_is_loaded_counts(fit):
    saved, other = make_model(parts()), make_model(parts(), fit)
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


def test_a_slice_reads_the_same_features_and_knows_what_made_them():
    model = make_model(parts())
    small = slice_model(model, 4)
    for of_small, of_model in zip(small.items.features, model.items.features, strict=True):
        assert of_small.data_ptr() == of_model.data_ptr()
    assert small.items.whitening is model.items.whitening
    torch.testing.assert_close(small.item_table(), model.item_table()[:, :4])


def test_a_server_without_torch_whitens_new_products_alike():
    model = make_model(parts())
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


@pytest.mark.parametrize("seed", range(6))
def test_features_of_a_few_words_each_are_whitened_too(seed):
    """Ten items of a dozen words among 1,024: most directions have no variance, on which eigh often fails."""
    random = torch.Generator().manual_seed(seed)
    features = torch.zeros(10, 1024)
    for row in features:
        row[torch.randint(0, 1024, (12,), generator=random)] = torch.randn(12, generator=random)
    mean, matrix = fit_whitening(features)
    rows = (features.double() - mean) @ matrix
    torch.testing.assert_close(rows @ rows.T / 10, torch.eye(10).double() - 0.1)  # of rank 9, all as strong
