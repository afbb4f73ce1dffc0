"""Arrays [N, F] on disk, made batch by batch: by several processes, and continued after a kill.

    <name>.npy            the finished array, float16
    <name>.json           its key, the encoder's commit, SHA-256, time, and the items with zero vectors
    <name>.partial.npy    the unfinished array, a memory map
    <name>.done.npy       uint32 per batch: 0 to do, otherwise the CRC-32 of its rows
    <name>.partial.json   the plan of the two; a restart with another plan begins again

A batch is marked after its rows are written, so a kill costs only the batches at work. After a power loss the disk may
have a mark without its rows, so a restart checks each mark against its rows. `path` is always the path of the finished
array. N rows, F width.

Rows of length 1 are rounded to float16 when they are written, to a cosine of .9999999 (benchmarks/README.md); marks
and checksums cover the rounded rows. Earlier versions wrote float32: a finished array is used, an unfinished one begun
again.
"""

import os
import time
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from msgspec import Struct

from common.errors import InputError
from common.files import (
    ARRAY_ERRORS,
    Number,
    cannot_write,
    check_regular,
    check_schema,
    read_json,
    remove_leftovers,
    replacing,
    sha256,
    write_json,
)
from common.processes import print_main

PARTS = ("partial.npy", "done.npy", "partial.json")
DTYPE = np.float16


def sidecar(path: Path) -> Path:
    """The JSON file beside an array."""
    return path.with_suffix(".json")


class Sidecar(Struct):
    """The JSON file beside an array."""

    key: dict[str, Any]
    commit: str
    sha256: str
    made: Number
    broken: dict[str, str]


@dataclass(frozen=True)
class File:
    """A cached array: its path, everything it depends on, and its sidecar's content (empty until it is made)."""

    path: Path
    key: dict[str, Any]
    header: dict[str, Any] = field(default_factory=dict)


def read(path: Path, key: dict[str, Any], commit: str | None) -> tuple[dict[str, Any] | None, str]:
    """Return (the sidecar, "") of a finished array, (None, problem) of a bad one, (None, "") if there is none.

    key: everything that the array depends on. commit: the encoder's current commit on the hub, if known. Raises
    InputError if one of the two is not a regular file.
    """
    for file in (path, sidecar(path)):
        check_regular(file, "remove it")
    if not path.exists():
        return None, ""
    try:
        header = check_schema(read_json(sidecar(path), "it is made again"), Sidecar, sidecar(path), "it is made again")
    except InputError as error:
        return None, f"damaged ({error})"
    if header["key"] != key:
        return None, "of another key"
    if commit and header["commit"] not in ("", commit):
        return None, f"of another commit of the encoder ({header['commit']}, now {commit})"
    if header["sha256"] != sha256(path):
        return None, "damaged (its checksum differs)"
    return header, ""


def find(candidates: list[File], commit: str | None, trained_on: Collection[str], report: bool = False) -> File:
    """Return the file that a run was trained on, else the one made first, else the one to make.

    commit: as in `read`. trained_on: names of the files that the run read. report: print why a file is made again.
    """
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
    if report:
        print_main(f"{file.path} is {problem}: made again")
    return file


def acquire(lock: Any) -> None:
    """Take the lock of a file to make; if another process has it, print that and wait."""
    from filelock import Timeout

    path = Path(lock.lock_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print_main(f"another process is making {path.with_suffix('.npy')}: waiting for it")
            lock.acquire()
        array = path.with_suffix(".npy")
        for name in (sidecar(array).name, _parts(array)[2].name):
            remove_leftovers(path.parent, name)
        if not _parts(array)[0].exists():  # marks without rows are of no use
            drop(array)
    except OSError as error:
        raise cannot_write(path, error) from error


def begin(path: Path, plan: dict[str, Any], shape: tuple[int, int], batches: list[np.ndarray]) -> list[int]:
    """Make the partial files, or continue those of the same plan. Returns the numbers of the batches to do.

    plan: everything that rows and batches depend on, for JSON. batches: the rows of each. Raises InputError if the disk
    is full.
    """
    partial, done, stated = _parts(path)
    if _json(stated) == plan:
        try:
            there = np.load(partial, mmap_mode="r")
            if there.shape == shape and there.dtype == DTYPE:
                return unfinished(path, batches)
        except ARRAY_ERRORS:
            pass  # damaged: begin again
    drop(path)
    try:
        for file, dtype, size in ((partial, DTYPE, shape), (done, np.uint32, (len(batches),))):
            np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=size)
            if hasattr(os, "posix_fallocate"):  # otherwise a full disk later ends the process by a signal
                with file.open("rb+") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        drop(path)
        raise cannot_write(partial, error) from error
    write_json(stated, plan)
    return list(range(len(batches)))


def unfinished(path: Path, batches: list[np.ndarray]) -> list[int]:
    """Return the numbers of the batches whose rows are missing."""
    partial, done, _ = _parts(path)
    rows, marks = np.load(partial, mmap_mode="r"), np.load(done)
    return [n for n, batch in enumerate(batches) if not marks[n] or marks[n] != _mark(rows[batch])]


class Writer:
    """Writes to the partial files."""

    def __init__(self, path: Path) -> None:
        partial, done, _ = _parts(path)
        self.rows = np.lib.format.open_memmap(partial, mode="r+")
        self.marks = np.lib.format.open_memmap(done, mode="r+")

    def write(self, number: int, batch: np.ndarray, features: np.ndarray) -> None:
        """Write the features [B, F] of a batch's rows [B], rounded, then its mark. Raises FloatingPointError on
        overflow."""
        with np.errstate(over="raise"):
            self.rows[batch] = features
        self.mark(number, batch)

    def mark(self, number: int, batch: np.ndarray) -> None:
        """Mark a batch as done."""
        self.marks[number] = _mark(self.rows[batch])


def partial(path: Path) -> np.ndarray:
    """Return the partial array, read-only."""
    return np.load(_parts(path)[0], mmap_mode="r")


def finish(path: Path, header: dict[str, Any], batches: list[np.ndarray]) -> dict[str, Any]:
    """Write the sidecar, then rename the complete partial array. Returns the sidecar's content.

    A kill in between leaves everything that a restart needs. Raises InputError if rows are missing or the disk is full.
    """
    partial = _parts(path)[0]
    lost = unfinished(path, batches)
    if lost:
        raise InputError(
            f"{partial}: {len(lost)} of {len(batches)} batches did not arrive; the processes of a machine need a "
            f"folder that maps the same memory, so give a local --features_root; what arrived is kept"
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


def look_again(path: Path) -> None:
    """Make a network file system look again for files that another machine made meanwhile."""
    with suppress(OSError), TemporaryFile(dir=path.parent):
        pass


def receive(file: File, pieces: Iterable[bytes]) -> None:
    """Write a finished array that comes in pieces, and its sidecar. Raises InputError if the disk is full."""
    with replacing(file.path) as temporary:
        with temporary.open("wb") as opened:
            opened.writelines(pieces)
        write_json(sidecar(file.path), file.header)


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
        return read_json(path, "")
    except InputError:
        return None


def _mark(rows: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).data) or 1
