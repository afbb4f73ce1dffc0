"""Train once, deploy at any size: a slice is a model of its own that scores as the full model's prefix."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import ModelSettings
from dataloader import eval_batches, eval_rows
from model import FMRLRec, count_parameters, slice_model
from tests.made_up import as_sequences, with_random_weights
from trainer.evaluation import evaluate

NUM_ITEMS, MAX_LEN, KS = 40, 10, (1, 5, 10)
SIZE_LISTS = [tuple(sorted(random.Random(seed).sample(range(1, 48), k=seed + 2))) for seed in (0, 3)]
CPU = torch.device("cpu")


def random_model(sizes, branch="both", use_bias=True, seed=0, **options):
    """A model without zeros or ones among its weights, not even where the mask hides them."""
    torch.manual_seed(seed)
    features = torch.randn(NUM_ITEMS, 9) if branch == "both" else None
    settings = ModelSettings(mrl_hidden_sizes=sizes, lru_use_bias=use_bias, lru_r_min=0.3, lru_r_max=0.9, **options)
    return with_random_weights(FMRLRec(NUM_ITEMS, features, settings)).eval()


def random_rows(num_users=15):
    random = np.random.default_rng(0)
    histories = [random.integers(1, NUM_ITEMS + 1, size=length) for length in random.integers(3, 25, size=num_users)]
    return eval_rows(as_sequences(histories), MAX_LEN, "test")


def prefix_scores(model, size):
    """Scores of all items for every user from the first `size` dimensions."""
    (batch,) = eval_batches(random_rows(), 100, CPU)
    table = model.item_table()
    z = model.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]
    return (z[:, :size] @ table[:, :size].T).detach()


def assert_scores_equal(small, large, size):
    expected = prefix_scores(large, size)
    assert (prefix_scores(small, size) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("branch", ["both", "id"])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("sizes", SIZE_LISTS, ids=str)
def test_a_slice_scores_as_the_full_models_prefix(sizes, post_norm, use_bias, branch):
    model = random_model(sizes, branch, use_bias, post_norm=post_norm)
    for size in sizes:
        assert_scores_equal(slice_model(model, size), model, size)


@pytest.mark.parametrize("branch", ["both", "id"])
@pytest.mark.parametrize("sizes", SIZE_LISTS, ids=str)
def test_a_slice_has_the_metrics_of_the_full_models_prefix(sizes, branch):
    model, rows = random_model(sizes, branch), random_rows()
    expected = evaluate(model, rows, sizes=sizes, batch_size=4, ks=KS)
    for size in sizes:
        small = slice_model(model, size)
        assert evaluate(small, rows, sizes=(size,), batch_size=4, ks=KS) == {size: expected[size]}


@pytest.mark.parametrize("by_way_of", [20, 33])
@pytest.mark.parametrize("size", [8, 20])
@pytest.mark.parametrize("branch", ["both", "id"])
def test_a_slice_or_slice_of_a_slice_keeps_the_top_left_of_every_weight(branch, size, by_way_of):
    model = random_model((3, 8, 20, 33), branch, dropout_from=2)
    small = slice_model(slice_model(model, by_way_of), size)
    assert small.settings == replace(model.settings, mrl_hidden_sizes=(3, 8, 20)[: 2 + (size == 20)])
    small = small.state_dict()
    for name, weight in model.state_dict().items():
        kept = [size if n == 33 else n for n in weight.shape]
        assert list(small[name].shape) == kept
        assert torch.equal(small[name], weight[tuple(slice(0, n) for n in kept)])


@pytest.mark.parametrize("branch", ["both", "id"])
@pytest.mark.parametrize("size", [3, 20])
def test_a_slice_is_as_large_as_a_model_made_at_its_size(size, branch):
    model = random_model((3, 8, 20), branch)
    fresh = random_model(tuple(m for m in model.sizes if m <= size), branch)
    small = slice_model(model, size)
    assert {n: w.shape for n, w in small.state_dict().items()} == {n: w.shape for n, w in fresh.state_dict().items()}
    assert count_parameters(small) == count_parameters(fresh)
    stored = [tensor.untyped_storage().nbytes() for tensor in small.state_dict().values()]
    assert stored == [tensor.numel() * tensor.element_size() for tensor in small.state_dict().values()]


@pytest.mark.parametrize("size", [3, 20])
def test_a_slice_shares_no_memory_with_the_model(size):
    model = random_model((3, 8, 20))
    of_model, of_slice = (
        {weight.untyped_storage().data_ptr() for weight in of.state_dict().values()}
        for of in (model, slice_model(model, size))
    )
    assert not of_model & of_slice


@pytest.mark.parametrize("training", [True, False])
def test_a_slice_is_in_the_mode_of_the_model(training):
    assert slice_model(random_model((3, 8)).train(training), 3).training is training


@pytest.mark.parametrize("size", [0, 4, 20])
def test_a_size_that_was_not_trained_is_refused_with_the_sizes_there_are(size):
    with pytest.raises(ValueError, match=f"size {size} was not trained; the model has 3, 8$"):
        slice_model(slice_model(random_model((3, 8, 20)), 8), size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_share_the_frozen_features_as_they_are(dtype):
    features = [torch.randn(NUM_ITEMS, 9).half(), torch.randn(NUM_ITEMS, 4).bfloat16()]
    model = FMRLRec(NUM_ITEMS, features, ModelSettings(mrl_hidden_sizes=(3, 8, 20)))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    small = slice_model(model, 8)
    assert [part.data_ptr() for part in small.items.features] == [part.data_ptr() for part in features]
    assert [part.dtype for part in small.items.features] == [torch.float16, torch.bfloat16]
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}


def test_slicing_never_copies_the_features():
    model = FMRLRec(NUM_ITEMS, torch.randn(NUM_ITEMS, 9000).half(), ModelSettings(mrl_hidden_sizes=(3, 8)))
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Largest():
        slice_model(model, 3)
    assert largest <= max(parameter.numel() for parameter in model.parameters())
