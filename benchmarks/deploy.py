"""The card of a run's family of models: what every size costs to serve on one core, and how well it recommends.

python -m benchmarks.deploy                                          # of the newest run
python -m benchmarks.deploy --run experiments/runs/beauty/...        # writes deploy.json and deploy.png into the run
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from config import run_cli, shown
from datasets.files import write_json
from model.export import add_run_arguments, asked_run, chosen_sizes, export_size

# (engine, how numbers are stored); the first is what the others are compared with
VARIANTS = (("torch", "none"), ("torch", "float16"), ("onnx", "float16"), ("onnx", "int8"))
TOP_K = 10
BATCHES = 20  # of 256 users, timed
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Export, measure, print and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_arguments(parser)
    parser.add_argument("--size", default="all", metavar="N,N|all", help="its sizes to measure (default: all)")
    parser.add_argument("--users", type=int, metavar="N", help="test on the first N users (default: all)")
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="single users timed (default: 500)")
    parser.add_argument(
        "--catalogue", type=int, default=1_000_000, metavar="N", help="items of the large catalogue that the size "
        "nearest to 64 is timed with, and of which 10,000 are added (default: 1000000)",
    )  # fmt: skip
    parser.add_argument("--measure", nargs=2, metavar=("EXPORT", "ENGINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1], json.load(sys.stdin))))
        return {}
    arguments.run = asked_run(arguments)
    card = measured_card(arguments)
    write_json(arguments.run / "deploy.json", card)
    from trainer.plots import plot_deployment

    plot_deployment(card["rows"], f"{card['dataset']}: one user on one core", arguments.run / "deploy.png")
    print("\n" + "\n".join(card_table(card)) + f"\n\nwritten: {arguments.run / 'deploy.json'} and deploy.png")
    return card


def measured_card(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that deploy.json holds."""
    from eval import load_run
    from trainer.runs import environment

    flags = {"device": "cpu"} | ({"data_root": arguments.data_root} if arguments.data_root else {})
    config, catalog, model = load_run(arguments.run, flags)
    arguments.max_bytes = arguments.max_latency_ms = None
    sizes = chosen_sizes(arguments, config)
    users = range(min(arguments.users or len(catalog.sequences), len(catalog.sequences)))
    histories = [catalog.sequences.of(user)[:-1].tolist() for user in users]
    targets = [int(catalog.sequences.of(user)[-1]) for user in users]
    rows, large = [], None
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
                row["bytes"] = sum(path.stat().st_size for path in export.iterdir())
                row |= in_a_process_of_its_own(export, engine, histories[: arguments.requests])
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
                    large = large_catalogue(export, arguments.catalogue, Path(folder, "large"), histories)
    return {
        "dataset": config.dataset_code,
        "run": arguments.run.name,
        "users": len(users),
        "items": catalog.num_items,
        "sizes": shown(tuple(sizes)),
        "rows": rows,
        "large_catalogue": large,
        "environment": environment("one core, " + cpu_name()),
    }


def in_a_process_of_its_own(export: Path, engine: str, histories: list[list[int]]) -> dict[str, float]:
    """`measure` in a fresh Python on one core."""
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


def measure(export: Path, engine: str, histories: list[list[int]]) -> dict[str, float]:
    """Load time, resident memory and latencies of an export in this process, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    started = time.perf_counter()
    from model import Recommender

    recommender = Recommender.from_pretrained(export, engine, threads=1)
    recommender.recommend([histories[0]], top_k=TOP_K)
    loaded = time.perf_counter() - started
    torch_imported = "torch" in sys.modules
    single = timed([lambda history=history: recommender.recommend([history], top_k=TOP_K) for history in histories])
    state = recommender.start(histories[0])
    resident, peak = memory("VmRSS"), memory("VmHWM")

    def event(item: int) -> None:
        recommender.recommend([recommender.step(state, item)], top_k=TOP_K)

    steps = timed([lambda history=history: event(history[-1]) for history in histories])
    batch = (histories * (256 // len(histories) + 1))[:256]
    together = timed([lambda: recommender.recommend(batch, top_k=TOP_K)] * BATCHES)
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
    }


def memory(kind: str) -> float:
    """MB of this process: resident (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{kind}:")[2].split()[0]) / 1e3


def timed(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Milliseconds of each call, after one that warms up."""
    calls[0]()
    milliseconds = []
    for call in calls:
        started = time.perf_counter()
        call()
        milliseconds.append((time.perf_counter() - started) * 1e3)
    return milliseconds


def answer(export: Path, engine: str, histories: list[list[int]]) -> list:
    """Every user's recommendations, their history kept among the candidates as the paper tests."""
    from model import Recommender

    return Recommender.from_pretrained(export, engine).recommend(histories, top_k=TOP_K, exclude_history=False)


def accuracy(answers: list, targets: list[int]) -> dict[str, float]:
    """Recall@10 and NDCG@10 of answers in which items are ranked."""
    import torch

    from trainer.metrics import ranking_metrics

    ranks = [ranked.index(target) + 1 if target in ranked else TOP_K + 1
             for ranked, target in zip((answer.numbers for answer in answers), targets, strict=True)]  # fmt: skip
    metrics = ranking_metrics(torch.tensor(ranks), (TOP_K,))
    return {name: metrics[f"{name}"] for name in (f"Recall@{TOP_K}", f"NDCG@{TOP_K}")}


def same_items(answers: list, others: list) -> float:
    """The share of users who get the same ten items."""
    same = [set(one.numbers) == set(other.numbers) for one, other in zip(answers, others, strict=True)]
    return sum(same) / len(same)


def largest_difference(answers: list, others: list) -> float:
    """How far the ten best scores are off, over all users."""
    pairs = zip(answers, others, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one.scores, other.scores, strict=True))


def large_catalogue(export: Path, num_items: int, folder: Path, histories: list[list[int]]) -> dict[str, Any]:
    """The same model before a catalogue of `num_items` made-up items, and what adding 10,000 real ones costs."""
    import numpy as np

    from model import Recommender
    from model.serving.folder import CARD, ITEMS, make_items, pack_items, read_folder, write_folder

    small = read_folder(export)
    rng = np.random.default_rng(0)
    table = rng.normal(small.table.mean(), small.table.std(), (num_items + 1, small.table.shape[1])).astype(np.float16)
    items = make_items([f"item{number}" for number in range(1, num_items + 1)], ["A made-up product"] * num_items)
    files = {name: export / name for name in small.config["files"]} | {ITEMS: pack_items(items, table, None)}
    write_folder(folder, small.config | {"num_items": num_items}, files, (export / CARD).read_text(encoding="utf-8"))
    del table, items
    row = in_a_process_of_its_own(folder, "onnx", histories[:100])
    recommender = Recommender.from_pretrained(export)
    features = rng.normal(size=(10_000, small.config["features"]["dim"])).astype(np.float32)
    started = time.perf_counter()
    recommender.add_items([f"new{number}" for number in range(10_000)], features)
    return {"items": num_items, "size": small.config["size"], "add_10000_s": time.perf_counter() - started, **row}


def line(row: dict[str, Any]) -> str:
    """One row, while it is measured."""
    return (
        f"{row['size']:5d} {row['engine']:5} {row['quantize']:7}  {row['bytes'] / 1e6:7.2f} MB  "
        f"load {row['load_s']:.2f} s  p50 {row['p50_ms']:.2f} ms  NDCG@10 {row['NDCG@10']:.4f}  "
        f"same top 10 {row['same_top10']:.2%}"
    )


def card_table(card: dict[str, Any]) -> list[str]:
    """The card as a Markdown table, and what is beside it."""
    heads = ("size", "engine", "stored as", "MB on disk", "MB in memory", "load s", "p50 ms", "p95 ms", "event p50 ms",
             "256 users p50 ms", "256 users p95 ms", "Recall@10", "NDCG@10", "NDCG@10 lost", "same top 10",
             "same as torch")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| ---: | --- | --- |" + " ---: |" * (len(heads) - 3)]
    plain: dict[int, float] = {}
    for row in card["rows"]:
        whole = plain.setdefault(row["size"], row["NDCG@10"])
        cells = [str(row["size"]), row["engine"], "float32" if row["quantize"] == "none" else row["quantize"]]
        cells += [f"{row['bytes'] / 1e6:.2f}", f"{row['resident_mb']:.0f}", f"{row['load_s']:.2f}"]
        cells += [f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "step_p50_ms")]
        cells += [f"{row[name]:.0f}" for name in ("batch256_p50_ms", "batch256_p95_ms")]
        cells += [f"{row[name]:.4f}" for name in ("Recall@10", "NDCG@10")]
        cells += [f"{1 - row['NDCG@10'] / whole:.2%}" if whole else "", f"{row['same_top10']:.2%}"]
        cells += [f"{row['same_top10_as_torch']:.2%}" if "same_top10_as_torch" in row else ""]
        lines.append("| " + " | ".join(cells) + " |")
    if large := card["large_catalogue"]:
        lines += [
            "",
            f"Size {large['size']} (onnx, float16) before {large['items']:,} made-up items: top 10 in "
            f"{large['p50_ms']:.1f} ms, {large['resident_mb']:.0f} MB in memory ({large['peak_mb']:.0f} at its peak), "
            f"loaded in {large['load_s']:.2f} s; 10,000 items added to the real ones in {large['add_10000_s']:.2f} s.",
        ]
    return lines


def cpu_name() -> str:
    """The processor's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    found = path.read_text(encoding="utf-8").partition("model name")[2] if path.exists() else ""
    return found.partition(":")[2].partition("\n")[0].strip() or "CPU"


if __name__ == "__main__":
    run_cli(main)
