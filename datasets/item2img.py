"""item2img.json: which picture an item has, as prepared by datasets/prepare/pictures.py or by other means.

    <dataset_code>/item2img.json   item id or ASIN -> path below photos/<dataset_code>/
    <dataset_code>/pictures.json   what datasets/prepare/pictures.py found out about every item, the manifest

The first is the user's where there are pictures from elsewhere; otherwise it is written from the second.
"""

from collections.abc import Mapping
from pathlib import Path

from common.errors import InputError
from common.files import read_json

ITEM2IMG = "item2img.json"
MANIFEST = "pictures.json"


def read_item2img(
    folder: Path, photos: Path, asins: list[str], written: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, str] | None:
    """ASIN -> path below `photos` of a dataset's folder; None where it has no item2img.json.

    asins: of items 1..N. written: a manifest, what comes from it is left out. Raises InputError for an item that is
    none of those and a path that leads out of `photos`.
    """
    path = folder / ITEM2IMG
    if not path.exists():
        return None
    hint = f"it maps an item id or ASIN to a path below {photos}"
    item2img = read_json(path, hint)
    if not all(isinstance(name, str) for name in item2img.values()):
        raise InputError(f"{path} is not a map of names; {hint}")
    asin_of = {str(i): asin for i, asin in enumerate(asins, start=1)} | {asin: asin for asin in asins}
    inside, listed = photos.resolve(), {}
    for item, name in item2img.items():
        if written and written.get(item) == {"file": name}:
            continue
        if item not in asin_of:
            raise InputError(f"{path}: item {item!r} is not in datamaps.json; {hint}")
        if "\0" in name or not (photos / name).resolve().is_relative_to(inside):
            raise InputError(f"{path}: picture {name!r} of item {item!r} lies outside {photos}; {hint}")
        listed[asin_of[item]] = name
    return listed
