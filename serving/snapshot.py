"""A model and its catalogue at one moment: all that a call of the Recommender reads. N items, m the size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from serving.catalogue import Catalogue
from serving.engines import Engine
from serving.folder import WEIGHTS, Export
from serving.index import Index
from serving.quantize import rounded
from serving.states import State, decays_of, state_shape
from serving.weights import whitened


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that a call reads."""

    config: dict[str, Any]
    folder: Path
    engine: Engine
    catalogue: Catalogue
    model: str
    eigenvalues: np.ndarray  # λ [rows of a state, m]
    projection: tuple[np.ndarray | None, np.ndarray | None]  # for new items
    whitening: dict[str, np.ndarray]
    encoders: dict[tuple, list]  # loaded modalities, by where their encoders are
    index: Index | None

    @classmethod
    def of(cls, export: Export, engine: Engine, index: Index | None = None) -> Snapshot:
        config, weights = export.config, export.weights
        # The engine has the blocks' weights; keep the others.
        return cls(
            config,
            export.folder,
            engine,
            Catalogue(export.items, engine.table(export).with_room(), export.removed),
            model_name(config),
            decays_of(weights, config),
            (weights.get("projection.weight"), weights.get("projection.bias")),
            {name: value for name, value in weights.items() if name.startswith("whitening.")},
            {},
            index,
        )


def model_name(config: Mapping[str, Any]) -> str:
    """Return a name of a model: its run, its size and a fingerprint of its weights.

    The item table has no part in it: states stay valid while items are added, updated and removed.
    """
    content = [config["files"][WEIGHTS]["sha256"], list(config["sizes"]), config["num_blocks"]]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    return f"{config.get('run', 'a run')}, size {config['size']}, weights {fingerprint}"


def check_state(now: Snapshot, state: State) -> None:
    """Raise InputError for a state of another model, or with items that this catalogue does not have."""
    if not isinstance(state, State):
        raise InputError(f"state {state!r:.80} must be a State, as start() and step() return it")
    if state.model != now.model:
        raise InputError(
            f"the state was made by the model {state.model!r}, this is {now.model!r}; encode the history again: start()"
        )
    shape = state_shape(now.config)
    if state.hidden.shape != shape or state.z.shape != shape[2:]:
        raise InputError("the state is damaged: it has another size than its model; encode the history again: start()")
    if (largest := max(state.items, default=0)) > len(now.catalogue):
        raise InputError(
            f"the state remembers item {largest}, this catalogue has {len(now.catalogue)}; reload the catalogue that "
            f"the state was made with, or encode the history again: start()"
        )


def project(now: Snapshot, ids: list[str], features: Any) -> np.ndarray:
    """Return embeddings [n, m] of items with these features, rounded as the table is stored."""
    weight, bias = now.projection
    if weight is None:
        raise InputError("this model's item table was learned without features, so no items can be added")
    try:
        features = np.asarray(features, dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError(f"features must be an array of numbers, not {features!r:.80}") from None
    if features.shape != (len(ids), len(weight)):
        raise InputError(
            f"features of shape {list(features.shape)} for {len(ids)} items: must be {[len(ids), len(weight)]}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        embeddings = rounded(whitened(features, now.whitening) @ weight + bias, now.config["quantize"])
    bad = ~(np.isfinite(features).all(axis=1) & np.isfinite(embeddings).all(axis=1))
    if bad.any():
        raise InputError(f"the features of item {ids[int(bad.argmax())]!r} are not finite, or far too large")
    return embeddings
