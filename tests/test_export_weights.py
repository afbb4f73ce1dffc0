"""The weights of an export: masks applied, no complex numbers, float32 or int8."""

import numpy as np
import pytest
import torch

from serving.convert import model_from, serving_weights
from serving.quantize import dequantize, quantize
from serving.weights import expected_shapes, float_weight
from tests.made_up import random_model

NUM_ITEMS = 30
# sizes, blocks, options: one size, several; each option of the model on and off
MODELS = [
    ((7,), 1, {"features": 9}),
    ((3, 8), 2, {"features": 9, "use_bias": False, "post_norm": True}),
    ((2, 5, 11), 3, {"features": 0, "post_norm": True}),
]


def model_of(sizes, blocks=2, features=9, **options):
    described = np.random.default_rng(1).normal(size=(NUM_ITEMS, features)).astype(np.float32) if features else None
    return random_model(sizes, blocks, num_items=NUM_ITEMS, features=described, **options)


def histories():
    """Return (tokens, position, longest) of random histories; each begins with token 0."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 12, size=10)
    tokens = np.concatenate([[0, *random.integers(1, NUM_ITEMS + 1, size=length - 1)] for length in lengths])
    position = np.concatenate([np.arange(length) for length in lengths])
    return torch.from_numpy(tokens), torch.from_numpy(position), int(lengths.max())


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# ------------------------------------------------------------------------------------------------------------ float32


def layer_norm(x, sizes, weight, bias):
    """One LayerNorm per increment."""
    parts = np.split(x, sizes[:-1])
    return np.concatenate([(p - p.mean()) / np.sqrt(p.var() + 1e-5) for p in parts]) * weight + bias


def z_of(weights, table, sizes, blocks, history):
    """Return z of one history, computed from the description in serving/weights.py alone."""

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


@pytest.mark.parametrize(("sizes", "blocks", "options"), MODELS)
@torch.inference_mode()
def test_the_weights_compute_what_their_description_says(sizes, blocks, options):
    model = model_of(sizes, blocks, **options)
    table, weights = model.item_table(), serving_weights(model, quantized=False)
    tokens, position, longest = histories()
    z = model.encode(table[tokens], position, longest).numpy()
    for end in range(len(tokens)):
        history = tokens[end - int(position[end]) : end + 1].numpy()
        found = z_of(weights, table.double().numpy(), sizes, blocks, history)
        assert abs(found - z[end]).max() <= 1e-5 * abs(z).max()
    if options["features"]:
        items = model.items.features[0].numpy() @ weights["projection.weight"] + weights["projection.bias"]
        assert abs(items - table[1:].numpy()).max() <= 1e-5 * abs(table.numpy()).max()


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("sizes", "blocks", "options"), MODELS)
def test_the_weights_have_the_expected_shapes(sizes, blocks, options, quantized):
    weights = serving_weights(model_of(sizes, blocks, **options), quantized)
    post_norm = options.get("post_norm", False)
    expected = expected_shapes(sizes[-1], blocks, options["features"], quantized, post_norm=post_norm)
    assert {name: weight.shape for name, weight in weights.items()} == expected
    assert all(weight.flags.c_contiguous for weight in weights.values())


def test_converting_back_keeps_the_random_state():
    weights = serving_weights(model_of((3, 8)), False)
    before = torch.get_rng_state()
    model_from(weights, (3, 8), 2)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_is_off_by_half_a_scale_at_most(axis):
    values = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * np.logspace(-6, 3, 40, dtype="f4")
    q, scale = quantize(values, axis)
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (values.shape[1 - axis],)
    assert np.allclose(scale, abs(values).max(axis=axis) / 127) and (abs(q.astype(int)).max(axis=axis) == 127).all()
    error = abs(dequantize(q, scale, axis) - values)
    assert (error <= np.expand_dims(scale, axis) / 2 * (1 + 1e-4)).all()
    assert error.max() > scale.max() / 4  # the bound is tight


@pytest.mark.parametrize("largest", [1e-37, 1e-45, 0])
def test_zeros_and_subnormal_numbers_are_quantized_to_zeros(largest):
    q, scale = quantize(np.linspace(-largest, largest, 9, dtype=np.float32)[None], axis=1)
    assert not q.any() and (scale == 1).all()


def test_only_the_matrices_of_blocks_are_int8():
    model = model_of((3, 8, 20))
    plain, quantized = serving_weights(model, False), serving_weights(model, True)
    matrices = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("lru.B", "lru.C", "ffn.expand", "ffn.reduce")}
    assert {name for name, weight in quantized.items() if weight.dtype == np.int8} == matrices
    assert {weight.dtype for name, weight in quantized.items() if name not in matrices} == {np.dtype(np.float32)}
    for name, weight in plain.items():
        error = abs(float_weight(quantized, name) - weight)
        assert (error <= (quantized[f"{name}.scale"] / 2 * (1 + 1e-4) if name in matrices else 0)).all()


def test_an_int8_model_is_converted_back_to_its_dequantized_weights():
    weights = serving_weights(model_of((3, 8, 20)), True)
    plain = {name: float_weight(weights, name) for name in weights if not name.endswith(".scale")}
    found, expected = (model_from(w, (3, 8, 20), 2).blocks.state_dict() for w in (weights, plain))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
