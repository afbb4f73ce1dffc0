"""Ranks by comparing against ranks by sorting, and metrics against a loop over users."""

import math

import numpy as np
import pytest
import torch

import config
from trainer.metrics import METRICS, ranking_metrics, target_ranks

INF, NAN = math.inf, math.nan


def ranks_by_sorting(scores, targets):
    """The target's place in each user's sorted scores; the average place of all that have the same score."""
    ranks = []
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        best_first = sorted(row, reverse=True)
        places = [place for place, score in enumerate(best_first, start=1) if score == row[target]]
        ranks.append(sum(places) / len(places))
    return ranks


def metrics_by_looping(ranks, ks):
    metrics = {}
    for k in ks:
        recalls, ndcgs, mrrs = [], [], []
        for rank in ranks:
            recalls.append(1.0 if rank <= k else 0.0)
            ndcgs.append(1 / math.log2(rank + 1) if rank <= k else 0.0)
            mrrs.append(1 / rank if rank <= k else 0.0)
        for name, values in {"Recall": recalls, "NDCG": ndcgs, "MRR": mrrs}.items():
            metrics[f"{name}@{k}"] = sum(values) / len(values)
    return metrics


def rank_of(scores, target):
    return target_ranks(torch.tensor([scores]), torch.tensor([target])).item()


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_those_of_a_sort(seed):
    generator = torch.Generator().manual_seed(seed)
    scores, targets = torch.randn(20, 31, generator=generator), torch.randint(0, 31, (20,), generator=generator)
    assert target_ranks(scores, targets).tolist() == ranks_by_sorting(scores, targets)


@pytest.mark.parametrize("num_levels", [1, 2, 5])
def test_ranks_of_tied_scores_are_the_average_of_a_sort(num_levels):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, num_levels, (20, 14), generator=generator).float()
    targets = torch.randint(0, 14, (20,), generator=generator)
    assert target_ranks(scores, targets).tolist() == ranks_by_sorting(scores, targets)


def test_the_best_score_has_rank_one_and_the_worst_the_number_of_scores():
    assert [rank_of([3.0, 1.0, 2.0], target) for target in range(3)] == [1, 3, 2]


def test_two_that_tie_share_the_rank_between_them():
    assert rank_of([5.0, 2.0, 2.0, 1.0], 1) == rank_of([5.0, 2.0, 2.0, 1.0], 2) == 2.5


def test_a_model_that_scores_all_items_alike_ranks_every_target_in_the_middle():
    assert rank_of([0.0] * 101, 7) == 51


def test_an_item_that_is_no_candidate_is_behind_every_target():
    assert rank_of([-INF, 0.5, -INF, 1.0, -INF], 1) == 2


def test_an_infinite_score_is_ahead_and_an_infinite_target_is_first():
    assert rank_of([INF, 0.5, 1.0], 1) == 3
    assert rank_of([INF, 0.5, 1.0], 0) == 1
    assert rank_of([INF, 0.5, INF], 2) == 1.5


def test_a_score_that_is_not_a_number_counts_as_ahead_of_the_target():
    assert rank_of([NAN, 0.5, NAN, 0.1], 1) == 3


@pytest.mark.parametrize("scores", [[0.1, NAN, 0.3], [NAN, NAN, NAN], [-INF, NAN, INF]])
def test_a_target_whose_score_is_not_a_number_ranks_behind_all_scores(scores):
    assert rank_of(scores, 1) == len(scores) + 1


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_means_over_users_of_a_plain_loop(seed):
    ranks = np.random.default_rng(seed).integers(1, 60, size=37).astype(float)
    ranks[::4] += 0.5
    ks = (1, 5, 10, 50)
    assert ranking_metrics(torch.tensor(ranks), ks) == pytest.approx(metrics_by_looping(ranks.tolist(), ks), abs=1e-15)


def test_metrics_of_one_user_are_those_of_the_field():
    assert ranking_metrics(torch.tensor([3.0]), (2, 3)) == pytest.approx(
        {"Recall@2": 0, "NDCG@2": 0, "MRR@2": 0, "Recall@3": 1, "NDCG@3": 1 / math.log2(4), "MRR@3": 1 / 3}
    )


def test_a_rank_equal_to_the_cut_off_is_a_hit_and_half_a_rank_more_is_none():
    assert ranking_metrics(torch.tensor([5.0]), (5,))["Recall@5"] == 1
    assert ranking_metrics(torch.tensor([5.5]), (5,))["Recall@5"] == 0


def test_small_shares_are_not_rounded_to_float32():
    ranks = torch.full((3,), 1e9)
    ranks[0] = 1
    assert ranking_metrics(ranks, (5,))["Recall@5"] == 1 / 3


def test_a_new_metric_is_one_function_in_the_table(monkeypatch):
    monkeypatch.setitem(METRICS, "Last", lambda ranks, k: (ranks == k).double())
    assert ranking_metrics(torch.tensor([1.0, 3.0]), (3,))["Last@3"] == 0.5


def test_the_settings_accept_the_metrics_of_the_table():
    assert tuple(METRICS) == config.METRICS
