"""Measure what each size of a run costs to serve on one core, and how well it recommends; also one-file exports.

python -m benchmarks.deploy                                          # of the newest run
python -m benchmarks.deploy --run experiments/runs/beauty/...        # writes deploy.json and deploy.png into the run
python -m benchmarks.deploy --one_file --browser     # one-file exports; needs chromium, playwright and npm ci
"""

from __future__ import annotations

import argparse
import http.server
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import memory_mb
from common.cli import Parser, run_cli
from common.errors import InputError
from common.files import sha256, write_json
from common.settings import format_value
from serving.export import add_run_arguments, asked_run, export_size, folder_bytes, named_sizes
from serving.export import main as export_sizes

# (engine, how numbers are stored); the first is what the others are compared with
VARIANTS = (("torch", "none"), ("torch", "float16"), ("onnx", "float16"), ("onnx", "int8"))
TOP_K = 10
BATCHES = 20  # of 256 users, timed
ADDED = 10_000  # items added at once
FEW = 100  # candidates
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Export, measure and print the results; write those of a run into its folder. Return them."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_run_arguments(parser)
    parser.add_argument("--size", default="all", metavar="N,N|all", help="sizes to measure (default: all)")
    parser.add_argument("--users", type=int, metavar="N", help="test on the first N users (default: all)")
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="single users to time (default: 500)")
    parser.add_argument(
        "--catalogue", type=int, default=1_000_000, metavar="N", help="items of a large catalogue, timed with the size "
        "nearest to 64 (default: 1000000)",
    )  # fmt: skip
    parser.add_argument(
        "--synthetic", type=int, metavar="N", help="measure only the int8 scan and faiss beside the float32 scan, on N "
        "synthetic items of --size (default 256) for --requests users",
    )  # fmt: skip
    parser.add_argument("--one_file", action="store_true", help="measure only one-file exports, beside the Recommender")
    parser.add_argument("--browser", action="store_true", help="with --one_file: float16 in headless Chromium too")
    parser.add_argument("--measure", nargs=2, metavar=("EXPORT", "ENGINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1], json.load(sys.stdin))))
        return {}
    for name, least in {"users": 1, "requests": 2, "catalogue": TOP_K}.items():
        if (value := getattr(arguments, name)) is not None and value < least:
            raise InputError(f"--{name} {value} must be at least {least}")
    if arguments.synthetic:
        size = 256 if arguments.size == "all" else int(arguments.size)
        with tempfile.TemporaryDirectory() as folder:
            found = measure_scan(size, arguments.synthetic, arguments.requests, Path(folder))
        print("  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return found
    if arguments.one_file:
        return {"one_file": measure_one_file(arguments)}
    from experiments.figures import plot_card
    from experiments.tables import card_table
    from trainer.runs import DEPLOYMENT, DEPLOYMENT_PICTURE, describe_run

    arguments.run = asked_run(arguments)
    print(describe_run(arguments.run), flush=True)
    card = measure_card(arguments)
    write_json(arguments.run / DEPLOYMENT, card)
    plot_card(card, arguments.run / DEPLOYMENT_PICTURE)
    print("\n" + "\n".join(card_table(card)) + f"\nwritten: {arguments.run / DEPLOYMENT} and {DEPLOYMENT_PICTURE}")
    return card


def measure_card(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the content of deploy.json."""
    from common.devices import cpu_name
    from dataloader import eval_rows
    from model import FMRLRec
    from trainer.load_run import load_run
    from trainer.runs import WEIGHTS, environment

    flags = {"device": "cpu"} | ({"data_root": arguments.data_root} if arguments.data_root else {})
    config, catalog, model = load_run(arguments.run, flags)
    assert isinstance(model, FMRLRec)  # asked_run refused others
    sizes = named_sizes(arguments.size, config.mrl_hidden_sizes)
    if catalog.num_items < TOP_K:
        raise InputError(f"{config.dataset_code} has {catalog.num_items} items, fewer than the {TOP_K} to recommend")
    asked = eval_rows(catalog.sequences, config.lru_max_len, "test")
    asked = asked.part(0, arguments.users or len(asked))
    histories = [
        [catalog.asins[item - 1] for item in asked.items[begin:end]]
        for begin, end in zip(asked.begins, asked.ends, strict=True)
    ]
    targets = asked.targets.tolist()
    # Of at least two: a percentile needs them.
    some, rows, large = (histories * 2)[: max(2, min(arguments.requests, len(histories)))], [], None
    for size in sizes:
        plain: list = []
        for engine, quantize in VARIANTS:
            with tempfile.TemporaryDirectory() as folder:
                export = Path(folder, f"{config.dataset_code}-{size}")
                export_size(
                    model, size, export, config=config, catalog=catalog, run=arguments.run,
                    format="onnx" if engine == "onnx" else "torch", quantize=quantize,
                )  # fmt: skip
                row = {"size": size, "engine": engine, "quantize": quantize}
                row["bytes"] = folder_bytes(export)
                row |= measure_in_subprocess(export, engine, some)
                answers = answer(export, engine, histories)
                plain = plain or answers
                row |= accuracy(answers, targets) | {"same_top10": same_items(answers, plain)}
                if engine == "onnx":
                    by_torch = answer(export, "torch", histories)
                    row |= {
                        "same_top10_as_torch": same_items(answers, by_torch),
                        "largest_difference_from_torch": largest_difference(answers, by_torch),
                    }
                rows.append(row)
                print(line(row), flush=True)
                if size == min(sizes, key=lambda m: abs(m - 64)) and (engine, quantize) == ("onnx", "float16"):
                    before = measure_large_catalogue(
                        export, arguments.catalogue, Path(folder, "large"), histories[:100]
                    )
                    large = {"size": size} | before
    return {
        "dataset": config.dataset_code,
        "run": arguments.run.resolve().name,
        "weights": sha256(arguments.run / WEIGHTS),
        "users": len(targets),
        "items": catalog.num_items,
        "sizes": format_value(tuple(sizes)),
        "rows": rows,
        "large_catalogue": large,
        "environment": environment("one core, " + cpu_name()),
    }


def measure_in_subprocess(export: Path, engine: str, histories: list[list[str]]) -> dict[str, float | None]:
    """Run `measure` in a new Python process on one core."""
    command = [sys.executable, "-m", "benchmarks.deploy", "--measure", str(export), engine]
    environment = (
        os.environ | ONE_CORE | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    )
    done = subprocess.run(
        command, input=json.dumps(histories), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def measure(export: Path, engine: str, histories: list[list[str]]) -> dict[str, float | None]:
    """Return load time, memory and latencies of an export, measured in this process on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    started = time.perf_counter()
    from serving import Recommender

    recommender = Recommender.from_pretrained(export, engine, threads=1)
    recommender.recommend([histories[0]], top_k=TOP_K)
    loaded = time.perf_counter() - started
    torch_imported = "torch" in sys.modules
    single = timed([partial(recommender.recommend, [history], top_k=TOP_K) for history in histories])
    resident, state = memory_mb("VmRSS"), recommender.start(histories[0])

    def event(item: str) -> None:
        recommender.recommend([recommender.step(state, item)], top_k=TOP_K)

    steps = timed([partial(event, history[-1]) for history in histories])
    batch = (histories * (256 // len(histories) + 1))[:256]
    together = timed([lambda: recommender.recommend(batch, top_k=TOP_K)] * BATCHES)
    few = [recommender.items.id(number) for number in range(1, min(FEW, len(recommender)) + 1)]
    among = timed([partial(recommender.recommend, [history], TOP_K, True, few) for history in histories])
    peak, added, added_one = memory_mb("VmHWM"), None, None
    if width := recommender.config["features"]["dim"]:
        features = np.random.default_rng(0).normal(size=(ADDED, width)).astype(np.float32)
        started = time.perf_counter()
        recommender.add_items([f"added {number}" for number in range(ADDED)], features)
        added = time.perf_counter() - started
        names = map("one {}".format, itertools.count())
        added_one = statistics.median(timed([lambda: recommender.add_items([next(names)], features[:1])] * BATCHES))
    return {
        "load_s": loaded,
        "torch_imported": torch_imported,
        "resident_mb": resident,
        "peak_mb": peak,
        "p50_ms": statistics.median(single),
        "p95_ms": statistics.quantiles(single, n=20)[-1],
        "step_p50_ms": statistics.median(steps),
        "batch256_p50_ms": statistics.median(together),
        "batch256_p95_ms": statistics.quantiles(together, n=20)[-1],
        "candidates100_p50_ms": statistics.median(among),
        "add_10000_s": added,
        "add_1_ms": added_one,
    }


def timed(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the milliseconds of each call, after a warm-up call."""
    calls[0]()
    milliseconds = []
    for call in calls:
        started = time.perf_counter()
        call()
        milliseconds.append((time.perf_counter() - started) * 1e3)
    return milliseconds


def answer(export: Path, engine: str, histories: list[list[str]]) -> list:
    """Return all users' recommendations; the history is kept among the candidates, as the paper tests."""
    from serving import Recommender

    return Recommender.from_pretrained(export, engine).recommend(histories, top_k=TOP_K, exclude_history=False)


def accuracy(answers: list, targets: list[int]) -> dict[str, float]:
    """Return Recall@10 and NDCG@10. Of items with the same score the lower number comes first; eval.py averages."""
    import torch

    from trainer.evaluation import ranking_metrics

    ranks = [ranked.index(target) + 1 if target in ranked else TOP_K + 1
             for ranked, target in zip((answer.numbers for answer in answers), targets, strict=True)]  # fmt: skip
    metrics = ranking_metrics(torch.tensor(ranks), (TOP_K,))
    return {name: metrics[name] for name in (f"Recall@{TOP_K}", f"NDCG@{TOP_K}")}


def same_items(answers: list, others: list) -> float:
    """Return the share of users who get the same ten items."""
    same = [set(one.numbers) == set(other.numbers) for one, other in zip(answers, others, strict=True)]
    return sum(same) / len(same)


def largest_difference(answers: list, others: list) -> float:
    """Return the largest difference of the ten best scores, over all users."""
    pairs = zip(answers, others, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one.scores, other.scores, strict=True))


def measure_large_catalogue(export: Path, num_items: int, folder: Path, histories: list[list[str]]) -> dict[str, Any]:
    """Measure the same model with a catalogue of `num_items`: the real items, then made-up ones."""
    from serving.folder import ITEMS, make_items, pack_items, read_folder, write_folder

    real = read_folder(export)
    more = max(0, num_items - len(real.items))
    rng = np.random.default_rng(0)
    made_up = rng.normal(real.table.mean(), real.table.std(), (more, real.table.shape[1])).astype(np.float16)
    items = make_items([f"made up {number}" for number in range(more)], ["A made-up product"] * more)
    table = np.concatenate([real.table.astype(np.float16), made_up])
    files = {name: export / name for name in real.config["files"]}
    files |= {ITEMS: pack_items(real.items.extended(items), table, None)}
    write_folder(folder, real.config | {"num_items": len(table) - 1}, files)
    count = len(table) - 1
    del table, made_up, items, real
    row = measure_in_subprocess(folder, "onnx", histories)
    return {"items": count, **row}


def measure_scan(size: int, num_items: int, users: int, folder: Path) -> dict[str, float]:
    """Compare the indices (serving/index.py) with the float32 scan of a synthetic table on one core.

    The singular values of items and users decay as i^(-2/3), as those of trained tables do: .16 of the first at 16, .06
    at 64, .015 at 256 on Beauty. Rows of independent numbers have no structure that a quantizer could use.

    The table is a memory-mapped file in `folder`, so that only the indices must fit into memory. The float32 scan is
    fair if the file fits into the page cache.
    """
    from serving.engines import Table, best_columns
    from serving.folder import FAISS, INDEX, SCAN
    from serving.graphs import build_scan
    from serving.index import FaissIndex, Int8Index, build_faiss, build_index, import_faiss

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rng = np.random.default_rng(0)
    spectrum = (np.linalg.qr(rng.standard_normal((size, size)))[0] * np.arange(1, size + 1) ** (-2 / 3)).T
    spectrum = spectrum.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table").open("wb") as file:
        for start in range(0, num_items + 1, 1 << 16):
            count = min(1 << 16, num_items + 1 - start)
            (rng.standard_normal((count, size), dtype=np.float32) @ spectrum).tofile(file)
    rows = np.memmap(folder / "table", np.float32, "r", shape=(num_items + 1, size)).view(np.ndarray)
    import_faiss().omp_set_num_threads(1)
    packed = build_index(rows)
    (folder / INDEX).write_bytes(packed)
    (folder / SCAN).write_bytes(build_scan(packed))
    del packed
    started = time.process_time()
    (folder / FAISS).write_bytes(build_faiss(rows))
    built = time.process_time() - started
    index, table, approximate = (
        Int8Index(folder, rows.shape, threads=1),
        Table(rows, None),
        FaissIndex(folder, rows.shape),
    )
    bias = np.zeros((1, len(rows)), np.float32)
    bias[0, 0] = -np.inf
    times: dict[str, list[float]] = {"int8": [], "faiss": [], "float32": []}
    different = hits = 0
    for z in rng.standard_normal((users, size), dtype=np.float32) @ spectrum:
        clock = [time.process_time()]  # CPU time: other processes do not count
        _, items = index.rank(z[None], table, bias, TOP_K)
        clock.append(time.process_time())
        _, near = approximate.rank(z[None], table, bias, TOP_K)
        clock.append(time.process_time())
        exact = best_columns((rows @ z + bias[0])[None], TOP_K)
        clock.append(time.process_time())
        different += int((items != exact).any())
        hits += len(np.intersect1d(near, exact))
        for of, seconds in zip(times.values(), np.diff(clock), strict=True):
            of.append(float(seconds) * 1e3)
    found = {f"{name}_p50_ms": statistics.median(of) for name, of in times.items()}
    ratios = {f"{name}_ratio": found["float32_p50_ms"] / found[f"{name}_p50_ms"] for name in ("int8", "faiss")}
    recall = {"int8_different": different, "faiss_recall": hits / (users * TOP_K), "faiss_build_s": built}
    return {"items": num_items, "size": size, "users": users, **recall, **found, **ratios}


def line(row: dict[str, Any]) -> str:
    """Return one row as text."""
    return (
        f"{row['size']:5d} {row['engine']:5} {row['quantize']:7}  {row['bytes'] / 1e6:7.2f} MB  "
        f"load {row['load_s']:.2f} s  p50 {row['p50_ms']:.2f} ms  NDCG@10 {row['NDCG@10']:.4f}  "
        f"same top 10 {row['same_top10']:.2%}"
    )


# ----------------------------------------------------------------------------------------------------- one-file exports
# Their bytes, their milliseconds in Python and in a browser, and whether they answer as the Recommender does from an
# export that is stored in the same way.

CHROMIUM_FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
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


def measure_one_file(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print a table and return its rows."""
    from datasets.catalog import load_catalog
    from serving.hub import MODEL
    from serving.weights import TABLES
    from trainer.runs import read_config

    run = asked_run(arguments)
    config, _ = read_config(run)
    sizes = named_sizes(arguments.size, config.mrl_hidden_sizes)
    where = ["--run", str(run), *(["--data_root", arguments.data_root] if arguments.data_root else [])]
    sequences = load_catalog(arguments.data_root or config.data_root, config.dataset_code).sequences
    users = range(len(sequences))[: arguments.users]
    histories = [sequences.of(user)[:-1].tolist() for user in users]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        browser = browser_ms(Path(temporary), where, sizes, histories) if arguments.browser else {}
        for quantize in TABLES:
            flags = [*where, "--quantize", quantize, "--size", arguments.size]
            files = export_sizes([*flags, "--format", "onnx-file", "--out", f"{temporary}/{quantize}-file/size"])
            folders = export_sizes([*flags, "--out", f"{temporary}/{quantize}/size"])
            for size, file, folder in zip(sizes, files, folders, strict=True):
                row = {"size": size, "stored": quantize, **measure_file(file / MODEL, folder, histories)}
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


def measure_file(file: Path, folder: Path, histories: list[list[int]]) -> dict[str, Any]:
    """Return bytes, milliseconds of an answer, and how many answers have the ten items of the torch engine."""
    import onnxruntime

    from serving import Recommender

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
    handler = partial(_Quiet, directory=page)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS.split())
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
