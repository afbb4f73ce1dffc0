"""test_ranks.npz of a run: every user's rank in the test, 0 beyond the last cut-off, so that runs can be compared
user by user, and users told apart by how often their item was trained on. U users."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.files import replacing

TRAINED = "times_trained"  # the array beside those of the sizes


def save_ranks(path: Path, ranks: dict[int, np.ndarray], cutoff: int, times_trained: np.ndarray) -> None:
    """Write size -> ranks [U], from 1 and possibly ending in .5, of which those beyond `cutoff` are not told apart; and
    how often each user's item occurs in training [U]."""
    kind = np.min_scalar_type(2 * cutoff)
    halves = {str(m): np.where(of_size <= cutoff, 2 * of_size, 0).astype(kind) for m, of_size in ranks.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        arrays = {**halves, TRAINED: times_trained.astype(np.uint32)}
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # none of the names is allow_pickle


def load_ranks(path: Path, hint: str) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """What `save_ranks` wrote: size -> ranks [U], infinite beyond the cutoff; how often each item occurs in training.
    Raises InputError that says what `mends` it where there is no such file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        times_trained = arrays.pop(TRAINED)
        return {int(m): np.where(halves > 0, halves / 2, np.inf) for m, halves in arrays.items()}, times_trained.astype(
            np.int64
        )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); {hint}") from None
