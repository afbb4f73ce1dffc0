"""Checkpoints: best.safetensors (weights) and last.pt (all that --resume needs). Nothing is unpickled freely."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import InputError
from common.files import replacing
from trainer.runs import no_weights


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a model's weights, without the frozen features."""
    from safetensors.torch import save

    with replacing(path) as temporary:
        temporary.write_bytes(save({name: t.contiguous() for name, t in model.state_dict().items()}, metadata))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights into a model of the same shape. Raises InputError for a damaged file or another shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise no_weights(path) from None
    except (SafetensorError, OSError) as error:
        hint = "remove it with last.pt and log.jsonl, and train.py --resume trains the run anew"
        raise InputError(f"{path} is damaged ({error}); {hint}") from None
    except RuntimeError as error:
        raise InputError(f"{path} does not fit the model that the run's config.json describes: {error}") from None


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write last.pt."""
    # Through a Python file, so that a full disk is an OSError.
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read last.pt; None where a run was cut off before its first epoch ended. Raises InputError if it is damaged."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        # Not torch's own words: they advise loading without the safeguard.
        kind = type(error).__name__
        hint = "remove it and log.jsonl to start the run again from its beginning"
        raise InputError(f"{path} is damaged ({kind}); {hint}") from None
