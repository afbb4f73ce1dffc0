"""Scales and distillation of the sizes' losses, exact and sampled: against plain twins and by definition."""

import pytest
import torch
import torch.nn.functional as F

import model.loss
from model.extensions.objective import CROSS_ENTROPY, Objective, losses_plain
from model.extensions.sampled_loss import (
    NegativeSampler,
    sampled_matryoshka_cross_entropy,
    sampled_matryoshka_cross_entropy_plain,
)
from model.loss import Factors, matryoshka_cross_entropy, matryoshka_cross_entropy_plain

SIZES, NUM_ITEMS, POSITIONS = (2, 5, 12), 40, 30
LOSSES = ["exact", "sampled"]


def objective_of(scaled=True, distill=0.3):
    """An objective whose scales are all different."""
    log_scale = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64, requires_grad=True) if scaled else None
    return Objective(log_scale, distill)


ALL = {
    "all": objective_of(),
    "the paper's": CROSS_ENTROPY,
    "scale": objective_of(distill=0.0),
    "distillation": objective_of(scaled=False, distill=0.4),
    "distillation alone": objective_of(scaled=False, distill=1.0),
}


def random_case(dtype=torch.float64, seed=0):
    """(z, table, labels); some positions have no label."""
    generator = torch.Generator().manual_seed(seed)
    z, table = (
        torch.randn(n, SIZES[-1], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (POSITIONS, NUM_ITEMS + 1)
    )
    labels = torch.randint(1, NUM_ITEMS + 1, (POSITIONS,), generator=generator)
    labels[3::7] = 0
    return z, table, labels


def losses_of(kind, z, table, labels):
    """(fast, plain): functions of an objective, averaged over sizes."""
    if kind == "exact":
        return (
            lambda objective, **how: matryoshka_cross_entropy(z, table, labels, SIZES, objective=objective, **how),
            lambda objective: matryoshka_cross_entropy_plain(z, table, labels, SIZES, objective=objective),
        )
    torch.manual_seed(0)
    items, log_kq = NegativeSampler(labels.bincount(minlength=NUM_ITEMS + 1), 17).draw()
    assert (labels[:, None] == items).any()
    drawn = labels, items, log_kq.to(z.dtype), SIZES
    fast, plain = sampled_matryoshka_cross_entropy, sampled_matryoshka_cross_entropy_plain
    return (
        lambda objective, **how: fast(z, table[labels], table[items], *drawn, objective=objective, **how),
        lambda objective: plain(z, table[labels], table[items], *drawn, objective=objective),
    )


def with_gradients(value, z, table, objective=CROSS_ENTROPY):
    wanted = [z, table, *([] if objective.log_scale is None else [objective.log_scale])]
    return [value, *torch.autograd.grad(value, wanted)]


@pytest.mark.parametrize("held", [7, 1000])
@pytest.mark.parametrize("objective", ALL.values(), ids=ALL)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_and_gradients_are_those_of_the_plain_twin(monkeypatch, kind, objective, dtype, tolerance, held):
    z, table, labels = random_case(dtype)
    monkeypatch.setattr(model.loss, "LEAST", 1)
    monkeypatch.setattr(model.loss, "CHUNK_BYTES", held * len(SIZES) * (NUM_ITEMS + 1) * z.itemsize)
    fast, plain = (with_gradients(loss(objective), z, table, objective) for loss in losses_of(kind, z, table, labels))
    for f, p in zip(fast, plain, strict=True):
        assert (f - p).abs().max() <= tolerance * p.abs().max()
    assert not fast[1][labels == 0].any()


@pytest.mark.parametrize("kind", LOSSES)
def test_scales_of_one_without_distillation_are_the_papers_loss(kind):
    z, table, labels = random_case()
    same = Objective(torch.zeros(3, dtype=torch.float64))
    fast, plain = losses_of(kind, z, table, labels)
    expected = with_gradients(fast(CROSS_ENTROPY), z, table)
    for found in (fast(same), plain(same)):
        torch.testing.assert_close(with_gradients(found, z, table), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_sum_is_as_many_means_as_there_are_sizes_and_shares_of_a_batch_add_up(kind):
    z, table, labels = random_case()
    (fast, _), objective = losses_of(kind, z, table, labels), objective_of()
    torch.testing.assert_close(fast(objective, reduction="sum"), 3 * fast(objective))
    doubled = fast(objective, count=2 * (labels > 0).sum())
    torch.testing.assert_close(2 * doubled, fast(objective))


def test_a_target_is_part_label_and_part_what_the_largest_size_says_which_does_not_learn_from_it():
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    label = torch.tensor([1, 0, 5, 5])
    objective = Objective(distill=0.25)
    losses = losses_plain([small, large], label, label >= 0, objective)
    own, taught = F.cross_entropy(small, label), -(large.softmax(1) * small.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses, torch.stack([0.75 * own + 0.25 * taught, F.cross_entropy(large, label)]))
    (by_large,) = torch.autograd.grad(losses.sum(), large)
    torch.testing.assert_close(by_large, torch.autograd.grad(F.cross_entropy(large, label), large)[0])


def test_an_item_table_left_as_a_product_gives_what_it_gives_multiplied_out():
    z, _, labels = random_case()
    generator = torch.Generator().manual_seed(1)
    features, weight = (torch.randn(n, 90, generator=generator, dtype=torch.float64) for n in (NUM_ITEMS + 1, 12))
    weight, objective = weight.requires_grad_(), objective_of()
    fast = matryoshka_cross_entropy(z, Factors(features, weight), labels, SIZES, objective=objective)
    plain = matryoshka_cross_entropy_plain(z, features @ weight.T, labels, SIZES, objective=objective)
    fast, plain = (with_gradients(value, z, weight, objective) for value in (fast, plain))
    torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", LOSSES)
def test_sizes_that_do_not_end_at_the_width_and_an_unknown_reduction_are_refused(kind):
    z, table, labels = random_case()
    wider = torch.cat([z, z], dim=1)
    with pytest.raises(ValueError, match=r"the largest of the sizes \(2, 5, 12\) is not the width 24 of z"):
        losses_of(kind, wider, torch.cat([table, table], dim=1), labels)[0](CROSS_ENTROPY)
    with pytest.raises(ValueError, match="reduction 'max' is neither 'mean' nor 'sum'"):
        losses_of(kind, z, table, labels)[0](CROSS_ENTROPY, reduction="max")


@pytest.mark.parametrize("kind", LOSSES)
def test_without_gradients_the_value_is_the_same(kind):
    z, table, labels = random_case()
    objective = objective_of()
    expected = losses_of(kind, z, table, labels)[0](objective)
    with torch.no_grad():
        assert losses_of(kind, z, table, labels)[0](objective) == expected


@pytest.mark.parametrize("kind", LOSSES)
def test_logits_too_large_to_exponentiate_give_a_finite_loss_and_finite_gradients(kind):
    z, table, labels = random_case(torch.float32)
    z, objective = (1000 * z).detach().requires_grad_(), objective_of()
    found = with_gradients(losses_of(kind, z, table, labels)[0](objective), z, table, objective)
    assert all(part.isfinite().all() for part in found)
