"""Run experiments: train and test what is missing, skip what is there, continue what was cut off.

python -m experiments.run table3 --dataset_code beauty --seeds 42,43,44
python -m experiments.run depth,independent --dataset_code beauty --no-use_img_encoder --precision bf16
python -m experiments.run all --dry_run                    # what there is to do, and about how long it takes
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.cli import parse_args, run_cli
from common.errors import InputError
from common.files import cannot_write
from common.settings import format_value, is_runtime
from config import SECTIONS, Config
from experiments.definition import definitions
from experiments.kept import RESULTS, keep, same_run, untested, unusable
from experiments.plan import Job, chosen, duration, look_up, measure, planned, prepared, seeds_of, summary

REPOSITORY = Path(__file__).parent.parent
DONE = ("finished", "kept in part")  # states in which there is nothing to do
CHILDREN: list[subprocess.Popen] = []  # the scripts that run now


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiments", metavar="NAME", help=f"all, or one or several, with commas: {', '.join(definitions())}"
    )
    parser.add_argument("--rows", metavar="ROW;ROW", help="only these rows of the experiment (default: all)")
    parser.add_argument("--seeds", default="42", metavar="N,N", help="a run for each (default: 42)")
    parser.add_argument(
        "--dataset_code",
        default=argparse.SUPPRESS,
        metavar="NAME,NAME",
        help="prepared datasets (default: those of the experiment's definition)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="where results are kept (default: experiments/results of this repository)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="say what there is to do and how long it takes; train nothing"
    )


def main(argv: Sequence[str] | None = None) -> list[Job]:
    """Do what is missing and return all jobs. Exits with 1 where one failed."""
    settings = [f.name for f in dataclasses.fields(Config) if f.name not in ("seed", "dataset_code", "test")]
    flags, arguments = parse_args(argv, __doc__.splitlines()[0], SECTIONS, add_arguments, settings)
    jobs = planned(chosen(arguments), flags, seeds_of(arguments.seeds))
    for problem in unusable(Path(jobs[0].config.runs_root), arguments.results):
        print(f"left out: {problem}", file=sys.stderr)
    catalogs, problems = prepared(jobs)
    for job in jobs:
        look_up(job, arguments.results)
    if arguments.dry_run:
        measure(jobs, catalogs)
    for job in jobs:
        print(f"{job.state:12} {duration(job.seconds):>9}  {job.label}")
    print(summary(jobs, problems), flush=True)
    if arguments.dry_run:
        return jobs
    check_writable(arguments.results)
    work(jobs, arguments.results)
    failed = [job for job in jobs if job.state not in DONE]
    for job in failed:
        print(f"{job.state}: {job.label}", file=sys.stderr)
    if failed:
        sys.exit(1)
    print(f"{len(jobs)} of {len(jobs)} are there; python -m experiments.report shows them")
    return jobs


def check_writable(folder: Path) -> None:
    """Raise InputError where no file can be made in a folder: better now than after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise cannot_write(folder, error) from None


def work(jobs: list[Job], results: Path) -> None:
    """Do all jobs that are not finished, one at a time on every device. One that fails is marked, the rest go on."""
    devices, stopped = free_devices(jobs), threading.Event()

    def stop(*_: object) -> None:  # a terminal hands Ctrl-C to the scripts too; SIGTERM comes here alone
        stopped.set()
        for child in CHILDREN:
            child.terminate()

    def do(job: Job) -> None:
        device = devices.get()
        try:
            if not stopped.is_set():
                do_job(job, device, results)
        except InputError as error:
            job.state = f"failed: {error}"
        except BaseException:  # Ctrl-C, or an error of this script: no other run begins
            stopped.set()
            raise
        finally:
            devices.put(device)

    left = [job for job in jobs if job.state not in DONE]
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with ThreadPoolExecutor(devices.qsize()) as pool:
            list(pool.map(do, left))
    finally:
        signal.signal(signal.SIGTERM, before)


def free_devices(jobs: list[Job]) -> queue.SimpleQueue[str | None]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them; or once None, where there is no choice of a device."""
    devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    import torch

    count = 0 if any(job.config.device == "cpu" for job in jobs) else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    for name in names if count > 1 else [None]:
        devices.put(name)
    return devices


def do_job(job: Job, device: str | None, results: Path) -> None:
    """Train or go on, test with the history and without, and keep the results."""
    runs_root = Path(job.config.runs_root)
    job.run, job.state = same_run(job.config, runs_root, results, job.data, job.tests)  # it may be long since the plan
    if job.state in DONE:
        return
    print(f"\n== {job.label}", flush=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
    runtime = [f"--{name}={format_value(value)}" for name, value in job.flags.items() if is_runtime(Config, name)]
    test = [] if job.tests else ["--no-test"]

    def call(script: str, *arguments: str) -> bool:
        status = call_script(script, [*arguments, *runtime], environment)
        if status == 130:
            raise KeyboardInterrupt
        if status:
            job.state = f"{script} failed with {status}"
        return status == 0

    if job.state == "to start":
        fixed = [f"--{name}={format_value(value)}" for name, value in job.flags.items() if not is_runtime(Config, name)]
        if not call("train.py", *fixed, *test):
            return
    elif job.state == "to continue" and not call("train.py", "--resume", str(job.run), *test):
        return
    job.run, job.state = same_run(job.config, runs_root, results, job.data, job.tests)
    if job.run is None:
        raise InputError(f"train.py left no run of these settings below {job.config.runs_root}")
    for protocol in untested(job.run) if job.tests else ():
        if not call("eval.py", "--run", str(job.run), *protocol):
            return
    keep(job.run, results, job.tests)
    job.state = "finished"


def call_script(script: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Run train.py or eval.py in a process of its own; returns its exit status."""
    with subprocess.Popen([sys.executable, REPOSITORY / script, *arguments], env=environment) as child:
        CHILDREN.append(child)
        try:
            return child.wait()
        finally:
            CHILDREN.remove(child)


if __name__ == "__main__":
    run_cli(main)
