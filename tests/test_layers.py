"""The nested operators: FMRL linear and LayerNorm, their sizes, and the Linear Recurrent Unit."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from config import ModelSettings
from model import FMRLRec, count_parameters
from model.fast import recurrence
from model.fast.nested_linear import bands, nested_linear
from model.fast.recurrence import linear_recurrence
from model.fmrl import FMRLLayerNorm, FMRLLinear, nested_linear_plain
from model.lru import LRU, linear_recurrence_plain, ring_init
from model.sizes import increments, nested_mask

SIZE_LISTS = [(20,), (3, 4, 11), (1, 7, 16, 39)]
PAPER_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def with_drawn_weights(module, seed=0):
    """Draw every weight anew, masked ones too, and return the module."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5)
    return module


def recurrent_layer(sizes):
    """Return an LRU as a function of x alone, whose rows are one history."""
    layer = with_drawn_weights(LRU(sizes, bias=True, r_min=0.3, r_max=0.9))
    return lambda x: layer(x, torch.arange(len(x)), len(x))


@pytest.mark.parametrize("sizes", SIZE_LISTS)
def test_an_output_reads_the_inputs_up_to_the_end_of_its_own_increment(sizes):
    mask = nested_mask(sizes)
    for output in range(sizes[-1]):
        end = next(m for m in sizes if output < m)
        assert mask[output].tolist() == [1] * end + [0] * (sizes[-1] - end)
    layer = with_drawn_weights(FMRLLinear(sizes))
    jacobian = torch.autograd.functional.jacobian(layer, torch.randn(sizes[-1]))
    assert torch.equal(jacobian != 0, mask != 0)


@pytest.mark.parametrize("layer", [FMRLLinear, FMRLLayerNorm, recurrent_layer])
@pytest.mark.parametrize("sizes", SIZE_LISTS)
def test_the_first_m_outputs_depend_on_the_first_m_inputs_alone(layer, sizes):
    layer = layer(sizes) if layer is recurrent_layer else with_drawn_weights(layer(sizes))
    x = torch.randn(3, sizes[-1])
    for m in sizes:
        changed = torch.cat([x[:, :m], torch.randn(3, sizes[-1] - m)], dim=1)
        torch.testing.assert_close(layer(changed)[:, :m], layer(x)[:, :m], rtol=1e-5, atol=1e-6)


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
    norm, x = with_drawn_weights(FMRLLayerNorm(sizes)), torch.randn(6, 11)
    blocks = [
        F.layer_norm(x[:, low:high], (high - low,), norm.weight[low:high], norm.bias[low:high])
        for low, high in [(0, 3), (3, 4), (4, 11)]
    ]
    torch.testing.assert_close(norm(x), torch.cat(blocks, dim=1))
    assert FMRLLayerNorm(sizes).weight.eq(1).all() and not FMRLLayerNorm(sizes).bias.any()


@pytest.mark.parametrize("sizes", [(), (0, 8), (8, 8), (8.0, 16), ("8", "16")], ids=str)
def test_sizes_must_be_increasing_whole_numbers(sizes):
    for build in (increments, FMRLLinear, FMRLLayerNorm):
        with pytest.raises(ValueError, match=r"sizes .* must be increasing whole numbers"):
            build(sizes)


@pytest.mark.parametrize(("num_blocks", "expected"), [(1, 5_605_824), (2, 9_113_472)])
def test_the_papers_model_has_the_parameters_of_the_released_one(num_blocks, expected):
    model = FMRLRec(3, torch.zeros(3, 2048), ModelSettings(mrl_hidden_sizes=PAPER_SIZES, lru_num_blocks=num_blocks))
    assert count_parameters(model) == expected


def test_parameters_are_counted_without_masked_ones_and_complex_ones_once():
    model = FMRLRec(4, None, ModelSettings(mrl_hidden_sizes=(2, 3), lru_num_blocks=1))
    table, norms, rings = 5 * 3, 2 * 2 * 3, 3 * 3
    square_weights, biases = 5 * (2 * 2 + 1 * 3), 5 * 3
    assert count_parameters(model) == table + norms + rings + square_weights + biases


NESTINGS = [(1,), (1, 2, 64), (15, 16, 17, 64), PAPER_SIZES[:5]]


def linear_case(sizes, dtype, biased, seed=0):
    """Return x, weight and bias or None; all require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 5, sizes[-1]), (sizes[-1], sizes[-1]), (sizes[-1],)
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    x, weight, bias = (part.to(dtype).requires_grad_() for part in (x, weight, bias))
    return (x, weight, bias if biased else None)


def value_and_gradients(linear, x, weight, bias, sizes, narrow=False):
    """Return y, under autocast if `narrow`, and the gradients of a random function of it for x, weight and bias."""
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow, cache_enabled=False):
        y = linear(x, weight, bias, sizes)
    generator = torch.Generator().manual_seed(1)
    along = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    inputs = [part for part in (x, weight, bias) if part is not None]
    return [y, *torch.autograd.grad((y * along.to(y.dtype)).sum(), inputs)]


@pytest.mark.parametrize(
    ("dtype", "biased", "tolerance"),
    [(torch.float64, True, 1e-13), (torch.float64, False, 1e-13), (torch.float32, True, 1e-5)],
)
@pytest.mark.parametrize("sizes", NESTINGS, ids=str)
def test_bands_have_the_values_and_gradients_of_the_masked_weight(sizes, dtype, biased, tolerance):
    case = linear_case(sizes, dtype, biased)
    before = case[1].detach().clone()
    fast, plain = (value_and_gradients(linear, *case, sizes) for linear in (nested_linear, nested_linear_plain))
    for f, p in zip(fast, plain, strict=True):
        assert (f.shape, f.dtype) == (p.shape, p.dtype)
        assert (f - p).abs().max() <= tolerance * p.abs().max()
    assert torch.equal(case[1].detach(), before)


@pytest.mark.parametrize("sizes", NESTINGS[1:], ids=str)
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
def test_bands_are_the_increments_with_those_below_a_quarter_joined(sizes):
    found = bands(sizes)
    assert found[-1][1] == sizes[-1]
    assert [low for low, _ in found] == [0, *(high for _, high in found[:-1])]
    assert {high for _, high in found} == {m for m in sizes if m >= sizes[-1] / 4}


# -------------------------------------------------------------------------------------------- the Linear Recurrent Unit

SCANS = [recurrence._scan_by_steps, recurrence._scan_by_doubling]  # of a CPU, of a GPU
HISTORIES = [[1], [1, 1, 1], [65, 1, 63], [300, 3, 1, 129]]


def positions_of(lengths):
    """Return the positions of histories of these lengths, packed one after another."""
    return torch.cat([torch.arange(n) for n in lengths])


def random_inputs(num_tokens, dtype, dim=5, radius=0.99):
    """Return u_re, u_im, λ_re, λ_im with |λ| up to `radius`; all require gradients."""
    generator = torch.Generator().manual_seed(0)
    u_re, u_im = torch.randn(2, num_tokens, dim, generator=generator, dtype=torch.float64)
    modulus = radius * torch.linspace(0.05, 1, dim, dtype=torch.float64)
    angle = 2 * math.pi * torch.rand(dim, generator=generator, dtype=torch.float64)
    parts = (u_re, u_im, modulus * angle.cos(), modulus * angle.sin())
    return [part.to(dtype).requires_grad_() for part in parts]


def recurrence_and_gradients(recurrence, inputs):
    """Return h_re, h_im, and the gradients of a random function of them for every input."""
    h_re, h_im = recurrence(*inputs)
    generator = torch.Generator().manual_seed(1)
    w_re, w_im = torch.randn(2, *h_re.shape, generator=generator, dtype=torch.float64).to(h_re.dtype)
    objective = (w_re * h_re + w_im * h_im + 0.1 * h_re * h_im).sum()
    return [h_re, h_im, *torch.autograd.grad(objective, inputs, materialize_grads=True)]


def assert_twins(position, longest, dtype=torch.float64, radius=0.99, tolerance=1e-11):
    inputs = random_inputs(len(position), dtype, radius=radius)
    fast = recurrence_and_gradients(lambda *u: linear_recurrence(*u, position, longest), inputs)
    plain = recurrence_and_gradients(lambda *u: linear_recurrence_plain(*u, position), inputs)
    for f, p in zip(fast, plain, strict=True):
        assert (f - p).abs().max() <= tolerance * p.abs().max()


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("dtype", "radius", "tolerance"), [(torch.float64, 0.999, 1e-11), (torch.float32, 0.9, 1e-5)])
@pytest.mark.parametrize("lengths", HISTORIES, ids=str)
def test_either_scan_has_the_values_and_gradients_of_the_loop(monkeypatch, lengths, dtype, radius, tolerance, scan):
    monkeypatch.setattr(recurrence, "_scan", scan)
    position, longest = positions_of(lengths), max(lengths)
    assert_twins(position, longest, dtype, radius, tolerance)
    begun = torch.cat([torch.tensor([0]), position])  # a begin token, whose state is not carried on
    assert_twins(begun, 2 * longest, dtype, radius, tolerance)  # longest may be larger


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("lengths", [[50] * 8, [500, 3]], ids=str)
def test_in_float32_near_1_either_scan_errs_no_more_than_four_times_the_loop(monkeypatch, lengths, scan):
    monkeypatch.setattr(recurrence, "_scan", scan)
    position = positions_of(lengths)
    inputs = random_inputs(len(position), torch.float64)
    narrow = [part.detach().float().requires_grad_() for part in inputs]
    exact, loop = (
        recurrence_and_gradients(lambda *u: linear_recurrence_plain(*u, position), u) for u in (inputs, narrow)
    )
    fast = recurrence_and_gradients(lambda *u: linear_recurrence(*u, position, max(lengths)), narrow)
    for f, p, e in zip(fast[:4], loop, exact, strict=False):  # the few gradients of λ have random errors
        assert (f - e).abs().mean() <= 4 * (p - e).abs().mean()


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0), ("meta", 1)])
def test_the_scan_by_steps_is_for_the_cpu_only(monkeypatch, device, expected):
    called = []
    for place, scan in enumerate(SCANS):
        monkeypatch.setattr(recurrence, scan.__name__, lambda *arguments, place=place: called.append(place))
    recurrence._scan(torch.zeros(3, 2, dtype=torch.complex64, device=device), None, None, 3)
    assert called == [expected]


def modulus_of(nu_log):
    return torch.exp(-torch.exp(nu_log.double()))


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 0.1), (0.0, 1.0), (0.9, 0.999)])
def test_eigenvalues_start_within_the_ring_and_finite(r_min, r_max):
    torch.manual_seed(0)
    nu_log, theta_log, gamma_log = ring_init(4000, r_min, r_max)
    assert all(part.isfinite().all() for part in (nu_log, theta_log, gamma_log))
    assert modulus_of(nu_log).min() >= r_min - 1e-6
    assert modulus_of(nu_log).max() <= r_max + 1e-6


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 0.1), (0.0, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_the_initialisation_is_finite_at_the_ends_of_a_uniform_draw(monkeypatch, r_min, r_max, draw):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, draw, **options))
    assert all(part.isfinite().all() for part in ring_init(3, r_min, r_max))


def test_eigenvalues_start_spread_evenly_over_the_rings_area():
    torch.manual_seed(0)
    nu_log, theta_log, _ = ring_init(20_000, 0.2, 0.8)
    area_within = (modulus_of(nu_log) ** 2 - 0.2**2) / (0.8**2 - 0.2**2)
    angle_share = torch.exp(theta_log) / (2 * math.pi)
    for share in (area_within, angle_share):
        quantiles = torch.quantile(share.double(), torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64))
        assert quantiles.tolist() == pytest.approx([0.1, 0.25, 0.5, 0.75, 0.9], abs=0.02)


def test_gamma_starts_as_the_root_of_one_minus_the_squared_modulus():
    torch.manual_seed(0)
    nu_log, _, gamma_log = ring_init(100, 0.1, 0.9)
    torch.testing.assert_close(gamma_log.double().exp() ** 2, 1 - modulus_of(nu_log) ** 2, rtol=1e-5, atol=1e-6)


def test_the_imaginary_parts_of_B_and_C_start_at_zero():
    layer = LRU((4, 8), bias=True, r_min=0.0, r_max=0.1)
    assert layer.B_im.count_nonzero() == layer.C_im.count_nonzero() == layer.B_bias_im.count_nonzero() == 0
    assert layer.B_re.count_nonzero() == layer.C_re.count_nonzero() == nested_mask(layer.sizes).sum()


def random_layer(dim, bias):
    """Return an LRU of one size in float64 with every weight drawn anew."""
    torch.manual_seed(0)
    layer = LRU((dim,), bias, r_min=0.3, r_max=0.9).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1)
    return layer


def test_eigenvalues_are_the_exponential_of_minus_exp_nu_plus_i_exp_theta():
    layer = random_layer(6, bias=True)
    expected = torch.exp(torch.complex(-layer.nu_log.exp(), layer.theta_log.exp()))
    torch.testing.assert_close(torch.complex(*layer.eigenvalues()), expected)


def test_without_bias_an_impulse_is_answered_by_C_times_the_powers_of_lambda_times_gamma_B():
    layer = random_layer(6, bias=False)
    x = torch.zeros(9, 6, dtype=torch.float64)
    x[0] = torch.randn(6)
    B, C = torch.complex(layer.B_re, layer.B_im), torch.complex(layer.C_re, layer.C_im)
    eigenvalue = torch.complex(*layer.eigenvalues())
    state = layer.gamma_log.exp() * (B @ x[0].to(B.dtype))
    expected = torch.stack([(C @ (eigenvalue**k * state)).real for k in range(9)])
    torch.testing.assert_close(layer(x, torch.arange(9), 9), expected)


def test_gamma_scales_the_bias_of_B_and_not_the_bias_of_C():
    layer = random_layer(6, bias=True)
    C = torch.complex(layer.C_re, layer.C_im)
    state = layer.gamma_log.exp() * torch.complex(layer.B_bias_re, layer.B_bias_im)
    first = layer(torch.zeros(1, 6, dtype=torch.float64), torch.zeros(1, dtype=torch.int64), 1)[0]
    torch.testing.assert_close(first, (C @ state).real + layer.C_bias)


def test_the_lru_encodes_some_tokens_as_among_all():
    layer, position, at = random_layer(6, bias=True), positions_of([4, 1, 7]), torch.tensor([3, 4, 11, 8])
    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    some, all_ = layer(x, position, 7, at), layer(x, position, 7)[at]
    torch.testing.assert_close(some, all_)
    torch.testing.assert_close(*(torch.autograd.grad((y**2).sum(), x)[0] for y in (some, all_)))
