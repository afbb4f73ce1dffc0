"""Split histories by leave-one-out, and pack rows into batches, against plain Python."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from common.errors import InputError
from dataloader import TrainLoader, eval_batches, eval_rows, times_trained, train_rows
from dataloader.batches import bucket, share_rows
from tests.made_up import as_sequences

CPU = torch.device("cpu")
MAX_LENS = [1, 7, 50, 200]


def random_sequences(seed=0):
    """Return sequences of every third length from 3 to 120 and of about 50 training items, in random order."""
    random = np.random.default_rng(seed)
    lengths = [*range(3, 121, 3), 4, 50, 52, 53, 55]
    return [random.integers(1, 1000, size=n).tolist() for n in random.permutation(lengths)]


def plain_train_row(v, max_len):
    """Return tokens, labels and position of one user: the last max_len training items, each predicted from the earlier.

    If all training items fit, the first is predicted from token 0, whose state is not carried on.
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
    """Return tokens, labels and position of every row."""
    return [
        tuple(array[low:high].tolist() for array in (rows.tokens, rows.labels, rows.position))
        for low, high in pairwise(rows.offsets)
    ]


def rows_of_batch(batch):
    """Return tokens, labels and position of every row; all rows fit, so each begins with token 0 and a label."""
    starts = [t for t in range(len(batch.tokens)) if batch.tokens[t] == 0 and batch.labels[t] != 0]
    starts.append(int((batch.labels != 0).sum()))
    return [
        tuple(part[low:high].tolist() for part in (batch.tokens, batch.labels, batch.position))
        for low, high in pairwise(starts)
    ]


@pytest.mark.parametrize("max_len", MAX_LENS)
def test_training_rows_are_those_of_one_user_at_a_time(max_len):
    sequences = random_sequences()
    rows = train_rows(as_sequences(sequences), max_len)
    assert len(rows) == len(sequences)
    assert rows_of(rows) == [plain_train_row(v, max_len) for v in sequences]


@pytest.mark.parametrize(
    ("history", "row"),
    [
        ([7, 8, 9], ([0], [7], [0])),
        ([1, 2, 3, 4, 8, 9], ([0, 1, 2, 3], [1, 2, 3, 4], [0, 0, 1, 2])),  # fits
        ([1, 2, 3, 4, 5, 8, 9], ([1, 2, 3, 4], [2, 3, 4, 5], [0, 1, 2, 3])),  # does not fit
    ],
)
def test_a_row_leaves_out_the_last_two_items_and_begins_with_token_0_if_it_fits(history, row):
    assert rows_of(train_rows(as_sequences([history]), 4)) == [row]


def test_without_the_first_label_rows_lack_token_0():
    sequences = [v for v in random_sequences() if len(v) > 3]
    rows, kept = (rows_of(train_rows(as_sequences(sequences), 7, first)) for first in (True, False))
    for (tokens, labels, position), without in zip(rows, kept, strict=True):
        first = 1 if tokens[0] == 0 else 0
        assert without == (tokens[first:], labels[first:], position[first:])
    assert any(tokens[0] == 0 for tokens, *_ in rows)


def test_without_the_first_label_a_user_of_one_training_item_has_no_row():
    sequences = as_sequences([[7, 8, 9], [1, 2, 3, 4]])
    assert rows_of(train_rows(sequences, 50, first_item=False)) == [([1], [2], [0])]
    with pytest.raises(InputError, match=r"no user has two training items.*--first_item_label"):
        train_rows(as_sequences([[7, 8, 9]]), 50, first_item=False)


def test_times_trained_counts_the_training_items_alone():
    counts = times_trained(as_sequences([[1, 2, 2, 5, 6], [2, 3, 4], [5, 1, 6, 6]]), 6)
    assert counts.tolist() == [0, 2, 3, 0, 0, 1, 0]


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize(("max_len", "batch_size"), [(50, 1), (3, 7), (50, 7), (3, 1000)])
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
    """Return a loader in which user u has u % 5 + 1 training items, the first u + 1, and the users' histories."""
    lists = [[u + 1, *range(100, 100 + u % 5), 98, 99] for u in range(NUM_USERS)]
    return TrainLoader(train_rows(as_sequences(lists), max_len), batch_size, seed, CPU), lists


def users_of(batches):
    """Return the users in the order of an epoch."""
    return [labels[0] - 1 for batch in batches for _, labels, _ in rows_of_batch(batch)]


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
def test_an_epoch_visits_every_user_once(batch_size):
    loader, _ = loader_of_known_users(batch_size)
    batches = list(loader.epoch(1))
    assert len(batches) == len(loader) == -(-NUM_USERS // batch_size)
    assert sorted(users_of(batches)) == list(range(NUM_USERS))
    assert [len(rows_of_batch(batch)) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_a_training_batch_holds_the_rows_of_its_users_then_padding():
    loader, lists = loader_of_known_users()
    for batch in loader.epoch(3):
        users, length = users_of([batch]), int((batch.labels > 0).sum())
        assert rows_of_batch(batch) == [plain_train_row(lists[u], 50) for u in users]
        assert batch.longest == max(len(lists[u]) - 2 for u in users)
        assert len(batch.tokens) == len(batch.labels) == len(batch.position) == bucket(length)
        assert not any(part[length:].any() for part in (batch.tokens, batch.labels, batch.position))


def test_the_order_depends_on_seed_and_epoch_alone():
    loader, _ = loader_of_known_users(seed=5)
    expected = users_of(loader.epoch(2))
    np.random.seed(1)
    torch.manual_seed(1)
    again, _ = loader_of_known_users(seed=5, batch_size=6)
    assert users_of(again.epoch(2)) == expected
    assert users_of(loader.epoch(2)) == expected
    assert expected != list(range(NUM_USERS))
    for other_seed, epoch in ((5, 3), (6, 2), (0, 0)):
        assert users_of(loader_of_known_users(seed=other_seed)[0].epoch(epoch)) != expected


def test_every_label_is_counted_and_every_item_has_a_count():
    loader, lists = loader_of_known_users()
    labels = [label for v in lists for label in (plain_train_row(v, 50))[1]]
    counts = loader.label_counts(2000)
    assert counts.tolist() == [labels.count(i) for i in range(2001)]
    assert counts[0] == 0


def test_batches_are_padded_to_few_lengths():
    assert bucket(0) == 1  # the share of a rank may be padding only
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


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 1), (3, 6), (8, 100)])
def test_ranks_share_every_batch_in_its_order(world_size, batch_size):
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


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_shares_are_consecutive_rows_within_half_a_row_of_equal(world_size):
    lengths = np.random.default_rng(0).integers(1, 51, size=40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cuts = share_rows(offsets, world_size)
    assert cuts[0] == 0 and cuts[-1] == 40 and (np.diff(cuts) >= 0).all()
    equal = offsets[-1] * np.arange(world_size + 1) / world_size
    assert (abs(offsets[cuts] - equal) <= lengths.max() / 2).all()
    assert np.diff(share_rows(np.array([0, 7]), world_size)).sum() == 1  # a single row: one rank has it
