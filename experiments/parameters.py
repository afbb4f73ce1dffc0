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


def held(sizes: tuple[int, ...], projection: bool = True) -> int:
    """The parameters of a model here, 2 blocks, as model.count_parameters counts them: complex ones once, and of the
    square weights what the mask leaves. projection: with that of both paper's encoders."""
    dim, below = sizes[-1], (0, *sizes)
    square = sum((high - low) * high for low, high in zip(below, sizes, strict=False))
    return 2 * (5 * square + 5 * dim + 3 * dim + 4 * dim) + projection * (FEATURES + 1) * dim


def saved_by_the_paper(sizes: tuple[int, ...]) -> float:
    """R_s: what separate models of all sizes have, more than the largest alone has, as a share of it."""
    return sum(map(by_the_paper, sizes)) / by_the_paper(sizes[-1]) - 1


def saved_here(sizes: tuple[int, ...], projection: bool = True) -> float:
    """The same of the models here: separate models, whose weights no mask thins out, against the nested one."""
    return sum(held((m,), projection) for m in sizes) / held(sizes, projection) - 1


def figure4() -> list[tuple[int, float, float, float]]:
    """(largest size, R_s by the paper's formula, R_s of the blocks here, of the blocks and the projection)."""
    rows = []
    for largest in SAVED:
        sizes = tuple(FIRST * 2**i for i in range((largest // FIRST).bit_length()))
        rows.append((largest, saved_by_the_paper(sizes), saved_here(sizes, projection=False), saved_here(sizes)))
    return rows


def section() -> list[str]:
    """The figure's part of the report, Markdown lines."""
    rows = [
        [f"{FIRST}..{largest}", f"{SAVED[largest]:.2%}", f"{formula:.2%}", f"{blocks:.2%}", f"{whole:.2%}"]
        for largest, formula, blocks, whole in figure4()
    ]
    return [
        "## Figure 4: parameters that one training for all sizes saves",
        "",
        "What separate models of the sizes have in addition, as a share of the one model. The paper's formula counts a "
        "nested weight as dense. Of the models here the masked part is not counted (a run's file holds it as zeros), "
        f"and in the last column the projection of {FEATURES} features is.",
        "",
        *table(["sizes", "paper", "its formula", "blocks here", "with projection"], rows),
        "![Parameters saved](../media/parameters_saved.png)",
        "",
    ]
