"""Time fetching pictures from a local server, without and with failures.

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
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common.cli import Parser, run_cli
from common.errors import InputError

KINDS = ("404", "503 then good", "cut short", "not a picture", "100 megapixels", "stalled")
GOOD = ("good", "503 then good")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table. Raises InputError if a manifest or a picture is wrong."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1000, help="number of pictures (default: 1000)")
    parser.add_argument("--side", type=int, default=500, help="side of a picture in pixels (default: 500)")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before an answer starts (default: 0.05)")
    parser.add_argument(
        "--failures", type=float, default=0.1, help="share of failures in the second row (default: 0.1)"
    )
    parser.add_argument("--read", type=float, default=1.0, help="read timeout in seconds (default: 1)")
    parser.add_argument("--tries", type=int, default=3, help="tries per picture (default: 3)")
    parser.add_argument("--workers", type=int, default=24, help="concurrent fetches (default: 24)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each case (default: 3)")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:  # in a separate process, to keep its threads out of the timing
        return serve(arguments.serve, arguments)
    import httpx
    import PIL

    print(f"Python {platform.python_version()}, httpx {httpx.__version__}, Pillow {PIL.__version__}, "
          f"CPU, {os.cpu_count()} cores")  # fmt: skip
    print(f"{arguments.pictures:,} pictures of {arguments.side} x {arguments.side}, {arguments.latency * 1e3:.0f} ms "
          f"latency, {arguments.workers} concurrent fetches, {arguments.tries} tries, read timeout "
          f"{arguments.read:g} s; medians of {arguments.runs} runs\n")  # fmt: skip
    print("| answers | seconds | pictures/s | files | missing | broken | pictures and manifest verified |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for title, share in (("all good", 0.0), (f"{arguments.failures:.0%} failures", arguments.failures)):
        seconds, count = zip(*(time_fetch(share, arguments) for _ in range(arguments.runs)), strict=True)
        median = statistics.median(seconds)
        print(f"| {title} | {median:.2f} | {arguments.pictures / median:.0f} | {count[0]['file']} | "
              f"{count[0]['missing']} | {count[0]['broken']} | yes |")  # fmt: skip


def answer_kinds(share: float, count: int) -> list[str]:
    """Return the kind of answer for each picture.

    Failures are evenly spread and cycle through KINDS; the rest are good.
    """
    failures = round(share * count)
    return [
        KINDS[i * failures // count % len(KINDS)] if (i + 1) * failures // count > i * failures // count else "good"
        for i in range(count)
    ]


def photographs(side: int, count: int = 16) -> list[bytes]:
    """Return JPEGs with edges, gradients and some noise, like product pictures."""
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
    """Print the URL and serve /0, /1, ... until the process is killed."""
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

    answers = answer_kinds(share, arguments.pictures)
    pages = {f"/{i}": page(kind, files[i % len(files)]) for i, kind in enumerate(answers)}
    with Server(pages, arguments.latency) as server:
        print(server.url, flush=True)
        server.serve_forever()


def time_fetch(share: float, arguments: argparse.Namespace) -> tuple[float, Counter]:
    """Return the seconds of a fetch, and the counts of `verify`."""
    from datasets.prepare.http import Policy
    from datasets.prepare.pictures import FetchOptions, prepare_pictures

    flags = ["--pictures", str(arguments.pictures), "--side", str(arguments.side), "--latency", str(arguments.latency)]
    command = [sys.executable, "-m", "benchmarks.pictures", *flags, "--serve", str(share)]
    os.environ["NO_PROXY"] = "127.0.0.1"
    with (
        tempfile.TemporaryDirectory() as root,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None  # stdout is a pipe
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
        return seconds, verify(share, arguments, asins, photos, folder)


def verify(share: float, arguments: argparse.Namespace, asins: list[str], photos: Path, folder: Path) -> Counter:
    """Check the manifest, item2img.json and every file against the answers.

    Returns the manifest's counts of "file", "missing" and "broken".
    """
    manifest = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    files, answers = photographs(arguments.side), answer_kinds(share, arguments.pictures)
    for i, (asin, answer) in enumerate(zip(asins, answers, strict=True)):
        kind = "file" if answer in GOOD else "missing" if answer == "404" else "broken"
        intact = kind != "file" or (photos / f"{asin}.jpg").read_bytes() == files[i % len(files)]
        if list(manifest[asin]) != [kind] or not intact:
            raise InputError(f"{asin} got the answer {answer!r} but the manifest has {manifest[asin]}")
    names = {asin: entry["file"] for asin, entry in manifest.items() if "file" in entry}
    on_disk = {path.name for path in photos.iterdir()}
    if json.loads((folder / "item2img.json").read_text(encoding="utf-8")) != names or on_disk != set(names.values()):
        raise InputError("item2img.json or the folder differs from the manifest")
    return Counter(next(iter(entry)) for entry in manifest.values())


# ------------------------------------------------------------------------------------------------------- picture server
# A web server for tests and benchmarks whose pages give good and bad answers.

Page = Callable[["_Handler"], None]


class Server(ThreadingHTTPServer):
    """A server of pages by path.

    pages: path -> page; any other path gets a 404. requests: the requested paths, in order.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, pages: dict[str, Page], latency: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages, self.latency, self.ended = pages, latency, threading.Event()
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Ignore errors: in many tests the client disconnects."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        time.sleep(self.server.latency)
        self.server.pages.get(self.path, status(404))(self)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(pages: dict[str, Page], latency: float = 0.0) -> Iterator[Server]:
    """Run a server in threads of this process; its `url` does not end with a slash."""
    with Server(pages, latency) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


# ------------------------------------------------------------------------------------------------------------- answers


def good(data: bytes, **headers: str) -> Page:
    """Answer with the data; _ in a header's name stands for -."""
    return status(200, data, **headers)


def status(code: int, data: bytes = b"", **headers: str) -> Page:
    """Answer with a status code and the data."""

    def page(handler: _Handler) -> None:
        _head(handler, code, {"Content-Length": str(len(data))} | headers)
        handler.wfile.write(data)

    return page


def redirect(to: str, code: int = 302) -> Page:
    """Redirect to another URL."""
    return status(code, Location=to)


def in_turn(*pages: Page) -> Page:
    """Answer the n-th request with the n-th page, and later ones with the last."""
    remaining = list(pages)

    def page(handler: _Handler) -> None:
        (remaining.pop(0) if len(remaining) > 1 else remaining[0])(handler)

    return page


def cut_short(data: bytes, sent: int) -> Page:
    """Send only the first `sent` bytes, fewer than the Content-Length."""

    def page(handler: _Handler) -> None:
        _head(handler, 200, {"Content-Length": str(len(data))})
        handler.wfile.write(data[:sent])
        handler.close_connection = True

    return page


def stalled(data: bytes = b"") -> Page:
    """Send the header and `data`, then stall."""

    def page(handler: _Handler) -> None:
        _head(handler, 200, {"Content-Length": str(len(data) + 1)})
        handler.wfile.write(data)
        handler.server.ended.wait()
        handler.close_connection = True

    return page


def drip(start: bytes, byte: bytes, seconds: float) -> Page:
    """Send `start`, then the same byte every `seconds`.

    Depending on `start` the bytes belong to a header, a chunk size or a body.
    """

    def page(handler: _Handler) -> None:
        handler.close_connection = True
        handler.wfile.write(start)
        while not handler.server.ended.wait(seconds):
            handler.wfile.write(byte)

    return page


def endless(chunk: bytes, code: int = 200, **headers: str) -> Page:
    """Send the chunk forever, without a Content-Length."""

    def page(handler: _Handler) -> None:
        handler.close_connection = True
        _head(handler, code, {"Transfer-Encoding": "chunked"} | headers)
        while not handler.server.ended.is_set():
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")

    return page


def ranges(data: bytes, etag: str | None = '"1"', drops: tuple[int, ...] = (), honour: bool = True) -> Page:
    """Serve a file with range requests.

    drops: the first answers end after these numbers of bytes. honour=False: ignore range requests.
    """
    remaining = list(drops)

    def page(handler: _Handler) -> None:
        start, requested = 0, handler.headers.get("Range")
        if honour and requested and (etag is None or handler.headers.get("If-Range") == etag):
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Length": str(len(data) - start)} | ({"ETag": etag} if etag else {})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        _head(handler, 206 if start else 200, headers)
        handler.server.requests[-1] += f" from {start}"
        handler.wfile.write(data[start:][: remaining[0] if remaining else None])
        handler.close_connection = bool(remaining)
        remaining[:1] = []

    return page


def _head(handler: _Handler, code: int, headers: dict[str, str]) -> None:
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(format: str = "JPEG", side: int = 64, colour: tuple[int, int, int] = (200, 40, 40)) -> bytes:
    """Return a square gradient in an image format."""
    from PIL import Image

    gradient = Image.linear_gradient("L").resize((side, side))
    image = Image.composite(Image.new("RGB", (side, side), colour), Image.new("RGB", (side, side), "white"), gradient)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def flat_png(width: int, height: int) -> bytes:
    """Return a black 1-bit PNG, which compresses about a thousandfold."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compress(bytes((width // 8 + 2) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


if __name__ == "__main__":
    run_cli(main)
