"""A trained run, back in memory."""

from pathlib import Path
from typing import Any

import torch

from common import processes
from common.devices import resolve_device
from config import Config
from datasets.catalog import Catalog
from datasets.features.load import load_features
from datasets.load import load_dataset
from model import FMRLRec
from model.extensions.whitening import Whitening
from model.registry import build_model
from trainer.checkpoint import load_weights
from trainer.evaluation import Model
from trainer.find_run import with_runtime_flags
from trainer.run_items import RunItems, known_ids, read_items, read_table
from trainer.runs import ITEMS, WEIGHTS, check_data, features_of, read_config
from trainer.warm_start import load_moved


def load_run(
    run: str | Path, flags: dict[str, Any] | None = None, newer_data: bool = False
) -> tuple[Config, Catalog, Model]:
    """Return a run's settings, its catalogue, and its model with the weights of the best epoch.

    flags: runtime settings (device, batch sizes, data_root, ...) to use instead of the run's. newer_data: accept
    another dataset than the one of the training; unknown items begin from their content. Raises InputError if the
    folder is no run, if a flag contradicts it, and if the dataset is another one without `newer_data`.
    """
    run = Path(run)
    saved, _ = processes.on_main_process(lambda: read_config(run))
    config = with_runtime_flags(saved, flags or {}, run)
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
