"""Read item2img.json, which maps items to pictures.

    <dataset_code>/item2img.json   item id or ASIN -> path below photos/<dataset_code>/
    <dataset_code>/pictures.json   manifest of datasets/prepare/pictures.py: the status of every item's picture

datasets/prepare/pictures.py writes item2img.json from the manifest; users with pictures of their own write it by hand.
"""

from collections.abc import Mapping
from pathlib import Path

from common.errors import InputError
from common.files import read_json

ITEM2IMG = "item2img.json"
MANIFEST = "pictures.json"


def read_item2img(
    folder: Path, photos: Path, asins: list[str], manifest: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, str] | None:
    """Return ASIN -> path below `photos`, or None without an item2img.json.

    asins: of items 1..N. manifest: entries that come from this manifest are left out.
    Raises InputError for an unknown item, and for a path outside `photos`.
    """
    path = folder / ITEM2IMG
    if not path.exists():
        return None
    hint = f"it maps an item id or ASIN to a path below {photos}"
    item2img = read_json(path, hint)
    if not all(isinstance(name, str) for name in item2img.values()):
        raise InputError(f"{path} must map strings to strings; {hint}")
    asin_of = {str(i): asin for i, asin in enumerate(asins, start=1)} | {asin: asin for asin in asins}
    inside, listed = photos.resolve(), {}
    for item, name in item2img.items():
        if manifest and manifest.get(item) == {"file": name}:
            continue
        if item not in asin_of:
            raise InputError(f"{path}: item {item!r} is not in datamaps.json; {hint}")
        if "\0" in name or not (photos / name).resolve().is_relative_to(inside):
            raise InputError(f"{path}: picture {name!r} of item {item!r} lies outside {photos}; {hint}")
        listed[asin_of[item]] = name
    return listed
