"""Counters of the server in Prometheus' text format, and the layer that counts and limits its requests."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Container
from typing import Any

MAX_BYTES = 1 << 20  # of one request
JSON = (b"content-type", b"application/json")
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # upper bounds of the histogram


class Metrics:
    """Counters by name, which includes the labels. Any thread may add."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, *names: str, by: float = 1) -> None:
        with self._lock:
            self._counts.update(dict.fromkeys(names, by))

    def took(self, path: str, status: int, seconds: float) -> None:
        """Count one request."""
        buckets = [*(str(bound) for bound in SECONDS if seconds <= bound), "+Inf"]
        names = [f'fmrlrec_request_seconds_bucket{{path="{path}",le="{bound}"}}' for bound in buckets]
        self.add(f'fmrlrec_requests_total{{path="{path}",status="{status}"}}', *names)
        self.add(f'fmrlrec_request_seconds_count{{path="{path}"}}')
        self.add(f'fmrlrec_request_seconds_sum{{path="{path}"}}', by=seconds)

    def text(self, items: int) -> str:
        with self._lock:
            counts = {**self._counts, "fmrlrec_items": items}
        return "".join(f"{name} {count}\n" for name, count in sorted(counts.items()))


class Limited:
    """An ASGI application that refuses large requests and counts and times all of them.

    Starlette's own middleware would take more time than the rest of the server.
    """

    def __init__(self, app: Any, metrics: Metrics, paths: Container[str]) -> None:
        self.app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, headers = time.perf_counter(), 500, dict(scope["headers"])

        async def observed(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        length = headers.get(b"content-length", b"0")  # a request with neither header has no body
        try:
            if not length.isdigit() or int(length) > MAX_BYTES or b"transfer-encoding" in headers:
                await observed({"type": "http.response.start", "status": 413, "headers": [JSON]})
                detail = f"give a Content-Length of at most {MAX_BYTES} bytes"
                await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})
            else:
                await self.app(scope, receive, observed)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.took(path, status, time.perf_counter() - started)
