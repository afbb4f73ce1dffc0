"""Write a static page that shows every trained size of a run in the browser.

python -m serving.page experiments/runs/demo/... --out page      # or no run: the newest, or the newest on a dataset
python -m http.server -d page                                    # any file server will do

The page loads nothing from elsewhere: the models (serving/graphs.py), the catalogue, pictures and onnxruntime-web
lie beside it. onnxruntime-web comes from npm; install it once with `npm ci --prefix serving/page`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from common.cli import Parser, add_switch, run_cli
from common.errors import InputError
from common.files import read_json, replacing_folder, restore_folder
from serving.export import add_run_arguments, asked_run, export_size
from serving.folder import CONFIG
from serving.hub import IDS, MODEL
from serving.weights import TABLES

if TYPE_CHECKING:
    from datasets.catalog import Catalog

HERE = Path(__file__).parent
ASSETS = ("index.html", "page.js")
RUNTIME = HERE / "node_modules/onnxruntime-web/dist"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
CATALOGUE = "catalogue.json"
SIMILAR = 6  # similar items shown
PICTURE = 160  # pixels, the longest side of a picture
COSINES = 1 << 24  # computed at once


def arguments_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__)
    add_run_arguments(parser, positional=True)
    parser.add_argument(
        "--out", type=Path, default=Path("page"), metavar="FOLDER", help="output folder (default: page)"
    )
    parser.add_argument(
        "--quantize", choices=TABLES, default="float16", help="how the models are stored (default: float16)"
    )
    add_switch(parser, "overwrite", "replace an existing page (default: refuse)")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the page; return its folder."""
    arguments = arguments_parser().parse_args(argv)
    refuse_existing(arguments.out, arguments.overwrite)
    if missing := [name for name in RUNTIME_FILES if not (RUNTIME / name).is_file()]:
        raise InputError(f"{RUNTIME / missing[0]} is missing; install onnxruntime-web: npm ci --prefix {HERE}")
    run = asked_run(arguments)
    with replacing_folder(arguments.out) as temporary:
        write_page(temporary, run, arguments.data_root, arguments.quantize)
    total = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(
        f"{arguments.out}: {total / 1e6:.1f} MB. To see it: python -m http.server -d {shlex.quote(str(arguments.out))}"
    )
    return arguments.out


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise InputError if `out` exists and may not be replaced."""
    restore_folder(out.resolve())
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; pass --overwrite to replace it, or choose another folder with --out")
    if out.exists() and not (out / CATALOGUE).is_file():
        raise InputError(f"{out} is not a page of serving.page, so it is not overwritten; choose another folder")


def write_page(page: Path, run: Path, data_root: str | None, quantize: str) -> None:
    """Write the page of a run into the new folder `page`."""
    import torch

    from model import FMRLRec
    from trainer.load_run import load_run
    from trainer.runs import read_plane

    config, catalog, model = load_run(run, {"device": "cpu"} | ({"data_root": data_root} if data_root else {}))
    assert isinstance(model, FMRLRec)  # asked_run refused others
    for folder in ("models", "ort"):
        (page / folder).mkdir(parents=True)
    for name in ASSETS:
        shutil.copyfile(HERE / name, page / name)
    for name in RUNTIME_FILES:
        shutil.copyfile(RUNTIME / name, page / "ort" / name)
    models: list[dict[str, Any]] = []
    with torch.inference_mode():
        table = model.item_table()[1:].float().cpu().numpy()
    for size in tqdm(model.sizes, desc="models", unit="size", disable=None):
        with tempfile.TemporaryDirectory(dir=page) as temporary:
            export = Path(temporary, "export")
            export_size(
                model, size, export, config=config, catalog=catalog, run=run, format="onnx-file", quantize=quantize
            )
            described, items = read_json(export / CONFIG, ""), read_json(export / IDS, "")
            content = (export / MODEL).read_bytes()
        file = page / f"models/{size}.onnx"
        file.write_bytes(content)
        nearest = similar_items(table[:, :size], SIMILAR)
        file.with_suffix(".similar").write_bytes(nearest.astype("<u4").tobytes())
        models.append(
            {
                "size": size,
                "file": f"models/{size}.onnx",
                "bytes": len(content),
                "crc": zlib.crc32(content),
                "ndcg": (described["metrics"] or {}).get("NDCG@10"),
                "similar": nearest.shape[1],
            }
        )
    content_of_page = {
        "dataset": catalog.name,
        "max_len": config.lru_max_len,
        "models": models,
        **items,
        "pictures": write_pictures(catalog, page),
        "plane": read_plane(run),
    }
    (page / CATALOGUE).write_text(json.dumps(content_of_page, ensure_ascii=False, separators=(",", ":")), "utf-8")


def similar_items(table: np.ndarray, top_k: int) -> np.ndarray:
    """Return [N, top_k]: the numbers of the items with the largest cosine with each item's vector, best first.

    table: vectors of items 1 to N, [N, m] float32.
    """
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    top_k = min(top_k, len(unit) - 1)
    found = np.empty((len(unit), top_k), dtype=np.int64)
    if not top_k:
        return found
    chunk = max(1, COSINES // len(unit))
    for start in range(0, len(unit), chunk):
        cosines = unit[start : start + chunk] @ unit.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        best = np.argpartition(-cosines, top_k - 1, axis=1)[:, :top_k]
        order = np.argsort(-np.take_along_axis(cosines, best, axis=1), axis=1, kind="stable")
        found[start : start + chunk] = np.take_along_axis(best, order, axis=1) + 1
    return found


def write_pictures(catalog: Catalog, page: Path) -> list[str | None] | None:
    """Write small pictures; return the path of each item's, None where it has none that can be read."""
    if catalog.pictures is None:
        return None
    from datasets.features.image import open_picture

    (page / "pictures").mkdir()
    paths: list[str | None] = []
    for number, source in enumerate(tqdm(catalog.pictures, desc="pictures", disable=None), start=1):
        picture, _ = open_picture(source)
        paths.append(f"pictures/{number}.webp" if picture else None)
        if picture:
            picture.thumbnail((PICTURE, PICTURE))
            picture.save(page / f"pictures/{number}.webp", quality=80)
    return paths


if __name__ == "__main__":
    run_cli(main)
