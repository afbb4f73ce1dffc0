"""The whole model against the paper, written down plainly.

The oracle pads every sequence on the left to a fixed length with token 0 and computes every position: one matrix per
block of rows, complex numbers, one step of the recurrence after another, one cross-entropy per size. It reads the
sequences and the model's weights, and nothing else of the project.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import ModelSettings
from dataloader import TrainLoader, eval_batches, eval_rows, train_rows
from model import FMRLRec
from model.loss import LOSSES
from tests.made_up import as_sequences, with_random_weights

MAX_LEN = 50
SIZES = (3, 5, 12)
NUM_ITEMS, TEXT_WIDTH, IMAGE_WIDTH = 30, 7, 4
CPU = torch.device("cpu")


def oracle_item_table(w, features):
    """E = concat(E_lang, E_img) W_proj + b; token 0 has no features. Or a learned table."""
    if features is None:
        return w["items.table"]
    language, image = features[:, :TEXT_WIDTH], features[:, TEXT_WIDTH:]
    W_language, W_image = w["items.projection.weight"].T.split([TEXT_WIDTH, IMAGE_WIDTH])
    b = w["items.projection.bias"]
    return torch.cat([b[None], language @ W_language + image @ W_image + b])


def oracle_linear(x, W, b, sizes):
    """Outputs M[j-1]:M[j] read inputs 0:M[j] through a matrix of their own."""
    blocks = [x[..., :high] @ W[low:high, :high].T for low, high in pairwise((0, *sizes))]
    return torch.cat(blocks, dim=-1) + (0 if b is None else b)


def oracle_layer_norm(x, weight, bias, sizes):
    """A LayerNorm per increment."""
    blocks = []
    for low, high in pairwise((0, *sizes)):
        part = x[..., low:high]
        mean, variance = part.mean(-1, keepdim=True), part.var(-1, keepdim=True, correction=0)
        blocks.append((part - mean) / (variance + 1e-5).sqrt() * weight[low:high] + bias[low:high])
    return torch.cat(blocks, dim=-1)


def oracle_lru(x, valid, w, sizes):
    """h_t = γ (B x_t + b) + λ valid_{t-1} h_{t-1}, y_t = Re(C h_t) + c."""
    eigenvalue = torch.exp(-torch.exp(w["nu_log"]) + 1j * torch.exp(w["theta_log"]))
    B, C = torch.complex(w["B_re"], w["B_im"]), torch.complex(w["C_re"], w["C_im"])
    b = torch.complex(w["B_bias_re"], w["B_bias_im"]) if "B_bias_re" in w else None
    u = torch.exp(w["gamma_log"]) * oracle_linear(x.to(B.dtype), B, b, sizes)
    h = [u[:, 0]]
    for t in range(1, u.shape[1]):
        h.append(u[:, t] + eigenvalue * valid[:, t - 1, None] * h[-1])
    return oracle_linear(torch.stack(h, dim=1), C, None, sizes).real + w.get("C_bias", 0)


def oracle_dropout(x, p):
    """x [1, L, D], each number kept with probability 1 - p."""
    return x * (torch.rand(x.shape[1:]) >= p) / (1 - p)


def oracle_encode(w, features, tokens, sizes, num_blocks, p=0.0, post_norm=False):
    """z [B, L, D] of tokens [B, L] that are padded on the left with 0; p: dropout; post_norm: beyond the paper."""
    valid = (tokens > 0).to(torch.float64)
    x = oracle_dropout(oracle_item_table(w, features)[tokens], p)

    def before(x, norm):
        return x if post_norm else oracle_layer_norm(x, w[f"{norm}.weight"], w[f"{norm}.bias"], sizes)

    def after(x, norm):
        return oracle_layer_norm(x, w[f"{norm}.weight"], w[f"{norm}.bias"], sizes) if post_norm else x

    x = after(x, "norm")
    for k in range(num_blocks):
        v = {name.removeprefix(f"blocks.{k}."): weight for name, weight in w.items() if f"blocks.{k}." in name}
        lru = {name.removeprefix("lru."): weight for name, weight in v.items()}
        y = oracle_lru(before(x, f"blocks.{k}.norm1"), valid, lru, sizes)
        x = after(x + oracle_dropout(y, p), f"blocks.{k}.norm1")
        normed = before(x, f"blocks.{k}.norm2")
        gate = F.silu(oracle_linear(normed, v["ffn.G.weight"], v.get("ffn.G.bias"), sizes))
        hidden = gate * oracle_dropout(oracle_linear(normed, v["ffn.W1.weight"], v.get("ffn.W1.bias"), sizes), p)
        y = oracle_linear(hidden, v["ffn.W2.weight"], v.get("ffn.W2.bias"), sizes)
        x = after(x + oracle_dropout(y, p), f"blocks.{k}.norm2")
    return x


def oracle_loss(w, features, tokens, labels, sizes, num_blocks):
    """The sum over sizes of a cross-entropy over all tokens, at the positions that have a label."""
    table = oracle_item_table(w, features)
    z = oracle_encode(w, features, tokens, sizes, num_blocks)[labels > 0]
    losses = [F.cross_entropy(z[:, :m] @ table[:, :m].T, labels[labels > 0]) for m in sizes]
    return sum(losses)


def padded(rows, length):
    """Rows of tokens, padded on the left with 0 to `length`."""
    return torch.tensor([[0] * (length - len(row)) + row for row in rows])


def oracle_training_tensors(sequences, length=MAX_LEN):
    """(tokens, labels), each [B, length], of the last 50 training items v[:-2].

    An item is the label of its predecessor's position; a first item is the label of a position of padding.
    """
    training = [v[:-2] for v in sequences]
    tokens = padded([items[:-1][-MAX_LEN:] for items in training], length)
    labels = padded([items[-MAX_LEN:] for items in training], length)
    return tokens, labels


def random_sequences(seed=0):
    """Sequences of training lengths 1, 2, 9, and all around MAX_LEN."""
    random = np.random.default_rng(seed)
    return [random.integers(1, NUM_ITEMS + 1, size=n + 2).tolist() for n in (9, 50, 1, 51, 49, 2, 78, 52)]


def random_model(branch, num_blocks=2, use_bias=True, p=0.0, dtype=torch.float64, post_norm=False):
    """(model without zeros or ones among its weights, its features); the recurrence remembers for long."""
    torch.manual_seed(0)
    features = torch.randn(NUM_ITEMS, TEXT_WIDTH + IMAGE_WIDTH, dtype=dtype) if branch == "both" else None
    settings = ModelSettings(
        mrl_hidden_sizes=SIZES, lru_num_blocks=num_blocks, lru_dropout=p, lru_attn_dropout=p, lru_use_bias=use_bias,
        lru_r_min=0.5, lru_r_max=0.98, post_norm=post_norm,
    )  # fmt: skip
    return with_random_weights(FMRLRec(NUM_ITEMS, features, settings).to(dtype), 0.7), features


def weights_of(model):
    """name -> a copy of the weight for the oracle, which requires a gradient."""
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("branch", "use_bias", "num_blocks", "dtype"),
    [("both", True, 2, torch.float64), ("both", False, 1, torch.float32), ("id", True, 1, torch.float64)],
)
def test_every_labelled_position_scores_as_in_the_paper(branch, use_bias, num_blocks, dtype):
    model, features = random_model(branch, num_blocks, use_bias, dtype=dtype)
    sequences, features = random_sequences(), None if features is None else features.double()
    w = {name: weight.double() for name, weight in weights_of(model).items()}
    tokens, labels = oracle_training_tensors(sequences)
    expected = oracle_encode(w, features, tokens, SIZES, num_blocks)[labels > 0]

    rows = train_rows(as_sequences(sequences), MAX_LEN)
    position, longest = torch.as_tensor(rows.position), int(np.diff(rows.offsets).max())
    z = model.encode(model.items(torch.as_tensor(rows.tokens)), position, longest)

    assert rows.labels.tolist() == labels[labels > 0].tolist()
    for m in SIZES:
        scores = expected[:, :m] @ oracle_item_table(w, features)[:, :m].T
        difference = z[:, :m] @ model.item_table()[:, :m].T - scores
        assert difference.abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12) * scores.abs().max()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("branch", "use_bias"), [("both", True), ("id", False)])
def test_loss_and_gradients_of_a_training_batch_are_the_papers(branch, use_bias, name):
    model, features = random_model(branch, use_bias=use_bias)
    sequences, w = random_sequences(), weights_of(model)
    expected = oracle_loss(w, features, *oracle_training_tensors(sequences), SIZES, 2)
    expected.backward()

    loader = TrainLoader(train_rows(as_sequences(sequences), MAX_LEN), len(sequences), 0, CPU)
    (batch,) = loader.epoch(1)
    table = model.item_table()
    z = model.encode(table[batch.tokens], batch.position, batch.longest)
    loss = LOSSES[name](z, table, batch.labels, SIZES)
    loss.backward()

    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("branch", "part", "left_out"), [("both", "val", 2), ("id", "test", 1)])
def test_the_last_position_of_a_history_scores_as_in_the_paper(branch, part, left_out):
    model, features = random_model(branch)
    sequences = random_sequences()
    histories = [v[:-left_out][-MAX_LEN:] for v in sequences]
    expected = oracle_encode(weights_of(model), features, padded(histories, MAX_LEN), SIZES, 2)[:, -1]
    rows = eval_rows(as_sequences(sequences), MAX_LEN, part)
    z = [model.encode(model.items(b.tokens), b.position, b.longest)[b.last] for b in eval_batches(rows, 3, CPU)]
    torch.testing.assert_close(torch.cat(z), expected)


@pytest.mark.parametrize("post_norm", [False, True])
def test_dropout_follows_the_embeddings_the_lru_and_w1_and_w2_and_nothing_else(post_norm):
    model, features = random_model("both", p=0.4, post_norm=post_norm)
    history = torch.arange(1, 21)
    torch.manual_seed(5)
    z = model.train().encode(model.items(history), torch.arange(20), 20)
    torch.manual_seed(5)
    expected = oracle_encode(weights_of(model), features, history[None], SIZES, 2, 0.4, post_norm)[0]
    torch.testing.assert_close(z, expected)
