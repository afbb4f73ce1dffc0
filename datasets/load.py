"""The dataset that the settings name: a prepared one, or the built-in demo."""

from pathlib import Path

from common import processes
from config import Config, DataSettings
from datasets.catalog import Catalog, describe, load_catalog
from datasets.demo import load_demo


def load_dataset(settings: DataSettings) -> Catalog:
    """Load a dataset and print what it holds; the demo is generated if it is not there yet.

    Raises InputError that names the file, the line and what mends it.
    """
    in_usual_place = Path(settings.data_root).resolve() == Path(Config.data_root).resolve()
    if settings.dataset_code == "demo" and in_usual_place:
        catalog = load_demo()
    else:
        catalog = load_catalog(settings.data_root, settings.dataset_code)
    for line in (describe(catalog), *catalog.notes):
        processes.print_main(line)
    return catalog
