"""The training loop: schedule, checkpoints, early stopping, losses that are not finite, resuming."""

import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from config import Config, ModelSettings, TrainingSettings
from datasets.catalog import load_catalog
from model import FMRLRec
from model.extensions.whitening import Whitening
from model.loss import LOSSES
from model.sizes import nested_mask
from tests.made_up import made_up_run
from tests.prepared import write_prepared
from trainer.averaging import WeightAverage
from trainer.checkpoint import load_state, load_weights, save_weights
from trainer.evaluation import evaluate
from trainer.runs import is_finished, read_log
from trainer.step import build_optimizer
from trainer.trainer import Trainer

SIZES = (2, 4, 8)
CPU = torch.device("cpu")


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
    assert [trainer.lr_at(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]
    sooner = make_trainer(tmp_path, lr=1.0, warmup_steps=4, warmup_from_zero=False)
    assert [sooner.lr_at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert trainer.lr_at(4) == 1.0
    assert trainer.lr_at(14) == pytest.approx(0.5)
    assert trainer.lr_at(24) == pytest.approx(0.0)
    assert make_trainer(tmp_path, lr=0.3, enable_lr_schedule=False).lr_at(1000) == 0.3


def test_biases_are_not_decayed_and_everything_else_is():
    model = FMRLRec(5, torch.randn(5, 3), ModelSettings(mrl_hidden_sizes=SIZES, lru_num_blocks=1))
    decayed, spared = build_optimizer(model, TrainingSettings(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("bias" in names[id(p)] for p in spared["params"])
    kept = {names[id(p)] for p in decayed["params"]}
    assert {"blocks.0.norm1.weight", "blocks.0.lru.nu_log", "blocks.0.ffn.W2.weight"} <= kept
    assert len(names) == len(decayed["params"]) + len(spared["params"])


def test_the_gradient_is_clipped_to_its_norm(tmp_path, monkeypatch):
    norms = {}
    for clip in (0.0, 1e-3):
        trainer = make_trainer(tmp_path, max_grad_norm=clip)

        def measure(clip=clip, model=trainer.model):
            norms[clip] = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))

        monkeypatch.setattr(trainer.step.optimizer, "step", measure)
        update(trainer, next(trainer.loader.epoch(1)))
        assert all(p.grad is None for p in trainer.model.parameters())  # the next forward pass needs the memory
    assert norms[0.0] > 1e-2
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_training_lowers_the_loss_and_keeps_masked_weights_at_zero(tmp_path):
    trainer = make_trainer(tmp_path, num_epochs=15)
    trainer.fit()
    log = read_log(trainer.run.folder)
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    ffn = trainer.model.blocks[0].ffn
    assert not ffn.W1.weight[nested_mask(ffn.W1.sizes) == 0].any()


def test_a_line_an_epoch_is_logged_with_every_sizes_validation(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit()
    log = read_log(trainer.run.folder)
    assert [record["epoch"] for record in log] == [1, 2, 3]
    assert set(log[0]["val"]) == {"2", "4", "8"}
    assert {"Recall@5", "NDCG@10", "MRR@10"} <= set(log[0]["val"]["8"])


def test_training_stops_when_validation_has_not_improved_for_patience_epochs(tmp_path, monkeypatch):
    values = iter([0.1, 0.3, 0.2, 0.3, 0.1, 0.9])
    trainer = make_trainer(tmp_path, num_epochs=50, early_stopping=True, early_stopping_patience=3)
    monkeypatch.setattr(trainer, "validate", lambda: {8: {"NDCG@10": next(values)}})
    progress = trainer.fit()
    assert (progress.epoch, progress.best_epoch, progress.best) == (5, 2, 0.3)


def test_the_best_epochs_weights_are_kept(tmp_path, monkeypatch):
    values = iter([0.1, 0.3, 0.2])
    trainer = make_trainer(tmp_path)
    weights = []

    def validate():
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return {8: {"NDCG@10": next(values)}}

    monkeypatch.setattr(trainer, "validate", validate)
    trainer.fit()
    load_weights(trainer.model, trainer.run.folder / "best.safetensors")
    assert all(torch.equal(p, weights[1][name]) for name, p in trainer.model.named_parameters())
    assert not torch.equal(weights[1]["items.projection.weight"], weights[2]["items.projection.weight"])


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


@pytest.mark.parametrize("how", [{"optimizer": "adamw"}, {"optimizer": "adam"}, {"ema_decay": 0.9}])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path, how):
    whole = make_trainer(tmp_path, "whole", num_epochs=6, **how)
    whole.fit()

    first = make_trainer(tmp_path, "cut", num_epochs=6, **how)
    first.finished = lambda: first.progress.epoch >= 2  # cut off after two epochs
    first.fit()
    torch.rand(7)  # whatever else draws random numbers before the run goes on
    second = make_trainer(tmp_path, "cut", num_epochs=6, **how)
    second.load_state(load_state(second.run.folder / "last.pt"))
    assert second.progress.epoch == 2
    second.fit()

    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        assert torch.equal(whole.eval_model.state_dict()[name], second.eval_model.state_dict()[name]), name
    whole_log, cut_log = read_log(whole.run.folder), read_log(second.run.folder)
    assert [(r["epoch"], r["loss"], r["val"]) for r in whole_log] == [
        (r["epoch"], r["loss"], r["val"]) for r in cut_log
    ]
    assert (whole.run.folder / "best.safetensors").read_bytes() == (second.run.folder / "best.safetensors").read_bytes()


def test_a_kill_while_a_checkpoint_is_written_leaves_the_previous_one_whole(tmp_path):
    path = tmp_path / "last.pt"
    program = textwrap.dedent(f"""
        import os, signal, torch
        from pathlib import Path
        from trainer.checkpoint import save_state
        save_state(Path({str(path)!r}), {{"epoch": 1}})
        real = torch.save
        def dies_half_way(state, file):
            real(state, file)
            file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = dies_half_way
        save_state(Path({str(path)!r}), {{"epoch": 2}})
    """)
    repository = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert load_state(path) == {"epoch": 1}


def test_an_update_that_breaks_the_weights_is_noticed_before_anything_is_kept(tmp_path):
    trainer = make_trainer(tmp_path, lr=1e38, warmup_steps=0, max_grad_norm=0.0, enable_lr_schedule=False)
    trainer.loader.batch_size = 100  # one step an epoch: its loss is finite, its update is not
    with pytest.raises(InputError, match=r"weights are not finite at step 1 \(epoch 1\); no epoch was finished"):
        trainer.fit()
    assert [path.name for path in trainer.run.folder.iterdir()] == []


def test_every_step_uses_its_learning_rate(tmp_path):
    trainer = make_trainer(tmp_path, warmup_steps=10)
    for step, batch in enumerate(trainer.loader.epoch(1)):
        update(trainer, batch)
        assert {group["lr"] for group in trainer.step.optimizer.param_groups} == {trainer.lr_at(step)}
    assert trainer.lr_at(0) < trainer.lr_at(3)


def test_the_sum_over_sizes_is_their_mean_times_their_number(tmp_path):
    losses = {}
    for reduction in ("mean", "sum"):
        trainer = make_trainer(tmp_path, mrl_loss=reduction)
        losses[reduction] = update(trainer, next(trainer.loader.epoch(1))).item()
    assert losses["sum"] == pytest.approx(len(SIZES) * losses["mean"], rel=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_the_optimizer_is_the_one_asked_for_with_its_epsilon(name, kind):
    optimizer = build_optimizer(
        FMRLRec(5, None, ModelSettings(mrl_hidden_sizes=SIZES)), TrainingSettings(optimizer=name, adam_epsilon=1e-5)
    )
    assert type(optimizer) is kind
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}


def test_the_best_epoch_is_picked_by_the_metric_asked_for_also_where_it_is_not_reported(tmp_path):
    trainer = make_trainer(tmp_path, metric_ks=(5,), best_metric="MRR@3", num_epochs=6)
    trainer.fit()
    values = [record["val"]["8"]["MRR@3"] for record in read_log(trainer.run.folder)]
    assert trainer.progress.best == max(values)
    assert trainer.progress.best_epoch == 1 + values.index(max(values))


def test_a_state_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    other = trainer.state() | {
        "model": FMRLRec(5, None, ModelSettings(mrl_hidden_sizes=(2, 4), lru_num_blocks=1)).state_dict()
    }
    with pytest.raises(InputError, match=r"last\.pt does not fit the model"):
        trainer.load_state(other)


def test_a_full_disk_is_said_and_leaves_the_previous_checkpoint_whole(tmp_path):
    program = textwrap.dedent(f"""
        import resource, signal, torch
        from pathlib import Path
        from common.errors import InputError
        from config import ModelSettings
        from model import FMRLRec
        from trainer.checkpoint import save_state, save_weights
        folder = Path({str(tmp_path)!r})
        model = FMRLRec(5, None, ModelSettings(mrl_hidden_sizes=(2, 4), lru_num_blocks=1))
        save_state(folder / "last.pt", {{"epoch": 1}})
        save_weights(model, folder / "best.safetensors", {{"epoch": "1"}})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file may grow beyond 1,000 bytes
        big = FMRLRec(500, None, ModelSettings(mrl_hidden_sizes=(2, 64), lru_num_blocks=1))
        for save in (
            lambda: save_state(folder / "last.pt", {{"model": big.state_dict()}}),
            lambda: save_weights(big, folder / "best.safetensors", {{}}),
        ):
            try:
                save()
            except InputError as error:
                print(error)
    """)
    repository = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False)
    assert done.stdout.count("free space or choose another folder") == 2, done.stderr
    assert load_state(tmp_path / "last.pt") == {"epoch": 1}
    load_weights(
        FMRLRec(5, None, ModelSettings(mrl_hidden_sizes=(2, 4), lru_num_blocks=1)), tmp_path / "best.safetensors"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", "last.pt"]


def test_a_damaged_checkpoint_is_named_with_what_mends_it(tmp_path):
    model = FMRLRec(5, None, ModelSettings(mrl_hidden_sizes=SIZES, lru_num_blocks=1))
    weights, state = tmp_path / "best.safetensors", tmp_path / "last.pt"
    assert load_state(state) is None
    save_weights(model, weights, {"epoch": "1"})
    weights.write_bytes(weights.read_bytes()[:-50])
    state.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"best.safetensors is damaged.*--resume"):
        load_weights(model, weights)
    with pytest.raises(InputError, match=r"last.pt is damaged.*remove it"):
        load_state(state)
    with pytest.raises(InputError, match="does not exist"):
        load_weights(model, tmp_path / "nothing.safetensors")


def test_weights_of_another_shape_are_refused(tmp_path):
    save_weights(
        FMRLRec(5, None, ModelSettings(mrl_hidden_sizes=(2, 4), lru_num_blocks=1)), tmp_path / "best.safetensors", {}
    )
    with pytest.raises(InputError, match=r"does not fit the model in the run's config.json"):
        load_weights(
            FMRLRec(5, None, ModelSettings(mrl_hidden_sizes=SIZES, lru_num_blocks=1)), tmp_path / "best.safetensors"
        )


def test_a_checkpoint_executes_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"model": Payload()}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="damaged"):
        load_state(tmp_path / "last.pt")
    assert not (tmp_path / "executed").exists()


def test_a_run_is_finished_at_its_last_epoch_or_when_patience_is_used_up():
    assert is_finished(epoch=10, best_epoch=10, num_epochs=10, patience=3)
    assert is_finished(epoch=7, best_epoch=4, num_epochs=10, patience=3)
    assert not is_finished(epoch=7, best_epoch=5, num_epochs=10, patience=3)
    assert not is_finished(epoch=7, best_epoch=1, num_epochs=10, patience=None)


def test_in_bf16_training_follows_fp32_with_weights_and_states_in_float32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = make_trainer(tmp_path, precision, precision=precision, num_epochs=10)
        trainer.fit()
        losses[precision] = [record["loss"] for record in read_log(trainer.run.folder)]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_a_state_of_another_device_keeps_this_devices_learning_rate_and_way_of_stepping(tmp_path):
    first = make_trainer(tmp_path, "first")
    update(first, next(first.loader.epoch(1)))
    state = first.state()
    for group in state["optimizer"]["param_groups"]:  # as a GPU writes it
        group |= {"lr": torch.tensor(0.5), "capturable": True}
    second = make_trainer(tmp_path, "second")
    second.load_state(state)
    for group in second.step.optimizer.param_groups:
        assert (type(group["lr"]), group["capturable"]) == (float, False)
    step = next(iter(second.step.optimizer.state.values()))["step"]
    assert step == 1 and step.device == CPU
    update(second, next(second.loader.epoch(1)))  # capturable, this would be refused

    third, lr = make_trainer(tmp_path, "third"), torch.tensor(0.25)  # a recording reads this very tensor
    for group in third.step.optimizer.param_groups:
        group |= {"lr": lr, "capturable": True}
    third.load_state(first.state())
    assert all(group["lr"] is lr and group["capturable"] for group in third.step.optimizer.param_groups)


def test_a_learning_rate_that_is_a_tensor_is_set_in_its_place(tmp_path):
    trainer, plain = make_trainer(tmp_path, warmup_steps=10), make_trainer(tmp_path, "plain", warmup_steps=10)
    lr = torch.tensor(0.0)
    for group in trainer.step.optimizer.param_groups:
        group["lr"] = lr
    for step, batch in enumerate(trainer.loader.epoch(1)):
        for each in (trainer, plain):
            torch.manual_seed(step)
            update(each, batch)
        assert all(group["lr"] is lr for group in trainer.step.optimizer.param_groups)
        assert lr.item() == pytest.approx(trainer.lr_at(step))
    for tensor, number in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(tensor, number)


def test_validation_may_leave_out_the_history_and_then_picks_the_best_epoch_by_that(tmp_path, capsys):
    trainer = make_trainer(tmp_path, val_mask_history=True)
    trainer.fit()
    masked, kept = (
        evaluate(trainer.model, trainer.val_rows, sizes=SIZES, batch_size=8, ks=(5, 10), mask_history=masked)
        for masked in (True, False)
    )
    assert masked != kept
    assert trainer.validate() == masked
    assert read_log(trainer.run.folder)[-1]["val"]["8"] == masked[8]
    assert "val NDCG@10 (history masked)" in capsys.readouterr().out


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
    for name, value in trainer.eval_model.state_dict().items():
        average = sum(count * of_step[name] for count, of_step in zip(counts, weights, strict=True)) / sum(counts)
        torch.testing.assert_close(value, average, msg=name)
        assert torch.equal(trainer.model.state_dict()[name], plain.model.state_dict()[name]), name
    assert trainer.validate() == evaluate(trainer.eval_model, trainer.val_rows, sizes=SIZES, batch_size=8, ks=(5, 10))
    assert trainer.validate() != plain.validate()
    loaded = make_trainer(tmp_path).model
    load_weights(loaded, trainer.run.folder / "best.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in trainer.eval_model.state_dict().items())
    assert plain.eval_model is plain.model


def test_the_average_shares_the_frozen_features_and_their_whitening_with_the_model():
    whitening = Whitening([torch.randn(12, 6)])
    model = FMRLRec(12, whitening.features(), ModelSettings(mrl_hidden_sizes=SIZES, lru_num_blocks=1), whitening)
    average = WeightAverage(model, 0.9).model
    assert average.items.whitening is whitening
    assert [part.data_ptr() for part in average.items.features] == [part.data_ptr() for part in model.items.features]
    assert not {id(parameter) for parameter in average.parameters()} & {id(p) for p in model.parameters()}


def test_the_untrained_model_is_validated_if_asked_for_and_may_be_the_best(tmp_path, monkeypatch):
    values = iter([0.5, 0.1, 0.2])
    trainer = make_trainer(tmp_path, num_epochs=2, validate_untrained=True)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    monkeypatch.setattr(trainer, "validate", lambda: {8: {"NDCG@10": next(values)}})
    trainer.fit()
    assert [record["epoch"] for record in read_log(trainer.run.folder)] == [0, 1, 2]
    assert trainer.progress.best_epoch == 0
    load_weights(trainer.model, trainer.run.folder / "best.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(("clip", "share"), [(1e-4, 1.0), (1e6, 0.0)])
def test_the_share_of_clipped_steps_is_logged(tmp_path, clip, share):
    trainer = make_trainer(tmp_path, num_epochs=2, max_grad_norm=clip)
    trainer.fit()
    assert [record["clipped"] for record in read_log(trainer.run.folder)] == [share, share]
