"""The Matryoshka cross-entropy against its plain twin."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model.loss
from model.loss import CHUNK, matryoshka_cross_entropy, matryoshka_cross_entropy_plain

SHAPES = [
    (1, 1, (1,)),
    (1, 3, (2, 5)),
    (7, 40, (8,)),
    (CHUNK, 30, (1, 2, 9)),
    (CHUNK + 1, 30, (4, 8, 16)),
    (3 * CHUNK - 5, 25, (3, 10, 11, 24)),
]  # labelled positions T, items N, sizes
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


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
def test_the_loss_has_the_value_and_gradients_of_a_cross_entropy_per_size(shape, reduction, dtype, seed):
    case = random_case(shape, dtype, seed)
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
    monkeypatch.setattr(model.loss, "CHUNK", chunk)
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
    monkeypatch.setattr(model.loss, "CHUNK", chunk)
    with LargestTensor() as fast:
        value_and_gradients(matryoshka_cross_entropy, case)
    with LargestTensor() as plain:
        value_and_gradients(matryoshka_cross_entropy_plain, case)
    assert plain.numbers == num_positions * (num_items + 1)
    assert fast.numbers <= max(chunk, case[1].shape[1]) * (num_items + 1)


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


def test_without_gradients_the_value_is_the_same():
    z, table, labels, sizes = random_case((CHUNK + 3, 11, (2, 6)))
    value = matryoshka_cross_entropy(z.detach(), table.detach(), labels, sizes)
    assert not value.requires_grad
    torch.testing.assert_close(value, matryoshka_cross_entropy_plain(z, table, labels, sizes).detach())


def test_logits_too_large_to_exponentiate_give_a_finite_loss():
    z, table, labels, sizes = random_case((9, 11, (2, 6)), torch.float32)
    case = (1000 * z).detach().requires_grad_(), table, labels, sizes
    fast = value_and_gradients(matryoshka_cross_entropy, case)
    assert all(part.isfinite().all() for part in fast)
    assert_relatively_close(fast, value_and_gradients(matryoshka_cross_entropy_plain, case), 1e-4)


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
