"""The losses: each fast twin against its plain twin, over an item table, its factors, and a sample of it."""

from itertools import accumulate, chain, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.extensions.objective import CROSS_ENTROPY, Objective
from model.extensions.sampled_loss import SAMPLED_LOSSES, NegativeSampler, Sample
from model.fast import logits
from model.fast.cross_entropy import columns_multiplied_out
from model.items import Factors
from model.loss import LOSSES

KINDS = ["table", "factors", "V of the first size", "V of all sizes", "sample"]
SHAPE = (30, 40, (2, 5, 12), 9)  # positions T, items N, sizes, feature width F
FEW_POSITIONS = (5, 40, (2, 4, 16), 9)  # wide increments stay a product
MANY_POSITIONS = (60, 12, (2, 5), 30)  # all columns are multiplied out
LOG_SCALE = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
OBJECTIVES = {
    "the paper's": CROSS_ENTROPY,
    "scale": Objective(LOG_SCALE),
    "distillation": Objective(distill=0.4),
    "distillation alone": Objective(distill=1.0),
    "both": Objective(LOG_SCALE, 0.3),
}


def losses_of(kind):
    return SAMPLED_LOSSES if kind == "sample" else LOSSES


def random_case(kind, shape=SHAPE, dtype=torch.float64, products=None, seed=0):
    """((z, item table, labels, sizes), leaves); some positions have no label. products: dtype of the products."""
    positions, num_items, sizes, width = shape
    generator, products = torch.Generator().manual_seed(seed), products or dtype

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    z, labels = draw(positions, sizes[-1]), torch.randint(1, num_items + 1, (positions,), generator=generator)
    labels[3::7] = 0
    if kind in ("table", "sample"):
        E = draw(num_items + 1, sizes[-1])
        if kind == "table":
            return (z, E.to(products), labels, sizes), [z, E]
        torch.manual_seed(seed)
        items, log_kq = NegativeSampler(labels.bincount(minlength=num_items + 1), 17).draw()
        assert (labels[:, None] == items).any()
        return (z, Sample(E[labels], E[items].to(products), items, log_kq.to(dtype)), labels, sizes), [z, E]
    features, weight = draw(num_items + 1, width).detach().to(products), draw(sizes[-1], width)
    if kind == "factors":
        return (z, Factors(features, weight), labels, sizes), [z, weight]
    V = draw(num_items + 1, sizes[0] if kind == "V of the first size" else sizes[-1])
    return (z, Factors(features, weight, V), labels, sizes), [z, weight, V]


def value_and_gradients(loss, case, leaves, objective=CROSS_ENTROPY, **options):
    value = loss(*case, objective=objective, **options)
    wanted = [*leaves, *([] if objective.log_scale is None else [objective.log_scale])]
    return [value, *torch.autograd.grad(-3 * value, wanted, retain_graph=True)]


def hold(monkeypatch, case, positions):
    """Keep the logits of so many positions in memory at once."""
    z, table, _, sizes = case
    columns = (
        len(table.items) + 1 if isinstance(table, Sample) else len(table[0] if isinstance(table, tuple) else table)
    )
    monkeypatch.setattr(logits, "LEAST", 1)
    monkeypatch.setattr(logits, "CHUNK_BYTES", positions * columns * len(sizes) * z.itemsize)


def assert_relatively_close(actual, expected, tolerance):
    """Equal up to `tolerance` times the largest expected value."""
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert (a - e).abs().max() <= tolerance * e.abs().max()


def assert_twins(kind, case, leaves, objective=CROSS_ENTROPY, tolerance=1e-12):
    fast, plain = (value_and_gradients(losses_of(kind)[name], case, leaves, objective) for name in ("fast", "plain"))
    assert_relatively_close(fast, plain, tolerance)
    assert not fast[1][case[2] == 0].any()  # of z, at positions without a label


# ----------------------------------------------------------------------------------------------------------- the twins


@pytest.mark.parametrize("held", [7, 1000])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_loss_has_the_value_and_gradients_of_the_plain_one(monkeypatch, kind, objective, held):
    case, leaves = random_case(kind)
    hold(monkeypatch, case, held)
    assert_twins(kind, case, leaves, objective)


@pytest.mark.parametrize("shape", [FEW_POSITIONS, MANY_POSITIONS, (131, 20, (1, 3, 40), 7), (3, 8, (5,), 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_twins_agree_in_either_precision_whatever_stays_a_product(monkeypatch, kind, shape, dtype, tolerance):
    case, leaves = random_case(kind, shape, dtype)
    hold(monkeypatch, case, 50)
    assert_twins(kind, case, leaves, tolerance=tolerance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_the_fast_gradients_err_no_more_than_twice_the_plain_ones(kind, seed):
    shape = (131, 60, (1, 3, 40), 7)
    exact = value_and_gradients(losses_of(kind)["plain"], *random_case(kind, shape, seed=seed))
    narrow = random_case(kind, shape, torch.float32, torch.bfloat16, seed)
    fast, plain = (value_and_gradients(losses_of(kind)[name], *narrow) for name in ("fast", "plain"))
    assert all(part.dtype == torch.float32 for part in fast)
    for f, p, e in zip(fast[1:], plain[1:], exact[1:], strict=True):
        assert (f - e).abs().mean() <= 2 * (p - e).abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_value_is_the_same(kind):
    case, _ = random_case(kind)
    expected = losses_of(kind)["fast"](*case)
    with torch.no_grad():
        assert losses_of(kind)["fast"](*case) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_logits_too_large_to_exponentiate_give_a_finite_loss_and_finite_gradients(kind):
    (z, *rest), (_, *leaves) = random_case(kind, dtype=torch.float32)
    z = (1000 * z).detach().requires_grad_()
    found = value_and_gradients(losses_of(kind)["fast"], (z, *rest), [z, *leaves], OBJECTIVES["both"])
    assert all(part.isfinite().all() for part in found)


# ---------------------------------------------------------------------------------- both twins, by what they promise


both = pytest.mark.parametrize("name", ["fast", "plain"])


@both
def test_the_loss_is_the_sum_or_mean_of_one_cross_entropy_over_all_tokens_per_size(name):
    (z, table, labels, sizes), _ = random_case("table")
    of = [F.cross_entropy((z[:, :m] @ table[:, :m].T)[labels > 0], labels[labels > 0]) for m in sizes]
    torch.testing.assert_close(LOSSES[name](z, table, labels, sizes), sum(of))
    torch.testing.assert_close(LOSSES[name](z, table, labels, sizes, reduction="mean"), sum(of) / 3)


def test_factors_multiply_out_to_the_projection_plus_V_in_the_first_dimensions():
    (_, factors, _, _), _ = random_case("V of the first size")
    expected = F.linear(factors.features, factors.weight)
    expected[:, :2] += factors.embedding
    torch.testing.assert_close(factors.table(), expected)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_a_batch_add_up_to_the_batch(kind, name):
    (z, table, labels, sizes), _ = random_case(kind)
    loss, count = losses_of(kind)[name], labels.count_nonzero()

    def share(part):
        own = table._replace(own=table.own[part]) if kind == "sample" else table
        return loss(z[part], own, labels[part], sizes, count=count)

    whole = loss(z, table, labels, sizes)
    torch.testing.assert_close(share(slice(0, 13)) + share(slice(13, None)), whole)
    assert share(slice(3, 4)) == 0  # no label


@both
@pytest.mark.parametrize("kind", ["table", "sample"])
def test_sizes_that_do_not_end_at_the_width_and_an_unknown_reduction_are_refused(kind, name):
    (z, table, labels, sizes), _ = random_case(kind)
    with pytest.raises(ValueError, match=r"the largest of the sizes \(2, 5\) is not the width 12 of z"):
        losses_of(kind)[name](z, table, labels, sizes[:-1])
    with pytest.raises(ValueError, match="reduction 'max' is neither 'mean' nor 'sum'"):
        losses_of(kind)[name](z, table, labels, sizes, reduction="max")


# ----------------------------------------------------------------------------------------- what makes the fast one fast


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor made within."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_the_logits_of_more_than_a_chunk_of_positions_are_never_in_memory(monkeypatch):
    positions, num_items, chunk = 40, 99, 4
    case, leaves = random_case("table", (positions, num_items, (2, 5), 0))
    hold(monkeypatch, case, chunk)
    found = {}
    for name in ("fast", "plain"):
        with LargestTensor() as largest:
            value_and_gradients(LOSSES[name], case, leaves)
        found[name] = largest.numbers
    buffers = chunk * (len(case[3]) + 2)  # logits of every size, and two more
    assert found == {"fast": buffers * (num_items + 1), "plain": positions * (num_items + 1)}


@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("bytes_held", [1, 350, 10_000])
def test_chunks_cover_every_position_once_within_their_bound_in_equal_shares(monkeypatch, bytes_held, least):
    monkeypatch.setattr(logits, "CHUNK_BYTES", bytes_held)
    monkeypatch.setattr(logits, "LEAST", least)
    for positions in range(1, 12):
        covered = [list(range(positions))[chunk] for chunk in logits.row_chunks(positions, 100)]
        assert list(chain(*covered)) == list(range(positions))
        assert len({len(part) for part in covered[:-1]}) <= 1 and all(covered)
        assert len(covered[0]) <= max(least, bytes_held // 100)


def multiplications(positions, width, sizes, out, embedded):
    """Per item, with a V in the first `embedded` dimensions and the first `out` columns multiplied out."""
    total = 0
    for low, high in pairwise((0, *sizes)):
        if high <= max(out, embedded):
            total += 3 * positions * (high - low)  # logits, and the gradients of both factors
        total += 2 * width * (high - low) if high <= out else 2 * width * positions
    return total


def test_columns_are_multiplied_out_where_that_costs_least_by_counting_every_product():
    random = torch.Generator().manual_seed(0)
    for _ in range(300):
        positions, width, *parts = torch.randint(1, 200, (6,), generator=random).tolist()
        sizes = tuple(accumulate(parts))
        for embedded in (0, *sizes):
            costs = {out: multiplications(positions, width, sizes, out, embedded) for out in (0, *sizes)}
            assert costs[columns_multiplied_out(positions, width, sizes, embedded)] == min(costs.values())


def test_memory_is_reused_on_a_cpu_alone_where_no_cuda_graph_writes_to_it(monkeypatch):
    monkeypatch.setattr(logits, "_buffers", {})
    logits.reused_buffer((2, 3), torch.float32, torch.device("meta"))
    assert not logits._buffers
    found = [logits.reused_buffer(shape, torch.float32, torch.device("cpu")) for shape in ((2, 3), (6,), (2, 1))]
    assert len({buffer.untyped_storage().data_ptr() for buffer in found}) == 1
    assert logits.reused_buffer((7,), torch.float32, torch.device("cpu")).shape == (7,)
    assert logits.reused_buffer((6,), torch.float64, torch.device("cpu")).dtype == torch.float64


def test_a_loss_computed_in_inference_mode_does_not_keep_a_later_one_from_training(monkeypatch):
    monkeypatch.setattr(logits, "_buffers", {})
    case, leaves = random_case("table")
    with torch.inference_mode():
        LOSSES["fast"](*case)
    value_and_gradients(LOSSES["fast"], case, leaves)
