"""What an export stores of a model: weights without masks or complex numbers, in full or in eight bits."""

import random

import numpy as np
import pytest
import torch

from model import slice_model
from serving.quantize import dequantize, quantize
from serving.weights import expected_shapes, float_weight, model_from, serving_weights
from tests.made_up import random_model

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


@pytest.mark.parametrize("size", [1e-37, 1e-40, 2.6e-43, 1e-45])
def test_numbers_too_small_to_divide_by_keep_their_sign_or_become_zero(size):
    values = np.linspace(-size, size, 9, dtype=np.float32)[None]
    q, scale = quantize(values, axis=1)
    assert (abs(dequantize(q, scale, axis=1) - values) <= abs(values).max()).all()
    assert (q * values >= 0).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_zeros_stay_zeros(axis):
    q, scale = quantize(np.zeros((3, 4), dtype=np.float32), axis)
    assert not q.any() and (scale == 1).all() and not dequantize(q, scale, axis).any()


# ---------------------------------------------------------------------------------------------------------- weights


NUM_ITEMS = 30
LISTS = [tuple(sorted(random.Random(seed).sample(range(1, 40), k=seed + 1))) for seed in range(4)]


def model_of(sizes, blocks=2, use_bias=True, features=9, post_norm=False):
    described = np.random.default_rng(1).normal(size=(NUM_ITEMS, features)).astype(np.float32) if features else None
    return random_model(sizes, blocks, num_items=NUM_ITEMS, features=described, use_bias=use_bias, post_norm=post_norm)


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
    model = model_of(sizes, blocks, use_bias, features, post_norm=blocks == 2)
    for size in sizes:
        small = slice_model(model, size)
        served = model_from(serving_weights(small, quantized=False), small.sizes, blocks)
        tokens, position, longest = histories()
        x = small.items(tokens)
        assert_close(served.encode(x, position, longest), small.encode(x, position, longest))
        hidden, x = torch.randn(4, blocks, 2, size), small.items(torch.tensor([0, 3, 7, NUM_ITEMS]))
        for found, expected in zip(served.step(x, hidden), small.step(x, hidden), strict=True):
            assert_close(found, expected)


def layer_norm(x, sizes, weight, bias):
    """One LayerNorm per increment."""
    parts = np.split(x, sizes[:-1])
    return np.concatenate([(p - p.mean()) / np.sqrt(p.var() + 1e-5) for p in parts]) * weight + bias


def by_the_book(weights, table, sizes, blocks, history):
    """z of one history, as the head of serving/weights.py describes the weights: no mask, no γ, no model."""

    def norm(x, name, here):
        return layer_norm(x, sizes, weights[f"{name}.weight"], weights[f"{name}.bias"]) if here else x

    hidden, m, post = np.zeros((blocks, sizes[-1]), dtype=complex), sizes[-1], "norm.weight" in weights
    for x in table[history]:
        x = norm(x, "norm", post)
        for i in range(blocks):
            w, block = {name.removeprefix(f"blocks.{i}."): value for name, value in weights.items()}, f"blocks.{i}"
            u = norm(x, f"{block}.norm1", not post) @ w["lru.B"] + w["lru.B_bias"]
            eigenvalue = np.exp(-np.exp(w["lru.nu_log"]) + 1j * np.exp(w["lru.theta_log"]))
            hidden[i] = u[:m] + 1j * u[m:] + eigenvalue * hidden[i]
            x = x + np.concatenate([hidden[i].real, hidden[i].imag]) @ w["lru.C"] + w["lru.C_bias"]
            x = norm(x, f"{block}.norm1", post)
            expanded = norm(x, f"{block}.norm2", not post) @ w["ffn.expand"] + w["ffn.expand_bias"]
            gate, value = expanded[:m], expanded[m:]
            x = x + (gate / (1 + np.exp(-gate)) * value) @ w["ffn.reduce"] + w["ffn.reduce_bias"]
            x = norm(x, f"{block}.norm2", post)
    return x


@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("sizes", [(7,), (3, 8), (2, 5, 11)], ids=str)
@torch.inference_mode()
def test_the_weights_are_what_their_description_says(sizes, use_bias, post_norm):
    model = model_of(sizes, 2, use_bias, post_norm=post_norm)
    table, weights = model.item_table(), serving_weights(model, quantized=False)
    tokens, position, longest = histories()
    z = model.encode(table[tokens], position, longest).numpy()
    for end in range(len(tokens)):
        history = tokens[end - int(position[end]) : end + 1].numpy()
        found = by_the_book(weights, table.double().numpy(), sizes, 2, history)
        assert abs(found - z[end]).max() <= 1e-5 * abs(z).max()
    items = model.items.features[0].numpy() @ weights["projection.weight"] + weights["projection.bias"]
    assert abs(items - table[1:].numpy()).max() <= 1e-5 * abs(table.numpy()).max()


@pytest.mark.parametrize("features", [9, 0])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("sizes", LISTS[:3], ids=str)
def test_the_weights_have_the_shapes_that_are_expected_of_them(sizes, quantized, use_bias, features):
    weights = serving_weights(model_of(sizes, 3, use_bias, features, post_norm=use_bias), quantized)
    shapes = {name: weight.shape for name, weight in weights.items()}
    assert shapes == expected_shapes(sizes[-1], 3, features, quantized, post_norm=use_bias)
    assert all(weight.flags.c_contiguous for weight in weights.values())


def test_in_eight_bits_only_the_blocks_matrices_are_and_they_are_off_by_half_a_scale():
    model = model_of((3, 8, 20))
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
    weights = serving_weights(model_of((3, 8, 20)), True)
    plain = {name: float_weight(weights, name) for name in weights if not name.endswith(".scale")}
    found, expected = (model_from(w, (3, 8, 20), 2).blocks.state_dict() for w in (weights, plain))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_making_a_model_of_weights_draws_no_random_numbers_of_the_caller():
    weights = serving_weights(model_of((3, 8)), False)
    before = torch.get_rng_state()
    model_from(weights, (3, 8), 2)
    assert torch.equal(torch.get_rng_state(), before)
