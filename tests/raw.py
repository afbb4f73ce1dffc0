"""Raw files as Amazon publishes them, made for tests."""

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_raw(path: Path, records: Iterable[dict[str, Any] | str], literals: bool = False) -> Path:
    """A line per record, as JSON or (2014's metadata) Python literals, gzipped where the name says so; texts as they
    are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write = repr if literals else json.dumps
    data = "".join((r if isinstance(r, str) else write(r)) + "\n" for r in records).encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data, compresslevel=1, mtime=0) if path.suffix == ".gz" else data)
    return path


def review(user: str, item: str, time: int, rating: float = 5.0) -> dict[str, Any]:
    """A review of 2014 or 2018."""
    return {"reviewerID": user, "asin": item, "overall": rating, "reviewText": "fine", "unixReviewTime": time}


def review_2023(user: str, item: str, time: int, rating: float = 5.0) -> dict[str, Any]:
    """The same of 2023: time in milliseconds, and the id of a variant beside the product's."""
    return {"user_id": user, "parent_asin": item, "asin": f"{item}-RED", "rating": rating, "timestamp": time * 1000}


def reviews_of(sequences: list[tuple[str, list[str]]], seed: int = 0) -> list[dict[str, Any]]:
    """Reviews in a file's order from which these histories (user, items) come out, and among them noise that the 5-core
    removes: users with 4 reviews of known items, and an item with 4 reviews by known users.

    The users' first lines are in the order given. A user's reviews are not in the order of time, but those of the same
    time are in the order of the history.
    """
    rng = random.Random(seed)
    lines: list[tuple[float, dict[str, Any]]] = []  # place in the file, review
    for row, (user, items) in enumerate(sequences):
        times = sorted(rng.choice(range(10**9, 10**9 + 86_400 * len(items), 86_400)) for _ in items)  # days: with ties
        records = [review(user, item, time) for item, time in zip(items, times, strict=True)]
        records.sort(key=lambda record: hash((record["unixReviewTime"], seed)))  # stable: ties stay in order
        places = [float(row), *sorted(rng.uniform(row, len(sequences)) for _ in records[1:])]
        lines += zip(places, records, strict=True)
    known = sorted({item for _, items in sequences for item in items})
    noise = [review(f"NOISE{n // 4}", rng.choice(known), rng.randrange(1, 14 * 10**8)) for n in range(80)]
    noise += [review(user, "RARE", 1) for user, _ in sequences[:4]]
    lines += [(rng.uniform(5, len(sequences)), record) for record in noise]
    return [record for _, record in sorted(lines, key=lambda line: line[0])]
