"""Run experiments: train and test missing runs, skip finished ones, continue interrupted ones.

python -m experiments.run table3 --dataset_code beauty --seeds 42,43,44
python -m experiments.run depth,independent --dataset_code beauty --no-use_img_encoder --precision bf16
python -m experiments.run all --dry_run                    # list the runs and their states
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
from experiments import RESULTS
from experiments.definition import (
    Job,
    chosen,
    definitions,
    look_up,
    missing_encoders,
    missing_tests,
    parse_seeds,
    planned,
    run_folders,
    set_data,
    summary,
)
from experiments.store import keep, kept_runs
from trainer.runs import REPOSITORY

DONE = ("finished", "kept in part")  # states with nothing to do
CHILDREN: list[subprocess.Popen] = []  # the running scripts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiments", metavar="NAME,NAME", help=f"all, or names joined by commas: {', '.join(definitions())}"
    )
    parser.add_argument("--rows", metavar="ROW;ROW", help="only these rows of the experiment (default: all)")
    parser.add_argument("--seeds", default="42", metavar="N,N", help="train each of these seeds (default: 42)")
    parser.add_argument(
        "--dataset_code", metavar="NAME,NAME", help="prepared datasets (default: those of the experiment's definition)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="kept results (default: experiments/results)"
    )
    parser.add_argument("--dry_run", action="store_true", help="list the runs and their states; train nothing")


def main(argv: Sequence[str] | None = None) -> list[Job]:
    """Do every job that is not finished and return all jobs. Exits with status 1 if one failed."""
    settings = [f.name for f in dataclasses.fields(Config) if f.name not in ("seed", "dataset_code", "test")]
    flags, arguments = parse_args(argv, __doc__.splitlines()[0], SECTIONS, add_arguments, settings)
    datasets = list(dict.fromkeys(arguments.dataset_code.split(","))) if arguments.dataset_code else None
    jobs = planned(chosen(arguments), flags, parse_seeds(arguments.seeds), datasets)
    if not jobs:
        raise InputError("nothing to run: all these rows are taught; give their teachers by --teachers RUN,RUN,RUN")
    for problem in run_folders(Path(jobs[0].config.runs_root))[1]:
        print(f"ignored: {problem}", file=sys.stderr)
    problems = set_data(jobs)
    kept = kept_runs(arguments.results)
    for job in jobs:
        look_up(job, kept)
        print(f"{job.state:12} {job.label}")
    print(summary(jobs, problems), flush=True)
    if arguments.dry_run:
        for line in missing_encoders(jobs):
            print(line)
        return jobs
    check_writable(arguments.results)
    work(jobs, arguments.results)
    failed = [job for job in jobs if job.state not in DONE]
    for job in failed:
        print(f"{job.state}: {job.label}", file=sys.stderr)
    if failed:
        sys.exit(1)
    print(f"{len(jobs)} of {len(jobs)} are finished; python -m experiments.report shows them")
    return jobs


def check_writable(folder: Path) -> None:
    """Raise InputError if no file can be made in a folder, before hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise cannot_write(folder, error) from None


def work(jobs: list[Job], results: Path) -> None:
    """Do all unfinished jobs, one at a time per device. A failed job is marked; the others go on."""
    devices, stopped = free_devices(jobs), threading.Event()

    def stop(*_: object) -> None:  # Ctrl-C reaches the scripts too, SIGTERM only this process
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
        except BaseException:  # Ctrl-C or a bug: start no other job
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
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them; a single None if there is only one device."""
    devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    import torch

    count = 0 if any(job.config.device == "cpu" for job in jobs) else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    for name in names if count > 1 else [None]:
        devices.put(name)
    return devices


def do_job(job: Job, device: str | None, results: Path) -> None:
    """Train or continue the job's run, test it with the history kept and masked, and keep the results."""
    look_up(job, kept_runs(results))  # another runner may have done it since the plan
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
    look_up(job, kept_runs(results))
    if job.run is None:
        raise InputError(f"train.py left no run of these settings below {job.config.runs_root}")
    for protocol in missing_tests(job.run) if job.tests else ():
        if not call("eval.py", "--run", str(job.run), *protocol):
            return
    keep(job.run, results, job.tests)
    job.state = "finished"


def call_script(script: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Run train.py or eval.py in its own process; return the exit status."""
    with subprocess.Popen([sys.executable, REPOSITORY / script, *arguments], env=environment) as child:
        CHILDREN.append(child)
        try:
            return child.wait()
        finally:
            CHILDREN.remove(child)


if __name__ == "__main__":
    run_cli(main)
