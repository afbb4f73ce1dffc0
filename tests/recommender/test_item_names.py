"""An item is named by its id or its number; what is neither is skipped and named, or refused."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from common.errors import InputError
from serving import Recommender
from tests.recommender.shop import IDS, N, everything, write_shop_of_ids


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([3, 17], id="numbers"),
        pytest.param(np.array([3, 17]), id="an array"),
        pytest.param([np.int32(3), np.uint8(17)], id="numpy integers"),
        pytest.param([IDS[2], 17], id="mixed"),
        pytest.param(np.array([IDS[2], IDS[16]]), id="an array of ids"),
    ],
)
def test_an_item_may_be_given_by_id_or_number(r, history):
    assert r.recommend([history], top_k=5) == r.recommend([[IDS[2], IDS[16]]], top_k=5)
    assert r.start(history).items == (3, 17)


def test_every_item_is_found_by_its_id(r):
    assert r.start(IDS).items == tuple(range(1, N + 1))


def test_a_text_is_an_id_also_where_it_looks_like_a_number(shop, engine, tmp_path):
    r = Recommender.from_pretrained(write_shop_of_ids(tmp_path / "digits", shop, ["4", "2", "x", "30"]), engine)
    assert r.start(["4", "2", "x", "30"]).items == (1, 2, 3, 4)
    assert r.start([4, "4", 2, "2"]).items == (4, 1, 2, 2)
    assert "30" in r and 4 in r and "3" not in r and 5 not in r


@pytest.mark.parametrize("ids", [["Ü1", "ü", "日本"], ["a b", "a", "A", "a,b"], ["a", "é", "x" * 256]])
def test_any_text_may_be_an_id(shop, engine, tmp_path, ids):
    r = Recommender.from_pretrained(write_shop_of_ids(tmp_path / "any", shop, ids), engine)
    assert r.start(ids).items == tuple(range(1, len(ids) + 1))
    assert sorted(everything(r, []).ids) == sorted(ids)


@pytest.mark.parametrize(
    "unknown",
    ["no-such", "", "a\0b", IDS[0] + "\0", IDS[0][:-1], IDS[1] + "g", "a\udce9", "1", "x" * 70, 0, -1, N + 1, 2**70],
    ids=repr,
)
def test_an_unknown_item_is_skipped_and_named(r, unknown):
    [answer] = r.recommend([[3, unknown, 17]])
    assert answer.notes == [f"unknown: {unknown!r} (of 20 items); skipped"]
    [expected] = r.recommend([[3, 17]])
    assert dataclasses.replace(answer, notes=[]) == expected


def test_of_many_unknown_items_five_are_named(r):
    [answer] = r.recommend([[f"no{i}" for i in range(7)] + [1]])
    assert answer.notes == ["unknown: 'no0', 'no1', 'no2', 'no3', 'no4', ... (of 20 items); skipped"]
    [answer] = r.recommend([[f"no{i}" for i in range(5)] + [1]])
    assert answer.notes == ["unknown: 'no0', 'no1', 'no2', 'no3', 'no4' (of 20 items); skipped"]


def test_a_history_of_which_nothing_is_known_has_the_answer_of_an_empty_one_and_says_so(r):
    [answer, empty] = r.recommend([["no", "such"], []])
    assert answer.notes == [
        "unknown: 'no', 'such' (of 20 items); skipped",
        "nothing of the history is known: this is the answer for an empty one",
    ]
    assert dataclasses.replace(answer, notes=[]) == empty
    assert empty.notes == []


def test_notes_are_those_of_ones_own_history(r):
    answers = r.recommend([[1], ["no"], [2]])
    assert [bool(answer.notes) for answer in answers] == [False, True, False]


@pytest.mark.parametrize("item", [True, np.bool_(True), 3.0, np.float32(3), None, b"3", [3], float("nan")], ids=repr)
def test_what_is_neither_text_nor_whole_number_is_refused_as_an_item(r, item):
    for ask in (
        lambda: r.recommend([[1, item]]),
        lambda: r.recommend([[1]], candidates=[2, item]),
        lambda: r.step(r.start(), item),
    ):
        with pytest.raises(InputError, match=r"item .* must be an id \(a text\) or a number from 1 to 20"):
            ask()


@pytest.mark.parametrize("histories", [["Q0", "B7-long"], [1, 2], [[1], 2], "Q0", {"Q0": 1}, [True]], ids=repr)
def test_a_flat_list_of_items_is_refused_with_what_a_list_of_histories_looks_like(r, histories):
    with pytest.raises(InputError, match=r"histories must be a list such as \[.*'id', 'id'\].*, not"):
        r.recommend(histories)


@pytest.mark.parametrize(
    "histories", [np.array([1, 2]), [np.int64(1)], [None], [2.5], [b"\x01\x02"], None, 7], ids=repr
)
def test_what_is_no_list_of_histories_is_refused_whatever_it_holds(r, histories):
    with pytest.raises(InputError, match="histories must be a list such as"):
        r.recommend(histories)


def test_a_state_alone_is_refused_as_it_must_be_in_a_list(r):
    with pytest.raises(InputError, match="histories must be a list such as"):
        r.recommend(r.start())


def test_a_very_long_id_is_cut_short_in_the_note(r):
    [answer] = r.recommend([["9" * 5000]])
    assert answer.notes[0].startswith("unknown: '99999")
    assert len(answer.notes[0]) < 200


def test_a_very_long_id_costs_no_memory_of_its_length_for_every_item(r):
    tracemalloc.start()
    r.recommend([["x" * 1_000_000]])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
