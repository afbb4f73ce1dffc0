"""Tell whether one model is better than another: a paired bootstrap over users, and Welch's t test over seeds.

The bootstrap (Efron and Tibshirani 1993; in information retrieval Sakai 2006) asks whether the difference of these
trained models would hold for other users; Welch's test (1947), whether it would hold for other seeds. U users.
"""

from collections.abc import Sequence
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


class Welch(NamedTuple):
    """Welch's t statistic, its degrees of freedom, and its two-sided p value."""

    t: float
    freedom: float
    p: float


def welch_test(a: Sequence[float], b: Sequence[float]) -> Welch | None:
    """Compare the means of a metric over seeds; None with fewer than two seeds of either, or without any variance.

    Seeds are not paired: the same seed draws other weights for models of other shapes.
    """
    if min(len(a), len(b)) < 2 or not (variance := np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)):
        return None
    parts = [(np.var(x, ddof=1) / len(x)) ** 2 / (len(x) - 1) for x in (a, b)]
    t, freedom = (np.mean(a) - np.mean(b)) / np.sqrt(variance), variance**2 / sum(parts)
    return Welch(float(t), float(freedom), student_p(float(t), float(freedom)))


def student_p(t: float, freedom: float) -> float:
    """Return the two-sided p value of Student's t: the density's integral over |x| > |t|, with x = √ν tan φ."""

    def integral(start: float) -> float:
        steps = np.linspace(start, np.pi / 2, 20_001)
        return (np.cos((steps[1:] + steps[:-1]) / 2) ** (freedom - 1)).mean() * (np.pi / 2 - start)

    return float(integral(np.arctan(abs(t) / np.sqrt(freedom))) / integral(0.0))
