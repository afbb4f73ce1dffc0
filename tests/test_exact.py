"""Exact scores against fractions, and counts of them against ranks of all scores at once."""

import math
from fractions import Fraction

import pytest
import torch

from trainer.exact import count_ahead, exact_scores, longest_row, on_grid
from trainer.metrics import target_ranks

INF, NAN = math.inf, math.nan


def random_vectors(*shape, seed=0):
    """Vectors of very different lengths, with values of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 10 ** torch.randn(*shape, generator=generator)
    return x * 10 ** torch.randn(shape[0], 1, generator=generator)


def ranks_by_counting(z, rows, targets, rounding=0.0, chunk=5):
    """The ranks that count_ahead finds in chunks, with float32 scores off by `rounding` of what they may be off by."""
    target = exact_scores(z, rows[targets])
    counts = torch.zeros(2, len(z))
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        off = z.shape[1] * 2**-24 * z.norm(dim=1)[:, None] * part.norm(dim=1)
        scores = z @ part.T + (rounding * off * torch.randn(off.shape).sign() if rounding else 0.0)
        here = (targets >= start) & (targets < start + len(part))
        scores[here, targets[here] - start] = -INF
        buffers = torch.empty(2, *scores.shape)
        counts += torch.stack(count_ahead(scores, target, z, part, longest_row(part), buffers))
    return 1 + counts[0] + counts[1] / 2


@pytest.mark.parametrize("dim", [1, 8, 100, 512, 1024])
@pytest.mark.parametrize("alike", [False, True], ids=["of all sizes", "with the largest sums"])
def test_scores_of_vectors_on_the_grid_are_exact_in_any_order(dim, alike):
    torch.manual_seed(0)
    z, rows = on_grid(random_vectors(3, dim)), on_grid(random_vectors(3, dim, seed=1))
    if alike:
        z, rows = (on_grid(1 - torch.rand(3, dim) / 100) for _ in range(2))
    pairs = zip(z.tolist(), rows.tolist(), strict=True)
    expected = [sum(Fraction(a) * Fraction(b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    order = torch.randperm(dim)
    product = (z.double() @ rows.double().T).diag()
    for found in (exact_scores(z, rows), exact_scores(z[:, order], rows[:, order]), product):
        assert [Fraction(score) for score in found.tolist()] == expected


@pytest.mark.parametrize(("dim", "bits"), [(8, 22), (512, 22), (1024, 21)])
def test_the_grid_is_as_fine_as_the_bits_say(dim, bits):
    x = random_vectors(50, dim)
    largest = x.abs().amax(dim=1, keepdim=True)
    assert ((on_grid(x) - x).abs() <= largest * 2**-bits).all()
    assert torch.equal(on_grid(on_grid(x)), on_grid(x))


def test_numbers_that_are_not_finite_stay_and_do_not_change_their_neighbours():
    x = torch.tensor([[0.3, NAN, -0.7], [0.3, INF, -0.7], [0.3, 0.0, -0.7]])
    found = on_grid(x)
    assert torch.equal(found[0].isnan(), x[0].isnan()) and found[1, 1] == INF
    assert torch.equal(found[:, [0, 2]], found[2, [0, 2]].expand(3, 2))


@pytest.mark.parametrize("spread", [1.0, 1e-6, 0.0], ids=["far apart", "within rounding", "equal"])
@pytest.mark.parametrize("rounding", [0.0, 1.0], ids=["as computed", "rounded as badly as possible"])
def test_counted_ranks_are_those_of_all_exact_scores(spread, rounding):
    torch.manual_seed(0)
    z, rows = torch.randn(20, 12), 1 + spread * torch.randn(40, 12)
    z[:, 11] = 0
    rows[::3, 11] = 100  # longer, so rounded worse, with scores like the others'
    rows[10:15] = rows[3]
    z, rows = on_grid(z), on_grid(rows)
    targets = torch.arange(20)
    expected = target_ranks(z.double() @ rows.double().T, targets)
    assert ranks_by_counting(z, rows, targets, rounding).tolist() == expected.tolist()
    assert (expected % 1 == 0.5).any()


def test_a_score_that_is_not_a_number_counts_as_ahead_and_its_target_ranks_last():
    z, rows = on_grid(torch.ones(1, 2)), on_grid(torch.tensor([[0.0, 1.0], [NAN, 0.0], [2.0, 2.0], [0.0, 0.0]]))
    assert [ranks_by_counting(z, rows, torch.tensor([target])).item() for target in range(4)] == [3, 5, 2, 4]


def test_infinite_scores_tie_with_each_other_but_not_with_items_that_are_no_candidates():
    z, rows = on_grid(torch.ones(1, 2)), on_grid(torch.tensor([[0.0, -INF], [INF, 0.0], [1.0, INF], [3.0, 0.0]]))
    assert [ranks_by_counting(z, rows, torch.tensor([target])).item() for target in range(4)] == [4, 1.5, 1.5, 3]
