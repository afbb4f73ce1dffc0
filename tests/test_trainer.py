"""Training: one step and its recording; schedule, checkpoints, early stopping, resuming."""

import contextlib
import copy
import dataclasses
import math
import os
import re
import resource
import signal

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from common.errors import InputError
from config import Config, ModelSettings, TrainingSettings
from dataloader import Batch, TrainLoader, eval_rows, train_rows
from datasets.catalog import Sequences, load_catalog
from model import FMRLRec
from model.base import Dropout
from model.extensions.sampled_loss import NegativeSampler
from model.extensions.whitening import Whitening
from model.fast import layers, losses
from model.loss import LOSSES
from model.sizes import nested_mask
from tests.made_up import NoUpdate, as_sequences, made_up_run
from tests.prepared import write_prepared
from trainer import trainer as trainer_module
from trainer.checkpoint import load_state, load_weights, save_state, save_weights
from trainer.evaluation import evaluate
from trainer.runs import read_log
from trainer.step import GraphedStep, Step, WeightAverage, build_optimizer
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
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    model = FMRLRec(12, features, config)
    return Trainer(model, load_catalog(root, "tiny").sequences, config, made_up_run(tmp_path / run, config))


def update(trainer, batch):
    """One step with the trainer's learning rate."""
    trainer._set_learning_rate()
    trainer.progress.step += 1
    return trainer.step(batch)


def test_the_learning_rate_warms_up_linearly_then_falls_as_a_cosine(tmp_path):
    trainer = make_trainer(tmp_path, lr=1.0, warmup_steps=4, num_epochs=6)  # 4 steps an epoch: 24 in all
    assert [trainer.lr_at(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [trainer.lr_at(step) for step in (14, 24)] == pytest.approx([0.5, 0.0])
    sooner = make_trainer(tmp_path, lr=1.0, warmup_steps=4, warmup_from_zero=False)
    assert [sooner.lr_at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert make_trainer(tmp_path, lr=0.3, enable_lr_schedule=False).lr_at(1000) == 0.3


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_a_step_uses_its_own_learning_rate(tmp_path, monkeypatch, lr):
    trainer, used = make_trainer(tmp_path, num_epochs=2, epoch_steps=3), []
    groups = trainer.step.optimizer.param_groups
    for group in groups:
        group["lr"] = lr
    monkeypatch.setattr(trainer.step.optimizer, "step", lambda: used.extend(float(group["lr"]) for group in groups))
    trainer.fit()
    assert used == pytest.approx([trainer.lr_at(step) for step in range(6) for _ in groups])
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


def test_the_gradient_is_clipped_to_its_norm(tmp_path, monkeypatch):
    norms = {}
    for clip in (0.0, 1e-3):
        trainer = make_trainer(tmp_path, max_grad_norm=clip)

        def measure(clip=clip, model=trainer.model):
            norms[clip] = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))

        monkeypatch.setattr(trainer.step.optimizer, "step", measure)
        update(trainer, next(trainer.loader.epoch(1)))
        assert trainer.step.clipped == (clip > 0)
        assert all(p.grad is None for p in trainer.model.parameters())  # the next forward pass needs the memory
    assert norms[0.0] > 1e-2
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_training_lowers_the_loss_keeps_masked_weights_at_zero_and_prints_its_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer_module, "LINE_EVERY", 0.0)  # there is no terminal
    trainer = make_trainer(tmp_path, num_epochs=15)
    trainer.fit()
    log = read_log(trainer.run.folder)
    assert [record["epoch"] for record in log] == [*range(1, 16)]
    assert set(log[0]["val"]) == {"2", "4", "8"}
    assert {"Recall@5", "NDCG@10", "MRR@10"} <= set(log[0]["val"]["8"])
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    ffn = trainer.model.blocks[0].ffn
    assert not ffn.W1.weight[nested_mask(ffn.W1.sizes) == 0].any()
    lines = re.findall(r"epoch   1  step (\d)/4 .* min left in the epoch", capsys.readouterr().out)
    assert lines == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.1, 0.9], {"num_epochs": 50, "early_stopping": True}, (5, 2, 0.3)),
        ([0.5, 0.1, 0.2], {"num_epochs": 2, "validate_untrained": True}, (2, 0, 0.5)),  # the untrained model is best
    ],
)
def test_training_keeps_the_first_best_epoch_and_stops_in_time(tmp_path, monkeypatch, values, settings, expected):
    trainer, validations = make_trainer(tmp_path, early_stopping_patience=3, **settings), iter(values)
    weights = []

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
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_training_names_the_step_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    true_loss, calls = LOSSES["fast"], []

    def loss_that_breaks(*arguments, **how):
        calls.append(1)
        return true_loss(*arguments, **how) * (math.nan if len(calls) == 7 else 1)  # step 7 is in epoch 2

    monkeypatch.setitem(LOSSES, "fast", loss_that_breaks)
    trainer = make_trainer(tmp_path, num_epochs=5)
    with pytest.raises(InputError, match=r"nan at step 7 \(epoch 2\).*after epoch 1 is kept.*--lr"):
        trainer.fit()
    state = load_state(trainer.run.folder / "last.pt")
    assert state["progress"]["epoch"] == 1
    assert all(torch.isfinite(t).all() for t in state["model"].values())
    load_weights(trainer.model, trainer.run.folder / "best.safetensors")


@pytest.mark.parametrize("how", [{"optimizer": "adamw"}, {"optimizer": "adam", "num_negatives": 5}, {"ema_decay": 0.9}])
@pytest.mark.parametrize("steps", [8, 10], ids=["after an epoch", "within an epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path, monkeypatch, how, steps):
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
    torch.rand(7)  # whatever else draws random numbers before the run goes on
    second = make_trainer(tmp_path, "cut", num_epochs=6, **how)
    second.load_state(load_state(second.run.folder / "last.pt"))
    assert (second.progress.epoch, second.progress.batch) == (2, steps - 8)
    second.fit()

    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        assert torch.equal(whole.eval_model.state_dict()[name], second.eval_model.state_dict()[name]), name
    whole_log, cut_log = read_log(whole.run.folder), read_log(second.run.folder)
    for name in ("epoch", "loss", "clipped", "val"):
        assert [record[name] for record in whole_log] == [record[name] for record in cut_log]
    assert (whole.run.folder / "best.safetensors").read_bytes() == (second.run.folder / "best.safetensors").read_bytes()


def test_an_update_that_breaks_the_weights_is_noticed_before_anything_is_kept(tmp_path):
    trainer = make_trainer(tmp_path, lr=1e38, warmup_steps=0, max_grad_norm=0.0, enable_lr_schedule=False)
    trainer.loader.batch_size = 100  # one step an epoch: its loss is finite, its update is not
    with pytest.raises(InputError, match=r"weights are not finite at step 1 \(epoch 1\); no epoch was finished"):
        trainer.fit()
    assert [path.name for path in trainer.run.folder.iterdir()] == []


@contextlib.contextmanager
def full_disk(room):
    """No file may grow beyond `room` bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 1000, 30_000])
def test_a_full_disk_is_said_and_leaves_the_previous_checkpoint_whole(tmp_path, room):
    state, weights, big = tmp_path / "last.pt", tmp_path / "best.safetensors", small_model((2, 64), 500)
    save_state(state, {"epoch": 1})
    save_weights(small_model(), weights, {"epoch": "1"})
    for save in (lambda: save_state(state, {"model": big.state_dict()}), lambda: save_weights(big, weights, {})):
        with pytest.raises(InputError, match="free space or choose another folder"), full_disk(room):
            save()
    assert load_state(state) == {"epoch": 1}
    load_weights(small_model(), weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", "last.pt"]


def test_a_damaged_or_unfit_checkpoint_is_named_with_what_mends_it_and_executes_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    trainer, model = make_trainer(tmp_path), small_model()
    with pytest.raises(InputError, match=r"last\.pt does not fit the model"):
        trainer.load_state(trainer.state() | {"model": model.state_dict()})
    weights, state = tmp_path / "best.safetensors", tmp_path / "last.pt"
    assert load_state(state) is None
    with pytest.raises(InputError, match="does not exist"):
        load_weights(model, weights)
    save_weights(model, weights, {"epoch": "1"})
    with pytest.raises(InputError, match=r"does not fit the model in the run's config.json"):
        load_weights(small_model((2, 4)), weights)
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"best.safetensors is damaged.*--resume"):
        load_weights(model, weights)
    for write in (lambda: state.write_bytes(b"not a checkpoint"), lambda: torch.save({"model": Payload()}, state)):
        write()
        with pytest.raises(InputError, match=r"last.pt is damaged.*remove it"):
            load_state(state)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_state_of_another_device_keeps_this_devices_learning_rate_and_way_of_stepping(tmp_path, capturable):
    """On a GPU a recording reads the tensor of the learning rate."""
    first, second = make_trainer(tmp_path, "first"), make_trainer(tmp_path, "second")
    update(first, next(first.loader.epoch(1)))
    state, lr = first.state(), torch.tensor(0.25) if capturable else 0.25
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": 0.5 if capturable else torch.tensor(0.5), "capturable": not capturable}
    for group in second.step.optimizer.param_groups:
        group |= {"lr": lr, "capturable": capturable}
    second.load_state(state)
    assert all(g["lr"] is lr and g["capturable"] == capturable for g in second.step.optimizer.param_groups)
    step = next(iter(second.step.optimizer.state.values()))["step"]
    assert step == 1 and step.device.type == "cpu"
    if not capturable:
        update(second, next(second.loader.epoch(1)))  # capturable, this would be refused on a CPU


def test_the_best_epoch_has_the_best_metric_asked_for_with_or_without_the_history(tmp_path, capsys):
    trainer = make_trainer(tmp_path, metric_ks=(5,), best_metric="MRR@3", num_epochs=6, val_mask_history=True)
    trainer.fit()
    masked, kept = (
        evaluate(trainer.model, trainer.val_rows, sizes=SIZES, batch_size=8, ks=(3, 5), mask_history=masked)
        for masked in (True, False)
    )
    assert masked != kept
    assert trainer.validate() == masked
    values = [record["val"]["8"]["MRR@3"] for record in read_log(trainer.run.folder)]
    assert values[-1] == masked[8]["MRR@3"]
    assert (trainer.progress.best, trainer.progress.best_epoch) == (max(values), 1 + values.index(max(values)))
    assert "val MRR@3 (history masked)" in capsys.readouterr().out


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
    loaded = make_trainer(tmp_path).model
    load_weights(loaded, trainer.run.folder / "best.safetensors")
    for name, value in trainer.eval_model.state_dict().items():
        average = sum(count * of_step[name] for count, of_step in zip(counts, weights, strict=True)) / sum(counts)
        torch.testing.assert_close(value, average, msg=name)
        assert torch.equal(trainer.model.state_dict()[name], plain.model.state_dict()[name]), name
        assert torch.equal(loaded.state_dict()[name], value), name
    assert trainer.validate() == evaluate(trainer.eval_model, trainer.val_rows, sizes=SIZES, batch_size=8, ks=(5, 10))
    assert trainer.validate() != plain.validate()


def test_the_average_shares_the_frozen_features_and_their_whitening_with_the_model():
    whitening = Whitening([torch.randn(12, 6)])
    settings = ModelSettings(mrl_hidden_sizes=SIZES, lru_num_blocks=1)
    model = FMRLRec(12, whitening.features(), settings, whitening)
    average = WeightAverage(model, 0.9).model
    assert average.items.whitening is whitening
    assert [part.data_ptr() for part in average.items.features] == [part.data_ptr() for part in model.items.features]
    assert not {id(parameter) for parameter in average.parameters()} & {id(p) for p in model.parameters()}


NUM_ITEMS, STEP_SIZES = 50, (4, 8, 16)


def loader(batch_size=8, users=60, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 30, size=users)
    sequences = Sequences(random.integers(1, NUM_ITEMS + 1, size=lengths.sum()), np.cumsum([0, *lengths]))
    return TrainLoader(train_rows(sequences, 20), batch_size, seed, torch.device("cpu"))


def make_step(precision="fp32", negatives=0, features=True, plus=False):
    torch.manual_seed(0)
    given = torch.randn(NUM_ITEMS, 9) if features else None
    usual = {"mrl_hidden_sizes": STEP_SIZES, "lru_dropout": 0.4, "lru_attn_dropout": 0.4, "lru_r_max": 0.9}
    options = {"item_embedding": STEP_SIZES[-1], "logit_scale": True, "history_bias": True} if plus else {}
    model = FMRLRec(NUM_ITEMS, given, ModelSettings(**usual, **options)).train()
    settings = TrainingSettings(precision=precision, lr=1e-2, distill=0.5 * plus)
    sampler = NegativeSampler(loader().label_counts(NUM_ITEMS), negatives) if negatives else None
    return Step(model, build_optimizer(model, settings), settings, sampler)


def run(step, batches, seed=1):
    """(losses, weights) after an update with each batch."""
    torch.manual_seed(seed)
    losses = [step(batch) for batch in batches]
    inner = getattr(step, "step", step)
    return [loss.item() for loss in losses], [p.detach().clone() for p in inner.model.parameters()]


def recorder():
    """Return a recording function and the list of what it recorded. As a CUDA graph does, a recording repeats its work
    and writes the result to the same place."""
    recorded, result = [], torch.zeros(())

    def record(work):
        recorded.append(work)
        return lambda: result.copy_(work())

    return record, recorded


@pytest.mark.parametrize(
    ("precision", "features", "negatives"),
    [
        ("fp32", True, 20),
        ("fp32", False, 0),
        ("bf16", True, 20),
        ("bf16", False, 0),
        ("bf16", True, 0),
    ],
)
def test_every_precision_learns_by_products_of_its_type_and_keeps_float32_weights(precision, features, negatives):
    step, products = make_step(precision, negatives, features), []
    true = step.loss

    def watched(z, table, *arguments, **options):
        products.append((table.drawn if negatives else getattr(table, "features", table)).dtype)
        assert not torch.is_autocast_enabled("cpu")
        return true(z, table, *arguments, **options)

    step.loss = watched
    losses, weights = run(step, [batch for number in range(4) for batch in loader().epoch(number)])
    assert sum(losses[-8:]) < 0.995 * sum(losses[:8])
    assert set(products) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights)
    assert all(state["exp_avg"].dtype == torch.float32 for state in step.optimizer.state.values())


def test_a_step_asks_for_tf32_within_it_alone_and_leaves_nothing_of_its_batch(monkeypatch):
    asked, true, cuda = [], FMRLRec.encode, torch.backends.cuda.matmul

    def encode(*arguments):
        asked.append(torch.get_float32_matmul_precision())
        assert not cuda.allow_bf16_reduced_precision_reduction
        return true(*arguments)

    monkeypatch.setattr(FMRLRec, "encode", encode)
    (batch, *_) = loader().epoch(1)
    for precision in ("fp32", "tf32", "bf16"):
        step = make_step(precision)
        loss = step(batch)
        assert loss.ndim == 0 and loss.grad_fn is None and not loss.requires_grad
        assert all(layer.share is None for layer in step.model.modules() if isinstance(layer, Dropout))
        assert torch.get_float32_matmul_precision() == "highest" and cuda.allow_bf16_reduced_precision_reduction
    assert asked == ["highest", "high", "highest"]


@pytest.mark.parametrize("negatives", [0, 20])
@pytest.mark.parametrize(("scan", "plus"), [("steps", False), ("doubling", False), ("doubling", True)])
def test_a_recording_played_back_trains_as_the_step_does(monkeypatch, scan, plus, negatives):
    monkeypatch.setattr(layers, "_scan", getattr(layers, f"_scan_by_{scan}"))
    batches = [batch for number in range(2) for batch in loader().epoch(number)]
    plain = run(make_step(negatives=negatives, plus=plus), batches)
    record, recorded = recorder()
    graphed = run(GraphedStep(make_step(negatives=negatives, plus=plus), record), batches)
    assert graphed[0] == plain[0]
    assert all(torch.equal(g, p) for g, p in zip(graphed[1], plain[1], strict=True))
    shapes = {(len(batch.tokens), (batch.longest - 1).bit_length()) for batch in batches}
    assert 1 < len(recorded) <= len(shapes) < len(batches) / 2


def batch_of(lengths, seed):
    """A batch of rows of these lengths, without padding."""
    random, total = torch.Generator().manual_seed(seed), sum(lengths)
    tokens, labels = torch.randint(1, NUM_ITEMS + 1, (2, total), generator=random)
    position = torch.cat([torch.arange(n) for n in lengths])
    return Batch(tokens, labels, position, max(lengths), (0, total), torch.tensor(total))


@pytest.mark.parametrize(("longest", "later"), [(17, 32), (9, 16), (31, 18)])
def test_batches_of_one_size_but_longer_histories_are_recorded_anew_and_none_is_written_to(monkeypatch, longest, later):
    monkeypatch.setattr(layers, "_scan", layers._scan_by_doubling)  # the one that asks for the longest history
    short, long, other = [4] * 8, [longest, *[1] * (32 - longest)], [later, *[1] * (32 - later)]
    rows = [short, short, long, short, long, other, short]
    batches = [batch_of(lengths, seed) for seed, lengths in enumerate(rows)]
    before, (record, recorded) = copy.deepcopy(batches), recorder()
    plain, graphed = run(make_step(), batches), run(GraphedStep(make_step(), record), batches)
    assert graphed[0] == plain[0] and len(recorded) == 2
    for batch, same in zip(batches, before, strict=True):
        for name in ("tokens", "labels", "position", "num_labels"):
            assert torch.equal(getattr(batch, name), getattr(same, name))


@pytest.mark.parametrize("negatives", [0, 20])
@pytest.mark.parametrize(("precision", "plus"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_nothing_in_a_step_asks_for_a_number_that_a_gpu_would_have_to_finish(monkeypatch, precision, plus, negatives):
    monkeypatch.setattr(layers, "_scan", layers._scan_by_doubling)  # the one of a GPU
    monkeypatch.setattr(losses, "_buffers", {})  # keeps tensors, which here are fake
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


def repeating(share, users=200, length=12):
    """Return sequences in which this share of the items was in the history already."""
    random, histories = np.random.default_rng(0), []
    for _ in range(users):
        fresh, history = iter(random.permutation(NUM_ITEMS) + 1), []
        for _ in range(length):
            history.append(random.choice(history) if history and random.random() < share else next(fresh))
        histories.append(history)
    return as_sequences(histories)


def trained_on(sequences, history_bias, negatives):
    torch.manual_seed(0)
    options = {"mrl_hidden_sizes": (4, 8), "lru_num_blocks": 1, "logit_scale": True, "history_bias": history_bias}
    model, settings = FMRLRec(NUM_ITEMS, None, ModelSettings(**options)).train(), TrainingSettings(lr=3e-3)
    batches = TrainLoader(train_rows(sequences, 20), 40, 0, torch.device("cpu"))
    sampler = NegativeSampler(batches.label_counts(NUM_ITEMS), negatives) if negatives else None
    step = Step(model, build_optimizer(model, settings), settings, sampler)
    for number in range(20):
        for batch in batches.epoch(number):
            assert step(batch).isfinite()
    return model


@pytest.mark.parametrize("negatives", [0, 20])
def test_the_history_bias_learns_whether_people_buy_again(negatives):
    def kept_and_masked(model, sequences):
        rows = eval_rows(sequences, 20, "test")
        how = {"sizes": (8,), "batch_size": 100, "ks": (10,)}
        return [evaluate(model, rows, mask_history=masked, **how)[8]["NDCG@10"] for masked in (False, True)]

    often, never = repeating(0.3), repeating(0.0)
    with_bias, without = (trained_on(often, history_bias, negatives) for history_bias in (True, False))
    assert min(with_bias.ranking_bias()) > 0
    assert kept_and_masked(with_bias, often)[0] > 1.2 * kept_and_masked(without, often)[0]
    model = trained_on(never, True, negatives)
    assert max(model.ranking_bias()) < -3
    assert kept_and_masked(model, never)[0] == pytest.approx(kept_and_masked(model, never)[1], rel=0.02)
