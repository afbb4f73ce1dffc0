"""A modality: one thing that items are described by, such as their text. N items, n new products, F feature width.

text.py, image.py and arrays.py each define one, and registry.py lists them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from common import processes
from common.errors import InputError
from common.files import folder_exists
from datasets.features import cache, encode
from datasets.features.encode import Encoder

if TYPE_CHECKING:
    from config import FeatureSettings
    from datasets.catalog import Catalog

CHUNK = 4096  # rows that are compared at once
SAME = 1e-3  # features that differ by less are the same; float16 rounds by up to 5e-4
Record = Mapping[str, Any]  # a new product


@dataclass(frozen=True)
class Job:
    """Whose features to make, and how."""

    settings: FeatureSettings
    catalog: Catalog
    device: Any
    trained_on: Collection[str]  # names of the cached files that a run was trained on; empty: no run

    @property
    def cache_root(self) -> Path:
        return Path(self.settings.features_root)


class Modality(ABC):
    """One part [N, F] of items' features: how it is made for a catalogue and for new products."""

    kind: ClassVar[str]  # begins the names of its cached files
    block: ClassVar[str]  # its key among the features in an export's config.json
    several: ClassVar[bool] = False  # whether there may be many of the kind; the block is then a list
    flag: ClassVar[str] = ""  # the setting that names its encoder
    name: str  # of the encoder or the features
    required: str = ""  # what a new product with no input for any modality lacks; "": it gets zeros

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: FeatureSettings) -> Sequence[Self]:
        """Return the modalities of this kind that the settings ask for."""

    @classmethod
    @abstractmethod
    def from_description(cls, description: Any, encoder: str | None) -> Self:
        """Return the modality that `describe` described. encoder: where its encoder is now; None: as described."""

    # ------------------------------------------------------------------------------------------------- a catalogue

    @abstractmethod
    def inputs(self, job: Job) -> Sequence[Any]:
        """Return what each item is encoded from. Raises InputError if no item has any."""

    @abstractmethod
    def key(self, job: Job, inputs: Sequence[Any]) -> dict[str, Any]:
        """Return everything that the features depend on besides precision, for JSON."""

    def former_key(self, key: dict[str, Any]) -> dict[str, Any]:
        """Return the key that earlier versions gave to the same features."""
        return key

    def cache_name(self, key: dict[str, Any]) -> str:
        """Return the part of a cached file's name that people tell features apart by."""
        return self.name

    def commit(self) -> str | None:
        """Return the encoder's commit in the hub's cache, if known."""
        return None

    def has_precision(self) -> bool:
        """Return whether features depend on --encoder_precision."""
        return False

    def check_name(self) -> None:
        """Raise InputError if there is no such encoder, before another one encodes for hours."""
        return

    @abstractmethod
    def refuse_change(self, job: Job) -> None:
        """Print that the inputs differ from those a run was trained on, or raise InputError."""

    @abstractmethod
    def make(self, file: cache.File, inputs: Sequence[Any], job: Job) -> dict[str, Any]:
        """Make the features and write them to a cached file. Returns its header."""

    def note(self, file: cache.File, job: Job) -> None:
        """Print how many items have zero vectors."""
        return

    # ------------------------------------------------------------------------------------------------ new products

    @abstractmethod
    def describe(self, width: int) -> dict[str, Any]:
        """Return how the features [N, width] were made, for an export's config.json."""

    @abstractmethod
    def has_input(self, record: Record) -> bool:
        """Return whether a new product has an input for this modality."""

    @abstractmethod
    def embed(self, records: Sequence[Record]) -> np.ndarray:
        """Return features [n, F] float32 of new products, made as in training."""


class EncodedModality(Modality):
    """A modality whose inputs a frozen encoder reads."""

    built_in: ClassVar[str]  # the encoder without weights, which needs no download and has no precision
    unit: ClassVar[str]  # word for inputs, in messages
    encoder: str

    @property
    def name(self) -> str:  # type: ignore[override]  # read-only here
        return self.encoder

    def has_precision(self) -> bool:
        return self.encoder != self.built_in

    @staticmethod
    @abstractmethod
    def read(prepare: Callable, batch: list[Any]) -> tuple[int, list[int], Any]:
        """Return (B, the rows that can be read, their inputs prepared for the encoder)."""

    @abstractmethod
    def load_encoder(self, device: Any, precision: str) -> Encoder:
        """Load the encoder. Raises InputError if it cannot be loaded."""

    @abstractmethod
    def on_disk(self) -> bool:
        """Return whether the encoder is built in, a local file or folder, or cached."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return what features depend on besides the inputs, without loading the encoder."""

    def former_fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint that earlier versions gave."""
        return self.fingerprint()

    def former_key(self, key: dict[str, Any]) -> dict[str, Any]:
        return key | self.former_fingerprint()

    def batches(self, items: Sequence[Any], batch_size: int) -> list[np.ndarray]:
        """Return the rows of each batch."""
        return encode.in_order(len(items), batch_size)

    def unreadable(self, inputs: Sequence[Any], features: np.ndarray, job: Job) -> dict[str, str]:
        """Return item id -> reason, for items whose input cannot be read. Raises InputError if none can."""
        return {}

    @abstractmethod
    def differ(self, inputs: Sequence[Any]) -> bool:
        """Return whether any two inputs that can be read differ."""

    def make(self, file: cache.File, inputs: Sequence[Any], job: Job) -> dict[str, Any]:
        """Encode the batches that are missing, each rank its share; rank 0 finishes the file."""
        path, key, say = file.path, file.key, processes.print_main
        precision = key.get("precision", "fp32")
        if self.has_precision():
            say(f"encoding {len(inputs):,} {self.unit} by {self.encoder} ({precision}, {job.device}), once: {path}")
        encoder = self.load_encoder(job.device, precision)
        if encoder.note:
            say(encoder.note)
        items = encoder.tokenize(inputs)
        rows = self.batches(items, job.settings.encoder_batch_size)
        shape = (len(items), encoder.dim)
        header = {"key": key, "commit": self.commit() or ""}
        order = hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest()
        plan = {**header, "shape": list(shape), "batch_size": job.settings.encoder_batch_size, "order": order}
        todo = processes.on_main_process(lambda: cache.begin(path, plan, shape, rows))
        if len(todo) < len(rows):
            say(f"{len(rows) - len(todo)} of {len(rows)} batches were encoded before: going on")
        share = todo[processes.rank() :: processes.world_size()]
        batches = ([items[row] for row in rows[number]] for number in share)
        workers = encode.num_workers(job.settings.encoder_workers, len(share)) if encoder.slow_to_prepare else 0
        encoded = encode.encode_batches(encoder, self.read, encode.progress(batches, len(share)), workers=workers)
        try:

            def write() -> None:
                writer = cache.Writer(path)
                for number, features in zip(share, encoded, strict=True):
                    writer.write(number, rows[number], features)

            processes.together(write)

            def finish() -> dict[str, Any]:
                features = cache.partial(path)
                try:
                    broken = self.unreadable(inputs, features, job)
                    self._check_differ(inputs, features)
                except InputError:
                    cache.drop(path)
                    raise
                return cache.finish(path, header | {"broken": broken}, rows)

            return processes.on_main_process(finish)
        except BaseException:
            if processes.world_size() == 1:
                cache.drop_if_empty(path)
            raise

    def _check_differ(self, inputs: Sequence[Any], features: np.ndarray) -> None:
        """Raise InputError if the encoder gives different inputs the same features."""
        first: Any = None
        for start in range(0, len(features), CHUNK):
            rows = features[start : start + CHUNK].astype(np.float32)
            rows = rows[rows.any(axis=1)]
            first = rows[0] if first is None and len(rows) else first
            if len(rows) and np.abs(rows - first).max() > SAME:
                return
        if self.differ(inputs):
            raise InputError(
                f"--{self.flag} {self.encoder!r} gave different {self.unit} the same features, so the items cannot be "
                f"told apart; give another encoder"
            )

    def check_encoder(self, trained: Mapping[str, Any]) -> None:
        """Raise InputError if the encoder is not the one that a model was trained on, described in its export."""
        name, fingerprints = self.encoder, (self.fingerprint(), self.former_fingerprint())
        if trained["fingerprint"] in fingerprints or name == f"{trained['encoder']}@{trained.get('commit')}":
            return
        if name == trained["encoder"] and self.flag == "language_encoder" and not folder_exists(name):
            raise InputError(f"the encoder {name!r} is not there any more; give the folder it is in now as {self.flag}")
        raise InputError(
            f"the encoder {name!r} is not {trained['encoder']!r}, which the model was trained on (its weights or "
            f"settings differ); give the path of that one as {self.flag}"
        )


def digest(strings: Iterable[str]) -> str:
    """Return the SHA-256 of texts, each ended by a zero byte."""
    digest = hashlib.sha256()
    for string in strings:
        digest.update(string.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
