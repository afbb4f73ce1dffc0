"""Generate the demo dataset from a seed, in seconds and without a download.

A user's next item depends on the type and brand of the previous item (a sleeping bag follows a tent), and on the user's
taste in colour and motif. Text shows type and brand; only pictures show colour and motif. Text with pictures therefore
predicts better than text, text better than pictures, and each better than popularity.
"""

import gzip
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from common import processes
from common.errors import InputError
from common.files import replacing, write_json, write_text
from datasets.catalog import Catalog, load_catalog
from datasets.items import ITEM2IMG

if TYPE_CHECKING:
    from PIL import Image

DEMO_ROOT = Path("data")
SEED, NUM_ITEMS, NUM_USERS = 2024, 800, 3000
VERSION = 1  # of the generator; data of another version is generated again

# department -> product types; each type is followed by the next one in its department
DEPARTMENTS = {
    "Camping": ("Tent", "Sleeping Bag", "Camping Stove", "Lantern"),
    "Kitchen": ("Chef Knife", "Cutting Board", "Frying Pan", "Apron"),
    "Office": ("Notebook", "Fountain Pen", "Desk Lamp", "Pencil Case"),
    "Cycling": ("Helmet", "Bike Light", "Water Bottle", "Saddle Bag"),
    "Garden": ("Plant Pot", "Watering Can", "Pruning Shears", "Gloves"),
    "Music": ("Ukulele", "Capo", "Music Stand", "Guitar Strap"),
}
BRANDS = ("Alder", "Birch & Co.", "Corvid", "Dunmore", "Eider", "Fernway", "Gale", "Hollis")
GRADES = {"Everyday": 9.99, "Classic": 19.99, "Premium": 49.99}  # grade -> price
COLOURS = {
    "red": (200, 55, 55),
    "orange": (230, 140, 45),
    "yellow": (225, 200, 60),
    "green": (80, 155, 85),
    "teal": (50, 155, 160),
    "blue": (60, 95, 180),
    "violet": (130, 80, 170),
    "grey": (115, 115, 120),
}
MOTIFS = ("disc", "square", "triangle", "star", "ring", "stripes")

# Weight of each property in the log-odds of the next item.
FOLLOWS_TYPE, SAME_BRAND, LIKED_COLOUR, LIKED_MOTIF, POPULARITY = 4.0, 1.5, 2.5, 1.5, 0.6


def prepare_demo(root: Path = DEMO_ROOT) -> Path:
    """Write the demo below `root` unless it exists, and return `root` (a data_root)."""
    folder, photos = root / "demo", root / "photos" / "demo"
    mark = folder / "generated.json"
    made = json.dumps({"version": VERSION, "seed": SEED, "items": NUM_ITEMS, "users": NUM_USERS}).encode()
    if mark.is_file() and mark.read_bytes() == made:
        return root
    if (folder / "sequential_data.txt").exists() and not mark.exists():
        raise InputError(f"{folder} holds another dataset, but the name demo is reserved; rename the folder")
    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".demo.lock"):  # another machine may share the folder
            if mark.is_file() and mark.read_bytes() == made:
                return root
            write_text(mark, "unfinished")
            photos.mkdir(parents=True, exist_ok=True)
            _write_demo(folder, photos)
            write_text(mark, made.decode())
    except OSError as error:
        raise InputError(
            f"cannot write the demo below {root}: {error}; run in a writable folder with free space"
        ) from None
    return root


def load_demo() -> Catalog:
    """Return the demo catalogue, generating it on first use."""
    processes.on_each_machine(prepare_demo)
    try:
        return load_catalog(DEMO_ROOT, "demo")
    except InputError as error:
        raise InputError(f"{error}. Remove {DEMO_ROOT / 'demo'} to generate it again") from None


def _write_demo(folder: Path, photos: Path) -> None:
    rng = np.random.default_rng(SEED)
    items = _draw_items(rng)
    asins = [f"DEMO{i:06d}" for i in range(1, NUM_ITEMS + 1)]
    sequences = _simulate_users(items, rng)

    write_text(folder / "sequential_data.txt", "".join(f"{u} {' '.join(map(str, s))}\n" for u, s in sequences.items()))
    item2id = {asin: str(i) for i, asin in enumerate(asins, start=1)}
    user2id = {f"USER{u:06d}": str(u) for u in sequences}
    write_json(
        folder / "datamaps.json",
        {
            "user2id": user2id,
            "item2id": item2id,
            "id2user": {v: k for k, v in user2id.items()},
            "id2item": {v: k for k, v in item2id.items()},
        },
    )
    with replacing(folder / "meta.json.gz") as temporary:
        lines = "".join(f"{_metadata(asin, items, i)!r}\n" for i, asin in enumerate(asins))
        temporary.write_bytes(gzip.compress(lines.encode(), mtime=0))
    for i, asin in enumerate(tqdm(asins, desc="drawing pictures", unit="item", disable=None)):
        _draw_picture(items["colour"][i], items["motif"][i], rng).save(photos / f"{asin}.png")
    write_json(folder / ITEM2IMG, {asin: f"{asin}.png" for asin in asins})


def _draw_items(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw the items' properties as category numbers and a popularity, [N] each."""
    counts = {
        "type": sum(map(len, DEPARTMENTS.values())),
        "brand": len(BRANDS),
        "grade": len(GRADES),
        "colour": len(COLOURS),
        "motif": len(MOTIFS),
    }
    items = {name: rng.integers(count, size=NUM_ITEMS) for name, count in counts.items()}
    return items | {"popularity": rng.normal(size=NUM_ITEMS)}


def _simulate_users(items: dict[str, np.ndarray], rng: np.random.Generator) -> dict[int, list[int]]:
    """Return user id -> item ids, oldest first; no user takes an item twice."""
    per_department = len(next(iter(DEPARTMENTS.values())))
    types = items["type"]
    follower = types // per_department * per_department + (types + 1) % per_department  # [N]
    lengths = 5 + rng.geometric(0.2, size=NUM_USERS).clip(max=25)  # at least 6, with a long tail
    colour, motif = rng.integers(len(COLOURS), size=NUM_USERS), rng.integers(len(MOTIFS), size=NUM_USERS)
    taste = (
        LIKED_COLOUR * (items["colour"] == colour[:, None])
        + LIKED_MOTIF * (items["motif"] == motif[:, None])
        + POPULARITY * items["popularity"]
    )  # [U, N]
    users = np.arange(NUM_USERS)
    taken: list[np.ndarray] = []
    for step in range(lengths.max()):
        logits = taste + rng.gumbel(size=taste.shape)
        if step:
            before = taken[-1]
            logits += FOLLOWS_TYPE * (types == follower[before][:, None])
            logits += SAME_BRAND * (items["brand"] == items["brand"][before][:, None])
        chosen = logits.argmax(axis=1)
        taste[users, chosen] = -np.inf
        taken.append(chosen)
    histories = np.stack(taken, axis=1) + 1
    return {u + 1: histories[u, : lengths[u]].tolist() for u in range(NUM_USERS)}


def _metadata(asin: str, items: dict[str, np.ndarray], i: int) -> dict[str, Any]:
    paths = [(department, product) for department, products in DEPARTMENTS.items() for product in products]
    department, product = paths[items["type"][i]]
    brand, grade = BRANDS[items["brand"][i]], list(GRADES)[items["grade"][i]]
    return {
        "asin": asin,
        "title": f"{brand.replace('&', '&amp;')} {grade} {product}",
        "price": GRADES[grade],
        "brand": brand,
        "categories": [["Demo Shop", department, product]],
    }


def _draw_picture(colour: int, motif: int, rng: np.random.Generator) -> "Image.Image":
    """Return a 96 x 96 picture of a coloured motif, with random variation."""
    from PIL import Image, ImageDraw

    side, scale = 96, 3  # draw at 3x and downscale for smooth edges
    ground = tuple(int(v) for v in rng.integers(232, 250, size=3))
    paint = tuple(
        int(v) for v in (np.array(list(COLOURS.values())[colour]) + rng.integers(-14, 15, size=3)).clip(0, 255)
    )
    picture = Image.new("RGB", (side * scale, side * scale), ground)
    draw = ImageDraw.Draw(picture)
    x, y = (side * scale / 2 + rng.normal(scale=9, size=2)).tolist()
    r = side * scale * rng.uniform(0.28, 0.38)
    name = MOTIFS[motif]
    if name == "disc":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=paint)
    elif name == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=paint, width=int(r / 2.5))
    elif name == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=paint)
    elif name == "stripes":
        for k in range(-2, 3):
            draw.rectangle((x - r, y + k * r / 2.2 - r / 8, x + r, y + k * r / 2.2 + r / 8), fill=paint)
    else:
        corners, inner = (3, 1.0) if name == "triangle" else (5, 0.45)
        points = []
        for k in range(2 * corners):
            radius, angle = r * (1.0 if k % 2 == 0 else inner), math.pi * (k / corners - 0.5)
            points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
        draw.polygon(points[::2] if inner == 1.0 else points, fill=paint)
    return picture.resize((side, side), Image.Resampling.LANCZOS)
