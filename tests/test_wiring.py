"""Every setting reaches what reads it: the data, the model, the trainer and the test."""

import dataclasses
import inspect

import pytest
import torch

import config
import train
from config import Config, FeatureSettings, ModelSettings
from dataloader import TrainLoader, train_rows
from datasets.features import image, text
from model import FMRLRec
from model.baselines.lrurec import LRURec
from model.baselines.sasrec import SASRec
from tests.made_up import as_sequences
from tests.prepared import write_prepared
from trainer import wiring

CHANGED = {
    "dataset_code": "other",
    "data_root": "elsewhere",
    "use_language_encoder": False,
    "language_encoder": "some-encoder",
    "item_attributes": ("brand",),
    "use_img_encoder": False,
    "img_encoder": "some/encoder",
    "encoder_precision": "fp32",
    "encoder_batch_size": 5,
    "encoder_workers": 1,
    "mrl_hidden_sizes": (4, 8),
    "lru_max_len": 7,
    "first_item_label": False,
    "lru_num_blocks": 3,
    "lru_dropout": 0.11,
    "lru_attn_dropout": 0.22,
    "lru_use_bias": False,
    "lru_r_min": 0.03,
    "lru_r_max": 0.77,
    "seed": 9,
    "train_batch_size": 12,
    "num_epochs": 2,
    "precision": "bf16",
    "optimizer": "adam",
    "lr": 0.005,
    "weight_decay": 0.3,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 1.5,
    "enable_lr_schedule": False,
    "warmup_steps": 17,
    "mrl_loss": "sum",
    "num_negatives": 13,
    "early_stopping": False,
    "early_stopping_patience": 11,
    "preset": "plus",
    "whiten_features": True,
    "item_embedding": 4,
    "logit_scale": True,
    "distill": 0.25,
    "post_norm": True,
    "dropout_from": 10,
    "ema_decay": 0.85,
    "val_batch_size": 8,
    "test_batch_size": 6,
    "metric_ks": (2, 10),
    "val_mask_history": True,
    "best_metric": "MRR@10",
    "runs_root": "my/runs",
    "run_name": "named",
}
TRAINER_SETTINGS = ["num_epochs", "lr", "warmup_steps", "val_batch_size", "best_metric", "ema_decay"]
MODEL_SETTINGS = ["logit_scale", "post_norm", "dropout_from"]
SPIED = ["train_rows", "eval_rows", "TrainLoader", "FMRLRec", "build_optimizer", "NegativeSampler", "Step", "Trainer"]
SPIED += ["test_every_size"]
STEP_SETTINGS = ["precision", "max_grad_norm", "distill"]
OPTIMIZER_SETTINGS = ["optimizer", "lr", "weight_decay", "adam_epsilon"]  # in the order of build_optimizer
CHANGED_ELSEWHERE = {"device", "use_wandb", "test"}  # tests/test_scripts.py
CHANGED_ELSEWHERE |= {"model_code", "num_heads"}  # tests/test_baseline_runs.py
CHANGED_ELSEWHERE |= {"features"}  # tests/test_arrays.py
# Changed in one run: what one of them is cannot be taken for what another is. The others are yes or no, or leave
# nothing of another.
TOGETHER = {name: value for name, value in CHANGED.items() if not isinstance(value, bool)}
for name in ("dataset_code", "data_root", "preset"):
    del TOGETHER[name]
BASE = {"dataset_code": "tiny", "mrl_hidden_sizes": (2, 4), "num_epochs": 1, "lru_num_blocks": 1, "device": "cpu"}


def consumed(flags, monkeypatch):
    """Run train.py and record what the rooms are given, without encoders to load."""
    seen = {}

    def spy(name, module=wiring):
        true = getattr(module, name)

        def recorded(*arguments, **named):
            seen.setdefault(name, []).append((arguments, named))
            return true(*arguments, **named)

        monkeypatch.setattr(module, name, recorded)

    monkeypatch.setattr(text, "load_encoder", lambda name, device, precision: text.LexicalEncoder())
    monkeypatch.setattr(image, "load_encoder", lambda name, device, precision: image.PixelEncoder())
    monkeypatch.setattr(text, "hub_commit", lambda name: None)
    for name in SPIED:
        spy(name)
    spy("load_features")
    seeds = []
    true_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or true_seed(seed))
    run = train.main([f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in flags.items()])
    settings, step = seen["Trainer"][0][1], seen["Step"][0][1]
    optimizer = dict(zip(OPTIMIZER_SETTINGS, seen["build_optimizer"][0][0][1:], strict=True))
    assert optimizer["lr"] == settings["lr"]
    features, catalog = seen["load_features"][0][0][:2]
    rec, loader, test = seen["FMRLRec"][0], seen["TrainLoader"][0], seen["test_every_size"][0]
    return {
        "dataset_code": catalog.name,
        **{f.name: getattr(features, f.name) for f in dataclasses.fields(FeatureSettings)},
        "mrl_hidden_sizes": rec[0][2],
        "first_item_label": seen["train_rows"][0][0][2],
        "lru_max_len": {c[0][1] for name in ("train_rows", "eval_rows") for c in seen[name]},
        "lru_num_blocks": rec[0][3].num_blocks,
        "lru_dropout": rec[0][3].dropout,
        "lru_attn_dropout": rec[0][3].attn_dropout,
        "lru_use_bias": rec[0][3].use_bias,
        "lru_r_min": rec[0][3].r_min,
        "lru_r_max": rec[0][3].r_max,
        "whiten_features": rec[0][4] is not None,
        "item_embedding": rec[0][3].item_embedding,
        **{name: getattr(rec[0][3], name) for name in MODEL_SETTINGS},
        "seed": (loader[0][2], seeds[0]),
        "train_batch_size": loader[0][1],
        "early_stopping": settings["patience"] is not None,
        "early_stopping_patience": settings["patience"],
        "enable_lr_schedule": settings["schedule"],
        "val_mask_history": settings["mask_history"],
        "mrl_loss": step["reduction"],
        "num_negatives": seen["NegativeSampler"][0][0][1] if "NegativeSampler" in seen else 0,
        "test_batch_size": test[1]["batch_size"],
        "metric_ks": (settings["metric_ks"], test[1]["ks"]),
        "run": run,
        **optimizer,
        **{name: settings[name] for name in TRAINER_SETTINGS},
        **{name: step[name] for name in STEP_SETTINGS},
    }


def test_the_table_of_changed_settings_is_complete():
    assert set(CHANGED) | CHANGED_ELSEWHERE == {f.name for f in dataclasses.fields(Config)}
    defaults = Config()
    assert all(getattr(defaults, name) != value for name, value in CHANGED.items())


@pytest.mark.parametrize("model", [ModelSettings, SASRec, LRURec])
def test_what_a_model_takes_for_granted_is_what_config_says(model):
    name = "fmrlrec" if model is ModelSettings else model.__name__.lower()
    settings, _ = config.resolve({"model_code": name, "dataset_code": "my_shop"})
    for name, parameter in inspect.signature(model).parameters.items():
        setting = next((n for n in (f"lru_{name}", name) if hasattr(settings, n)), None)
        if parameter.default is not parameter.empty and setting:
            assert parameter.default == getattr(settings, setting), setting


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What a run in which all of TOGETHER were changed consumed."""
    folder = tmp_path_factory.mktemp("together")
    write_prepared(folder / "data", "tiny", users=20, items=20, pictures=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return consumed(BASE | {"item_embedding": 4, "post_norm": True} | TOGETHER, patch)


def test_settings_that_are_changed_together_are_told_apart():
    values = [str(value) for value in TOGETHER.values()]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("name", TOGETHER)
def test_a_setting_reaches_what_reads_it(together, name):
    value, found = TOGETHER[name], together["run" if name in ("runs_root", "run_name") else name]
    if name == "lru_max_len":
        assert found == {value}
    elif name in ("seed", "metric_ks"):
        assert found == (value, value)
    elif name in ("runs_root", "run_name"):
        assert value in str(found)
    else:
        assert found == value


@pytest.mark.parametrize("name", [name for name in CHANGED if name not in TOGETHER])
def test_a_setting_alone_reaches_what_reads_it(workplace, monkeypatch, name):
    value = CHANGED[name]
    if name == "data_root":
        (workplace / "data").rename(workplace / "elsewhere")
    if name == "dataset_code":
        write_prepared(workplace / "data", "other", users=8, items=20, pictures=True)
    found = consumed(BASE | {name: value}, monkeypatch)
    if name == "data_root":
        assert found["dataset_code"] == "tiny"
    elif name == "preset":
        plus = config.NAMED_PRESETS[value] | {"item_embedding": BASE["mrl_hidden_sizes"][-1], "num_epochs": 1}
        plus["num_negatives"] = 0  # there are fewer items
        assert {setting: found[setting] for setting in plus} == plus
    else:
        assert found[name] == value


@pytest.mark.parametrize(("negatives", "sampled"), [(0, False), (19, True), (20, False), (4096, False)])
def test_as_many_negatives_as_items_are_all_items(negatives, sampled):
    config_, _ = config.resolve({"dataset_code": "tiny", "num_negatives": negatives, "device": "cpu"})
    model = FMRLRec(20, None, ModelSettings(mrl_hidden_sizes=(2, 4), lru_num_blocks=1))
    loader = TrainLoader(train_rows(as_sequences([[1, 2, 3, 4], [5, 6, 7]]), 5), 2, 0, torch.device("cpu"))
    step = wiring.build_step(config_, model, loader)
    assert (step.sampler is not None) == sampled
