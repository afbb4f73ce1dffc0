"""The fMRLRec operator: its mask, its initialisation, its LayerNorm, and what it makes of a model's size."""

import math
import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from config import ModelSettings
from model import FMRLRec, count_parameters
from model.fast.nested_linear import bands, nested_linear
from model.fmrl import FMRLLayerNorm, FMRLLinear, nested_linear_plain
from model.lru import LRU
from model.sizes import increments, nested_mask

SIZE_LISTS = [tuple(sorted(random.Random(seed).sample(range(1, 40), k=seed + 1))) for seed in range(4)]
PAPER_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def randomised(module, seed=0):
    """The module with every weight drawn anew: none is zero, not even where the mask hides it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5)
    return module


def recurrent_layer(sizes):
    """An LRU as a function of x alone: all rows of x are one history."""
    layer = randomised(LRU(sizes, bias=True, r_min=0.3, r_max=0.9))
    return lambda x: layer(x, torch.arange(len(x)), len(x))


@pytest.mark.parametrize("sizes", SIZE_LISTS)
def test_the_mask_lets_an_output_read_the_inputs_up_to_the_end_of_its_own_increment(sizes):
    mask = nested_mask(sizes)
    assert mask.shape == (sizes[-1], sizes[-1])
    for output in range(sizes[-1]):
        smallest_model_with_output = next(m for m in sizes if output < m)
        for input in range(sizes[-1]):
            assert mask[output, input] == (1 if input < smallest_model_with_output else 0)


def test_the_mask_keeps_two_thirds_of_a_weight_at_the_sizes_of_the_paper():
    assert nested_mask(PAPER_SIZES).mean().item() == pytest.approx(2 / 3, abs=1e-4)


@pytest.mark.parametrize("layer", [FMRLLinear, FMRLLayerNorm, recurrent_layer])
@pytest.mark.parametrize("sizes", SIZE_LISTS)
def test_the_first_m_outputs_depend_on_the_first_m_inputs_alone(layer, sizes):
    layer = layer(sizes) if layer is recurrent_layer else randomised(layer(sizes))
    x = torch.randn(3, sizes[-1])
    for m in sizes:
        changed = torch.cat([x[:, :m], torch.randn(3, sizes[-1] - m)], dim=1)
        torch.testing.assert_close(layer(changed)[:, :m], layer(x)[:, :m], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZE_LISTS)
def test_an_output_reads_every_input_that_the_mask_allows_and_no_other(sizes):
    layer = randomised(FMRLLinear(sizes))
    jacobian = torch.autograd.functional.jacobian(layer, torch.randn(sizes[-1]))
    assert torch.equal(jacobian != 0, nested_mask(sizes) != 0)


@pytest.mark.parametrize("name", ["weight", "bias", "B_re", "C_re", "B_bias_re", "C_bias"])
def test_every_block_of_rows_starts_uniform_within_the_bound_of_its_own_fan_in(name):
    torch.manual_seed(0)
    sizes = (8, 24, 64)
    layers = FMRLLinear(sizes), LRU(sizes, bias=True, r_min=0.0, r_max=0.1)
    (weight,) = (getattr(layer, name).detach() for layer in layers if hasattr(layer, name))
    if weight.ndim == 2:
        assert torch.equal(weight != 0, nested_mask(sizes) != 0)
    for low, high in pairwise((0, *sizes)):
        bound = 1 / math.sqrt(high)
        block = weight[low:high, :high] if weight.ndim == 2 else weight[low:high]
        assert block.abs().max() <= bound
        assert block.max() > 0.5 * bound
        assert block.min() < -0.5 * bound
        if block.ndim == 2:
            assert block.abs().max() > 0.9 * bound
            assert block.square().mean().sqrt().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_layer_norm_is_one_layer_norm_per_increment():
    sizes = (3, 4, 11)
    norm, x = randomised(FMRLLayerNorm(sizes)), torch.randn(6, 11)
    blocks = [
        F.layer_norm(x[:, low:high], (high - low,), norm.weight[low:high], norm.bias[low:high])
        for low, high in [(0, 3), (3, 4), (4, 11)]
    ]
    torch.testing.assert_close(norm(x), torch.cat(blocks, dim=1))
    assert FMRLLayerNorm(sizes).weight.eq(1).all() and not FMRLLayerNorm(sizes).bias.any()


@pytest.mark.parametrize("build", [increments, FMRLLinear, FMRLLayerNorm])
@pytest.mark.parametrize("sizes", [(), (0, 8), (8, 8), (8, 32, 16), (8.0, 16), ("8", "16")], ids=str)
def test_sizes_that_are_no_increasing_whole_numbers_are_refused(build, sizes):
    with pytest.raises(ValueError, match=r"sizes .* must be increasing whole numbers"):
        build(sizes)


@pytest.mark.parametrize(("num_blocks", "expected"), [(1, 5_605_824), (2, 9_113_472)])
def test_the_paper_model_has_as_many_parameters_as_the_released_one(num_blocks, expected):
    model = FMRLRec(3, torch.zeros(3, 2048), ModelSettings(mrl_hidden_sizes=PAPER_SIZES, lru_num_blocks=num_blocks))
    assert count_parameters(model) == expected


def test_parameters_are_counted_without_what_the_mask_hides_and_complex_ones_once():
    model = FMRLRec(4, None, ModelSettings(mrl_hidden_sizes=(2, 3), lru_num_blocks=1))
    table, norms, rings = 5 * 3, 2 * 2 * 3, 3 * 3
    square_weights, biases = 5 * (2 * 2 + 1 * 3), 5 * 3
    assert count_parameters(model) == table + norms + rings + square_weights + biases


NESTINGS = [SIZE_LISTS[-1], (1,), (1, 2, 64), (16, 64), (15, 16, 17, 64), PAPER_SIZES[:5]]


def linear_case(sizes, dtype, biased, seed=0):
    """(x, weight, bias or None), all of which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 5, sizes[-1]), (sizes[-1], sizes[-1]), (sizes[-1],)
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    x, weight, bias = (part.to(dtype).requires_grad_() for part in (x, weight, bias))
    return (x, weight, bias if biased else None)


def value_and_gradients(linear, x, weight, bias, sizes, narrow=False):
    """[y, and the gradients of a random function of it with respect to x, weight and bias]; with `narrow`, y is under
    autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow, cache_enabled=False):
        y = linear(x, weight, bias, sizes)
    generator = torch.Generator().manual_seed(1)
    along = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    inputs = [part for part in (x, weight, bias) if part is not None]
    return [y, *torch.autograd.grad((y * along.to(y.dtype)).sum(), inputs)]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", NESTINGS, ids=str)
def test_bands_have_the_values_and_gradients_of_the_whole_masked_weight(sizes, dtype, tolerance, biased):
    case = linear_case(sizes, dtype, biased)
    fast, plain = (value_and_gradients(linear, *case, sizes) for linear in (nested_linear, nested_linear_plain))
    for f, p in zip(fast, plain, strict=True):
        assert (f.shape, f.dtype) == (p.shape, p.dtype)
        assert (f - p).abs().max() <= tolerance * p.abs().max()


@pytest.mark.parametrize("sizes", NESTINGS[2:], ids=str)
def test_in_bfloat16_the_bands_err_no_more_than_twice_the_masked_weight(sizes):
    exact = value_and_gradients(nested_linear_plain, *linear_case(sizes, torch.float64, True), sizes)
    case = linear_case(sizes, torch.float32, True)
    found = [value_and_gradients(linear, *case, sizes, narrow=True) for linear in (nested_linear, nested_linear_plain)]
    assert [part.dtype for part in found[0]] == [torch.bfloat16] + 3 * [torch.float32]
    for f, p, e in zip(*found, exact, strict=True):
        assert (f - e).abs().mean() <= 2 * (p - e).abs().mean()


def test_under_autocast_gradients_use_narrow_products_and_wide_sums():
    sizes = (10, 20, 40)
    found = value_and_gradients(nested_linear, *linear_case(sizes, torch.float32, True), sizes, narrow=True)
    is_narrow = [torch.equal(part, part.bfloat16().to(part.dtype)) for part in found]
    assert is_narrow == [True, False, True, False]  # y; gradients of x, weight and bias


@pytest.mark.parametrize("sizes", NESTINGS, ids=str)
def test_bands_are_the_increments_but_one_of_those_below_a_quarter(sizes):
    found = bands(sizes)
    assert found[-1][1] == sizes[-1]
    assert [low for low, _ in found] == [0, *(high for _, high in found[:-1])]
    assert {high for _, high in found} == {m for m in sizes if m >= sizes[-1] / 4}


def test_the_weight_is_read_and_never_changed():
    x, weight, bias = linear_case((3, 4, 40), torch.float32, biased=True)
    before = weight.detach().clone()
    nested_linear(x, weight, bias, (3, 4, 40)).sum().backward()
    assert torch.equal(weight.detach(), before)
