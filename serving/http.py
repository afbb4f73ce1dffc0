"""Serve an export over HTTP: a small server on FastAPI and uvicorn, the packages of the extra `http`.

python -m serving.http exports/beauty-64 --port 8000        # installed: fmrlrec-serve

POST /recommend  {"history": ["ID"], "top_k": 10, "exclude_history": true, "candidates": ["ID"]}; "state" for "history"
POST /similar    {"items": ["ID"], "top_k": 10}
POST /events     {"state": "...", "item": "ID"} -> {"state": "..."}, the state after one more item; new without "state"
POST /reload     opens the folder again if its export changed
GET  /health, /version, /metrics (Prometheus' text format)

A state is base64 of State.to_bytes; the client keeps it. Waiting requests are answered together (serving/requests.py).
The server knows no accounts: put it behind a proxy that does, and let nobody else reach /reload.
"""

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from common.cli import Parser, run_cli
from common.errors import InputError
from serving import __version__
from serving.engines import State
from serving.recommender import Recommender
from serving.requests import Batcher, Limited, Metrics

MAX_ITEMS, MAX_SIMILAR, MAX_TOP_K = 10_000, 64, 1_000  # of one request


def create_app(recommender: Recommender) -> Any:
    """Return the FastAPI application. Raises InputError if FastAPI is not installed."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse, PlainTextResponse, Response
        from pydantic import BaseModel, Field, StrictInt, StrictStr
    except ImportError as error:
        raise InputError(f"the server needs FastAPI and uvicorn ({error}): pip install '.[http]'") from error

    batcher = Batcher(recommender, metrics := Metrics())

    class Recommend(BaseModel, extra="forbid"):
        history: list[StrictStr | StrictInt] = Field([], max_length=MAX_ITEMS)
        state: str | None = None
        top_k: StrictInt = Field(10, ge=1, le=MAX_TOP_K)
        exclude_history: bool = True
        candidates: list[StrictStr | StrictInt] | None = Field(None, max_length=MAX_ITEMS)

    class Similar(BaseModel, extra="forbid"):
        items: list[StrictStr | StrictInt] = Field(max_length=MAX_SIMILAR)
        top_k: StrictInt = Field(10, ge=1, le=MAX_TOP_K)

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

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # In ASCII and without the input, which may hold NaN and lone surrogates.
        problems = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
        return Response(json.dumps({"detail": problems}), 422, media_type="application/json")

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
    except ValueError:  # also of text that is not ASCII
        raise InputError("the state is not base64; send it as /events returned it") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Open an export and serve it until the process is stopped."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for name, default, help in (("--port", 8000, "port to listen on"), ("--threads", 1, "threads of onnxruntime")):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{help} (default: {default})")
    arguments = parser.parse_args(argv)
    app = create_app(Recommender.from_pretrained(arguments.folder, threads=arguments.threads))
    try:
        family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
        socket.create_server((arguments.host, arguments.port), family=family).close()
    except (OSError, OverflowError):
        raise InputError(
            f"--host {arguments.host} --port {arguments.port}: cannot listen there; the port is taken or reserved, or "
            f"the address is not this machine's; give a free --port, such as {8000 if arguments.port != 8000 else 8001}"
        ) from None
    from uvicorn import run  # create_app said what to install

    run(app, host=arguments.host, port=arguments.port, log_level="warning", access_log=False)


command = partial(run_cli, main)  # fmrlrec-serve, installed

if __name__ == "__main__":
    command()
