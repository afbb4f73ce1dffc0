"""The HTTP server under load, against the bare Recommender: p50, p95 and requests a second.

python -m benchmarks.server exports/beauty-64
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common.cli import Parser, run_cli
from serving import Recommender

LENGTHS = (1, 30)  # items of a history, uniformly


def main(argv: Sequence[str] | None = None) -> list[dict[str, float | str]]:
    """Measure, print a table and return its rows."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the export")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="requests of each row (default: 2000)")
    parser.add_argument("--clients", default="1,16", metavar="N,N", help="clients at once (default: 1,16)")
    arguments = parser.parse_args(argv)
    recommender = Recommender.from_pretrained(arguments.folder)
    ids = [recommender.items.id(number) for number in range(1, len(recommender.items) + 1)]
    rng = random.Random(0)
    histories = [rng.choices(ids, k=rng.randint(*LENGTHS)) for _ in range(arguments.requests)]
    rows = [measured("Recommender, 1 thread", lambda: lambda history: recommender.recommend([history]), histories, 1)]
    with server(arguments.folder) as port:
        for clients in map(int, arguments.clients.split(",")):
            rows.append(measured(f"HTTP, {clients} clients", lambda: client(port), histories, clients))
    print(f"{'':24}  p50 ms  p95 ms  requests/s")
    for row in rows:
        print(f"{row['what']:24}  {row['p50_ms']:6.2f}  {row['p95_ms']:6.2f}  {row['per_second']:10.0f}")
    return rows


def measured(
    what: str, connect: Callable[[], Callable], histories: Sequence[list[str]], clients: int
) -> dict[str, float | str]:
    """Return p50, p95 and rate of `clients` threads that each ask their share of the histories, one by one."""

    def run(share: Sequence[list[str]]) -> list[float]:
        ask, milliseconds = connect(), []
        for history in share:
            started = time.perf_counter()
            ask(history)
            milliseconds.append((time.perf_counter() - started) * 1e3)
        return milliseconds

    run(histories[:20])
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = [ms for share in pool.map(run, [histories[i::clients] for i in range(clients)]) for ms in share]
    seconds = time.perf_counter() - started
    p50, p95 = statistics.median(times), statistics.quantiles(times, n=20)[-1]
    return {"what": what, "p50_ms": p50, "p95_ms": p95, "per_second": len(times) / seconds}


def client(port: int) -> Callable[[list[str]], dict]:
    """Return a function that asks the server over one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(history: list[str]) -> dict:
        body = json.dumps({"history": history})
        connection.request("POST", "/recommend", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer

    return ask


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """Run the server in a process of its own; yield its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serving.http", str(folder), "--port", str(port)]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        try:
            yield port
        finally:
            process.terminate()


if __name__ == "__main__":
    run_cli(main)
