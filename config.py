"""All settings of a run, their defaults and presets.

Edit a default below, or give a flag of the same name on the command line. Precedence:

    explicit flag  >  --preset  >  preset of the model  >  preset of the dataset  >  default
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from common.settings import Settings, format_value, setting

COUNTING = ("popularity", "itemknn")  # baselines that count instead of training
METRICS = ("Recall", "NDCG", "MRR")  # printed, and accepted by --best_metric


def _only(*models: str) -> Callable[[Any], bool]:
    return lambda c: c.model_code in models


@dataclass(frozen=True)
class DataSettings(Settings):
    """The dataset and its location."""

    dataset_code: str = setting("demo", "demo, beauty, clothing, sports, toys, or your own", folder_name=True)
    data_root: str = setting("data", "holds <dataset_code>/ and photos/<dataset_code>/", metavar="FOLDER", runtime=True)


@dataclass(frozen=True)
class FeatureSettings(Settings):
    """Item modalities and their encoders."""

    use_language_encoder: bool = setting(True, "use item texts")
    language_encoder: str = setting(
        "BAAI/bge-large-en-v1.5",
        "Hugging Face text encoder (NAME, NAME@REVISION or a local folder), or lexical (hashed n-grams, no download)",
        used_if=lambda c: c.use_language_encoder,
    )
    item_attributes: tuple[str, ...] = setting(
        ("title", "price", "brand", "categories"),
        "metadata keys that make up an item's text, in order",
        used_if=lambda c: c.use_language_encoder,
    )
    use_img_encoder: bool = setting(True, "use item pictures")
    img_encoder: str = setting(
        "ViT-L-16-SigLIP-256/webli",
        "open_clip model (MODEL/PRETRAINED or MODEL/path-to-weights), or pixel (colours and shapes, no download)",
        used_if=lambda c: c.use_img_encoder,
    )
    encoder_precision: str = setting(
        "auto",
        "encoder precision; auto: as cached, else bf16 if supported, else fp16 on a GPU and fp32 on a CPU",
        choices=("auto", "fp32", "bf16"),
        used_if=lambda c: c.use_language_encoder or c.use_img_encoder,
    )
    features: tuple[str, ...] = setting(
        (),
        "a vector per product id, from a file (.npy, .safetensors, .csv, .parquet, Amazon's .b), scaled to norm 1",
        metavar="NAME=FILE,...",
        taken_names=("language", "image", "both", "id", "picture"),
    )
    features_root: str = setting("data/features", "folder of the cached features", metavar="FOLDER", runtime=True)
    encoder_batch_size: int = setting(32, "texts or pictures per encoder batch", at_least=1, runtime=True)
    encoder_workers: int = setting(4, "maximum number of prefetching processes; 0: none", at_least=0, runtime=True)

    @property
    def feature_files(self) -> dict[str, str]:
        """Return `features` as a dict: name -> file."""
        return {name: file for name, _, file in (entry.partition("=") for entry in self.features)}

    @property
    def branch(self) -> str:
        """Return the modalities joined by +; "both" is language+image, and "id" is none."""
        used = ["language"] * self.use_language_encoder + ["image"] * self.use_img_encoder
        return {"": "id", "language+image": "both"}.get(branch := "+".join([*used, *self.feature_files]), branch)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.use_language_encoder and not self.item_attributes:
            yield "--item_attributes is empty; name at least one metadata key, such as title"


def size_within(sizes: tuple[int, ...], width: int) -> int:
    """Return the largest size <= width, or else the smallest size; 0 for width 0."""
    return max((m for m in sizes if m <= width), default=sizes[0]) if width else 0


_IDS_ONLY = {"use_language_encoder": False, "use_img_encoder": False}
_SEQUENTIAL = {**_IDS_ONLY, "mrl_hidden_sizes": (64,), "train_batch_size": 128, "num_epochs": 30, "lr": 1e-3}

# Baselines (model/__init__.py) and their settings on every dataset. Learning rate and dropout are not tuned.
MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "sasrec": {**_SEQUENTIAL, "lru_dropout": 0.5, "lru_attn_dropout": 0.5},
    "lrurec": {**_SEQUENTIAL, "lru_dropout": 0.5, "lru_attn_dropout": 0.5, "lru_r_min": 0.8, "lru_r_max": 0.99},
    "gru4rec": {**_SEQUENTIAL, "lru_num_blocks": 1, "lru_dropout": 0.5, "lru_attn_dropout": 0.5},
    **{name: {**_IDS_ONLY, "mrl_hidden_sizes": (1,), "num_epochs": 1} for name in COUNTING},
}


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Model architecture."""

    model_code: str = setting(
        "fmrlrec",
        "fmrlrec or a baseline by ids; popularity and itemknn only count",
        choices=("fmrlrec", *MODEL_PRESETS),
    )
    mrl_hidden_sizes: tuple[int, ...] = setting((8, 16, 32, 64, 128, 256, 512, 1024), "nested sizes; the last one is D")
    lru_max_len: int = setting(50, "maximum history length; older items are dropped", at_least=1, at_most=2**20)
    lru_num_blocks: int = setting(2, "blocks of LRU (attention, GRU) and FFN", at_least=1, at_most=1000)
    lru_dropout: float = setting(0.5, "dropout in and after the FFN; baselines: embeddings too", at_least=0, below=1)
    lru_attn_dropout: float = setting(0.5, "dropout after the LRU, attention or GRU", at_least=0, below=1)
    embedding_dropout: bool = setting(True, "lru_dropout on the input embeddings too", used_if=_only("fmrlrec"))
    num_heads: int = setting(1, "attention heads of sasrec; must divide D", at_least=1, used_if=_only("sasrec"))
    lru_use_bias: bool = setting(True, "biases of the LRU and the FFN", used_if=_only("fmrlrec", "lrurec"))
    lru_r_min: float = setting(0.0, "smallest initial |λ| of the LRU", used_if=_only("fmrlrec", "lrurec"))
    lru_r_max: float = setting(0.1, "largest initial |λ| of the LRU", used_if=_only("fmrlrec", "lrurec"))
    whiten_features: bool = setting(False, "whiten each encoder's features", extension=True)
    item_embedding: int = setting(
        0, "leading dimensions with a learned item embedding, down to a size; 0: none", at_least=0, extension=True
    )
    item_embedding_gate: bool = setting(False, "no embedding for items without a training event", extension=True)
    post_norm: bool = setting(False, "LayerNorm after each LRU and FFN, and on the input", extension=True)
    dropout_from: int = setting(0, "number of leading dimensions without dropout", at_least=0, extension=True)
    logit_scale: bool = setting(False, "learn one logit scale per size", extension=True)
    history_bias: bool = setting(False, "learn one logit bias per size for items of the history", extension=True)

    @property
    def embedded(self) -> int:
        """Return the width of the item embedding, one of the sizes; 0: none."""
        return size_within(self.mrl_hidden_sizes, self.item_embedding)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.lru_r_min < self.lru_r_max <= 1:
            yield f"--lru_r_min {self.lru_r_min} --lru_r_max {self.lru_r_max}: need 0 <= r_min < r_max <= 1"
        if self.model_code == "fmrlrec":
            return
        for f in fields(ModelSettings):
            if f.metadata["extension"] and getattr(self, f.name) != f.default:
                yield f"--{f.name} {getattr(self, f.name)} needs --model_code fmrlrec, not {self.model_code}"
        sizes = format_value(self.mrl_hidden_sizes)
        if len(self.mrl_hidden_sizes) > 1:
            yield f'--mrl_hidden_sizes "{sizes}": {self.model_code} takes one size; only --model_code fmrlrec is nested'
        elif self.model_code in COUNTING and sizes != "1":
            yield f"--mrl_hidden_sizes {sizes}: {self.model_code} has no size; leave the flag out"
        if self.model_code == "sasrec" and self.mrl_hidden_sizes[-1] % self.num_heads:
            yield f"--num_heads {self.num_heads} does not divide --mrl_hidden_sizes {sizes}"


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """Optimisation and loss."""

    seed: int = setting(42, "random seed", at_least=0, below=2**64, for_several="python -m experiments.run --seeds")
    train_batch_size: int = setting(32, "users per training step, over all processes", at_least=1)
    num_epochs: int = setting(500, "maximum number of epochs, and end of the cosine schedule", at_least=1)
    epoch_steps: int = setting(0, "steps per epoch, of random users; 0: every user once", at_least=0, extension=True)
    precision: str = setting("fp32", "precision of matrix products in training", choices=("fp32", "tf32", "bf16"))
    optimizer: str = setting("adamw", "adamw, or adam: weight decay added to the gradient", choices=("adamw", "adam"))
    lr: float = setting(1e-4, "peak learning rate", above=0)
    weight_decay: float = setting(1e-2, "weight decay; biases are never decayed", at_least=0)
    adam_epsilon: float = setting(1e-9, "ε of Adam and AdamW", above=0)
    max_grad_norm: float = setting(5.0, "maximum gradient norm; 0: no clipping", at_least=0)
    enable_lr_schedule: bool = setting(True, "linear warm-up, then cosine decay to 0 at num_epochs; otherwise constant")
    warmup_from_zero: bool = setting(True, "learning rate 0 at the first step", used_if=lambda c: c.enable_lr_schedule)
    warmup_steps: int = setting(100, "warm-up steps", at_least=0, used_if=lambda c: c.enable_lr_schedule)
    mrl_loss: str = setting("sum", "reduction over sizes: sum (paper), mean (released code)", choices=("sum", "mean"))
    loss: str = setting("fast", "name in LOSSES of model/loss.py: fast, or plain, its readable twin for experiments")
    first_item_label: bool = setting(True, "predict the first item too, from token 0, if all items fit in lru_max_len")
    num_negatives: int = setting(0, "sampled items per step for a sampled softmax; 0: exact softmax", at_least=0)
    item_embedding_updates: str = setting(
        "auto",
        "rows: AdamW for a learned item embedding by the rows that a step reads; compact: rows with smaller moments; "
        "auto: compact from 100,000 items on, on a CPU, else all",
        choices=("auto", "rows", "compact", "all"),
        used_if=lambda c: c.num_negatives > 0 and c.optimizer == "adamw",
    )
    early_stopping: bool = setting(True, "stop after early_stopping_patience epochs without a better best_metric")
    early_stopping_patience: int = setting(10, "patience in epochs", at_least=1, used_if=lambda c: c.early_stopping)
    distill: float = setting(
        0.0, "share of the teachers' or the largest size's softmax in targets", at_least=0, at_most=1, extension=True
    )
    logit_adjustment: float = setting(
        0.0, "further events to expect of every item, which raises rare items; 0: none", at_least=0, extension=True
    )
    teachers: tuple[str, ...] = setting((), "trained runs that all sizes learn from", metavar="RUN,...", extension=True)
    ema_decay: float = setting(0.0, "EMA decay of the evaluated weights; 0: none", at_least=0, below=1, extension=True)


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """Validation and test."""

    val_batch_size: int = setting(256, "users per validation batch", at_least=1, runtime=True)
    test_batch_size: int = setting(256, "users per test batch", at_least=1, runtime=True)
    metric_ks: tuple[int, ...] = setting((5, 10, 20, 50), "cut-offs K for Recall@K, NDCG@K and MRR@K", runtime=True)
    val_mask_history: bool = setting(False, "exclude history items from the candidates in validation")
    best_metric: str = setting("NDCG@10", "validation metric that selects the best epoch", metavar="METRIC@K")
    print_val_metrics: bool = setting(False, "print all validation metrics of the largest size", runtime=True)
    validate_untrained: bool = setting(False, "validate the untrained model too; it may be the best epoch")
    test: bool = setting(True, "test every size after training; --no-test never reads the test set", runtime=True)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        metric, _, k = self.best_metric.partition("@")
        if metric not in METRICS or not k.isascii() or not k.isdigit() or k.startswith("0"):
            yield f"--best_metric {self.best_metric!r} must be {', '.join(METRICS)} at a cut-off, such as NDCG@10"


@dataclass(frozen=True)
class RunSettings(Settings):
    """Preset, device, output and logging."""

    preset: str = setting("paper", "named settings, which train.py --help lists", choices=("paper", "released", "plus"))
    device: str = setting("auto", "auto: a GPU per process, if any", choices=("auto", "cpu", "cuda"), runtime=True)
    runs_root: str = setting("experiments/runs", "holds <dataset_code>/<run>/", metavar="FOLDER", runtime=True)
    init_from: str = setting("", "start from this run's weights and settings", metavar="RUN", extension=True)
    save_every_minutes: float = setting(10.0, "minutes between saves in an epoch; 0: none", at_least=0, runtime=True)
    run_name: str = setting("", "run name; empty: modalities and size, such as both-1024", folder_name=True)
    use_wandb: bool = setting(False, "log to Weights & Biases too; offline without a key or WANDB_MODE", runtime=True)
    use_tensorboard: bool = setting(False, "log to TensorBoard too, in the run's folder", runtime=True)


SECTIONS = (DataSettings, FeatureSettings, ModelSettings, TrainingSettings, EvaluationSettings, RunSettings)


@dataclass(frozen=True)
class Config(RunSettings, EvaluationSettings, TrainingSettings, ModelSettings, FeatureSettings, DataSettings):
    """All settings of a run."""

    def problems(self) -> Iterator[str]:
        if self.preset != "paper" and self.model_code != "fmrlrec":
            yield f"--preset {self.preset} needs --model_code fmrlrec, not {self.model_code}"
        yield from super().problems()
        if self.teachers and not self.distill:
            yield "--teachers needs --distill, their share in the targets, such as --distill 0.9"
        if self.model_code != "fmrlrec":
            for name in ("use_language_encoder", "use_img_encoder", "features"):
                if getattr(self, name):
                    yield f"--{name}: {self.model_code} uses item ids only; leave it out, or give --model_code fmrlrec"
        for name, off in (("whiten_features", "--no-whiten_features"), ("item_embedding", "--item_embedding 0")):
            if self.branch == "id" and getattr(self, name):
                yield f"--{name} needs an encoder or --features; leave it out ({off})"


EXTENSIONS = tuple(f.name for f in fields(Config) if f.metadata["extension"])  # beyond the paper, fmrlrec only

# The paper's choices per dataset (section 4.3 and appendix; Beauty's dropout from the released README), and the demo's.
PRESETS: dict[str, dict[str, Any]] = {
    "beauty": {"lru_dropout": 0.6, "lru_attn_dropout": 0.6, "lru_r_min": 0.0, "lru_r_max": 0.1},
    "clothing": {"lru_r_min": 0.1, "lru_r_max": 0.2},
    "sports": {"lru_r_min": 0.1, "lru_r_max": 0.2},
    "toys": {"lru_r_min": 0.0, "lru_r_max": 0.1},
    "demo": {
        "language_encoder": "lexical", "img_encoder": "pixel", "mrl_hidden_sizes": (8, 16, 32, 64, 128, 256),
        "lr": 1e-3, "num_epochs": 12, "lru_dropout": 0.3, "lru_attn_dropout": 0.3,
    },
}  # fmt: skip

# What --preset stands for: the paper's model, the released code's, and the one with options beyond the paper.
NAMED_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "lru_num_blocks": 1, "lru_dropout": 0.6, "lru_attn_dropout": 0.6, "lru_r_min": 0.0, "lru_r_max": 0.1,
        "mrl_loss": "mean", "validate_untrained": True,
    },
    "plus": {
        "whiten_features": True, "item_embedding": 256, "post_norm": True, "dropout_from": 64, "logit_scale": True,
        "distill": 0.9, "ema_decay": 0.998, "num_negatives": 4096, "lru_r_min": 0.8, "lru_r_max": 0.99, "num_epochs": 7,
        "lru_dropout": 0.5, "lru_attn_dropout": 0.5, "val_mask_history": True, "train_batch_size": 128, "lr": 1e-3,
        "mrl_loss": "mean", "warmup_from_zero": False, "history_bias": True, "item_embedding_gate": True,
    },
}  # fmt: skip

# What a named preset has otherwise on a dataset. The demo's 3,000 users are 24 batches of 128, too few for 7 epochs.
ON_DATASET: dict[tuple[str, str], dict[str, Any]] = {("plus", "demo"): {"train_batch_size": 32, "num_epochs": 12}}

ALL_PRESETS = {**PRESETS, **MODEL_PRESETS, **NAMED_PRESETS, "plus on demo": ON_DATASET["plus", "demo"]}  # for --help


def named_preset(name: str, dataset: str) -> dict[str, Any]:
    """Return what --preset stands for on a dataset."""
    return NAMED_PRESETS.get(name, {}) | ON_DATASET.get((name, dataset), {})


def resolve(flags: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    """Return the settings and the source of each: "flag", "preset" or "default".

    Raises InputError that names the first invalid value.
    """
    dataset = flags.get("dataset_code", Config.dataset_code)
    preset = PRESETS.get(dataset, {}) | MODEL_PRESETS.get(flags.get("model_code", Config.model_code), {})
    preset = preset | named_preset(flags.get("preset", Config.preset), dataset)
    sources = {name: "flag" if name in flags else "preset" if name in preset else "default" for name in vars(Config())}
    return Config(**{**preset, **flags}), sources
