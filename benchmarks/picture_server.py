"""A web server for tests and benchmarks: every path answers in a way of its own, good or bad."""

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
    """pages: path -> how it answers; others answer 404. requests: the paths that were asked for, in order."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, pages: dict[str, Page], latency: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages, self.latency, self.ended = pages, latency, threading.Event()
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that goes is what many tests are about."""


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
    """A server in threads of this process; its `url` has no slash at the end."""
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
    """The data; a header's name has _ for -."""
    return status(200, data, **headers)


def status(code: int, data: bytes = b"", **headers: str) -> Page:
    def page(handler: _Handler) -> None:
        _head(handler, code, {"Content-Length": str(len(data))} | headers)
        handler.wfile.write(data)

    return page


def redirect(to: str, code: int = 302) -> Page:
    return status(code, Location=to)


def in_turn(*pages: Page) -> Page:
    """The first page to the first request, and so on; the last to all later ones."""
    left = list(pages)

    def page(handler: _Handler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(handler)

    return page


def cut_short(data: bytes, sent: int) -> Page:
    """`sent` bytes of the data, though the header promises all."""

    def page(handler: _Handler) -> None:
        _head(handler, 200, {"Content-Length": str(len(data))})
        handler.wfile.write(data[:sent])
        handler.close_connection = True

    return page


def stalled(data: bytes = b"") -> Page:
    """The header and `data`, then nothing."""

    def page(handler: _Handler) -> None:
        _head(handler, 200, {"Content-Length": str(len(data) + 1)})
        handler.wfile.write(data)
        handler.server.ended.wait()
        handler.close_connection = True

    return page


def drip(start: bytes, byte: bytes, seconds: float) -> Page:
    """`start`, then the byte again and again: of a header, a chunk's size or a body, as `start` leads to."""

    def page(handler: _Handler) -> None:
        handler.close_connection = True
        handler.wfile.write(start)
        while not handler.server.ended.wait(seconds):
            handler.wfile.write(byte)

    return page


def endless(chunk: bytes, code: int = 200, **headers: str) -> Page:
    """The chunk again and again, without a Content-Length."""

    def page(handler: _Handler) -> None:
        handler.close_connection = True
        _head(handler, code, {"Transfer-Encoding": "chunked"} | headers)
        while not handler.server.ended.is_set():
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")

    return page


def ranges(data: bytes, etag: str | None = '"1"', drops: tuple[int, ...] = (), honour: bool = True) -> Page:
    """A file that can be asked for from any byte on. drops: after how many bytes the first answers break off.
    honour=False: as a server that knows no ranges."""
    left = list(drops)

    def page(handler: _Handler) -> None:
        start, asked = 0, handler.headers.get("Range")
        if honour and asked and (etag is None or handler.headers.get("If-Range") == etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Length": str(len(data) - start)} | ({"ETag": etag} if etag else {})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        _head(handler, 206 if start else 200, headers)
        handler.server.requests[-1] += f" from {start}"
        handler.wfile.write(data[start:][: left[0] if left else None])
        handler.close_connection = bool(left)
        left[:1] = []

    return page


def _head(handler: _Handler, code: int, headers: dict[str, str]) -> None:
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(form: str = "JPEG", side: int = 64, colour: tuple[int, int, int] = (200, 40, 40)) -> bytes:
    """A square of a gradient in the format."""
    from PIL import Image

    gradient = Image.linear_gradient("L").resize((side, side))
    image = Image.composite(Image.new("RGB", (side, side), colour), Image.new("RGB", (side, side), "white"), gradient)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def flat_png(width: int, height: int) -> bytes:
    """A whole PNG, all black: about a bit for eight pixels, before the compression, which leaves a thousandth."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compress(bytes((width // 8 + 2) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
