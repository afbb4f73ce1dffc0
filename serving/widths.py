"""Choose two widths: a size of the encoder, and a width to which the item table is cut without training.

The cut is a PCA weighted by the users' vectors. The scores Z T^T of users Z [U, D] and items T [N, D] are
Z C^(-1/2) · C^(1/2) T^T with C = Z^T Z. By the SVD C^(1/2) T^T = Q S V^T, the rank-w matrix nearest to all scores of
these users is Z C^(-1/2) Q[:, :w] · (T C^(1/2) Q[:, :w])^T (Eckart and Young). The encoder stays whole; w numbers per
user and item are left.
"""

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from common.files import check_schema, read_json, sha256
from trainer.runs import CUT, WEIGHTS, Cut

RIDGE = 1e-9  # added to C, relative to its mean eigenvalue, so that it can be inverted


def user_weighted_pca(users: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (A, B), float64 [D, D]: users @ A[:, :w] and items @ B[:, :w] give the best scores of width w.

    users: z of some users [U, D]; items: the item table without token 0 [N, D]. With w = D the scores are the same.
    """
    z, table = users.astype(np.float64), items.astype(np.float64)
    covariance = z.T @ z / len(z)
    values, vectors = np.linalg.eigh(covariance + RIDGE * np.trace(covariance) / len(covariance) * np.eye(z.shape[1]))
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    _, basis = np.linalg.eigh(root @ (table.T @ table) @ root)  # Q of the SVD, ascending
    basis = basis[:, ::-1]
    return inverse @ basis, root @ basis


def read_plane(run: Path) -> list[dict[str, Any]]:
    """Return the cells (encoder size, table width) that experiments.cut measured of a run's weights.

    Empty if the run was not cut, or before its weights changed. Raises InputError for a damaged cut.json.
    """
    path, hint = run / CUT, f"measure it again: python -m experiments.cut {shlex.quote(str(run))}"
    if not path.exists():
        return []
    cut = check_schema(read_json(path, hint), Cut, path, hint)
    return cut.get("plane", []) if cut.get("weights") == sha256(run / WEIGHTS) else []
