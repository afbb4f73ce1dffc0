"""Measure time and memory of datasets/prepare on made-up raw data.

python -m benchmarks.prepare                      # 10 million reviews, 1 million products; writes 5 GB of raw files
python -m benchmarks.prepare --reviews 1000000 --products 100000
"""

import gzip
import multiprocessing
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.measure import memory_mb
from common.cli import Parser, run_cli
from common.errors import InputError

CHUNK = 20_000  # lines per chunk


def main(argv: Sequence[str] | None = None) -> None:
    """Write the raw files, prepare them in a separate process, and print a table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--reviews", type=int, default=10_000_000, metavar="N", help="(default: 10,000,000)")
    parser.add_argument("--products", type=int, default=1_000_000, metavar="N", help="(default: 1,000,000)")
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark"), help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="runs; the median counts (default: 1)")
    arguments = parser.parse_args(argv)
    raw = arguments.folder / f"raw-{arguments.reviews}-{arguments.products}"
    if not (raw / "done").exists():
        raw.mkdir(parents=True, exist_ok=True)
        write_lines(raw / "reviews.json.gz", review_lines(arguments.reviews, arguments.products), arguments.reviews)
        write_lines(raw / "meta.json.gz", product_lines(arguments.products), arguments.products)
        (raw / "done").touch()
    seconds, peaks = [], []
    for _ in range(arguments.repeats):
        shutil.rmtree(arguments.folder / "made", ignore_errors=True)
        receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(raw, arguments.folder, send))
        process.start()
        send.close()
        try:
            duration, peak = receive.recv()
        except EOFError:
            raise InputError("preparing the made-up data failed, see above; give more --reviews") from None
        process.join()
        seconds.append(duration)
        peaks.append(peak)
    size = sum(path.stat().st_size for path in raw.glob("*.gz"))
    print(
        f"\nPython {platform.python_version()}, numpy {np.__version__}, {platform.processor() or platform.machine()}\n"
    )
    print("| reviews | products | raw files GB | seconds | peak GB |\n| ---: | ---: | ---: | ---: | ---: |")
    print(f"| {arguments.reviews:,} | {arguments.products:,} | {size / 1e9:.1f} | {np.median(seconds):.0f} | "
          f"{np.median(peaks) / 1e3:.1f} |")  # fmt: skip


def measure(raw: Path, folder: Path, send: Connection) -> None:
    """Prepare the data, and send the seconds and the peak resident MB."""
    from datasets.prepare.__main__ import main as prepare

    started = time.perf_counter()
    prepare([f"--data_root={folder}", "--dataset_code=made", "--only=data", f"--raw_root={raw}",
             "--reviews=reviews.json.gz", "--meta=meta.json.gz"])  # fmt: skip
    send.send((time.perf_counter() - started, memory_mb("VmHWM")))


def write_lines(path: Path, chunks: Iterator[str], total: int) -> None:
    """Write chunks of lines to a gzipped file."""
    with gzip.open(path, "wb", compresslevel=1) as file, tqdm(total=total, desc=path.name, unit_scale=True) as bar:
        for chunk in chunks:
            file.write(chunk.encode())
            bar.update(chunk.count("\n"))


def texts(rng: np.random.Generator, shortest: int, longest: int) -> list[str]:
    """Return made-up texts of `shortest` to `longest` words."""
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), n)) for n in rng.integers(2, 11, size=5000)]
    return [" ".join(rng.choice(words, n)) for n in rng.integers(shortest, longest, size=5000)]


def review_lines(reviews: int, products: int) -> Iterator[str]:
    """Yield unsorted reviews like Amazon's of 2014, about 1 kB each.

    Users and products have a long tail.
    """
    rng = np.random.default_rng(0)
    text = texts(rng, 20, 220)
    for start in range(0, reviews, CHUNK):
        n = min(CHUNK, reviews - start)
        user = (rng.random(n) ** 3 * (reviews // 5)).astype(int)  # some have a hundred times the median
        item = (rng.random(n) ** 3 * products).astype(int)
        times, stars, row = rng.integers(10**9, 14 * 10**8, n), rng.integers(1, 6, n), rng.integers(len(text), size=n)
        yield "".join(
            f'{{"reviewerID": "A{u:013X}", "asin": "B{i:09d}", "reviewerName": "A. Name", "helpful": [0, 0], '
            f'"reviewText": "{text[t]}", "overall": {s}.0, "summary": "{text[t][:30]}", "unixReviewTime": {at}, '
            f'"reviewTime": "01 30, 2014"}}\n'
            for u, i, at, s, t in zip(*(c.tolist() for c in (user, item, times, stars, row)), strict=True)
        )


def product_lines(products: int) -> Iterator[str]:
    """Yield metadata like Amazon's of 2014, about 1.7 kB each."""
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
