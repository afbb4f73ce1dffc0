"""Time the fetching of pictures from a local server that answers each request after 50 ms, all good and with failures.

python -m benchmarks.pictures            # 1,000 pictures of 500 x 500
python -m benchmarks.pictures --help
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.picture_server import Page, Server, cut_short, flat_png, good, in_turn, stalled, status
from common.cli import Parser, run_cli
from common.errors import InputError

KINDS = ("404", "503 then good", "cut short", "not a picture", "100 megapixels", "stalled")
GOOD = ("good", "503 then good")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table. Raises InputError where a manifest or a picture is not as it must be."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1000, help="pictures (default: 1000)")
    parser.add_argument("--side", type=int, default=500, help="pixels of a picture's side (default: 500)")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before an answer begins (default: 0.05)")
    parser.add_argument(
        "--failures", type=float, default=0.1, help="share of failures in the second row (default: 0.1)"
    )
    parser.add_argument("--read", type=float, default=1.0, help="seconds a stalled server is waited for (default: 1)")
    parser.add_argument("--tries", type=int, default=3, help="tries of a picture (default: 3)")
    parser.add_argument("--workers", type=int, default=24, help="pictures fetched at a time (default: 24)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:  # a process of its own, which does not share the threads that are measured
        return serve(arguments.serve, arguments)
    import httpx
    import PIL

    print(f"Python {platform.python_version()}, httpx {httpx.__version__}, Pillow {PIL.__version__}, "
          f"CPU, {os.cpu_count()} cores")  # fmt: skip
    print(f"{arguments.pictures:,} pictures of {arguments.side} x {arguments.side}, {arguments.latency * 1e3:.0f} ms a "
          f"request, {arguments.workers} at a time, {arguments.tries} tries, {arguments.read:g} s for a stalled "
          f"server; medians of {arguments.runs} runs\n")  # fmt: skip
    print("| answers | seconds | pictures/s | files | missing | broken | every good picture, manifest true |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for title, share in (("all good", 0.0), (f"{arguments.failures:.0%} failures", arguments.failures)):
        seconds, count = zip(*(fetched(share, arguments) for _ in range(arguments.runs)), strict=True)
        median = statistics.median(seconds)
        print(f"| {title} | {median:.2f} | {arguments.pictures / median:.0f} | {count[0]['file']} | "
              f"{count[0]['missing']} | {count[0]['broken']} | yes |")  # fmt: skip


def kinds(share: float, count: int) -> list[str]:
    """How each picture is answered: a failure of every kind in turn, spread evenly, then good ones."""
    failures = round(share * count)
    return [
        KINDS[i * failures // count % len(KINDS)] if (i + 1) * failures // count > i * failures // count else "good"
        for i in range(count)
    ]


def photographs(side: int, count: int = 16) -> list[bytes]:
    """JPEGs with edges, gradients and a little noise, as product pictures have."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        small = rng.integers(60, 250, size=(9, 9, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y, w, h = rng.integers(0, side, size=4).tolist()
            draw.ellipse((x, y, x + w // 3 + 1, y + h // 3 + 1), fill=tuple(rng.integers(0, 255, size=3).tolist()))
        noisy = np.asarray(image, dtype=np.float32) + rng.normal(scale=6, size=(side, side, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
        files.append(buffer.getvalue())
    return files


def serve(share: float, arguments: argparse.Namespace) -> None:
    """Answer /0, /1, ... until the process is ended; prints the URL."""
    files = photographs(arguments.side)
    bomb = flat_png(10_000, 10_000)

    def page(kind: str, data: bytes) -> Page:
        return {
            "good": lambda: good(data),
            "404": lambda: status(404),
            "503 then good": lambda: in_turn(status(503), good(data)),
            "cut short": lambda: cut_short(data, len(data) // 2),
            "not a picture": lambda: good(b"<html>Our servers are busy</html>"),
            "100 megapixels": lambda: good(bomb),
            "stalled": lambda: stalled(data[: len(data) // 2]),
        }[kind]()

    answers = kinds(share, arguments.pictures)
    pages = {f"/{i}": page(kind, files[i % len(files)]) for i, kind in enumerate(answers)}
    with Server(pages, arguments.latency) as server:
        print(server.url, flush=True)
        server.serve_forever()


def fetched(share: float, arguments: argparse.Namespace) -> tuple[float, Counter]:
    """Seconds, and how many items have a file, none, or a broken one, once that has been verified."""
    from datasets.prepare.http import Policy
    from datasets.prepare.pictures import FetchOptions, prepare_pictures

    flags = ["--pictures", str(arguments.pictures), "--side", str(arguments.side), "--latency", str(arguments.latency)]
    command = [sys.executable, "-m", "benchmarks.pictures", *flags, "--serve", str(share)]
    os.environ["NO_PROXY"] = "127.0.0.1"
    with (
        tempfile.TemporaryDirectory() as root,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None  # it is a pipe
        try:
            url = server.stdout.readline().strip()
            asins = [f"B{i:09d}" for i in range(arguments.pictures)]
            urls = {asin: [f"{url}/{i}"] for i, asin in enumerate(asins)}
            photos, folder = Path(root) / "photos", Path(root) / "data"
            started = time.perf_counter()
            policy = Policy(read=arguments.read, tries=arguments.tries)
            options = FetchOptions(arguments.workers, per_second=200, allow_private=True, policy=policy)
            prepare_pictures(asins, urls, photos, folder, options, log=lambda line: None)
            seconds = time.perf_counter() - started
        finally:
            server.kill()
        return seconds, verified(share, arguments, asins, photos, folder)


def verified(share: float, arguments: argparse.Namespace, asins: list[str], photos: Path, folder: Path) -> Counter:
    """Compare the manifest, item2img.json and every file with what was served."""
    manifest = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    files, answers = photographs(arguments.side), kinds(share, arguments.pictures)
    for i, (asin, answer) in enumerate(zip(asins, answers, strict=True)):
        kind = "file" if answer in GOOD else "missing" if answer == "404" else "broken"
        whole = kind != "file" or (photos / f"{asin}.jpg").read_bytes() == files[i % len(files)]
        if list(manifest[asin]) != [kind] or not whole:
            raise InputError(f"{asin}, whose answer was {answer}, is {manifest[asin]}")
    names = {asin: entry["file"] for asin, entry in manifest.items() if "file" in entry}
    on_disk = {path.name for path in photos.iterdir()}
    if json.loads((folder / "item2img.json").read_text(encoding="utf-8")) != names or on_disk != set(names.values()):
        raise InputError("item2img.json or the folder differs from the manifest")
    return Counter(next(iter(entry)) for entry in manifest.values())


if __name__ == "__main__":
    run_cli(main)
