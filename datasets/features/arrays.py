"""Features from a file: a vector per product id, made by any means. N items, F feature width, n new products.

Rows are scaled to length 1, as encoders' are. Items that the file lacks have zero vectors.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from common import processes
from common.errors import InputError
from common.files import check_regular, read_json, write_json
from datasets.features import cache, encode
from datasets.features.array_files import open_array_file, parts_of
from datasets.features.encoder import normalised
from datasets.features.modality import CHUNK, Job, Modality, Record, digest

if TYPE_CHECKING:
    from config import FeatureSettings

DIGESTS = "digests.json"  # in the cache: path -> size, time and SHA-256, so that a large file is hashed once


@dataclass(frozen=True)
class FileModality(Modality):
    """Vectors from a file, under a name that the user gives."""

    name: str
    path: Path
    cache_root: Path = Path()
    trained: dict[str, Any] | None = None  # the description in an export

    kind = "file"
    block = "files"
    several = True

    @classmethod
    def from_settings(cls, settings: FeatureSettings) -> list[Self]:
        for name in settings.feature_files:
            if name in settings.item_attributes:
                raise InputError(f"--features {name}=...: {name!r} is one of --item_attributes; give another name")
        cache_root = Path(settings.features_root)
        return [cls(name, Path(path), cache_root) for name, path in settings.feature_files.items()]

    @classmethod
    def from_description(cls, description: Any, encoder: str | None) -> Self:
        return cls(description["name"], Path(), trained=description)

    def inputs(self, job: Job) -> list[str]:
        processes.on_main_process(lambda: open_array_file(self.path).width)  # raises if it cannot be read
        return job.catalog.asins

    def key(self, job: Job, inputs: Sequence[str]) -> dict[str, Any]:
        content = processes.on_main_process(lambda: file_sha256(self.path, self.cache_root))
        return {"kind": self.kind, "version": 1, "sha256": content, "items": digest(inputs)}

    def cache_name(self, key: dict[str, Any]) -> str:
        return f"{self.name}-{key['sha256']}"  # so the run's env.json has the digest

    def refuse_change(self, job: Job) -> None:
        raise InputError(
            f"--features {self.name}={self.path} is not the file that the run was trained on (its SHA-256 differs); "
            f"put that one back, or train anew"
        )

    def make(self, file: cache.File, inputs: Sequence[str], job: Job) -> dict[str, Any]:
        processes.print_main(f"reading {self.path}, once: {file.path}")
        return processes.on_main_process(lambda: self._copy(file, inputs))

    def _copy(self, file: cache.File, asins: Sequence[str]) -> dict[str, Any]:
        """Copy the rows of the catalogue's items from the file to the cache."""
        source, row_of = open_array_file(self.path), {asin: row for row, asin in enumerate(asins)}
        batches = encode.in_order(len(asins), CHUNK)
        plan = {"key": file.key, "commit": "", "shape": [len(asins), source.width]}
        cache.begin(file.path, plan, (len(asins), source.width), batches)
        try:
            writer = cache.Writer(file.path)
            checksums = np.zeros(len(asins), np.uint32)  # of each item's row in the file; 0: not there
            places = np.zeros(len(asins), np.int64)
            done = 0
            from tqdm import tqdm

            for ids, rows in tqdm(source.pieces(), f"reading {self.path.name}", unit="piece", disable=None):
                kept = [(at, row_of[item]) for at, item in enumerate(ids) if item in row_of]
                for at, row in kept:
                    if not np.isfinite(rows[at]).all():
                        raise InputError(
                            f"{source.place(done + at)} ({asins[row]}) has a number that is not finite; mend it or "
                            f"leave the product out"
                        )
                    checksum = zlib.crc32(np.ascontiguousarray(rows[at]).data) or 1
                    if checksums[row] not in (0, checksum):
                        raise InputError(
                            f"{source.place(done + at)} has other numbers for {asins[row]} than {source.unit} "
                            f"{places[row] + source.first}; keep one of the two"
                        )
                    checksums[row], places[row] = checksum, done + at
                if kept:
                    of_file, of_items = np.array(kept).T
                    writer.rows[of_items] = normalised(rows[of_file].astype(np.float64))
                done += len(ids)
            if not checksums.any():
                raise InputError(
                    f"{self.path} has {done:,} products and none of the {len(asins):,} items, whose ids are such as "
                    f"{asins[0]!r}; give a file with the ids of datamaps.json"
                )
            known = np.flatnonzero(checksums)
            if len(known) > 1 and (checksums[known] == checksums[known[0]]).all():
                raise InputError(
                    f"{self.path} has the same vector for all {len(known):,} items, so they cannot be told apart; give "
                    f"a file with the vectors of another encoder"
                )
            for number, batch in enumerate(batches):
                writer.mark(number, batch)
            absent = {asins[row]: f"not in {self.path.name}" for row in np.flatnonzero(checksums == 0).tolist()}
            return cache.finish(file.path, {"key": file.key, "commit": "", "broken": absent}, batches)
        except BaseException:
            cache.drop(file.path)
            raise

    def note(self, file: cache.File, job: Job) -> None:
        if absent := len(file.header["broken"]):
            processes.print_main(
                f"{absent} of {job.catalog.num_items} items are not in {self.path}: zero vectors, named in "
                f"{cache.sidecar(file.path)}"
            )

    def describe(self, width: int) -> dict[str, Any]:
        return {"name": self.name, "sha256": file_sha256(self.path, self.cache_root), "dim": width}

    def has_input(self, record: Record) -> bool:
        value = record.get(self.name)
        return value is not None and not (isinstance(value, float) and np.isnan(value))  # NaN: an empty cell

    def embed(self, records: Sequence[Record]) -> np.ndarray:
        assert self.trained is not None  # made by from_description
        width = self.trained["dim"]
        features = np.zeros((len(records), width))
        for row, record in enumerate(records):
            if not self.has_input(record):
                continue  # zeros, as in training
            try:
                vector = np.asarray(record[self.name], dtype=np.float64)
            except (TypeError, ValueError):
                vector = np.empty(())
            if vector.shape != (width,) or not np.isfinite(vector).all():
                raise InputError(
                    f"{self.name!r} of record {row + 1} is {record[self.name]!r:.80}; give a list of {width} finite "
                    f"numbers, or nothing"
                )
            features[row] = vector
        return normalised(features)


def file_sha256(path: Path, cache_root: Path) -> str:
    """Return the SHA-256 of a file of vectors (.npy: of the array, then the ids).

    The cache remembers it by the file's size and time.
    """
    parts = parts_of(path)
    signature = [[part.name, part.stat().st_size, part.stat().st_mtime_ns] for part in parts]
    memory, where = cache_root / DIGESTS, str(path.resolve())
    check_regular(memory, "remove it")
    try:
        known = read_json(memory, "")
        if known[where]["files"] == signature:
            return known[where]["sha256"]
    except (InputError, KeyError, TypeError):
        known = {}
    content = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    known[where] = {"files": signature, "sha256": content.hexdigest()}
    with suppress(InputError):  # a cache that may only be read
        write_json(memory, known)
    return content.hexdigest()
