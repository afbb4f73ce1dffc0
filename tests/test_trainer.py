"""Training: a step and its recording, schedule, checkpoints, resuming. Full ranking, metrics and the test of a run."""

import copy
import dataclasses
import json
import math
import os
import re
import resource
import signal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from common.errors import InputError
from common.files import write_json
from config import Config, ModelSettings, TrainingSettings
from dataloader import Batch, TrainLoader, eval_batches, eval_rows, times_trained, train_rows
from datasets.catalog import load_catalog
from model import FMRLRec, fast, slice_model
from model.base import Dropout
from model.baselines.counting import Popularity
from model.extensions.sampled_loss import NegativeSampler
from model.loss import LOSSES
from tests.made_up import NoUpdate, as_sequences, made_up_run, random_model, with_random_weights, write_prepared
from trainer import evaluation, testing
from trainer import trainer as trainer_module
from trainer.checkpoint import load_state, load_weights, save_state, save_weights
from trainer.evaluation import count_ahead, evaluate, exact_scores, longest_row, on_grid, target_ranks
from trainer.runs import TRAINED, decoded, read_arrays, read_log, save_ranks
from trainer.step import GraphedStep, Step, build_optimizer
from trainer.testing import check_slice, list_metrics_of_sizes, top_items
from trainer.trainer import Trainer

SIZES = (2, 4, 8)


def small_model(sizes=SIZES, num_items=5, features=None):
    return FMRLRec(num_items, features, ModelSettings(mrl_hidden_sizes=sizes, lru_num_blocks=1))


def make_trainer(tmp_path, run="run", **settings):
    """A trainer on a tiny prepared dataset, with dropout, so that random states matter."""
    root = tmp_path / "data"
    if not root.exists():
        write_prepared(root, "tiny", users=20, items=12)
    usual = {"num_epochs": 3, "lr": 1e-2, "warmup_steps": 2, "early_stopping": False, "train_batch_size": 6, "seed": 3}
    usual |= {"val_batch_size": 8, "metric_ks": (5, 10), "lru_max_len": 10, "mrl_hidden_sizes": SIZES}
    config = Config(**{**usual, "lru_num_blocks": 1, **settings})
    torch.manual_seed(0)
    model = FMRLRec(12, torch.randn(12, 6), config)
    return Trainer(model, load_catalog(root, "tiny").sequences, config, made_up_run(tmp_path / run, config))


def test_the_learning_rate_warms_up_linearly_then_falls_as_a_cosine(tmp_path):
    trainer = make_trainer(tmp_path, lr=1.0, warmup_steps=4, num_epochs=6)  # 4 steps an epoch: 24 in all
    assert [trainer.lr_at(step) for step in (0, 1, 4, 14, 24)] == pytest.approx([0.0, 0.25, 1.0, 0.5, 0.0])
    assert make_trainer(tmp_path, lr=1.0, warmup_steps=4, warmup_from_zero=False).lr_at(0) == 0.25
    assert make_trainer(tmp_path, lr=0.3, enable_lr_schedule=False).lr_at(1000) == 0.3


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_a_step_uses_its_own_learning_rate(tmp_path, monkeypatch, lr):
    trainer, used = make_trainer(tmp_path, num_epochs=2, epoch_steps=3), []
    [group, _] = trainer.step.optimizer.param_groups
    group["lr"] = lr
    monkeypatch.setattr(trainer.step.optimizer, "step", lambda: used.append(float(group["lr"])))
    trainer.fit()
    assert used == pytest.approx([trainer.lr_at(step) for step in range(6)])
    assert trainer.lr_at(6) == 0  # epochs of 3 steps instead of 4


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_the_optimizer_decays_everything_but_biases(name, kind):
    model = small_model(features=torch.randn(5, 3))
    optimizer = build_optimizer(model, TrainingSettings(optimizer=name, adam_epsilon=1e-5, weight_decay=0.1))
    assert type(optimizer) is kind
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "bias" in name else 0.1), name


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_the_gradient_is_clipped_to_its_norm(tmp_path, monkeypatch, clip):
    trainer, norms = make_trainer(tmp_path, max_grad_norm=clip), []
    parameters = list(trainer.model.parameters())
    norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(trainer.step.optimizer, "step", lambda: norms.append(norm([p.grad for p in parameters]).item()))
    trainer.step(next(trainer.loader.epoch(1)))
    assert trainer.step.clipped == (clip > 0)
    assert norms[0] == pytest.approx(clip, rel=1e-3) if clip else norms[0] > 1e-2
    assert all(p.grad is None for p in parameters)  # the next forward pass needs the memory


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.1, 0.9], {"num_epochs": 50, "early_stopping": True}, (5, 2, 0.3)),
        ([0.5, 0.1, 0.2], {"num_epochs": 2, "validate_untrained": True}, (2, 0, 0.5)),  # the untrained model is best
    ],
)
def test_training_keeps_the_first_best_epoch_and_stops_in_time(tmp_path, monkeypatch, values, settings, expected):
    trainer, validations, weights = make_trainer(tmp_path, early_stopping_patience=3, **settings), iter(values), []

    def validate():
        weights.append(copy.deepcopy(trainer.model.state_dict()))
        return {8: {"NDCG@10": next(validations)}}

    monkeypatch.setattr(trainer, "validate", validate)
    progress = trainer.fit()
    assert (progress.epoch, progress.best_epoch, progress.best) == expected
    epochs = [record["epoch"] for record in read_log(trainer.run.folder)]
    assert epochs == [*range(epochs[0], progress.epoch + 1)]
    load_weights(trainer.model, trainer.run.folder / "best.safetensors")
    best = weights[epochs.index(progress.best_epoch)]
    torch.testing.assert_close(trainer.model.state_dict(), best, rtol=0, atol=0)


def test_a_loss_or_weight_that_is_not_finite_stops_training_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    breaks = {"lr": 1e38, "warmup_steps": 0, "max_grad_norm": 0.0, "enable_lr_schedule": False}
    for batch_size in (100, 10):  # its only or first loss is finite, its update is not
        trainer = make_trainer(tmp_path, **breaks, save_every_minutes=1e-9)
        trainer.loader.batch_size = batch_size
        with pytest.raises(InputError, match=r"weights are not finite at step 1 \(epoch 1\); no epoch was finished"):
            trainer.fit()
        assert not list(trainer.run.folder.iterdir())

    true_loss, calls = LOSSES["fast"], []

    def loss_that_breaks(*arguments, **how):
        calls.append(1)
        return true_loss(*arguments, **how) * (math.nan if len(calls) == 7 else 1)  # step 7 is in epoch 2

    monkeypatch.setitem(LOSSES, "fast", loss_that_breaks)
    trainer = make_trainer(tmp_path, num_epochs=5)
    with pytest.raises(InputError, match=r"nan at step 7 \(epoch 2\).*after epoch 1 is kept.*--lr"):
        trainer.fit()
    state = load_state(trainer.run.folder / "last.pt")
    assert state["progress"]["epoch"] == 1 and all(torch.isfinite(t).all() for t in state["model"].values())
    load_weights(trainer.model, trainer.run.folder / "best.safetensors")


@pytest.mark.parametrize(
    ("how", "steps"),
    [({}, 8), ({"optimizer": "adam", "num_negatives": 5}, 10), ({"ema_decay": 0.9}, 8), ({"ema_decay": 0.9}, 10)],
)
def test_a_run_resumed_after_or_within_an_epoch_equals_an_uninterrupted_one_bit_by_bit(
    tmp_path, monkeypatch, how, steps
):
    def save_and_interrupt(path, state):
        save_state(path, state)
        if state["progress"]["step"] == steps:
            raise KeyboardInterrupt

    whole = make_trainer(tmp_path, "whole", num_epochs=6, **how)
    whole.fit()
    first = make_trainer(tmp_path, "cut", num_epochs=6, save_every_minutes=1e-9, **how)
    monkeypatch.setattr(trainer_module, "save_state", save_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = make_trainer(tmp_path, "cut", num_epochs=6, **how)
    torch.rand(7)  # whatever else draws random numbers before the run goes on
    second.load_state(load_state(second.run.folder / "last.pt"))
    assert (second.progress.epoch, second.progress.batch) == (2, steps - 8)
    second.fit()

    for part in ("model", "eval_model"):
        states = [getattr(trainer, part).state_dict() for trainer in (whole, second)]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    whole_log, cut_log = read_log(whole.run.folder), read_log(second.run.folder)
    for name in ("epoch", "loss", "clipped", "val"):
        assert [record[name] for record in whole_log] == [record[name] for record in cut_log]
    assert (whole.run.folder / "best.safetensors").read_bytes() == (second.run.folder / "best.safetensors").read_bytes()


@pytest.mark.parametrize("room", [0, 1000, 30_000])
def test_a_full_disk_is_said_and_leaves_the_previous_checkpoint_whole(tmp_path, room):
    state, weights, big = tmp_path / "last.pt", tmp_path / "best.safetensors", small_model((2, 64), 500)
    save_state(state, {"epoch": 1})
    save_weights(small_model(), weights, {"epoch": "1"})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # no file may grow beyond it
        for save, arguments in ((save_state, (state, {"model": big.state_dict()})), (save_weights, (big, weights, {}))):
            with pytest.raises(InputError, match="free space or choose another folder"):
                save(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_state(state) == {"epoch": 1}
    load_weights(small_model(), weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", "last.pt"]


def test_a_damaged_or_unfit_checkpoint_is_named_with_what_mends_it_and_executes_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    def refused(problem, function, *arguments):
        with pytest.raises(InputError, match=problem):
            function(*arguments)

    trainer, model = make_trainer(tmp_path), small_model()
    refused(r"last\.pt does not fit the model", trainer.load_state, trainer.state() | {"model": model.state_dict()})
    weights, state = tmp_path / "best.safetensors", tmp_path / "last.pt"
    assert load_state(state) is None
    refused("does not exist", load_weights, model, weights)
    save_weights(model, weights, {"epoch": "1"})
    refused(r"does not fit the model in the run's config.json", load_weights, small_model((2, 4)), weights)
    weights.write_bytes(weights.read_bytes()[:-50])
    refused(r"best.safetensors is damaged.*--resume", load_weights, model, weights)
    state.write_bytes(b"not a checkpoint")
    refused(r"last.pt is damaged.*remove it", load_state, state)
    torch.save({"model": Payload()}, state)
    refused(r"last.pt is damaged.*remove it", load_state, state)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_state_of_another_device_keeps_this_devices_learning_rate_and_way_of_stepping(tmp_path, capturable):
    """On a GPU a recording reads the tensor of the learning rate."""
    first, second = make_trainer(tmp_path, "first"), make_trainer(tmp_path, "second")
    first.step(next(first.loader.epoch(1)))
    state, lr = first.state(), torch.tensor(0.25) if capturable else 0.25
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": 0.5 if capturable else torch.tensor(0.5), "capturable": not capturable}
    for group in second.step.optimizer.param_groups:
        group |= {"lr": lr, "capturable": capturable}
    second.load_state(state)
    assert all(g["lr"] is lr and g["capturable"] == capturable for g in second.step.optimizer.param_groups)
    step = next(iter(second.step.optimizer.state.values()))["step"]
    assert step == 1 and step.device.type == "cpu"


def test_the_best_epoch_has_the_best_metric_asked_for_with_the_history_masked_on_demand(tmp_path, capsys):
    settings = {"metric_ks": (5,), "best_metric": "MRR@3", "val_mask_history": True, "print_val_metrics": True}
    trainer = make_trainer(tmp_path, num_epochs=6, **settings)
    trainer.fit()
    how = {"sizes": SIZES, "batch_size": 8, "ks": (3, 5)}
    masked, kept = (evaluate(trainer.model, trainer.val_rows, mask_history=on, **how) for on in (True, False))
    assert trainer.validate() == masked != kept
    values = [record["val"]["8"]["MRR@3"] for record in read_log(trainer.run.folder)]
    assert values[-1] == masked[8]["MRR@3"]
    assert (trainer.progress.best, trainer.progress.best_epoch) == (max(values), 1 + values.index(max(values)))
    printed = capsys.readouterr().out
    assert re.search(r"val MRR@3 \(history masked\) .* train \d+\.\d s  val \d+\.\d s", printed)
    assert "  size 8: Recall@3 " in printed


def test_the_average_of_the_weights_is_validated_and_kept_and_does_not_change_the_training(tmp_path):
    plain = make_trainer(tmp_path, "plain", num_epochs=1)
    plain.fit()
    trainer = make_trainer(tmp_path, num_epochs=1, ema_decay=0.7)
    step, weights = trainer.step.optimizer.step, []

    def stepped():
        step()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})

    trainer.step.optimizer.step = stepped
    trainer.fit()
    counts = [0.7 ** (len(weights) - t) for t in range(1, len(weights) + 1)]
    average = {
        name: sum(count * of_step[name] for count, of_step in zip(counts, weights, strict=True)) / sum(counts)
        for name in weights[0]
    }
    model, kept = trainer.eval_model, make_trainer(tmp_path).model
    load_weights(kept, trainer.run.folder / "best.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), average)
    for same in ((trainer.model, plain.model), (kept, model)):
        torch.testing.assert_close(*(dict(each.state_dict()) for each in same), rtol=0, atol=0)
    assert trainer.validate() == evaluate(model, trainer.val_rows, sizes=SIZES, batch_size=8, ks=(5, 10))
    assert trainer.validate() != plain.validate()
    assert [part.data_ptr() for part in model.items.features] == [f.data_ptr() for f in trainer.model.items.features]


NUM_ITEMS, STEP_SIZES = 50, (4, 8, 16)


def loader(batch_size=8, users=60):
    random = np.random.default_rng(0)
    histories = [random.integers(1, NUM_ITEMS + 1, size=n) for n in random.integers(3, 30, size=users)]
    return TrainLoader(train_rows(as_sequences(histories), 20), batch_size, 0, torch.device("cpu"))


def make_step(precision="fp32", negatives=0, features=True, plus=False):
    torch.manual_seed(0)
    given = torch.randn(NUM_ITEMS, 9) if features else None
    usual = {"mrl_hidden_sizes": STEP_SIZES, "lru_dropout": 0.4, "lru_attn_dropout": 0.4, "lru_r_max": 0.9}
    options = {"item_embedding": STEP_SIZES[-1], "logit_scale": True, "history_bias": True} if plus else {}
    model = FMRLRec(NUM_ITEMS, given, ModelSettings(**usual, **options)).train()
    settings = TrainingSettings(precision=precision, lr=1e-2, distill=0.5 * plus)
    sampler = NegativeSampler(loader().label_counts(NUM_ITEMS), negatives) if negatives else None
    return Step(model, build_optimizer(model, settings), settings, sampler)


def run(step, batches):
    torch.manual_seed(1)
    losses = [step(batch) for batch in batches]
    inner = getattr(step, "step", step)
    return [loss.item() for loss in losses], [p.detach().clone() for p in inner.model.parameters()]


@pytest.mark.parametrize(
    ("precision", "features", "negatives"),
    [("fp32", True, 20), ("tf32", False, 0), ("bf16", True, 20), ("bf16", True, 0)],
)
def test_every_precision_learns_by_products_of_its_type_and_leaves_float32_weights_and_no_settings(
    monkeypatch, precision, features, negatives
):
    step, used, cuda = make_step(precision, negatives, features), set(), torch.backends.cuda.matmul
    encode, loss = FMRLRec.encode, step.loss

    def watched(*arguments):
        used.add((torch.get_float32_matmul_precision(), cuda.allow_bf16_reduced_precision_reduction))
        return encode(*arguments)

    def watched_loss(z, table, *arguments, **options):
        used.add((table.drawn if negatives else getattr(table, "features", table)).dtype)
        assert not torch.is_autocast_enabled("cpu")
        return loss(z, table, *arguments, **options)

    monkeypatch.setattr(FMRLRec, "encode", watched)
    step.loss = watched_loss
    losses, weights = run(step, [batch for number in range(4) for batch in loader().epoch(number)])
    assert sum(losses[-8:]) < 0.995 * sum(losses[:8])
    product = torch.bfloat16 if precision == "bf16" else torch.float32
    assert used == {("high" if precision == "tf32" else "highest", False), product}
    assert torch.get_float32_matmul_precision() == "highest" and cuda.allow_bf16_reduced_precision_reduction
    moments = [state["exp_avg"] for state in step.optimizer.state.values()]
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in (*weights, *moments))
    assert all(layer.share is None for layer in step.model.modules() if isinstance(layer, Dropout))


def recorder():
    """Return a function that records as a CUDA graph does, to write to the same place again, and its recordings."""
    recorded, result = [], torch.zeros(())

    def record(work):
        recorded.append(work)
        return lambda: result.copy_(work())

    return record, recorded


@pytest.mark.parametrize("negatives", [0, 20])
@pytest.mark.parametrize(("scan", "plus"), [("steps", False), ("doubling", True)])
def test_a_recording_played_back_trains_as_the_step_does(monkeypatch, scan, plus, negatives):
    monkeypatch.setattr(fast, "_scan", getattr(fast, f"_scan_by_{scan}"))
    batches = [batch for number in range(2) for batch in loader().epoch(number)]
    plain = run(make_step(negatives=negatives, plus=plus), batches)
    record, recorded = recorder()
    graphed = run(GraphedStep(make_step(negatives=negatives, plus=plus), record), batches)
    torch.testing.assert_close(graphed, plain, rtol=0, atol=0)
    shapes = {(len(batch.tokens), (batch.longest - 1).bit_length()) for batch in batches}
    assert 1 < len(recorded) <= len(shapes) < len(batches) / 2


def batch_of(lengths, seed, of_all_ranks=32):
    random, total = torch.Generator().manual_seed(seed), sum(lengths)
    tokens, labels = torch.randint(1, NUM_ITEMS + 1, (2, total), generator=random)
    position = torch.cat([torch.arange(n) for n in lengths])
    return Batch(tokens, labels, position, max(lengths), (0, of_all_ranks), torch.tensor(total))


@pytest.mark.parametrize(("longest", "later"), [(17, 32), (9, 16)])
def test_longer_histories_or_larger_batches_of_all_ranks_are_recorded_anew_and_not_written_to(
    monkeypatch, longest, later
):
    monkeypatch.setattr(fast, "_scan", fast._scan_by_doubling)  # the one that asks for the longest history
    short, long, other = [4] * 8, [longest, *[1] * (32 - longest)], [later, *[1] * (32 - later)]
    rows = [short, short, long, short, long, other, short]
    batches = [batch_of(lengths, seed) for seed, lengths in enumerate(rows)]
    batches += [batch_of(short, seed, of_all_ranks=64) for seed in range(2)]
    before, (record, recorded) = copy.deepcopy(batches), recorder()
    plain, graphed = run(make_step(), batches), run(GraphedStep(make_step(), record), batches)
    assert graphed[0] == plain[0] and len(recorded) == 3
    torch.testing.assert_close(*([vars(batch) for batch in each] for each in (batches, before)))


@pytest.mark.parametrize("negatives", [0, 20])
@pytest.mark.parametrize(("precision", "plus"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_nothing_in_a_step_asks_for_a_number_that_a_gpu_would_have_to_finish(monkeypatch, precision, plus, negatives):
    monkeypatch.setattr(fast, "_scan", fast._scan_by_doubling)  # the one of a GPU
    monkeypatch.setattr(fast, "_buffers", {})  # keeps tensors, which here are fake
    step, (batch, *_) = make_step(precision, negatives, plus=plus), loader().epoch(1)
    step.optimizer = NoUpdate()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # tensors without numbers

        def fake(tensor):
            return mode.from_tensor(tensor)

        named = dict(step.model.named_parameters()) | dict(step.model.named_buffers())
        if step.sampler:
            step.sampler.q, step.sampler._cumulative = fake(step.sampler.q), fake(step.sampler._cumulative)
        held = {n: fake(getattr(batch, n)) for n in ("tokens", "labels", "position", "num_labels")}
        module = torch.nn.Module()
        module.model, module.forward = step.model, step.__call__
        weights = {f"model.{n}": fake(t) for n, t in named.items()}
        loss = torch.func.functional_call(module, weights, (dataclasses.replace(batch, **held),))
        with pytest.raises(DataDependentOutputException):
            loss.item()


# ----------------------------------------------------------------------------------------------------------- evaluation

RANKED_ITEMS, MAX_LEN, RANKED_SIZES, KS = 40, 6, (4, 8, 16), (1, 5, 10, 20)
INF, NAN = math.inf, math.nan
RING = {"lru_r_min": 0.3, "lru_r_max": 0.9}
CONFIG = Config(mrl_hidden_sizes=RANKED_SIZES, lru_max_len=MAX_LEN, metric_ks=KS, test_batch_size=7, **RING)


def model_of(branch="both", history_bias=False):
    features = np.random.default_rng(0).normal(size=(RANKED_ITEMS, 9)).astype(np.float32) if branch == "both" else None
    options = {"logit_scale": True, "history_bias": (0.5, -30.0, 1.0)} if history_bias else {}
    return random_model(RANKED_SIZES, num_items=RANKED_ITEMS, features=features, **options).train()


def random_sequences():
    """Histories up to five times as long as what the model reads; items come back now and then."""
    random = np.random.default_rng(0)
    return [random.integers(1, RANKED_ITEMS + 1, size=random.integers(3, 5 * MAX_LEN)).tolist() for _ in range(25)]


def rows_of(sequences, part="test", max_len=MAX_LEN):
    return eval_rows(as_sequences(sequences), max_len, part)


def metrics_of(model, rows, batch_size=4, mask_history=False):
    return evaluation.evaluate(model, rows, sizes=RANKED_SIZES, batch_size=batch_size, ks=KS, mask_history=mask_history)


def plain_scores(model, table, known, mask_history=False):
    """Return the scores [M, N+1] of what follows a history, at every size."""
    read = torch.as_tensor(known[-MAX_LEN:])
    z = model.encode(table[read], torch.arange(len(read)), len(read))[-1].detach()
    scores = torch.stack([table[:, :m] @ z[:m] for m in RANKED_SIZES])
    if model.history_bias is not None and not mask_history:
        scores[:, sorted(set(known))] += (100 * model.history_bias / model.log_scale.exp()).detach()[:, None]
    return scores


def plain_metrics(model, sequences, part, mask_history):
    model = copy.deepcopy(model).double().eval()
    table = model.item_table().detach()
    sums = {
        m: dict.fromkeys([f"{metric}@{k}" for k in KS for metric in ("Recall", "NDCG", "MRR")], 0.0)
        for m in RANKED_SIZES
    }
    for v in sequences:
        known = v[:-2] if part == "val" else v[:-1]
        target = v[len(known)]
        shown = [i for i in range(1, RANKED_ITEMS + 1) if i == target or not (mask_history and i in known)]
        for m, scores in zip(RANKED_SIZES, plain_scores(model, table, known, mask_history).tolist(), strict=True):
            rank = sorted(shown, key=lambda item, scores=scores: -scores[item]).index(target) + 1
            for k in KS:
                for metric, value in (("Recall", 1), ("NDCG", 1 / math.log2(rank + 1)), ("MRR", 1 / rank)):
                    sums[m][f"{metric}@{k}"] += (rank <= k) * value / len(sequences)
    return sums


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize(("branch", "history_bias"), [("both", True), ("id", False)])
@pytest.mark.parametrize(("items", "table_bytes", "batch_size"), [(2**15, 2**30, 4), (1, 2**30, 1), (7, 0, 100)])
def test_every_size_is_ranked_as_one_user_at_a_time_by_sorting(
    monkeypatch, part, mask_history, branch, history_bias, items, table_bytes, batch_size
):
    for name, value in {"ITEMS": items, "USERS": 5, "TABLE_BYTES": table_bytes}.items():
        monkeypatch.setattr(evaluation, name, value)
    model, sequences = model_of(branch, history_bias), random_sequences()
    sequences[0][-1] = sequences[0][0]  # a target of long ago is a candidate
    metrics = metrics_of(model.train(), rows_of(sequences, part), batch_size, mask_history)
    expected = plain_metrics(model, sequences, part, mask_history)
    assert metrics == {m: pytest.approx(expected[m], abs=1e-12) for m in RANKED_SIZES}
    assert model.training  # and nothing was dropped out


@pytest.mark.parametrize("num_items", [32_767, 32_768])
def test_identical_items_share_their_average_rank_in_catalogues_and_batches_of_any_size(monkeypatch, num_items):
    monkeypatch.setattr(evaluation, "GROUP", 8)
    random, kinds = np.random.default_rng(0), 200  # items of one kind have the same features
    kind = random.integers(0, kinds, num_items)
    torch.manual_seed(0)
    model = FMRLRec(num_items, torch.randn(kinds, 9)[kind], ModelSettings(mrl_hidden_sizes=(8, 16), **RING))
    model, sequences = with_random_weights(model, 0.5), random.integers(1, num_items + 1, (20, 5)).tolist()
    sequences[0][-1] = num_items  # the only item of its chunk in a catalogue of 32,768
    double, rows = copy.deepcopy(model).double().eval(), rows_of(sequences)
    found = evaluation.rank_targets(model, rows, sizes=model.sizes, batch_size=256)
    table = double.item_table().detach()
    first = np.unique(kind, return_index=True)[1] + 1  # an item of every kind
    for user, v in enumerate(sequences):
        z = double.encode(table[v[:-1]], torch.arange(len(v) - 1), len(v) - 1)[-1].detach()
        for m in model.sizes:
            scores = (table[first, :m] @ z[:m]).numpy()[kind]
            target = scores[v[-1] - 1]
            assert found[m][user] == 1 + (scores > target).sum() + ((scores == target).sum() - 1) / 2
    again = evaluation.rank_targets(model, rows, sizes=model.sizes, batch_size=7)
    assert all(torch.equal(again[m], found[m]) for m in model.sizes)


@pytest.mark.parametrize("items", [3, RANKED_ITEMS + 1])
def test_a_user_whose_scores_are_no_numbers_ranks_last_and_no_other_user_notices(monkeypatch, items):
    model, batches = model_of("id"), [a_batch()]
    table, z = model.item_table().detach(), torch.randn(8, RANKED_SIZES[-1])
    monkeypatch.setattr(evaluation, "ITEMS", items)
    before = evaluation._ranks(model, batches, z, table, RANKED_SIZES, mask_history=False)
    z[2, 5] = math.nan  # of the sizes beyond 4
    found = evaluation._ranks(model, batches, z, table, RANKED_SIZES, mask_history=False)
    assert found[1:, 2].tolist() == [RANKED_ITEMS + 2] * 2
    found[1:, 2] = before[1:, 2]
    assert torch.equal(found, before)
    pairs, of_target = torch.tensor([[0, 0], [0, 1]]), torch.tensor([[2.0]], dtype=torch.float64)
    rows = torch.tensor([[NAN, 0], [1, 1]])  # not a number is ahead, an equal score ties
    assert evaluation.count_pairs_ahead(torch.ones(1, 2), rows, *pairs, of_target, (2,), [0.0]).tolist() == [[[1], [1]]]


def test_ranks_are_kept_to_any_cut_off_and_named_if_they_cannot_be_read(tmp_path):
    path = tmp_path / "test_ranks.npz"
    save_ranks(path, {4: np.array([1.0, 49_999.5, 50_000.0, 50_001.0])}, 50_000, np.zeros(4))
    assert decoded(read_arrays(path, "")["4"]).tolist() == [1.0, 49_999.5, 50_000.0, np.inf]
    cut_short = path.read_bytes()[:-30]
    np.savez(path, **{"4": np.array([{}], dtype=object)})
    for damaged in (path.read_bytes(), cut_short, b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"test_ranks\.npz cannot be read .*; test again$"):
            read_arrays(path, "test again")


def a_batch():
    return next(eval_batches(rows_of(random_sequences()), 8, torch.device("cpu")))


@pytest.fixture
def sequences():
    return as_sequences(random_sequences())


@pytest.mark.parametrize("change", [1e-2, NAN])
def test_a_slice_passes_the_check_unless_any_weight_is_changed(change):
    model = model_of()
    for size in RANKED_SIZES:
        check_slice(model, slice_model(model, size), a_batch())
    for name, _ in model.named_parameters():
        small = slice_model(model, 8).requires_grad_(False)
        small.get_parameter(name).view(-1)[0] += change
        with pytest.raises(RuntimeError, match="the slice of size 8 differs from the full model's scores by"):
            check_slice(model, small, a_batch())


def test_a_wrong_slice_is_reported_after_all_results_are_written(sequences, tmp_path, monkeypatch):
    write_json(tmp_path / "config.json", {"settings": vars(CONFIG)})
    wrong = slice_model(model_of(), 8).requires_grad_(False)
    wrong.items.projection.bias += 0.1
    monkeypatch.setattr(testing, "slice_model", lambda model, size: wrong if size == 8 else slice_model(model, size))
    with pytest.raises(RuntimeError, match="the slice of size 8 differs"):
        testing.test_every_size(model_of(), sequences, CONFIG, tmp_path)
    assert set(json.loads((tmp_path / "test_mrl_metrics.json").read_text())) == {"4", "8", "16"}


@pytest.mark.parametrize("mask_history", [False, True])
def test_list_metrics_and_every_users_rank_up_to_the_largest_cut_off_are_saved(sequences, tmp_path, mask_history):
    model, rows = model_of().eval(), eval_rows(sequences, MAX_LEN, "test")
    write_json(tmp_path / "config.json", {"settings": vars(CONFIG)})
    testing.test_every_size(model, sequences, CONFIG, tmp_path, mask_history=mask_history, list_metrics=True)
    suffix = "_history_masked" * mask_history
    lists = json.loads((tmp_path / f"test_list_metrics{suffix}.json").read_text())
    assert {"Coverage@5", "ARP@5", "Novelty@5", "ILD@5"} <= lists["16"].keys()
    saved = read_arrays(tmp_path / f"test_ranks{suffix}.npz", "")
    assert saved.pop(TRAINED).tolist() == times_trained(sequences, RANKED_ITEMS)[rows.targets].tolist()
    expected = evaluation.rank_targets(model, rows, sizes=RANKED_SIZES, batch_size=7, mask_history=mask_history)
    for m, ranks in expected.items():
        assert 0 < (ranks <= max(KS)).sum() < len(rows)
        assert decoded(saved[str(m)]).tolist() == torch.where(ranks <= max(KS), ranks, INF).tolist()


@pytest.mark.parametrize("mask_history", [False, True])
def test_recommended_lists_are_the_items_of_highest_score(sequences, mask_history):
    model, rows = model_of(history_bias=True).eval(), eval_rows(sequences, MAX_LEN, "test")
    found = top_items(model, rows, 5, mask_history)
    for user in range(len(sequences)):
        history = sequences.of(user)[:-1]
        scores = plain_scores(model, model.item_table().detach(), history)
        scores[:, [0, *history] if mask_history else 0] = -torch.inf
        for m, expected in zip(RANKED_SIZES, scores.argsort(descending=True), strict=True):
            assert found[m][user].tolist() == expected[:5].tolist()


def test_list_metrics_follow_their_definitions(sequences):
    model, rows = model_of().eval(), eval_rows(sequences, MAX_LEN, "test")
    counts = torch.from_numpy(times_trained(sequences, RANKED_ITEMS))
    found = list_metrics_of_sizes(model, rows, counts, (1, 5), mask_history=False)
    features = F.normalize(model.items.rows(torch.arange(1, RANKED_ITEMS + 1), torch.float64), dim=1)
    for m, lists in top_items(model, rows, 5, mask_history=False).items():
        trained = counts[lists].double()
        pairs = [1 - features[a - 1] @ features[b - 1] for items in lists for a in items for b in items if a != b]
        assert found[m]["Coverage@5"] == len(lists.unique()) / RANKED_ITEMS
        assert found[m]["ARP@5"] == pytest.approx(trained.mean().item())
        assert found[m]["Novelty@5"] == pytest.approx(-(trained.clamp_min(1) / len(lists)).log2().mean().item())
        assert found[m]["ILD@5"] == pytest.approx(np.mean(pairs))
        assert "ILD@1" not in found[m]  # a list of one item has no pair


def test_list_metrics_need_features_for_diversity_and_a_cut_off_within_the_catalogue(sequences):
    rows, counts = eval_rows(sequences, MAX_LEN, "test"), torch.from_numpy(times_trained(sequences, RANKED_ITEMS))
    with pytest.raises(InputError, match=f"needs a cut-off of at most {RANKED_ITEMS}"):
        list_metrics_of_sizes(model_of(), rows, counts, (50, 100), mask_history=False)
    popularity = Popularity(RANKED_ITEMS)
    popularity.counts = counts.float()
    (metrics,) = list_metrics_of_sizes(popularity, rows, counts, (5,), mask_history=False).values()
    assert metrics["Coverage@5"] == 5 / RANKED_ITEMS and "ILD@5" not in metrics
    assert metrics["ARP@5"] == pytest.approx(counts[1:].sort(descending=True).values[:5].double().mean().item())


def ranks_by_counting(z, rows, targets, rounding=0.0, chunk=5):
    """The ranks that count_ahead finds in chunks, with float32 scores off by `rounding` of what they may be off by."""
    target = exact_scores(z, rows[targets])
    counts = torch.zeros(2, len(z))
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        off = z.shape[1] * 2**-24 * z.norm(dim=1)[:, None] * part.norm(dim=1)
        scores = z @ part.T + rounding * off * torch.randn(off.shape).sign()
        here = (targets >= start) & (targets < start + len(part))
        scores[here, targets[here] - start] = -INF
        counts += torch.stack(count_ahead(scores, target, z, part, longest_row(part), torch.empty(2, *scores.shape)))
    return 1 + counts[0] + counts[1] / 2


@pytest.mark.parametrize(("dim", "bits"), [(1, 22), (512, 22), (1024, 21)])
@pytest.mark.parametrize("alike", [False, True], ids=["of all sizes", "with the largest sums"])
def test_vectors_are_rounded_to_their_bits_and_scores_are_exact_in_any_order(dim, bits, alike):
    torch.manual_seed(0)
    x = torch.tensor([[1], [1], [-1], [1], [-1], [-1]]) * (1 - torch.rand(6, dim) / 100)
    x = x if alike else torch.randn(6, dim) * 10 ** (torch.randn(6, dim) + torch.randn(6, 1))
    z, rows = on_grid(x[:3]), on_grid(x[3:])
    assert ((z - x[:3]).abs() <= z.abs().amax(dim=1, keepdim=True) * 2**-bits).all()
    pairs = zip(z.tolist(), rows.tolist(), strict=True)
    expected = [sum(Fraction(a) * Fraction(b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    order = torch.randperm(dim)
    product = (z.double() @ rows.double().T).diag()
    for found in (exact_scores(z, rows), exact_scores(z[:, order], rows[:, order]), product):
        assert [Fraction(score) for score in found.tolist()] == expected


@pytest.mark.parametrize("spread", [1.0, 1e-6, 0.0], ids=["far apart", "within rounding", "equal"])
@pytest.mark.parametrize("rounding", [0.0, 1.0], ids=["as computed", "rounded as badly as possible"])
def test_counted_ranks_are_those_of_all_exact_scores(spread, rounding):
    torch.manual_seed(0)
    z, rows = torch.randn(20, 12), 1 + spread * torch.randn(40, 12)
    z[:, 11] = 0
    rows[::3, 11] = 100  # longer, so rounded worse, with scores like the others'
    rows[10:15] = rows[3]
    z, rows = on_grid(z), on_grid(rows)
    targets = torch.arange(20)
    expected = target_ranks(z.double() @ rows.double().T, targets)
    assert ranks_by_counting(z, rows, targets, rounding).tolist() == expected.tolist()
    assert (expected % 1 == 0.5).any()


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([-INF, 0.5, -INF, 1.0, INF], 1, 3),
        ([0.5, 1.0, 0.5, 0.5, 2.0], 2, 4),  # the average of places 3, 4 and 5
        ([INF, 0.5, INF], 2, 1.5),
        ([NAN, 0.5, NAN, 0.1], 1, 3),
        ([0.1, NAN, 0.3], 1, 4),
    ],
)
def test_a_rank_is_averaged_over_ties_and_not_a_number_is_ahead_of_every_target(scores, target, rank):
    assert target_ranks(torch.tensor([scores]), torch.tensor([target])).item() == rank


def test_a_rank_up_to_the_cut_off_is_a_hit_and_half_a_rank_more_is_none():
    expected = {"Recall@3": 2 / 4, "NDCG@3": (1 + 1 / math.log2(4)) / 4, "MRR@3": (1 + 1 / 3) / 4}
    assert evaluation.ranking_metrics(torch.tensor([1.0, 3.0, 3.5, 1e9]), (3,)) == pytest.approx(expected, abs=1e-15)
