"""The model, its losses and the baselines against the papers, written down plainly; the examples of model/README.md."""

import json
import math
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import eval as eval_script
import train
from benchmarks import deploy
from common.errors import InputError
from config import COUNTING, MODEL_PRESETS, FeatureSettings, ModelSettings, TrainingSettings
from dataloader import Batch, TrainLoader, train_rows
from datasets.catalog import load_catalog
from datasets.features import registry
from datasets.features.text import LexicalEncoder
from experiments import cold_items
from model import MODELS, CountingModel, FMRLRec, build_model, fast
from model.base import set_share
from model.baselines import sasrec
from model.baselines.counting import SHRINKAGE, ItemKNN
from model.extensions.objective import (
    CROSS_ENTROPY,
    TIMES,
    Objective,
    adjusted_prior,
    contains,
    history_items,
    history_logits,
    history_logits_plain,
    learned_bias,
    losses_plain,
)
from model.extensions.sampled_loss import SAMPLED_LOSSES, NegativeSampler, Sample, sampled_matryoshka_cross_entropy
from model.items import Factors
from model.loss import LOSSES
from serving import export
from tests.made_up import as_sequences, feature_parts, random_model, with_random_weights, write_prepared
from trainer import evaluation, testing
from trainer.load_run import load_run
from trainer.runs import read_config, read_log, unfinished
from trainer.step import Step

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
    bits = torch.empty(x.shape[1], -(-x.shape[2] // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return x * (bits[:, : x.shape[2]] / 2**16 + 0.5 >= round(p * 2**16) / 2**16) / (1 - p)


def oracle_encode(w, features, tokens, sizes, num_blocks, p=(0.0, 0.0), post_norm=False):
    """z [B, L, D] of tokens [B, L], padded on the left with 0. p: dropout, of the LRU; post_norm: beyond the paper."""
    valid = (tokens > 0).to(torch.float64)
    x = oracle_dropout(oracle_item_table(w, features)[tokens], p[0])

    def before(x, norm):
        return x if post_norm else oracle_layer_norm(x, w[f"{norm}.weight"], w[f"{norm}.bias"], sizes)

    def after(x, norm):
        return oracle_layer_norm(x, w[f"{norm}.weight"], w[f"{norm}.bias"], sizes) if post_norm else x

    x = after(x, "norm")
    for k in range(num_blocks):
        v = {name.removeprefix(f"blocks.{k}."): weight for name, weight in w.items() if f"blocks.{k}." in name}
        lru = {name.removeprefix("lru."): weight for name, weight in v.items()}
        y = oracle_lru(before(x, f"blocks.{k}.norm1"), valid, lru, sizes)
        x = after(x + oracle_dropout(y, p[1]), f"blocks.{k}.norm1")
        normed = before(x, f"blocks.{k}.norm2")
        gate = F.silu(oracle_linear(normed, v["ffn.G.weight"], v.get("ffn.G.bias"), sizes))
        hidden = gate * oracle_dropout(oracle_linear(normed, v["ffn.W1.weight"], v.get("ffn.W1.bias"), sizes), p[0])
        y = oracle_linear(hidden, v["ffn.W2.weight"], v.get("ffn.W2.bias"), sizes)
        x = after(x + oracle_dropout(y, p[0]), f"blocks.{k}.norm2")
    return x


def oracle_loss(w, features, tokens, labels, sizes, num_blocks):
    """The sum over sizes of a cross-entropy over all tokens, at the positions that have a label."""
    table = oracle_item_table(w, features)
    z = oracle_encode(w, features, tokens, sizes, num_blocks)[labels > 0]
    return sum(F.cross_entropy(z[:, :m] @ table[:, :m].T, labels[labels > 0]) for m in sizes)


def oracle_training_tensors(sequences):
    """(tokens, labels), each [B, MAX_LEN], of the last 50 training items v[:-2], padded on the left with 0.

    An item is the label of its predecessor's position; a first item is the label of a position of padding.
    """
    rows = [[(v[:-2][: len(v) - 3])[-MAX_LEN:] for v in sequences], [v[:-2][-MAX_LEN:] for v in sequences]]
    return [torch.tensor([[0] * (MAX_LEN - len(row)) + row for row in part]) for part in rows]


def random_sequences(seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(1, NUM_ITEMS + 1, size=n + 2).tolist() for n in (9, 50, 1, 51, 49, 2, 78, 52)]


def model_of(branch, num_blocks=2, use_bias=True, dtype=torch.float64):
    """(model without zeros or ones among its weights, its features); the recurrence remembers for long."""
    features = torch.randn(NUM_ITEMS, TEXT_WIDTH + IMAGE_WIDTH, generator=torch.Generator().manual_seed(0))
    how = {"num_items": NUM_ITEMS, "features": features if branch == "both" else None, "lru_use_bias": use_bias}
    model = random_model(SIZES, num_blocks, ring=(0.5, 0.98), **how).to(dtype)
    return model, features.double() if branch == "both" else None


def weights_of(model):
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("branch", "use_bias", "num_blocks", "dtype"),
    [("both", True, 2, torch.float64), ("both", False, 1, torch.float32), ("id", True, 1, torch.float64)],
)
def test_every_labelled_position_scores_as_in_the_paper(branch, use_bias, num_blocks, dtype):
    model, features = model_of(branch, num_blocks, use_bias, dtype)
    sequences, w = random_sequences(), {name: weight.double() for name, weight in weights_of(model).items()}
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
    model, features = model_of(branch, use_bias=use_bias)
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


@pytest.mark.parametrize("post_norm", [False, True])
def test_dropout_follows_the_embeddings_the_lru_and_w1_and_w2_and_nothing_else(post_norm):
    settings = {"mrl_hidden_sizes": SIZES, "lru_dropout": 0.4, "lru_attn_dropout": 0.3, "post_norm": post_norm}
    model = with_random_weights(FMRLRec(NUM_ITEMS, None, ModelSettings(**settings)).double())
    history = torch.arange(1, 21)
    torch.manual_seed(5)
    z = model.encode(model.items(history), torch.arange(20), 20)
    torch.manual_seed(5)
    expected = oracle_encode(weights_of(model), None, history[None], SIZES, 2, (0.4, 0.3), post_norm)[0]
    torch.testing.assert_close(z, expected)


# ----------------------------------------------------------------------------------------------------------------- loss

KINDS = ["table", "factors", "V of the first size", "V of all sizes", "sample"]
LOSSES_OF = {kind: SAMPLED_LOSSES if kind == "sample" else LOSSES for kind in KINDS}
SHAPE = (30, 40, (2, 5, 12), 9)  # positions T, items N, sizes, feature width F
LOG_SCALE = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
HISTORY_BIAS = torch.tensor([0.8, -3.0, -1.2], dtype=torch.float64, requires_grad=True)
# Tokens of three rows, with repeats and padding, and their steps since the row's begin.
TOKENS = torch.tensor([0, 5, 9, 5, 5, 2, 14, 2, 0, 7, 7, 8, *range(1, 15), 3, 1, 0, 0])
POSITION = torch.tensor([0, *range(7), 0, *range(3), *range(16), 0, 0])
HISTORY = history_items(TOKENS, POSITION, 16)
PRIOR = adjusted_prior(torch.arange(41), 3.0).double()
OBJECTIVES = {
    "the paper's": CROSS_ENTROPY,
    "scale": Objective(LOG_SCALE),
    "distillation alone": Objective(distill=1.0),
    "both": Objective(LOG_SCALE, 0.3),
    "history": Objective(history_bias=HISTORY_BIAS, history=HISTORY),
    "prior": Objective(prior=PRIOR),
    "all": Objective(LOG_SCALE, 0.3, HISTORY_BIAS, HISTORY, prior=PRIOR),
}


def random_case(kind, shape=SHAPE, dtype=torch.float64, products=None, seed=0):
    """Return (z, item table, labels, sizes) and its leaves; some positions lack a label. products: their dtype."""
    positions, num_items, sizes, width = shape
    generator, products = torch.Generator().manual_seed(seed), products or dtype

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    z, labels = draw(positions, sizes[-1]), torch.randint(1, num_items + 1, (positions,), generator=generator)
    labels[3::7] = 0
    labels[4:6], labels[15:18:2] = 5, 3  # some labels are in HISTORY
    if kind in ("table", "sample"):
        E = draw(num_items + 1, sizes[-1])
        if kind == "table":
            return (z, E.to(products), labels, sizes), [z, E]
        torch.manual_seed(seed)
        items, log_kq = NegativeSampler(labels.bincount(minlength=num_items + 1), 17).draw()
        assert (labels[:, None] == items).any()
        read = E[TOKENS] if shape == SHAPE else None
        return (z, Sample(E[labels], E[items].to(products), items, log_kq.to(dtype), read), labels, sizes), [z, E]
    features, weight = draw(num_items + 1, width).detach().to(products), draw(sizes[-1], width)
    if kind == "factors":
        return (z, Factors(features, weight), labels, sizes), [z, weight]
    V = draw(num_items + 1, sizes[0] if kind == "V of the first size" else sizes[-1])
    return (z, Factors(features, weight, V), labels, sizes), [z, weight, V]


def value_and_gradients(loss, case, leaves, objective=CROSS_ENTROPY, **options):
    value = loss(*case, objective=objective, **options)
    wanted = [*leaves, *(learned for learned in (objective.log_scale, objective.history_bias) if learned is not None)]
    return [value, *torch.autograd.grad(-3 * value, wanted, retain_graph=True)]


def hold(monkeypatch, case, positions):
    z, table, _, sizes = case
    columns = len(table.items) + 1 if isinstance(table, Sample) else len(getattr(table, "features", table))
    monkeypatch.setattr(fast, "LEAST", 1)
    monkeypatch.setattr(fast, "CHUNK_BYTES", positions * columns * len(sizes) * z.itemsize)
    monkeypatch.setattr(fast, "BLOCK_BYTES", positions * columns * (len(sizes) + 4) * z.itemsize // 2)


@pytest.mark.parametrize(
    ("shape", "objective", "held", "dtype", "tolerance"),
    [
        *((SHAPE, objective, 7, torch.float64, 1e-12) for objective in (*OBJECTIVES, "teachers")),
        ((5, 40, (2, 4, 16), 9), "both", 50, torch.float64, 1e-12),  # wide increments stay a product
        ((60, 12, (2, 5), 30), "the paper's", 50, torch.float64, 1e-12),  # all columns are multiplied out
        ((131, 20, (1, 3, 40), 7), "the paper's", 50, torch.float32, 1e-4),
        ((3, 8, (5,), 4), "the paper's", 50, torch.float64, 1e-12),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_loss_has_the_value_and_gradients_of_the_plain_one(
    monkeypatch, kind, shape, objective, held, dtype, tolerance
):
    case, leaves = random_case(kind, shape, dtype)
    hold(monkeypatch, case, held)
    losses, given = LOSSES_OF[kind], OBJECTIVES.get(objective, OBJECTIVES["all"])
    if objective == "teachers":
        candidates = 1 + 17 + HISTORY.shape[1] if kind == "sample" else 1 + shape[1]
        given = given._replace(teacher=torch.randn(shape[0], candidates, dtype=dtype))
    monkeypatch.setattr(fast, "_buffers", {})
    with torch.inference_mode():  # its memory is reused in training
        value = losses["fast"](*case, objective=given)
    found, plain = (value_and_gradients(losses[name], case, leaves, given) for name in ("fast", "plain"))
    assert value == found[0]
    for f, p in zip(found, plain, strict=True):
        assert (f.dtype, f.shape) == (p.dtype, p.shape) and (f - p).abs().max() <= tolerance * p.abs().max()
    assert not found[1][case[2] == 0].any()  # of z, at positions without a label


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_the_fast_gradients_err_no_more_than_twice_the_plain_ones(kind):
    seed, shape = 0, (131, 60, (1, 3, 40), 7)
    exact = value_and_gradients(LOSSES_OF[kind]["plain"], *random_case(kind, shape, seed=seed))
    narrow = random_case(kind, shape, torch.float32, torch.bfloat16, seed)
    fast, plain = (value_and_gradients(LOSSES_OF[kind][name], *narrow) for name in ("fast", "plain"))
    assert all(part.dtype == torch.float32 for part in fast)
    for f, p, e in zip(fast[1:], plain[1:], exact[1:], strict=True):
        assert (f - e).abs().mean() <= 2 * (p - e).abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_give_a_finite_loss_and_finite_gradients(kind):
    (z, *rest), (_, *leaves) = random_case(kind, dtype=torch.float32)
    z = (1000 * z).detach().requires_grad_()
    found = value_and_gradients(LOSSES_OF[kind]["fast"], (z, *rest), [z, *leaves], OBJECTIVES["both"])
    assert all(part.isfinite().all() for part in found)


def test_the_loss_is_the_sum_or_mean_of_the_cross_entropies_of_the_sizes():
    (z, table, labels, sizes), _ = random_case("table")
    of = [F.cross_entropy((z[:, :m] @ table[:, :m].T)[labels > 0], labels[labels > 0]) for m in sizes]
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(z, table, labels, sizes), sum(of))
        torch.testing.assert_close(loss(z, table, labels, sizes, reduction="mean"), sum(of) / 3)


@pytest.mark.parametrize("kind", ["table", "sample"])
def test_wrong_sizes_and_an_unknown_reduction_are_refused(kind):
    (z, table, labels, sizes), _ = random_case(kind)
    for loss in LOSSES_OF[kind].values():
        with pytest.raises(ValueError, match=r"the largest of the sizes \(2, 5\) is not the width 12 of z"):
            loss(z, table, labels, sizes[:-1])
        with pytest.raises(ValueError, match="reduction 'max' is neither 'mean' nor 'sum'"):
            loss(z, table, labels, sizes, reduction="max")


@pytest.mark.parametrize(("name", "positions"), [("fast", 2 * (2 + 3)), ("plain", 40)])  # of 2 sizes, and three buffers
def test_memory_holds_the_logits_of_one_chunk_of_positions(monkeypatch, name, positions):
    numbers = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            numbers.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    case, leaves = random_case("table", (40, 99, (2, 5), 0))
    hold(monkeypatch, case, 4)
    with Watch():
        value_and_gradients(LOSSES[name], case, leaves)
    assert max(numbers) == positions * 100


def test_distillation_targets_the_largest_sizes_scaled_softmax_without_a_gradient_to_it():
    log_scale = torch.tensor([0.4, -0.7])
    small, large = (torch.randn(4, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
    label = torch.tensor([1, 0, 5, 5])
    losses = losses_plain([small, large], label, label >= 0, Objective(log_scale, distill=0.25))
    of_small, of_large = (s * logits for s, logits in zip(log_scale.exp(), (small, large), strict=True))
    own, largest = (F.cross_entropy(scaled, label, reduction="sum") for scaled in (of_small, of_large))
    taught = -(of_large.softmax(1) * of_small.log_softmax(1)).sum()
    torch.testing.assert_close(losses, torch.stack([0.75 * own + 0.25 * taught, largest]))
    by_large, expected = (torch.autograd.grad(loss, large)[0] for loss in (losses.sum(), largest))
    torch.testing.assert_close(by_large, expected)


def test_teachers_replace_the_largest_size_in_the_targets_of_all_sizes():
    logits, label = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)], torch.tensor([1, 0, 5, 5])
    teacher = torch.randn(4, 6, dtype=torch.float64)
    losses = losses_plain(logits, label, label >= 0, Objective(distill=0.25, teacher=teacher))
    target = 0.75 * F.one_hot(label, 6) + 0.25 * teacher.softmax(dim=1)
    torch.testing.assert_close(losses, torch.stack([-(target * own.log_softmax(1)).sum() for own in logits]))


def test_draws_follow_the_distribution_and_never_include_token_0(monkeypatch):
    sampler = NegativeSampler(torch.tensor([99, 6, 0, 3, 1]), 200_000)
    expected = [(6 / 10 + 1 / 4) / 2, 1 / 8, (3 / 10 + 1 / 4) / 2, (1 / 10 + 1 / 4) / 2]
    assert sampler.q.tolist() == pytest.approx(expected)
    torch.manual_seed(0)
    items, log_kq = sampler.draw()
    share = items.bincount(minlength=5).double() / len(items)
    assert share.tolist() == pytest.approx([0, *expected], abs=0.005)
    assert log_kq.tolist()[:50] == pytest.approx([math.log(200_000 * expected[i - 1]) for i in items[:50]], rel=1e-5)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.tensor([0.0, 1.0], **options))
    assert sampler.draw()[0].tolist() == [1, 4]  # rounding may turn a number just below 1 into 1


@pytest.mark.parametrize("objective", ["the paper's", "history", "prior"])
def test_many_draws_give_the_loss_and_gradients_of_the_whole_catalogue(objective):
    objective = OBJECTIVES[objective]
    (z, table, labels, sizes), _ = random_case("table")
    z, table, labels = 0.3 * z, 0.3 * table, labels.clamp_min(1)
    torch.manual_seed(0)
    items, log_kq = NegativeSampler(labels.bincount(minlength=41), 100_000).draw()
    sample = Sample(table[labels], table[items], items, log_kq, table[TOKENS])
    sampled = sampled_matryoshka_cross_entropy(z, sample, labels, sizes, objective=objective)
    # Without token 0, which takes part in the exact loss but is never drawn.
    logits, seen = [z[:, :m] @ table[1:, :m].T for m in sizes], contains(HISTORY, 41)[:, 1:]
    prior = 0.0 if objective.prior is None else PRIOR[1:]
    exact = losses_plain(logits, labels - 1, labels > 0, objective, prior, seen).sum() / len(labels)
    leaves = [z, table, *([] if objective.history is None else [HISTORY_BIAS])]
    for s, e in zip(*([loss, *torch.autograd.grad(loss, leaves)] for loss in (sampled, exact)), strict=True):
        assert (s - e).abs().max() <= 0.04 * e.abs().max()


def test_a_positions_history_is_the_distinct_items_of_its_row_up_to_its_token_and_is_scored_in_blocks():
    tokens, position = torch.tensor([0, 4, 4, 3, 9, 9, 0]), torch.tensor([0, 0, 1, 2, 0, 1, 0])
    read = [[item for item in row.tolist() if item] for row in history_items(tokens, position, 3)]
    assert [sorted(row) for row in read] == [[], [4], [4], [3, 4], [9], [9], []]
    z, x = (torch.randn(130, 5, dtype=torch.float64) for _ in range(2))
    parameter = torch.tensor([0.3, -0.1], requires_grad=True)
    bias = learned_bias(parameter)
    bias.sum().backward()
    torch.testing.assert_close(bias, TIMES * parameter)
    assert parameter.grad.tolist() == [1, 1]  # not TIMES, which would dominate the norm that is clipped
    for longest in (1, 70):
        found, plain = (logits(z, x, longest, (2, 5)) for logits in (history_logits, history_logits_plain))
        torch.testing.assert_close(found, plain)


# ------------------------------------------------------------------------------------------------------------ baselines

FEW_ITEMS, DIM, LONGEST = 20, 8, 9
LENGTHS = (3, 1, 1, 9, 2, 5)


def a_model(name, **options):
    """Return a model in float64 with weights far from 0, but for the LRU's eigenvalues."""
    torch.manual_seed(0)
    settings = {"lru_max_len": LONGEST, "lru_r_min": 0.8, "lru_r_max": 0.99, "num_heads": 2} | options
    model = build_model(FEW_ITEMS, [], ModelSettings(model_code=name, mrl_hidden_sizes=(DIM,), **settings))
    return with_random_weights(model, 0.8).double().eval()


def packed(lengths=LENGTHS):
    x = torch.randn(sum(lengths), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.cat([torch.arange(length) for length in lengths]), max(lengths)


TRAINED = ["sasrec", "lrurec", "gru4rec"]


def test_sasrec_is_the_equations_of_its_docstring(monkeypatch):
    monkeypatch.setattr(sasrec, "ROWS", 2)  # attention in chunks
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


def test_lrurec_is_the_equations_of_its_docstring():
    model, (x, position, longest) = a_model("lrurec"), packed((7,))
    norm = lambda x, module: F.layer_norm(x, (DIM,), module.weight, module.bias)  # noqa: E731

    def recurrence(lru, x):
        """h_k = λ ⊙ h_{k-1} + γ ⊙ (B x_k + b), y_k = Re(C h_k) + c, in complex numbers."""
        B, C = torch.complex(lru.B_re, lru.B_im), torch.complex(lru.C_re, lru.C_im)
        b = torch.complex(lru.B_bias_re, lru.B_bias_im)
        eigenvalue, h, y = torch.exp(torch.complex(-torch.exp(lru.nu_log), torch.exp(lru.theta_log))), 0, []
        for x_t in x.to(torch.complex128):
            h = eigenvalue * h + lru.gamma_log.exp() * (B @ x_t + b)
            y.append((C @ h).real + lru.C_bias)
        return torch.stack(y)

    h = norm(x, model.norm)
    for block in model.blocks:
        h = norm(h + recurrence(block.lru, h), block.norm1)
        h = norm(h + block.W2(F.gelu(block.W1(h))), block.norm2)
    torch.testing.assert_close(model.encode(x, position, longest), h)
    assert (model.blocks[1].lru.B_re.shape, model.blocks[1].W1.weight.shape) == ((2 * DIM, DIM), (4 * DIM, DIM))


def test_gru4rec_is_torchs_gru_layer_by_layer():
    model, (x, position, longest) = a_model("gru4rec", lru_num_blocks=2), packed((7,))
    h = x
    for gru in model.layers:
        h, _ = gru(h)
    torch.testing.assert_close(model.encode(x, position, longest), h)


@pytest.mark.parametrize("name", ["fmrlrec", *TRAINED])
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_packed_history_is_encoded_as_alone_and_at_some_tokens_as_at_all(name, num_blocks):
    model, (x, position, longest) = a_model(name, lru_num_blocks=num_blocks), packed()
    alone = torch.cat([model.encode(own, torch.arange(len(own)), len(own)) for own in x.split(LENGTHS)])
    at = torch.tensor([0, 20, 7, 7])
    found = model.encode(x.requires_grad_(), position, longest, at=at)
    torch.testing.assert_close(model.encode(x, position, longest), alone)
    torch.testing.assert_close(model.encode(x, position, 16), alone)  # longest may be larger
    torch.testing.assert_close(found, alone[at])
    gradients = [torch.autograd.grad((z**3).sum(), x)[0] for z in (found, model.encode(x, position, longest)[at])]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", TRAINED)
def test_shares_of_a_batch_have_the_dropout_of_the_batch(name):
    model, (x, position, longest) = a_model(name, lru_dropout=0.4, lru_attn_dropout=0.3).train(), packed()
    torch.manual_seed(0)
    whole = model.encode(x, position, longest)
    for rows, first in ((slice(0, 14), 0), (slice(14, None), 14), (slice(14, None), torch.tensor(14))):
        set_share(model, (first, len(x)))
        torch.manual_seed(0)
        torch.testing.assert_close(model.encode(x[rows], position[rows], longest), whole[rows])
    set_share(model, None)
    assert (model.eval().encode(x, position, longest) - whole).abs().max() > 0.1


@pytest.mark.parametrize("name", TRAINED)
def test_settings_reach_a_baseline(name):
    flags = {"lru_dropout": 0.1, "lru_attn_dropout": 0.2, "lru_num_blocks": 3, "lru_use_bias": False, "num_heads": 4}
    model = a_model(name, **flags, lru_r_min=0.6, lru_r_max=0.61)
    layers = model.layers if name == "gru4rec" else model.blocks
    inner = model.hidden_dropout if name == "gru4rec" else layers[-1].attn_dropout
    assert (model.sizes, len(layers), model.dropout.p, inner.p) == ((DIM,), 3, 0.1, 0.2)
    if name == "sasrec":
        assert (layers[0].attention.num_heads, len(model.positions)) == (4, LONGEST)
    if name == "lrurec":
        modulus = torch.exp(-torch.exp(layers[0].lru.nu_log))
        assert layers[0].lru.B_bias_re is None and 0.599 < modulus.min() <= modulus.max() < 0.611


def test_itemknn_ranks_by_the_shrunk_cosine_with_the_last_item_then_by_popularity():
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(0, 30, (200,), generator=generator).sort().values
    items = torch.randint(1, 13, (200,), generator=generator)
    model = ItemKNN(14)
    model.count(users, items)
    had = torch.zeros(30, 15)
    had[users, items] = 1
    together, n = had.T @ had, had.sum(dim=0)
    expected = together / ((n[:, None] * n).sqrt() + SHRINKAGE)
    expected.fill_diagonal_(0)  # an item is not its own neighbour
    scores = model.scores(torch.arange(15))
    torch.testing.assert_close(scores.clamp_min(0), expected)
    counts = items.bincount(minlength=15)
    assert (scores[13].argsort(stable=True) == counts.argsort(stable=True)).all()  # no user had item 13
    assert (scores[expected == 0] < 0).all() and scores[13, 14] == -1


TINY = "--dataset_code tiny --device cpu --lr 0.01 --warmup_steps 1 --train_batch_size 8 --lru_num_blocks 1"


def run_train(model, flags=""):
    epochs = "" if model in COUNTING else "--num_epochs 2 --mrl_hidden_sizes 8"
    return train.main(shlex.split(f"--model_code {model} {TINY} {epochs} {flags}"))


def metrics_in(run, suffix=""):
    found = json.loads((run / f"test_mrl_metrics{suffix}.json").read_text())
    return {int(size): metrics for size, metrics in found.items()}


@pytest.mark.parametrize("model", MODEL_PRESETS)
def test_a_baseline_is_trained_and_evaluated_like_any_model(workplace, model):
    run = run_train(model)
    config, sources = read_config(run)
    size = config.mrl_hidden_sizes[-1]
    assert run.name.endswith(f"-{model}-{size}") and unfinished(run) == ""
    assert (config.branch, sources["use_img_encoder"]) == ("id", "preset")
    assert read_log(run)[-1]["val"].keys() == {str(size)}
    tested = metrics_in(run)
    assert tested == {size: json.loads((run / "test_metrics.json").read_text())}
    assert eval_script.main(["--model_code", model]) == tested == metrics_in(run)
    masked = eval_script.main(["--run", str(run), "--mask_history", "--test_batch_size", "3"])
    assert metrics_in(run, "_history_masked") == masked
    assert masked[size]["NDCG@10"] > tested[size]["NDCG@10"]  # 12 items, several of them in the history


@pytest.mark.parametrize(
    ("model", "cut_at"), [("itemknn", (ItemKNN, "count")), ("popularity", (testing, "test_every_size"))]
)
def test_a_counting_run_that_was_cut_off_is_counted_again_and_tested(workplace, monkeypatch, model, cut_at):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    whole = run_train(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*cut_at, stop)
        run_train(model, "--run_name cut")
    cut = train.main(["--resume", "latest"])
    assert cut.name.endswith("cut") and [line["epoch"] for line in read_log(cut)] == [1]
    assert metrics_in(cut) == metrics_in(whole)


def test_a_baseline_is_exported_by_its_run_and_not_sliced(workplace):
    run = str(run_train("popularity"))
    assert [folder.name for folder in export.main(["--run", run])] == ["tiny-popularity"]
    for main, flags, problem in (
        (deploy.main, ["--run", run], "is a run of popularity; this command takes runs of fmrlrec"),
        (export.main, [], r"matches --model_code fmrlrec(.|\n)*: model_code popularity"),
        (cold_items.main, ["test", run], "is a run, not an export"),
        (eval_script.main, ["--run", run, "--alone"], r"--alone tests slices of fmrlrec; .* is a run of popularity"),
    ):
        with pytest.raises(InputError, match=problem):
            main(flags)


def test_all_training_items_are_counted_however_old(workplace):
    run = run_train("popularity", "--lru_max_len 1")
    sequences = load_catalog("data", "tiny").sequences
    counts = np.bincount(np.concatenate([sequences.of(u)[:-2] for u in range(20)]), minlength=13)
    _, _, model = load_run(run)
    assert isinstance(model, CountingModel) and not list(model.parameters())
    assert model.scores(torch.tensor([2, 5])).tolist() == [counts.tolist()] * 2


PAGE = (Path(__file__).parents[1] / "model/README.md").read_text(encoding="utf-8").partition("## Extend it")[2]
BLOCKS = dict(re.findall(r"^### (.*?)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
TWO_ROWS = torch.tensor([0, 1, 2, 0, 1])


def run_example(heading, registry, name, monkeypatch):
    monkeypatch.setitem(registry, name, None)
    exec(BLOCKS[heading], {})
    return registry[name]


def step_losses(model, **options):
    tokens, labels = torch.tensor([1, 2, 3, 2, 3]), torch.tensor([2, 3, 0, 3, 4])
    batch = Batch(tokens, labels, TWO_ROWS, 3, (0, 5), torch.tensor(4))
    step = Step(model, torch.optim.Adam(model.parameters(), lr=0.05), TrainingSettings(**options))
    return [step(batch).item() for _ in range(40)]


def test_the_model_is_trained_like_any_other(monkeypatch):
    torch.manual_seed(0)
    model = run_example("A model", MODELS, "last_item", monkeypatch)(5, [], ModelSettings(mrl_hidden_sizes=(8,)))
    losses = step_losses(model)
    assert losses[-1] < 0.5 < losses[0]
    x, at = model.item_table()[[1, 2, 3, 2, 3]], torch.tensor([2, 4])
    assert torch.equal(model.encode(x, TWO_ROWS, 3, at), model.encode(x, TWO_ROWS, 3)[at])


def test_the_loss_trains_a_nested_model_and_the_metric_is_one_number_per_user(monkeypatch):
    torch.manual_seed(0)
    run_example("A loss", LOSSES, "smoothed", monkeypatch)
    settings = ModelSettings(mrl_hidden_sizes=(4, 8), lru_dropout=0.0, lru_attn_dropout=0.0)
    losses = step_losses(MODELS["fmrlrec"](5, [torch.randn(5, 6)], settings), loss="smoothed")
    assert losses[-1] < 1.6 < losses[0]  # the sum of two sizes
    hit = run_example("A metric", evaluation.METRICS, "Hit", monkeypatch)
    assert hit(torch.tensor([1.0, 10.0, 10.5]), 10).tolist() == [1, 1, 0]


def test_the_modality_is_cached_and_made_alike_for_new_products(tmp_path, monkeypatch):
    write_prepared(tmp_path, "tiny")
    catalog, definitions = load_catalog(tmp_path, "tiny"), {}
    exec(BLOCKS["A modality"], definitions)
    monkeypatch.setattr(registry, "REGISTRY", (*registry.REGISTRY, definitions["Brand"]))
    short = type("Short", (LexicalEncoder,), {"dim": 64})  # an encoder of one's own
    monkeypatch.setattr(definitions["Brand"], "load_encoder", lambda *_: short())
    text, brands = feature_parts(catalog, language="lexical", cache_root=tmp_path / "features")
    assert len(list(tmp_path.glob("features/tiny/brand-lexical-*.npy"))) == 1
    assert len(np.unique(brands, axis=0)) == len({record.get("brand") for record in catalog.metadata})

    settings = FeatureSettings(language_encoder="lexical", use_img_encoder=False)
    used, load = [], definitions["Brand"].load_encoder
    monkeypatch.setattr(definitions["Brand"], "load_encoder", lambda *given: used.append(1) or load(*given))
    described = registry.describe_features(settings, [text.shape[1], brands.shape[1]])
    made = registry.embed_records(catalog.metadata, described, registry.described_modalities(described, {}))
    np.testing.assert_allclose(made, np.concatenate([text, brands], axis=1), atol=1e-3)
    assert used, "new products are read by the modality's own encoder"
