"""The test of a trained model: the files it writes, the check of every slice, and the metrics of recommended lists."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from common.files import write_json
from config import Config
from dataloader import eval_batches, eval_rows, times_trained
from model import FMRLRec, slice_model
from model.baselines.counting import Popularity
from tests.made_up import as_sequences, with_random_weights
from trainer import testing
from trainer.evaluation import rank_targets
from trainer.list_metrics import list_metrics_of_sizes, top_items
from trainer.testing import check_slice
from trainer.user_ranks import load_ranks

NUM_ITEMS, SIZES, KS = 40, (4, 8, 16), (1, 5, 20)
CONFIG = Config(mrl_hidden_sizes=SIZES, lru_max_len=6, lru_r_min=0.3, lru_r_max=0.9, metric_ks=KS, test_batch_size=7)


def random_model(features=True):
    torch.manual_seed(0)
    return with_random_weights(FMRLRec(NUM_ITEMS, torch.randn(NUM_ITEMS, 9) if features else None, CONFIG), 0.5)


@pytest.fixture
def sequences():
    random = np.random.default_rng(0)
    return as_sequences([random.integers(1, NUM_ITEMS + 1, size=random.integers(3, 30)).tolist() for _ in range(25)])


@pytest.fixture
def run(tmp_path):
    """A run's folder that says what was trained."""
    write_json(tmp_path / "config.json", {"settings": vars(CONFIG)})
    return tmp_path


def first_batch(sequences):
    return next(eval_batches(eval_rows(sequences, 6, "test"), 7, torch.device("cpu")))


@pytest.mark.parametrize("size", SIZES)
def test_a_true_slice_passes_the_check(sequences, size):
    model = random_model()
    check_slice(model, slice_model(model, size), first_batch(sequences))


@pytest.mark.parametrize("change", [1e-2, math.nan])
def test_a_slice_with_any_weight_changed_fails_the_check(sequences, change):
    model = random_model()
    for name, _ in model.named_parameters():
        small = slice_model(model, 8)
        with torch.no_grad():
            small.get_parameter(name).view(-1)[0] += change
        with pytest.raises(RuntimeError, match="the slice of size 8 differs from the full model's scores by"):
            check_slice(model, small, first_batch(sequences))


def test_a_wrong_slice_is_reported_after_all_results_are_written(sequences, run, monkeypatch):
    def wrong_slice(model, size):
        small = slice_model(model, size)
        with torch.no_grad():
            small.items.projection.bias += 0.1 * (size == 8)
        return small

    monkeypatch.setattr(testing, "slice_model", wrong_slice)
    with pytest.raises(RuntimeError, match="the slice of size 8 differs"):
        testing.test_every_size(random_model(), sequences, CONFIG, run)
    assert set(json.loads((run / "test_mrl_metrics.json").read_text())) == {"4", "8", "16"}


@pytest.mark.parametrize("mask_history", [False, True])
def test_the_rank_of_every_user_is_saved_up_to_the_largest_cut_off(sequences, run, mask_history):
    model, rows = random_model().eval(), eval_rows(sequences, 6, "test")
    testing.test_every_size(model, sequences, CONFIG, run, mask_history=mask_history)
    saved, times = load_ranks(run / f"test_ranks{'_history_masked' * mask_history}.npz", "")
    expected = rank_targets(model, rows, sizes=SIZES, batch_size=7, mask_history=mask_history)
    assert times.tolist() == times_trained(sequences, NUM_ITEMS)[rows.targets].tolist()
    for m in SIZES:
        near = expected[m].numpy() <= max(KS)
        assert 0 < near.sum() < len(rows)
        assert saved[m][near].tolist() == expected[m].numpy()[near].tolist()
        assert np.isinf(saved[m][~near]).all()


# -------------------------------------------------------------------------------------------------------- list metrics


@pytest.mark.parametrize("mask_history", [False, True])
def test_recommended_lists_are_the_items_of_highest_score(sequences, mask_history):
    model, rows = random_model().eval(), eval_rows(sequences, 6, "test")
    found = top_items(model, rows, 5, mask_history)
    table = model.item_table()
    for user in range(len(sequences)):
        history = sequences.of(user)[:-1]
        read = torch.as_tensor(history[-6:])
        z = model.encode(table[read], torch.arange(len(read)), len(read))[-1]
        for m in SIZES:
            scores = table[:, :m] @ z[:m]
            scores[0] = -torch.inf
            if mask_history:
                scores[history] = -torch.inf
            assert found[m][user].tolist() == scores.argsort(descending=True)[:5].tolist()


def test_list_metrics_follow_their_definitions(sequences):
    model, rows = random_model().eval(), eval_rows(sequences, 6, "test")
    counts = torch.from_numpy(times_trained(sequences, NUM_ITEMS))
    found = list_metrics_of_sizes(model, rows, counts, (1, 5), mask_history=False)
    features = F.normalize(model.items.rows(torch.arange(1, NUM_ITEMS + 1), torch.float64), dim=1)
    for m, lists in top_items(model, rows, 5, mask_history=False).items():
        lists = lists.tolist()
        listed = [item for items in lists for item in items]
        pairs = [1 - features[a - 1] @ features[b - 1] for items in lists for a in items for b in items if a != b]
        assert found[m]["Coverage@5"] == pytest.approx(len(set(listed)) / NUM_ITEMS)
        assert found[m]["ARP@5"] == pytest.approx(np.mean([counts[item] for item in listed]))
        surprise = [-math.log2(max(1, counts[item]) / len(lists)) for item in listed]
        assert found[m]["Novelty@5"] == pytest.approx(np.mean(surprise))
        assert found[m]["ILD@5"] == pytest.approx(np.mean(pairs))
        assert "ILD@1" not in found[m]  # a list of one item has no pair


def test_a_model_without_features_has_no_diversity_and_popularity_lists_one_list(sequences):
    rows, counts = eval_rows(sequences, 6, "test"), torch.from_numpy(times_trained(sequences, NUM_ITEMS))
    assert "ILD@5" not in list_metrics_of_sizes(random_model(False).eval(), rows, counts, (5,), False)[4]
    popularity = Popularity(NUM_ITEMS)
    popularity.counts = counts.float()
    (metrics,) = list_metrics_of_sizes(popularity, rows, counts, (5,), mask_history=False).values()
    assert metrics["Coverage@5"] == 5 / NUM_ITEMS
    assert metrics["ARP@5"] == pytest.approx(counts[1:].sort(descending=True).values[:5].double().mean().item())


def test_list_metrics_are_written_beside_the_others(sequences, run):
    testing.test_every_size(random_model(), sequences, CONFIG, run, list_metrics=True, mask_history=True)
    found = json.loads((run / "test_list_metrics_history_masked.json").read_text())
    assert {"Coverage@5", "ARP@5", "Novelty@5", "ILD@5"} <= found["16"].keys()


def test_list_metrics_without_a_cut_off_within_the_catalogue_are_refused(sequences):
    rows, counts = eval_rows(sequences, 6, "test"), torch.from_numpy(times_trained(sequences, NUM_ITEMS))
    with pytest.raises(InputError, match=f"needs a cut-off of at most {NUM_ITEMS}"):
        list_metrics_of_sizes(random_model(), rows, counts, (50, 100), mask_history=False)
