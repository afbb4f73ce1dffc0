"""Full ranking, exact scores, metrics, and the test of a run with its files."""

import copy
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from common.files import write_json
from config import Config, ModelSettings
from dataloader import eval_batches, eval_rows, times_trained
from model import FMRLRec, slice_model
from model.baselines.counting import Popularity
from tests.made_up import as_sequences, random_model, with_random_weights
from trainer import evaluation, testing
from trainer.evaluation import count_ahead, exact_scores, longest_row, on_grid, target_ranks
from trainer.runs import TRAINED, decoded, read_arrays, save_ranks
from trainer.testing import check_slice, list_metrics_of_sizes, top_items

NUM_ITEMS, MAX_LEN, SIZES, KS = 40, 6, (4, 8, 16), (1, 5, 10, 20)
INF, NAN = math.inf, math.nan
RING = {"lru_r_min": 0.3, "lru_r_max": 0.9}
CONFIG = Config(mrl_hidden_sizes=SIZES, lru_max_len=MAX_LEN, metric_ks=KS, test_batch_size=7, **RING)


def model_of(branch="both", history_bias=False):
    features = np.random.default_rng(0).normal(size=(NUM_ITEMS, 9)).astype(np.float32) if branch == "both" else None
    options = {"logit_scale": True, "history_bias": (0.5, -30.0, 1.0)} if history_bias else {}
    return random_model(SIZES, num_items=NUM_ITEMS, features=features, **options).train()


def random_sequences():
    """Histories up to five times as long as what the model reads; items come back now and then."""
    random = np.random.default_rng(0)
    return [random.integers(1, NUM_ITEMS + 1, size=random.integers(3, 5 * MAX_LEN)).tolist() for _ in range(25)]


def rows_of(sequences, part="test", max_len=MAX_LEN):
    return eval_rows(as_sequences(sequences), max_len, part)


def metrics_of(model, rows, batch_size=4, mask_history=False):
    return evaluation.evaluate(model, rows, sizes=SIZES, batch_size=batch_size, ks=KS, mask_history=mask_history)


def plain_scores(model, table, known, mask_history=False):
    """Return the scores [M, N+1] of what follows a history, at every size."""
    read = torch.as_tensor(known[-MAX_LEN:])
    z = model.encode(table[read], torch.arange(len(read)), len(read))[-1].detach()
    scores = torch.stack([table[:, :m] @ z[:m] for m in SIZES])
    if model.history_bias is not None and not mask_history:
        scores[:, sorted(set(known))] += (100 * model.history_bias / model.log_scale.exp()).detach()[:, None]
    return scores


def plain_metrics(model, sequences, part, mask_history):
    model = copy.deepcopy(model).double().eval()
    table = model.item_table().detach()
    sums = {m: dict.fromkeys([f"{metric}@{k}" for k in KS for metric in ("Recall", "NDCG", "MRR")], 0.0) for m in SIZES}
    for v in sequences:
        known = v[:-2] if part == "val" else v[:-1]
        target = v[len(known)]
        shown = [i for i in range(1, NUM_ITEMS + 1) if i == target or not (mask_history and i in known)]
        for m, scores in zip(SIZES, plain_scores(model, table, known, mask_history).tolist(), strict=True):
            rank = sorted(shown, key=lambda item, scores=scores: -scores[item]).index(target) + 1
            for k in KS:
                for metric, value in (("Recall", 1), ("NDCG", 1 / math.log2(rank + 1)), ("MRR", 1 / rank)):
                    sums[m][f"{metric}@{k}"] += (rank <= k) * value / len(sequences)
    return sums


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize(("branch", "history_bias"), [("both", True), ("id", False)])
@pytest.mark.parametrize(("items", "table_bytes", "batch_size"), [(2**15, 2**30, 4), (1, 2**30, 1), (7, 0, 100)])
def test_every_size_is_ranked_as_one_user_at_a_time_by_sorting(
    monkeypatch, part, mask_history, branch, history_bias, items, table_bytes, batch_size
):
    for name, value in {"ITEMS": items, "USERS": 5, "TABLE_BYTES": table_bytes}.items():
        monkeypatch.setattr(evaluation, name, value)
    model, sequences = model_of(branch, history_bias), random_sequences()
    sequences[0][-1] = sequences[0][0]  # a target of long ago is a candidate
    metrics = metrics_of(model.train(), rows_of(sequences, part), batch_size, mask_history)
    expected = plain_metrics(model, sequences, part, mask_history)
    assert metrics == {m: pytest.approx(expected[m], abs=1e-12) for m in SIZES}
    assert model.training  # and nothing was dropped out


@pytest.mark.parametrize("num_items", [32_767, 32_768])
def test_identical_items_share_their_average_rank_in_catalogues_and_batches_of_any_size(monkeypatch, num_items):
    monkeypatch.setattr(evaluation, "GROUP", 8)
    random, kinds = np.random.default_rng(0), 200  # items of one kind have the same features
    kind = random.integers(0, kinds, num_items)
    torch.manual_seed(0)
    model = FMRLRec(num_items, torch.randn(kinds, 9)[kind], ModelSettings(mrl_hidden_sizes=(8, 16), **RING))
    model, sequences = with_random_weights(model, 0.5), random.integers(1, num_items + 1, (20, 5)).tolist()
    sequences[0][-1] = num_items  # the only item of its chunk in a catalogue of 32,768
    double, rows = copy.deepcopy(model).double().eval(), rows_of(sequences)
    found = evaluation.rank_targets(model, rows, sizes=model.sizes, batch_size=256)
    table = double.item_table().detach()
    first = np.unique(kind, return_index=True)[1] + 1  # an item of every kind
    for user, v in enumerate(sequences):
        z = double.encode(table[v[:-1]], torch.arange(len(v) - 1), len(v) - 1)[-1].detach()
        for m in model.sizes:
            scores = (table[first, :m] @ z[:m]).numpy()[kind]
            target = scores[v[-1] - 1]
            assert found[m][user] == 1 + (scores > target).sum() + ((scores == target).sum() - 1) / 2
    again = evaluation.rank_targets(model, rows, sizes=model.sizes, batch_size=7)
    assert all(torch.equal(again[m], found[m]) for m in model.sizes)


@pytest.mark.parametrize("items", [3, NUM_ITEMS + 1])
def test_a_user_whose_scores_are_no_numbers_ranks_last_and_no_other_user_notices(monkeypatch, items):
    model, batches = model_of("id"), [a_batch()]
    table, z = model.item_table().detach(), torch.randn(8, SIZES[-1])
    monkeypatch.setattr(evaluation, "ITEMS", items)
    before = evaluation._ranks(model, batches, z, table, SIZES, mask_history=False)
    z[2, 5] = math.nan  # of the sizes beyond 4
    found = evaluation._ranks(model, batches, z, table, SIZES, mask_history=False)
    assert found[1:, 2].tolist() == [NUM_ITEMS + 2] * 2
    found[1:, 2] = before[1:, 2]
    assert torch.equal(found, before)


def test_ranks_are_kept_to_any_cut_off_and_named_if_they_cannot_be_read(tmp_path):
    path = tmp_path / "test_ranks.npz"
    save_ranks(path, {4: np.array([1.0, 49_999.5, 50_000.0, 50_001.0])}, 50_000, np.zeros(4))
    assert decoded(read_arrays(path, "")["4"]).tolist() == [1.0, 49_999.5, 50_000.0, np.inf]
    cut_short = path.read_bytes()[:-30]
    np.savez(path, **{"4": np.array([{}], dtype=object)})
    for damaged in (path.read_bytes(), cut_short, b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"test_ranks\.npz cannot be read .*; test again$"):
            read_arrays(path, "test again")


def a_batch():
    return next(eval_batches(rows_of(random_sequences()), 8, torch.device("cpu")))


@pytest.fixture
def sequences():
    return as_sequences(random_sequences())


@pytest.mark.parametrize("change", [1e-2, NAN])
def test_a_slice_passes_the_check_unless_any_weight_is_changed(change):
    model = model_of()
    for size in SIZES:
        check_slice(model, slice_model(model, size), a_batch())
    for name, _ in model.named_parameters():
        small = slice_model(model, 8).requires_grad_(False)
        small.get_parameter(name).view(-1)[0] += change
        with pytest.raises(RuntimeError, match="the slice of size 8 differs from the full model's scores by"):
            check_slice(model, small, a_batch())


def test_a_wrong_slice_is_reported_after_all_results_are_written(sequences, tmp_path, monkeypatch):
    write_json(tmp_path / "config.json", {"settings": vars(CONFIG)})
    wrong = slice_model(model_of(), 8).requires_grad_(False)
    wrong.items.projection.bias += 0.1
    monkeypatch.setattr(testing, "slice_model", lambda model, size: wrong if size == 8 else slice_model(model, size))
    with pytest.raises(RuntimeError, match="the slice of size 8 differs"):
        testing.test_every_size(model_of(), sequences, CONFIG, tmp_path)
    assert set(json.loads((tmp_path / "test_mrl_metrics.json").read_text())) == {"4", "8", "16"}


@pytest.mark.parametrize("mask_history", [False, True])
def test_list_metrics_and_every_users_rank_up_to_the_largest_cut_off_are_saved(sequences, tmp_path, mask_history):
    model, rows = model_of().eval(), eval_rows(sequences, MAX_LEN, "test")
    write_json(tmp_path / "config.json", {"settings": vars(CONFIG)})
    testing.test_every_size(model, sequences, CONFIG, tmp_path, mask_history=mask_history, list_metrics=True)
    suffix = "_history_masked" * mask_history
    lists = json.loads((tmp_path / f"test_list_metrics{suffix}.json").read_text())
    assert {"Coverage@5", "ARP@5", "Novelty@5", "ILD@5"} <= lists["16"].keys()
    saved = read_arrays(tmp_path / f"test_ranks{suffix}.npz", "")
    assert saved.pop(TRAINED).tolist() == times_trained(sequences, NUM_ITEMS)[rows.targets].tolist()
    expected = evaluation.rank_targets(model, rows, sizes=SIZES, batch_size=7, mask_history=mask_history)
    for m, ranks in expected.items():
        assert 0 < (ranks <= max(KS)).sum() < len(rows)
        assert decoded(saved[str(m)]).tolist() == torch.where(ranks <= max(KS), ranks, INF).tolist()


@pytest.mark.parametrize("mask_history", [False, True])
def test_recommended_lists_are_the_items_of_highest_score(sequences, mask_history):
    model, rows = model_of(history_bias=True).eval(), eval_rows(sequences, MAX_LEN, "test")
    found = top_items(model, rows, 5, mask_history)
    for user in range(len(sequences)):
        history = sequences.of(user)[:-1]
        scores = plain_scores(model, model.item_table().detach(), history)
        scores[:, [0, *history] if mask_history else 0] = -torch.inf
        for m, expected in zip(SIZES, scores.argsort(descending=True), strict=True):
            assert found[m][user].tolist() == expected[:5].tolist()


def test_list_metrics_follow_their_definitions(sequences):
    model, rows = model_of().eval(), eval_rows(sequences, MAX_LEN, "test")
    counts = torch.from_numpy(times_trained(sequences, NUM_ITEMS))
    found = list_metrics_of_sizes(model, rows, counts, (1, 5), mask_history=False)
    features = F.normalize(model.items.rows(torch.arange(1, NUM_ITEMS + 1), torch.float64), dim=1)
    for m, lists in top_items(model, rows, 5, mask_history=False).items():
        trained = counts[lists].double()
        pairs = [1 - features[a - 1] @ features[b - 1] for items in lists for a in items for b in items if a != b]
        assert found[m]["Coverage@5"] == len(lists.unique()) / NUM_ITEMS
        assert found[m]["ARP@5"] == pytest.approx(trained.mean().item())
        assert found[m]["Novelty@5"] == pytest.approx(-(trained.clamp_min(1) / len(lists)).log2().mean().item())
        assert found[m]["ILD@5"] == pytest.approx(np.mean(pairs))
        assert "ILD@1" not in found[m]  # a list of one item has no pair


def test_list_metrics_need_features_for_diversity_and_a_cut_off_within_the_catalogue(sequences):
    rows, counts = eval_rows(sequences, MAX_LEN, "test"), torch.from_numpy(times_trained(sequences, NUM_ITEMS))
    with pytest.raises(InputError, match=f"needs a cut-off of at most {NUM_ITEMS}"):
        list_metrics_of_sizes(model_of(), rows, counts, (50, 100), mask_history=False)
    popularity = Popularity(NUM_ITEMS)
    popularity.counts = counts.float()
    (metrics,) = list_metrics_of_sizes(popularity, rows, counts, (5,), mask_history=False).values()
    assert metrics["Coverage@5"] == 5 / NUM_ITEMS and "ILD@5" not in metrics
    assert metrics["ARP@5"] == pytest.approx(counts[1:].sort(descending=True).values[:5].double().mean().item())


def ranks_by_counting(z, rows, targets, rounding=0.0, chunk=5):
    """The ranks that count_ahead finds in chunks, with float32 scores off by `rounding` of what they may be off by."""
    target = exact_scores(z, rows[targets])
    counts = torch.zeros(2, len(z))
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        off = z.shape[1] * 2**-24 * z.norm(dim=1)[:, None] * part.norm(dim=1)
        scores = z @ part.T + rounding * off * torch.randn(off.shape).sign()
        here = (targets >= start) & (targets < start + len(part))
        scores[here, targets[here] - start] = -INF
        counts += torch.stack(count_ahead(scores, target, z, part, longest_row(part), torch.empty(2, *scores.shape)))
    return 1 + counts[0] + counts[1] / 2


@pytest.mark.parametrize(("dim", "bits"), [(1, 22), (512, 22), (1024, 21)])
@pytest.mark.parametrize("alike", [False, True], ids=["of all sizes", "with the largest sums"])
def test_vectors_are_rounded_to_their_bits_and_scores_are_exact_in_any_order(dim, bits, alike):
    torch.manual_seed(0)
    x = 1 - torch.rand(6, dim) / 100 if alike else torch.randn(6, dim) * 10 ** (torch.randn(6, dim) + torch.randn(6, 1))
    z, rows = on_grid(x[:3]), on_grid(x[3:])
    assert ((z - x[:3]).abs() <= z.abs().amax(dim=1, keepdim=True) * 2**-bits).all()
    pairs = zip(z.tolist(), rows.tolist(), strict=True)
    expected = [sum(Fraction(a) * Fraction(b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    order = torch.randperm(dim)
    product = (z.double() @ rows.double().T).diag()
    for found in (exact_scores(z, rows), exact_scores(z[:, order], rows[:, order]), product):
        assert [Fraction(score) for score in found.tolist()] == expected


@pytest.mark.parametrize("spread", [1.0, 1e-6, 0.0], ids=["far apart", "within rounding", "equal"])
@pytest.mark.parametrize("rounding", [0.0, 1.0], ids=["as computed", "rounded as badly as possible"])
def test_counted_ranks_are_those_of_all_exact_scores(spread, rounding):
    torch.manual_seed(0)
    z, rows = torch.randn(20, 12), 1 + spread * torch.randn(40, 12)
    z[:, 11] = 0
    rows[::3, 11] = 100  # longer, so rounded worse, with scores like the others'
    rows[10:15] = rows[3]
    z, rows = on_grid(z), on_grid(rows)
    targets = torch.arange(20)
    expected = target_ranks(z.double() @ rows.double().T, targets)
    assert ranks_by_counting(z, rows, targets, rounding).tolist() == expected.tolist()
    assert (expected % 1 == 0.5).any()


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([-INF, 0.5, -INF, 1.0, INF], 1, 3),
        ([0.5, 1.0, 0.5, 0.5, 2.0], 2, 4),  # the average of places 3, 4 and 5
        ([INF, 0.5, INF], 2, 1.5),
        ([NAN, 0.5, NAN, 0.1], 1, 3),
        ([0.1, NAN, 0.3], 1, 4),
    ],
)
def test_a_rank_is_averaged_over_ties_and_not_a_number_is_ahead_of_every_target(scores, target, rank):
    assert target_ranks(torch.tensor([scores]), torch.tensor([target])).item() == rank


def test_a_rank_up_to_the_cut_off_is_a_hit_and_half_a_rank_more_is_none():
    expected = {"Recall@3": 2 / 4, "NDCG@3": (1 + 1 / math.log2(4)) / 4, "MRR@3": (1 + 1 / 3) / 4}
    assert evaluation.ranking_metrics(torch.tensor([1.0, 3.0, 3.5, 1e9]), (3,)) == pytest.approx(expected, abs=1e-15)
