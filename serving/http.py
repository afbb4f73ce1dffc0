"""Serve an export over HTTP: a small server on FastAPI and uvicorn, the packages of the extra `http`.

python -m serving.http exports/beauty-64 --port 8000        # installed: fmrlrec-serve

POST /recommend  {"history": ["ID"], "top_k": 10, "exclude_history": true, "candidates": ["ID"]}; "state" for "history"
POST /similar    {"items": ["ID"], "top_k": 10}
POST /events     {"state": "...", "item": "ID"} -> {"state": "..."}, the state after one more item; new without "state"
POST /reload     opens the folder again if its export changed
GET  /health, /version, /metrics (Prometheus' text format)

A state is base64 of State.to_bytes; the client keeps it. Waiting requests are answered together.
The server knows no accounts: put it behind a proxy that does, and let nobody else reach /reload.
"""

import asyncio
import base64
import binascii
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Container, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from common.cli import Parser, run_cli
from common.errors import InputError
from serving import __version__
from serving.recommender import Recommendation, Recommender
from serving.states import State

MAX_ITEMS, MAX_SIMILAR, MAX_TOP_K = 10_000, 64, 1_000  # of one request


def create_app(recommender: Recommender) -> Any:
    """Return the FastAPI application. Raises InputError if FastAPI is not installed."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, PlainTextResponse
        from pydantic import BaseModel, Field, StrictInt, StrictStr
    except ImportError as error:
        raise InputError(f"the server needs FastAPI and uvicorn ({error}): pip install '.[http]'") from error

    batcher = Batcher(recommender, metrics := Metrics())

    class Recommend(BaseModel, extra="forbid"):
        history: list[StrictStr | StrictInt] = Field([], max_length=MAX_ITEMS)
        state: str | None = None
        top_k: int = Field(10, ge=1, le=MAX_TOP_K)
        exclude_history: bool = True
        candidates: list[StrictStr | StrictInt] | None = Field(None, max_length=MAX_ITEMS)

    class Similar(BaseModel, extra="forbid"):
        items: list[StrictStr | StrictInt] = Field(max_length=MAX_SIMILAR)
        top_k: int = Field(10, ge=1, le=MAX_TOP_K)

    class Event(BaseModel, extra="forbid"):
        state: str | None = None
        item: StrictStr | StrictInt

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="fmrlrec", version=__version__, lifespan=lifespan)

    @app.exception_handler(InputError)
    @app.exception_handler(asyncio.QueueFull)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        status = 400 if isinstance(error, InputError) else 503
        return JSONResponse({"detail": str(error) or "too many requests wait; try again"}, status)

    @app.post("/recommend")
    async def recommend(body: Recommend) -> JSONResponse:
        if body.history and body.state:
            raise InputError("give a history or a state, not both")
        options = body.model_dump(include={"top_k", "exclude_history", "candidates"})
        answer = await batcher.ask(_state(body.state) if body.state else body.history, options)
        metrics.add("fmrlrec_unknown_ids_total", by=answer.unknown)
        return JSONResponse(vars(answer))

    @app.post("/similar")
    def similar(body: Similar) -> JSONResponse:
        metrics.add("fmrlrec_unknown_ids_total", by=len(recommender.items.known(body.items)[1]))
        return JSONResponse([vars(answer) for answer in recommender.similar_items(body.items, body.top_k)])

    @app.post("/events")
    def events(body: Event) -> dict[str, str]:
        metrics.add("fmrlrec_unknown_ids_total", by=int(recommender.items.number(body.item) == 0))
        after = recommender.step(_state(body.state) if body.state else recommender.start(), body.item)
        return {"state": base64.b64encode(after.to_bytes()).decode()}

    @app.post("/reload")
    def reload() -> dict[str, Any]:
        return {"reloaded": recommender.reload(), "model": recommender.model}

    @app.get("/health")
    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "model": recommender.model, "items": len(recommender)}

    @app.get("/metrics")
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(len(recommender)), media_type="text/plain; version=0.0.4")

    return Limited(app, metrics, app.openapi()["paths"])


def _state(text: str) -> State:
    try:
        return State.from_bytes(base64.b64decode(text, validate=True))
    except binascii.Error:
        raise InputError("the state is not base64; send it as /events returned it") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Open an export and serve it until the process is stopped."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for name, default, help in (("--port", 8000, "to listen on"), ("--threads", 1, "of onnxruntime")):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{help} (default: {default})")
    arguments = parser.parse_args(argv)
    app = create_app(Recommender.from_pretrained(arguments.folder, threads=arguments.threads))
    from uvicorn import run  # create_app said what to install

    run(app, host=arguments.host, port=arguments.port, log_level="warning", access_log=False)


command = partial(run_cli, main)  # fmrlrec-serve, installed

# -------------------------------------------------------------------------------------------------------------- metrics
# Counters of the server in Prometheus' text format, and the layer that counts and limits its requests.

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

        length = headers.get(b"content-length", b"0" if scope["method"] == "GET" else b"")
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


# ------------------------------------------------------------------------------------------------------------- batching
# Micro-batching: requests that arrive while others are computed are answered together.

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


if __name__ == "__main__":
    command()
