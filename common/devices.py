"""The device."""

from pathlib import Path

import torch

from common import processes
from common.errors import InputError


def resolve_device(name: str) -> torch.device:
    """auto, cpu or cuda as a torch device; under torchrun each process of a machine has a GPU of its own. Raises
    InputError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: torch finds no GPU here; give --device cpu, or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    if processes.world_size() == 1:
        return torch.device("cuda")
    gpus = torch.cuda.device_count()
    if processes.local_rank() >= gpus:
        raise InputError(
            f"torchrun started more processes than there are GPUs: give it --nproc_per_node={gpus}, or --device cpu"
        )
    device = torch.device("cuda", processes.local_rank())
    torch.cuda.set_device(device)  # nothing of this process goes to the first GPU
    return device


def device_name(device: torch.device) -> str:
    """The device in words, for a run's env.json."""
    on_gpu, count = device.type == "cuda", processes.world_size()
    threads = torch.get_num_threads()
    on_cpu = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    name = torch.cuda.get_device_name(device) if on_gpu else on_cpu
    return name if count == 1 else f"{count} processes, each on {name}"


def cpu_name() -> str:
    """The processor's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    found = path.read_text(encoding="utf-8").partition("model name")[2] if path.exists() else ""
    return found.partition(":")[2].partition("\n")[0].strip() or "CPU"
