"""The Matryoshka cross-entropy against its plain twin."""

from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model.loss
from model.loss import Factors, columns_multiplied_out, matryoshka_cross_entropy, matryoshka_cross_entropy_plain

CHUNK = 128  # positions at a time, about

SHAPES = [
    (1, 1, (1,)),
    (1, 3, (2, 5)),
    (7, 40, (8,)),
    (CHUNK, 30, (1, 2, 9)),
    (CHUNK + 1, 30, (4, 8, 16)),
    (3 * CHUNK - 5, 25, (3, 10, 11, 24)),
]  # labelled positions T, items N, sizes
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def hold(monkeypatch, case, positions):
    """Let the logits of so many positions be held at once."""
    _, table, _, sizes = case
    monkeypatch.setattr(model.loss, "LEAST", 1)
    monkeypatch.setattr(model.loss, "CHUNK_BYTES", positions * len(table) * len(sizes) * table.itemsize)


def random_case(shape, dtype=torch.float64, seed=0):
    """(z, item table, labels, sizes); labels repeat wherever there are more positions than items."""
    num_positions, num_items, sizes = shape
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_positions, sizes[-1], generator=generator, dtype=torch.float64)
    table = torch.randn(num_items + 1, sizes[-1], generator=generator, dtype=torch.float64)
    labels = torch.randint(1, num_items + 1, (num_positions,), generator=generator)
    return z.to(dtype).requires_grad_(), table.to(dtype).requires_grad_(), labels, sizes


def value_and_gradients(loss, case, reduction="mean", factor=1.0):
    z, table, labels, sizes = case
    value = loss(z, table, labels, sizes, reduction)
    return [value, *torch.autograd.grad(factor * value, (z, table))]


def assert_relatively_close(actual, expected, tolerance):
    """Equal up to `tolerance` times the largest expected value."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_has_the_value_and_gradients_of_a_cross_entropy_per_size(monkeypatch, shape, reduction, dtype, seed):
    case = random_case(shape, dtype, seed)
    hold(monkeypatch, case, CHUNK)
    fast = value_and_gradients(matryoshka_cross_entropy, case, reduction)
    plain = value_and_gradients(matryoshka_cross_entropy_plain, case, reduction)
    assert_relatively_close(fast, plain, TOLERANCE[dtype])


def test_the_plain_twin_averages_or_sums_one_cross_entropy_over_all_tokens_per_size():
    z, table, labels, _ = random_case((6, 9, (2, 5)))
    small = F.cross_entropy(z[:, :2] @ table[:, :2].T, labels)
    large = F.cross_entropy(z @ table.T, labels)
    torch.testing.assert_close(matryoshka_cross_entropy_plain(z, table, labels, (2, 5), "mean"), (small + large) / 2)
    torch.testing.assert_close(matryoshka_cross_entropy_plain(z, table, labels, (2, 5), "sum"), small + large)


def test_the_mean_over_sizes_is_the_default():
    z, table, labels, sizes = random_case((6, 9, (2, 5)))
    mean = matryoshka_cross_entropy_plain(z, table, labels, sizes, "mean")
    torch.testing.assert_close(matryoshka_cross_entropy(z, table, labels, sizes), mean)
    torch.testing.assert_close(matryoshka_cross_entropy_plain(z, table, labels, sizes), mean)


def test_positions_that_all_have_the_same_label_add_up():
    z, table, labels, sizes = random_case((20, 6, (3, 8)))
    case = z, table, torch.full_like(labels, 4), sizes
    plain = value_and_gradients(matryoshka_cross_entropy_plain, case)
    assert_relatively_close(value_and_gradients(matryoshka_cross_entropy, case), plain, 1e-12)


def test_the_begin_of_sequence_token_takes_part_in_the_softmax():
    z, table, labels, sizes = random_case((5, 9, (2, 5)))
    _, _, table_gradient = value_and_gradients(matryoshka_cross_entropy, (z, table, labels, sizes))
    assert table_gradient[0].abs().min() > 0


@pytest.mark.parametrize("chunk", [1, 3, 10, 17, 1000])
def test_the_size_of_a_chunk_does_not_change_the_result(monkeypatch, chunk):
    case = random_case((30, 12, (2, 5, 7)))
    plain = value_and_gradients(matryoshka_cross_entropy_plain, case)
    hold(monkeypatch, case, chunk)
    assert_relatively_close(value_and_gradients(matryoshka_cross_entropy, case), plain, 1e-12)


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor held that was made within."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_the_logits_of_more_than_a_chunk_of_positions_are_never_held(monkeypatch):
    num_positions, num_items, chunk = 40, 99, 4
    case = random_case((num_positions, num_items, (2, 5)))
    hold(monkeypatch, case, chunk)
    with LargestTensor() as fast:
        value_and_gradients(matryoshka_cross_entropy, case)
    with LargestTensor() as plain:
        value_and_gradients(matryoshka_cross_entropy_plain, case)
    assert plain.numbers == num_positions * (num_items + 1)
    held = chunk * (len(case[3]) + 2)  # of every size, and two more
    assert fast.numbers == max(held, case[1].shape[1]) * (num_items + 1)


@pytest.mark.parametrize("positions", range(1, 12))
@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("bytes_held", [1, 100, 350, 10_000])
def test_chunks_cover_every_position_once_within_their_bound_in_equal_shares(monkeypatch, positions, bytes_held, least):
    monkeypatch.setattr(model.loss, "CHUNK_BYTES", bytes_held)
    monkeypatch.setattr(model.loss, "LEAST", least)
    chunks = model.loss.row_chunks(positions, 100)
    covered = [list(range(positions))[chunk] for chunk in chunks]
    assert list(chain(*covered)) == list(range(positions))
    assert len({len(part) for part in covered[:-1]}) <= 1 and all(covered)
    assert len(covered[0]) <= max(least, bytes_held // 100)


def test_positions_without_a_label_count_for_nothing():
    z, table, labels, sizes = random_case((20, 9, (2, 5)))
    unlabelled = torch.tensor([0, 7, 8, 19])
    some = labels.index_fill(0, unlabelled, 0)
    fast = value_and_gradients(matryoshka_cross_entropy, (z, table, some, sizes))
    assert_relatively_close(fast, value_and_gradients(matryoshka_cross_entropy_plain, (z, table, some, sizes)), 1e-12)
    assert not fast[1][unlabelled].any()
    alone = (z[some > 0].detach().requires_grad_(), table, some[some > 0], sizes)
    value, z_gradient, table_gradient = value_and_gradients(matryoshka_cross_entropy, alone)
    assert_relatively_close([fast[0], fast[1][some > 0], fast[2]], [value, z_gradient, table_gradient], 1e-12)


def test_shares_of_a_batch_add_up_to_the_batch():
    z, table, labels, sizes = random_case((20, 9, (2, 5)))
    whole = value_and_gradients(matryoshka_cross_entropy, (z, table, labels, sizes))
    shares = [
        matryoshka_cross_entropy(z[part], table, labels[part], sizes, count=torch.tensor(20))
        for part in (slice(0, 13), slice(13, 20))
    ]
    total = shares[0] + shares[1]
    assert_relatively_close([total, *torch.autograd.grad(total, (z, table))], whole, 1e-12)


FACTORED = [
    (5, 40, (2, 4, 16), 9),  # few positions: wide increments stay a product
    (60, 12, (2, 5), 30),  # many: all are multiplied out
    (CHUNK + 3, 20, (1, 3, 40), 7),
]  # labelled positions T, items N, sizes, feature width F


def factored_case(shape, dtype, seed=0):
    """(z, features, weight, bias, labels, sizes)."""
    z, _, labels, sizes = random_case(shape[:3], dtype, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    features = torch.randn(shape[1] + 1, shape[3], generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(sizes[-1], shape[3], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(sizes[-1], generator=generator, dtype=torch.float64).to(dtype)
    return z, features, weight, bias, labels, sizes


@pytest.mark.parametrize("shape", FACTORED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_item_table_left_as_a_product_gives_what_it_gives_multiplied_out(monkeypatch, shape, dtype, seed):
    z, features, weight, bias, labels, sizes = factored_case(shape, dtype, seed)
    hold(monkeypatch, (z, features, labels, sizes), 50)
    fast = matryoshka_cross_entropy(z, Factors(features, weight), labels, sizes)
    plain = matryoshka_cross_entropy_plain(z, F.linear(features, weight, bias), labels, sizes)
    fast, plain = ([value, *torch.autograd.grad(value, (z, weight))] for value in (fast, plain))
    assert_relatively_close(fast, plain, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize(("shape", "expected"), list(zip(FACTORED, (4, 5, 3), strict=True)))
def test_columns_are_multiplied_out_where_that_costs_least(shape, expected):
    positions, _, sizes, features = shape
    assert columns_multiplied_out(positions, features, sizes) == expected
    for other in (0, *sizes):

        def multiplications(out):
            of_columns = out * (features + features + 3 * positions)
            return of_columns + sum(2 * features * positions for high in sizes if high > out)

        assert multiplications(expected) <= multiplications(other)


def test_the_gradients_follow_what_the_loss_is_multiplied_with():
    case = random_case((9, 11, (2, 6)))
    fast = value_and_gradients(matryoshka_cross_entropy, case, factor=-3.0)
    plain = value_and_gradients(matryoshka_cross_entropy_plain, case, factor=-3.0)
    assert_relatively_close(fast, plain, 1e-12)


def test_the_loss_reaches_z_and_item_table_that_come_from_the_same_weights():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 1, 9])
    gradients = [
        torch.autograd.grad(loss(weight[[1, 2, 3]].tanh(), weight, labels, (2, 6)), weight)
        for loss in (matryoshka_cross_entropy, matryoshka_cross_entropy_plain)
    ]
    assert_relatively_close(*gradients, 1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", FACTORED, ids=str)
def test_in_bfloat16_an_item_table_left_as_a_product_errs_no_more_than_twice_its_plain_twin(shape, seed):
    z, features, weight, bias, labels, sizes = factored_case(shape, torch.float64, seed)
    exact = matryoshka_cross_entropy_plain(z, F.linear(features, weight, bias), labels, sizes)
    exact = torch.autograd.grad(exact, (z, weight))
    z, weight, bias = (x.detach().float().requires_grad_() for x in (z, weight, bias))
    features = features.bfloat16()
    fast = matryoshka_cross_entropy(z, Factors(features, weight), labels, sizes)
    table = F.linear(features, weight.bfloat16(), bias.bfloat16())
    plain = matryoshka_cross_entropy_plain(z, table, labels, sizes)
    for f, p, e in zip(
        torch.autograd.grad(fast, (z, weight)), torch.autograd.grad(plain, (z, weight)), exact, strict=True
    ):
        assert f.dtype == torch.float32
        assert (f - e).abs().mean() <= 2 * (p - e).abs().mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_in_bfloat16_the_loss_errs_no_more_than_twice_its_plain_twin(shape, seed):
    z, table, labels, sizes = random_case(shape, torch.float64, seed)
    exact = value_and_gradients(matryoshka_cross_entropy_plain, (z, table, labels, sizes))
    narrow = (z.detach().float().requires_grad_(), table.detach().bfloat16().requires_grad_(), labels, sizes)
    fast = value_and_gradients(matryoshka_cross_entropy, narrow)
    plain = value_and_gradients(matryoshka_cross_entropy_plain, narrow)
    assert [part.dtype for part in fast] == [torch.float32, torch.float32, torch.bfloat16]
    assert fast[0].item() == pytest.approx(exact[0].item(), rel=1e-3)  # one number errs little by luck in either
    for f, p, e in zip(fast[1:], plain[1:], exact[1:], strict=True):
        assert (f - e).abs().mean() <= 2 * (p - e).abs().mean()


def test_memory_is_kept_on_a_cpu_alone_where_no_recording_writes_to_it(monkeypatch):
    monkeypatch.setattr(model.loss, "_held", {})
    model.loss.held_buffer((2, 3), torch.float32, torch.device("meta"))
    assert not model.loss._held
    small = model.loss.held_buffer((2, 3), torch.float32, torch.device("cpu"))
    for shape in ((6,), (2, 1), (0,)):
        assert model.loss.held_buffer(shape, torch.float32, torch.device("cpu")).untyped_storage().data_ptr() == (
            small.untyped_storage().data_ptr()
        )
    assert model.loss.held_buffer((7,), torch.float32, torch.device("cpu")).shape == (7,)
    assert model.loss.held_buffer((6,), torch.float64, torch.device("cpu")).dtype == torch.float64


def test_a_loss_computed_in_inference_mode_does_not_keep_a_later_one_from_training(monkeypatch):
    monkeypatch.setattr(model.loss, "_held", {})
    case = random_case((9, 11, (2, 6)))
    with torch.inference_mode():
        matryoshka_cross_entropy(*case)
    value_and_gradients(matryoshka_cross_entropy, case)
