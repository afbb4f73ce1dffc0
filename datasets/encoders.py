"""Frozen encoders: a text or a picture in, one L2-normalised feature vector out.

Text:     lexical, or any Hugging Face text encoder by name or local folder
Pictures: pixel, or any open_clip model as MODEL/PRETRAINED or MODEL/path-to-weights

Every encoder has a `fingerprint` (what its features depend on, for the cache), a width `dim`, and
`encode(batch) -> float32 array [len(batch), dim]`. F: feature width, B: batch.

`encode` is `forward(prepare(tokenize(batch)))`. Worker processes may do `prepare`, which holds no weights and can be
pickled; it reads its batch one by one, so that of many pictures only one is there decoded.
"""

import hashlib
import itertools
import json
import os
import socket
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from config import InputError


class Encoder:
    """What datasets/features.py asks of an encoder. The two without weights do all in `prepare`."""

    dim: int
    fingerprint: dict[str, Any]
    prepare: Callable[[Iterable[Any]], Any]
    slow_to_prepare = True  # beside `forward`: long enough for processes of its own to pay
    on_gpu = False

    def forward(self, prepared: Any) -> np.ndarray:
        """What `prepare` made of a batch -> [B, F] float32, rows of length 1."""
        return prepared

    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        """Texts or pictures -> [B, F] float32, rows of length 1."""
        return self.forward(self.prepare(self.tokenize(batch)))

    def tokenize(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Texts as `prepare` takes them, each as long as there is to read; pictures as they are."""
        return batch


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, zero rows left alone: [B, F] -> [B, F] float32."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


# ------------------------------------------------------------------------------------------------- without download

LEXICAL: dict[str, Any] = {"encoder": "lexical", "version": 1}
PIXEL: dict[str, Any] = {"encoder": "pixel", "version": 1}


class LexicalEncoder(Encoder):
    """Hashed bag of words, word pairs and character trigrams, each term weighted 1 + log(count)."""

    dim = 1024
    fingerprint = LEXICAL

    def prepare(self, batch: Iterable[str]) -> np.ndarray:
        batch = list(batch)
        vectors = np.zeros((len(batch), self.dim))
        for row, text in enumerate(batch):
            for term, count in Counter(self._terms(text)).items():
                code = zlib.crc32(term.encode())
                vectors[row, code % self.dim] += (1 + np.log(count)) * (1 if code & 1 << 31 else -1)
        return normalised(vectors)

    @staticmethod
    def _terms(text: str) -> list[str]:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
        trigrams = [f"#{w[i : i + 3]}" for w in (f"<{word}>" for word in words) for i in range(len(w) - 2)]
        return words + pairs + trigrams


class PixelEncoder(Encoder):
    """Colour and shape statistics of a 32 x 32 thumbnail: a histogram of hue and saturation, the mean colour and the
    gradient orientations of 4 x 4 cells. The three parts weigh the same."""

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


# --------------------------------------------------------------------------------------------------------- precision

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of torch, by --encoder_precision


def best_precision(device: Any) -> str:
    """The fastest that the device computes in: bf16, fp16 on a GPU without it, fp32 on a CPU without it."""
    import torch

    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


# --------------------------------------------------------------------------------------------------- Hugging Face text


class TransformersEncoder(Encoder):
    """A Hugging Face text encoder, pooled as its own 1_Pooling/config.json says: the mean of the tokens or the first
    one. Without such a file the first token, as bge needs it. Pooling and normalisation are in float32."""

    def __init__(self, name: str, device: Any, precision: str = "fp32") -> None:
        model_id, revision, is_folder = _split_revision(name)
        if not is_folder:
            _offline_without_network()
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        if not is_folder and "/" not in name and hub_commit(name) is None:
            raise InputError(
                f"--language_encoder {name!r} is neither a folder nor of the form ORGANISATION/MODEL; 'lexical' is "
                f"built in"
            )
        options = {} if is_folder else {"revision": revision}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False, **options)
            if len(self.tokenizer) <= len(self.tokenizer.all_special_tokens):  # made up where its files are missing
                raise ValueError("its tokenizer has no words")
            dtype = getattr(torch, DTYPES[precision])
            model, loaded = AutoModel.from_pretrained(
                model_id, trust_remote_code=False, output_loading_info=True, dtype=dtype, **options
            )
            missing = sorted(k for k in loaded["missing_keys"] if "pooler" not in k)
            if missing:
                raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")
            self.model = model.to(device).eval()
            self.pooling = _pooling(model_id, revision)
            limits = _model_json(model_id, revision, "sentence_bert_config.json", needed=False) or {}
            self.max_length = min(
                self.tokenizer.model_max_length,
                getattr(self.model.config, "max_position_embeddings", 512),
                limits.get("max_seq_length") or 512,
            )
            self.prepare = partial(_padded, self.tokenizer.pad_token_id or 0, self.tokenizer.padding_side)
            self.device = torch.device(device)
            self.on_gpu, self.slow_to_prepare = self.device.type == "cuda", False
            self.dim = self.encode([""]).shape[1]
        except Exception as error:  # whatever the hub client, the weights' reader or the model raise
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            where = "its folder" if is_folder else "the hub, and no such folder is here"
            raise InputError(
                f"--language_encoder {name!r} cannot be loaded from {where} ({first}). Without network, give a local "
                f"folder with the model's config.json, tokenizer and weights, or 'lexical', which needs no download"
            ) from error
        self.fingerprint = language_fingerprint(name)

    def forward(self, prepared: dict[str, Any]) -> np.ndarray:
        import torch

        tokens = {name: values.to(self.device, non_blocking=True) for name, values in prepared.items()}
        with torch.inference_mode():
            states = self.model(**tokens).last_hidden_state.float()  # [B, tokens, F]
            if self.pooling == "mean":
                weights = tokens["attention_mask"][..., None].to(states.dtype)
                states = (states * weights).sum(dim=1) / weights.sum(dim=1)
            else:
                states = states[:, 0]
        return normalised(states.cpu().numpy())

    def tokenize(self, batch: Sequence[str]) -> list[np.ndarray]:
        texts, read = list(batch), {"truncation": True, "max_length": self.max_length, "return_attention_mask": False}
        chunks = (self.tokenizer(texts[at : at + 1000], **read)["input_ids"] for at in range(0, len(texts), 1000))
        return [np.array(tokens, dtype=np.int32) for chunk in chunks for tokens in chunk]


def _padded(pad: int, side: str, batch: Iterable[np.ndarray]) -> dict[str, Any]:
    """What a text encoder reads, tensors [B, tokens]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.from_numpy(tokens).long() for tokens in batch]
    return {
        "input_ids": pad_sequence(ids, True, pad, side),
        "attention_mask": pad_sequence([torch.ones_like(tokens) for tokens in ids], True, 0, side),
    }


def _offline_without_network() -> None:
    """Let the hub's client use its local cache at once where the hub's name does not even resolve; it would ask again
    for most of a minute, for every file."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # the proxy resolves it
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _split_revision(name: str) -> tuple[str, str, bool]:
    """(folder or hub name, revision, whether it is a folder)."""
    if Path(name).is_dir():
        return name, "", True
    model_id, _, revision = name.partition("@")
    return model_id, revision or "main", False


def _pooling(model_id: str, revision: str) -> str:
    """ "mean" or "first token", as the model's own configuration says. Raises ValueError for any other way."""
    modules = _model_json(model_id, revision, "modules.json", needed=False) or []
    other = [m["type"] for m in modules if m["type"].split(".")[-1] not in ("Transformer", "Pooling", "Normalize")]
    if other:
        raise ValueError(f"its modules {other} beyond encoder, pooling and normalisation are not supported")
    modes = _model_json(model_id, revision, "1_Pooling/config.json")
    if modes is None:
        return "first token"
    chosen = {mode.removeprefix("pooling_mode_") for mode, on in modes.items() if on is True}
    chosen |= {mode for mode in [modes.get("pooling_mode")] if mode}  # newer files name it
    for pooling, names in {"mean": {"mean_tokens", "mean"}, "first token": {"cls_token", "cls"}}.items():
        if len(chosen & names) and chosen <= names | {"include_prompt"}:
            return pooling
    raise ValueError(f"its pooling {sorted(chosen)} is neither the mean of the tokens nor the first token")


def _model_json(model_id: str, revision: str, name: str, needed: bool = True) -> Any | None:
    """A JSON file of a model, None where the model has none. Raises ValueError where a needed one is out of reach."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path = Path(model_id, name)
    if not Path(model_id).is_dir():
        try:
            path = Path(hf_hub_download(model_id, name, revision=revision))
        except LocalEntryNotFoundError:
            if needed and try_to_load_from_cache(model_id, name, revision=revision) is not _CACHED_NO_EXIST:
                raise ValueError(f"its {name} is not in the local cache and there is no network") from None
            return None
        except EntryNotFoundError:
            return None
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ------------------------------------------------------------------------------------------------ open_clip pictures


class OpenClipEncoder(Encoder):
    """The image tower of an open_clip model."""

    def __init__(self, name: str, device: Any, precision: str = "fp32") -> None:
        architecture, _, weights = name.partition("/")
        if not Path(weights).is_file():
            _offline_without_network()
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
        self.fingerprint = image_fingerprint(name)

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


# ---------------------------------------------------------------------------------------------------------- by name


BUILT_IN = ("lexical", "pixel")  # without weights, so of no precision


def language_encoder(name: str, device: Any, precision: str = "fp32") -> Encoder:
    """The text encoder of this name, computing in fp32, bf16 or fp16. Raises InputError where it cannot be had."""
    return LexicalEncoder() if name == "lexical" else TransformersEncoder(name, device, precision)


def image_encoder(name: str, device: Any, precision: str = "fp32") -> Encoder:
    """The picture encoder of this name, computing in fp32, bf16 or fp16. Raises InputError where it cannot be had."""
    return PixelEncoder() if name == "pixel" else OpenClipEncoder(name, device, precision)


def language_fingerprint(name: str) -> dict[str, Any]:
    """What text features depend on beside the texts; known without loading the encoder. `version` is raised when the
    pooling or truncation here changes."""
    if name == "lexical":
        return LexicalEncoder.fingerprint
    model_id, revision, is_folder = _split_revision(name)
    if is_folder:
        return {"encoder": "transformers", "version": 1, "weights": _digest(sorted(Path(name).rglob("*")))}
    return {"encoder": "transformers", "version": 1, "model": model_id, "revision": revision}


def image_fingerprint(name: str) -> dict[str, Any]:
    """What picture features depend on beside the pictures; known without loading the encoder. `version` is raised when
    the preprocessing here changes."""
    if name == "pixel":
        return PixelEncoder.fingerprint
    architecture, _, weights = name.partition("/")
    weights = _digest([Path(weights)]) if Path(weights).is_file() else weights
    return {"encoder": "open_clip", "version": 1, "model": architecture, "weights": weights}


def hub_commit(name: str) -> str | None:
    """The commit that the local hub cache holds of a Hugging Face encoder, where it holds one."""
    if name == "lexical" or Path(name).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    model_id, revision, _ = _split_revision(name)
    path = try_to_load_from_cache(model_id, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _digest(paths: list[Path]) -> str:
    """SHA-256 of the files' contents."""
    return _digest_once(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()))


@lru_cache
def _digest_once(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
