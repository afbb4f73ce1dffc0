"""One-file exports of a run: bytes, milliseconds in Python and in a browser, and the Recommender's answers.

python -m benchmarks.onnx_file --dataset_code demo --browser      # needs chromium, playwright and npm ci

The answers of the test users are compared with the Recommender's, from an export stored in the same way.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import Parser, run_cli
from common.errors import InputError
from datasets.catalog import load_catalog
from serving import Recommender, export
from serving.hub import MODEL
from serving.weights import TABLES
from trainer.runs import read_config

FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
BROWSER_REQUESTS = 200
ASK = """async ([size, histories]) => {
  const { recommend } = await import("./page.js");
  const times = [];
  for (const items of histories) {
    const start = performance.now();
    await recommend(size, items);
    times.push(performance.now() - start);
  }
  return times;
}"""


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table and return its rows."""
    parser = Parser(description=str(__doc__).splitlines()[0])
    export.add_run_arguments(parser)
    parser.add_argument("--size", default="all", metavar="N,N|all", help="trained sizes (default: all)")
    parser.add_argument("--users", type=int, metavar="N", help="test users compared (default: all)")
    parser.add_argument("--browser", action="store_true", help="also measure float16 in headless Chromium")
    arguments = parser.parse_args(argv)
    run = export.asked_run(arguments)
    config, _ = read_config(run)
    sizes = export.named_sizes(arguments.size, config.mrl_hidden_sizes)
    where = ["--run", str(run), *(["--data_root", arguments.data_root] if arguments.data_root else [])]
    sequences = load_catalog(arguments.data_root or config.data_root, config.dataset_code).sequences
    users = range(len(sequences))[: arguments.users]
    histories = [sequences.of(user)[:-1].tolist() for user in users]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        browser = browser_ms(Path(temporary), where, sizes, histories) if arguments.browser else {}
        for quantize in TABLES:
            flags = [*where, "--quantize", quantize, "--size", arguments.size]
            files = export.main([*flags, "--format", "onnx-file", "--out", f"{temporary}/{quantize}-file/size"])
            folders = export.main([*flags, "--out", f"{temporary}/{quantize}/size"])
            for size, file, folder in zip(sizes, files, folders, strict=True):
                row = {"size": size, "stored": quantize, **measured(file / MODEL, folder, histories)}
                rows.append(row | {"browser_ms": browser.get(size) if quantize == "float16" else None})
    print(f"{run}: {len(histories)} test users; medians of one answer, 1 thread")
    print("  size  stored       MB  Python ms  browser ms  same ten items")
    for row in rows:
        there = f"{row['browser_ms']:10.2f}" if row["browser_ms"] is not None else f"{'':10}"
        print(
            f"{row['size']:6}  {row['stored']:8}  {row['bytes'] / 1e6:5.2f}  {row['python_ms']:9.2f}  {there}  "
            f"{row['same']} of {len(histories)}"
        )
    return rows


def measured(file: Path, folder: Path, histories: list[list[int]]) -> dict[str, Any]:
    """Return bytes, milliseconds of an answer, and how many answers have the ten items of the torch engine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    expected = Recommender.from_pretrained(folder).recommend(histories)
    exclude, times, same = np.array([True]), [], 0
    for history, answer in zip(histories, expected, strict=True):
        start = time.perf_counter()
        items = session.run(["items"], {"history": np.array([history]), "exclude_history": exclude})[0]
        times.append((time.perf_counter() - start) * 1e3)
        same += set(items[0].tolist()) == set(answer.numbers)
    return {"bytes": file.stat().st_size, "python_ms": statistics.median(times), "same": same}


def browser_ms(temporary: Path, where: list[str], sizes: list[int], histories: list[list[int]]) -> dict[int, float]:
    """Return size -> median milliseconds of an answer in headless Chromium, by serving.page's models."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise InputError(f"--browser needs playwright ({error}): pip install -r requirements-dev.txt") from error
    from serving.page.__main__ import main as write_page

    if (chromium := shutil.which("chromium")) is None:
        raise InputError("--browser needs chromium: apt-get install chromium")
    page = write_page([*where[1:], "--out", str(temporary / "page")])
    handler = functools.partial(_Quiet, directory=page)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS.split())
        tab = browser.new_page()
        tab.goto(f"http://127.0.0.1:{server.server_port}/")
        tab.wait_for_selector("#best > li")
        times = {size: tab.evaluate(ASK, [size, histories[:BROWSER_REQUESTS]]) for size in sizes}
        browser.close()
    server.shutdown()
    return {size: statistics.median(of_size) for size, of_size in times.items()}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    run_cli(main)
