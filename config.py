"""Every setting of a run, in one place.

Edit a default below, or give a flag of the same name on the command line. What wins:

    an explicit flag  >  the preset that --preset names  >  the model's preset  >  the dataset's preset  >  the default

Each part of the code takes the section that it reads; a Config is all sections in one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from common.settings import Settings, format_value, setting

COUNTING = ("popularity", "itemknn")  # models that are not trained
METRICS = ("Recall", "NDCG", "MRR")


def _only(*models: str) -> Callable[[Any], bool]:
    return lambda c: c.model_code in models


@dataclass(frozen=True)
class DataSettings(Settings):
    """Which dataset, and where it is."""

    dataset_code: str = setting(
        "demo", "demo, beauty, clothing, sports, toys, or any prepared folder below data_root", folder_name=True
    )
    data_root: str = setting(
        "data", "folder that holds <dataset_code>/ and photos/<dataset_code>/; training only reads it", runtime=True
    )


@dataclass(frozen=True)
class FeatureSettings(Settings):
    """What items are described by, and how it is encoded."""

    use_language_encoder: bool = setting(True, "describe items by their text")
    language_encoder: str = setting(
        "BAAI/bge-large-en-v1.5",
        "a Hugging Face text encoder (NAME, NAME@REVISION or a local folder), or lexical (hashed n-grams, no download)",
        used_if=lambda c: c.use_language_encoder,
    )
    item_attributes: tuple[str, ...] = setting(
        ("title", "price", "brand", "categories"),
        "metadata keys that make an item's text, in order",
        used_if=lambda c: c.use_language_encoder,
    )
    use_img_encoder: bool = setting(True, "describe items by their picture")
    img_encoder: str = setting(
        "ViT-L-16-SigLIP-256/webli",
        "an open_clip model (MODEL/PRETRAINED or MODEL/path-to-weights), or pixel (colours and shapes, no download)",
        used_if=lambda c: c.use_img_encoder,
    )
    encoder_precision: str = setting(
        "auto",
        "precision of the encoders; auto: that of cached features, else bf16 (without it fp16 on a GPU, fp32 on a CPU)",
        choices=("auto", "fp32", "bf16"),
        used_if=lambda c: c.use_language_encoder or c.use_img_encoder,
    )
    features: tuple[str, ...] = setting(
        (),
        "NAME=FILE,...: vectors by product id (.npy, .safetensors, .csv, .parquet, Amazon's .b), scaled to length 1",
        taken_names=("language", "image", "both", "id", "picture"),
    )
    encoder_batch_size: int = setting(32, "texts or pictures that an encoder reads at once", at_least=1, runtime=True)
    encoder_workers: int = setting(4, "most processes that read ahead of an encoder; 0: none", at_least=0, runtime=True)

    @property
    def feature_files(self) -> dict[str, str]:
        """NAME -> FILE of `features`."""
        return {name: file for name, _, file in (entry.partition("=") for entry in self.features)}

    @property
    def branch(self) -> str:
        """The modalities: language, image and names of files, joined by +; both: language+image; id: none."""
        used = ["language"] * self.use_language_encoder + ["image"] * self.use_img_encoder
        return {"": "id", "language+image": "both"}.get(branch := "+".join([*used, *self.feature_files]), branch)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.use_language_encoder and not self.item_attributes:
            yield "--item_attributes is empty; name at least one metadata key, such as title"


def size_within(sizes: tuple[int, ...], width: int) -> int:
    """Return the largest size within `width`, or the smallest size if there is none; 0 for a width of 0."""
    return max((m for m in sizes if m <= width), default=sizes[0]) if width else 0


_IDS_ALONE = {"use_language_encoder": False, "use_img_encoder": False}
_SEQUENTIAL = {**_IDS_ALONE, "mrl_hidden_sizes": (64,), "train_batch_size": 128, "num_epochs": 30, "lr": 1e-3}

# The baselines (model/registry.py) and their settings on every dataset. Learning rate and dropout are not tuned: with
# them LRURec's 30 epochs have a test NDCG@10 of .0427 on Beauty; Table 2 of the fMRLRec paper has .0438.
MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "sasrec": {**_SEQUENTIAL, "lru_dropout": 0.5, "lru_attn_dropout": 0.5},
    "lrurec": {**_SEQUENTIAL, "lru_dropout": 0.5, "lru_attn_dropout": 0.5, "lru_r_min": 0.8, "lru_r_max": 0.99},
    "gru4rec": {**_SEQUENTIAL, "lru_num_blocks": 1, "lru_dropout": 0.5, "lru_attn_dropout": 0.5},
    **{name: {**_IDS_ALONE, "mrl_hidden_sizes": (1,), "num_epochs": 1} for name in COUNTING},
}


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The recommender's architecture."""

    model_code: str = setting(
        "fmrlrec",
        "fmrlrec, or a baseline that knows items by their ids alone; popularity and itemknn only count",
        choices=("fmrlrec", *MODEL_PRESETS),
    )
    mrl_hidden_sizes: tuple[int, ...] = setting(
        (8, 16, 32, 64, 128, 256, 512, 1024), "nested sizes, increasing; the last one is D; a baseline has one"
    )
    lru_max_len: int = setting(50, "how many of a history's last items are read", at_least=1)
    lru_num_blocks: int = setting(2, "blocks of LRU (sasrec: attention) and FFN; gru4rec: GRU layers", at_least=1)
    lru_dropout: float = setting(
        0.5, "dropout in and after the feed-forward network (baselines: of the embeddings too)", at_least=0, below=1
    )
    lru_attn_dropout: float = setting(0.5, "dropout after the LRU, attention or GRU", at_least=0, below=1)
    embedding_dropout: bool = setting(True, "lru_dropout on the input embeddings too", used_if=_only("fmrlrec"))
    num_heads: int = setting(1, "heads of sasrec's attention; must divide D", at_least=1, used_if=_only("sasrec"))
    lru_use_bias: bool = setting(
        True, "biases of the LRU and the feed-forward network", used_if=_only("fmrlrec", "lrurec")
    )
    lru_r_min: float = setting(0.0, "smallest initial radius |λ| of the LRU's ring", used_if=_only("fmrlrec", "lrurec"))
    lru_r_max: float = setting(0.1, "largest initial radius |λ| of the LRU's ring", used_if=_only("fmrlrec", "lrurec"))
    whiten_features: bool = setting(False, "whiten each encoder's features", extension=True)
    item_embedding: int = setting(
        0,
        "first dimensions with a learned embedding per item, rounded down to a size (at least the smallest); 0: none",
        at_least=0,
        extension=True,
    )
    post_norm: bool = setting(
        False, "LayerNorm after instead of before every LRU and FFN, and dropout and LayerNorm first", extension=True
    )
    dropout_from: int = setting(0, "first dimensions without dropout, for the small sizes", at_least=0, extension=True)
    logit_scale: bool = setting(False, "learn a scale of the logits for every size", extension=True)

    @property
    def embedded(self) -> int:
        """Width of the item embedding, one of the sizes; 0: none."""
        return size_within(self.mrl_hidden_sizes, self.item_embedding)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.lru_r_min < self.lru_r_max <= 1:
            yield f"--lru_r_min {self.lru_r_min} --lru_r_max {self.lru_r_max}: need 0 <= r_min < r_max <= 1"
        if self.model_code == "fmrlrec":
            return
        for f in fields(ModelSettings):
            if f.metadata["extension"] and getattr(self, f.name) != f.default:
                yield f"--{f.name} {getattr(self, f.name)}: only --model_code fmrlrec has it, not {self.model_code}"
        sizes = format_value(self.mrl_hidden_sizes)
        if len(self.mrl_hidden_sizes) > 1:
            yield f'--mrl_hidden_sizes "{sizes}": {self.model_code} has one size; only --model_code fmrlrec is nested'
        elif self.model_code in COUNTING and sizes != "1":
            yield f"--mrl_hidden_sizes {sizes}: {self.model_code} has one number an item; leave the flag out"
        if self.model_code == "sasrec" and self.mrl_hidden_sizes[-1] % self.num_heads:
            yield f"--num_heads {self.num_heads} does not divide --mrl_hidden_sizes {sizes}"


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """Optimisation and the loss."""

    seed: int = setting(42, "seed of initialisation, dropout and the order of users", at_least=0, below=2**64)
    train_batch_size: int = setting(32, "users in a training step, over all processes", at_least=1)
    num_epochs: int = setting(500, "most epochs; the cosine schedule ends there", at_least=1)
    precision: str = setting(
        "fp32", "precision of training's matrix products; all else is in float32", choices=("fp32", "tf32", "bf16")
    )
    optimizer: str = setting("adamw", "adamw, or adam (weight decay added to the gradient)", choices=("adamw", "adam"))
    lr: float = setting(1e-4, "peak learning rate", above=0)
    weight_decay: float = setting(1e-2, "weight decay; biases are never decayed", at_least=0)
    adam_epsilon: float = setting(1e-9, "the ε of Adam and AdamW", above=0)
    max_grad_norm: float = setting(5.0, "clip the gradient's norm at this; 0 does not clip", at_least=0)
    enable_lr_schedule: bool = setting(True, "linear warm-up, then cosine to 0 at num_epochs; otherwise constant")
    warmup_from_zero: bool = setting(True, "learning rate 0 at the first step", used_if=lambda c: c.enable_lr_schedule)
    warmup_steps: int = setting(100, "steps of the warm-up", at_least=0, used_if=lambda c: c.enable_lr_schedule)
    mrl_loss: str = setting(
        "sum", "reduction of the sizes' cross-entropies: sum (paper) or mean (released code)", choices=("sum", "mean")
    )
    loss: str = setting("fast", "a name of LOSSES in model/loss.py: fast, or plain, its plain twin, to edit")
    first_item_label: bool = setting(
        True, "predict a user's first item too, from token 0, if the training items fit into lru_max_len"
    )
    num_negatives: int = setting(0, "items drawn per step for a sampled softmax; 0: the exact softmax", at_least=0)
    early_stopping: bool = setting(True, "stop when best_metric has not improved for early_stopping_patience epochs")
    early_stopping_patience: int = setting(10, "its epochs", at_least=1, used_if=lambda c: c.early_stopping)
    distill: float = setting(
        0.0, "share of the largest size's softmax in the smaller sizes' target", at_least=0, at_most=1, extension=True
    )
    ema_decay: float = setting(
        0.0, "decay of the moving average of weights that is evaluated; 0: none", at_least=0, below=1, extension=True
    )


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """Validation and test."""

    val_batch_size: int = setting(256, "users ranked at once in validation", at_least=1, runtime=True)
    test_batch_size: int = setting(256, "users ranked at once in the test", at_least=1, runtime=True)
    metric_ks: tuple[int, ...] = setting((5, 10, 20, 50), "cut-offs K of Recall@K, NDCG@K and MRR@K", runtime=True)
    val_mask_history: bool = setting(False, "exclude history items from the candidates in validation")
    best_metric: str = setting("NDCG@10", "validation metric of the largest size that picks the best epoch")
    validate_untrained: bool = setting(False, "validate before the first epoch too; the untrained model may be best")
    test: bool = setting(True, "test every size after training; --no-test leaves the test set unread", runtime=True)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        metric, _, k = self.best_metric.partition("@")
        if metric not in METRICS or not k.isascii() or not k.isdigit() or k.startswith("0"):
            names = ", ".join(METRICS)
            yield f"--best_metric {self.best_metric!r} must be one of {names} at a cut-off, such as NDCG@10"


@dataclass(frozen=True)
class RunSettings(Settings):
    """Where to compute, and where the run is kept."""

    preset: str = setting("paper", "listed below", choices=("paper", "released", "plus"))
    device: str = setting(
        "auto", "auto: a GPU if there is one, one per process", choices=("auto", "cpu", "cuda"), runtime=True
    )
    runs_root: str = setting(
        "experiments/runs", "run folders are made at <runs_root>/<dataset_code>/<time>-<run_name>", runtime=True
    )
    run_name: str = setting("", "name of the run's folder after its time; empty: such as both-1024", folder_name=True)
    use_wandb: bool = setting(False, "log to Weights & Biases too (offline without a key or WANDB_MODE)", runtime=True)


SECTIONS = (DataSettings, FeatureSettings, ModelSettings, TrainingSettings, EvaluationSettings, RunSettings)


@dataclass(frozen=True)
class Config(RunSettings, EvaluationSettings, TrainingSettings, ModelSettings, FeatureSettings, DataSettings):
    """All settings of a run."""

    def problems(self) -> Iterator[str]:
        if self.preset != "paper" and self.model_code != "fmrlrec":
            yield f"--preset {self.preset} is for --model_code fmrlrec, not for {self.model_code}"
        yield from super().problems()
        if self.model_code != "fmrlrec":
            for name in ("use_language_encoder", "use_img_encoder", "features"):
                if getattr(self, name):
                    yield f"--{name}: {self.model_code} knows items by their ids alone; leave features to fmrlrec"
        for name, off in (("whiten_features", "--no-whiten_features"), ("item_embedding", "--item_embedding 0")):
            if self.branch == "id" and getattr(self, name):
                yield f"--{name}: without an encoder the item table is learned outright; leave it out ({off})"


EXTENSIONS = tuple(f.name for f in fields(Config) if f.metadata["extension"])  # beyond the paper, for fmrlrec alone

# What the paper chose per dataset (section 4.3 and its appendix); Beauty's dropouts are those of its README. The demo's
# catalogue is small, so it trains a smaller model for a few epochs.
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

# What --preset names, on every dataset. "released": what the README command of the authors' code trains. "plus": better
# accuracy by settings beyond the paper, chosen on Beauty and Sports from text alone.
NAMED_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "lru_num_blocks": 1, "lru_dropout": 0.6, "lru_attn_dropout": 0.6, "lru_r_min": 0.0, "lru_r_max": 0.1,
        "mrl_loss": "mean", "validate_untrained": True,
    },
    "plus": {
        "whiten_features": True, "item_embedding": 256, "post_norm": True, "dropout_from": 64, "logit_scale": True,
        "distill": 0.9, "ema_decay": 0.998, "num_negatives": 4096, "lru_r_min": 0.8, "lru_r_max": 0.99,
        "lru_dropout": 0.5, "lru_attn_dropout": 0.5, "val_mask_history": True, "train_batch_size": 128,
        "num_epochs": 7, "lr": 1e-3, "mrl_loss": "mean", "warmup_from_zero": False,
    },
}  # fmt: skip

ALL_PRESETS = {**PRESETS, **MODEL_PRESETS, **NAMED_PRESETS}  # for --help


def resolve(flags: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    """Return the settings, and where each came from: "flag", "preset" or "default".

    Raises InputError that names the first value that is not accepted.
    """
    of_dataset = PRESETS.get(flags.get("dataset_code", Config.dataset_code), {})
    of_model = MODEL_PRESETS.get(flags.get("model_code", Config.model_code), {})
    preset = of_dataset | of_model | NAMED_PRESETS.get(flags.get("preset", Config.preset), {})
    names = [f.name for f in fields(Config)]
    sources = {name: "flag" if name in flags else "preset" if name in preset else "default" for name in names}
    return Config(**{**preset, **flags}), sources
