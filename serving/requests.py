"""Requests of the HTTP server: counted, limited, and answered together if they arrive while others are computed."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

from serving.engines import State
from serving.recommender import Recommendation, Recommender

# -------------------------------------------------------------------------------------------------- counters and limits
# Counters in Prometheus' text format, and the layer that counts and limits the requests.

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


# -------------------------------------------------------------------------------------------------------------- batches

TOGETHER = 64  # requests in a batch
FEW_ITEMS = 1 << 16  # in a smaller catalogue, one answer costs less than waking a thread twice
MAX_WAITING = 1_000  # more are refused


class Batcher:
    """Answers waiting requests together: while one batch is computed, the next requests queue up."""

    def __init__(self, recommender: Recommender, metrics: Metrics) -> None:
        self._recommender, self._metrics = recommender, metrics
        self._waiting: asyncio.Queue[tuple[asyncio.Future, Any, dict[str, Any]]] = asyncio.Queue(MAX_WAITING)

    async def ask(self, history: Sequence | State, options: dict[str, Any]) -> Recommendation:
        """Return the answer. Raises asyncio.QueueFull if too many requests wait."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((future, history, options))
        return await future

    async def run(self) -> None:
        """Answer requests for ever."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < TOGETHER and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            self._metrics.add("fmrlrec_batches_total")
            self._metrics.add("fmrlrec_batched_requests_total", by=len(batch))
            requests = [(history, options) for _, history, options in batch]
            if len(batch) == 1 and len(self._recommender.items) <= FEW_ITEMS:
                outcomes = self._answer(requests)
            else:
                outcomes = await asyncio.to_thread(self._answer, requests)
            for (future, *_), outcome in zip(batch, outcomes, strict=True):
                if not future.done():  # the client may be gone
                    is_error = isinstance(outcome, Exception)
                    future.set_exception(outcome) if is_error else future.set_result(outcome)

    def _answer(self, requests: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
        """Return an answer or an exception for each request; those with like options are computed together."""
        outcomes: list[Any] = [None] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for row, (_, options) in enumerate(requests):
            key = options["top_k"], options["exclude_history"], options["candidates"] is None
            groups.setdefault(key, []).append(row)
        for (top_k, exclude_history, every_item), rows in groups.items():
            candidates = None if every_item else [requests[row][1]["candidates"] for row in rows]
            answers: list[Any]
            try:
                answers = self._recommender.recommend(
                    [requests[row][0] for row in rows], top_k, exclude_history, candidates
                )
            except Exception as error:
                # One bad request must not fail the others.
                answers = [error] if len(rows) == 1 else [self._answer([requests[row]])[0] for row in rows]
            for row, answer in zip(rows, answers, strict=True):
                outcomes[row] = answer
        return outcomes
