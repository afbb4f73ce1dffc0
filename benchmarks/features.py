"""Time making features against the encoder's bare forward on batches that are ready, and the memory that pictures take.

python -m benchmarks.features --texts path/to/meta.json.gz --language_encoder path/to/all-MiniLM-L6-v2
python -m benchmarks.features --help
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.measure import paired, where
from common.cli import Parser, run_cli
from common.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from datasets.catalog import Catalog
    from datasets.features.encoder import Encoder


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", help="a meta.json.gz of which texts are taken (without: no texts)")
    parser.add_argument("--language_encoder", help="a text encoder's folder or name, as of train.py")
    parser.add_argument("--num_texts", type=int, default=2000, help="texts (default: 2000)")
    parser.add_argument("--img_model", default="ViT-B-16-SigLIP", help="a model of open_clip, of random weights "
                        "(default: ViT-B-16-SigLIP; none: no pictures)")  # fmt: skip
    parser.add_argument("--num_pictures", type=int, default=96, help="JPEGs of 500 x 500 (default: 96)")
    parser.add_argument("--batch", type=int, default=32, help="texts or pictures in a batch (default: 32)")
    parser.add_argument("--workers", type=int, default=4, help="processes at most that read ahead (default: 4)")
    parser.add_argument("--precisions", default="fp32,bf16", help="(default: fp32,bf16)")
    parser.add_argument("--runs", type=int, default=3, help="paired runs of each (default: 3)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    parser.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_of:  # a process of its own: the peak of a process is never given back
        print(peak_memory(arguments.memory_of, arguments.workers))
        return
    if bool(arguments.texts) != bool(arguments.language_encoder):
        raise InputError("--texts and --language_encoder are given together, or neither")
    print(f"{where(arguments.device)}; batches of {arguments.batch}, {arguments.workers} workers, medians of "
          f"{arguments.runs} paired runs")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if arguments.texts:
            compare("texts", text_catalog(Path(arguments.texts), arguments.num_texts), arguments, Path(folder))
        if arguments.img_model == "none":
            return
        catalog = picture_catalog(Path(folder), arguments.num_pictures)
        compare("pictures", catalog, arguments, Path(folder))
    for count in (400, 1600):
        command = [
            sys.executable,
            "-m",
            "benchmarks.features",
            *(sys.argv[1:] if argv is None else argv),
            "--memory_of",
            str(count),
        ]
        peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        print(f"  {count} pictures, pixel encoder: {float(peak):.0f} MB peak resident memory of all processes")


def compare(what: str, catalog: Catalog, arguments: argparse.Namespace, folder: Path) -> None:
    """Print the rates of the bare forward and of `load_features`, and their ratio, in each precision."""
    import numpy as np

    from config import FeatureSettings
    from datasets.features import image, text
    from datasets.features.encoder import normalised
    from datasets.features.load import load_features
    from datasets.features.modality import EncodedModality
    from datasets.features.registry import modalities

    is_text = what == "texts"
    name = arguments.language_encoder if is_text else random_weights(arguments.img_model, folder)
    settings = FeatureSettings(
        use_language_encoder=is_text,
        language_encoder=name,
        item_attributes=("text",),
        use_img_encoder=not is_text,
        img_encoder=name,
        encoder_batch_size=arguments.batch,
        encoder_workers=arguments.workers,
    )
    [modality] = modalities(settings)
    assert isinstance(modality, EncodedModality)
    module = text if is_text else image
    texts = [record.get("text") for record in catalog.metadata]
    items: Sequence[Any] = catalog.pictures or []
    print(f"{len(texts)} {what}, {Path(name).name if is_text else arguments.img_model}")
    made: dict[str, np.ndarray] = {}
    fingerprint = module.fingerprint(name)
    for precision in arguments.precisions.split(","):
        encoder = module.load_encoder(name, arguments.device, precision)
        items = encoder.tokenize(texts if is_text else items)
        rows = modality.batches(items, arguments.batch)
        ready = [modality.read(encoder.prepare, [items[row] for row in batch])[2] for batch in rows]

        def at_hand(*_: Any, encoder: Encoder = encoder) -> Encoder:
            return encoder

        def forward(encoder: Encoder = encoder, ready: list[Any] = ready) -> None:
            for batch in ready:
                encoder.forward(batch)

        def whole(precision: str = precision) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as cache_root:
                [rows] = load_features(
                    replace(settings, encoder_precision=precision),
                    catalog,
                    arguments.device,
                    cache_root=Path(cache_root),
                    say=lambda _: None,
                )
                made[precision] = rows.astype(np.float32)

        with (  # no weights are hashed or loaded while the clock runs
            patch.object(module, "load_encoder", at_hand),
            patch.object(module, "fingerprint", lambda name: fingerprint),
        ):
            seconds = paired({"bare forward": forward, "whole path": whole}, arguments.runs, arguments.device)
        ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
        rates = {case: len(texts) / statistics.median(values) for case, values in seconds.items()}
        print(f"  {precision}  bare forward {rates['bare forward']:8.1f}/s   whole path {rates['whole path']:8.1f}/s   "
              f"{ratio:.1%}", flush=True)  # fmt: skip
    if len(made) > 1:
        names = list(made)
        first, last = (normalised(made[name]) for name in (names[0], names[-1]))  # their files are rounded
        cosines = (first * last).sum(axis=1)
        print(f"  cosine of {names[0]} and {names[-1]}: least {cosines.min():.5f}, mean {cosines.mean():.5f}")


def text_catalog(path: Path, count: int) -> Catalog:
    """Every so many-th item of a metadata file, its text made as of a dataset."""
    from common.files import read_text
    from config import Config
    from datasets.records import parse_record
    from datasets.text import item_text

    lines = [line for line in read_text(path, "give a meta.json.gz").split("\n") if line.strip()]
    records = [parse_record(line) for line in lines[:: max(1, len(lines) // count)][:count]]
    texts = [item_text(record or {}, Config.item_attributes) for record in records]
    return made_up([{"text": text} for text in texts], None, path.parent)


def picture_catalog(folder: Path, count: int) -> Catalog:
    """JPEGs of 500 x 500: smooth noise from a seed, about as large on disk as a product's photo."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures: list[Path | None] = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(60, 60, 3), dtype=np.uint8))
        path = folder / f"{number}.jpg"
        pictures.append(path)
        coarse.resize((500, 500), Image.Resampling.BICUBIC).save(path, quality=90)
    return made_up([{}] * count, pictures, folder)


def made_up(metadata: list[dict], pictures: list[Path | None] | None, photos: Path) -> Catalog:
    import numpy as np

    from datasets.catalog import Catalog, Sequences

    asins = [f"B{number:09d}" for number in range(len(metadata))]
    nobody = Sequences(np.zeros(0, np.int64), np.zeros(1, np.int64))
    return Catalog("benchmark", nobody, asins, metadata, pictures, photos, [])


def random_weights(model: str, folder: Path) -> str:
    """The name of an image encoder of open_clip's architecture, with random weights from a seed."""
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model(model).state_dict(), folder / "weights.pt")
    return f"{model}/{folder / 'weights.pt'}"


def peak_memory(count: int, workers: int) -> float:
    """MB at the peak of this process and the workers that it had, reading and encoding `count` pictures."""
    import resource

    from benchmarks.measure import memory
    from config import FeatureSettings
    from datasets.features.load import load_features

    settings = FeatureSettings(use_language_encoder=False, img_encoder="pixel", encoder_workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        catalog = picture_catalog(Path(folder), count)
        load_features(settings, catalog, "cpu", cache_root=Path(folder) / "cache", say=lambda _: None)
    return memory("VmHWM") + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    run_cli(main)
