"""Every setting has an effect: something reads it, and changing what is trained changes the training."""

import ast
import dataclasses
import hashlib
from pathlib import Path

import pytest

import config
import train
from config import Config
from tests.prepared import write_prepared, write_tiny_bert

REPOSITORY = Path(__file__).parent.parent
ROOMS = ("config.py", "common", "datasets", "dataloader", "model", "trainer", "train.py", "eval.py")
BASE = {
    "dataset_code": "tiny", "language_encoder": "lexical", "img_encoder": "pixel", "mrl_hidden_sizes": (2, 4),
    "num_epochs": 2, "lru_num_blocks": 1, "lr": 0.01, "warmup_steps": 1, "train_batch_size": 8, "device": "cpu",
    "test": False,
}  # fmt: skip
CHANGED = {
    "dataset_code": "other", "use_language_encoder": False, "item_attributes": ("brand",), "use_img_encoder": False,
    "language_encoder": "bert", "model_code": "sasrec", "mrl_hidden_sizes": (4, 8), "lru_max_len": 2,
    "lru_num_blocks": 2, "lru_dropout": 0.1, "lru_attn_dropout": 0.1, "lru_use_bias": False, "lru_r_min": 0.05,
    "lru_r_max": 0.9, "seed": 9, "train_batch_size": 12, "num_epochs": 1, "precision": "bf16", "optimizer": "adam",
    "lr": 0.02, "weight_decay": 0.3, "adam_epsilon": 1e-3, "max_grad_norm": 1e-4, "enable_lr_schedule": False,
    "warmup_steps": 3, "mrl_loss": "mean", "embedding_dropout": False, "warmup_from_zero": False,
    "loss": "plain", "first_item_label": False, "num_negatives": 7,
    "whiten_features": True, "item_embedding": 2, "post_norm": True,
    "dropout_from": 2, "logit_scale": True, "distill": 0.5, "ema_decay": 0.5,
    "preset": "plus",
}  # fmt: skip
# What does not change the weights of a short run: chosen, named, or tested elsewhere.
ELSEWHERE = {
    "img_encoder", "encoder_precision", "num_heads", "early_stopping", "early_stopping_patience", "val_mask_history",
    "best_metric", "run_name", "validate_untrained", "features", "item_embedding_updates",
}  # fmt: skip


def attributes_read() -> set[str]:
    """The names of all attributes that the rooms read."""
    paths = [
        path for room in ROOMS for path in ([REPOSITORY / room] if ".py" in room else (REPOSITORY / room).rglob("*.py"))
    ]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_setting_is_read_by_something():
    assert {f.name for f in dataclasses.fields(Config)} <= attributes_read()


def weights(**settings) -> str:
    """The digest of the weights that these settings train."""
    text = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in (BASE | settings).items()}
    run = train.main([f"--{name}={value}" for name, value in text.items()])
    return hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two datasets and a text encoder, and the weights that the base settings train there."""
    folder = tmp_path_factory.mktemp("settings")
    for name, seed in (("tiny", 0), ("other", 1)):
        write_prepared(folder / "data", name, users=20, items=20, pictures=True, seed=seed)
    write_tiny_bert(folder / "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield weights()


def test_the_table_of_changed_settings_is_complete():
    trained = {f.name for f in dataclasses.fields(Config) if not f.metadata["runtime"]}
    assert set(CHANGED) | ELSEWHERE == trained


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_changes_what_is_trained(place, name):
    changed = {name: CHANGED[name]}
    if name == "model_code":
        changed |= {"use_language_encoder": False, "use_img_encoder": False, "mrl_hidden_sizes": (4,)}
    if name == "language_encoder":
        changed["language_encoder"] = str(Path("bert").resolve())
    assert weights(**changed) != place


def test_the_same_settings_train_the_same_weights(place):
    assert weights() == place


def test_a_presets_settings_are_those_that_it_names():
    assert {name: getattr(config.resolve({"preset": "plus"})[0], name) for name in config.NAMED_PRESETS["plus"]} == (
        config.NAMED_PRESETS["plus"]
    )
