"""The recommender's parts: the item encoder, post-norm, steps for serving, answers for some tokens, dropout."""

import pytest
import torch
import torch.nn.functional as F

from config import ModelSettings
from model import FMRLRec
from model import items as items_module
from model.dropout import Dropout, set_share
from model.items import ItemEncoder

NUM_ITEMS, WIDTHS, DIM = 23, (5, 3), 8


def parts(*dtypes, seed=0):
    """Features of every item, one part per dtype, all exact in half precision."""
    torch.manual_seed(seed)
    return [torch.randn(NUM_ITEMS, width).half().to(dtype) for width, dtype in zip(WIDTHS, dtypes, strict=True)]


def encoder_of(features):
    torch.manual_seed(1)
    return ItemEncoder(NUM_ITEMS, DIM, features)


def recommender(**options):
    return FMRLRec(
        NUM_ITEMS, None, ModelSettings(mrl_hidden_sizes=(2, 4, DIM), lru_r_min=0.3, lru_r_max=0.9, **options)
    )


def table_and_gradients(encoder, read):
    """[E, and the gradients of a function of it with respect to the projection]."""
    table = read(encoder)
    return [table, *torch.autograd.grad((table**2).sum(), list(encoder.parameters()))]


READS = [lambda e: e.everything(), lambda e: e(torch.tensor([0, 5, 5, NUM_ITEMS, 1, 0]))]


@pytest.mark.parametrize("read", READS, ids=["everything", "some"])
@pytest.mark.parametrize("rows", [1, 7, 2**14])
def test_two_parts_are_their_concatenation(monkeypatch, read, rows):
    features = parts(torch.float32, torch.float32)
    expected = table_and_gradients(encoder_of(torch.cat(features, dim=1)), read)
    monkeypatch.setattr(items_module, "ROWS", rows)
    torch.testing.assert_close(table_and_gradients(encoder_of(features), read), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read", READS, ids=["everything", "some"])
def test_features_keep_their_precision_and_are_widened_where_they_are_read(read):
    half, single = encoder_of(parts(torch.float16, torch.float32)), encoder_of(parts(torch.float32, torch.float32))
    assert [part.dtype for part in half.features] == [torch.float16, torch.float32]
    found, expected = table_and_gradients(half, read), table_and_gradients(single, read)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert found[0].dtype == torch.float32


def test_token_0_has_no_features_and_item_i_has_row_i_less_1():
    features = parts(torch.float16, torch.float32)
    encoder, items = encoder_of(features), torch.tensor([0, 1, NUM_ITEMS, 0])
    whole = torch.cat([part.float() for part in features], dim=1)
    rows = encoder.rows(items, torch.float64)
    assert rows.dtype == torch.float64
    assert torch.equal(rows, torch.stack([0 * whole[0], whole[0], whole[-1], 0 * whole[0]]).double())
    table = encoder.everything()
    assert torch.equal(table[0], encoder.projection.bias)
    torch.testing.assert_close(table[1:], encoder.projection(whole))
    torch.testing.assert_close(encoder(items), table[items])


@pytest.mark.parametrize("rows", [1, 7, 2**14])
def test_factors_multiply_out_to_the_table_without_its_bias(monkeypatch, rows):
    monkeypatch.setattr(items_module, "ROWS", rows)
    encoder = encoder_of(parts(torch.float16, torch.float16))
    factors = encoder.factors(torch.float32)
    assert factors.weight is encoder.projection.weight
    torch.testing.assert_close(factors.table() + encoder.projection.bias, encoder.everything())


def test_the_features_of_the_factors_are_put_together_once_for_each_type():
    encoder = encoder_of(parts(torch.float16, torch.float16))
    first = encoder.factors(torch.float32).features
    assert encoder.factors(torch.float32).features is first
    assert encoder.factors(torch.bfloat16).features.dtype == torch.bfloat16
    again = encoder.factors(torch.float32).features
    assert torch.equal(again, first) and again.dtype == torch.float32


def test_features_of_another_number_of_items_are_refused_and_frozen_ones_are_not_saved():
    features = parts(torch.float16, torch.float16)
    assert set(encoder_of(features).state_dict()) == {"projection.weight", "projection.bias"}
    with pytest.raises(ValueError, match=r"features of shape \[22, 3\] do not describe 23 items"):
        encoder_of([features[0], features[1][1:]])


def test_a_learned_table_is_not_a_product():
    encoder = encoder_of(None)
    assert encoder.everything() is encoder.table
    assert encoder.factors(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(encoder(torch.tensor([0, 3])), encoder.table[[0, 3]])


def test_with_post_norm_items_are_read_after_dropout_and_one_norm_per_increment():
    model = recommender(post_norm=True, lru_dropout=0.4, dropout_from=1)
    x = torch.randn(3, DIM) * 5 + 2
    torch.manual_seed(0)
    dropped = torch.cat([x[:, :1], x[:, 1:] * (torch.rand(3, DIM - 1) >= 0.4) / 0.6], dim=1)
    expected = torch.cat([F.layer_norm(part, part.shape[1:]) for part in dropped.split([2, 2, DIM - 4], dim=1)], dim=1)
    torch.manual_seed(0)
    torch.testing.assert_close(model.train().read(x), expected)
    read = []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    model.eval().encode(x, torch.arange(3), 3)
    torch.testing.assert_close(read, [model.norm(x)])


@pytest.mark.parametrize("post_norm", [True, False])
def test_a_step_reads_items_as_whole_histories_do(post_norm):
    torch.manual_seed(0)
    model = recommender(post_norm=post_norm).double().eval()
    x, hidden = torch.randn(6, DIM, dtype=torch.float64), torch.zeros(1, 2, 2, DIM, dtype=torch.float64)
    for expected, item in zip(model.encode(x, torch.arange(6), 6), x, strict=True):
        z, hidden = model.step(item[None], hidden)
        torch.testing.assert_close(z[0], expected)


@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize("at", [[9], [0, 9, 3, 3]], ids=str)
def test_answers_for_some_tokens_are_those_among_all_with_their_gradients(at, num_blocks):
    torch.manual_seed(0)
    model = recommender(lru_num_blocks=num_blocks).double().eval()
    position, at = torch.cat([torch.arange(n) for n in (3, 1, 6)]), torch.tensor(at)
    x = torch.randn(10, DIM, dtype=torch.float64, requires_grad=True)
    weights = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
    some, all_ = model.encode(x, position, 6, at=at), model.encode(x, position, 6)[at]
    torch.testing.assert_close(some, all_)
    found, expected = (torch.autograd.grad((z**3).sum(), [x, *weights]) for z in (some, all_))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("lengths", [(10,), (4, 6), (0, 10), (3, 0, 7)], ids=str)
def test_shares_of_a_batch_drop_out_what_the_batch_does_and_padding_may_reach_beyond_it(lengths):
    dropout, x, padding = Dropout(0.4), torch.ones(10, 3), 5
    torch.manual_seed(0)
    whole = dropout(x)
    assert set(whole.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    first = 0
    for length in lengths:
        set_share(dropout, (first, 10))
        torch.manual_seed(0)
        share = dropout(torch.ones(length + padding, 3))
        assert share.shape == (length + padding, 3)
        assert torch.equal(share[:length], whole[first : first + length])
        first += length
    set_share(dropout, None)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), whole)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_may_spare_the_first_dimensions_or_all():
    dropout, x = Dropout(0.6, start=5), torch.rand(4000, 12) + 1
    torch.manual_seed(0)
    spared, rest = dropout(x).split([5, 7], dim=1)
    assert torch.equal(spared, x[:, :5])
    torch.manual_seed(0)
    assert torch.equal(rest, Dropout(0.6)(x[:, 5:]))
    assert (rest == 0).float().mean(dim=0).sub(0.6).abs().max() < 0.04
    for none in (dropout.eval(), Dropout(0.6, start=12), Dropout(0.6, start=13)):
        assert torch.equal(none(x), x)


def test_every_dropout_of_a_model_spares_the_first_dimensions():
    model = recommender(post_norm=True, lru_dropout=0.4, lru_attn_dropout=0.3, dropout_from=2)
    found = [(layer.p, layer.start) for layer in model.modules() if isinstance(layer, Dropout)]
    assert found == [(0.4, 2)] + 2 * [(0.3, 2), (0.4, 2)]  # of the embeddings; of two blocks


@pytest.mark.parametrize("embedding_dropout", [True, False])
def test_the_residual_stream_carries_the_dropped_embeddings(embedding_dropout):
    settings = ModelSettings(mrl_hidden_sizes=(2, 4), lru_dropout=0.5, embedding_dropout=embedding_dropout)
    model, x = FMRLRec(NUM_ITEMS, None, settings).train(), torch.ones(200, 4)
    dropped = (model.read(x) == 0).float().mean()
    assert dropped == pytest.approx(0.5 if embedding_dropout else 0.0, abs=0.1)
    assert torch.equal(model.eval().read(x), x)


def test_the_switch_of_biases_reaches_the_feed_forward_network_too():
    model = FMRLRec(NUM_ITEMS, None, ModelSettings(mrl_hidden_sizes=(2, 4), lru_use_bias=False))
    names = [name for name, _ in model.blocks.named_parameters() if "bias" in name]
    assert names and all("norm" in name for name in names)
