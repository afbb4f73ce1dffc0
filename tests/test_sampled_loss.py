"""The sampled Matryoshka cross-entropy: against its plain twin, and against the whole catalogue it stands for."""

import math

import pytest
import torch
import torch.nn.functional as F

import model.loss
from model import matryoshka_cross_entropy
from model.extensions.sampled_loss import (
    NegativeSampler,
    sampled_matryoshka_cross_entropy,
    sampled_matryoshka_cross_entropy_plain,
)

SIZES = (2, 5, 12)


def random_case(num_positions=30, num_items=40, num_negatives=17, dtype=torch.float64, seed=0):
    """(z, table, labels, sampler); some positions have no label, and some labels are drawn."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_positions, SIZES[-1], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    table = torch.randn(num_items + 1, SIZES[-1], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(1, num_items + 1, (num_positions,), generator=generator)
    labels[3::7] = 0
    return z, table, labels, NegativeSampler(labels.bincount(minlength=num_items + 1), num_negatives)


def value_and_gradients(loss, z, table, labels, items, log_kq):
    value = loss(z, table[labels], table[items], labels, items, log_kq, SIZES)
    return [value, *torch.autograd.grad(value, (z, table))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("held", [1, 8, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_are_those_of_the_plain_twin(monkeypatch, dtype, tolerance, held, seed):
    z, table, labels, sampler = random_case(dtype=dtype, seed=seed)
    torch.manual_seed(seed)
    items, log_kq = sampler.draw()
    assert (labels[:, None] == items).any()
    monkeypatch.setattr(model.loss, "LEAST", 1)
    monkeypatch.setattr(model.loss, "CHUNK_BYTES", held * len(SIZES) * (len(items) + 1) * z.itemsize)
    log_kq = log_kq.to(dtype)
    fast, plain = (
        value_and_gradients(loss, z, table, labels, items, log_kq)
        for loss in (sampled_matryoshka_cross_entropy, sampled_matryoshka_cross_entropy_plain)
    )
    for f, p in zip(fast, plain, strict=True):
        assert f.dtype == p.dtype
        assert (f - p).abs().max() <= tolerance * p.abs().max()
    assert not fast[1][labels == 0].any()


@pytest.mark.parametrize("seed", range(3))
def test_in_bfloat16_it_errs_no_more_than_twice_its_plain_twin(seed):
    z, table, labels, sampler = random_case(200, 60, 50, seed=seed)
    items, log_kq = sampler.draw()
    exact = value_and_gradients(sampled_matryoshka_cross_entropy_plain, z, table, labels, items, log_kq)
    z, table = z.detach().float().requires_grad_(), table.detach().bfloat16().requires_grad_()
    fast = value_and_gradients(sampled_matryoshka_cross_entropy, z, table, labels, items, log_kq)
    narrow = z.detach().bfloat16().requires_grad_()
    plain = value_and_gradients(sampled_matryoshka_cross_entropy_plain, narrow, table, labels, items, log_kq)
    for f, p, e in zip(fast[1:], plain[1:], exact[1:], strict=True):
        assert (f - e).abs().mean() <= 2 * (p - e).abs().mean()


def test_the_sum_over_sizes_and_shares_of_a_batch():
    z, table, labels, sampler = random_case()
    items, log_kq = sampler.draw()

    def of(part, reduction="mean", count=None):
        arguments = (table[labels[part]], table[items], labels[part], items, log_kq, SIZES, reduction, count)
        return sampled_matryoshka_cross_entropy(z[part], *arguments)

    whole, count = of(slice(None)), (labels > 0).sum()
    torch.testing.assert_close(of(slice(None), "sum"), len(SIZES) * whole)
    torch.testing.assert_close(of(slice(0, 9), count=count) + of(slice(9, 30), count=count), whole)


def test_draws_follow_the_distribution_and_never_are_token_0():
    sampler = NegativeSampler(torch.tensor([99, 6, 0, 3, 1]), 200_000)
    expected = [(6 / 10 + 1 / 4) / 2, 1 / 8, (3 / 10 + 1 / 4) / 2, (1 / 10 + 1 / 4) / 2]
    assert sampler.q.tolist() == pytest.approx(expected)
    torch.manual_seed(0)
    items, log_kq = sampler.draw()
    share = items.bincount(minlength=5).double() / len(items)
    assert share.tolist() == pytest.approx([0, *expected], abs=0.005)
    assert log_kq.tolist()[:50] == pytest.approx([math.log(200_000 * expected[i - 1]) for i in items[:50]], rel=1e-5)


def test_many_draws_have_the_sum_of_the_whole_catalogue_and_its_gradients():
    z, table, labels, sampler = random_case(num_negatives=400_000)
    z, table = (0.3 * x.detach() for x in (z, table))
    labels = labels.clamp_min(1)
    z, table = z.requires_grad_(), table.requires_grad_()
    torch.manual_seed(0)
    sampled = value_and_gradients(sampled_matryoshka_cross_entropy, z, table, labels, *sampler.draw())
    # Token 0, which takes part in the exact loss, is never drawn.
    value = sum(F.cross_entropy(z[:, :m] @ table[1:, :m].T, labels - 1) for m in SIZES) / len(SIZES)
    exact = [value, *torch.autograd.grad(value, (z, table))]
    for s, e in zip(sampled, exact, strict=True):
        assert (s - e).abs().max() <= 0.02 * e.abs().max()


def test_without_the_correction_it_would_be_another_loss():
    z, table, labels, sampler = random_case(num_negatives=100_000)
    labels = labels.clamp_min(1)
    items, log_kq = sampler.draw()
    with_it, without = (
        sampled_matryoshka_cross_entropy(z, table[labels], table[items], labels, items, c, SIZES).item()
        for c in (log_kq, torch.zeros_like(log_kq))
    )
    exact = matryoshka_cross_entropy(z, table, labels, SIZES).item()
    assert abs(with_it - exact) < 0.1 < abs(without - exact)


def test_the_ends_of_what_a_uniform_draw_can_be_are_items(monkeypatch):
    sampler = NegativeSampler(torch.tensor([5, 1, 1]), 3)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.tensor([0.0, 0.5, 1.0], **options))
    assert sampler.draw()[0].tolist() == [1, 2, 2]  # rounding may make 1 of what is just below it


def test_in_bfloat16_a_labels_own_logit_and_its_gradient_stay_in_float32():
    z, table, labels, sampler = random_case(dtype=torch.float32)
    items, log_kq = sampler.draw()
    own, labels = table[labels].detach().requires_grad_(), labels.clamp_min(1)
    loss = sampled_matryoshka_cross_entropy(z, own, table[items].bfloat16(), labels, items, log_kq, (SIZES[-1],))
    (gradient,) = torch.autograd.grad(loss, own)
    assert gradient.dtype == torch.float32
    cosine = F.cosine_similarity(gradient.double(), z.detach().double(), dim=1)  # it is z, times a number
    assert (cosine + 1).abs().max() < 1e-9
