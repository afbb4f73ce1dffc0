"""Amazon's raw files, recognised by what is in them: reviews and product metadata as McAuley et al. released them in
2014, 2018 and 2023.

           user        item          time                     rating    metadata
    2014   reviewerID  asin          unixReviewTime, seconds  overall   Python literals: imUrl
    2018   reviewerID  asin          unixReviewTime, seconds  overall   JSON: category, imageURL, imageURLHighRes
    2023   user_id     parent_asin   timestamp, milliseconds  rating    JSON: parent_asin, store, images

n reviews, U users, N items.
"""

import json
import math
import re
from array import array
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import InputError
from datasets.records import RecordFile, parse_record
from datasets.text import flat_text

BASE_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
HINT = "give whole files as Amazon's data of 2014, 2018 or 2023 are published, a review or a product a line"
MAX_PICTURES = 4  # addresses that are kept of a product


@dataclass(frozen=True)
class PaperSet:
    """One of the paper's four datasets: its files' name in the release of 2014, and its row of the paper's Table 1."""

    category: str
    users: int
    items: int
    pictures: int
    interactions: int


PAPER_SETS = {
    "beauty": PaperSet("Beauty", 22_363, 12_101, 12_023, 198_502),
    "clothing": PaperSet("Clothing_Shoes_and_Jewelry", 39_387, 23_033, 22_299, 278_677),
    "sports": PaperSet("Sports_and_Outdoors", 35_598, 18_357, 17_943, 296_337),
    "toys": PaperSet("Toys_and_Games", 19_412, 11_924, 11_895, 167_597),
}

# ---------------------------------------------------------------------------------------------------------- reviews

# The keys of user, item, time and rating by release.
REVIEW_KEYS = (("reviewerID", "asin", "unixReviewTime", "overall"), ("user_id", "parent_asin", "timestamp", "rating"))


@dataclass(frozen=True)
class Reviews:
    """Reviews in the order of their file. Review r: user users[user[r]] had item items[item[r]]."""

    users: list[str]  # [U] in the order of their first line
    items: list[str]  # [N] likewise
    user: np.ndarray  # [n] int32
    item: np.ndarray  # [n] int32
    time: np.ndarray  # [n] int64, in the file's unit
    rating: np.ndarray  # [n] float32, NaN where there is none
    notes: list[str]  # what was left out, with counts


def read_reviews(path: Path) -> Reviews:
    """All reviews of a file that have a user, an item and a time of 0 or later. Raises InputError where the file is
    damaged or holds something else."""
    file = RecordFile(path, HINT)
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    user, item, time, rating = array("i"), array("i"), array("q"), array("f")
    keys, seen = None, None
    for line in tqdm(file.texts(), desc=f"reading {path.name}", unit="line", unit_scale=True, disable=None):
        record = parse_record(line)
        if record and keys is None:
            seen = seen or record
            keys = next((k for k in REVIEW_KEYS if all(key in record for key in k[:3])), None)
        review = _review(record, keys) if record and keys else None
        if review is None:
            file.count_bad()
            continue
        user.append(users.setdefault(review[0], len(users)))
        item.append(items.setdefault(review[1], len(items)))
        time.append(review[2])
        rating.append(review[3])
    if keys is None and seen is not None:
        wanted = " or ".join(", ".join(k[:3]) for k in REVIEW_KEYS)
        raise InputError(f"{path} holds no reviews: its records have {_names(seen)}, not {wanted}; {HINT}")
    notes = file.check("reviews with a user, an item and a time")
    columns = np.asarray(user), np.asarray(item), np.asarray(time), np.asarray(rating)
    return Reviews(list(users), list(items), *columns, notes)


def _review(record: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, str, int, float] | None:
    user, item, time, rating = map(record.get, keys)
    if not (isinstance(user, str) and user and isinstance(item, str) and item):
        return None
    if isinstance(time, bool) or not isinstance(time, int) or not 0 <= time < 2**63:
        return None
    try:
        return user, item, time, float(rating) if rating is not None else math.nan
    except (TypeError, ValueError, OverflowError):
        return user, item, time, math.nan


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:12])) or "no keys"


# --------------------------------------------------------------------------------------------------------- metadata

ITEM_KEYS = ("parent_asin", "asin")  # 2023's records are of parents; before there was only the one
ID_IN_LINE = re.compile(r"""asin["']\s*:(?:\s*(["'])([\w-]+)\1)?""")  # an odd id gives an empty one


def read_products(path: Path, wanted: Set[str]) -> tuple[dict[str, str], list[str]]:
    """The products with one of the `wanted` ids as `product` gives them, in JSON, by id, and what was left out, with
    counts. The last record of an id counts. Raises InputError where the file is damaged or holds something else."""
    file = RecordFile(path, HINT)
    products: dict[str, str] = {}
    for line in tqdm(file.texts(), desc=f"reading {path.name}", unit="line", unit_scale=True, disable=None):
        ids = {asin for _, asin in ID_IN_LINE.findall(line)}
        if ids and "" not in ids and wanted.isdisjoint(ids) and line.endswith("}"):
            continue  # a small part of the time that parsing takes, and most products are not wanted
        record = parse_record(line)
        asin = next((record[key] for key in ITEM_KEYS if isinstance(record.get(key), str)), None) if record else None
        try:
            if record is None or asin is None or any(keys[0] in record for keys in REVIEW_KEYS):
                file.count_bad()
            elif asin in wanted:
                products[asin] = json.dumps(product(asin, record))
        except (TypeError, ValueError, RecursionError):  # a literal may hold bytes, sets and anything nested
            file.count_bad()
    return products, file.check("products with an id")


def product(asin: str, record: dict[str, Any]) -> dict[str, Any]:
    """A product in the words of 2014, whatever the release: asin, and as far as known title, price, brand, categories,
    description and images (addresses, the best first)."""
    title, price = record.get("title"), flat_text(record.get("price"))
    known = {
        # In the release of 2018 a few titles and prices are pieces of the page's code.
        "title": None if isinstance(title, str) and "getTime" in title else title,
        "price": record.get("price") if any(c.isdigit() for c in price) and len(price) <= 40 else None,
        "brand": record.get("brand" if flat_text(record.get("brand")) else "store"),
        "categories": record.get("categories" if flat_text(record.get("categories")) else "category"),
        "description": record.get("description"),
        "images": picture_urls(record),
    }
    return {"asin": asin} | {key: value for key, value in known.items() if flat_text(value)}


def picture_urls(record: dict[str, Any]) -> list[str]:
    """Where a product's pictures lie, the one to take first in front: its main one, not the thumbnail."""
    urls: list[Any] = []
    images = record.get("images")
    if isinstance(images, dict):  # {"large": [...], "thumb": [...]} instead of [{"large": ..., "thumb": ...}]
        columns = {size: column for size, column in images.items() if isinstance(column, list)}
        images = [
            {size: column[row] for size, column in columns.items() if row < len(column)}
            for row in range(max(map(len, columns.values()), default=0))
        ]
    if isinstance(images, list):
        sized = [image for image in images if isinstance(image, dict)]
        sized.sort(key=lambda image: image.get("variant") != "MAIN")
        urls += [image.get(size) for image in sized for size in ("large", "hi_res", "thumb")]
        urls += [image for image in images if isinstance(image, str)]
    for key in ("imUrl", "imageURLHighRes", "imageURL", "image"):
        value = record.get(key)
        urls += value if isinstance(value, list) else [value]
    good = (url for url in urls if isinstance(url, str) and url.startswith(("https://", "http://")))
    # Amazon's stand-in for "no picture" would be a picture that thousands of products share.
    return list(dict.fromkeys(url for url in good if "/no-img-" not in url))[:MAX_PICTURES]


def raw_names(category: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names under which reviews and metadata of a category of 2014 are published, the one to fetch first."""

    def files(*names: str) -> tuple[str, ...]:
        return tuple(f"{name}.json{gz}" for name in names for gz in (".gz", ""))

    return files(f"reviews_{category}_5", f"reviews_{category}"), files(f"meta_{category}")
