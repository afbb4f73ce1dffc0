"""Paired bootstrap over users, to tell whether one model is better than another.

Efron and Tibshirani (1993); in information retrieval Sakai (2006). U users.
"""

from typing import NamedTuple

import numpy as np

DRAWS = 10_000
AT_ONCE = 500  # draws held in memory at once


class Difference(NamedTuple):
    """Mean of a paired difference, its 95 % interval, and its two-sided p value."""

    mean: float
    low: float
    high: float
    p: float


def user_metrics(ranks: np.ndarray, name: str) -> np.ndarray:
    """Return Recall@K, NDCG@K or MRR@K of every user: ranks [U] from 1 -> [U].

    Their means equal the metrics of trainer/metrics.py.
    """
    metric, _, k = name.partition("@")
    value = {"Recall": lambda: np.ones_like(ranks), "NDCG": lambda: 1 / np.log2(ranks + 1), "MRR": lambda: 1 / ranks}
    return np.where(ranks <= int(k), value[metric](), 0.0)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, draws: int = DRAWS) -> Difference:
    """Return the mean of a - b over users [U], with users resampled `draws` times.

    Users with equal differences are interchangeable, so a draw is multinomial over the distinct differences. p is
    twice the smaller share of draws on either side of 0 (a share of 0 counts as one draw).
    """
    values, counts = np.unique(a - b, return_counts=True)
    random = np.random.default_rng(0)
    parts = [min(AT_ONCE, draws - start) for start in range(0, draws, AT_ONCE)]
    drawn = np.concatenate([random.multinomial(len(a), counts / len(a), size=n) @ values for n in parts]) / len(a)
    low, high = np.quantile(drawn, [0.025, 0.975])
    below, above = (drawn <= 0).mean(), (drawn >= 0).mean()
    return Difference(
        float((a - b).mean()), float(low), float(high), float(min(1, 2 * max(min(below, above), 1 / draws)))
    )
