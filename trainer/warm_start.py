"""Start a training from the weights of another run: on newer data, or for more epochs (train.py --init_from)."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from common import processes
from common.errors import InputError
from common.files import sha256
from common.settings import format_value, is_runtime
from config import COUNTING, Config, FeatureSettings, ModelSettings
from datasets.catalog import Catalog
from model.base import CountingModel, SequenceModel
from trainer.checkpoint import load_weights
from trainer.find_run import expand_preset
from trainer.run_items import known_ids, move_rows
from trainer.runs import WEIGHTS, ineffective_settings, no_weights, read_config, read_environment

# Settings of the model and its features that fit any weights.
FREE = {"lru_dropout", "lru_attn_dropout", "embedding_dropout", "dropout_from", "lru_r_min", "lru_r_max"}
FREE |= {"lru_max_len", "item_attributes", "encoder_precision", "features", "item_embedding"}
ARCHITECTURE = [
    f.name
    for f in (*fields(ModelSettings), *fields(FeatureSettings))
    if f.name not in FREE and not is_runtime(Config, f.name)
]


def warm_settings(flags: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    """Return the settings of the run in --init_from with the given flags, and the source of each.

    Raises InputError that names a flag with which the run's weights do not fit the model.
    """
    return processes.on_main_process(lambda: _warm_settings(flags))


def _warm_settings(flags: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    run = Path(flags["init_from"])
    saved, _ = read_config(run)
    if saved.model_code in COUNTING:
        raise InputError(f"--init_from {run} is a run of {saved.model_code}, which only counts; leave --init_from out")
    if not (run / WEIGHTS).exists():
        raise no_weights(run / WEIGHTS)
    given = expand_preset(flags, flags.get("dataset_code", saved.dataset_code))
    config = Config(**{**vars(saved), **flags, **given})
    names = [*ARCHITECTURE, "embedded", "branch", *(["lru_max_len"] if config.model_code == "sasrec" else [])]
    for name in names:
        if getattr(config, name) != getattr(saved, name) and name not in ineffective_settings(config):
            flag = {"embedded": "item_embedding", "branch": "features"}.get(name, name)
            value = format_value(getattr(config, flag)) or "''"
            raise InputError(
                f"--{flag} {value} does not fit the weights of {run}, which has {flag} "
                f"{format_value(getattr(saved, flag)) or 'none'}; leave the flag out, or leave --init_from out"
            )
    sources = {name: "flag" if name in flags else "preset" if name in given else "default" for name in vars(config)}
    for name, value in vars(config).items():
        if sources[name] == "default" and value != getattr(Config, name):
            sources[name] = "init_from"
    return config, sources


def load_initial(model: SequenceModel | CountingModel, catalog: Catalog, origin: Path, run: Path) -> None:
    """Load the best weights of the run `origin` into a model of `catalog`, every known item's row by its id.

    run: the run that starts. Raises InputError if the origin has other weights now than when the run was made.
    """

    def read() -> list[str]:
        if read_environment(run).get("init_from", {}).get("weights") != sha256(origin / WEIGHTS):
            raise InputError(
                f"{origin / WEIGHTS} changed since {run} was made of it; start another run with --init_from"
            )
        return known_ids(origin, catalog)

    load_moved(model, origin, catalog.asins, processes.on_main_process(read))


def load_moved(model: SequenceModel | CountingModel, run: Path, ids: Sequence[str], known: Sequence[str]) -> None:
    """Load a run's best weights, trained on the items `known`, into a model of the items `ids`."""
    load_weights(model, run / WEIGHTS, lambda weights: move_rows(weights, model, list(known), list(ids)))
