"""SASRec, LRURec and the models that count, against plain twins: one history, one token, one pair at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from config import TrainingSettings
from dataloader import Batch
from model.baselines import sasrec
from model.baselines.counting import SHRINKAGE, ItemKNN, Popularity
from model.baselines.lrurec import DenseLRU, LRURec
from model.baselines.sasrec import SASRec, SelfAttention, tokens_after
from model.dropout import set_share
from trainer.step import Step

NUM_ITEMS, DIM, MAX_LEN = 20, 8, 9
LENGTHS = (3, 1, 1, 9, 2, 5)


def a_model(name, num_blocks=2, **settings):
    """A model in float64 whose weights are far from 0."""
    torch.manual_seed(0)
    if name == "sasrec":
        model = SASRec(NUM_ITEMS, DIM, MAX_LEN, num_blocks, num_heads=2, **settings)
    else:
        model = LRURec(NUM_ITEMS, DIM, num_blocks, **settings)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not parameter_name.endswith(("nu_log", "theta_log")):
                parameter.normal_(std=0.5)
    return model.double().eval()


def packed(lengths=LENGTHS):
    """x, position, longest of histories of these lengths, one after another."""
    x = torch.randn(sum(lengths), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.cat([torch.arange(length) for length in lengths]), max(lengths)


both = pytest.mark.parametrize("name", ["sasrec", "lrurec"])


# ----------------------------------------------------------------------------------------------- the equations in words


@pytest.mark.parametrize("rows", [2, 5, 256])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_packed_attention_is_causal_attention_of_each_history_alone(monkeypatch, num_heads, rows):
    monkeypatch.setattr(sasrec, "ROWS", rows)
    torch.manual_seed(0)
    attention, (x, position, longest) = SelfAttention(DIM, num_heads).double(), packed()
    plain = nn.MultiheadAttention(DIM, num_heads, bias=False, batch_first=True).double()
    linears = attention.W_Q, attention.W_K, attention.W_V
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([linear.weight for linear in linears]))
        plain.out_proj.weight.copy_(torch.eye(DIM))
    q = torch.randn_like(x)
    expected = []
    for q_own, own in zip(q.split(LENGTHS), x.split(LENGTHS), strict=True):
        later = torch.ones(len(own), len(own), dtype=torch.bool).triu(1)
        expected.append(plain(q_own, own, own, attn_mask=later, need_weights=False)[0])
    torch.testing.assert_close(attention(q, x, position, longest), torch.cat(expected))


def test_sasrec_is_what_its_docstring_says():
    model = a_model("sasrec")
    x = packed((5,))[0]

    def norm(x, module):
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias

    h = DIM**0.5 * x + model.positions[[4, 3, 2, 1, 0]]
    for block in model.blocks:
        q, a = norm(h, block.norm1), block.attention
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = a.W_Q(q)[:, head] @ a.W_K(h)[:, head].T / 4**0.5
            scores[torch.ones(5, 5, dtype=torch.bool).triu(1)] = -torch.inf
            heads.append(scores.softmax(dim=1) @ a.W_V(h)[:, head])
        f = norm(q + torch.cat(heads, dim=1), block.norm2)
        h = f + block.W2(block.W1(f).clamp_min(0))
    torch.testing.assert_close(model.encode(x, torch.arange(5), 5), norm(h, model.norm))


@pytest.mark.parametrize("bias", [True, False])
def test_the_dense_lru_is_the_recurrence_in_complex_numbers_token_by_token(bias):
    torch.manual_seed(0)
    lru, (x, position, longest) = DenseLRU(DIM, 12, bias, 0.5, 0.99).double(), packed()
    B, C = torch.complex(lru.B_re, lru.B_im), torch.complex(lru.C_re, lru.C_im)
    b = torch.complex(lru.B_bias_re, lru.B_bias_im) if bias else 0
    c = lru.C_bias if bias else 0
    eigenvalue = torch.exp(torch.complex(-torch.exp(lru.nu_log), torch.exp(lru.theta_log)))
    assert (eigenvalue.abs() > 0.5).all() and (eigenvalue.abs() < 0.99).all()
    expected = []
    for x_t, steps in zip(x.to(torch.complex128), position, strict=True):
        before = h if steps > 0 else torch.zeros(12, dtype=torch.complex128)  # noqa: F821
        h = eigenvalue * before + lru.gamma_log.exp() * (B @ x_t + b)
        expected.append((C @ h).real + c)
    torch.testing.assert_close(lru(x, position, longest), torch.stack(expected))


def test_lrurec_is_what_its_docstring_says():
    model, (x, position, longest) = a_model("lrurec"), packed()
    norm = lambda x, module: F.layer_norm(x, (DIM,), module.weight, module.bias)  # noqa: E731
    h = norm(x, model.norm)
    for block in model.blocks:
        h = norm(h + block.lru(h, position, longest), block.norm1)
        h = norm(h + block.W2(F.gelu(block.W1(h))), block.norm2)
    torch.testing.assert_close(model.encode(x, position, longest), h)


def test_lrurecs_layers_are_as_wide_as_published():
    """A state of twice, and a hidden layer of four times the dimensions."""
    shapes = {name: tuple(parameter.shape) for name, parameter in LRURec(NUM_ITEMS, DIM).blocks[1].named_parameters()}
    assert shapes["lru.nu_log"] == (2 * DIM,) and shapes["lru.B_re"] == (2 * DIM, DIM)
    assert shapes["lru.C_im"] == (DIM, 2 * DIM) and shapes["W1.weight"] == (4 * DIM, DIM)


def test_heads_must_share_the_dimensions_out():
    with pytest.raises(ValueError, match="8 dimensions cannot be shared out among 3 heads"):
        SASRec(NUM_ITEMS, DIM, MAX_LEN, num_heads=3)


# ------------------------------------------------------------------------------------------------- what a history reads


@both
def test_a_packed_history_is_answered_as_alone(name):
    model, (x, position, longest) = a_model(name), packed()
    alone = [model.encode(own, torch.arange(len(own)), len(own)) for own in x.split(LENGTHS)]
    torch.testing.assert_close(model.encode(x, position, longest), torch.cat(alone))


@both
def test_a_token_reads_its_own_history_up_to_itself_and_nothing_else(name):
    model, (x, position, longest) = a_model(name), packed()
    reads = (
        torch.autograd.functional.jacobian(lambda x: model.encode(x, position, longest), x).abs().sum(dim=(1, 3)) > 0
    )
    token = torch.arange(len(x))
    own = (token <= token[:, None]) & (token >= (token - position)[:, None])
    assert torch.equal(reads, own)


@both
@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize("at", [[2, 3, 13], [0, 20, 7, 7]], ids=str)
def test_answers_for_some_tokens_are_those_among_all(name, num_blocks, at):
    model, (x, position, longest) = a_model(name, num_blocks), packed()
    at = torch.tensor(at)
    torch.testing.assert_close(model.encode(x, position, longest, at=at), model.encode(x, position, longest)[at])


@both
def test_a_longest_history_that_is_said_to_be_longer_changes_nothing(name):
    model, (x, position, longest) = a_model(name), packed()
    torch.testing.assert_close(model.encode(x, position, 16), model.encode(x, position, longest))


def test_positions_count_back_from_the_end_of_every_history():
    _, position, _ = packed((3, 1, 1, 2))
    assert tokens_after(position).tolist() == [2, 1, 0, 0, 0, 1, 0]


def test_sasrec_knows_positions_apart_and_the_begin_of_a_sequence_from_its_first_item_by_the_embedding_alone():
    model, x = a_model("sasrec"), packed((1,))[0].expand(3, -1)
    same = model.encode(x, torch.zeros(3, dtype=torch.int64), 1)
    assert torch.equal(same[0], same[1])
    apart = model.encode(x, torch.arange(3), 3)
    assert (apart[0] - apart[1]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- training


@both
@pytest.mark.parametrize("cut", [3, 14])
def test_shares_of_a_batch_are_dropped_out_as_the_batch_is(name, cut):
    model, (x, position, longest) = a_model(name, dropout=0.4, attn_dropout=0.3).train(), packed()
    torch.manual_seed(0)
    whole = model.encode(x, position, longest)
    for first, last in ((0, cut), (cut, len(x))):
        set_share(model, (first, len(x)))
        torch.manual_seed(0)
        share = model.encode(x[first:last], position[first:last], longest)
        torch.testing.assert_close(share, whole[first:last])
    set_share(model, None)
    assert (model.eval().encode(x, position, longest) - whole).abs().max() > 0.1


@both
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_what_comes_next(name, precision):
    torch.manual_seed(0)
    model = SASRec(NUM_ITEMS, 16, MAX_LEN, dropout=0.1) if name == "sasrec" else LRURec(NUM_ITEMS, 16, dropout=0.1)
    step = Step(model, torch.optim.AdamW(model.parameters(), lr=0.01), TrainingSettings(precision=precision))
    first = torch.randint(1, NUM_ITEMS + 1, (16, 1))
    rows = (first + torch.arange(6) * 3 - 1) % NUM_ITEMS + 1  # 3 further each time, round and round
    tokens, labels, position = rows[:, :-1].flatten(), rows[:, 1:].flatten(), torch.arange(5).repeat(16)
    batch = Batch(tokens, labels, position, 5, (0, 80), torch.tensor(80))
    losses = [step(batch).item() for _ in range(60)]
    assert losses[0] > 2 and losses[-1] < 0.5
    with torch.no_grad():
        z = model.eval().encode(model.items(tokens), position, 5)
    assert ((z @ model.item_table().T).argmax(dim=1) == labels).float().mean() > 0.95


# ----------------------------------------------------------------------------------------------------------- counting

USERS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
ITEMS = torch.tensor([1, 2, 3, 1, 2, 4, 1, 4])  # the third user had item 4 twice


def test_popularity_counts_how_often_an_item_is_in_training():
    model = Popularity(5)
    model.count(USERS, ITEMS)
    assert model.scores(torch.tensor([2, 5])).tolist() == [[0, 3, 2, 1, 2, 0]] * 2


def test_itemknn_ranks_by_the_shrunk_cosine_with_the_last_item_then_by_popularity():
    model = ItemKNN(5)
    model.count(USERS, ITEMS)
    one, three, five = model.scores(torch.tensor([1, 3, 5])).tolist()
    shrunk = lambda both, product: pytest.approx(both / (product**0.5 + SHRINKAGE))  # noqa: E731
    assert one[2:5] == [shrunk(2, 3 * 2), shrunk(1, 3 * 1), shrunk(1, 3 * 1)]
    assert three[1:3] == [shrunk(1, 1 * 3), shrunk(1, 1 * 2)]
    assert one[1] < 0 and one[5] < one[1]  # not its own neighbour
    assert three[3] < three[4] < 0 < min(three[1:3])
    assert five[1] > five[2] == five[4] > five[3] > five[5] == -1  # no user had it: popularity


def test_itemknn_counts_as_all_pairs_of_all_users_one_by_one():
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(0, 30, (200,), generator=generator).sort().values
    items = torch.randint(1, 13, (200,), generator=generator)
    model = ItemKNN(14)
    model.count(users, items)
    had = torch.zeros(30, 15)
    had[users, items] = 1
    together, n = had.T @ had, had.sum(dim=0)
    expected = together / ((n[:, None] * n).sqrt() + SHRINKAGE)
    expected.fill_diagonal_(0)
    torch.testing.assert_close(model.scores(torch.arange(15)).clamp_min(0), expected)


@pytest.mark.parametrize("kind", [Popularity, ItemKNN])
def test_what_was_counted_is_loaded_into_a_model_that_counted_nothing(kind):
    model, other = kind(5), kind(5)
    model.count(USERS, ITEMS)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    last = torch.arange(6)
    assert torch.equal(other.scores(last), model.scores(last))
    assert not list(model.parameters())
