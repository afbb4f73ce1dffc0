"""Pictures of items, read by a picture encoder. F feature width, B batch, n new products.

Encoders: pixel (built in), or any open_clip model as MODEL/PRETRAINED or MODEL/path-to-weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from common import processes
from common.errors import InputError
from common.files import check_regular, file_exists
from datasets.features import cache, encode
from datasets.features.encode import DTYPES, Encoder, digest, normalised, offline_without_network
from datasets.features.modality import CHUNK, EncodedModality, Job, Record
from datasets.features.modality import digest as digest_of_texts
from datasets.items import ITEM2IMG

if TYPE_CHECKING:
    from config import FeatureSettings
    from datasets.catalog import Catalog

MAX_PIXELS = 50_000_000  # a picture that claims more is not decoded
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # others are not decoded: EPS would start a program
NO_PICTURE = "no picture listed"
PIXEL: dict[str, Any] = {"encoder": "pixel", "version": 1}


@dataclass(frozen=True)
class ImageModality(EncodedModality):
    """The picture of an item, read by a picture encoder."""

    encoder: str
    trained: Mapping[str, Any] | None = None  # the description in an export

    kind = block = "image"
    flag = "img_encoder"
    built_in = "pixel"
    unit = "pictures"

    @classmethod
    def from_settings(cls, settings: FeatureSettings) -> list[Self]:
        return [cls(settings.img_encoder)] if settings.use_img_encoder else []

    @classmethod
    def from_description(cls, description: Any, encoder: str | None) -> Self:
        return cls(encoder or description["encoder"], description)

    def inputs(self, job: Job) -> list[Path | None]:
        catalog, pictures = job.catalog, job.catalog.pictures or []
        if not any(pictures):
            raise InputError(_no_pictures(catalog, f"{ITEM2IMG} lists none" if catalog.pictures else f"no {ITEM2IMG}"))
        return pictures

    def key(self, job: Job, inputs: Sequence[Path | None]) -> dict[str, Any]:
        signatures = (_file_signature(picture, job.catalog.photos) for picture in inputs)
        items = digest_of_texts([*job.catalog.asins, *signatures])
        return {"kind": self.kind, **self.fingerprint(), "items": items}

    def refuse_change(self, job: Job) -> None:
        processes.print_main(
            "the pictures or their encoder's weights are not those that the run was trained on, or were copied without "
            "their times"
        )

    def check_name(self) -> None:
        if self.encoder != self.built_in:
            _check_open_clip_name(self.encoder)

    def load_encoder(self, device: Any, precision: str) -> Encoder:
        return load_encoder(self.encoder, device, precision)

    def on_disk(self) -> bool:
        architecture, _, weights = self.encoder.partition("/")
        if self.encoder == self.built_in or file_exists(weights):
            return True
        _check_open_clip_name(self.encoder)
        import open_clip
        from huggingface_hub import try_to_load_from_cache

        published = open_clip.get_pretrained_cfg(architecture, weights)
        repository, _, name = published.get("hf_hub", "").rpartition("/")
        if not repository:
            return Path("~/.cache/clip", Path(published.get("url", "")).name).expanduser().is_file()
        names = (name,) if name else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.encoder)

    @staticmethod
    def read(prepare: Callable, batch: list[Any]) -> tuple[int, list[int], Any]:
        """As in the base; pictures are decoded one after another."""
        kept: list[int] = []

        def readable() -> Iterator[Any]:
            for row, path in enumerate(batch):
                picture, _ = open_picture(path)
                if picture is not None:
                    kept.append(row)
                    yield picture

        pictures = readable()
        first = list(itertools.islice(pictures, 1))
        return len(batch), kept, prepare(itertools.chain(first, pictures)) if first else None

    def unreadable(self, inputs: Sequence[Path | None], features: np.ndarray, job: Job) -> dict[str, str]:
        """As in the base. Pictures are opened again at the end, so that the reasons outlast a kill."""
        reasons = {}
        for start in range(0, len(features), CHUNK):
            for row in (start + np.flatnonzero(~features[start : start + CHUNK].any(axis=1))).tolist():
                reasons[job.catalog.asins[row]] = open_picture(inputs[row])[1] or "it could not be read at first"
        if len(reasons) == len(inputs):
            raise InputError(_no_pictures(job.catalog, next(iter(reasons.values()))))
        return reasons

    def differ(self, inputs: Sequence[Path | None]) -> bool:
        pictures = (picture for picture, _ in map(open_picture, inputs) if picture is not None)
        first: Any = next(pictures, None)
        return any(picture.size != first.size or picture.tobytes() != first.tobytes() for picture in pictures)

    def note(self, file: cache.File, job: Job) -> None:
        if without := len(file.header["broken"]):
            processes.print_main(
                f"{without} of {job.catalog.num_items} items have no readable picture: zero vectors, named in "
                f"{cache.sidecar(file.path)}"
            )

    def describe(self, width: int) -> dict[str, Any]:
        return {"encoder": self.encoder, "fingerprint": self.fingerprint()}

    def has_input(self, record: Record) -> bool:
        return _picture(record) is not None

    @cached_property
    def trained_encoder(self) -> Encoder:
        """The encoder of the training, loaded once. Raises InputError if it is another one."""
        assert self.trained is not None  # made by from_description
        self.check_encoder(self.trained)
        return self.load_encoder("cpu", "fp32")

    def embed(self, records: Sequence[Record]) -> np.ndarray:
        encoder = self.trained_encoder
        pictures = [_picture(record) for record in records]
        features = encode.encode_all(encoder, self.read, pictures, self.batches(pictures, 32))
        for number, (path, row) in enumerate(zip(pictures, features, strict=True), start=1):
            if path is not None and not row.any():  # without a path it is a zero vector, as in training
                raise InputError(
                    f"the picture of record {number} cannot be read ({open_picture(path)[1]}); give another, or none"
                )
        return features


def _picture(record: Record) -> Path | None:
    path = record.get("picture")  # NaN in a data frame's empty cell
    return Path(path) if path and isinstance(path, str | Path) else None


def _no_pictures(catalog: Catalog, why: str) -> str:
    from datasets.catalog import prepare_command

    command = prepare_command(catalog.photos.parents[1], catalog.name, only="pictures")
    return (
        f"{catalog.name} has no picture that can be read ({why}); --no-use_img_encoder trains without pictures, and "
        f"{command} fetches those with an address in the metadata"
    )


def _file_signature(path: Path | None, photos: Path) -> str:
    try:
        stat = path.stat() if path else None
    except OSError:
        stat = None
    return f"{path.relative_to(photos)} {stat.st_size} {stat.st_mtime_ns}" if path and stat else ""


def open_picture(path: Path | None) -> tuple[Any | None, str]:
    """Return (the picture in RGB, ""), or (None, why it cannot be read)."""
    from PIL import Image

    if path is None:
        return None, NO_PICTURE
    try:
        check_regular(path, "give a picture")
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
            return _as_rgb(picture), ""
    except Exception as error:  # decoders raise many kinds
        return None, f"{path.name}: {error}"


def _as_rgb(picture: Any) -> Any:
    """Return the first frame, upright as its EXIF says, 16-bit grey scaled to 8 bits, transparency on white."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # convert() would clip at 255
        return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


# -------------------------------------------------------------------------------------------------------- the encoders


def load_encoder(name: str, device: Any, precision: str = "fp32") -> Encoder:
    """Return the picture encoder, computing in fp32, bf16 or fp16. Raises InputError if it cannot be loaded."""
    return PixelEncoder() if name == "pixel" else OpenClipEncoder(name, device, precision)


def fingerprint(name: str) -> dict[str, Any]:
    """Return everything that features depend on besides the pictures, without loading the encoder."""
    return PixelEncoder.fingerprint if name == "pixel" else open_clip_fingerprint(name)


class PixelEncoder(Encoder):
    """Colour and shape statistics of a 32 x 32 thumbnail; no download.

    A histogram of hue and saturation, and the mean colour and gradient orientations of 4 x 4 cells; all three parts
    weigh the same.
    """

    side, cells = 32, 4
    dim = 16 * 4 + 4 * 4 * 3 + 4 * 4 * 8
    fingerprint = PIXEL

    def prepare(self, batch: Iterable[Any]) -> np.ndarray:
        return normalised(np.stack([self._describe(picture) for picture in batch]))

    def _describe(self, picture: Any) -> np.ndarray:
        thumbnail = picture.convert("RGB").resize((self.side, self.side))
        hue, saturation, value = np.asarray(thumbnail.convert("HSV"), dtype=np.float64).transpose(2, 0, 1) / 255
        colours, _, _ = np.histogram2d(
            hue.ravel(), saturation.ravel(), bins=(16, 4), range=((0, 1), (0, 1)), weights=value.ravel()
        )
        means = self._by_cell(np.asarray(thumbnail, dtype=np.float64) / 255 - 0.5).mean(axis=2)
        dy, dx = np.gradient(value)
        bins = ((np.arctan2(dy, dx) / np.pi + 1) * 4).astype(int) % 8
        edges = self._by_cell(np.hypot(dx, dy)[..., None] * (bins[..., None] == np.arange(8))).sum(axis=2)
        return np.concatenate([normalised(part.reshape(1, -1))[0] for part in (colours, means, edges)])

    def _by_cell(self, image: np.ndarray) -> np.ndarray:
        """[side, side, channels] -> [cells, cells, pixels of a cell, channels]."""
        k, n = self.cells, self.side // self.cells
        return image.reshape(k, n, k, n, -1).swapaxes(1, 2).reshape(k, k, n * n, -1)


class OpenClipEncoder(Encoder):
    """The image tower of an open_clip model."""

    def __init__(self, name: str, device: Any, precision: str = "fp32") -> None:
        architecture, _, weights = name.partition("/")
        if not file_exists(weights):
            offline_without_network()
        import torch

        _check_open_clip_name(name)
        import open_clip

        try:
            preprocessing = _preprocessing(architecture) if file_exists(weights) else {}
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=weights, precision=precision, **preprocessing
            )
        except Exception as error:  # the hub client, the checkpoint reader and the model raise many kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"--img_encoder {name!r} cannot be loaded ({first}). Without network, give MODEL/path-to-weights of a "
                f"local file, or 'pixel', which needs no download"
            ) from error
        self.prepare = partial(_pixels, self.preprocess)
        self.model, self.device = model.to(device).eval(), torch.device(device)
        self.dtype, self.on_gpu = getattr(torch, DTYPES[precision]), self.device.type == "cuda"
        self.slow_to_prepare = (
            self.on_gpu
        )  # on a CPU decoding takes a twentieth of the time, and cores from the encoder
        size = open_clip.get_model_preprocess_cfg(model)["size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.dim = self.forward(torch.zeros(1, 3, height, width)).shape[1]
        self.fingerprint = open_clip_fingerprint(name)

    def forward(self, prepared: Any) -> np.ndarray:
        import torch

        pixels = prepared.to(self.device, self.dtype, non_blocking=True)
        with torch.inference_mode():
            return normalised(self.model.encode_image(pixels).float().cpu().numpy())


def _check_open_clip_name(name: str) -> None:
    """Raise InputError unless open_clip is installed and has the model."""
    try:
        import open_clip
    except ImportError as error:
        raise InputError(f"--img_encoder {name!r} needs open_clip: pip install open_clip_torch") from error
    architecture, _, weights = name.partition("/")
    if architecture not in open_clip.list_models() or not weights:
        raise InputError(
            f"--img_encoder {name!r} must be 'pixel', or MODEL/PRETRAINED or MODEL/path-to-weights with one of "
            f"open_clip's models, such as ViT-L-16-SigLIP-256/webli"
        )


def _pixels(preprocess: Callable[[Any], Any], pictures: Iterable[Any]) -> Any:
    """Return the model's input, a tensor [B, 3, height, width]."""
    import torch

    return torch.stack([preprocess(picture.convert("RGB")) for picture in pictures])


def _preprocessing(architecture: str) -> dict[str, Any]:
    """Return the preprocessing of an architecture's published weights.

    A file of weights does not say it, and open_clip would preprocess for SigLIP as for CLIP.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    published = open_clip.get_pretrained_cfg(architecture, tags[0]) if tags else {}
    names = {"mean": "image_mean", "std": "image_std"}
    names |= {"interpolation": "image_interpolation", "resize_mode": "image_resize_mode"}
    return {argument: published[name] for name, argument in names.items() if name in published}


def open_clip_fingerprint(name: str) -> dict[str, Any]:
    """Return the fingerprint of an open_clip encoder. Raise `version` when the preprocessing here changes."""
    architecture, _, weights = name.partition("/")
    if file_exists(weights):
        weights = digest([Path(weights)])
    return {"encoder": "open_clip", "version": 1, "model": architecture, "weights": weights}
