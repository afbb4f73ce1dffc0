"""Save and load test_ranks.npz: every user's test rank at every size. U users.

Ranks per user allow paired comparisons of runs. The file also has the number of
training interactions of each user's target, to group users by it.
"""

from pathlib import Path

import numpy as np

from common.errors import InputError
from common.files import ARRAY_ERRORS, replacing

TRAINED = "times_trained"  # name of the array of training counts
BINS = {"never": 0, "1-5 times": 1, "6-20 times": 6, "21 times and more": 21}  # of training counts; their first ones


def save_ranks(path: Path, ranks: dict[int, np.ndarray], cutoff: int, times_trained: np.ndarray) -> None:
    """Save size -> ranks [U] and how often each user's target occurs in training [U].

    Ranks start at 1 and may end in .5 (ties). They are stored doubled, as integers; 0 is a rank beyond `cutoff`.
    """
    dtype = np.min_scalar_type(2 * cutoff)
    doubled = {str(m): np.where(r <= cutoff, 2 * r, 0).astype(dtype) for m, r in ranks.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        arrays = {**doubled, TRAINED: times_trained.astype(np.uint32)}
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle


def read_arrays(path: Path, hint: str) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file of ranks by their names.

    hint: how to fix the problem, the end of the error message. Raises InputError if the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except ARRAY_ERRORS as error:
        raise InputError(f"{path} cannot be read ({error}); {hint}") from None


def decoded(saved: np.ndarray) -> np.ndarray:
    """Return ranks as `save_ranks` got them [U]; those beyond the cutoff are infinite."""
    return np.where(saved > 0, saved / 2, np.inf)
