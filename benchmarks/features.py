"""Time feature encoding against the bare forward pass, and measure its memory.

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
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks import describe_environment, memory_mb, time_paired
from common.cli import Parser, run_cli
from common.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from datasets.catalog import Catalog
    from datasets.features.encode import Encoder


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", metavar="FILE", help="a meta.json.gz with the texts (default: no texts)")
    parser.add_argument("--language_encoder", metavar="NAME", help="text encoder, as for train.py")
    parser.add_argument("--num_texts", type=int, default=2000, help="number of texts (default: 2000)")
    parser.add_argument(
        "--img_model",
        default="ViT-B-16-SigLIP",
        metavar="NAME",
        help="open_clip model, with random weights; none: no pictures (default: ViT-B-16-SigLIP)",
    )
    parser.add_argument("--num_pictures", type=int, default=96, help="number of 500 x 500 JPEGs (default: 96)")
    parser.add_argument("--batch", type=int, default=32, help="texts or pictures per batch (default: 32)")
    parser.add_argument("--workers", type=int, default=4, help="maximum number of prefetching processes (default: 4)")
    parser.add_argument(
        "--precisions", default="fp32,bf16", metavar="NAME,NAME", help="encoder precisions (default: fp32,bf16)"
    )
    parser.add_argument("--runs", type=int, default=3, help="paired runs of each case (default: 3)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device (default: cpu)")
    parser.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_of:  # in a separate process: peak memory never decreases
        print(peak_memory(arguments.memory_of, arguments.workers))
        return
    if bool(arguments.texts) != bool(arguments.language_encoder):
        raise InputError("--texts and --language_encoder need each other; give both or neither")
    print(f"{describe_environment(arguments.device)}; batches of {arguments.batch}, {arguments.workers} workers, "
          f"medians of {arguments.runs} paired runs")  # fmt: skip
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


def compare(kind: str, catalog: Catalog, arguments: argparse.Namespace, folder: Path) -> None:
    """Print the rates of the forward pass and of `load_features`, per precision."""
    import numpy as np

    from config import FeatureSettings
    from datasets.features import image, text
    from datasets.features.encode import normalised
    from datasets.features.load import load_features, modalities
    from datasets.features.modality import EncodedModality

    is_text = kind == "texts"
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
    print(f"{len(texts)} {kind}, {Path(name).name if is_text else arguments.img_model}")
    features: dict[str, np.ndarray] = {}
    fingerprint = module.fingerprint(name)
    for precision in arguments.precisions.split(","):
        encoder = module.load_encoder(name, arguments.device, precision)
        items = encoder.tokenize(texts if is_text else items)
        rows = modality.batches(items, arguments.batch)
        batches = [modality.read(encoder.prepare, [items[row] for row in batch])[2] for batch in rows]

        def loaded_encoder(*_: Any, encoder: Encoder = encoder) -> Encoder:
            return encoder

        def forward(encoder: Encoder = encoder, batches: list[Any] = batches) -> None:
            for batch in batches:
                encoder.forward(batch)

        def whole_path(precision: str = precision) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as cache_root, redirect_stdout(None):
                [rows] = load_features(
                    replace(settings, encoder_precision=precision, features_root=cache_root),
                    catalog,
                    arguments.device,
                )
                features[precision] = rows.astype(np.float32)

        with (  # keep hashing and loading of weights out of the timing
            patch.object(module, "load_encoder", loaded_encoder),
            patch.object(module, "fingerprint", lambda name: fingerprint),
        ):
            seconds = time_paired({"bare forward": forward, "whole path": whole_path}, arguments.runs, arguments.device)
        ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
        rates = {case: len(texts) / statistics.median(values) for case, values in seconds.items()}
        print(f"  {precision}  bare forward {rates['bare forward']:8.1f}/s   whole path {rates['whole path']:8.1f}/s   "
              f"{ratio:.1%}", flush=True)  # fmt: skip
    if len(features) > 1:
        names = list(features)
        first, last = (normalised(features[name]) for name in (names[0], names[-1]))  # cached features are rounded
        cosines = (first * last).sum(axis=1)
        print(f"  cosine of {names[0]} and {names[-1]}: least {cosines.min():.5f}, mean {cosines.mean():.5f}")


def text_catalog(path: Path, count: int) -> Catalog:
    """Return a catalogue of `count` evenly spaced items' texts in a metadata file."""
    from common.files import read_text
    from config import Config
    from datasets.items import item_text
    from datasets.records import parse_record

    lines = [line for line in read_text(path, "give a meta.json.gz").split("\n") if line.strip()]
    records = [parse_record(line) for line in lines[:: max(1, len(lines) // count)][:count]]
    texts = [item_text(record or {}, Config.item_attributes) for record in records]
    return make_catalog([{"text": text} for text in texts], None, path.parent)


def picture_catalog(folder: Path, count: int) -> Catalog:
    """Return a catalogue of 500 x 500 JPEGs of smooth noise.

    Their file size is about that of product photos.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures: list[Path | None] = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(60, 60, 3), dtype=np.uint8))
        path = folder / f"{number}.jpg"
        pictures.append(path)
        coarse.resize((500, 500), Image.Resampling.BICUBIC).save(path, quality=90)
    return make_catalog([{}] * count, pictures, folder)


def make_catalog(metadata: list[dict], pictures: list[Path | None] | None, photos: Path) -> Catalog:
    """Return a catalogue without users."""
    import numpy as np

    from datasets.catalog import Catalog, Sequences

    asins = [f"B{number:09d}" for number in range(len(metadata))]
    no_users = Sequences(np.zeros(0, np.int64), np.zeros(1, np.int64))
    return Catalog("benchmark", no_users, asins, metadata, pictures, photos, [])


def random_weights(model: str, folder: Path) -> str:
    """Save random weights of an open_clip model and return the encoder's name."""
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model(model).state_dict(), folder / "weights.pt")
    return f"{model}/{folder / 'weights.pt'}"


def peak_memory(count: int, workers: int) -> float:
    """Encode `count` pictures; return the peak MB of this process and its workers."""
    import resource

    from config import FeatureSettings
    from datasets.features.load import load_features

    with tempfile.TemporaryDirectory() as folder:
        settings = FeatureSettings(
            use_language_encoder=False, img_encoder="pixel", encoder_workers=workers, features_root=f"{folder}/cache"
        )
        load_features(settings, picture_catalog(Path(folder), count), "cpu")
    return memory_mb("VmHWM") + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    run_cli(main)
