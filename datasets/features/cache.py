"""Arrays [N, F] on disk that are made batch by batch: by several processes, and on after a kill.

    <name>.npy            the finished array, float16
    <name>.json           its key, the encoder's commit, SHA-256, when it was made, and broken pictures
    <name>.partial.npy    the array while it is made, a memory map
    <name>.done.npy       uint32 a batch: 0 to do, otherwise the CRC-32 of its rows
    <name>.partial.json   what the two are of; a restart that finds anything else there begins again

A batch is marked after its rows were written, so a kill costs the batches that were being encoded. After a power loss
the disk may have a mark without its rows: a restart believes only marks that are the rows' checksum, and nothing needs
to be flushed on the way. `path` is that of the finished array throughout. N rows, F width.

Rows of length 1 are rounded to float16 as they are written, to a cosine of .9999999 (benchmarks/README.md); marks and
checksums are those of the rounded ones. Earlier versions wrote float32: such an array is read as it is where it is
finished, and begun again where it is not.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import cannot_write, sha256, write_json

PARTS = ("partial.npy", "done.npy", "partial.json")
DTYPE = np.float16


def sidecar(path: Path) -> Path:
    """The JSON file beside an array."""
    return path.with_suffix(".json")


@dataclass(frozen=True)
class File:
    """A cached array: where it is, what it depends on, and what its sidecar says, nothing until it is made."""

    path: Path
    key: dict[str, Any]
    header: dict[str, Any] = field(default_factory=dict)


def read(path: Path, key: dict[str, Any], commit: str | None) -> tuple[dict[str, Any] | None, str]:
    """(what the sidecar says, "") of a finished array, (None, what is wrong with it), or (None, "") if there is none.

    key: all that the array depends on. commit: what the encoder on the hub is at now, if known.
    """
    if not path.exists():
        return None, ""
    try:
        header = json.loads(sidecar(path).read_text(encoding="utf-8"))
        stated = [header[name] for name in ("key", "commit", "sha256", "made", "broken")]
    except FileNotFoundError:
        return None, f"damaged (it has no {sidecar(path).name})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"damaged ({sidecar(path).name}: {error})"
    if not (isinstance(stated[3], int | float) and isinstance(stated[4], dict)):
        return None, f"damaged ({sidecar(path).name} has other values than were written)"
    if stated[0] != key:
        return None, "of another key"
    if commit and stated[1] not in ("", commit):
        return None, f"of another commit of the encoder ({stated[1]}, now {commit})"
    if stated[2] != sha256(path):
        return None, "damaged (its checksum differs)"
    return header, ""


def find(candidates: list[File], commit: str | None, trained_on: Collection[str], say: Callable[[str], None]) -> File:
    """The file that a run was trained on, or that was made first; else the one to make. commit: as of `read`;
    trained_on: names of the files that the run read."""
    whole, damaged = [], []
    for file in candidates:
        header, problem = read(file.path, file.key, commit)
        if header:
            whole.append(replace(file, header=header))
        elif problem:
            damaged.append((file, problem))
    if whole:
        return min(whole, key=lambda file: (file.path.name not in trained_on, file.header["made"]))
    if not damaged:
        return candidates[0]
    file, problem = damaged[0]
    say(f"{file.path} is {problem}: made again")
    return file


def acquire(lock: Any, say: Callable[[str], None]) -> None:
    """Be the only process that makes a file; wait, and say so, while another is."""
    from filelock import Timeout

    path = Path(lock.lock_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process is making {path.with_suffix('.npy')}: waiting for it")
            lock.acquire()
    except OSError as error:
        raise cannot_write(path, error) from error


def begin(path: Path, plan: dict[str, Any], shape: tuple[int, int], batches: list[np.ndarray]) -> list[int]:
    """Make the partial files, or take up those of the same plan; returns the numbers of the batches that are to do.

    plan: what the rows and batches depend on, for JSON. batches: the rows of each. Raises InputError on a full disk.
    """
    partial, done, stated = _parts(path)
    if _json(stated) == plan:
        try:
            there = np.load(partial, mmap_mode="r")
            if there.shape == shape and there.dtype == DTYPE:
                return unfinished(path, batches)
        except (OSError, ValueError, EOFError):
            pass  # damaged: begin again
    drop(path)
    try:
        for file, dtype, size in ((partial, DTYPE, shape), (done, np.uint32, (len(batches),))):
            np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=size)
            if hasattr(os, "posix_fallocate"):  # or a disk that fills up later would end the process by a signal
                with file.open("rb+") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        drop(path)
        raise cannot_write(partial, error) from error
    write_json(stated, plan)
    return list(range(len(batches)))


def unfinished(path: Path, batches: list[np.ndarray]) -> list[int]:
    """The numbers of the batches whose rows are not there."""
    partial, done, _ = _parts(path)
    rows, marks = np.load(partial, mmap_mode="r"), np.load(done)
    return [n for n, batch in enumerate(batches) if not marks[n] or marks[n] != _mark(rows[batch])]


class Writer:
    """The partial files, open to be written."""

    def __init__(self, path: Path) -> None:
        partial, done, _ = _parts(path)
        self.rows = np.lib.format.open_memmap(partial, mode="r+")
        self.marks = np.lib.format.open_memmap(done, mode="r+")

    def write(self, number: int, batch: np.ndarray, features: np.ndarray) -> None:
        """The features [B, F] of a batch's rows [B], rounded, and then its mark. Raises FloatingPointError for numbers
        that DTYPE does not reach."""
        with np.errstate(over="raise"):  # they would become infinities
            self.rows[batch] = features
        self.marks[number] = _mark(self.rows[batch])


def partial(path: Path) -> np.ndarray:
    """The partial array, read-only."""
    return np.load(_parts(path)[0], mmap_mode="r")


def finish(path: Path, header: dict[str, Any], batches: list[np.ndarray]) -> dict[str, Any]:
    """Give the complete partial array its name, after its sidecar, which is returned: a kill in between leaves all that
    a restart needs. Raises InputError where rows are missing or the disk is full."""
    partial = _parts(path)[0]
    lost = unfinished(path, batches)
    if lost:
        raise InputError(
            f"{partial}: {len(lost)} of {len(batches)} batches did not arrive; ranks on several machines need a folder "
            f"that maps the same memory, so run those of one machine; what arrived is kept"
        )
    try:
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        header = header | {"sha256": sha256(partial), "made": time.time()}
        write_json(sidecar(path), header)
        partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    drop(path)
    return header


def drop(path: Path) -> None:
    """Remove the partial files."""
    for part in reversed(_parts(path)):
        part.unlink(missing_ok=True)


def drop_if_empty(path: Path) -> None:
    """Remove the partial files in which no batch is done."""
    done = _parts(path)[1]
    if done.exists() and not np.load(done).any():
        drop(path)


def _parts(path: Path) -> list[Path]:
    return [path.with_name(f"{path.stem}.{part}") for part in PARTS]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _mark(rows: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).data) or 1
