"""Full ranking of every user's target, against one user at a time, in float64, with a sort."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import processes
from common.errors import InputError
from config import ModelSettings
from dataloader import eval_batches, eval_rows
from model import FMRLRec
from tests.made_up import as_sequences, with_random_weights
from trainer import evaluation
from trainer.evaluation import candidates, evaluate, rank_targets, rank_targets_alone
from trainer.exact import on_grid
from trainer.metrics import target_ranks
from trainer.user_ranks import load_ranks, save_ranks

NUM_ITEMS, MAX_LEN, SIZES, KS = 40, 6, (4, 8, 16), (1, 5, 10, 20)
CPU = torch.device("cpu")


def random_model(branch="both", seed=0):
    torch.manual_seed(seed)
    features = torch.randn(NUM_ITEMS, 9) if branch == "both" else None
    return with_random_weights(
        FMRLRec(NUM_ITEMS, features, ModelSettings(mrl_hidden_sizes=SIZES, lru_r_min=0.3, lru_r_max=0.9)), 0.5
    )


def random_sequences(seed=0, num_users=25):
    """Histories up to five times as long as what the model reads; items come back now and then."""
    random = np.random.default_rng(seed)
    return [random.integers(1, NUM_ITEMS + 1, size=random.integers(3, 5 * MAX_LEN)).tolist() for _ in range(num_users)]


def rows_of(sequences, part="test", max_len=MAX_LEN):
    return eval_rows(as_sequences(sequences), max_len, part)


def metrics_of(model, rows, batch_size=4, mask_history=False):
    return evaluate(model, rows, sizes=SIZES, batch_size=batch_size, ks=KS, mask_history=mask_history)


def plain_metrics(model, sequences, part, mask_history):
    """size -> metrics, from the scores of one user at a time in float64."""
    model = copy.deepcopy(model).double().eval()
    table = model.item_table().detach()
    results = {}
    for m in SIZES:
        sums = dict.fromkeys([f"{metric}@{k}" for k in KS for metric in ("Recall", "NDCG", "MRR")], 0.0)
        for v in sequences:
            known = v[:-2] if part == "val" else v[:-1]
            target = v[len(known)]
            read = torch.tensor(known[-MAX_LEN:])
            z = model.encode(table[read], torch.arange(len(read)), len(read))[-1].detach()
            scores = (table[:, :m] @ z[:m]).tolist()
            shown = [i for i in range(1, NUM_ITEMS + 1) if i == target or not (mask_history and i in known)]
            rank = sorted(shown, key=lambda item: -scores[item]).index(target) + 1
            for k in KS:
                if rank <= k:
                    sums[f"Recall@{k}"] += 1
                    sums[f"NDCG@{k}"] += 1 / math.log2(rank + 1)
                    sums[f"MRR@{k}"] += 1 / rank
        results[m] = {name: total / len(sequences) for name, total in sums.items()}
    return results


@pytest.mark.parametrize("branch", ["both", "id"])
@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("part", ["val", "test"])
def test_every_size_is_ranked_as_one_user_at_a_time_by_sorting(part, mask_history, branch):
    model, sequences = random_model(branch), random_sequences()
    metrics = metrics_of(model, rows_of(sequences, part), mask_history=mask_history)
    expected = plain_metrics(model, sequences, part, mask_history)
    assert metrics.keys() == expected.keys()
    for m in SIZES:
        assert metrics[m] == pytest.approx(expected[m], abs=1e-12)


@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("items", [1, 7, NUM_ITEMS])
@pytest.mark.parametrize("table_bytes", [0, 2**30])
def test_chunks_and_batches_give_what_the_whole_gives(monkeypatch, items, table_bytes, mask_history):
    model, rows = random_model(), rows_of(random_sequences())
    expected = metrics_of(model, rows, mask_history=mask_history)
    monkeypatch.setattr(evaluation, "ITEMS", items)
    monkeypatch.setattr(evaluation, "USERS", 5)
    monkeypatch.setattr(evaluation, "TABLE_BYTES", table_bytes)
    for batch_size in (1, 7, len(rows)):
        assert metrics_of(model, rows, batch_size, mask_history) == expected


@pytest.mark.parametrize(("room", "times"), [(0, 1), (-1, 2)], ids=["held", "projected for targets and for scores"])
def test_the_item_table_is_held_where_there_is_room_for_it(monkeypatch, room, times):
    model, projected = random_model(), []
    monkeypatch.setattr(evaluation, "TABLE_BYTES", NUM_ITEMS * SIZES[-1] * 4 + room)
    true = evaluation._project
    monkeypatch.setattr(evaluation, "_project", lambda model, start: projected.append(start) or true(model, start))
    metrics_of(model, rows_of(random_sequences()))
    assert projected == [0] * times


def ranks_of(model, sequences, batch_size):
    return torch.stack(list(rank_targets(model, rows_of(sequences), sizes=model.sizes, batch_size=batch_size).values()))


def shop_of_twins(num_items, num_kinds=200, num_users=20):
    """(a model, histories, the kind of every item from 0 on): items of one kind have the same features."""
    random = np.random.default_rng(0)
    kind = random.integers(0, num_kinds, num_items)
    torch.manual_seed(0)
    features = torch.randn(num_kinds, 9)[kind]
    model = FMRLRec(num_items, features, ModelSettings(mrl_hidden_sizes=(8, 16), lru_r_min=0.3, lru_r_max=0.9))
    sequences = random.integers(1, num_items + 1, (num_users, 5)).tolist()
    sequences[0][-1] = num_items  # the only item of its chunk in a catalogue of 32,768
    return with_random_weights(model, 0.5), sequences, kind


@pytest.mark.parametrize("num_items", [32_767, 32_768, 100_000])
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


@pytest.mark.parametrize("num_items", [32_767, 32_768, 100_000])
def test_a_model_that_tells_no_items_apart_gives_every_target_the_mean_rank(num_items):
    model, sequences, _ = shop_of_twins(num_items)
    with torch.no_grad():
        model.items.projection.weight.zero_()
    for batch_size in (1, 256):
        assert ranks_of(model, sequences, batch_size).unique().tolist() == [(num_items + 1) / 2]


def watch_z(monkeypatch):
    """The list to which every later evaluation adds its users' z."""
    seen, true = [], evaluation._ranks
    monkeypatch.setattr(evaluation, "_ranks", lambda *a: seen.append(a[2]) or true(*a))
    return seen


def test_users_are_encoded_to_the_same_bits_whatever_the_batch_size(monkeypatch):
    model, rows, seen = random_model(), rows_of(random_sequences()), watch_z(monkeypatch)
    for batch_size in (1, 7, 256):
        metrics_of(model, rows, batch_size)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


def test_ranks_are_those_of_all_exact_scores_at_once():
    model, rows = random_model().eval(), rows_of(random_sequences())
    found = rank_targets(model, rows, sizes=SIZES, batch_size=7)
    (batch,) = eval_batches(rows, len(rows), CPU)
    with torch.no_grad():
        table = model.item_table()
        z = model.encode(table[batch.tokens], batch.position, batch.longest, at=batch.last)
    for m in SIZES:
        scores = on_grid(z)[:, :m].double() @ on_grid(table)[:, :m].double().T
        scores[:, 0] = -math.inf
        assert found[m].tolist() == target_ranks(scores, batch.targets).tolist()


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


def test_masking_the_history_changes_the_metrics_of_these_users():
    model, rows = random_model(), rows_of(random_sequences())
    assert metrics_of(model, rows, mask_history=True) != metrics_of(model, rows, mask_history=False)


def test_a_subset_of_the_sizes_can_be_asked_for():
    model, rows = random_model(), rows_of(random_sequences())
    expected = metrics_of(model, rows)
    assert evaluate(model, rows, sizes=(8,), batch_size=4, ks=KS) == {8: expected[8]}


def excluded(sequence, mask_history):
    """The tokens that are no candidates for a user's test target."""
    (batch,) = eval_batches(rows_of([sequence]), 1, CPU)
    row = candidates(batch, 0, NUM_ITEMS + 1, mask_history)[0]
    some = [candidates(batch, *part, mask_history)[0] for part in ((0, 1), (1, 9), (9, NUM_ITEMS + 1))]
    assert torch.equal(torch.cat(some), row)
    assert set(row.tolist()) <= {0.0, -math.inf}
    return row.isinf().nonzero().flatten().tolist()


def test_without_masking_all_items_are_candidates_and_token_0_is_none():
    assert excluded([5, 9, 5, 12], mask_history=False) == [0]


def test_masking_excludes_the_history_and_token_0():
    assert excluded([5, 9, 5, 12], mask_history=True) == [0, 5, 9]


def test_masking_excludes_what_is_older_than_the_model_reads():
    whole_history = list(range(1, 4 * MAX_LEN))
    assert excluded([*whole_history, 30], mask_history=True) == [0, *whole_history]


@pytest.mark.parametrize("place", [0, 3, 4 * MAX_LEN - 2], ids=["long ago", "early", "just before"])
def test_masking_never_excludes_the_target_even_if_it_is_in_the_history(place):
    history = list(range(1, 4 * MAX_LEN))
    target = history[place]
    assert excluded([*history, target], mask_history=True) == [0, *(i for i in history if i != target)]


def test_masking_excludes_a_users_own_history_only():
    (batch,) = eval_batches(rows_of([[1, 2, 3], [4, 5, 6, 7]]), 2, CPU)
    masked = candidates(batch, 0, NUM_ITEMS + 1, mask_history=True).isinf()
    assert [row.nonzero().flatten().tolist() for row in masked] == [[0, 1, 2], [0, 4, 5, 6]]


@pytest.mark.parametrize("mask_history", [False, True])
def test_token_0_is_never_ranked_however_well_it_scores(mask_history):
    model, rows = random_model("id"), rows_of(random_sequences())
    before = metrics_of(model, rows, mask_history=mask_history)
    z = model.eval().encode(model.item_table()[[1]], torch.tensor([0]), 1)
    with torch.no_grad():
        model.items.table[0] = 1000 * z[0].sign()
    assert metrics_of(model, rows, mask_history=mask_history) == before


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_drops_nothing_out_and_leaves_the_model_in_its_mode(training):
    model, rows = random_model().train(training), rows_of(random_sequences())
    assert metrics_of(model, rows) == metrics_of(model, rows)
    assert model.training is training


@pytest.mark.parametrize("mask_history", [False, True])
def test_every_slice_alone_ranks_as_the_shared_pass_does_in_the_order_of_sizes(mask_history):
    model, rows = random_model().eval(), rows_of(random_sequences())
    how = {"sizes": SIZES, "batch_size": 7, "mask_history": mask_history}
    shared, alone = rank_targets(model, rows, **how), rank_targets_alone(model, rows, **how)
    assert list(shared) == list(alone) == list(SIZES)
    for m in SIZES:
        torch.testing.assert_close(alone[m], shared[m], rtol=0, atol=0)


def a_batch():
    return next(eval_batches(rows_of(random_sequences()), 8, CPU))


def test_ranks_are_kept_to_any_cut_off(tmp_path):
    ranks = np.array([1.0, 49_999.5, 50_000.0, 50_001.0])
    save_ranks(tmp_path / "r.npz", {4: ranks}, 50_000, np.zeros(4))
    assert load_ranks(tmp_path / "r.npz", "")[0][4].tolist() == [1.0, 49_999.5, 50_000.0, np.inf]


@pytest.mark.parametrize("damage", ["absent", "text", "cut short", "pickled"])
def test_ranks_that_cannot_be_read_are_named(tmp_path, damage):
    path = tmp_path / "test_ranks.npz"
    save_ranks(path, {4: np.array([1.0, 2.5])}, 10, np.array([3, 4]))
    if damage == "absent":
        path.unlink()
    elif damage == "text":
        path.write_text("ranks", encoding="utf-8")
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        np.savez(path, **{"4": np.array([{}], dtype=object), "times_trained": np.array([1])})
    with pytest.raises(InputError, match=r"test_ranks\.npz cannot be read .*; test again$"):
        load_ranks(path, "test again")


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


TWO_PROCESSES = """
import sys, torch
from common import processes
from tests.test_evaluation import ranks_of, shop_of_twins

model, sequences, _ = shop_of_twins(32_768, num_kinds=5_000, num_users=600)
found = ranks_of(model, sequences, 7)
if processes.rank() == 0:
    torch.save(found, sys.argv[1])
"""


def test_two_processes_find_the_ranks_of_one(tmp_path):
    script, path = tmp_path / "two.py", tmp_path / "ranks.pt"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = str(Path(evaluation.__file__).parent.parent)
    subprocess.run([*torchrun, script, path], check=True, env=os.environ | {"PYTHONPATH": root}, timeout=300)
    model, sequences, _ = shop_of_twins(32_768, num_kinds=5_000, num_users=600)
    assert torch.equal(torch.load(path), ranks_of(model, sequences, 256))
