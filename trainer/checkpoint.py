"""Checkpoints: best.safetensors (weights) and last.pt (state for --resume)."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import processes
from common.errors import InputError
from common.files import replacing
from trainer.runs import no_weights


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Save a model's weights without the frozen features."""
    save_tensors(model.state_dict(), path, metadata)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Save tensors as safetensors, without a copy in memory. Raises InputError if the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None


def load_weights(
    model: nn.Module, path: Path, change: Callable[[dict[str, Tensor]], None] = lambda weights: None
) -> None:
    """Load weights into a model; under torchrun rank 0 reads them and sends them to the others.

    change: changes the file's weights in place so that they fit the model. Raises InputError for a missing or damaged
    file, or another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    def read() -> dict[str, Tensor]:
        try:
            weights = load_file(path)
            change(weights)
            model.load_state_dict(weights)
            return weights
        except FileNotFoundError:
            raise no_weights(path) from None
        except (SafetensorError, OSError) as error:
            hint = "remove it, last.pt and log.jsonl, then train the run again with train.py --resume"
            raise InputError(f"{path} is damaged ({error}); {hint}") from None
        except RuntimeError as error:
            raise InputError(
                f"{path} does not fit the model in the run's config.json: {error}; train another run"
            ) from None

    weights = processes.on_main_process(read)
    if processes.rank():
        model.load_state_dict(weights)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save last.pt. Raises InputError if the disk is full."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's zip writer fails again on a disk that is already full
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from None


def load_state(path: Path) -> dict[str, Any] | None:
    """Load last.pt, or return None if no epoch was finished.

    Raises InputError if it is damaged.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        # Omit torch's message: it recommends weights_only=False.
        kind = type(error).__name__
        hint = "remove it and log.jsonl to restart the run"
        raise InputError(f"{path} is damaged ({kind}); {hint}") from None
