"""Small exports for tests, written as serving/export.py writes a trained model."""

from pathlib import Path

from config import Config
from datasets.catalog import Catalog
from model import FMRLRec
from serving.export import export_size
from serving.folder import Export, read_folder
from tests.made_up import NEAR_1, made_up_catalog, random_model


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


def one_of_each_kind(folder: Path) -> dict[str, Export]:
    """An export of one model in each kind of numbers: {"none": ..., "float16": ..., "int8": ...}."""
    model = random_model((8, 16, 32), num_blocks=2, num_items=30, ring=NEAR_1)
    return {
        kind: read_folder(write_export(folder / kind, model, max_len=20, quantize=kind))
        for kind in ("none", "float16", "int8")
    }
