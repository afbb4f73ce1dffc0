"""How many parameters one nested training saves: Figure 4 of the paper by its formula, and of the models here."""

from __future__ import annotations

from experiments.paper import SAVED
from experiments.tables import table

FIRST = 128  # the smallest size that the figure counts
FEATURES = 2048  # bge-large's and SigLIP's, side by side


def by_the_paper(dim: int) -> int:
    """The parameters of a model of 2 blocks as the figure counts them: 5 square weights, 5 biases and 3 vectors of the
    LRU a block, complex ones once; no LayerNorm, projection or item table. The figure comes out to the digit."""
    return 2 * (5 * dim**2 + 5 * dim + 3 * dim)


def stored(dim: int, projection: bool = True) -> int:
    """The numbers in the file of a model here, 2 blocks, which are those of its largest size: complex ones are two, and
    masked ones are there, as zeros. projection: with that of both paper's encoders."""
    square, vector = 3 + 4, 3 + 3 + 3 + 4  # feed-forward, B and C; biases of the two, ν θ γ, LayerNorms
    return 2 * (square * dim**2 + vector * dim) + projection * (FEATURES + 1) * dim


def unmasked(sizes: tuple[int, ...], projection: bool = True) -> int:
    """The parameters of a model here as model.count_parameters counts them: complex ones once, masked ones not."""
    dim, below = sizes[-1], (0, *sizes)
    square = sum((high - low) * high for low, high in zip(below, sizes, strict=False))
    return 2 * (5 * square + 5 * dim + 3 * dim + 4 * dim) + projection * (FEATURES + 1) * dim


def saved(of_separate: list[int], of_one: int) -> float:
    """What separate models hold more than the one model for all sizes, as a share of it: the figure's R_s."""
    return sum(of_separate) / of_one - 1


def figure4() -> list[tuple[int, float, float, float]]:
    """(largest size, R_s by the paper's formula, of the files here, of the parameters here that no mask leaves out)."""
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
    """The figure's part of the report, Markdown lines."""
    rows = [
        [
            f"{FIRST}..{largest}" if largest > FIRST else f"{FIRST}",
            f"{SAVED[largest]:.2%}",
            f"{formula:.2%}",
            f"{files:.2%}",
            f"{counted:.2%}",
        ]
        for largest, formula, files, counted in figure4()
    ]
    return [
        "## Figure 4: parameters that one training for all sizes saves",
        "",
        "What separate models of the sizes hold in addition, as a share of the one model. The paper's formula counts "
        "five square weights a block. The files of the models here hold B and C as two of each, LayerNorms, and the "
        f"projection of {FEATURES} features, which grows with the size and not with its square. The last column counts "
        "complex numbers once, and not the zeros that the mask leaves in the one model.",
        "",
        *table(["sizes", "paper", "its formula", "files here", "without masked zeros"], rows),
        "![Parameters saved](../media/parameters_saved.png)",
        "",
    ]
