"""Texts by a Hugging Face encoder, from the hub or a local folder. F: feature width, B: batch."""

import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from datasets.features.encoders.base import DTYPES, Encoder, digest, normalised, offline_without_network


class TransformersEncoder(Encoder):
    """A Hugging Face text encoder, pooled as its own 1_Pooling/config.json says: the mean of the tokens or the first
    one. Without such a file the first token, as bge needs it. Pooling and normalisation are in float32."""

    def __init__(self, name: str, device: Any, precision: str = "fp32") -> None:
        model_id, revision, is_folder = _split_revision(name)
        if not is_folder:
            offline_without_network()
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
        self.fingerprint = transformers_fingerprint(name)

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


def transformers_fingerprint(name: str) -> dict[str, Any]:
    """What its features depend on beside the texts; known without loading it. `version` is raised when the pooling or
    truncation here changes."""
    model_id, revision, is_folder = _split_revision(name)
    if is_folder:
        return {"encoder": "transformers", "version": 1, "weights": digest(sorted(Path(name).rglob("*")))}
    return {"encoder": "transformers", "version": 1, "model": model_id, "revision": revision}


def hub_commit(name: str) -> str | None:
    """The commit that the local hub cache holds of a Hugging Face encoder, where it holds one."""
    if name == "lexical" or Path(name).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    model_id, revision, _ = _split_revision(name)
    path = try_to_load_from_cache(model_id, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None
