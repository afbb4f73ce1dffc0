"""Small exports for tests: a random model of a made-up catalogue, written as model/export.py writes a trained one."""

from pathlib import Path

import numpy as np
import torch

from config import Config
from datasets.catalog import Catalog, Sequences
from model import FMRLRec
from model.export import export_size

NEAR_1 = (0.9, 0.999)  # a ring of eigenvalues that forget slowly: every step of a history counts


def random_model(
    sizes: tuple[int, ...],
    num_blocks: int = 2,
    *,
    num_items: int = 30,
    features: np.ndarray | None = None,
    use_bias: bool = True,
    ring: tuple[float, float] = (0.3, 0.9),
    seed: int = 0,
) -> FMRLRec:
    """A model without zeros or ones among its weights, not even where the mask hides them; eigenvalues on the ring."""
    torch.manual_seed(seed)
    features = None if features is None else torch.as_tensor(features)
    model = FMRLRec(num_items, features, sizes, num_blocks, 0.5, 0.5, use_bias, *ring)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("nu_log", "theta_log")):
                parameter.uniform_(-0.4, 0.4)
    return model.eval()


def made_up_catalog(num_items: int) -> Catalog:
    """Items A1, A2, ... whose titles are Item 1, Item 2, ..."""
    ids, records = [f"A{i}" for i in range(1, num_items + 1)], [{"title": f"Item {i}"} for i in range(1, num_items + 1)]
    return Catalog("made-up", Sequences(np.array([1]), np.array([0, 1])), ids, records, None, Path("photos"), [])


def write_export(
    folder: Path,
    model: FMRLRec,
    catalog: Catalog | None = None,
    *,
    size: int | None = None,
    max_len: int = 7,
    quantize: str = "none",
    format: str = "onnx",
    overwrite: bool = False,
    **settings,
) -> Path:
    """Export a model at a size, its largest by default; settings: of the run, where they matter."""
    by_text = {"use_language_encoder": hasattr(model.items, "projection"), "use_img_encoder": False}
    config = Config(
        **{"language_encoder": "lexical", "img_encoder": "pixel", **by_text, **settings},
        dataset_code="made-up",
        mrl_hidden_sizes=model.sizes,
        lru_max_len=max_len,
        lru_num_blocks=len(model.blocks),
    )
    export_size(
        model,
        size or model.sizes[-1],
        folder,
        config=config,
        catalog=catalog or made_up_catalog(model.num_items),
        run=folder.parent / "no-such-run",
        format=format,
        quantize=quantize,
        overwrite=overwrite,
    )
    return folder
