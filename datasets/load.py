"""Load the dataset that the settings name: a prepared one or the demo."""

from pathlib import Path

from common import processes
from config import Config, DataSettings
from datasets.catalog import Catalog, describe, load_catalog
from datasets.demo import load_demo


def load_dataset(settings: DataSettings) -> Catalog:
    """Load a dataset and print a summary; generate the demo if it does not exist.

    Raises InputError that names the file, the line and the fix.
    """
    default_root = Path(settings.data_root).resolve() == Path(Config.data_root).resolve()
    if settings.dataset_code == "demo" and default_root:
        catalog = load_demo()
    else:
        catalog = load_catalog(settings.data_root, settings.dataset_code)
    for line in (describe(catalog), *catalog.notes):
        processes.print_main(line)
    return catalog
