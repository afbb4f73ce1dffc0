"""The losses' options beyond the paper, by definition: scales of the logits, and distillation between sizes."""

import pytest
import torch
import torch.nn.functional as F

from model.extensions.objective import CROSS_ENTROPY, Objective, losses_plain
from tests.test_loss import losses_of, random_case, value_and_gradients


@pytest.mark.parametrize("kind", ["table", "sample"])
@pytest.mark.parametrize("name", ["fast", "plain"])
def test_scales_of_one_without_distillation_are_the_papers_loss(kind, name):
    case, leaves = random_case(kind)
    same = Objective(torch.zeros(3, dtype=torch.float64, requires_grad=True), 0.0)
    *found, _ = value_and_gradients(losses_of(kind)[name], case, leaves, same)
    expected = value_and_gradients(losses_of(kind)["plain"], case, leaves, CROSS_ENTROPY)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_target_is_part_label_and_part_largest_size_which_gets_no_gradient_from_it():
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    label = torch.tensor([1, 0, 5, 5])
    losses = losses_plain([small, large], label, label >= 0, Objective(distill=0.25))
    own = F.cross_entropy(small, label, reduction="sum")
    taught = -(large.softmax(1) * small.log_softmax(1)).sum()
    of_large = F.cross_entropy(large, label, reduction="sum")
    torch.testing.assert_close(losses, torch.stack([0.75 * own + 0.25 * taught, of_large]))
    by_large, expected = (torch.autograd.grad(loss, large)[0] for loss in (losses.sum(), of_large))
    torch.testing.assert_close(by_large, expected)
