"""Every setting of a run, in one place.

Edit a default below, or give a flag of the same name on the command line. What wins:

    a flag that the user gives  >  the preset that --preset names (NAMED_PRESETS)  >  the model's (MODEL_PRESETS)  >
    the dataset's (PRESETS)  >  the default

The command line is generated from the dataclass: a new field is a new flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

METRICS = ("Recall", "NDCG", "MRR")

# What the paper chose per dataset (section 4.3 and its appendix); Beauty's dropouts are those of its README. The demo's
# catalogue is small, so it trains a smaller model for a few epochs.
PRESETS: dict[str, dict[str, Any]] = {
    "beauty": {"lru_dropout": 0.6, "lru_attn_dropout": 0.6, "lru_r_min": 0.0, "lru_r_max": 0.1},
    "clothing": {"lru_r_min": 0.1, "lru_r_max": 0.2},
    "sports": {"lru_r_min": 0.1, "lru_r_max": 0.2},
    "toys": {"lru_r_min": 0.0, "lru_r_max": 0.1},
    "demo": {
        "language_encoder": "lexical",
        "img_encoder": "pixel",
        "mrl_hidden_sizes": (8, 16, 32, 64, 128, 256),
        "lr": 1e-3,
        "num_epochs": 12,
        "lru_dropout": 0.3,
        "lru_attn_dropout": 0.3,
    },
}

COUNTING = ("popularity", "itemknn")  # models that are not trained
# What fmrlrec alone has, beyond the paper.
BEYOND = ("whiten_features", "item_embedding", "post_norm", "dropout_from", "logit_scale", "distill", "ema_decay")
_IDS_ALONE = {"use_language_encoder": False, "use_img_encoder": False}
_SEQUENTIAL = {**_IDS_ALONE, "mrl_hidden_sizes": (64,), "train_batch_size": 128, "num_epochs": 30, "lr": 1e-3}

# What a baseline needs, on every dataset (model/baselines/). Learning rate and dropout were not searched for: with them
# LRURec's 30 epochs have a test NDCG@10 of .0427 on Beauty, where Table 2 of the fMRLRec paper has .0438.
MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "sasrec": {**_SEQUENTIAL, "lru_dropout": 0.5, "lru_attn_dropout": 0.5},
    "lrurec": {**_SEQUENTIAL, "lru_dropout": 0.5, "lru_attn_dropout": 0.5, "lru_r_min": 0.8, "lru_r_max": 0.99},
    **{name: {**_IDS_ALONE, "mrl_hidden_sizes": (1,), "num_epochs": 1} for name in COUNTING},
}

# What --preset names, on every dataset. "paper" leaves all as it is; "plus" makes all sizes better, small ones most.
# It was chosen by validation on Beauty and Sports, from text alone.
NAMED_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "plus": {
        "whiten_features": True,
        "item_embedding": 256,
        "post_norm": True,
        "lru_dropout": 0.5,
        "lru_attn_dropout": 0.5,
        "dropout_from": 64,
        "lru_r_min": 0.8,
        "lru_r_max": 0.99,
        "logit_scale": True,
        "distill": 0.9,
        "ema_decay": 0.998,
        "val_mask_history": True,
        "num_negatives": 4096,
        "train_batch_size": 128,
        "num_epochs": 7,
        "lr": 1e-3,
    },
}


def shown(value: Any) -> str:
    """A setting's value as it is given on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class InputError(Exception):
    """Something the user gave cannot be used. The message names it, what is accepted and what mends it."""


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), runtime: bool = False) -> Any:
    """A field of Config. `runtime` settings say how to run, not what is trained: --resume may change them."""
    return field(default=default, metadata={"help": help, "choices": choices, "runtime": runtime})


@dataclass(frozen=True)
class Config:
    # --- data
    dataset_code: str = setting(
        "demo", "demo, beauty, clothing, sports, toys, or the name of any prepared folder below data_root"
    )
    data_root: str = setting(
        "data",
        "folder that holds <dataset_code>/ and photos/<dataset_code>/; training only reads it (the demo is in data/)",
        runtime=True,
    )

    # --- features
    use_language_encoder: bool = setting(True, "describe items by their text")
    language_encoder: str = setting(
        "BAAI/bge-large-en-v1.5",
        "a Hugging Face text encoder by name (NAME or NAME@REVISION) or local folder, or 'lexical' "
        "(hashed word and character n-grams, no download)",
    )
    item_attributes: tuple[str, ...] = setting(
        ("title", "price", "brand", "categories"), "metadata keys that make an item's text, in this order"
    )
    use_img_encoder: bool = setting(True, "describe items by their picture")
    img_encoder: str = setting(
        "ViT-L-16-SigLIP-256/webli",
        "an open_clip model as MODEL/PRETRAINED or MODEL/path-to-weights, or 'pixel' (colour and shape statistics, "
        "no download)",
    )
    encoder_precision: str = setting(
        "auto",
        "what an encoder computes in: fp32, bf16, or auto: as the cached features that are there already, otherwise "
        "bf16 (fp16 on a GPU without it), and fp32 on a CPU without it",
        choices=("auto", "fp32", "bf16"),
    )
    encoder_batch_size: int = setting(32, "texts or pictures an encoder reads at once", runtime=True)
    encoder_workers: int = setting(
        4,
        "processes at most that read ahead of an encoder on a GPU, or share in lexical and pixel; 0: none",
        runtime=True,
    )

    # --- model
    model_code: str = setting(
        "fmrlrec",
        "the recommender: fmrlrec, or a baseline that knows items by their ids alone: sasrec and lrurec are trained, "
        "popularity and itemknn (by the last item) only count",
        choices=("fmrlrec", *MODEL_PRESETS),
    )
    mrl_hidden_sizes: tuple[int, ...] = setting(
        (8, 16, 32, 64, 128, 256, 512, 1024), "nested model sizes, increasing; the last one is D; one for a baseline"
    )
    lru_max_len: int = setting(50, "how many of a history's last items are read")
    lru_num_blocks: int = setting(2, "blocks of LRU (sasrec: attention) and feed-forward network")
    lru_dropout: float = setting(
        0.5, "dropout in and after the feed-forward network (sasrec and lrurec: of the embeddings, too)"
    )
    lru_attn_dropout: float = setting(0.5, "dropout after the LRU (sasrec: after the attention)")
    num_heads: int = setting(1, "heads of sasrec's attention; they share D out")
    lru_use_bias: bool = setting(True, "biases of the LRU's input and output projections B and C")
    lru_r_min: float = setting(0.0, "smallest radius |λ| of the ring that the LRU starts on")
    lru_r_max: float = setting(0.1, "largest radius |λ| of the ring that the LRU starts on")

    # --- training
    seed: int = setting(42, "seed of initialisation, dropout and the order of users")
    train_batch_size: int = setting(32, "users in a training step, of all processes together")
    num_epochs: int = setting(500, "epochs at most; the cosine schedule ends there")
    precision: str = setting(
        "fp32",
        "of the matrix products in training: fp32, tf32 (as fp32 where a device has none), or bf16; weights, softmax, "
        "recurrence and evaluation are in float32",
        choices=("fp32", "tf32", "bf16"),
    )
    optimizer: str = setting("adamw", "adamw, or adam (weight decay added to the gradient)", choices=("adamw", "adam"))
    lr: float = setting(1e-4, "peak learning rate")
    weight_decay: float = setting(1e-2, "weight decay; biases are never decayed")
    adam_epsilon: float = setting(1e-9, "the ε of Adam and AdamW")
    max_grad_norm: float = setting(5.0, "clip the gradient's norm at this; 0 does not clip")
    enable_lr_schedule: bool = setting(True, "linear warm-up, then cosine to 0 at num_epochs; otherwise constant")
    warmup_steps: int = setting(100, "steps of the warm-up")
    mrl_loss: str = setting(
        "mean",
        "the cross-entropies of the sizes are averaged (released code) or summed (paper)",
        choices=("mean", "sum"),
    )
    first_item_label: bool = setting(
        True, "a user's first item is predicted too, from token 0, where the training items fit into lru_max_len"
    )
    num_negatives: int = setting(
        0,
        "items drawn in a step to stand for the catalogue in the softmax (sampled softmax); 0, or no fewer than there "
        "are: all items, exactly",
    )
    early_stopping: bool = setting(True, "stop when best_metric has not improved for early_stopping_patience epochs")
    early_stopping_patience: int = setting(10, "epochs without improvement before stopping")

    # --- plus: beyond the paper, all off by default
    preset: str = setting(
        "paper",
        "paper: nothing beyond it; plus: settings that make all sizes better, the small ones most, listed below",
        choices=tuple(NAMED_PRESETS),
    )
    whiten_features: bool = setting(
        False, "scale all principal directions of each encoder's features to the same variance"
    )
    item_embedding: int = setting(
        0,
        "how many of the first dimensions have a learned embedding added to every item's projection, from zero on: the "
        "sizes of mrl_hidden_sizes up to this, but at least one of them; 0: none",
    )
    post_norm: bool = setting(
        False,
        "a LayerNorm after every LRU and feed-forward network, in place of one before them, and of what is read, which "
        "lru_dropout then falls on, too, as in LRURec",
    )
    dropout_from: int = setting(0, "how many of the first dimensions, those of the small sizes, no dropout falls on")
    logit_scale: bool = setting(False, "learn for every size how sharp its logits are")
    distill: float = setting(
        0.0, "share of every smaller size's target that is the largest size's softmax in place of the label; 0: none"
    )
    ema_decay: float = setting(
        0.0,
        "validate, test and keep an exponential moving average of the weights, over about 1/(1 - x) steps; 0: the "
        "weights themselves",
    )

    # --- evaluation
    val_batch_size: int = setting(256, "users ranked at once in validation; does not change results", runtime=True)
    test_batch_size: int = setting(256, "users ranked at once in the test; does not change results", runtime=True)
    metric_ks: tuple[int, ...] = setting((5, 10, 20, 50), "cut-offs K of Recall@K, NDCG@K and MRR@K", runtime=True)
    val_mask_history: bool = setting(
        False, "validate without the items of a user's history among the candidates, as eval.py --mask_history tests"
    )
    best_metric: str = setting("NDCG@10", "validation metric of the largest size that picks the best epoch")
    test: bool = setting(
        True,
        "test every size after the training; without it the test set stays unread, to choose settings",
        runtime=True,
    )

    # --- run
    device: str = setting(
        "auto",
        "where to compute; auto takes a GPU where there is one, and under torchrun each process its own",
        choices=("auto", "cpu", "cuda"),
        runtime=True,
    )
    runs_root: str = setting(
        "experiments/runs", "run folders are made at <runs_root>/<dataset_code>/<time>-<run_name>", runtime=True
    )
    run_name: str = setting(
        "", "name of the run's folder after its time; empty: branch or baseline and size, such as both-1024"
    )
    use_wandb: bool = setting(
        False, "log to Weights & Biases too (offline where no key is set; see WANDB_MODE)", runtime=True
    )

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise InputError(problem)

    @property
    def label(self) -> str:
        """What a run is called by: the branch, or which baseline it is."""
        return self.branch if self.model_code == "fmrlrec" else self.model_code

    @property
    def title(self) -> str:
        """What a run is called by, in words."""
        if self.model_code != "fmrlrec":
            return self.model_code
        words = {"both": "text and pictures", "language": "text", "image": "pictures", "id": "a learned table"}
        return f"items by {words[self.branch]}"

    @property
    def embedded(self) -> int:
        """How many of the first dimensions have an item embedding."""
        return size_within(self.mrl_hidden_sizes, self.item_embedding)

    @property
    def branch(self) -> str:
        """What items are described by: language, image, both, or id (a learned item table)."""
        return {(True, True): "both", (True, False): "language", (False, True): "image", (False, False): "id"}[
            self.use_language_encoder, self.use_img_encoder
        ]


GROUPS = {
    "data": "dataset_code",
    "features": "use_language_encoder",
    "model": "model_code",
    "training": "seed",
    "beyond the paper": "preset",
    "evaluation": "val_batch_size",
    "run": "device",
}  # group -> its first field


def size_within(sizes: tuple[int, ...], width: int) -> int:
    """The largest size within `width`, or the smallest where none is; width 0: 0."""
    return max((m for m in sizes if m <= width), default=sizes[0]) if width else 0


def _problems(c: Config) -> Iterator[str]:
    """Yield a sentence for every setting whose value cannot be used."""
    if not c.dataset_code or c.dataset_code in (".", "..") or any(s in c.dataset_code for s in "/\\\0"):
        yield f"--dataset_code {c.dataset_code!r} is not a folder name; give a name such as beauty"
    if any(s in c.run_name for s in "/\\\0"):
        yield f"--run_name {c.run_name!r} is not a folder name; leave out / and \\"
    for name in ("lru_max_len", "lru_num_blocks", "num_heads", "train_batch_size", "val_batch_size", "test_batch_size",
                 "num_epochs", "early_stopping_patience", "encoder_batch_size"):  # fmt: skip
        if getattr(c, name) < 1:
            yield f"--{name} {getattr(c, name)} must be at least 1"
    for name in ("weight_decay", "max_grad_norm", "warmup_steps", "seed", "num_negatives", "encoder_workers",
                 "item_embedding", "dropout_from"):  # fmt: skip
        if not 0 <= getattr(c, name) < float("inf"):
            yield f"--{name} {getattr(c, name)} must be a finite number of at least 0"
    if c.seed >= 2**64:
        yield f"--seed {c.seed} must be below 2**64"
    for name in ("lr", "adam_epsilon"):
        if not 0 < getattr(c, name) < float("inf"):
            yield f"--{name} {getattr(c, name)} must be a finite number above 0"
    for name in ("lru_dropout", "lru_attn_dropout", "ema_decay"):
        if not 0 <= getattr(c, name) < 1:
            yield f"--{name} {getattr(c, name)} must be at least 0 and below 1"
    if not 0 <= c.distill <= 1:
        yield f"--distill {c.distill} must lie between 0 and 1"
    if not 0 <= c.lru_r_min < c.lru_r_max <= 1:
        yield f"--lru_r_min {c.lru_r_min} --lru_r_max {c.lru_r_max}: need 0 <= r_min < r_max <= 1"
    for name in ("mrl_hidden_sizes", "metric_ks"):
        values = getattr(c, name)
        if not values or values[0] < 1 or any(a >= b for a, b in itertools.pairwise(values)):
            yield f'--{name} "{shown(values)}": need whole numbers from 1 on, each larger than the last: "8,16,32"'
    if c.model_code in MODEL_PRESETS:
        for name in _IDS_ALONE:
            if getattr(c, name):
                yield f"--{name}: {c.model_code} knows items by their ids alone; encoders are for --model_code fmrlrec"
        if c.preset == "plus":
            yield f"--preset plus is for --model_code fmrlrec, not for {c.model_code}"
        for name in BEYOND:
            if getattr(c, name) != getattr(Config, name):
                yield f"--{name} {getattr(c, name)}: only --model_code fmrlrec has it, not {c.model_code}"
        sizes = shown(c.mrl_hidden_sizes)
        if len(c.mrl_hidden_sizes) > 1:
            yield f'--mrl_hidden_sizes "{sizes}": {c.model_code} has one size; only --model_code fmrlrec is nested'
        elif c.model_code in COUNTING and sizes != "1":
            yield f"--mrl_hidden_sizes {sizes}: {c.model_code} has one number an item; leave the flag out"
        if c.model_code == "sasrec" and c.mrl_hidden_sizes[-1] % c.num_heads:
            yield f"--num_heads {c.num_heads} does not divide --mrl_hidden_sizes {sizes}"
    for name, off in (("whiten_features", "--no-whiten_features"), ("item_embedding", "--item_embedding 0")):
        if c.branch == "id" and getattr(c, name):
            yield f"--{name}: without an encoder the item table is learned outright; leave it out ({off})"
    if not c.item_attributes and c.use_language_encoder:
        yield "--item_attributes is empty; name at least one metadata key, such as title"
    metric, _, k = c.best_metric.partition("@")
    if metric not in METRICS or not k.isascii() or not k.isdigit() or k.startswith("0"):
        yield f"--best_metric {c.best_metric!r} must be one of {', '.join(METRICS)} at a cut-off, such as NDCG@10"
    for f in dataclasses.fields(c):
        if f.metadata["choices"] and getattr(c, f.name) not in f.metadata["choices"]:
            yield f"--{f.name} {getattr(c, f.name)!r} must be one of {', '.join(f.metadata['choices'])}"


# --------------------------------------------------------------------------------------------------- command line


def parse_args(
    argv: Sequence[str] | None,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    settings: Sequence[str] = (),
) -> tuple[dict[str, Any], argparse.Namespace]:
    """Read the command line. Returns the settings that were given as flags, and the values of the script's own
    arguments, which `add_arguments` adds to the parser. `settings`: the only ones that are flags; empty: all are.
    Exits with 2 on a bad flag."""
    parser = Parser(
        usage="%(prog)s [--setting value ...]",
        description=description,
        epilog=_epilog(presets=not settings or "preset" in settings),
        formatter_class=_HelpFormatter,
    )
    if add_arguments:
        add_arguments(parser)
    group: argparse.ArgumentParser | argparse._ArgumentGroup = parser
    for f in dataclasses.fields(Config):
        for title, first in GROUPS.items():
            if f.name == first:
                group = parser.add_argument_group(title)
        if not settings or f.name in settings:
            _add_flag(group, f)
    namespace = parser.parse_args(argv)
    flags = {f.name: vars(namespace).pop(f.name) for f in dataclasses.fields(Config) if f.name in namespace}
    return flags, namespace


def resolve(flags: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    """Settings from flags, the presets (named, of model and dataset), and the defaults, and where each came from:
    "flag", "preset" or "default". Raises InputError that names the first value that cannot be used."""
    of_dataset = PRESETS.get(flags.get("dataset_code", Config.dataset_code), {})
    of_model = MODEL_PRESETS.get(flags.get("model_code", Config.model_code), {})
    preset = of_dataset | of_model | NAMED_PRESETS.get(flags.get("preset", Config.preset), {})
    sources = {
        f.name: "flag" if f.name in flags else "preset" if f.name in preset else "default"
        for f in dataclasses.fields(Config)
    }
    return Config(**{**preset, **flags}), sources


def preset_spelled_out(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags with what --preset stands for in its place; "paper" stands for nothing beyond it."""
    if "preset" not in flags:
        return flags
    named = NAMED_PRESETS[flags["preset"]] or {name: getattr(Config, name) for name in BEYOND}
    return named | {name: value for name, value in flags.items() if name != "preset"}


def unread(c: Config) -> set[str]:
    """The settings that decide nothing of what is trained, as the others are."""
    if c.model_code in COUNTING:
        read = {"dataset_code", "model_code", "run_name", "best_metric", "val_mask_history"}
        return {f.name for f in dataclasses.fields(c) if not is_runtime(f.name)} - read
    names = {
        "language_encoder": c.use_language_encoder,
        "item_attributes": c.use_language_encoder,
        "img_encoder": c.use_img_encoder,
        "encoder_precision": c.use_language_encoder or c.use_img_encoder,
        "early_stopping_patience": c.early_stopping,
        "warmup_steps": c.enable_lr_schedule,
        "num_heads": c.model_code == "sasrec",
        "lru_use_bias": c.model_code != "sasrec",
        "lru_r_min": c.model_code != "sasrec",
        "lru_r_max": c.model_code != "sasrec",
    }
    return {name for name, is_read in names.items() if not is_read}


def from_saved(values: dict[str, Any]) -> Config:
    """Settings as a run's config.json holds them. Options that are gone are passed over where they were off."""
    off = {"small_dropout": 1.0, "item_embedding_width": 0, "item_embedding_dropout": 0.0, "input_dropout": 0.0,
           "size_weights": "uniform"}  # fmt: skip
    values = {name: value for name, value in values.items() if name not in off or value != off[name]}
    if values.get("item_embedding") is False:
        values["item_embedding"] = 0
    return Config(**typed(values, "config.json"))


def typed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings as a file holds them, lists as tuples. Raises InputError that names `where` and what in it is none."""
    unknown = set(values) - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise InputError(f"{where} has unknown settings {sorted(unknown)}: it was made by another version")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in settings.items():
        default = getattr(Config, name)
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if not fits or (isinstance(value, tuple) and any(type(part) is not type(default[0]) for part in value)):
            raise InputError(f"{where} has {name} {value!r}, which is no {type(default).__name__}")
    return settings


def is_runtime(name: str) -> bool:
    """Whether a setting says how to run, not what is trained."""
    return Config.__dataclass_fields__[name].metadata["runtime"]


def run_cli(main: Callable[[], Any]) -> None:
    """Run a script's main: an InputError is printed as one line (exit status 2), Ctrl-C ends with 130. Of the processes
    of torchrun the first says it."""
    if of_module := sys.modules["__main__"].__spec__:  # the usage of python -m, as Python 3.14 says it by itself
        sys.argv[0] = f"python -m {of_module.name}"
    try:
        main()
    except InputError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _fail(message: str, status: int) -> int:
    first = int(os.environ.get("WORLD_SIZE", 1)) == 1 or int(os.environ.get("RANK", 0)) == 0
    if not first and status != 130:
        time.sleep(10)  # the first most likely fails alike and says the same; torchrun then ends this process here
    if first or status != 130:
        print(message, file=sys.stderr)
    return status


def _add_flag(group: Any, f: dataclasses.Field) -> None:
    default, flag = f.default, f"--{f.name}"
    help = f"{f.metadata['help']} (default: {shown(default) or 'empty'})".replace("%", "%%")
    common = {"dest": f.name, "default": argparse.SUPPRESS}
    if isinstance(default, bool):
        _add_boolean(group, f.name, help, argparse.SUPPRESS)
    elif isinstance(default, tuple):
        of = type(default[0])
        metavar = "N,N,..." if of is int else "NAME,NAME,..."
        group.add_argument(flag, type=_tuple_of(of), metavar=metavar, help=help, **common)
    else:
        metavar = {int: "N", float: "X", str: "NAME"}[type(default)]
        options = {"choices": f.metadata["choices"]} if f.metadata["choices"] else {"metavar": metavar}
        group.add_argument(flag, type=type(default), help=help, **options, **common)


def add_switch(group: Any, name: str, help: str) -> None:
    """Add a flag of a script's own that is false unless it is given, spelled as those of settings are."""
    _add_boolean(group, name, help, False)


def _add_boolean(group: Any, name: str, help: str, default: Any) -> None:
    common = {"dest": name, "default": default}
    group.add_argument(f"--{name}", nargs="?", const=True, type=_boolean, metavar="BOOL", help=help, **common)
    group.add_argument(f"--no-{name}", f"--no_{name}", action="store_false", help=argparse.SUPPRESS, **common)


def _epilog(presets: bool) -> str:
    lines = ["A setting that is true or false is set by --NAME, --no-NAME or --NAME=false."]
    if not presets:
        return lines[0]
    lines += [
        "",
        "A flag wins over --preset, that over the model's preset, that over the dataset's, and a preset over the",
    ]
    lines += ["default. Presets:"]
    for name, preset in {**PRESETS, **MODEL_PRESETS, "plus": NAMED_PRESETS["plus"]}.items():
        values = ", ".join(f"{setting} {shown(v)}" for setting, v in preset.items())
        lines += textwrap.wrap(f"{name}: {values}", 108, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _tuple_of(of: type) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            return tuple(of(part) for part in parts)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not a list of whole numbers such as "8,16,32"') from None

    return parse


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and names the nearest known flag when one is unknown."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | how)

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            flags = list(self._option_string_actions)
            near = [flag for flag in flags if word.startswith(f"{flag}_")]  # --lr_rate
            near = near or difflib.get_close_matches(word, flags, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else "--help lists them all"
            self.error(f"unknown flag {word}; {hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{self.format_usage()}{self.prog}: error: {message}", 2))
