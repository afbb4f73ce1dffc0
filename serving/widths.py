"""Two widths: cut the item table to w numbers an item, and keep the whole encoder. NumPy only.

Z [U, D]: vectors of users, T [N, D]: the item table, C = Z^T Z. Of all matrices of rank w, the nearest to the scores
Z T^T in Frobenius norm is Z P A^T:

    |Z X|_F = |C^(1/2) X|_F for every X;  C^(1/2) T^T = U S V^T;  U_w: the first w columns of U
    P = C^(-1/2) U_w  [D, w],   A = T C^(1/2) U_w  [N, w]

So item i scores (z P) · A_i. This is the PCA of the table, weighted with the users' vectors. U holds eigenvectors of
C^(1/2) T^T T C^(1/2), which is [D, D], so the table is never decomposed itself.
"""

import numpy as np


def narrow_table(table: np.ndarray, users: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (P [D, width], A [N, width]) float32 for the table [N, D] and users' vectors [U, D].

    Exact for width = D if the users' vectors span all D dimensions. Raises ValueError for a width beyond 1 to D.
    """
    dim = table.shape[1]
    if not 1 <= width <= dim:
        raise ValueError(f"width {width} must be from 1 to {dim}")
    users, items = users.astype(np.float64), table.astype(np.float64)
    values, vectors = np.linalg.eigh(users.T @ users)
    positive = values > values.max() * dim * np.finfo(np.float64).eps  # no user differs along the others
    root = np.sqrt(values[positive])
    half, inverse = ((vectors[:, positive] * by) @ vectors[:, positive].T for by in (root, 1 / root))
    _, directions = np.linalg.eigh(half @ (items.T @ items) @ half)  # ascending
    chosen = directions[:, ::-1][:, :width]
    return (inverse @ chosen).astype(np.float32), (items @ half @ chosen).astype(np.float32)
