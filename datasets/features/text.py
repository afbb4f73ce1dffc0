"""Texts: an item's metadata, read by a text encoder. F feature width, B batch, n new products.

Encoders: lexical (built in), or any Hugging Face text encoder, from the hub or a local folder.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from common import processes
from common.errors import InputError
from common.files import check_regular, folder_exists, parse_json, read_text
from datasets.features import encode
from datasets.features.encode import DTYPES, Encoder, digest, normalised, offline_without_network
from datasets.features.modality import EncodedModality, Job, Record
from datasets.features.modality import digest as digest_of_texts
from datasets.items import NO_TEXT, item_text

if TYPE_CHECKING:
    from config import FeatureSettings

POOLINGS = {  # pooling -> its names in the configurations of sentence-transformers
    "the mean of the tokens": {"mean_tokens", "mean"},
    "the first token": {"cls_token", "cls"},
    "the last token": {"lasttoken"},
}
MAX_TOKENS = 512  # of a text, unless the model's files give another limit
LOADED_SUFFIXES, LOADED_NAMES = (".json", ".safetensors", ".bin", ".model"), ("vocab.txt", "merges.txt", "bpe.codes")
LEXICAL: dict[str, Any] = {"encoder": "lexical", "version": 1}


@dataclass(frozen=True)
class TextModality(EncodedModality):
    """The text of an item: its `attributes`, read by a text encoder."""

    encoder: str
    attributes: tuple[str, ...]
    trained: Mapping[str, Any] | None = None  # the description in an export

    kind = block = "language"
    flag = "language_encoder"
    built_in = "lexical"
    unit = "texts"

    @classmethod
    def from_settings(cls, settings: FeatureSettings) -> list[Self]:
        return [cls(settings.language_encoder, settings.item_attributes)] if settings.use_language_encoder else []

    @classmethod
    def from_description(cls, description: Any, encoder: str | None) -> Self:
        return cls(encoder or description["encoder"], tuple(description["attributes"]), description)

    def inputs(self, job: Job) -> list[str]:
        catalog = job.catalog
        texts = [item_text(record, self.attributes) for record in catalog.metadata]
        if not any(catalog.metadata):
            raise InputError(
                f"{catalog.name} has no metadata, so its items have no text; give meta.json.gz, vectors "
                f"(--no-use_language_encoder --features NAME=FILE), or train on ids alone (--model_code sasrec)"
            )
        if all(text == NO_TEXT for text in texts):
            known = sorted({key for record in catalog.metadata for key in record})
            raise InputError(
                f"--item_attributes {','.join(self.attributes)}: no item of {catalog.name} has any of them; its "
                f"metadata has {', '.join(known) or 'nothing'}"
            )
        absent = [a for a in self.attributes if all(item_text(record, (a,)) == NO_TEXT for record in catalog.metadata)]
        if absent:
            other = sorted(
                {key for record in catalog.metadata for key in record} - {*self.attributes, "asin", "parent_asin"}
            )
            hint = f"; --item_attributes can also name {', '.join(other)}" if other else ""
            processes.print_main(f"no item has {' or '.join(absent)}: left out of the texts{hint}")
        without = sum(text == NO_TEXT for text in texts)
        if without:
            processes.print_main(f"{without} of {len(texts)} items have no text: encoded as {NO_TEXT!r}")
        return texts

    def key(self, job: Job, inputs: Sequence[str]) -> dict[str, Any]:
        items = digest_of_texts([*job.catalog.asins, *inputs])
        return {"kind": self.kind, **self.fingerprint(), "items": items}

    def commit(self) -> str | None:
        return hub_commit(self.encoder)

    def refuse_change(self, job: Job) -> None:
        gone = "" if self.on_disk() else f" (there is no encoder {self.encoder!r} here)"
        raise InputError(
            f"the items' texts, or their encoder's weights, are not those that the run was trained on{gone}; give its "
            f"--data_root, or {'run where it is, or ' * bool(gone)}train anew"
        )

    def load_encoder(self, device: Any, precision: str) -> Encoder:
        return load_encoder(self.encoder, device, precision)

    def on_disk(self) -> bool:
        return self.encoder == self.built_in or folder_exists(self.encoder) or hub_commit(self.encoder) is not None

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.encoder)

    def former_fingerprint(self) -> dict[str, Any]:
        is_folder = _split_revision(self.encoder)[2]
        return transformers_fingerprint(self.encoder, every_file=True) if is_folder else self.fingerprint()

    def batches(self, items: Sequence[Any], batch_size: int) -> list[np.ndarray]:
        return encode.longest_first(items, batch_size)

    @staticmethod
    def read(prepare: Callable, batch: list[Any]) -> tuple[int, list[int], Any]:
        return len(batch), list(range(len(batch))), prepare(batch)

    def differ(self, inputs: Sequence[str]) -> bool:
        return len(set(inputs)) > 1

    @property
    def required(self) -> str:  # type: ignore[override]  # read-only here
        return f"no text; give it one of {', '.join(self.attributes)}"

    def describe(self, width: int) -> dict[str, Any]:
        return {
            "encoder": self.encoder,
            "fingerprint": self.fingerprint(),
            "commit": self.commit(),
            "attributes": list(self.attributes),
            "text": item_text({name: f"<{name}>" for name in self.attributes}, self.attributes),
        }

    def has_input(self, record: Record) -> bool:
        return item_text(dict(record), self.attributes) != NO_TEXT

    @cached_property
    def trained_encoder(self) -> Encoder:
        """The encoder of the training, loaded once. Raises InputError if it is another one."""
        assert self.trained is not None  # made by from_description
        self.check_encoder(self.trained)
        name = self.encoder
        if name == self.trained["encoder"] and self.trained["commit"] and "@" not in name:
            name = f"{name}@{self.trained['commit']}"  # the hub's model may have changed since
        return replace(self, encoder=name).load_encoder("cpu", "fp32")

    def embed(self, records: Sequence[Record]) -> np.ndarray:
        encoder = self.trained_encoder
        tokenized = encoder.tokenize([item_text(dict(record), self.attributes) for record in records])
        return encode.encode_all(encoder, self.read, tokenized, self.batches(tokenized, 32))


# -------------------------------------------------------------------------------------------------------- the encoders


def load_encoder(name: str, device: Any, precision: str = "fp32") -> Encoder:
    """Return the text encoder, computing in fp32, bf16 or fp16. Raises InputError if it cannot be loaded."""
    return LexicalEncoder() if name == "lexical" else TransformersEncoder(name, device, precision)


def fingerprint(name: str) -> dict[str, Any]:
    """Return everything that features depend on besides the texts, without loading the encoder."""
    return LexicalEncoder.fingerprint if name == "lexical" else transformers_fingerprint(name)


class LexicalEncoder(Encoder):
    """Hashed bag of words, word pairs and character trigrams, each term weighted 1 + log(count); no download."""

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


class TransformersEncoder(Encoder):
    """A Hugging Face text encoder or the encoder of a T5, pooled as its own files say (POOLINGS).

    Without such a file it takes the first token, as bge needs, or the mean if its tokenizer adds no CLS token. Pooling
    and normalisation are in float32.
    """

    def __init__(self, name: str, device: Any, precision: str = "fp32") -> None:
        model_id, revision, is_folder = _split_revision(name)
        if not is_folder:
            offline_without_network()
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
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
            for path in _loaded_files(Path(name)) if is_folder else ():
                check_regular(path, "an encoder's folder holds plain files")
            self.tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False, **options)
            if len(self.tokenizer) <= len(
                self.tokenizer.all_special_tokens
            ):  # transformers makes one up if its files are missing
                raise ValueError("its tokenizer has no words")
            dtype = getattr(torch, DTYPES[precision])
            config = AutoConfig.from_pretrained(model_id, trust_remote_code=False, **options)
            kind = AutoModelForTextEncoding if hasattr(config, "num_decoder_layers") else AutoModel  # T5: its encoder
            model, loaded = kind.from_pretrained(
                model_id, trust_remote_code=False, output_loading_info=True, dtype=dtype, **options
            )
            missing = sorted(k for k in loaded["missing_keys"] if "pooler" not in k)
            if missing:
                raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")
            self.model = model.to(device).eval()
            self.model.config.use_cache = False
            self.pooling, where = _pooling(model_id, revision, self.tokenizer.cls_token is not None)
            limits = _model_json(model_id, revision, "sentence_bert_config.json", needed=False) or {}
            self.max_length = min(
                self.tokenizer.model_max_length,
                _positions(self.model),
                limits.get("max_seq_length") or MAX_TOKENS,
            )
            self.note = f"{name} pools by {self.pooling} ({where}) and reads up to {self.max_length} tokens of a text"
            self.prepare = partial(_padded, self.tokenizer.pad_token_id or 0)
            self.device = torch.device(device)
            self.on_gpu, self.slow_to_prepare = self.device.type == "cuda", False
            self.dim = self.encode([""]).shape[1]
        except Exception as error:  # the hub client, the weights' reader and the model raise many kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            source = "its folder" if is_folder else "the hub, and no such folder is here"
            raise InputError(
                f"--language_encoder {name!r} cannot be loaded from {source} ({first}). Without network, give a local "
                f"folder with the model's config.json, tokenizer and weights, or 'lexical', which needs no download"
            ) from error
        self.fingerprint = transformers_fingerprint(name)

    def forward(self, prepared: dict[str, Any]) -> np.ndarray:
        import torch

        tokens = {name: values.to(self.device, non_blocking=True) for name, values in prepared.items()}
        with torch.inference_mode():
            states = self.model(**tokens).last_hidden_state.float()  # [B, tokens, F]
            weights = tokens["attention_mask"][..., None].to(states.dtype)
            counts = weights.sum(dim=1)  # [B, 1]
            if self.pooling == "the mean of the tokens":
                states = (states * weights).sum(dim=1) / counts
            elif self.pooling == "the last token":
                states = states[torch.arange(len(states)), counts[:, 0].long() - 1]
            else:
                states = states[:, 0]
        return normalised(states.cpu().numpy())

    def tokenize(self, batch: Sequence[str]) -> list[np.ndarray]:
        texts, read = list(batch), {"truncation": True, "max_length": self.max_length, "return_attention_mask": False}
        chunks = (self.tokenizer(texts[at : at + 1000], **read)["input_ids"] for at in range(0, len(texts), 1000))
        nothing = [self.tokenizer.eos_token_id or 0]  # a text without any token is read as this one
        return [np.array(tokens or nothing, dtype=np.int32) for chunk in chunks for tokens in chunk]


def _padded(pad: int, batch: Iterable[np.ndarray]) -> dict[str, Any]:
    """Return the model's inputs, tensors [B, tokens], padded on the right whatever the tokenizer's side.

    So positions count from the first token, and a causal model's states do not depend on the padding.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.from_numpy(tokens).long() for tokens in batch]
    return {
        "input_ids": pad_sequence(ids, True, pad),
        "attention_mask": pad_sequence([torch.ones_like(tokens) for tokens in ids], True, 0),
    }


def _split_revision(name: str) -> tuple[str, str, bool]:
    """Return (folder or hub name, revision, whether it is a folder)."""
    if folder_exists(name):
        return name, "", True
    model_id, _, revision = name.partition("@")
    return model_id, revision or "main", False


def _positions(model: Any) -> int:
    """Return how many tokens a model can read; the positions of RoBERTa's kind begin after that of padding."""
    positions: Any = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if getattr(positions, "padding_idx", None) is not None:
        return positions.num_embeddings - positions.padding_idx - 1
    return getattr(model.config, "max_position_embeddings", MAX_TOKENS)


def _pooling(model_id: str, revision: str, has_cls: bool) -> tuple[str, str]:
    """Return (a key of POOLINGS, where it was read). Raises ValueError for any other pooling."""
    modules = _model_json(model_id, revision, "modules.json", needed=False) or []
    other = [m["type"] for m in modules if m["type"].split(".")[-1] not in ("Transformer", "Pooling", "Normalize")]
    if other:
        raise ValueError(f"its modules {other} beyond encoder, pooling and normalisation are not supported")
    folder = next((m["path"] for m in modules if m["type"].endswith("Pooling") and m.get("path")), "1_Pooling")
    where = f"{folder}/config.json"
    modes = _model_json(model_id, revision, where)
    if modes is None:
        default = "the first token" if has_cls else "the mean of the tokens"
        return default, f"the default, as the model has no {where}{'' if has_cls else ' and no CLS token'}"
    chosen = {mode.removeprefix("pooling_mode_") for mode, on in modes.items() if on is True}
    chosen |= {mode for mode in [modes.get("pooling_mode")] if mode}  # newer files name it
    for pooling, names in POOLINGS.items():
        if len(chosen & names) and chosen <= names | {"include_prompt"}:
            return pooling, where
    raise ValueError(f"its pooling {sorted(chosen)} is none of {', '.join(POOLINGS)}")


def _model_json(model_id: str, revision: str, name: str, needed: bool = True) -> Any | None:
    """Return a JSON file of a model; None if the model has no such file.

    Raises ValueError if a needed file is neither cached nor reachable.
    """
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
    return parse_json(read_text(path, "give a whole model")) if path.exists() else None


def _loaded_files(folder: Path) -> list[Path]:
    """Return the files of an encoder's folder that are loaded: weights, tokenizer and settings, no README or notes."""
    top = [path for path in folder.iterdir() if path.suffix in LOADED_SUFFIXES or path.name in LOADED_NAMES]
    return [*top, *folder.glob("*/config.json")]


def transformers_fingerprint(name: str, every_file: bool = False) -> dict[str, Any]:
    """Return the fingerprint of a Hugging Face encoder. Raise `version` when pooling or truncation here changes.

    every_file: as earlier versions did, which hashed all files of a folder.
    """
    model_id, revision, is_folder = _split_revision(name)
    if is_folder:
        files = Path(name).rglob("*") if every_file else _loaded_files(Path(name))
        return {"encoder": "transformers", "version": 1, "weights": digest(sorted(files))}
    return {"encoder": "transformers", "version": 1, "model": model_id, "revision": revision}


def hub_commit(name: str) -> str | None:
    """Return the commit of a Hugging Face encoder in the local hub cache; None if it is not there or no valid name."""
    if name == "lexical" or folder_exists(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    model_id, revision, _ = _split_revision(name)
    try:
        path = try_to_load_from_cache(model_id, "config.json", revision=revision)
    except ValueError:
        return None
    return Path(path).parent.name if isinstance(path, str) else None
