"""What an export stores of a model: weights without masks or complex numbers, in full or in eight bits."""

import random

import numpy as np
import pytest
import torch

from model import FMRLRec, slice_model
from model.serving.quantize import dequantize, quantize
from model.serving.weights import expected_shapes, float_weight, model_from, serving_weights

# ------------------------------------------------------------------------------------------------------- eight bits


@pytest.mark.parametrize("axis", [0, 1])
def test_eight_bits_are_off_by_half_a_scale_at_most(axis):
    values = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * np.logspace(-6, 3, 40, dtype="f4")
    q, scale = quantize(values, axis)
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (values.shape[1 - axis],)
    assert np.allclose(scale, abs(values).max(axis=axis) / 127) and (abs(q.astype(int)).max(axis=axis) == 127).all()
    error = abs(dequantize(q, scale, axis) - values)
    assert (error <= np.expand_dims(scale, axis) / 2 * (1 + 1e-4)).all()
    assert error.max() > scale.max() / 4  # the bound is one, not a guess


def test_the_sign_and_the_largest_value_survive():
    values = np.array([[3.0, -6.0, 0.0, 1.5]], dtype=np.float32)
    q, scale = quantize(values, axis=1)
    assert q.tolist() == [[64, -127, 0, 32]]
    assert dequantize(q, scale, axis=1)[0, 1] == -6


@pytest.mark.parametrize("axis", [0, 1])
def test_zeros_stay_zeros(axis):
    q, scale = quantize(np.zeros((3, 4), dtype=np.float32), axis)
    assert not q.any() and (scale == 1).all() and not dequantize(q, scale, axis).any()


# ---------------------------------------------------------------------------------------------------------- weights


NUM_ITEMS = 30
LISTS = [tuple(sorted(random.Random(seed).sample(range(1, 40), k=seed + 1))) for seed in range(4)]


def random_model(sizes, blocks=2, use_bias=True, features=9):
    """A model without zeros or ones among its weights, not even where the mask hides them."""
    torch.manual_seed(0)
    described = torch.randn(NUM_ITEMS, features) if features else None
    model = FMRLRec(NUM_ITEMS, described, sizes, blocks, 0.5, 0.5, use_bias, r_min=0.3, r_max=0.9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("nu_log", "theta_log")):
                parameter.uniform_(-0.4, 0.4)
    return model.eval()


def histories():
    """(tokens, position, longest) of random histories, each begun by token 0."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 12, size=10)
    tokens = np.concatenate([[0, *random.integers(1, NUM_ITEMS + 1, size=length - 1)] for length in lengths])
    position = np.concatenate([np.arange(length) for length in lengths])
    return torch.from_numpy(tokens), torch.from_numpy(position), int(lengths.max())


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("features", [9, 0])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("sizes", LISTS, ids=str)
@torch.inference_mode()
def test_a_model_made_of_served_weights_asks_for_what_the_model_asks_for(sizes, blocks, use_bias, features):
    model = random_model(sizes, blocks, use_bias, features)
    for size in sizes:
        small = slice_model(model, size)
        served = model_from(serving_weights(small, quantized=False), small.sizes, blocks)
        assert_close(served.encode(small.item_table(), *histories()), small.encode(small.item_table(), *histories()))
        hidden, items = torch.randn(4, blocks, 2, size), torch.tensor([0, 3, 7, NUM_ITEMS])
        for found, expected in zip(
            served.step(small.item_table(), items, hidden), small.step(small.item_table(), items, hidden), strict=True
        ):
            assert_close(found, expected)


@pytest.mark.parametrize("features", [9, 0])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("sizes", LISTS[:3], ids=str)
def test_the_weights_have_the_shapes_that_are_expected_of_them(sizes, quantized, use_bias, features):
    weights = serving_weights(random_model(sizes, 3, use_bias, features), quantized)
    shapes = {name: weight.shape for name, weight in weights.items()}
    assert shapes == expected_shapes(sizes[-1], 3, features, quantized)
    assert all(weight.flags.c_contiguous for weight in weights.values())


def test_in_eight_bits_only_the_blocks_matrices_are_and_they_are_off_by_half_a_scale():
    model = random_model((3, 8, 20))
    plain, quantized = serving_weights(model, False), serving_weights(model, True)
    matrices = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("lru.B", "lru.C", "ffn.expand", "ffn.reduce")}
    assert {name for name, weight in quantized.items() if weight.dtype == np.int8} == matrices
    assert {weight.dtype for name, weight in quantized.items() if name not in matrices} == {np.dtype(np.float32)}
    for name, weight in plain.items():
        found = float_weight(quantized, name)
        if name in matrices:
            assert (abs(found - weight) <= quantized[f"{name}.scale"] / 2 * (1 + 1e-4)).all()
        else:
            assert np.array_equal(found, weight)


def test_a_model_in_eight_bits_is_the_model_of_the_numbers_that_they_stand_for():
    weights = serving_weights(random_model((3, 8, 20)), True)
    plain = {name: float_weight(weights, name) for name in weights if not name.endswith(".scale")}
    found, expected = (model_from(w, (3, 8, 20), 2).blocks.state_dict() for w in (weights, plain))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
