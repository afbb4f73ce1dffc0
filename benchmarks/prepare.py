"""Time and memory of datasets.prepare on made-up raw files of one catalogue in three formats.

python -m benchmarks.prepare                  # 10 million events, 1 million items: 6 GB of files
python -m benchmarks.prepare --reviews 1000000 --products 100000 --formats csv,parquet
python -m benchmarks.prepare --formats parquet --counts memory,duckdb --events_only    # the counts' memory alone
"""

import gzip
import itertools
import multiprocessing
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import memory_mb
from common.cli import Parser, add_switch, run_cli
from common.errors import InputError
from common.files import sha256
from datasets.catalog import REPORT

CHUNK = 20_000  # lines that are made at a time
FILES = {"json": "reviews.json.gz", "csv": "events.csv", "parquet": "events.parquet"}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the raw files, prepare each format in a process of its own, and print a table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--reviews", type=int, default=10_000_000, metavar="N", help="events (default: 10,000,000)")
    parser.add_argument("--products", type=int, default=1_000_000, metavar="N", help="items (default: 1,000,000)")
    parser.add_argument(
        "--formats", default=",".join(FILES), metavar="NAME,...", help="raw formats to time (default: %(default)s)"
    )
    parser.add_argument(
        "--counts",
        default="memory",
        metavar="WHERE,...",
        help="values of --counts to time: memory, duckdb (default: %(default)s)",
    )
    add_switch(parser, "events_only", "prepare without the items, whose metadata take memory too (default: with them)")
    parser.add_argument(
        "--folder", type=Path, default=Path("data/benchmark"), help="folder of the raw files (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="runs of each case; the median is printed (default: 1)"
    )
    arguments = parser.parse_args(argv)
    formats = arguments.formats.split(",")
    if unknown := set(formats) - set(FILES):
        raise InputError(f"--formats {unknown.pop()!r} is none of {', '.join(FILES)}")
    raw = arguments.folder / f"raw-{arguments.reviews}-{arguments.products}"
    make_files(raw, formats, arguments.reviews, arguments.products)
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {platform.processor() or platform.machine()}\n")
    print("| events | items | format | counts | raw file GB | seconds | CPU seconds | peak GB | same bytes |")
    print("| ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | --- |")
    first = None
    for name, counts in itertools.product(formats, arguments.counts.split(",")):
        flags = [f"--raw_root={raw}", f"--events={FILES[name]}", f"--counts={counts}"]
        flags += ["--items=meta.json.gz"] if not arguments.events_only else []
        runs = [run(arguments.folder, flags) for _ in range(arguments.repeats)]
        seconds, cpu_seconds, peak = np.median(runs, axis=0)
        made = [sha256(path) for path in sorted(arguments.folder.glob("made/*")) if path.name != REPORT]
        first = first or made
        size = (raw / FILES[name]).stat().st_size / 1e9
        print(
            f"| {arguments.reviews:,} | {arguments.products:,} | {name} | {counts} | {size:.2f} | {seconds:.0f} | "
            f"{cpu_seconds:.0f} | {peak / 1e3:.2f} | {'yes' if made == first else 'no'} |",
            flush=True,
        )


def run(folder: Path, flags: list[str]) -> tuple[float, float, float]:
    """Prepare the data in a process of its own, and return seconds, CPU seconds and the peak resident MB."""
    shutil.rmtree(folder / "made", ignore_errors=True)
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(folder, flags, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise InputError("preparing the made-up data failed, as said above; give more --reviews") from None
    finally:
        process.join()


def measure(folder: Path, flags: list[str], send: Connection) -> None:
    """Prepare the data, and send seconds, CPU seconds and the peak resident MB."""
    from datasets.prepare.__main__ import main as prepare

    started = time.perf_counter()
    prepare([f"--data_root={folder}", "--dataset_code=made", "--only=data", *flags])
    send.send((time.perf_counter() - started, time.process_time(), memory_mb("VmHWM")))


def make_files(raw: Path, formats: list[str], reviews: int, products: int) -> None:
    """Write the files that are missing."""
    import pandas as pd

    raw.mkdir(parents=True, exist_ok=True)
    if not (raw / "meta.json.gz").exists():
        write_lines(raw / "meta.json.gz", product_lines(products), products)
    for name in formats:
        path, part = raw / FILES[name], raw / f"{FILES[name]}.part"
        if path.exists():
            continue
        if name == "json":
            write_lines(part, review_lines(reviews, products), reviews)
        else:
            columns = ("user_id", "item_id", "timestamp", "rating")
            table = pd.concat(
                pd.DataFrame(dict(zip(columns, chunk, strict=True))) for chunk in events(reviews, products)
            )
            table["user_id"] = table["user_id"].map("A{:013X}".format)
            table["item_id"] = table["item_id"].map("B{:09d}".format)
            table.to_csv(part, index=False) if name == "csv" else table.to_parquet(part, index=False)
        part.rename(path)


def write_lines(path: Path, chunks: Iterator[str], total: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file, tqdm(total=total, desc=path.name, unit_scale=True) as bar:
        for chunk in chunks:
            file.write(chunk.encode())
            bar.update(chunk.count("\n"))


def texts(rng: np.random.Generator, shortest: int, longest: int) -> list[str]:
    """Return made-up texts with `shortest` to `longest` words."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(2, 11, size=5000)])
    return [" ".join(rng.choice(words, n)) for n in rng.integers(shortest, longest, size=5000)]


def events(reviews: int, products: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield users, items, times and ratings: a long tail of users and items, sorted by nothing."""
    rng = np.random.default_rng(0)
    for start in range(0, reviews, CHUNK):
        n = min(CHUNK, reviews - start)
        user = (rng.random(n) ** 3 * (reviews // 5)).astype(int)  # some are a hundred times as busy as the median
        item = (rng.random(n) ** 3 * products).astype(int)
        yield user, item, rng.integers(10**9, 14 * 10**8, n), rng.integers(1, 6, n)


def review_lines(reviews: int, products: int) -> Iterator[str]:
    """Reviews as Amazon's of 2014, about 1 kB each."""
    rng = np.random.default_rng(2)
    text = texts(rng, 20, 220)
    for columns in events(reviews, products):
        rows: Any = zip(*(column.tolist() for column in columns), rng.integers(len(text), size=CHUNK), strict=False)
        yield "".join(
            f'{{"reviewerID": "A{u:013X}", "asin": "B{i:09d}", "reviewerName": "A. Name", "helpful": [0, 0], '
            f'"reviewText": "{text[t]}", "overall": {s}.0, "summary": "{text[t][:30]}", "unixReviewTime": {at}, '
            f'"reviewTime": "01 30, 2014"}}\n'
            for u, i, at, s, t in rows
        )


def product_lines(products: int) -> Iterator[str]:
    """Metadata as Amazon's of 2014, about 1.7 kB each."""
    rng = np.random.default_rng(1)
    text = texts(rng, 5, 150)
    for start in range(0, products, CHUNK):
        rows = rng.integers(len(text), size=CHUNK).tolist()
        yield "".join(
            repr(
                {
                    "asin": f"B{i:09d}",
                    "title": text[row][:80],
                    "price": 9.99,
                    "brand": text[row][:9],
                    "categories": [["Made up", text[row][:12], text[row][:20]]],
                    "description": text[row],
                    "imUrl": f"http://localhost/{i}.jpg",
                    "related": {"also_bought": [f"B{(i + k) % products:09d}" for k in range(60)]},
                }
            )
            + "\n"
            for i, row in zip(range(start, min(start + CHUNK, products)), rows, strict=False)
        )


if __name__ == "__main__":
    run_cli(main)
