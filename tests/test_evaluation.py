"""Full ranking, exact scores, metrics, and the test of a run with its files."""

import copy
import json
import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import processes
from common.errors import InputError
from common.files import write_json
from config import Config, ModelSettings
from dataloader import eval_batches, eval_rows, times_trained
from model import FMRLRec, slice_model
from model.baselines.counting import Popularity
from tests.made_up import as_sequences, with_random_weights
from trainer import evaluation, testing
from trainer.evaluation import (
    candidates,
    count_ahead,
    evaluate,
    exact_scores,
    longest_row,
    on_grid,
    rank_targets,
    ranking_metrics,
    target_ranks,
)
from trainer.runs import TRAINED, decoded, read_arrays, save_ranks
from trainer.testing import check_slice, list_metrics_of_sizes, top_items

NUM_ITEMS, MAX_LEN, SIZES, KS = 40, 6, (4, 8, 16), (1, 5, 10, 20)
INF, NAN = math.inf, math.nan
RING = {"lru_r_min": 0.3, "lru_r_max": 0.9}
CONFIG = Config(mrl_hidden_sizes=SIZES, lru_max_len=MAX_LEN, metric_ks=KS, test_batch_size=7, **RING)


def random_model(branch="both", history_bias=False):
    torch.manual_seed(0)
    features = torch.randn(NUM_ITEMS, 9) if branch == "both" else None
    settings = replace(CONFIG, history_bias=history_bias, logit_scale=history_bias)
    model = with_random_weights(FMRLRec(NUM_ITEMS, features, settings), 0.5)
    if history_bias:
        model.history_bias.data = torch.tensor([0.005, -0.3, 0.01])  # b = 0.5, -30, 1
    return model


def random_sequences():
    """Histories up to five times as long as what the model reads; items come back now and then."""
    random = np.random.default_rng(0)
    return [random.integers(1, NUM_ITEMS + 1, size=random.integers(3, 5 * MAX_LEN)).tolist() for _ in range(25)]


def rows_of(sequences, part="test", max_len=MAX_LEN):
    return eval_rows(as_sequences(sequences), max_len, part)


def metrics_of(model, rows, batch_size=4, mask_history=False):
    return evaluate(model, rows, sizes=SIZES, batch_size=batch_size, ks=KS, mask_history=mask_history)


def plain_scores(model, table, known, mask_history=False):
    """Return the scores [M, N+1] of what follows a history, at every size."""
    read = torch.as_tensor(known[-MAX_LEN:])
    z = model.encode(table[read], torch.arange(len(read)), len(read))[-1].detach()
    scores = torch.stack([table[:, :m] @ z[:m] for m in SIZES])
    if model.history_bias is not None and not mask_history:
        scores[:, sorted(set(known))] += (100 * model.history_bias / model.log_scale.exp()).detach()[:, None]
    return scores


def plain_metrics(model, sequences, part, mask_history):
    """Return size -> metrics, from the scores of one user at a time in float64."""
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
                if rank <= k:
                    sums[m][f"Recall@{k}"] += 1 / len(sequences)
                    sums[m][f"NDCG@{k}"] += 1 / math.log2(rank + 1) / len(sequences)
                    sums[m][f"MRR@{k}"] += 1 / rank / len(sequences)
    return sums


@pytest.mark.parametrize(
    ("part", "mask_history", "branch", "history_bias"),
    [
        ("val", True, "both", False),
        ("test", False, "id", False),
        ("test", True, "both", False),
        ("test", True, "id", True),
        ("test", False, "both", True),
    ],
)
def test_every_size_is_ranked_as_one_user_at_a_time_by_sorting(part, mask_history, branch, history_bias):
    model, sequences = random_model(branch, history_bias), random_sequences()
    metrics = metrics_of(model, rows_of(sequences, part), mask_history=mask_history)
    expected = plain_metrics(model, sequences, part, mask_history)
    assert metrics.keys() == expected.keys()
    for m in SIZES:
        assert metrics[m] == pytest.approx(expected[m], abs=1e-12)


def watch_z(monkeypatch):
    """The list to which every later evaluation adds its users' z."""
    seen, true = [], evaluation._ranks
    monkeypatch.setattr(evaluation, "_ranks", lambda *a: seen.append(a[2]) or true(*a))
    return seen


@pytest.mark.parametrize(
    ("items", "table_bytes", "mask_history"), [(1, 2**30, True), (7, 0, True), (7, 2**30, False), (NUM_ITEMS, 0, True)]
)
def test_chunks_and_batches_give_what_the_whole_gives(monkeypatch, items, table_bytes, mask_history):
    model, rows, seen = random_model(history_bias=True), rows_of(random_sequences()), watch_z(monkeypatch)
    expected = metrics_of(model, rows, mask_history=mask_history)
    monkeypatch.setattr(evaluation, "ITEMS", items)
    monkeypatch.setattr(evaluation, "USERS", 5)
    monkeypatch.setattr(evaluation, "TABLE_BYTES", table_bytes)
    encoded = []
    for batch_size in (1, 7, len(rows)):
        seen.clear()
        assert metrics_of(model, rows, batch_size, mask_history) == expected
        encoded.append(torch.cat(seen))
    assert torch.equal(encoded[0], encoded[1]) and torch.equal(encoded[1], encoded[2])


def ranks_of(model, sequences, batch_size):
    return torch.stack(list(rank_targets(model, rows_of(sequences), sizes=model.sizes, batch_size=batch_size).values()))


def shop_of_twins(num_items, num_kinds=200, num_users=20):
    """(a model, histories, the kind of every item from 0 on): items of one kind have the same features."""
    random = np.random.default_rng(0)
    kind = random.integers(0, num_kinds, num_items)
    torch.manual_seed(0)
    features = torch.randn(num_kinds, 9)[kind]
    model = FMRLRec(num_items, features, ModelSettings(mrl_hidden_sizes=(8, 16), **RING))
    sequences = random.integers(1, num_items + 1, (num_users, 5)).tolist()
    sequences[0][-1] = num_items  # the only item of its chunk in a catalogue of 32,768
    return with_random_weights(model, 0.5), sequences, kind


@pytest.mark.parametrize("num_items", [32_767, 32_768])
def test_identical_items_share_their_average_rank_in_catalogues_and_batches_of_any_size(monkeypatch, num_items):
    monkeypatch.setattr(evaluation, "GROUP", 8)
    model, sequences, kind = shop_of_twins(num_items)
    found = ranks_of(model, sequences, 256)
    double = copy.deepcopy(model).double().eval()
    table = double.item_table().detach()
    first = np.unique(kind, return_index=True)[1] + 1  # an item of every kind
    for user, v in enumerate(sequences):
        z = double.encode(table[v[:-1]], torch.arange(len(v) - 1), len(v) - 1)[-1].detach()
        for j, m in enumerate(model.sizes):
            scores = (table[first, :m] @ z[:m]).numpy()[kind]
            target = scores[v[-1] - 1]
            assert found[j, user] == 1 + (scores > target).sum() + ((scores == target).sum() - 1) / 2
    for batch_size in (1, 7):
        assert torch.equal(ranks_of(model, sequences, batch_size), found)


@pytest.mark.parametrize("items", [3, NUM_ITEMS + 1])
def test_a_user_whose_scores_are_no_numbers_ranks_last_and_no_other_user_notices(monkeypatch, items):
    model, batches = random_model("id"), [a_batch()]
    table, z = model.item_table().detach(), torch.randn(8, SIZES[-1])
    monkeypatch.setattr(evaluation, "ITEMS", items)
    before = evaluation._ranks(model, batches, z, table, SIZES, mask_history=False)
    z[2, 5] = math.nan  # of the sizes beyond 4
    found = evaluation._ranks(model, batches, z, table, SIZES, mask_history=False)
    assert found[1:, 2].tolist() == [NUM_ITEMS + 2] * 2
    found[1:, 2] = before[1:, 2]
    assert torch.equal(found, before)


def excluded(sequence, mask_history):
    """The tokens that are no candidates for a user's test target."""
    (batch,) = eval_batches(rows_of([sequence]), 1, torch.device("cpu"))
    row = candidates(batch, 0, NUM_ITEMS + 1, mask_history)[0]
    some = [candidates(batch, *part, mask_history)[0] for part in ((0, 1), (1, 9), (9, NUM_ITEMS + 1))]
    assert torch.equal(torch.cat(some), row)
    assert set(row.tolist()) <= {0.0, -math.inf}
    return row.isinf().nonzero().flatten().tolist()


WHOLE = list(range(1, 4 * MAX_LEN))  # older items than the model reads


@pytest.mark.parametrize(
    ("history", "target", "masked"),
    [([5, 9, 5], 12, [5, 9]), (WHOLE, 30, WHOLE), (WHOLE, 1, WHOLE[1:])],
    ids=["the history", "a long history", "a target of long ago"],
)
def test_masking_excludes_the_history_and_token_0_but_never_the_target(history, target, masked):
    assert excluded([*history, target], mask_history=False) == [0]
    assert excluded([*history, target], mask_history=True) == [0, *masked]


def test_evaluation_drops_nothing_out_and_leaves_the_model_in_its_mode():
    model, rows = random_model(), rows_of(random_sequences())
    assert metrics_of(model.train(), rows) == metrics_of(model, rows)
    assert model.training
    metrics_of(model.eval(), rows)
    assert not model.training


@pytest.mark.parametrize("damage", ["absent", "cut short", "pickled"])
def test_ranks_are_kept_to_any_cut_off_and_named_if_they_cannot_be_read(tmp_path, damage):
    path = tmp_path / "test_ranks.npz"
    save_ranks(path, {4: np.array([1.0, 49_999.5, 50_000.0, 50_001.0])}, 50_000, np.zeros(4))
    assert decoded(read_arrays(path, "")["4"]).tolist() == [1.0, 49_999.5, 50_000.0, np.inf]
    if damage == "absent":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        np.savez(path, **{"4": np.array([{}], dtype=object), "times_trained": np.array([1])})
    with pytest.raises(InputError, match=r"test_ranks\.npz cannot be read .*; test again$"):
        read_arrays(path, "test again")


@pytest.mark.parametrize("world_size", [2, 3, 30])
def test_ranks_share_the_groups_of_users_out_and_some_may_have_none(monkeypatch, world_size):
    monkeypatch.setattr(evaluation, "GROUP", 4)
    model, rows, seen = random_model(), rows_of(random_sequences()), watch_z(monkeypatch)  # 25 users
    expected, found = metrics_of(model, rows), []
    monkeypatch.setattr(processes, "world_size", lambda: world_size)
    monkeypatch.setattr(processes, "add_up", lambda part: found.append(part.clone()) or part)
    for rank in range(world_size):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        metrics_of(model, rows)
    total = torch.stack(found)
    assert ((total > 0).sum(dim=0) == 1).all()  # each user by one rank
    assert torch.equal(torch.cat(seen[1:]), seen[0])  # encoded to the same bits
    monkeypatch.setattr(processes, "add_up", lambda part: total.sum(dim=0))
    assert metrics_of(model, rows) == expected


def a_batch():
    return next(eval_batches(rows_of(random_sequences()), 8, torch.device("cpu")))


@pytest.fixture
def sequences():
    return as_sequences(random_sequences())


@pytest.fixture
def run(tmp_path):
    """A run's folder that says what was trained."""
    write_json(tmp_path / "config.json", {"settings": vars(CONFIG)})
    return tmp_path


@pytest.mark.parametrize("change", [1e-2, math.nan])
def test_a_slice_passes_the_check_unless_any_weight_is_changed(change):
    model = random_model()
    for size in SIZES:
        check_slice(model, slice_model(model, size), a_batch())
    for name, _ in model.named_parameters():
        small = slice_model(model, 8)
        with torch.no_grad():
            small.get_parameter(name).view(-1)[0] += change
        with pytest.raises(RuntimeError, match="the slice of size 8 differs from the full model's scores by"):
            check_slice(model, small, a_batch())


def test_a_wrong_slice_is_reported_after_all_results_are_written(sequences, run, monkeypatch):
    wrong = slice_model(random_model(), 8).requires_grad_(False)
    wrong.items.projection.bias += 0.1
    monkeypatch.setattr(testing, "slice_model", lambda model, size: wrong if size == 8 else slice_model(model, size))
    with pytest.raises(RuntimeError, match="the slice of size 8 differs"):
        testing.test_every_size(random_model(), sequences, CONFIG, run)
    assert set(json.loads((run / "test_mrl_metrics.json").read_text())) == {"4", "8", "16"}


@pytest.mark.parametrize("mask_history", [False, True])
def test_list_metrics_and_every_users_rank_up_to_the_largest_cut_off_are_saved(sequences, run, mask_history):
    model, rows = random_model().eval(), eval_rows(sequences, MAX_LEN, "test")
    testing.test_every_size(model, sequences, CONFIG, run, mask_history=mask_history, list_metrics=True)
    lists = json.loads((run / f"test_list_metrics{'_history_masked' * mask_history}.json").read_text())
    assert {"Coverage@5", "ARP@5", "Novelty@5", "ILD@5"} <= lists["16"].keys()
    saved = read_arrays(run / f"test_ranks{'_history_masked' * mask_history}.npz", "")
    times = saved.pop(TRAINED)
    found = {int(m): decoded(ranks) for m, ranks in saved.items()}
    expected = rank_targets(model, rows, sizes=SIZES, batch_size=7, mask_history=mask_history)
    assert times.tolist() == times_trained(sequences, NUM_ITEMS)[rows.targets].tolist()
    for m in SIZES:
        near = expected[m].numpy() <= max(KS)
        assert 0 < near.sum() < len(rows)
        assert found[m][near].tolist() == expected[m].numpy()[near].tolist()
        assert np.isinf(found[m][~near]).all()


def test_validation_prints_the_metrics_of_targets_by_how_often_they_were_trained(sequences, monkeypatch, capsys):
    model, rows = random_model(), eval_rows(sequences, MAX_LEN, "val")
    often = times_trained(sequences, NUM_ITEMS)[rows.targets]
    many = sorted(often)[len(often) // 2]
    monkeypatch.setattr(testing, "BINS", {"few": 0, "many": many})
    found = testing.validate_every_size(model, sequences, CONFIG, mask_history=True)
    ranks = rank_targets(model, rows, sizes=SIZES, batch_size=7, mask_history=True)
    assert found == {m: ranking_metrics(ranks[m], CONFIG.metric_ks) for m in SIZES}
    printed = capsys.readouterr().out
    for name, users in (("few", often < many), ("many", often >= many)):
        recall = ranking_metrics(ranks[SIZES[-1]][users], (5,))["Recall@5"]
        assert re.search(rf"{name} +{users.sum()} users .* Recall@5 {recall:.4f}", printed)


@pytest.mark.parametrize("mask_history", [False, True])
def test_recommended_lists_are_the_items_of_highest_score(sequences, mask_history):
    model, rows = random_model(history_bias=True).eval(), eval_rows(sequences, MAX_LEN, "test")
    found = top_items(model, rows, 5, mask_history)
    for user in range(len(sequences)):
        history = sequences.of(user)[:-1]
        scores = plain_scores(model, model.item_table().detach(), history)
        scores[:, [0, *history] if mask_history else 0] = -torch.inf
        for m, expected in zip(SIZES, scores.argsort(descending=True), strict=True):
            assert found[m][user].tolist() == expected[:5].tolist()


def test_list_metrics_follow_their_definitions(sequences):
    model, rows = random_model().eval(), eval_rows(sequences, MAX_LEN, "test")
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


def test_list_metrics_need_features_for_diversity_and_a_cut_off_within_the_catalogue(sequences):
    rows, counts = eval_rows(sequences, MAX_LEN, "test"), torch.from_numpy(times_trained(sequences, NUM_ITEMS))
    assert "ILD@5" not in list_metrics_of_sizes(random_model("id").eval(), rows, counts, (5,), False)[4]
    with pytest.raises(InputError, match=f"needs a cut-off of at most {NUM_ITEMS}"):
        list_metrics_of_sizes(random_model(), rows, counts, (50, 100), mask_history=False)
    popularity = Popularity(NUM_ITEMS)
    popularity.counts = counts.float()
    (metrics,) = list_metrics_of_sizes(popularity, rows, counts, (5,), mask_history=False).values()
    assert metrics["Coverage@5"] == 5 / NUM_ITEMS
    assert metrics["ARP@5"] == pytest.approx(counts[1:].sort(descending=True).values[:5].double().mean().item())


def random_vectors(*shape, seed=0):
    """Vectors of very different lengths, with values of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 10 ** torch.randn(*shape, generator=generator)
    return x * 10 ** torch.randn(shape[0], 1, generator=generator)


def ranks_by_counting(z, rows, targets, rounding=0.0, chunk=5):
    """The ranks that count_ahead finds in chunks, with float32 scores off by `rounding` of what they may be off by."""
    target = exact_scores(z, rows[targets])
    counts = torch.zeros(2, len(z))
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        off = z.shape[1] * 2**-24 * z.norm(dim=1)[:, None] * part.norm(dim=1)
        scores = z @ part.T + (rounding * off * torch.randn(off.shape).sign() if rounding else 0.0)
        here = (targets >= start) & (targets < start + len(part))
        scores[here, targets[here] - start] = -INF
        buffers = torch.empty(2, *scores.shape)
        counts += torch.stack(count_ahead(scores, target, z, part, longest_row(part), buffers))
    return 1 + counts[0] + counts[1] / 2


@pytest.mark.parametrize(("dim", "bits"), [(1, 22), (8, 22), (512, 22), (1024, 21)])
@pytest.mark.parametrize("alike", [False, True], ids=["of all sizes", "with the largest sums"])
def test_vectors_are_rounded_to_their_bits_and_scores_are_exact_in_any_order(dim, bits, alike):
    torch.manual_seed(0)
    vectors = [1 - torch.rand(3, dim) / 100 if alike else random_vectors(3, dim, seed=seed) for seed in (0, 1)]
    z, rows = map(on_grid, vectors)
    assert ((z - vectors[0]).abs() <= z.abs().amax(dim=1, keepdim=True) * 2**-bits).all()
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


def ranks_by_sorting(scores, targets):
    """The target's place in each user's sorted scores; the average place of all that have the same score."""
    ranks = []
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        best_first = sorted(row, reverse=True)
        places = [place for place, score in enumerate(best_first, start=1) if score == row[target]]
        ranks.append(sum(places) / len(places))
    return ranks


@pytest.mark.parametrize("num_levels", [1, 2, 5, 10**6])
def test_ranks_are_those_of_a_sort_averaged_over_ties(num_levels):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, num_levels, (20, 14), generator=generator).float()
    targets = torch.randint(0, 14, (20,), generator=generator)
    assert target_ranks(scores, targets).tolist() == ranks_by_sorting(scores, targets)


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([-INF, 0.5, -INF, 1.0, INF], 1, 3),
        ([INF, 0.5, INF], 2, 1.5),
        ([NAN, 0.5, NAN, 0.1], 1, 3),
        ([0.1, NAN, 0.3], 1, 4),
    ],
)
def test_not_a_number_is_ahead_of_every_target_and_as_a_target_behind_all(scores, target, rank):
    assert target_ranks(torch.tensor([scores]), torch.tensor([target])).item() == rank


def test_a_rank_up_to_the_cut_off_is_a_hit_and_half_a_rank_more_is_none():
    expected = {"Recall@3": 2 / 4, "NDCG@3": (1 + 1 / math.log2(4)) / 4, "MRR@3": (1 + 1 / 3) / 4}
    assert ranking_metrics(torch.tensor([1.0, 3.0, 3.5, 1e9]), (3,)) == pytest.approx(expected, abs=1e-15)
