"""The Linear Recurrent Unit: its ring initialisation, and its recurrence against the plain loop."""

import math

import pytest
import torch

from model.fast import recurrence
from model.fast.recurrence import linear_recurrence
from model.lru import LRU, linear_recurrence_plain, ring_init
from model.sizes import nested_mask

SCANS = [recurrence._scan_by_steps, recurrence._scan_by_doubling]  # of a CPU, of a GPU
HISTORIES = [[1], [1, 1, 1], [64], [65, 1, 63], [1, 50, 2, 49, 1], [1000, 3, 1, 512, 513], [127, 5, 38, 90, 2, 61]]


def positions_of(lengths):
    """Histories of these lengths packed one after another."""
    return torch.cat([torch.arange(n) for n in lengths])


def random_inputs(num_tokens, dtype, dim=5, radius=0.99):
    """(u_re, u_im, λ_re, λ_im), all of which require gradients; |λ| up to `radius`."""
    generator = torch.Generator().manual_seed(0)
    u_re, u_im = torch.randn(2, num_tokens, dim, generator=generator, dtype=torch.float64)
    modulus = radius * torch.linspace(0.05, 1, dim, dtype=torch.float64)
    angle = 2 * math.pi * torch.rand(dim, generator=generator, dtype=torch.float64)
    parts = (u_re, u_im, modulus * angle.cos(), modulus * angle.sin())
    return [part.to(dtype).requires_grad_() for part in parts]


def values_and_gradients(recurrence, inputs):
    """[h_re, h_im, and the gradients of a random function of them with respect to every input]."""
    h_re, h_im = recurrence(*inputs)
    generator = torch.Generator().manual_seed(1)
    w_re, w_im = torch.randn(2, *h_re.shape, generator=generator, dtype=torch.float64).to(h_re.dtype)
    objective = (w_re * h_re + w_im * h_im + 0.1 * h_re * h_im).sum()
    return [h_re, h_im, *torch.autograd.grad(objective, inputs, materialize_grads=True)]


def assert_twins(position, longest, dtype=torch.float64, radius=0.99, tolerance=1e-11):
    inputs = random_inputs(len(position), dtype, radius=radius)
    fast = values_and_gradients(lambda *u: linear_recurrence(*u, position, longest), inputs)
    plain = values_and_gradients(lambda *u: linear_recurrence_plain(*u, position), inputs)
    for f, p in zip(fast, plain, strict=True):
        assert (f - p).abs().max() <= tolerance * p.abs().max()


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("dtype", "radius", "tolerance"), [(torch.float64, 0.999, 1e-11), (torch.float32, 0.9, 1e-5)])
@pytest.mark.parametrize("lengths", HISTORIES, ids=str)
def test_either_scan_has_the_values_and_gradients_of_the_plain_loop(
    monkeypatch, lengths, dtype, radius, tolerance, scan
):
    monkeypatch.setattr(recurrence, "_scan", scan)
    assert_twins(positions_of(lengths), max(lengths), dtype, radius, tolerance)


@pytest.mark.parametrize("scan", SCANS)
def test_rows_may_begin_with_a_token_whose_state_is_not_carried_on(monkeypatch, scan):
    monkeypatch.setattr(recurrence, "_scan", scan)
    assert_twins(torch.cat([torch.tensor([0, 0, 1, 2, 3]), torch.arange(6), torch.tensor([0, 0, 1, 0])]), 6)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("lengths", [[50] * 8, [1000, 3]], ids=str)
def test_in_float32_on_a_ring_near_1_either_scan_errs_no_more_than_four_times_the_loop(monkeypatch, lengths, scan):
    monkeypatch.setattr(recurrence, "_scan", scan)
    position = positions_of(lengths)
    inputs = random_inputs(len(position), torch.float64)
    narrow = [part.detach().float().requires_grad_() for part in inputs]
    exact, loop = (values_and_gradients(lambda *u: linear_recurrence_plain(*u, position), u) for u in (inputs, narrow))
    fast = values_and_gradients(lambda *u: linear_recurrence(*u, position, max(lengths)), narrow)
    for f, p, e in zip(fast[:4], loop, exact, strict=False):  # λ has few gradients, whose errors are down to luck
        assert (f - e).abs().mean() <= 4 * (p - e).abs().mean()


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0), ("meta", 1)])
def test_the_scan_that_waits_for_numbers_is_for_a_cpu_alone(monkeypatch, device, expected):
    called = []
    for place, scan in enumerate(SCANS):
        monkeypatch.setattr(recurrence, scan.__name__, lambda *arguments, place=place: called.append(place))
    recurrence._scan(torch.zeros(3, 2, dtype=torch.complex64, device=device), None, None, 3)
    assert called == [expected]


def test_a_scan_by_doubling_takes_as_many_steps_as_the_longest_history_needs_and_more_change_nothing():
    position = positions_of([9, 3, 1])
    u_re, u_im, *eigenvalue = (part.detach() for part in random_inputs(13, torch.float64))
    u, eigenvalue = torch.complex(u_re, u_im), torch.complex(*eigenvalue)
    exact, rounded_up, too_few = (
        recurrence._scan_by_doubling(u.clone(), eigenvalue, position, longest) for longest in (9, 16, 8)
    )
    assert torch.equal(exact, rounded_up)
    assert not torch.equal(exact, too_few)


# ------------------------------------------------------------------------------------------------- the initialisation


def modulus_of(nu_log):
    return torch.exp(-torch.exp(nu_log.double()))


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 0.1), (0.5, 0.6), (0.0, 1.0), (0.9, 0.999)])
def test_eigenvalues_start_within_the_ring_and_finite(r_min, r_max):
    torch.manual_seed(0)
    nu_log, theta_log, gamma_log = ring_init(4000, r_min, r_max)
    assert all(part.isfinite().all() for part in (nu_log, theta_log, gamma_log))
    assert modulus_of(nu_log).min() >= r_min - 1e-6
    assert modulus_of(nu_log).max() <= r_max + 1e-6


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 0.1), (0.0, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_the_initialisation_is_finite_for_the_ends_of_a_uniform_draw(monkeypatch, r_min, r_max, draw):
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


# ---------------------------------------------------------------------------------------------------------- the layer


def test_the_imaginary_parts_of_B_and_C_start_at_zero():
    layer = LRU((4, 8), bias=True, r_min=0.0, r_max=0.1)
    assert layer.B_im.count_nonzero() == layer.C_im.count_nonzero() == layer.B_bias_im.count_nonzero() == 0
    assert layer.B_re.count_nonzero() == layer.C_re.count_nonzero() == nested_mask(layer.sizes).sum()


def random_layer(dim, bias):
    """An LRU of one size, in float64, all of whose weights are drawn anew."""
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


def test_the_bias_of_B_is_scaled_by_gamma_and_that_of_C_is_added_to_the_output():
    layer = random_layer(6, bias=True)
    C = torch.complex(layer.C_re, layer.C_im)
    state = layer.gamma_log.exp() * torch.complex(layer.B_bias_re, layer.B_bias_im)
    first = layer(torch.zeros(1, 6, dtype=torch.float64), torch.zeros(1, dtype=torch.int64), 1)[0]
    torch.testing.assert_close(first, (C @ state).real + layer.C_bias)


def test_the_lru_answers_for_some_tokens_as_it_does_for_all():
    layer, position, at = random_layer(6, bias=True), positions_of([4, 1, 7]), torch.tensor([3, 4, 11, 8])
    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    some, all_ = layer(x, position, 7, at), layer(x, position, 7)[at]
    torch.testing.assert_close(some, all_)
    torch.testing.assert_close(*(torch.autograd.grad((y**2).sum(), x)[0] for y in (some, all_)))
