"""Load the dataset that the settings name: a prepared one or the demo."""

from collections.abc import Callable
from pathlib import Path

from common import processes
from config import Config, DataSettings
from datasets.catalog import Catalog, describe, load_catalog, require_dataset
from datasets.demo import load_demo


def check_dataset(settings: DataSettings) -> None:
    """Raise InputError if the dataset is not there. In one process this takes no heavy imports; loading comes later."""
    if not _is_demo(settings):
        processes.together(lambda: require_dataset(Path(settings.data_root), settings.dataset_code))


def load_dataset(settings: DataSettings) -> Catalog:
    """Load a dataset and print a summary; generate the demo if it does not exist.

    Every machine reads its own files. Raises InputError that names the file, the line and the fix, or a machine whose
    dataset is another one.
    """
    root, code = settings.data_root, settings.dataset_code
    catalog = load_alike(load_demo if _is_demo(settings) else lambda: load_catalog(root, code))
    for line in (describe(catalog), *catalog.notes):
        processes.print_main(line)
    return catalog


def load_alike(load: Callable[[], Catalog]) -> Catalog:
    """Call `load` on every rank. Raises InputError that names a machine whose dataset is another one."""
    catalog = processes.together(load)
    processes.check_same(
        f"the dataset {catalog.name}", catalog.digest(), "copy the dataset of one machine to the other"
    )
    return catalog


def _is_demo(settings: DataSettings) -> bool:
    """Return whether the settings name the demo that is generated on first use."""
    default_root = Path(settings.data_root).resolve() == Path(Config.data_root).resolve()
    return settings.dataset_code == "demo" and default_root
