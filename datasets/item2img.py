"""Read which picture an item has.

    <dataset_code>/item2img.json       item id or ASIN -> path below photos/<dataset_code>/
    <dataset_code>/pictures.json       manifest of datasets/prepare/pictures.py: the status of every item's picture
    <dataset_code>/item2img_dict.pkl   ASIN -> path on any machine, as VIP5 ships it; read if there is no item2img.json

datasets/prepare/pictures.py writes item2img.json from the manifest; users with pictures of their own write it by hand.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from common.errors import InputError
from common.files import read_json

ITEM2IMG = "item2img.json"
PICKLED = "item2img_dict.pkl"
MANIFEST = "pictures.json"
MAX_PATH = 3000  # characters of a path below the folder of pictures


def read_item2img(
    folder: Path,
    photos: Path,
    asins: list[str],
    manifest: Mapping[str, Mapping[str, str]] | None = None,
    notes: list[str] | None = None,
) -> dict[str, str] | None:
    """Return ASIN -> path below `photos`; None if the dataset's folder lists no pictures.

    asins: of items 1..N. manifest: its entries, and the pickled list, are left out. notes: gets a count of links that
    lead out of `photos`, which are left out. Raises InputError for an unknown item and for any other path out of it.
    """
    path, pickled = folder / ITEM2IMG, folder / PICKLED
    if not path.exists():
        if manifest is not None or not pickled.exists():
            return None
        from datasets.prepare.pictures import find_pictures

        found = find_pictures(asins, photos, pickled)
        return {asin: entry["file"] for asin, entry in found.items() if "file" in entry}
    hint = f"it maps an item id or ASIN to a path below {photos}"
    item2img = read_json(path, hint)
    if not all(isinstance(name, str) for name in item2img.values()):
        raise InputError(f"{path} must map strings to strings; {hint}")
    asin_of = {str(i): asin for i, asin in enumerate(asins, start=1)} | {asin: asin for asin in asins}
    inside, listed, links = photos.resolve(), {}, []
    for item, name in item2img.items():
        if manifest and manifest.get(item) == {"file": name}:
            continue
        if item not in asin_of:
            raise InputError(f"{path}: item {item!r} is not in datamaps.json; {hint}")
        parts = name.encode("utf-8", "surrogatepass").split(b"/")
        if len(name) > MAX_PATH or max(map(len, parts)) > 255:
            raise InputError(f"{path}: picture {name[:80]!r} of item {item!r} is too long for a file name; {hint}")
        place = Path(os.path.normpath(inside / name))
        try:
            target = (inside / name).resolve()
        except (OSError, ValueError, RuntimeError):  # a zero byte, or links in a circle
            target = Path()
        if not target.is_relative_to(inside):
            if "\0" in name or not place.is_relative_to(inside):
                raise InputError(f"{path}: picture {name!r} of item {item!r} lies outside {photos}; {hint}")
            links.append(name)
        else:
            listed[asin_of[item]] = str(target.relative_to(inside)) if Path(name).is_absolute() else name
    if links and notes is not None:
        notes.append(f"{len(links)} pictures are links to files outside {photos}: left out (the first: {links[0]!r})")
    return listed
