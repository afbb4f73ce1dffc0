"""From events to sequences: the k-core, the order of time, and the numbers of users and items."""

import random
from collections import Counter

import numpy as np
import pytest

from common.errors import InputError
from datasets.prepare.events import Events
from datasets.prepare.sequences import k_core, make_sequences


def events_from(rows: list[tuple], lines: list[int] | None = None) -> Events:
    """(user, item, time[, rating]) in the file's order. lines: equal for copies of a line."""
    users, items = list(dict.fromkeys(row[0] for row in rows)), list(dict.fromkeys(row[1] for row in rows))
    return Events(
        users,
        items,
        np.array([users.index(row[0]) for row in rows], dtype=np.int32),
        np.array([items.index(row[1]) for row in rows], dtype=np.int32),
        np.array([row[2] for row in rows], dtype=np.float64),
        np.array([row[3] if len(row) > 3 else 5.0 for row in rows], dtype=np.float32),
        np.array(lines) if lines else None,
        [],
    )


def histories(made) -> dict[str, list[str]]:
    return {user: [made.items[i - 1] for i in made.sequences.of(row)] for row, user in enumerate(made.users)}


def make(rows, lines=None, **options):
    return make_sequences(events_from(rows, lines), **{"min_uc": 1, "min_sc": 1, **options})


def test_a_history_is_in_the_order_of_time_and_ties_are_in_the_order_of_the_file():
    rows = [("U", "late", 9), ("U", "tie 1", 5), ("U", "early", 1), ("V", "x", 5), ("U", "tie 2", 5)]
    assert histories(make(rows)) == {"U": ["early", "tie 1", "tie 2", "late"], "V": ["x"]}


def test_users_are_numbered_by_their_first_line_and_items_by_their_first_appearance_in_the_histories():
    made = make([("V", "b", 9), ("U", "c", 1), ("V", "a", 1), ("U", "b", 2), ("V", "d", 10)])
    assert (made.users, made.items) == (["V", "U"], ["a", "b", "d", "c"])
    assert [made.sequences.of(row).tolist() for row in (0, 1)] == [[1, 2, 3], [4, 2]]


def test_the_core_is_what_a_loop_over_dicts_leaves():
    rng = random.Random(0)
    for trial in range(20):
        pairs = [(rng.randrange(30), rng.randrange(25)) for _ in range(rng.randrange(1, 250))]
        left = pairs
        while True:
            users, items = Counter(u for u, _ in left), Counter(i for _, i in left)
            kept = [(u, i) for u, i in left if users[u] >= 4 and items[i] >= 3]
            if kept == left:
                break
            left = kept
        rows = k_core(*np.array(pairs, dtype=np.int32).T, min_uc=4, min_sc=3)
        assert [pairs[row] for row in rows] == left, trial


def test_users_and_items_leave_again_and_again():
    chain = [("U1", "a", 1), ("U1", "b", 2), ("U2", "b", 1), ("U2", "c", 2), *[("U3", "c", 1 + n) for n in range(3)]]
    made = make(chain, min_uc=2, min_sc=2)  # a goes, then U1, then b, then U2; c keeps U3
    assert histories(made) == {"U3": ["c", "c", "c"]}


def test_low_ratings_are_left_out_before_the_core_and_with_them_events_without_one():
    rows = [("U", "a", 1, 2.0), ("U", "b", 2, 4.0), ("U", "c", 3, float("nan")), ("U", "d", 4), ("U", "e", 5, 4.5)]
    assert histories(make(rows, min_rating=4)) == {"U": ["b", "d", "e"]}
    assert histories(make(rows)) == {"U": ["a", "b", "c", "d", "e"]}


def test_repeats_are_kept_or_all_but_the_first_in_time_are_dropped():
    rows = [("U", "a", 9), ("U", "b", 5), ("U", "a", 1), ("V", "a", 2), ("U", "c", 4), ("V", "d", 1), ("U", "d", 6)]
    assert histories(make(rows)) == {"U": ["a", "c", "b", "d", "a"], "V": ["d", "a"]}
    assert histories(make(rows, repeats="drop")) == {"U": ["a", "c", "b", "d"], "V": ["d", "a"]}


def test_copies_of_a_line_are_one_event_and_counted():
    rows = [("U", "a", 1), ("U", "b", 1), ("U", "a", 1), ("U", "a", 1), ("U", "a", 2), ("U", "a", 1, 3.0)]
    made = make(rows)
    assert histories(made) == {"U": ["a", "b", "a", "a"]}
    assert made.notes[0] == "2 events are copies of another: counted once"
    assert made.filters[1] == {"after": "copies of a line left out", "users": 1, "items": 2, "interactions": 4}
    assert histories(make(rows, lines=[1, 2, 1, 4, 5, 6])) == {"U": ["a", "b", "a", "a", "a"]}


def test_the_notes_tell_repeats_and_ties():
    rows = [("U", "a", 1), ("U", "b", 2), ("U", "b", 3), ("V", "a", 1), ("V", "b", 2), ("V", "c", 2)]
    assert make(rows).notes == [
        "1 interactions repeat an item of the same user; --repeats drop keeps the first, as the benchmark splits of "
        "Amazon 2023 do",
        "1 of 2 users (50.0%) have the item before their target as the target again",
        "1 of 2 users (50.0%) have their last two events at the same time: --ties file decides which is the target",
    ]
    assert make([*rows[3:5], ("V", "c", 3)]).notes == []


def test_ties_are_shuffled_alike_each_time():
    rows = [("U", f"i{n:02}", n // 10) for n in range(40)]
    (first,) = histories(make(rows, ties="shuffle")).values()
    assert [int(item[1:]) // 10 for item in first] == [n // 10 for n in range(40)]
    assert first != [row[1] for row in rows]
    assert histories(make(rows, ties="shuffle")) == {"U": first}


def test_users_whose_last_two_events_tie_are_dropped_with_whoever_then_leaves_the_core():
    rows = [("U", "a", 1), ("U", "b", 2), ("U", "c", 2), ("V", "a", 1), ("V", "b", 2), ("V", "d", 3)]
    assert histories(make(rows, ties="drop_user")) == {"V": ["a", "b", "d"]}
    with pytest.raises(InputError, match="--ties file or shuffle"):
        make(rows[:3], ties="drop_user")


def test_every_filter_is_counted():
    rows = [("U", "a", 1), ("U", "b", 2), ("U", "a", 3), ("V", "a", 2, 1.0), ("W", "c", 2), ("U", "d", 4)]
    made = make(rows, min_rating=2, repeats="drop", min_uc=2)
    assert [tuple(step.values()) for step in made.filters] == [
        ("reading", 3, 4, 6),
        ("ratings below 2 left out", 2, 4, 5),
        ("repeats left out", 2, 4, 4),
        ("2-core of users, 1-core of items", 1, 3, 3),
    ]


def test_when_nothing_is_left_a_k_that_would_leave_something_is_named():
    rows = [(f"U{u}", f"I{i}", 1) for u in range(3) for i in range(3)]
    with pytest.raises(InputError, match=r"leaves none of 9 events; --min_uc 3 --min_sc 3 would leave 9 of them"):
        make(rows, min_uc=10**9, min_sc=5)
    with pytest.raises(InputError, match=r"--min_uc 3 --min_sc 2 would leave 9 of them"):
        make(rows, min_uc=4, min_sc=2)
    with pytest.raises(InputError, match=r"--min_uc 1 --min_sc 3 would leave 9 of them"):
        make(rows, min_uc=1, min_sc=9)
    with pytest.raises(InputError, match="lower --min_rating"):
        make(rows, min_rating=6)


def test_histories_that_are_all_too_short_to_train_and_test_on_are_refused():
    with pytest.raises(InputError, match="no user has 3 events or more"):
        make([("U", "a", 1), ("U", "b", 2), ("V", "a", 3)])
