"""Select and describe the compute device."""

from pathlib import Path

import torch

from common import processes
from common.errors import InputError


def resolve_device(name: str) -> torch.device:
    """Return the torch device for "auto", "cpu" or "cuda".

    Under torchrun each local rank gets its own GPU. Raises InputError if the GPU does not exist.
    """
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
    torch.cuda.set_device(device)  # keep this process off the first GPU
    return device


def device_name(device: torch.device) -> str:
    """Return the device's name and the number of processes, for env.json."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    count, machines = processes.world_size(), processes.machines()
    where = f" on {machines} machines" if machines > 1 else ""
    return name if count == 1 else f"{count} processes{where}, each on {name}"


def cpu_name() -> str:
    """Return the processor's name from /proc/cpuinfo, or "CPU"."""
    path = Path("/proc/cpuinfo")
    model = path.read_text(encoding="utf-8").partition("model name")[2] if path.exists() else ""
    return model.partition(":")[2].partition("\n")[0].strip() or "CPU"
