"""A web server for tests and benchmarks whose pages give good and bad answers."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
