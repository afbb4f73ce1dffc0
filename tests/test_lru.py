"""The Linear Recurrent Unit: its ring initialisation, and its recurrence against the plain loop."""

import math

import pytest
import torch

from model import lru
from model.fmrl import nested_mask
from model.lru import LRU, linear_recurrence, linear_recurrence_loop, ring_init

HISTORIES = [[1], [2], [50], [1, 1, 1], [1, 50, 2, 49, 1], [130, 1, 7], [3, 64, 65, 128, 129], [33, 5, 130, 50]]


def positions_of(lengths):
    """Histories of these lengths packed one after another."""
    return torch.cat([torch.arange(n) for n in lengths])


def random_lengths(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 140, (6,), generator=generator).tolist()


def random_inputs(num_tokens, dtype, seed=0, dim=5, radius=0.99):
    """(u_re, u_im, λ_re, λ_im), all of which want gradients; |λ| up to `radius`."""
    generator = torch.Generator().manual_seed(seed)
    u_re, u_im = torch.randn(2, num_tokens, dim, generator=generator, dtype=torch.float64)
    modulus = radius * torch.linspace(0.05, 1, dim, dtype=torch.float64)
    angle = 2 * math.pi * torch.rand(dim, generator=generator, dtype=torch.float64)
    parts = (u_re, u_im, modulus * angle.cos(), modulus * angle.sin())
    return [part.to(dtype).requires_grad_() for part in parts]


def values_and_gradients(recurrence, inputs, seed=1):
    """[h_re, h_im, and the gradients of a random function of them with respect to every input]."""
    h_re, h_im = recurrence(*inputs)
    generator = torch.Generator().manual_seed(seed)
    w_re, w_im = torch.randn(2, *h_re.shape, generator=generator, dtype=torch.float64).to(h_re.dtype)
    objective = (w_re * h_re + w_im * h_im + 0.1 * h_re * h_im).sum()
    return [h_re, h_im, *torch.autograd.grad(objective, inputs, materialize_grads=True)]


def assert_relatively_close(actual, expected, tolerance):
    """Equal up to `tolerance` times the largest expected value."""
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max()


def assert_fast_equals_loop(position, longest, dtype, radius, tolerance):
    inputs = random_inputs(len(position), dtype, radius=radius)
    fast = values_and_gradients(lambda *u: linear_recurrence(*u, position, longest), inputs)
    loop = values_and_gradients(lambda *u: linear_recurrence_loop(*u, position), inputs)
    assert_relatively_close(fast, loop, tolerance)


@pytest.mark.parametrize("lengths", [*HISTORIES, *map(random_lengths, range(3))], ids=str)
def test_the_recurrence_has_the_values_and_gradients_of_the_plain_loop(lengths):
    assert_fast_equals_loop(positions_of(lengths), max(lengths), torch.float64, radius=0.99, tolerance=1e-12)


@pytest.mark.parametrize("lengths", [*HISTORIES, random_lengths(3)], ids=str)
def test_the_recurrence_has_the_values_and_gradients_of_the_plain_loop_in_float32(lengths):
    assert_fast_equals_loop(positions_of(lengths), max(lengths), torch.float32, radius=0.9, tolerance=1e-5)


def test_the_recurrence_reads_rows_that_begin_with_a_token_whose_state_is_not_carried_on():
    position = torch.cat([torch.tensor([0, 0, 1, 2, 3]), torch.arange(6), torch.tensor([0, 0, 1]), torch.tensor([0])])
    assert_fast_equals_loop(position, 6, torch.float64, radius=0.99, tolerance=1e-12)


def test_the_recurrence_of_one_history_is_the_sum_of_decayed_inputs():
    u_re, u_im, lambda_re, lambda_im = (part.detach() for part in random_inputs(20, torch.float64))
    u, eigenvalue = torch.complex(u_re, u_im), torch.complex(lambda_re, lambda_im)
    expected = torch.stack([sum(eigenvalue ** (t - s) * u[s] for s in range(t + 1)) for t in range(20)])
    h_re, h_im = linear_recurrence(u_re, u_im, lambda_re, lambda_im, torch.arange(20), 20)
    torch.testing.assert_close(torch.complex(h_re, h_im), expected)


@pytest.mark.parametrize("recurrence", [linear_recurrence, linear_recurrence_loop])
def test_no_state_crosses_from_one_history_into_another(recurrence):
    lengths = [5, 1, 70, 3, 16]
    position = positions_of(lengths)
    longest = [max(lengths)] if recurrence is linear_recurrence else []
    inputs = random_inputs(len(position), torch.float64)
    h_re, h_im = recurrence(*inputs, position, *longest)
    end = 0
    for length in lengths:
        start, end = end, end + length
        for gradient in torch.autograd.grad((h_re + h_im)[start:end].sum(), inputs[:2], retain_graph=True):
            assert gradient[start:end].abs().min() > 0
            assert gradient[:start].count_nonzero() == gradient[end:].count_nonzero() == 0


def test_a_packed_history_has_the_states_that_it_has_alone():
    lengths = [4, 1, 60, 9]
    u_re, u_im, *eigenvalue = random_inputs(sum(lengths), torch.float64)
    packed = torch.complex(*linear_recurrence(u_re, u_im, *eigenvalue, positions_of(lengths), max(lengths)))
    alone = [
        torch.complex(*linear_recurrence(re, im, *eigenvalue, torch.arange(len(re)), len(re)))
        for re, im in zip(u_re.split(lengths), u_im.split(lengths), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone))


SCANS = [lru._scan_by_steps, lru._scan_by_doubling]  # of a CPU, of a GPU
LONG = [[1], [1, 1, 1], [64], [65, 1, 63], [1, 50, 2, 49, 1], [1000, 3, 1, 512, 513], [1, 2, 1000]]


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("dtype", "radius", "tolerance"), [(torch.float64, 0.999, 1e-11), (torch.float32, 0.9, 1e-5)])
@pytest.mark.parametrize("lengths", [*LONG, random_lengths(4), random_lengths(5)], ids=str)
def test_either_scan_has_the_values_and_gradients_of_the_plain_loop(
    monkeypatch, lengths, dtype, radius, tolerance, scan
):
    monkeypatch.setattr(lru, "_scan", scan)
    assert_fast_equals_loop(positions_of(lengths), max(lengths), dtype, radius, tolerance)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("lengths", [[50] * 8, [7, 1, 200, 30], [1000, 3]], ids=str)
def test_in_float32_on_a_ring_near_1_either_scan_errs_no_more_than_four_times_the_loop(monkeypatch, lengths, scan):
    monkeypatch.setattr(lru, "_scan", scan)
    position = positions_of(lengths)
    inputs = random_inputs(len(position), torch.float64, radius=0.99)
    narrow = [part.detach().float().requires_grad_() for part in inputs]
    exact = values_and_gradients(lambda *u: linear_recurrence_loop(*u, position), inputs)
    fast = values_and_gradients(lambda *u: linear_recurrence(*u, position, max(lengths)), narrow)
    loop = values_and_gradients(lambda *u: linear_recurrence_loop(*u, position), narrow)
    for f, p, e in zip(fast[:4], loop, exact, strict=False):  # the gradients of λ are few numbers, which err by luck
        assert (f - e).abs().mean() <= 4 * (p - e).abs().mean()


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0), ("meta", 1)])
def test_the_scan_that_waits_for_numbers_is_for_a_cpu_alone(monkeypatch, device, expected):
    called = []
    for place, scan in enumerate(SCANS):
        monkeypatch.setattr(lru, scan.__name__, lambda *arguments, place=place: called.append(place))
    lru._scan(torch.zeros(3, 2, dtype=torch.complex64, device=device), None, None, 3)
    assert called == [expected]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_a_scan_goes_along_every_history_one_way_or_the_other(lengths, scan, backwards):
    u_re, u_im, *eigenvalue = (part.detach() for part in random_inputs(sum(lengths), torch.float64))
    u, eigenvalue = torch.complex(u_re, u_im), torch.complex(*eigenvalue)
    expected = []
    for history in u.split(lengths):
        states = [torch.zeros_like(eigenvalue)]
        for token in history.flip(0) if backwards else history:
            states.append(token + eigenvalue * states[-1])
        states = torch.stack(states[1:])
        expected.append(states.flip(0) if backwards else states)
    found = scan(u.clone(), eigenvalue, positions_of(lengths), max(lengths), backwards)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-11, atol=1e-11)


def test_a_scan_by_doubling_takes_as_many_steps_as_the_longest_history_needs_and_more_change_nothing():
    position = positions_of([9, 3, 1])
    u_re, u_im, *eigenvalue = (part.detach() for part in random_inputs(13, torch.float64))
    u, eigenvalue = torch.complex(u_re, u_im), torch.complex(*eigenvalue)
    exact, rounded_up, too_few = (
        lru._scan_by_doubling(u.clone(), eigenvalue, position, longest) for longest in (9, 16, 8)
    )
    assert torch.equal(exact, rounded_up)
    assert not torch.equal(exact, too_few)


def test_the_lru_answers_for_some_tokens_as_it_does_for_all():
    layer, position, at = random_layer(6, bias=True), positions_of([4, 1, 7]), torch.tensor([3, 4, 11, 8])
    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    found = layer(x, position, 7, at)
    torch.testing.assert_close(found, layer(x, position, 7)[at])
    gradients = [torch.autograd.grad((y**2).sum(), x)[0] for y in (found, layer(x, position, 7)[at])]
    torch.testing.assert_close(*gradients)


def modulus_of(nu_log):
    return torch.exp(-torch.exp(nu_log.double()))


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 0.1), (0.1, 0.2), (0.5, 0.6), (0.0, 1.0), (0.9, 0.999)])
def test_eigenvalues_start_within_the_ring_and_finite(r_min, r_max):
    torch.manual_seed(0)
    nu_log, theta_log, gamma_log = ring_init(4000, r_min, r_max)
    assert all(part.isfinite().all() for part in (nu_log, theta_log, gamma_log))
    assert modulus_of(nu_log).min() >= r_min - 1e-6
    assert modulus_of(nu_log).max() <= r_max + 1e-6


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 0.1), (0.2, 0.3), (0.0, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_the_initialisation_is_finite_even_for_the_ends_of_what_a_uniform_draw_can_be(monkeypatch, r_min, r_max, draw):
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


def test_without_bias_the_layer_has_none():
    assert not [name for name, _ in LRU((4,), bias=False, r_min=0.0, r_max=0.1).named_parameters() if "bias" in name]
