"""Load a run, continue it, start a training from its weights, or learn from it as a teacher."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from common import processes
from common.devices import resolve_device
from common.errors import InputError
from common.settings import format_value, is_runtime
from config import COUNTING, Config, FeatureSettings, ModelSettings
from datasets.catalog import Catalog, load_dataset
from datasets.features.load import load_features
from model import FMRLRec, build_model
from model.base import CountingModel, SequenceModel
from model.extensions.item_table import Whitening
from model.extensions.objective import Teachers
from trainer.checkpoint import RunItems, known_ids, load_weights, move_rows, read_items, read_table
from trainer.evaluation import Model
from trainer.runs import (
    ITEMS,
    STATE,
    WEIGHTS,
    check_data,
    describe_run,
    expand_preset,
    features_of,
    find_run,
    identity,
    ineffective_settings,
    no_weights,
    read_config,
    read_environment,
    read_log,
    unfinished,
    with_runtime_flags,
)
from trainer.training_run import TrainingRun


def load_run(
    run: str | Path, flags: dict[str, Any] | None = None, newer_data: bool = False
) -> tuple[Config, Catalog, Model]:
    """Return a run's settings, its catalogue, and its model with the weights of the best epoch.

    flags: runtime settings (device, batch sizes, data_root, ...) to use instead of the run's. newer_data: accept
    another dataset than the one of the training; unknown items begin from their content. Raises InputError if the
    folder is no run, if a flag contradicts it, if the dataset is another one without `newer_data`, and with it for a
    model that only counts.
    """
    run = Path(run)
    saved, _ = processes.on_main_process(lambda: read_config(run))
    config = with_runtime_flags(saved, flags or {}, run)
    if newer_data and config.model_code in COUNTING:
        raise InputError(f"{run} is a run of {config.model_code}, which only counts; train it anew on the changed data")
    device = resolve_device(config.device)
    catalog = load_dataset(config)
    if not newer_data:
        processes.on_main_process(lambda: check_data(run, catalog.digest()))
    trained_on = [] if newer_data else processes.on_main_process(lambda: features_of(run))
    features = load_features(config, catalog, device, trained_on)
    if newer_data:
        torch.manual_seed(config.seed)  # of new items' rows in a learned table
    model = build_model(catalog.num_items, [torch.from_numpy(part) for part in features], config, fit=False).to(device)
    known = processes.on_main_process(lambda: known_ids(run, catalog)) if newer_data else catalog.asins
    load_moved(model, run, catalog.asins, known)
    return config, catalog, model.eval()


def load_for_export(run: str | Path, flags: dict[str, Any] | None = None) -> tuple[Config, RunItems, Model]:
    """Return what `load_run` does, with the items' ids and titles, from the run's folder alone if it has them.

    The model then has the item table of the training in place of features, and can be sliced, but reads no features.
    """
    run = Path(run)
    saved, _ = read_config(run)
    items = read_items(run) if (run / ITEMS).exists() else None
    kept = read_table(run, items) if items else None
    if items is None or saved.model_code != "fmrlrec" or (kept is None and saved.branch != "id"):
        config, catalog, model = load_run(run, flags)
        return config, RunItems.of(catalog), model
    table, widths = kept or (None, [])
    no_features = [torch.zeros(1, width).expand(items.num_items, width) for width in widths]
    config = with_runtime_flags(saved, flags or {}, run)
    model = FMRLRec(items.num_items, no_features or None, config)
    if config.whiten_features:
        model.items.whitening = Whitening(no_features, fit=False)
    load_weights(model, run / WEIGHTS)
    model.items.kept = table
    return config, items, model.eval()


# --------------------------------------------------------------------------------------------------------------- resume


def find_resumed(resume: str, flags: dict[str, Any]) -> TrainingRun:
    """Return the run that --resume names, with the given runtime flags.

    resume: a folder, or "latest" for the newest unfinished run that matches the flags. Raises InputError if no run
    matches or it cannot be continued.
    """

    def find() -> tuple[Path, Config, dict[str, str]]:
        folder = Path(resume)
        if resume == "latest":
            runs_root = Path(flags.get("runs_root", Config.runs_root))
            folder = find_run(runs_root, flags, lambda run: "" if unfinished(run) else "is finished")
        saved, sources = read_config(folder)
        log = read_log(folder)
        trained = saved.model_code not in COUNTING and log and log[-1]["epoch"] > 1  # the first may be half written
        if trained and not (folder / STATE).exists():
            raise InputError(f"{folder} has no {STATE} to continue from, only results; train another run")
        sources |= {name: "flag" for name in flags if is_runtime(Config, name)}
        return folder, with_runtime_flags(saved, flags, folder), sources

    folder, config, sources = processes.on_main_process(find)
    if processes.rank() == 0:
        print(describe_run(folder), flush=True)
    return TrainingRun(with_runtime_flags(config, flags, folder), sources, folder)  # each machine's own folders


# ----------------------------------------------------------------------------------------------------------- warm start
# Start a training from the weights of another run: on newer data, or for more epochs (train.py --init_from).

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
    config = Config(**{**vars(saved), "teachers": (), **flags, **given})  # teachers know the items of their own data
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
        check_origin(run, read_environment(run).get("init_from"), origin, "--init_from")
        return known_ids(origin, catalog)

    load_moved(model, origin, catalog.asins, processes.on_main_process(read))


def load_moved(model: SequenceModel | CountingModel, run: Path, ids: Sequence[str], known: Sequence[str]) -> None:
    """Load a run's best weights, trained on the items `known`, into a model of the items `ids`."""
    load_weights(model, run / WEIGHTS, lambda weights: move_rows(weights, model, list(known), list(ids)))


def check_origin(run: Path, recorded: dict[str, str] | None, origin: Path, flag: str) -> None:
    """Raise InputError if the run `origin` has other weights now than when `run` was made of it."""
    if (recorded or {}).get("weights") != identity(origin)["weights"]:
        raise InputError(f"{origin / WEIGHTS} changed since {run} was made of it; start another run with {flag}")


# ------------------------------------------------------------------------------------------------------------- teachers
# Trained runs that a training learns from (train.py --teachers).


def load_teachers(config: Config, catalog: Catalog, device: torch.device, resumed: Path | None) -> Teachers | None:
    """Return the models of --teachers with their best weights; None if there are none.

    Every machine needs their folders. resumed: the run that continues. Raises InputError for a run of another dataset,
    one that only counts, and one whose weights changed since the resumed run began.
    """
    runs = [Path(run) for run in config.teachers]

    def check() -> None:
        recorded = read_environment(resumed).get("teachers", []) if resumed and runs else []
        for run, known in zip(runs, recorded, strict=False):
            check_origin(resumed or run, known, run, "--teachers")

    processes.on_main_process(check)
    models, adjustments = [], []
    for run in runs:
        trained, items, model = load_for_export(run, {"data_root": config.data_root, "device": config.device})
        if isinstance(model, CountingModel):
            raise InputError(f"--teachers {run} is a run of {type(model).__name__}, which only counts; leave it out")
        if trained.model_code == "sasrec" and trained.lru_max_len < config.lru_max_len:
            raise InputError(
                f"--teachers {run} reads at most {trained.lru_max_len} items; give --lru_max_len {trained.lru_max_len}"
            )
        if items.data != catalog.digest():
            raise InputError(
                f"--teachers {run} was trained on another dataset (digest {items.data[:12]}) than "
                f"{config.dataset_code} in {config.data_root} ({catalog.digest()[:12]}); give runs of this one"
            )
        models.append(model.to(device))
        adjustments.append(trained.logit_adjustment)
    return Teachers(models, adjustments) if models else None
