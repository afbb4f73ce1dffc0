"""Pictures by an open_clip model. F: feature width, B: batch."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from datasets.features.encoders.base import DTYPES, Encoder, digest, normalised, offline_without_network


class OpenClipEncoder(Encoder):
    """The image tower of an open_clip model."""

    def __init__(self, name: str, device: Any, precision: str = "fp32") -> None:
        architecture, _, weights = name.partition("/")
        if not Path(weights).is_file():
            offline_without_network()
        import torch

        try:
            import open_clip
        except ImportError as error:
            raise InputError(f"--img_encoder {name!r} needs open_clip: pip install open_clip_torch") from error
        if architecture not in open_clip.list_models() or not weights:
            raise InputError(
                f"--img_encoder {name!r} must be 'pixel', or MODEL/PRETRAINED or MODEL/path-to-weights with one of "
                f"open_clip's models, such as ViT-L-16-SigLIP-256/webli"
            )
        try:
            preprocessing = _preprocessing(architecture) if Path(weights).is_file() else {}
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=weights, precision=precision, **preprocessing
            )
        except Exception as error:  # whatever the hub client, the checkpoint reader or the model raise
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"--img_encoder {name!r} cannot be loaded ({first}). Without network, give MODEL/path-to-weights of a "
                f"local file, or 'pixel', which needs no download"
            ) from error
        self.prepare = partial(_pixels, self.preprocess)
        self.model, self.device = model.to(device).eval(), torch.device(device)
        self.dtype, self.on_gpu = getattr(torch, DTYPES[precision]), self.device.type == "cuda"
        self.slow_to_prepare = self.on_gpu  # on a CPU decoding is a twentieth, and takes cores from the encoder
        size = open_clip.get_model_preprocess_cfg(model)["size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.dim = self.forward(torch.zeros(1, 3, height, width)).shape[1]
        self.fingerprint = open_clip_fingerprint(name)

    def forward(self, prepared: Any) -> np.ndarray:
        import torch

        pixels = prepared.to(self.device, self.dtype, non_blocking=True)
        with torch.inference_mode():
            return normalised(self.model.encode_image(pixels).float().cpu().numpy())


def _pixels(preprocess: Callable[[Any], Any], pictures: Iterable[Any]) -> Any:
    """What a picture encoder reads, a tensor [B, 3, height, width]."""
    import torch

    return torch.stack([preprocess(picture.convert("RGB")) for picture in pictures])


def _preprocessing(architecture: str) -> dict[str, Any]:
    """How the published weights of an architecture want their pictures: a file of weights does not say, and open_clip
    would take CLIP's way for SigLIP's too."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    published = open_clip.get_pretrained_cfg(architecture, tags[0]) if tags else {}
    names = {"mean": "image_mean", "std": "image_std"}
    names |= {"interpolation": "image_interpolation", "resize_mode": "image_resize_mode"}
    return {argument: published[name] for name, argument in names.items() if name in published}


def open_clip_fingerprint(name: str) -> dict[str, Any]:
    """What its features depend on beside the pictures; known without loading it. `version` is raised when the
    preprocessing here changes."""
    architecture, _, weights = name.partition("/")
    weights = digest([Path(weights)]) if Path(weights).is_file() else weights
    return {"encoder": "open_clip", "version": 1, "model": architecture, "weights": weights}
