"""The sampled loss: its draws, and the whole catalogue's loss that it estimates. Twins: tests/test_loss.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.extensions.sampled_loss import NegativeSampler, Sample, sampled_matryoshka_cross_entropy

SIZES = (2, 5, 12)


def random_case(num_negatives=17, dtype=torch.float64):
    """(z, table, labels, sampler)."""
    generator = torch.Generator().manual_seed(0)
    z, table = (0.3 * torch.randn(n, SIZES[-1], generator=generator, dtype=dtype) for n in (30, 41))
    labels = torch.randint(1, 41, (30,), generator=generator)
    return (
        z.requires_grad_(),
        table.requires_grad_(),
        labels,
        NegativeSampler(labels.bincount(minlength=41), num_negatives),
    )


def test_draws_follow_the_distribution_and_never_are_token_0():
    sampler = NegativeSampler(torch.tensor([99, 6, 0, 3, 1]), 200_000)
    expected = [(6 / 10 + 1 / 4) / 2, 1 / 8, (3 / 10 + 1 / 4) / 2, (1 / 10 + 1 / 4) / 2]
    assert sampler.q.tolist() == pytest.approx(expected)
    torch.manual_seed(0)
    items, log_kq = sampler.draw()
    share = items.bincount(minlength=5).double() / len(items)
    assert share.tolist() == pytest.approx([0, *expected], abs=0.005)
    assert log_kq.tolist()[:50] == pytest.approx([math.log(200_000 * expected[i - 1]) for i in items[:50]], rel=1e-5)


def test_the_ends_of_a_uniform_draw_give_items(monkeypatch):
    sampler = NegativeSampler(torch.tensor([5, 1, 1]), 3)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.tensor([0.0, 0.5, 1.0], **options))
    assert sampler.draw()[0].tolist() == [1, 2, 2]  # rounding may turn a number just below 1 into 1


def test_many_draws_give_the_whole_catalogues_loss_and_gradients():
    z, table, labels, sampler = random_case(num_negatives=400_000)
    torch.manual_seed(0)
    items, log_kq = sampler.draw()
    sampled = sampled_matryoshka_cross_entropy(z, Sample(table[labels], table[items], items, log_kq), labels, SIZES)
    # Without token 0, which takes part in the exact loss but is never drawn.
    exact = sum(F.cross_entropy(z[:, :m] @ table[1:, :m].T, labels - 1) for m in SIZES)
    for s, e in zip(*([loss, *torch.autograd.grad(loss, (z, table))] for loss in (sampled, exact)), strict=True):
        assert (s - e).abs().max() <= 0.02 * e.abs().max()


def test_in_bfloat16_a_labels_own_logit_and_its_gradient_stay_in_float32():
    z, table, labels, sampler = random_case(dtype=torch.float32)
    items, log_kq = sampler.draw()
    own = table[labels].detach().requires_grad_()
    loss = sampled_matryoshka_cross_entropy(
        z, Sample(own, table[items].bfloat16(), items, log_kq), labels, (SIZES[-1],)
    )
    (gradient,) = torch.autograd.grad(loss, own)
    assert gradient.dtype == torch.float32
    cosine = F.cosine_similarity(gradient.double(), z.detach().double(), dim=1)  # the gradient is a multiple of z
    assert (cosine + 1).abs().max() < 1e-9
