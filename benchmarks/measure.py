"""Time, memory and where they were measured."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def where(device: str) -> str:
    """Versions and device, for a table's head."""
    import torch

    from common.devices import device_name, resolve_device

    name = device_name(resolve_device(device))
    return f"torch {torch.__version__}, Python {platform.python_version()}, {name}"


def memory(kind: str) -> float:
    """MB of this process: resident now ("VmRSS") or at its peak ("VmHWM"; getrusage would report the parent's where
    that was larger)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{kind}:")[2].split()[0]) * 1024 / 1e6  # it says kB and means 1,024 bytes


def paired(cases: Mapping[str, Callable], runs: int, device: str, times: int = 1) -> dict[str, list[float]]:
    """Seconds of each case, run in turn `runs` times after a warm-up; a run is the mean of so many `times`."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(runs + 1):
        for name, case in cases.items():
            started = time.perf_counter()
            for _ in range(times):
                case()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - started) / times)
    return seconds
