"""What a run keeps: its weights, its state for --resume, and the items that it was trained on."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import processes
from common.errors import InputError
from common.files import read_json, replacing, sha256
from datasets.catalog import Catalog
from datasets.items import flat_text
from model import FMRLRec
from model.base import CountingModel, SequenceModel
from trainer.runs import ITEMS, TABLE, WEIGHTS, no_weights, read_environment


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
    """Load weights into a model; under torchrun rank 0 reads them and sends them to the others, one after the other.

    change: changes the file's weights in place so that they fit the model. Raises InputError for a missing or damaged
    file, or another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    def read() -> dict[str, torch.Size]:
        try:
            weights = load_file(path)
            change(weights)
            model.load_state_dict(weights)
            return {name: weight.shape for name, weight in model.state_dict().items()}
        except FileNotFoundError:
            raise no_weights(path) from None
        except (SafetensorError, OSError) as error:
            hint = "remove it, last.pt and log.jsonl, then train the run again with train.py --resume"
            raise InputError(f"{path} is damaged ({error}); {hint}") from None
        except RuntimeError as error:
            raise InputError(
                f"{path} does not fit the model in the run's config.json: {error}; train another run"
            ) from None

    shapes, weights = processes.on_main_process(read), model.state_dict()
    for name, shape in shapes.items():
        if weights[name].shape != shape:  # of a model that counts
            weights[name] = weights[name].new_empty(shape)
        processes.broadcast(weights[name])
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


# ------------------------------------------------------------------------------------------------------------ run items
# The items that a run was trained on, kept in its folder: for new data, and for an export without the dataset.
#
# items.json.gz       ids and titles of items 1..N, and the dataset's digest
# table.safetensors   item table E [N+1, D] float32 of the best weights, if it is made of features


@dataclass(frozen=True)
class RunItems:
    """Ids and titles of items 1..N, and the digest of their dataset."""

    ids: list[str]
    titles: list[str]
    data: str

    @classmethod
    def of(cls, catalog: Catalog) -> RunItems:
        return cls(catalog.asins, [flat_text(record.get("title")) for record in catalog.metadata], catalog.digest())

    @property
    def num_items(self) -> int:
        return len(self.ids)


def write_items(run: Path, items: RunItems) -> None:
    """Write items.json.gz."""
    with replacing(run / ITEMS) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(vars(items)).encode(), mtime=0))


def read_items(run: Path) -> RunItems:
    """Return the items of a run. Raises InputError if the file is missing or damaged."""
    hint = f"with its dataset at hand, write it again: python train.py --resume {run}"
    saved = read_json(run / ITEMS, hint)
    ids, titles, data = saved.get("ids", []), saved.get("titles", []), saved.get("data")
    if not (_texts(ids) and _texts(titles) and _texts([data]) and len(ids) == len(titles)):
        raise InputError(f"{run / ITEMS} is damaged: it needs ids, as many titles, and data; {hint}")
    return RunItems(ids, titles, str(data))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def known_ids(run: Path, catalog: Catalog) -> list[str]:
    """Return the item ids that a run was trained on; those of `catalog` if it was trained on that."""
    if read_environment(run).get("data") == catalog.digest():
        return catalog.asins
    return read_items(run).ids


def move_rows(weights: dict[str, Tensor], model: SequenceModel | CountingModel, old: list[str], new: list[str]) -> None:
    """Arrange the item rows of saved weights for another catalogue, in place: every id keeps its row.

    old, new: item ids of the weights and of the model. A new item has the model's initial row, zero in V and in the
    gate's counts: it begins from its content.
    """
    if old == new:
        return
    row_of = {item: row for row, item in enumerate(old, start=1)}
    known = [(row, row_of[item]) for row, item in enumerate(new, start=1) if item in row_of]
    to, source = torch.tensor([(0, 0), *known]).T
    initial = model.state_dict()
    for name in ("items.V", "items.table", "items.gate.trained"):
        if name in weights and name in initial and len(weights[name]) == len(old) + 1:
            rows = initial[name].cpu().clone()
            rows[to] = weights[name][source]
            weights[name] = rows


def keep_table(run: Path, model: SequenceModel | CountingModel) -> None:
    """Write table.safetensors if the item table is made of features; otherwise it is among the weights."""
    if isinstance(model, FMRLRec) and model.items.parts:
        with torch.inference_mode():
            table = model.eval().item_table().float().cpu().contiguous()
        widths = ",".join(str(part.shape[1]) for part in model.items.features)
        save_tensors({"table": table}, run / TABLE, {"weights": sha256(run / WEIGHTS), "widths": widths})


def read_table(run: Path, items: RunItems) -> tuple[Tensor, list[int]] | None:
    """Return E [N+1, D] and the widths of the features that made it; None unless it is of the run's best weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(run / TABLE, framework="pt") as file:
            facts, table = file.metadata() or {}, file.get_tensor("table")
        widths = [int(width) for width in facts.get("widths", "").split(",")]
    except (OSError, SafetensorError, ValueError):
        return None
    fits = table.ndim == 2 and len(table) == items.num_items + 1 and facts.get("weights") == sha256(run / WEIGHTS)
    return (table, widths) if fits else None
