"""How many parameters one nested training saves: the paper's Figure 4, and the same for the models here."""

from __future__ import annotations

import pandas as pd

from experiments.paper import SAVED
from experiments.tables import markdown

FIRST = 128  # the smallest size that the figure counts
FEATURES = 2048  # bge-large's and SigLIP's, side by side


def by_the_paper(dim: int) -> int:
    """Return the parameters of a 2-block model as the figure counts them, which reproduces it to the digit.

    A block has 5 square weights, 5 biases and 3 vectors of the LRU; a complex number counts once. LayerNorms, the
    projection and the item table do not count.
    """
    return 2 * (5 * dim**2 + 5 * dim + 3 * dim)


def stored(dim: int, projection: bool = True) -> int:
    """Return the numbers in the file of a 2-block model here.

    A complex number counts twice, and masked zeros count. projection: include the projection of the paper's encoders.
    """
    square, vector = 3 + 4, 3 + 3 + 3 + 4  # feed-forward, B and C; their biases, ν θ γ, LayerNorms
    return 2 * (square * dim**2 + vector * dim) + projection * (FEATURES + 1) * dim


def unmasked(sizes: tuple[int, ...], projection: bool = True) -> int:
    """Return the parameters of a model here as model.count_parameters does: complex ones once, masked ones not."""
    dim, below = sizes[-1], (0, *sizes)
    square = sum((high - low) * high for low, high in zip(below, sizes, strict=False))
    return 2 * (5 * square + 5 * dim + 3 * dim + 4 * dim) + projection * (FEATURES + 1) * dim


def saved(of_separate: list[int], of_one: int) -> float:
    """Return the figure's R_s: the extra parameters of separate models, relative to the one nested model."""
    return sum(of_separate) / of_one - 1


def figure4() -> list[tuple[int, float, float, float]]:
    """Return (largest size, R_s by the paper's formula, R_s of the files here, R_s of the unmasked parameters)."""
    rows = []
    for largest in SAVED:
        sizes = tuple(FIRST * 2**i for i in range((largest // FIRST).bit_length()))
        rows.append(
            (
                largest,
                saved([by_the_paper(m) for m in sizes], by_the_paper(largest)),
                saved([stored(m) for m in sizes], stored(largest)),
                saved([unmasked((m,)) for m in sizes], unmasked(sizes)),
            )
        )
    return rows


def section() -> list[str]:
    """Return the figure's part of the report as Markdown lines."""
    columns = ["sizes", "its formula", "files here", "without masked zeros"]
    table = pd.DataFrame(figure4(), columns=columns)
    table.insert(1, "paper", SAVED.values())
    sizes = [f"{FIRST}..{largest}" if largest > FIRST else f"{FIRST}" for largest in table.pop("sizes")]
    table = table.map("{:.2%}".format)
    table.insert(0, "sizes", sizes)
    return [
        "## Figure 4: parameters that one training for all sizes saves",
        "",
        "Separate models of every size hold this many more parameters than the one nested model. The paper's formula "
        "counts five square weights a block. A file here holds B and C twice (real and imaginary parts), LayerNorms, "
        f"and the projection of {FEATURES} features, which grows with the size and not with its square. The last "
        "column counts complex numbers once and leaves out the zeros that the mask makes in the nested model.",
        "",
        *markdown(table),
        "![Parameters saved](../media/parameters_saved.png)",
        "",
    ]
