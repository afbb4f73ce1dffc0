"""Time training and ranking for growing catalogues, histories and batches.

python -m benchmarks.scaling              # every table; needs 4 GB of disk and a long time for a million items
torchrun --nproc_per_node=2 -m benchmarks.scaling --tables epoch --items 200000     # memory of every process
python -m benchmarks.scaling --help
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import describe_environment, memory_mb, reset_peak_memory, time_paired
from common.cli import Parser, run_cli

if TYPE_CHECKING:
    from torch import Tensor

    from dataloader import TrainLoader
    from datasets.catalog import Sequences
    from model import FMRLRec

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
STEP_SECONDS = 0.27  # of the preset plus: 256 dimensions, 32 users, 4,096 negatives, fp32, one core of an EPYC
STEP_TOKENS = 300  # in such a step
PARAMETERS = 1_449_222  # of the same model with 2,048 features, without its embedding
WARM_UP = 2  # steps before the memory is read
TABLES = ("items", "length", "batch", "ranking", "plus")
ALL_TABLES = (*TABLES, "epoch")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, each measured in a separate process."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tables",
        type=tables,
        default=",".join(TABLES),
        metavar="NAME,NAME",
        help="tables to print; also epoch (default: %(default)s)",
    )
    parser.add_argument(
        "--items", type=numbers, default="10000,100000,1000000", metavar="N,N", help="items (default: %(default)s)"
    )
    parser.add_argument(
        "--lengths", type=numbers, default="50,200,1000", metavar="N,N", help="history lengths (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=numbers, default="8,32,128,512", metavar="N,N", help="users per step (default: %(default)s)"
    )
    parser.add_argument("--features", type=int, default=2048, help="width of the features (default: 2048)")
    parser.add_argument("--negatives", type=int, default=4096, help="items of the sampled softmax (default: 4096)")
    parser.add_argument("--runs", type=int, default=5, help="paired runs of each case (default: 5)")
    parser.add_argument(
        "--precision",
        default="bf16",
        choices=("fp32", "tf32", "bf16"),
        help="precision of matrix products (default: bf16)",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device (default: cpu)")
    parser.add_argument("--plan", type=int, metavar="N", help="print what N items would take on 1, 8 and 64 machines")
    parser.add_argument(
        "--network", type=float, default=1.25, help="GB/s of a machine's network, for --plan (default: 1.25)"
    )
    parser.add_argument("--table", choices=ALL_TABLES, help=argparse.SUPPRESS)  # measure this table only
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="folder for the features (default: a temporary folder)"
    )
    arguments = parser.parse_args(argv)
    if arguments.plan:
        print_plan(arguments)
        return
    if arguments.table:
        functions = (by_items, by_length, by_batch, ranking, plus, epoch)
        dict(zip(ALL_TABLES, functions, strict=True))[arguments.table](arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sizes = ",".join(map(str, SIZES))
        print(f"{describe_environment(arguments.device)}; sizes {sizes}, 2 blocks, "
              f"{arguments.features} features in half precision, {arguments.precision}", flush=True)  # fmt: skip
        for table in arguments.tables:
            command = [sys.executable, "-m", "benchmarks.scaling", *(sys.argv[1:] if argv is None else argv)]
            subprocess.run([*command, "--table", table, "--folder", folder], check=True)


def print_plan(arguments: argparse.Namespace) -> None:
    """Print a table of `plan` for 1, 8 and 64 machines."""
    print("| machines | embedding GB | features GB | row state GB | sent GB a step | s a step | users a second |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for machines in (1, 8, 64):
        values = plan(arguments.plan, machines, arguments.features, arguments.negatives, arguments.network)
        print(f"| {machines} | " + " | ".join(f"{value:.3g}" for value in values) + " |")


def plan(items: int, machines: int, features: int, negatives: int, network: float) -> tuple[float, ...]:
    """Return what a machine holds, sends and takes if the item embedding's rows are spread over the machines.

    In GB: V, its average and compact moments in 256 dimensions (10 bytes each, and 4 bytes for each of 6 increments),
    the mapped features (2 bytes each, on every machine's disk), the sampler's and the rows' state (24 bytes
    an item; the sampler's 16 are on every machine), and what a machine sends a step. Then seconds a step, if nothing
    overlaps and the features are read from memory, and users a second of all machines, each with 32 a step.

    A step reads negatives + 2 tokens rows. A share 1 - 1/machines of them lies elsewhere: V and its gradient travel.
    All other gradients are summed by a ring, which sends each twice.
    """
    elsewhere = 1 - 1 / machines
    sent = elsewhere * ((negatives + 2 * STEP_TOKENS) * 2 * 4 * 256 + 2 * 4 * PARAMETERS) / 1e9
    seconds = STEP_SECONDS + sent / network
    held = (10 * 256 + 4 * 6) * items / machines, 2 * features * items, (16 + 8 / machines) * items
    return *(part / 1e9 for part in held), sent, seconds, 32 * machines / seconds


def numbers(text: str) -> list[int]:
    """Parse a list such as "8,32"; argparse reports a ValueError."""
    return [int(number) for number in text.split(",")]


def tables(text: str) -> list[str]:
    """Parse a list of tables such as "items,batch"."""
    names = text.split(",")
    if unknown := [name for name in names if name not in ALL_TABLES]:
        raise argparse.ArgumentTypeError(f"table {unknown[0]!r} is unknown; choose from {', '.join(ALL_TABLES)}")
    return names


def by_items(arguments: argparse.Namespace) -> None:
    """Print the time of a step with 32 users against the number of items."""
    print_header("items", "softmax over")
    for negatives in (arguments.negatives, 0):
        steps = {f"{n}": make_step(arguments, n, negatives=negatives) for n in arguments.items}
        report(steps, arguments, f"{negatives:,} drawn" if negatives else "all")


def plus(arguments: argparse.Namespace) -> None:
    """Print the time of a step of the preset plus at 256 dimensions, by each way to update the item embedding."""
    print_header("items", "embedding updated by")
    for how in ("compact", "rows", "all"):
        steps = {f"{n}": make_plus_step(arguments, n, how) for n in arguments.items}
        report(steps, arguments, how)


def epoch(arguments: argparse.Namespace) -> None:
    """Print the peak memory of every process in an epoch of the preset plus at 64 dimensions, by phase."""
    import torch

    from common import processes
    from config import resolve
    from model import FMRLRec
    from trainer.trainer import Trainer
    from trainer.training_run import RunLog, TrainingRun

    items, peaks = max(arguments.items), dict[str, float]()
    flags = {"mrl_hidden_sizes": (8, 16, 32, 64), "num_negatives": arguments.negatives, "whiten_features": False}
    config, sources = resolve({"preset": "plus", "num_epochs": 1, "train_batch_size": 32, **flags})
    processes.start()
    torch.manual_seed(0)
    run = TrainingRun(config, sources)
    run.folder, run.log = arguments.folder, RunLog(arguments.folder, [])
    model = FMRLRec(items, make_features(arguments, items), config).to(arguments.device)
    trainer = Trainer(model, made_up_users(items, 960), config, run)

    def measured(phase: str, work: Callable[..., object]) -> Callable[..., Any]:
        """Return `work` that also notes its peak memory."""

        def call(*given: object) -> object:
            if phase == "validating":
                peaks["training"] = memory_mb("VmHWM")
            reset_peak_memory()
            result = work(*given)
            peaks[phase] = memory_mb("VmHWM")
            return result

        return call

    trainer.validate = measured("validating", trainer.validate)  # type: ignore[method-assign]
    trainer._keep = measured("saving", trainer._keep)  # type: ignore[method-assign]
    reset_peak_memory()
    trainer.fit()
    values = ", ".join(f"{phase} {peak / 1e3:.3f} GB" for phase, peak in peaks.items())
    print(f"process {processes.rank()} of {processes.world_size()}, {items:,} items, peak {values}", flush=True)


def by_length(arguments: argparse.Namespace) -> None:
    """Print the time of a step with 32 users against the history length."""
    print_header("tokens a history", "users")
    steps = {f"{n}": make_step(arguments, 10_000, length=n, negatives=arguments.negatives) for n in arguments.lengths}
    report(steps, arguments, "32")


def by_batch(arguments: argparse.Namespace) -> None:
    """Print the time of a step with 12,101 items against the number of users."""
    print_header("users", "softmax over")
    report({f"{n}": make_step(arguments, 12_101, batch=n) for n in arguments.batches}, arguments, "all")


def print_header(first: str, second: str) -> None:
    """Print the header of a table by `report`."""
    print(f"\n| {first} | {second} | s a step | ratio to the first | peak GB | anonymous GB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")


def report(steps: Mapping[str, Callable[[], object]], arguments: argparse.Namespace, second: str) -> None:
    """Print each step's median, its median paired ratio to the first step, and the memory.

    second: the content of the second column. The peak counts pages of mapped features that a step read, which the
    system can drop; anonymous memory does not.
    """
    memory = {}
    reset_peak_memory()
    for name, step in steps.items():
        for _ in range(WARM_UP):
            step()
        memory[name] = f"{memory_mb('VmHWM') / 1e3:.1f} | {memory_mb('RssAnon') / 1e3:.1f}"
    seconds = time_paired(steps, arguments.runs, arguments.device)
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(first, values, strict=True))
        print(
            f"| {int(name):,} | {second} | {statistics.median(values):.3f} | {ratio:.2f} | {memory[name]} |",
            flush=True,
        )


def make_plus_step(arguments: argparse.Namespace, items: int, how: str) -> Callable[[], object]:
    """Return a step of the preset plus, with the average of the weights.

    Features are not whitened, which happens once, before the training.
    """
    import torch

    from config import resolve
    from model import FMRLRec
    from trainer.step import WeightAverage
    from trainer.trainer import build_step

    flags = {"precision": arguments.precision, "mrl_hidden_sizes": tuple(m for m in SIZES if m <= 256)}
    flags |= {"num_negatives": arguments.negatives, "whiten_features": False, "item_embedding_updates": how}
    config, _ = resolve({"preset": "plus", **flags})
    loader = make_loader(arguments, items, 32)
    torch.manual_seed(0)
    model = FMRLRec(items, make_features(arguments, items), config).to(arguments.device).train()
    step = build_step(model, loader, config)
    average = WeightAverage(model, config.ema_decay, step.rows)
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count(1)))
    numbers = itertools.count(1)

    def run() -> None:
        step(next(batches))
        average.update(model, next(numbers))

    return run


def make_step(
    arguments: argparse.Namespace, items: int, *, batch: int = 32, length: int = 0, negatives: int = 0
) -> Callable[[], object]:
    """Return a training step on made-up users.

    length: tokens of every history; 0: the history lengths of Beauty.
    """
    from config import TrainingSettings
    from model.extensions.sampled_loss import NegativeSampler
    from trainer.step import Step, build_optimizer

    model, loader = make_model(arguments, items), make_loader(arguments, items, batch, length)
    settings = TrainingSettings(precision=arguments.precision)
    sampler = NegativeSampler(loader.label_counts(items), negatives) if negatives else None
    step = Step(model, build_optimizer(model, settings), settings, sampler)
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count(1)))
    return lambda: step(next(batches))


def make_loader(arguments: argparse.Namespace, items: int, batch: int, length: int = 0) -> TrainLoader:
    """Return batches of made-up users; arguments as of `make_step`."""
    import torch

    from dataloader import TrainLoader, train_rows

    rows = train_rows(made_up_users(items, 30 * batch, length), length or 50)
    return TrainLoader(rows, batch, 0, torch.device(arguments.device))


def made_up_users(items: int, users: int, length: int = 0) -> Sequences:
    """Return random sequences; length as of `make_step`."""
    import numpy as np

    from datasets.catalog import Sequences

    rng = np.random.default_rng(0)
    lengths = np.full(users, length + 2) if length else (4 + rng.geometric(0.2, size=users)).clip(max=200)
    offsets = np.concatenate([[0], lengths.cumsum()])
    return Sequences(rng.integers(1, items + 1, size=offsets[-1]), offsets)


def make_model(arguments: argparse.Namespace, items: int) -> FMRLRec:
    """Return the paper's model with memory-mapped random features."""
    import torch

    from config import ModelSettings
    from model import FMRLRec

    torch.manual_seed(0)
    model = FMRLRec(items, make_features(arguments, items), ModelSettings(mrl_hidden_sizes=SIZES))
    return model.to(arguments.device)


def make_features(arguments: argparse.Namespace, items: int) -> Tensor:
    """Return memory-mapped random features [items, F] of norm 1 in half precision."""
    import numpy as np
    import torch

    path = arguments.folder / f"{items}.npy"
    if not path.exists():
        block = np.random.default_rng(0).normal(size=(10_000, arguments.features)).astype(np.float32)
        block = (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(items, arguments.features))
        for start in range(0, items, len(block)):
            mapped[start : start + len(block)] = np.roll(block, start // len(block), axis=1)[: items - start]
        mapped.flush()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def ranking(arguments: argparse.Namespace) -> None:
    """Print the time to rank 1,000 users' targets in the largest catalogue."""
    from dataloader import eval_rows
    from trainer.evaluation import evaluate

    items = max(arguments.items)
    rows = eval_rows(made_up_users(items, 1000), 50, "test")
    model = make_model(arguments, items)
    started = time.perf_counter()
    evaluate(model, rows, sizes=SIZES, batch_size=256, ks=(10,))
    print(f"\nranks of 1,000 users at all sizes among {items:,} items: {time.perf_counter() - started:.0f} s, peak "
          f"{memory_mb('VmHWM') / 1e3:.1f} GB")  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
