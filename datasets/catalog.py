"""Load and check a prepared dataset, the one that the settings name or the demo. The paper's four datasets.

    <data_root>/<dataset_code>/sequential_data.txt   one line per user: user item item ..., ids from 1, oldest first
    <data_root>/<dataset_code>/datamaps.json         item2id (and user2id): Amazon id -> id, 1..N without gaps
    <data_root>/<dataset_code>/meta.json.gz          one line per item: a JSON object or Python literal with an
                                                     'asin' or 'parent_asin'
    <data_root>/<dataset_code>/split.json            optional: a split by time; without it leave-one-out
    <data_root>/<dataset_code>/item2img.json         optional: item -> picture (or item2img_dict.pkl)
    <data_root>/photos/<dataset_code>/               optional: the pictures

U users, N items, n interactions.
"""

import difflib
import hashlib
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct

from common import processes
from common.errors import InputError
from common.files import MAX_ID, Count, check_schema, read_json, read_text
from config import Config, DataSettings
from datasets.items import attribute_text, read_item2img
from datasets.records import RecordFile, parse_record

MIN_ITEMS = 3  # leave-one-out: one to train on, one to validate on, one to test on
FILES = ("sequential_data.txt", "datamaps.json", "meta.json.gz")
SPLIT = "split.json"  # {"name": "time DATE DATE", "cuts": [[before validation, before test], ...]}, a pair per user
REPORT = "prepare_report.json"
LEAVE_ONE_OUT = "leave-one-out"
LAYOUT = "datasets/catalog.py describes the layout"


class Prepared(Struct):
    """How datasets.prepare made a dataset."""

    recipe: dict[str, Any]
    files: dict[Literal["sequential_data.txt", "datamaps.json", "meta.json.gz", "split.json"], str]
    filters: list[dict[str, Any]]
    notes: list[str]


class Report(Struct):
    """prepare_report.json; its summary is written and never read."""

    unfinished: str = ""
    prepared: Prepared | None = None


class Split(Struct):
    """split.json: the name of a split by time, and a pair for every user, as in Sequences."""

    name: Annotated[str, Meta(pattern="^[ -~]+$", max_length=100)]
    cuts: list[tuple[Count, Count]]


@dataclass(frozen=True)
class Sequences:
    """Ragged histories: row u has items[offsets[u]:offsets[u + 1]], oldest first."""

    items: np.ndarray  # [n] int64, 1..N
    offsets: np.ndarray  # [U + 1] int64
    split: str = LEAVE_ONE_OUT  # or the name of a split by time, with both dates
    cuts: np.ndarray | None = None  # [U, 2] int64, by time: how many items come before validation and before the test

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, row: int) -> np.ndarray:
        """Return the items of one user row."""
        return self.items[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class Catalog:
    """A prepared dataset.

    Item i (1..N) has asins[i - 1], metadata[i - 1] and pictures[i - 1].
    """

    name: str
    sequences: Sequences
    asins: list[str]
    metadata: list[dict[str, Any]]  # {} for an item without metadata
    pictures: list[Path | None] | None  # None: the dataset has no item2img.json
    photos: Path  # folder of the pictures
    notes: list[str]  # counts of what was dropped or missing

    @property
    def num_items(self) -> int:
        return len(self.asins)

    def digest(self) -> str:
        """Return the SHA-256 of the sequences, the item ids, in order, and a split by time."""
        digest = hashlib.sha256("\0".join(self.asins).encode("utf-8", "surrogatepass"))
        digest.update(self.sequences.items.tobytes() + self.sequences.offsets.astype(np.int64).tobytes())
        if self.sequences.cuts is not None:
            digest.update(self.sequences.split.encode() + self.sequences.cuts.tobytes())
        return digest.hexdigest()


def load_catalog(data_root: str | Path, dataset_code: str) -> Catalog:
    """Load and check a prepared dataset.

    Raises InputError that names the file, the line and the fix.
    """
    root = Path(data_root)
    folder = root / dataset_code
    notes: list[str] = []
    require_dataset(root, dataset_code)
    report = read_report(folder) or {}
    if "unfinished" in report:
        raise InputError(f"preparing {folder} was interrupted; to continue: {report['unfinished']}")
    asins, num_users = _load_ids(folder / "datamaps.json")
    split = _load_split(folder / SPLIT)
    sequences = _load_sequences(folder / "sequential_data.txt", len(asins), num_users, split, notes)
    metadata = _load_metadata(folder / "meta.json.gz", asins, notes)
    photos = (root / "photos" / dataset_code).resolve()
    listed = read_item2img(folder, photos, asins, notes=notes)
    pictures = None if listed is None else [photos / listed[asin] if asin in listed else None for asin in asins]
    return Catalog(dataset_code, sequences, asins, metadata, pictures, photos, notes)


def require_dataset(root: Path, dataset_code: str) -> None:
    """Raise InputError if the name is invalid or no dataset of this name is prepared below `root`."""
    DataSettings(dataset_code, str(root))  # raises for an invalid name
    try:
        found = any((root / dataset_code / name).exists() for name in FILES)
    except OSError as error:
        raise InputError(
            f"--data_root {str(root)!r:.80} cannot be read ({error.strerror}); give another folder"
        ) from None
    if not found:
        raise InputError(_missing_dataset(root, dataset_code))


def read_report(folder: Path) -> dict[str, Any] | None:
    """Return the report of datasets.prepare, or None if there is none.

    After an interruption it is {"unfinished": command to continue}.
    """
    path = folder / REPORT
    if not path.exists():
        return None
    report = check_schema(read_json(path, "remove it"), Report, path, "remove it")
    if not ("unfinished" in report or "prepared" in report):
        raise InputError(f"{path} is not a report of datasets.prepare; remove it")
    return report


def _missing_dataset(root: Path, dataset_code: str) -> str:
    prepared = sorted(p.parent.name for p in root.glob("*/sequential_data.txt")) if root.is_dir() else []
    found = f"prepared there: {', '.join(prepared)}" if prepared else "nothing is prepared there"
    near = difflib.get_close_matches(dataset_code, {*prepared, *PAPER_SETS, "demo"} - {dataset_code}, n=1)
    if dataset_code == "demo":
        return f"the demo is not at {root / dataset_code} ({found}); leave out --data_root to generate it"
    return (
        f"dataset {dataset_code!r} is not at {root / dataset_code} ({found})"
        f"{f'; did you mean {near[0]}?' if near else '.'} To prepare it: "
        f"{prepare_command(root, dataset_code)}. Or give --data_root FOLDER if it is elsewhere, or --dataset_code "
        f"demo, which needs no download"
    )


def prepare_command(root: Path, dataset_code: str, only: str = "") -> str:
    """Return the command that prepares a dataset, or one step of it."""
    command = f"python -m datasets.prepare --dataset_code {shlex.quote(dataset_code)}"
    command += "" if root.resolve() == Path(Config.data_root).resolve() else f" --data_root {shlex.quote(str(root))}"
    if only:
        return f"{command} --only {only}"
    return command if dataset_code in PAPER_SETS else f"{command} --events FILE --items FILE"


def _load_ids(path: Path) -> tuple[list[str], int]:
    """Return the ASINs in id order, and the number of users in user2id, or 0."""
    maps = read_json(path, LAYOUT)
    item2id = maps.get("item2id")
    if not isinstance(item2id, dict) or not item2id:
        raise InputError(f"{path} has no 'item2id' map; {LAYOUT}")
    count = len(item2id)
    asin_of: dict[int, str] = {}
    for asin, text in item2id.items():
        digits = str(text) if isinstance(text, str | int) else ""
        number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else 0
        if not 1 <= number <= count or number in asin_of:
            raise InputError(
                f"{path}: item {asin!r} has id {text!r}; ids must be 1..{count}, each once, as item2id has "
                f"{count} items"
            )
        if not 0 < len(asin.encode("utf-8", "surrogatepass")) <= MAX_ID:
            raise InputError(f"{path}: item id {asin[:80]!r} must have 1 to {MAX_ID} bytes; shorten it in every file")
        asin_of[number] = asin
    user2id = maps.get("user2id", {})
    asins = [asin_of[number] for number in range(1, count + 1)]
    return asins, len(user2id) if isinstance(user2id, dict) else 0


def _load_split(path: Path) -> tuple[str, list[list[int]]] | None:
    """Return the name and the cuts of a split by time; None without one."""
    if not path.exists():
        return None
    hint = "prepare the dataset again, or remove it"
    split = check_schema(read_json(path, LAYOUT), Split, path, hint)
    return split["name"], split["cuts"]


def _load_sequences(
    path: Path, num_items: int, num_users: int, split: tuple[str, list[list[int]]] | None, notes: list[str]
) -> Sequences:
    lines: dict[int, int] = {}  # user id -> line
    rows: list[list[int]] = []
    cuts: list[list[int]] = []
    short, least = 0, 1 if split else MIN_ITEMS
    for number, line in enumerate(read_text(path, LAYOUT).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            user, *items = map(int, line.replace("_", "?").split())  # int() would read 1_000
        except ValueError:
            raise InputError(f"{path}:{number}: {line[:60]!r} is not 'user item item ...' in whole numbers") from None
        if not 1 <= user < 2**63 or user in lines:
            reason = "ids start at 1" if user < 1 else "ids end at 2**63 - 1"
            reason = f"the user is already on line {lines[user]}" if user in lines else reason
            raise InputError(f"{path}:{number}: user {user}: {reason}")
        lines[user] = number
        bad = next((i for i in items if not 1 <= i <= num_items), None)
        if bad is not None:
            raise InputError(f"{path}:{number}: item {bad} is not in datamaps.json; its item2id has 1..{num_items}")
        if len(items) < least:
            short += 1
            continue
        rows.append(items)
        if split:
            cut = split[1][len(lines) - 1] if len(lines) <= len(split[1]) else None
            if not (cut and cut[0] <= cut[1] <= len(items)):
                raise InputError(f"{path.with_name(SPLIT)} does not fit line {number} of {path.name}; prepare it again")
            cuts.append(cut)
    if len(lines) < num_users:
        raise InputError(
            f"{path} has {len(lines)} users, but datamaps.json's user2id has {num_users}: the file is truncated; "
            f"copy it again"
        )
    if not rows:
        needed = "an item" if split else f"at least {MIN_ITEMS} items (one each to train, validate and test on)"
        raise InputError(f"{path}: no user has {needed}")
    if short:
        notes.append(f"{short} users with fewer than {least} items dropped")
    offsets = np.cumsum([0] + [len(row) for row in rows])
    flat = np.fromiter((item for row in rows for item in row), dtype=np.int64, count=offsets[-1])
    return Sequences(flat, offsets, split[0], np.array(cuts)) if split else Sequences(flat, offsets)


def _load_metadata(path: Path, asins: list[str], notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        notes.append(f"no {path.name}: items have no text")
        return [{} for _ in asins]
    row_of = {asin: row for row, asin in enumerate(asins)}
    metadata: list[dict[str, Any]] = [{} for _ in asins]
    file = RecordFile(path, LAYOUT)
    for line in file.texts():
        record = parse_record(line) or {}
        ids = [record[key] for key in ("asin", "parent_asin") if isinstance(record.get(key), str)]
        if not ids:
            file.count_bad()
        elif known := [row_of[item] for item in ids if item in row_of]:
            metadata[known[0]] = record
    notes.extend(file.check("records with an 'asin' or 'parent_asin'"))
    missing = sum(not record for record in metadata)
    if missing:
        notes.append(f"{missing} of {len(asins)} items have no metadata")
    return metadata


def describe(catalog: Catalog) -> str:
    """Return a one-line summary of the dataset."""
    lengths = np.diff(catalog.sequences.offsets)
    with_text = Counter(key for record in catalog.metadata for key in record if attribute_text(record, key))
    shares = ", ".join(
        f"{key} {with_text[key] / catalog.num_items:.0%}"
        for key in ("title", "price", "brand", "categories")
        if with_text[key]
    )
    return (
        f"{catalog.name}: {len(catalog.sequences):,} users, {catalog.num_items:,} items, "
        f"{lengths.sum():,} interactions (median history {np.median(lengths):.0f}); {shares or 'no metadata'}"
        f"{'' if catalog.sequences.cuts is None else f'; split by {catalog.sequences.split}'}"
    )


# ------------------------------------------------------------------------------------------------- the paper's datasets
# Their names in Amazon's release of 2014, and what the paper counts in them.


@dataclass(frozen=True)
class PaperSet:
    """One of the paper's datasets: its name in the release of 2014, and its row of the paper's Table 1."""

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


# ------------------------------------------------------------------------------------------ the dataset of the settings


def check_dataset(settings: DataSettings) -> None:
    """Raise InputError if the dataset does not exist. One process needs no torch for it, so the error comes at once."""
    if not _is_demo(settings):
        processes.together(lambda: require_dataset(Path(settings.data_root), settings.dataset_code))


def load_dataset(settings: DataSettings) -> Catalog:
    """Load a dataset and print a summary; generate the demo if it does not exist.

    Every machine reads its own files. Raises InputError that names the file, the line and the fix, or a machine whose
    dataset is another one.
    """
    from datasets.demo import load_demo  # which imports this module

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
