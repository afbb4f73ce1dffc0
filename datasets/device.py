"""The device."""

import torch

from config import InputError


def resolve_device(name: str) -> torch.device:
    """auto, cpu or cuda as a torch device. Raises InputError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: torch finds no GPU here; give --device cpu, or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def device_name(device: torch.device) -> str:
    """The device in words, for a run's env.json."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
