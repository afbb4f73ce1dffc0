"""Train once, deploy at any size: a slice is a model of its own that scores as the full model's prefix."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from config import ModelSettings
from dataloader import eval_batches, eval_rows
from model import FMRLRec, count_parameters, slice_model
from tests.made_up import as_sequences, with_random_weights
from trainer.evaluation import evaluate

NUM_ITEMS, MAX_LEN, KS = 40, 10, (1, 5, 10)
SIZE_LISTS = [(25, 27), (3, 9, 20, 21, 47)]
BRANCHES = ["both", "id"]


def random_model(sizes, branch="both", use_bias=True, seed=0, **options):
    """Return a model with random weights, masked ones too."""
    torch.manual_seed(seed)
    features = torch.randn(NUM_ITEMS, 9) if branch == "both" else None
    settings = ModelSettings(mrl_hidden_sizes=sizes, lru_use_bias=use_bias, lru_r_min=0.3, lru_r_max=0.9, **options)
    return with_random_weights(FMRLRec(NUM_ITEMS, features, settings)).eval()


@pytest.mark.parametrize(
    ("branch", "use_bias", "post_norm"), [("both", True, False), ("id", True, True), ("both", False, True)]
)
@pytest.mark.parametrize("sizes", SIZE_LISTS, ids=str)
def test_a_slice_has_the_scores_and_metrics_of_the_full_models_prefix(sizes, branch, use_bias, post_norm):
    model, random = random_model(sizes, branch, use_bias, post_norm=post_norm), np.random.default_rng(0)
    histories = [random.integers(1, NUM_ITEMS + 1, size=length) for length in random.integers(3, 25, size=15)]
    rows = eval_rows(as_sequences(histories), MAX_LEN, "test")
    (batch,) = eval_batches(rows, 100, torch.device("cpu"))

    @torch.no_grad()
    def scores(model, size):
        table = model.item_table()
        z = model.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]
        return z[:, :size] @ table[:, :size].T

    expected = evaluate(model, rows, sizes=sizes, batch_size=4, ks=KS)
    for size in sizes:
        small, prefix = slice_model(model, size), scores(model, size)
        assert (scores(small, size) - prefix).abs().max() <= 1e-5 * prefix.abs().max()
        assert evaluate(small, rows, sizes=(size,), batch_size=4, ks=KS) == {size: expected[size]}


@pytest.mark.parametrize(("size", "by_way_of"), [(8, 20), (8, 33), (20, 33)])
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_slice_or_slice_of_a_slice_keeps_the_top_left_of_every_weight(branch, size, by_way_of):
    model = random_model((3, 8, 20, 33), branch, dropout_from=2)
    small = slice_model(slice_model(model, by_way_of), size)
    assert slice_model(model.train(), size).training
    assert small.settings == replace(model.settings, mrl_hidden_sizes=(3, 8, 20)[: 2 + (size == 20)])
    small = small.state_dict()
    for name, weight in model.state_dict().items():
        kept = [size if n == 33 else n for n in weight.shape]
        assert list(small[name].shape) == kept
        assert torch.equal(small[name], weight[tuple(slice(0, n) for n in kept)])


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("size", [3, 20])
def test_a_slice_owns_the_memory_of_a_model_of_its_size(size, branch):
    model = random_model((3, 8, 20), branch)
    fresh = random_model(tuple(m for m in model.sizes if m <= size), branch)
    small = slice_model(model, size)
    assert {n: w.shape for n, w in small.state_dict().items()} == {n: w.shape for n, w in fresh.state_dict().items()}
    assert count_parameters(small) == count_parameters(fresh)
    stored = [tensor.untyped_storage().nbytes() for tensor in small.state_dict().values()]
    assert stored == [tensor.numel() * tensor.element_size() for tensor in small.state_dict().values()]
    of_model, of_slice = (
        {weight.untyped_storage().data_ptr() for weight in of.state_dict().values()} for of in (model, small)
    )
    assert not of_model & of_slice


@pytest.mark.parametrize("size", [0, 4, 20])
def test_an_untrained_size_is_refused_with_the_trained_ones(size):
    with pytest.raises(ValueError, match=f"size {size} was not trained; the model has 3, 8$"):
        slice_model(slice_model(random_model((3, 8, 20)), 8), size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_share_the_frozen_features_without_a_copy(dtype):
    features = [torch.randn(NUM_ITEMS, 9).half(), torch.randn(NUM_ITEMS, 4).bfloat16()]
    model = FMRLRec(NUM_ITEMS, features, ModelSettings(mrl_hidden_sizes=(3, 8, 20)))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    small = slice_model(model, 8)
    assert [part.data_ptr() for part in small.items.features] == [part.data_ptr() for part in features]
    assert [part.dtype for part in small.items.features] == [torch.float16, torch.bfloat16]
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
