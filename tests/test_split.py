"""Leave-one-out, row by row against plain Python, and how rows become batches."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from common.errors import InputError
from dataloader import TrainLoader, eval_batches, eval_rows, times_trained, train_rows
from dataloader.batches import bucket, share_rows
from tests.made_up import as_sequences

CPU = torch.device("cpu")
MAX_LENS = [1, 2, 7, 50, 200]


def random_sequences(seed=0):
    """One sequence of every third length from 3 to 120, and those around 50 training items, in random order."""
    random = np.random.default_rng(seed)
    lengths = [*range(3, 121, 3), 4, 50, 52, 53, 55]
    return [random.integers(1, 1000, size=n).tolist() for n in random.permutation(lengths)]


def plain_train_row(v, max_len):
    """(tokens, labels, position) of one user: the last max_len training items, each predicted from those before it.

    Where no training item is left out, the first is predicted from token 0, after which the state is empty again.
    """
    items = v[:-2]
    if len(items) <= max_len:
        tokens, labels = [0, *items[:-1]], items
        position = [0, *range(len(items) - 1)]
    else:
        tokens, labels = items[-max_len - 1 : -1], items[-max_len:]
        position = list(range(max_len))
    return tokens, labels, position


def rows_of(rows):
    """(tokens, labels, position) of every row."""
    return [
        tuple(array[low:high].tolist() for array in (rows.tokens, rows.labels, rows.position))
        for low, high in pairwise(rows.offsets)
    ]


def rows_of_batch(batch):
    """(tokens, labels, position) of every row; all rows fit, so each begins with token 0, with a label."""
    starts = [t for t in range(len(batch.tokens)) if batch.tokens[t] == 0 and batch.labels[t] != 0]
    starts.append(int((batch.labels != 0).sum()))
    return [
        tuple(part[low:high].tolist() for part in (batch.tokens, batch.labels, batch.position))
        for low, high in pairwise(starts)
    ]


@pytest.mark.parametrize("max_len", MAX_LENS)
@pytest.mark.parametrize("seed", [0, 1])
def test_training_rows_are_those_of_one_user_at_a_time(seed, max_len):
    sequences = random_sequences(seed)
    rows = train_rows(as_sequences(sequences), max_len)
    assert len(rows) == len(sequences)
    assert rows_of(rows) == [plain_train_row(v, max_len) for v in sequences]


def test_a_user_of_three_items_trains_on_the_first_alone():
    assert rows_of(train_rows(as_sequences([[7, 8, 9]]), 50)) == [([0], [7], [0])]


def test_a_row_that_fits_begins_with_token_0_whose_state_is_not_carried_on():
    assert rows_of(train_rows(as_sequences([[1, 2, 3, 4, 8, 9]]), 4)) == [([0, 1, 2, 3], [1, 2, 3, 4], [0, 0, 1, 2])]


def test_a_row_that_does_not_fit_begins_with_the_item_before_its_first_label():
    assert rows_of(train_rows(as_sequences([[1, 2, 3, 4, 5, 8, 9]]), 4)) == [([1, 2, 3, 4], [2, 3, 4, 5], [0, 1, 2, 3])]


def test_without_the_first_item_as_a_label_the_token_0_is_gone_and_the_rest_stays():
    sequences = [v for v in random_sequences() if len(v) > 3]
    rows, kept = (rows_of(train_rows(as_sequences(sequences), 7, first)) for first in (True, False))
    for (tokens, labels, position), without in zip(rows, kept, strict=True):
        first = 1 if tokens[0] == 0 else 0
        assert without == (tokens[first:], labels[first:], position[first:])
    assert any(tokens[0] == 0 for tokens, *_ in rows)


def test_without_the_first_item_as_a_label_a_user_of_one_training_item_has_no_row():
    sequences = as_sequences([[7, 8, 9], [1, 2, 3, 4]])
    assert rows_of(train_rows(sequences, 50, first_item=False)) == [([1], [2], [0])]
    with pytest.raises(InputError, match=r"no user has two training items.*--first_item_label"):
        train_rows(as_sequences([[7, 8, 9]]), 50, first_item=False)


def test_times_trained_counts_the_training_items_alone():
    counts = times_trained(as_sequences([[1, 2, 2, 5, 6], [2, 3, 4], [5, 1, 6, 6]]), 6)
    assert counts.tolist() == [0, 2, 3, 0, 0, 1, 0]


def test_the_last_two_items_of_a_user_are_never_trained_on():
    rows = train_rows(as_sequences([[1, 2, 3, 98, 99], [4, 98, 99]]), 50)
    assert not {98, 99} & {*rows.tokens.tolist(), *rows.labels.tolist()}


@pytest.mark.parametrize(("part", "left_out"), [("val", 2), ("test", 1)])
@pytest.mark.parametrize("max_len", MAX_LENS)
def test_evaluation_reads_the_last_items_before_the_target(max_len, part, left_out):
    sequences = random_sequences()
    rows = eval_rows(as_sequences(sequences), max_len, part)
    assert len(rows) == len(sequences)
    for u, v in enumerate(sequences):
        known = v[:-left_out]
        assert rows.items[rows.starts[u] : rows.ends[u]].tolist() == known[-max_len:]
        assert rows.items[rows.begins[u] : rows.ends[u]].tolist() == known
        assert rows.targets[u] == v[-left_out]


def test_a_user_of_three_items_is_validated_and_tested_on_its_last_two():
    sequences = as_sequences([[7, 8, 9]])
    (val,), (test,) = (list(eval_batches(eval_rows(sequences, 50, part), 4, CPU)) for part in ("val", "test"))
    assert (val.tokens.tolist(), val.targets.tolist()) == ([7], [8])
    assert (test.tokens.tolist(), test.targets.tolist()) == ([7, 8], [9])


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("max_len", [3, 50])
def test_evaluation_batches_hold_every_user_once_in_order(max_len, batch_size, part):
    sequences = random_sequences()
    left_out = {"val": 2, "test": 1}[part]
    users = iter(sequences)
    for batch in eval_batches(eval_rows(as_sequences(sequences), max_len, part), batch_size, CPU):
        of_batch = [next(users) for _ in batch.targets]
        assert len(of_batch) <= batch_size
        read = [v[:-left_out][-max_len:] for v in of_batch]
        assert batch.tokens.tolist() == [*chain(*read)]
        assert batch.position.tolist() == [*chain(*(range(len(items)) for items in read))]
        assert batch.longest == max(map(len, read))
        assert batch.last.tolist() == (np.cumsum([len(items) for items in read]) - 1).tolist()
        assert batch.targets.tolist() == [v[-left_out] for v in of_batch]
        seen = list(zip(batch.seen_rows.tolist(), batch.seen_items.tolist(), strict=True))
        assert seen == [(row, item) for row, v in enumerate(of_batch) for item in v[:-left_out]]
    assert next(users, None) is None


NUM_USERS = 23


def loader_of_known_users(batch_size=4, seed=0, max_len=50):
    """User u has u % 5 + 1 training items, of which the first is u + 1: rows that fit tell whose they are."""
    lists = [[u + 1, *range(100, 100 + u % 5), 98, 99] for u in range(NUM_USERS)]
    return TrainLoader(train_rows(as_sequences(lists), max_len), batch_size, seed, CPU), lists


def users_of(batches):
    """The users in the order in which an epoch visits them."""
    return [labels[0] - 1 for batch in batches for _, labels, _ in rows_of_batch(batch)]


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
def test_an_epoch_visits_every_user_once(batch_size):
    loader, _ = loader_of_known_users(batch_size)
    batches = list(loader.epoch(1))
    assert len(batches) == len(loader) == -(-NUM_USERS // batch_size)
    assert sorted(users_of(batches)) == list(range(NUM_USERS))
    assert [len(rows_of_batch(batch)) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_a_training_batch_holds_the_rows_of_its_users():
    loader, lists = loader_of_known_users()
    for batch in loader.epoch(3):
        users = users_of([batch])
        assert rows_of_batch(batch) == [plain_train_row(lists[u], 50) for u in users]
        assert batch.longest == max(len(lists[u]) - 2 for u in users)


def test_the_order_depends_on_seed_and_epoch_alone():
    loader, _ = loader_of_known_users(seed=5)
    expected = users_of(loader.epoch(2))
    np.random.seed(1)
    torch.manual_seed(1)
    again, _ = loader_of_known_users(seed=5, batch_size=6)
    assert users_of(again.epoch(2)) == expected
    assert users_of(loader.epoch(2)) == expected


@pytest.mark.parametrize(("seed", "epoch"), [(5, 3), (6, 2), (0, 0)])
def test_another_seed_or_epoch_is_another_order(seed, epoch):
    loader, _ = loader_of_known_users(seed=5)
    other, _ = loader_of_known_users(seed=seed)
    order = users_of(loader.epoch(2))
    assert order != list(range(NUM_USERS))
    assert users_of(other.epoch(epoch)) != order


def test_a_batch_is_padded_to_one_of_few_shapes_behind_its_rows():
    sequences = as_sequences(random_sequences())
    for batch in TrainLoader(train_rows(sequences, 50), 6, seed=0, device=CPU).epoch(1):
        length = int((batch.labels > 0).sum())
        assert len(batch.tokens) == len(batch.labels) == len(batch.position) == bucket(length)
        assert not any(part[length:].any() for part in (batch.tokens, batch.labels, batch.position))


def test_every_label_is_counted_and_every_item_has_a_count():
    loader, lists = loader_of_known_users()
    labels = [label for v in lists for label in (plain_train_row(v, 50))[1]]
    counts = loader.label_counts(2000)
    assert counts.tolist() == [labels.count(i) for i in range(2001)]
    assert counts[0] == 0


def test_buckets_are_few_and_no_more_than_one_step_larger():
    assert bucket(0) == 1  # the share of a rank may be nothing but padding
    assert [bucket(n) for n in (1, 2, 3, 16, 17, 128, 129, 256, 257)] == [1, 2, 4, 16, 32, 128, 256, 256, 384]
    assert all(n <= bucket(n) < n + min(n, 128) for n in range(1, 5000))


@pytest.mark.parametrize("max_len", [2, 50])
def test_the_batches_of_an_epoch_hold_every_labelled_token_once(max_len):
    rows = train_rows(as_sequences(random_sequences()), max_len)
    batches = list(TrainLoader(rows, 6, seed=0, device=CPU).epoch(1))
    triples = [
        triple
        for batch in batches
        for triple in zip(batch.tokens.tolist(), batch.labels.tolist(), batch.position.tolist(), strict=True)
        if triple != (0, 0, 0)  # padding
    ]
    expected = zip(rows.tokens.tolist(), rows.labels.tolist(), rows.position.tolist(), strict=True)
    assert sorted(triples) == sorted(expected)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 6, 100])
def test_ranks_share_every_batch_out_in_its_order(world_size, batch_size):
    rows = train_rows(as_sequences(random_sequences()), 50)
    wholes = TrainLoader(rows, batch_size, seed=0, device=CPU).epoch(1)
    loaders = [TrainLoader(rows, batch_size, 0, CPU, rank, world_size).epoch(1) for rank in range(world_size)]
    for whole, *shares in zip(wholes, *loaders, strict=True):
        length, begin = int(whole.num_labels), 0
        assert length == int((whole.labels > 0).sum()) and whole.share == (0, len(whole.tokens))
        for share in shares:
            own = int((share.labels > 0).sum())
            assert share.share == (begin, len(whole.tokens)) and share.num_labels == length
            assert 1 <= share.longest <= max(own, 1)
            for name in ("tokens", "labels", "position"):
                part = getattr(share, name)
                assert torch.equal(part[:own], getattr(whole, name)[begin : begin + own])
                assert len(part) == bucket(own) and not part[own:].any()
            begin += own
        assert begin == length
        assert max(share.longest for share in shares) == whole.longest


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_are_runs_of_rows_within_half_a_row_of_equal(world_size):
    lengths = np.random.default_rng(0).integers(1, 51, size=40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cuts = share_rows(offsets, world_size)
    assert cuts[0] == 0 and cuts[-1] == 40 and (np.diff(cuts) >= 0).all()
    equal = offsets[-1] * np.arange(world_size + 1) / world_size
    assert (abs(offsets[cuts] - equal) <= lengths.max() / 2).all()
    assert np.diff(share_rows(np.array([0, 7]), world_size)).sum() == 1  # a single row: one rank has it
