"""Scripts that measure against a baseline in the same run and print a table; what they share is here."""

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path


def describe_environment(device: str) -> str:
    """Return versions and device, for a table's caption."""
    import torch

    from common.devices import device_name, resolve_device

    name = device_name(resolve_device(device))
    return f"torch {torch.__version__}, Python {platform.python_version()}, {name}"


def memory_mb(field: str) -> float:
    """Return this process's resident memory in MB: "VmRSS" (now), "VmHWM" (peak), "RssAnon" (now, without files).

    getrusage is no substitute: it reports the parent's peak if that was larger.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024 / 1e6  # kB there means 1,024 bytes


def reset_peak_memory() -> None:
    """Let the peak of `memory_mb` begin anew, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def time_paired(cases: Mapping[str, Callable], runs: int, device: str, calls: int = 1) -> dict[str, list[float]]:
    """Time cases in turn, after one warm-up run; return seconds per call and run.

    calls: calls per run, whose mean is taken.
    """
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(runs + 1):
        for name, case in cases.items():
            started = time.perf_counter()
            for _ in range(calls):
                case()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - started) / calls)
    return seconds
