"""A trained run, back in memory."""

from pathlib import Path
from typing import Any

from common import processes
from common.devices import resolve_device
from config import Config
from datasets.catalog import Catalog
from datasets.features.load import load_features
from datasets.load import load_dataset
from model.registry import build_model
from trainer.checkpoint import load_weights
from trainer.evaluation import Model
from trainer.find_run import with_runtime_flags
from trainer.runs import WEIGHTS, check_data, features_of, read_config


def load_run(run: str | Path, flags: dict[str, Any] | None = None) -> tuple[Config, Catalog, Model]:
    """Return a run's settings, its catalogue, and its model with the weights of the best epoch.

    flags: runtime settings (device, batch sizes, data_root, ...) to use instead of the run's. Raises InputError if the
    folder is no run, if a flag contradicts it, and if the dataset is not the one that it was trained on.
    """
    run = Path(run)
    saved, _ = read_config(run)
    config = with_runtime_flags(saved, flags or {}, run)
    device = resolve_device(config.device)
    catalog = load_dataset(config)
    processes.on_main_process(lambda: check_data(run, catalog.digest()))
    trained_on = processes.on_main_process(lambda: features_of(run))
    features = load_features(config, catalog, device, trained_on)
    model = build_model(catalog.num_items, features, config, fit=False).to(device)
    load_weights(model, run / WEIGHTS)
    return config, catalog, model.eval()
