"""One update of the weights: its precisions, its recording, and that nothing in it waits for a GPU."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from config import ModelSettings, TrainingSettings
from dataloader import Batch, TrainLoader, train_rows
from datasets.catalog import Sequences
from model import FMRLRec
from model.dropout import Dropout
from model.extensions.sampled_loss import NegativeSampler
from model.fast import logits, recurrence
from tests.made_up import NoUpdate
from trainer.cuda_graphs import GraphedStep, cuda_graphs
from trainer.step import Step, build_optimizer

NUM_ITEMS, SIZES, CPU = 50, (4, 8, 16), torch.device("cpu")


def loader(batch_size=8, users=60, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 30, size=users)
    sequences = Sequences(random.integers(1, NUM_ITEMS + 1, size=lengths.sum()), np.cumsum([0, *lengths]))
    return TrainLoader(train_rows(sequences, 20), batch_size, seed, CPU)


PLUS = {
    "item_embedding": SIZES[-1],
    "logit_scale": True,
}  # beyond the paper: of the model
OBJECTIVE = {"distill": 0.5}  # and of a step


def make_step(precision="fp32", negatives=0, features=True, dropout=0.4, max_grad_norm=5.0, plus=False):
    torch.manual_seed(0)
    given = torch.randn(NUM_ITEMS, 9) if features else None
    options, objective = (PLUS, OBJECTIVE) if plus else ({}, {})
    model = FMRLRec(
        NUM_ITEMS,
        given,
        ModelSettings(mrl_hidden_sizes=SIZES, lru_dropout=dropout, lru_attn_dropout=dropout, lru_r_max=0.9, **options),
    ).train()
    settings = TrainingSettings(precision=precision, lr=1e-2, max_grad_norm=max_grad_norm, **objective)
    sampler = NegativeSampler(loader().label_counts(NUM_ITEMS), negatives) if negatives else None
    return Step(model, build_optimizer(model, settings), settings, sampler)


def run(step, batches, seed=1):
    """(losses, weights) after an update with each batch."""
    torch.manual_seed(seed)
    losses = [step(batch).item() for batch in batches]
    inner = getattr(step, "step", step)
    return losses, [p.detach().clone() for p in inner.model.parameters()]


@pytest.mark.parametrize("negatives", [0, 20])
@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_precision_learns_and_keeps_float32_weights(precision, features, negatives):
    batches = [batch for number in range(12) for batch in loader().epoch(number)]
    step = make_step(precision, negatives, features)
    losses, weights = run(step, batches)
    assert sum(losses[-8:]) < 0.99 * sum(losses[:8])
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights)
    assert all(state["exp_avg"].dtype == torch.float32 for state in step.optimizer.state.values())


def test_a_step_leaves_no_share_of_its_batch_in_the_model():
    step = make_step()
    for batch in loader().epoch(1):
        step(batch)
    dropouts = [layer for layer in step.model.modules() if isinstance(layer, Dropout)]
    assert dropouts and all(layer.share is None for layer in dropouts)


def test_tf32_is_asked_for_within_a_step_and_not_after_it(monkeypatch):
    asked, true, cuda = [], FMRLRec.encode, torch.backends.cuda.matmul

    def encode(*arguments):
        asked.append(torch.get_float32_matmul_precision())
        assert not cuda.allow_bf16_reduced_precision_reduction
        return true(*arguments)

    monkeypatch.setattr(FMRLRec, "encode", encode)
    (batch, *_) = loader().epoch(1)
    for precision in ("fp32", "tf32", "bf16"):
        make_step(precision)(batch)
        assert torch.get_float32_matmul_precision() == "highest" and cuda.allow_bf16_reduced_precision_reduction
    assert asked == ["highest", "high", "highest"]


def test_a_loss_keeps_nothing_of_its_step_alive():
    (batch, *_) = loader().epoch(1)
    loss = make_step()(batch)
    assert loss.ndim == 0 and loss.grad_fn is None and not loss.requires_grad


@pytest.mark.parametrize("negatives", [0, 20])
@pytest.mark.parametrize(("scan", "plus"), [("steps", False), ("doubling", False), ("doubling", True)])
def test_a_recording_played_back_trains_as_the_step_does(monkeypatch, scan, plus, negatives):
    monkeypatch.setattr(recurrence, "_scan", getattr(recurrence, f"_scan_by_{scan}"))
    recorded = []

    def record(work):  # does again what was recorded, from the memory that was recorded, as a CUDA graph does
        recorded.append(work)
        return work

    batches = [batch for number in range(3) for batch in loader().epoch(number)]
    plain = run(make_step(negatives=negatives, plus=plus), batches)
    graphed = run(GraphedStep(make_step(negatives=negatives, plus=plus), record), batches)
    assert graphed[0] == plain[0]
    assert all(torch.equal(g, p) for g, p in zip(graphed[1], plain[1], strict=True))
    shapes = {(len(batch.tokens), (batch.longest - 1).bit_length()) for batch in batches}
    assert 1 < len(recorded) <= len(shapes) < len(batches) / 2


def test_a_recording_has_memory_of_its_own_and_returns_losses_that_stay():
    kept, batches = [], list(loader(users=8).epoch(1)) * 3
    results = torch.zeros(())

    def record(work):
        def replay():
            results.copy_(work())  # a graph writes every result to the same place
            return results

        return replay

    step = GraphedStep(make_step(), record)
    before = copy.deepcopy(batches)
    for batch in batches:
        kept.append(step(batch))
    assert len({loss.item() for loss in kept}) == 3
    for batch, same in zip(batches, before, strict=True):
        assert all(torch.equal(getattr(batch, n), getattr(same, n)) for n in ("tokens", "labels", "position"))


def batch_of(lengths, seed):
    """A batch of rows of these lengths, without padding."""
    random, total = torch.Generator().manual_seed(seed), sum(lengths)
    tokens, labels = torch.randint(1, NUM_ITEMS + 1, (2, total), generator=random)
    position = torch.cat([torch.arange(n) for n in lengths])
    return Batch(tokens, labels, position, max(lengths), (0, total), torch.tensor(total))


@pytest.mark.parametrize(("longest", "later"), [(17, 32), (9, 16), (31, 18)])
def test_batches_of_one_size_but_longer_histories_are_recorded_anew_and_none_is_written_to(monkeypatch, longest, later):
    monkeypatch.setattr(recurrence, "_scan", recurrence._scan_by_doubling)  # the one that asks for the longest history
    short, long, other = [4] * 8, [longest, *[1] * (32 - longest)], [later, *[1] * (32 - later)]
    rows = [short, short, long, short, long, other, short]
    batches = [batch_of(lengths, seed) for seed, lengths in enumerate(rows)]
    before, recorded = copy.deepcopy(batches), []

    def record(work):
        recorded.append(work)
        return work

    plain, graphed = run(make_step(), batches), run(GraphedStep(make_step(), record), batches)
    assert graphed[0] == plain[0] and len(recorded) == 2
    for batch, same in zip(batches, before, strict=True):
        for name in ("tokens", "labels", "position", "num_labels"):
            assert torch.equal(getattr(batch, name), getattr(same, name))


class FakeGraph:
    """A CUDA graph as far as a machine without GPU can have one."""

    def __init__(self):
        self.played = 0

    def replay(self):
        self.played += 1


def test_cuda_graphs_are_recorded_into_one_memory_and_played_back_one_by_one(monkeypatch):
    pools, graphs = [], []

    @contextlib.contextmanager
    def recording(graph, pool=None):
        graphs.append(graph)
        pools.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    record = cuda_graphs()
    first, second = record(lambda: torch.tensor(1.0)), record(lambda: torch.tensor(2.0))
    assert pools[0] is not None and pools[0] is pools[1]
    assert [second().item(), first().item(), second().item()] == [2, 1, 2]
    assert [graph.played for graph in graphs] == [1, 2]


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("negatives", [0, 20])
@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_products_of_the_loss_are_computed_in_the_precision(monkeypatch, precision, expected, negatives, features):
    found = []
    step, (batch, *_) = make_step(precision, negatives, features), loader().epoch(1)
    true = step.loss

    def watched(z, table, *arguments, **options):
        products = table.drawn if negatives else getattr(table, "features", table)
        found.append((products.dtype, torch.is_autocast_enabled("cpu")))
        return true(z, table, *arguments, **options)

    monkeypatch.setattr(step, "loss", watched)
    step(batch)
    assert found == [(expected, False)]


@pytest.mark.parametrize("negatives", [0, 20])
@pytest.mark.parametrize(("precision", "plus"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_nothing_in_a_step_asks_for_a_number_that_a_gpu_would_have_to_finish(monkeypatch, precision, plus, negatives):
    monkeypatch.setattr(recurrence, "_scan", recurrence._scan_by_doubling)  # the one of a GPU
    monkeypatch.setattr(logits, "_buffers", {})  # keeps tensors, which here are fake
    step, (batch, *_) = make_step(precision, negatives, plus=plus), loader().epoch(1)
    step.optimizer = NoUpdate()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # tensors without numbers

        def fake(tensor):
            return mode.from_tensor(tensor)

        named = dict(step.model.named_parameters()) | dict(step.model.named_buffers())
        if step.sampler:
            step.sampler.q, step.sampler._cumulative = fake(step.sampler.q), fake(step.sampler._cumulative)
        held = {n: fake(getattr(batch, n)) for n in ("tokens", "labels", "position", "num_labels")}
        loss = torch.func.functional_call(_Loss(step), {f"model.{n}": fake(t) for n, t in named.items()},
                                          (dataclasses.replace(batch, **held),))  # fmt: skip
        with pytest.raises(DataDependentOutputException):
            loss.item()


class _Loss(torch.nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step, self.model = step, step.model

    def forward(self, batch):
        return self.step(batch)
