"""Is one model better than another? The paired bootstrap over users (Efron and Tibshirani, 1993; in information
retrieval: Sakai, 2006). U users."""

from typing import NamedTuple

import numpy as np

DRAWS = 10_000
AT_ONCE = 500  # draws that are held at once


class Difference(NamedTuple):
    """The mean of a paired difference, its 95 % interval, and how likely one as far from 0 is where there is none."""

    mean: float
    low: float
    high: float
    p: float


def user_metrics(ranks: np.ndarray, name: str) -> np.ndarray:
    """Recall@K, NDCG@K or MRR@K of every user: ranks [U], from 1 -> [U]. Their means are trainer/metrics.py's."""
    metric, _, k = name.partition("@")
    value = {"Recall": lambda: np.ones_like(ranks), "NDCG": lambda: 1 / np.log2(ranks + 1), "MRR": lambda: 1 / ranks}
    return np.where(ranks <= int(k), value[metric](), 0.0)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, draws: int = DRAWS) -> Difference:
    """The mean of a - b over users [U], with users drawn anew `draws` times.

    Users of the same difference are alike, so a draw is one of a multinomial over the differences that occur. p is two
    times the smaller share of draws on either side of 0 (a share of 0 counts as one draw).
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
