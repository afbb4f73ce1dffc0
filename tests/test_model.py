"""The model's parts, and its slices with and without the extensions beyond the paper."""

import copy
import math
import shlex
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from benchmarks import memory_mb
from config import ModelSettings, TrainingSettings
from dataloader import TrainLoader, eval_batches, eval_rows, train_rows
from model import FMRLRec, count_parameters, fast, slice_model
from model import items as items_module
from model.base import Dropout, nested_mask
from model.extensions import item_table as item_table_module
from model.extensions.item_table import Whitening, fit_whitening, whiten
from model.extensions.objective import CROSS_ENTROPY, Objective, Teachers, adjusted_prior, history_items, learned_bias
from model.extensions.sampled_loss import SAMPLED_LOSSES, NegativeSampler, Sample
from model.fast import linear_recurrence, nested_linear
from model.fmrl import FMRLLinear, nested_linear_plain
from model.items import ItemEncoder
from model.loss import LOSSES
from model.lru import LRU, linear_recurrence_plain, ring_init
from serving import Recommender, export
from tests.made_up import NoUpdate, as_sequences, random_model, write_prepared
from trainer import sparse_rows as sparse_rows_module
from trainer.evaluation import evaluate
from trainer.load_run import load_run
from trainer.sparse_rows import sparse_rows
from trainer.step import Step, WeightAverage, build_optimizer

PAPER_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
NUM_ITEMS, WIDTHS, SIZES, DIM = 23, (5, 3), (2, 4, 8), 8


def drawn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_relatively_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype) and (a - e).abs().max() <= tolerance * e.abs().max()


def recommender(features=None, **options):
    torch.manual_seed(0)
    options = {"mrl_hidden_sizes": SIZES, "lru_r_min": 0.3, "lru_r_max": 0.9} | options
    return FMRLRec(NUM_ITEMS, features, ModelSettings(**options))


@pytest.mark.parametrize("sizes", [(20,), (3, 4, 11), (1, 7, 16, 39)])
def test_an_output_reads_the_inputs_up_to_the_end_of_its_own_increment(sizes):
    ends = [next(m for m in sizes if output < m) for output in range(sizes[-1])]
    assert nested_mask(sizes).tolist() == [[1] * end + [0] * (sizes[-1] - end) for end in ends]
    layer = FMRLLinear(sizes)
    torch.nn.init.uniform_(layer.weight)
    read = torch.autograd.functional.jacobian(layer, torch.randn(sizes[-1])) != 0
    assert torch.equal(read, nested_mask(sizes) != 0)


@pytest.mark.parametrize("name", ["weight", "bias", "B_re", "C_re", "B_bias_re", "C_bias"])
def test_every_block_of_rows_starts_uniform_within_the_bound_of_its_own_fan_in(name):
    torch.manual_seed(0)
    sizes = (8, 24, 64)
    linear, lru = FMRLLinear(sizes), LRU(sizes, bias=True, r_min=0.0, r_max=0.1)
    weight = getattr(linear, name, getattr(lru, name, None)).detach()
    assert not any(part.any() for part in (lru.B_im, lru.C_im, lru.B_bias_im))
    if weight.ndim == 2:
        assert torch.equal(weight != 0, nested_mask(sizes) != 0)
    for low, high in pairwise((0, *sizes)):
        block = weight[low:high, :high] if weight.ndim == 2 else weight[low:high]
        assert 0.5 / math.sqrt(high) < min(block.max(), -block.min()) <= block.abs().max() <= 1 / math.sqrt(high)


@pytest.mark.parametrize(("num_blocks", "expected"), [(1, 5_605_824), (2, 9_113_472)])
def test_the_papers_model_has_the_parameters_of_the_released_one(num_blocks, expected):
    model = FMRLRec(3, torch.zeros(3, 2048), ModelSettings(mrl_hidden_sizes=PAPER_SIZES, lru_num_blocks=num_blocks))
    assert count_parameters(model) == expected


@pytest.mark.parametrize(("dtype", "biased", "tolerance"), [(torch.float64, True, 1e-13), (torch.float32, False, 1e-5)])
@pytest.mark.parametrize("sizes", [(1,), (1, 2, 64), (15, 16, 17, 64), PAPER_SIZES[:5]], ids=str)
def test_bands_have_the_values_and_gradients_of_the_masked_weight(sizes, dtype, biased, tolerance):
    x, weight, bias = (drawn(*shape, dtype=dtype) for shape in ((2, 5, sizes[-1]), (sizes[-1],) * 2, sizes[-1:]))
    before, found, inputs = weight.detach().clone(), [], (x, weight, bias)[: 2 + biased]
    for linear in (nested_linear, nested_linear_plain):
        y = linear(x, weight, bias if biased else None, sizes)
        found.append([y, *torch.autograd.grad((y * drawn(*y.shape, dtype=dtype, seed=1)).sum(), inputs)])
    assert_relatively_close(*found, tolerance)
    assert torch.equal(weight.detach(), before)


scans = pytest.mark.parametrize("scan", [fast._scan_by_steps, fast._scan_by_doubling])  # CPU, GPU


def positions_of(lengths):
    return torch.cat([torch.arange(n) for n in lengths])


def recurrence_inputs(num_tokens, dtype=torch.float64, dim=5, radius=0.99):
    """Return u_re, u_im, λ_re, λ_im with |λ| up to `radius`; all require gradients."""
    u_re, u_im = drawn(2, num_tokens, dim).detach()
    eigenvalue = torch.polar(radius * torch.linspace(0.05, 1, dim).double(), drawn(dim, seed=2).detach() * 3)
    return [part.to(dtype).requires_grad_() for part in (u_re, u_im, eigenvalue.real, eigenvalue.imag)]


def recurrence_and_gradients(recurrence, inputs, *arguments):
    h_re, h_im = recurrence(*inputs, *arguments)
    w_re, w_im = drawn(2, *h_re.shape, dtype=h_re.dtype, seed=1)
    objective = (w_re * h_re + w_im * h_im + 0.1 * h_re * h_im).sum()
    return [h_re, h_im, *torch.autograd.grad(objective, inputs, materialize_grads=True)]


@scans
@pytest.mark.parametrize(("dtype", "radius", "tolerance"), [(torch.float64, 0.999, 1e-11), (torch.float32, 0.9, 1e-5)])
@pytest.mark.parametrize("lengths", [[1], [65, 1, 63], [300, 3, 1, 129]], ids=str)
def test_either_scan_has_the_values_and_gradients_of_the_loop(monkeypatch, lengths, dtype, radius, tolerance, scan):
    monkeypatch.setattr(fast, "_scan", scan)
    # The second time after a begin token, whose state is not carried on, and with a larger `longest`.
    for position, longest in [(positions_of(lengths), max(lengths)), (positions_of([1, *lengths]), 2 * max(lengths))]:
        inputs = recurrence_inputs(len(position), dtype, radius=radius)
        quick = recurrence_and_gradients(linear_recurrence, inputs, position, longest)
        plain = recurrence_and_gradients(linear_recurrence_plain, inputs, position)
        assert_relatively_close(quick, plain, tolerance)


@pytest.mark.parametrize(("r_min", "r_max"), [(0.0, 1.0), (0.2, 0.8), (0.9, 0.999)])
def test_eigenvalues_start_spread_evenly_over_the_area_of_the_ring(monkeypatch, r_min, r_max):
    torch.manual_seed(0)
    nu_log, theta_log, gamma_log = (part.double() for part in ring_init(20_000, r_min, r_max))
    modulus = torch.exp(-torch.exp(nu_log))
    assert modulus.min() >= r_min - 1e-6 and modulus.max() <= r_max + 1e-6
    at = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]).double()
    for share in ((modulus**2 - r_min**2) / (r_max**2 - r_min**2), torch.exp(theta_log) / (2 * math.pi)):
        torch.testing.assert_close(torch.quantile(share, at), at, rtol=0, atol=0.02)
    torch.testing.assert_close(gamma_log.exp() ** 2, 1 - modulus**2, rtol=1e-5, atol=1e-6)
    for end in (0.0, 1 - 2**-24):  # of a uniform draw
        monkeypatch.setattr(torch, "rand", lambda *shape, end=end, **options: torch.full(shape, end, **options))
        assert all(part.isfinite().all() for part in ring_init(3, r_min, r_max))


def parts(*dtypes):
    return [drawn(NUM_ITEMS, w, seed=w).detach().half().to(dtype) for w, dtype in zip(WIDTHS, dtypes, strict=True)]


def encoder_of(features, embedding=0):
    torch.manual_seed(1)
    encoder = ItemEncoder(NUM_ITEMS, DIM, features, embedding)
    if embedding:
        torch.nn.init.uniform_(encoder.V, -1, 1)
    return encoder


@pytest.mark.parametrize(("embedding", "rows"), [(0, 1), (2, 7), (8, 2**14)])
def test_an_item_is_its_widened_features_projected_plus_its_embedding(monkeypatch, rows, embedding):
    monkeypatch.setattr(items_module, "ROWS", rows)
    features = parts(torch.float16, torch.float32)
    encoder, items = encoder_of(features, embedding), torch.tensor([0, 5, 5, NUM_ITEMS, 1, 0])
    whole = F.pad(torch.cat([part.float() for part in features], dim=1), (0, 0, 1, 0))  # token 0 has no features
    expected = whole @ encoder.projection.weight.T + encoder.projection.bias
    expected[:, :embedding] += encoder.V if embedding else 0
    torch.testing.assert_close(encoder.everything(), expected)
    torch.testing.assert_close(encoder(items), expected[items])
    assert torch.equal(encoder.rows(items, torch.float64), whole[items].double())
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(encoder.factors(dtype).features, whole.to(dtype))
    assert [part.data_ptr() for part in encoder.features] == [part.data_ptr() for part in features]
    assert set(encoder.state_dict()) - {"V"} == {"projection.weight", "projection.bias"}  # not the frozen features
    with pytest.raises(ValueError, match=r"features of shape \[22, 3\] do not describe 23 items"):
        encoder_of([features[0], features[1][1:]])


def embedding_model(embedding=SIZES[-1], gate=False, **options):
    """Return a model without dropout; V is zero, as before training. A gate leaves every 11th item out."""
    options |= {"item_embedding": embedding, "item_embedding_gate": gate, "lru_dropout": 0.0, "lru_attn_dropout": 0.0}
    model = recommender(parts(torch.float32, torch.float32), **options)
    if model.items.gate:
        model.items.gate.trained.copy_(torch.arange(NUM_ITEMS + 1) % 11 > 0)
    return model


def batch_of(users=20, seed=0):
    random = np.random.default_rng(seed)
    sequences = [random.integers(1, NUM_ITEMS + 1, size=n) for n in random.integers(3, 12, size=users)]
    loader = TrainLoader(train_rows(as_sequences(sequences), 20), users, 0, torch.device("cpu"))
    return next(loader.epoch(1)), loader.label_counts(NUM_ITEMS)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are unmapped on Linux alone")
@pytest.mark.parametrize(("mapped", "megabytes"), [(1, 0), (2**30, 16)])
def test_pages_of_large_mapped_features_leave_memory_after_they_are_read(monkeypatch, tmp_path, mapped, megabytes):
    monkeypatch.setattr(item_table_module, "LARGE", 0)
    monkeypatch.setattr(items_module, "MAPPED", mapped)
    np.save(tmp_path / "features.npy", np.ones((4096, 2048), np.float16))
    encoder = ItemEncoder(4096, 4, torch.from_numpy(np.load(tmp_path / "features.npy", mmap_mode="c")))
    encoder.rows(torch.zeros(1, dtype=torch.int64), torch.float16)  # loads what torch loads on first use
    before = memory_mb("RssFile")
    assert all((encoder.rows(torch.arange(1, 4097), torch.float16) == 1).all() for _ in range(2))
    assert memory_mb("RssFile") - before == pytest.approx(megabytes, abs=2)


def test_an_embedding_starts_at_zero_and_ends_at_a_size():
    assert torch.equal(embedding_model().item_table(), embedding_model(0).item_table())
    assert [embedding_model(width).items.V.shape[1] for width in (1, 3, 100)] == [2, 2, 8]
    with pytest.raises(ValueError, match="a learned item table takes no item embedding"):
        recommender(item_embedding=SIZES[-1])


def test_a_gate_leaves_the_embedding_of_untrained_items_out_and_rescales_their_rows_in_evaluation():
    items = embedding_model(gate=True).items
    torch.nn.init.uniform_(items.V, -1, 1)
    content = items.everything() - items.gate(items.V)
    expected = content[:12] + items.V[:12] * (torch.arange(12) % 11 > 0)[:, None]
    items.gate.scale.fill_(3)
    torch.testing.assert_close(items.everything()[:12], expected)
    items.eval()
    torch.testing.assert_close(items.everything()[[1, 6, 11]], torch.cat([expected[[1, 6]], 3 * content[[11]]]))
    items.gate.trained[0] = True  # sequences begin with token 0, which is no item
    ungated = embedding_model().items
    torch.nn.init.uniform_(ungated.V, -1, 1)
    for each, trained in ((items, items.gate.trained[1:]), (ungated, slice(None))):
        tables = each.everything(), each.everything() - each.V
        norms = [table[1:][trained].norm(dim=1).mean() for table in tables]
        assert each.new_item_scale() == pytest.approx((norms[0] / norms[1]).item())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("embedding", "gate", "bias"), [(4, False, True), (8, False, False), (4, True, False)])
@pytest.mark.parametrize("negatives", [0, 9])
def test_a_step_has_the_loss_and_the_gradients_of_the_plain_loss(negatives, embedding, gate, bias, loss):
    trained, (batch, counts) = embedding_model(embedding, gate, history_bias=bias).double().train(), batch_of()
    learned = [trained.items.V, *([trained.history_bias] if bias else [])]
    for parameter in learned:
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    sampler = NegativeSampler(counts, negatives) if negatives else None
    torch.manual_seed(3)
    found = Step(trained, NoUpdate(), TrainingSettings(loss=loss, max_grad_norm=0), sampler)(batch)
    gradients = tuple(parameter.grad for parameter in learned)

    torch.manual_seed(3)
    table, objective = trained.item_table(), CROSS_ENTROPY
    x = table[batch.tokens]
    z = trained.encode(x, batch.position, batch.longest)
    if bias:
        history = history_items(batch.tokens, batch.position, batch.longest)
        objective = Objective(history_bias=learned_bias(trained.history_bias), history=history)
    if negatives:
        items, log_kq = sampler.draw()
        table = Sample(table[batch.labels], table[items], items, log_kq, x)
    plain = (SAMPLED_LOSSES if negatives else LOSSES)["plain"]
    expected = plain(z, table, batch.labels, SIZES, objective=objective)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, learned))
    assert torch.equal(gradients[0].any(dim=1), trained.items.gate.trained if gate else torch.ones(NUM_ITEMS + 1) > 0)


def test_teachers_average_the_scaled_scores_of_their_models():
    (batch, counts), scaled, plain = batch_of(), embedding_model(4, False), embedding_model(8, False)
    scaled.log_scale = torch.nn.Parameter(torch.tensor([0.0] * (len(SIZES) - 1) + [0.7]))
    teachers, expected = Teachers([scaled, plain]), 0
    z = teachers.encode(batch.tokens, batch.position, batch.longest)
    for model, scale in ((scaled, math.exp(0.7)), (plain, 1.0)):
        table = model.item_table()
        expected = expected + scale / 2 * model.encode(table[batch.tokens], batch.position, batch.longest) @ table.T
    torch.testing.assert_close(teachers.logits(z, torch.float32), expected.detach())

    items, history = torch.tensor([3, 1, 7]), history_items(batch.tokens, batch.position, batch.longest)
    columns = torch.cat([batch.labels[:, None], items.expand(len(z), 3), history], dim=1)
    of_sample = teachers.sampled_logits(z, batch.labels, items, batch.tokens, batch.longest, torch.float32)
    of_history = torch.cat([torch.ones(len(z), 4, dtype=torch.bool), history > 0], dim=1)
    torch.testing.assert_close(of_sample[of_history], expected.gather(1, columns).detach()[of_history])

    expected_prior = torch.tensor([1 / 3, 1 / 3, 3 / 5, 60 / 62]).log()
    torch.testing.assert_close(adjusted_prior(torch.tensor([0, 1, 3, 60]), 2.0), expected_prior)
    teachers.adjustments, prior = [3.0, 0.0], adjusted_prior(counts, 2.0)
    teachers.add_priors(counts, prior)
    z = teachers.encode(batch.tokens, batch.position, batch.longest)
    trained_on = expected.detach() + adjusted_prior(counts, 3.0) / 2
    torch.testing.assert_close(teachers.logits(z, torch.float32) + prior, trained_on)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("negatives", [0, 9])
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(negatives, loss):
    options = {"mrl_hidden_sizes": (8,), "item_embedding": 8, "logit_scale": True, "history_bias": True}
    settings = ModelSettings(**options, lru_dropout=0.0, lru_attn_dropout=0.0)
    model, (batch, counts) = FMRLRec(NUM_ITEMS, torch.randn(NUM_ITEMS, 5), settings).double(), batch_of()
    sampler = NegativeSampler(counts, negatives) if negatives else None
    taught = TrainingSettings(distill=1.0, loss=loss, max_grad_norm=0)
    teachers, prior = Teachers([copy.deepcopy(model)], [3.0]), adjusted_prior(counts, 3.0).double()
    teachers.add_priors(counts, prior)
    Step(model.train(), NoUpdate(), taught, sampler, None, teachers, prior)(batch)
    model.history_bias.grad = None
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-12


def train_embedding(updates, model):
    settings = TrainingSettings(weight_decay=0.1, adam_epsilon=1e-30, item_embedding_updates=updates)
    rows = sparse_rows(model, settings, sampled=True)
    average = WeightAverage(model, 0.9, rows)
    step = Step(model, build_optimizer(model, settings, rows), settings, NegativeSampler(batch_of()[1], 3), rows)
    torch.manual_seed(0)
    for number in range(1, 13):
        step.optimizer.param_groups[0]["lr"] = step.optimizer.param_groups[1]["lr"] = 0.1 / number
        step(batch_of(users=2, seed=number)[0])
        average.update(model, number)
    assert (rows is None) == (updates == "all")
    if rows:
        assert len(rows.last.unique()) > 1  # rows that were read last in different steps
        rows.catch_up()
    return [*model.parameters(), *average.model.parameters()]


@pytest.mark.parametrize(("gate", "window"), [("none", 6), ("learned", 6), (None, 4096)])  # None: a learned table
def test_updates_by_rows_train_the_weights_and_averages_of_dense_adamw(monkeypatch, gate, window):
    monkeypatch.setattr(sparse_rows_module, "WINDOW", window)
    by_rows, dense = (
        train_embedding(updates, (embedding_model(4, gate) if gate else recommender()).double())
        for updates in ("rows", "all")
    )
    assert_relatively_close(by_rows, dense, 1e-10)


def test_compact_moments_are_a_rounded_m_and_the_mean_of_v_over_each_increment():
    weight, plain = (torch.nn.Parameter(drawn(5, 4).detach()) for _ in range(2))
    settings = TrainingSettings(item_embedding_updates="compact")
    rows = sparse_rows(SimpleNamespace(items=SimpleNamespace(learned=weight), sizes=(1, 4, 8)), settings, sampled=True)
    m, v = torch.zeros(5, 4, dtype=torch.bfloat16), torch.zeros(5, 4, dtype=torch.float64)
    for t in range(1, 4):
        gradient = drawn(5, 4, seed=t).detach()
        (rows.read(torch.arange(5), weight) * gradient).sum().backward()
        rows.collect()
        rows.update(lr=0.1)
        mean = torch.cat([part.square().mean(1, keepdim=True).expand_as(part) for part in gradient.split([1, 3], 1)], 1)
        now, v = 0.9 * m.double() + 0.1 * gradient, 0.999 * v + 0.001 * mean
        step = now / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + settings.adam_epsilon)
        plain.data = plain.data * (1 - 0.1 * settings.weight_decay) - 0.1 * step
        m = now.bfloat16()
    torch.testing.assert_close(weight, plain)
    assert rows.m.dtype == torch.bfloat16 and rows.v.shape == (5, 2)


def test_an_embedding_is_updated_by_rows_if_the_softmax_is_sampled():
    for items, updates, device, sampled, expected in (
        (100_000, "auto", "cpu", True, True),
        (99_999, "auto", "cpu", True, False),
        (100_000, "auto", "meta", True, False),
        (99_999, "rows", "meta", True, True),
        (100_000, "compact", "cpu", False, False),
    ):
        weight = torch.nn.Parameter(torch.zeros(items + 1, 1, device=device))
        model = SimpleNamespace(items=SimpleNamespace(learned=weight), sizes=(1,))
        settings = TrainingSettings(item_embedding_updates=updates)
        assert (sparse_rows(model, settings, sampled) is not None) == expected


def features_of(items=200, width=12, rank=12, seed=0):
    """Return features [items, width] float64 of very different variances, far from the origin."""
    random = np.random.default_rng(seed)
    directions = np.linalg.qr(random.normal(size=(width, width)))[0][:rank] * np.logspace(0, -2, rank)[:, None]
    return torch.from_numpy(random.normal(size=(items, rank)) @ directions + random.normal(size=width))


def whitened_plain(features):
    """Return the left singular vectors of the centred features, rotated back, of length 1."""
    left, singular, right = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    varies = singular > 2e-3 * singular[0]
    return F.normalize(left[:, varies] @ right[varies], dim=1)


def whitened(features):
    return whiten(features, *fit_whitening(features))


@pytest.mark.parametrize(("items", "rank", "rows"), [(200, 12, 7), (200, 5, 2**14), (8, 12, 2**14)])
def test_features_of_any_rank_are_whitened_as_defined_and_an_item_without_features_stays_zero(
    monkeypatch, items, rank, rows
):
    monkeypatch.setattr(item_table_module, "ROWS", rows)
    features = features_of(items, rank=rank)
    found = whitened(torch.cat([features[:5], torch.zeros(3, 12), features[5:]]))
    assert not found[5:8].any()
    torch.testing.assert_close(found[[*range(5), *range(8, items + 3)]], whitened_plain(features), rtol=1e-7, atol=1e-7)
    for same in (torch.full((9, 4), 0.3).double(), torch.empty(0, 4).double()):  # does not vary
        assert torch.equal(whitened(same), torch.zeros_like(same))


@pytest.mark.parametrize(("fit", "large"), [(True, 0), (False, 2**28)])
def test_every_encoder_is_whitened_alone_and_its_transform_is_saved_with_the_weights(monkeypatch, tmp_path, fit, large):
    monkeypatch.setattr(item_table_module, "LARGE", large)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    raw = [features_of(60).half(), features_of(60, 6, rank=6, seed=1).float()]
    settings = ModelSettings(mrl_hidden_sizes=SIZES, lru_num_blocks=1)
    whitenings = Whitening(raw, True), Whitening(raw, fit)
    saved, other = (FMRLRec(60, whitening.features(), settings, whitening) for whitening in whitenings)
    for found, part in zip(saved.items.features, raw, strict=True):
        torch.testing.assert_close(found, whitened(part.double()).to(part.dtype), rtol=1e-3, atol=1e-3)
    assert (str(tmp_path) in Path("/proc/self/maps").read_text()) == (large == 0)
    state = {name: 2 * value if name.endswith("mean_0") else value for name, value in saved.state_dict().items()}
    factors = other.items.factors(torch.float32).features
    other.load_state_dict(state)
    expected = whiten(raw[0].float(), 2 * whitenings[0].mean_0, whitenings[0].matrix_0)
    assert torch.equal(other.items.features[0], expected.half())
    assert torch.equal(other.items.features[1], saved.items.features[1])
    assert not torch.equal(other.items.factors(torch.float32).features, factors)
    small = slice_model(other, 4)
    assert small.items.whitening is other.items.whitening
    torch.testing.assert_close(small.item_table(), other.item_table()[:, :4])


def test_dropout_may_spare_the_first_dimensions_or_all():
    dropout, x = Dropout(0.6, start=5), torch.rand(4000, 12) + 1
    torch.manual_seed(0)
    spared, rest = dropout(x).split([5, 7], dim=1)
    torch.manual_seed(0)
    assert torch.equal(spared, x[:, :5]) and torch.equal(rest, Dropout(0.6)(x[:, 5:]))
    assert (rest == 0).float().mean(dim=0).sub(0.6).abs().max() < 0.04 and Dropout(0.999999)(x).count_nonzero() < 20
    for none in (dropout.eval(), Dropout(0.6, start=12), Dropout(0.6, start=13)):
        assert torch.equal(none(x), x)


# -------------------------------------------------------------------------------------------------------------- slicing

SLICED_ITEMS, MAX_LEN, KS = 40, 10, (1, 5, 10)


def model_of(sizes, branch="both", **options):
    features = drawn(SLICED_ITEMS, 9, dtype=torch.float32).detach() if branch == "both" else None
    return random_model(sizes, num_items=SLICED_ITEMS, features=features, **options)


@torch.no_grad()
def scores_of(model, rows, size=None):
    """Return the scores [U, N+1] of every user's history by the first `size` dimensions."""
    (batch,) = eval_batches(rows, 1000, torch.device("cpu"))
    table = model.item_table()
    z = model.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]
    return z[:, :size] @ table[:, :size].T


@pytest.mark.parametrize(
    ("branch", "bias", "options"),
    [
        ("both", (), {}),
        ("id", (), {"post_norm": True}),
        ("both", (0.9, -0.4, 0.2, 1.0, -0.7), {"post_norm": True, "logit_scale": True, "lru_use_bias": False}),
    ],
)
@pytest.mark.parametrize("sizes", [(25, 27), (3, 9, 20, 21, 47)], ids=str)
def test_a_slice_has_the_scores_and_metrics_of_the_full_models_prefix(sizes, branch, bias, options):
    model, random = model_of(sizes, branch, history_bias=bias[: len(sizes)], **options), np.random.default_rng(0)
    histories = [random.integers(1, SLICED_ITEMS + 1, size=length) for length in random.integers(3, 25, size=15)]
    rows = eval_rows(as_sequences(histories), MAX_LEN, "test")
    expected = evaluate(model, rows, sizes=sizes, batch_size=4, ks=KS)
    for size in sizes:
        small, prefix = slice_model(model, size), scores_of(model, rows, size)
        assert (scores_of(small, rows) - prefix).abs().max() <= 1e-5 * prefix.abs().max()
        assert evaluate(small, rows, sizes=(size,), batch_size=4, ks=KS) == {size: expected[size]}


@pytest.mark.parametrize(("size", "by_way_of", "embedding"), [(8, 33, 3), (20, 33, 20), (20, 20, 33)])
@pytest.mark.parametrize("branch", ["both", "id"])
def test_a_slice_or_slice_of_a_slice_owns_the_top_left_of_every_weight(branch, size, by_way_of, embedding):
    embedding = embedding if branch == "both" else 0
    options = {"dropout_from": 2, "item_embedding": embedding, "item_embedding_gate": embedding > 0}
    model = model_of((3, 8, 20, 33), branch, logit_scale=True, **options)
    small = slice_model(slice_model(model, by_way_of), size)
    assert slice_model(model.train(), size).training
    sizes = tuple(m for m in model.sizes if m <= size)
    assert small.settings == replace(model.settings, mrl_hidden_sizes=sizes)
    owners = zip(small.items.features, model.items.features, strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in owners)  # frozen: without a copy
    small = small.state_dict()
    for name, weight in model.state_dict().items():
        kept = [len(sizes)] if name == "log_scale" else [min(n, size) if n in model.sizes else n for n in weight.shape]
        assert torch.equal(small[name], weight[tuple(slice(0, n) for n in kept)])
        assert small[name].untyped_storage().nbytes() == small[name].nbytes
        assert small[name].data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("size", [0, 4, 20])
def test_an_untrained_size_is_refused_with_the_trained_ones(size):
    with pytest.raises(ValueError, match=f"size {size} was not trained; the model has 3, 8$"):
        slice_model(model_of((3, 8)), size)


SIZE, ITEMS = 4, 40
EVERYTHING = (
    "--dataset_code tiny --language_encoder lexical --img_encoder pixel --preset plus --dropout_from 2 --device cpu "
    "--mrl_hidden_sizes 2,4,8 --num_epochs 3 --lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --lru_max_len 6 "
    "--num_negatives 7 --item_embedding_updates rows"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Change to a folder with a run with texts, pictures and every extension; return it, its catalogue and model."""
    folder = tmp_path_factory.mktemp("home")
    write_prepared(folder / "data", "tiny", users=40, items=ITEMS, pictures=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = train.main(shlex.split(EVERYTHING))
        yield run, *load_run(run)[1:]


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_an_export_ranks_as_the_slice_and_new_products_are_whitened_projected_and_rescaled(loaded, engine, tmp_path):
    run, catalog, model = loaded
    export.main(shlex.split(f"--run {run} --size {SIZE} --format onnx --quantize none --out {tmp_path}/export"))
    recommender = Recommender.from_pretrained(tmp_path / "export", engine)
    assert recommender.config["features"]["whitened"] == [1024, 240]
    small = slice_model(model, SIZE)
    expected = scores_of(small, eval_rows(catalog.sequences, 6, "test"))[:, 1:]
    histories = [catalog.sequences.of(user)[:-1].tolist() for user in range(len(catalog.sequences))]
    for scores, history in zip(expected, histories, strict=True):
        scores[np.unique(history) - 1] += small.ranking_bias()[-1]
    values, items = expected.topk(5)
    for row, answer in enumerate(recommender.recommend(histories, 5, exclude_history=False)):
        np.testing.assert_allclose(answer.scores, values[row], rtol=1e-4, atol=1e-4)
        assert answer.numbers == (items[row] + 1).tolist()

    # A new product has no V; its row is rescaled to the mean norm of the rows of trained items.
    gate, table, V = model.items.gate, model.item_table()[:, :SIZE].detach(), model.items.V[:, :SIZE].detach()
    rows = train_rows(catalog.sequences, 6)
    read = np.concatenate([rows.labels, rows.tokens[rows.offsets[:-1]]])
    assert gate.trained.tolist() == (np.bincount(read, minlength=ITEMS + 1) > 0).tolist()
    assert gate.scale.item() == pytest.approx(model.items.new_item_scale()) != 1
    norms = [part[1:][gate.trained[1:]].norm(dim=1).mean() for part in (table, table - V)]
    product = {"title": "Warm Red Lamp", "brand": "Alder", "picture": "data/photos/tiny/B000000001.png"}
    features = recommender.embed_items([product, catalog.metadata[2] | {"picture": None}])
    parts = torch.from_numpy(features).split([part.shape[1] for part in model.items.features], dim=1)
    transforms = model.items.whitening.transforms()
    whitened = torch.cat([whiten(part, *how) for part, how in zip(parts, transforms, strict=True)], dim=1)
    assert not whitened[1, parts[0].shape[1] :].any()
    recommender.add_items(["NEW", "WITHOUT PICTURE"], features)
    projected = (model.items.projection(whitened)[:, :SIZE] * norms[0] / norms[1]).detach()
    np.testing.assert_allclose(recommender.items.table.rows()[-2:], projected, rtol=1e-4, atol=1e-5)
