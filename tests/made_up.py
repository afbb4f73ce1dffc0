"""Make models of random weights and catalogues without files for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.files import sha256, write_json
from config import Config, ModelSettings
from datasets.catalog import Catalog, Sequences
from model import FMRLRec
from model.extensions.history import TIMES
from trainer.runlog import RunLog
from trainer.runs import WEIGHTS, read_log
from trainer.training_run import TrainingRun

NEAR_1 = (0.9, 0.999)  # a ring of eigenvalues that forget slowly: every step of a history counts


def with_random_weights(model: FMRLRec, largest: float = 0.4) -> FMRLRec:
    """Draw every weight of a model anew, masked ones too, but its eigenvalues, and return it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("nu_log", "theta_log")):
                parameter.uniform_(-largest, largest)
    return model


def random_model(
    sizes: tuple[int, ...],
    num_blocks: int = 2,
    *,
    num_items: int = 30,
    features: np.ndarray | Sequence[np.ndarray] | None = None,
    use_bias: bool = True,
    ring: tuple[float, float] = (0.3, 0.9),
    seed: int = 0,
    post_norm: bool = False,
    history_bias: Sequence[float] = (),
) -> FMRLRec:
    """Return a model of random weights with eigenvalues on the ring. history_bias: of each size; empty: none."""
    torch.manual_seed(seed)
    parts = [features] if isinstance(features, np.ndarray | torch.Tensor) else features
    model = FMRLRec(
        num_items,
        parts and [torch.as_tensor(part) for part in parts],
        ModelSettings(
            mrl_hidden_sizes=sizes,
            lru_num_blocks=num_blocks,
            lru_use_bias=use_bias,
            lru_r_min=ring[0],
            lru_r_max=ring[1],
            post_norm=post_norm,
            history_bias=bool(history_bias),
        ),
    )
    model = with_random_weights(model).eval()
    if model.history_bias is not None:
        model.history_bias.data = torch.tensor(history_bias) / TIMES
    return model


def as_sequences(histories: Sequence[Sequence[int]]) -> Sequences:
    """Return the histories, one per user, as Sequences."""
    return Sequences(np.concatenate(histories).astype(np.int64), np.cumsum([0, *map(len, histories)]))


def made_up_catalog(num_items: int) -> Catalog:
    """Return a catalogue of items A1, A2, ... with the titles Item 1, Item 2, ..."""
    ids, records = [f"A{i}" for i in range(1, num_items + 1)], [{"title": f"Item {i}"} for i in range(1, num_items + 1)]
    return Catalog("made-up", as_sequences([[1]]), ids, records, None, Path("photos"), [])


def made_up_run(folder: Path, config: Config) -> TrainingRun:
    """Return a run in a folder, with the log in that folder."""
    folder.mkdir(exist_ok=True)
    run = TrainingRun(config, {})
    run.folder, run.log = folder, RunLog(folder, read_log(folder))
    return run


def write_plane(run: Path, sizes: Sequence[int], num_items: int) -> None:
    """Write a cut.json of made-up metrics of all encoder sizes and table widths, as experiments.cut does."""
    plane = [
        {"size": m, "width": w, "table_bytes": 4 * (num_items + 1) * w, "encoder_ms": m / 100}
        | {protocol: {"NDCG@10": m * w / 10_000, "Recall@10": m * w / 5_000} for protocol in ("kept", "masked")}
        for m in sizes
        for w in sizes
        if w <= m
    ]
    write_json(run / "cut.json", {"kept": {}, "masked": {}, "weights": sha256(run / WEIGHTS), "plane": plane})


class NoUpdate:
    """An optimizer that leaves weights and gradients as they are."""

    def step(self) -> None: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
