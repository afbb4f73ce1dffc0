"""An item is given by its id or number; unknown items are skipped and noted, other values are refused."""

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


@pytest.mark.parametrize("ids", [["4", "2", "x", "30"], ["Ü1", "ü", "日本"], ["a b", "a", "A", "x" * 256]])
def test_a_string_is_always_an_id(shop, engine, tmp_path, ids):
    r = Recommender.from_pretrained(write_shop_of_ids(tmp_path / "any", shop, ids), engine)
    assert r.start(ids).items == tuple(range(1, len(ids) + 1))
    assert sorted(everything(r, []).ids) == sorted(ids)
    assert ids[0] in r and 1 in r and "3" not in r and 5 not in r


def test_if_all_ids_are_whole_numbers_a_number_is_an_id(shop, engine, tmp_path):
    r = Recommender.from_pretrained(write_shop_of_ids(tmp_path / "numeric", shop, ["42", "7", "1", "007"]), engine)
    assert r.start([7, "7", np.int32(1), "007"]).items == (2, 2, 3, 4)
    assert 42 in r and 2 not in r and "2" not in r
    [answer] = r.recommend([[4, 42]])
    assert answer.notes[0] == "unknown: 4 (of 4 items); skipped"


@pytest.mark.parametrize(
    "unknown", ["", "a\0b", IDS[0] + "\0", IDS[0][:-1], IDS[1] + "g", "a\udce9", "1", "x" * 70, 0, N + 1], ids=repr
)
def test_an_unknown_item_is_skipped_and_noted(r, unknown):
    [answer, other] = r.recommend([[3, unknown, 17], [3, 17]])
    assert answer.notes == [f"unknown: {unknown!r} (of 20 items); skipped"]
    assert answer.unknown == 1
    assert dataclasses.replace(answer, notes=[], unknown=0) == other  # which has no note


def test_of_many_unknown_items_five_are_named(r):
    [answer] = r.recommend([[f"no{i}" for i in range(7)] + [1]])
    assert answer.notes == ["unknown: 'no0', 'no1', 'no2', 'no3', 'no4', ... (of 20 items); skipped"]


def test_a_history_without_known_items_gets_the_answer_of_an_empty_one_with_a_note(r):
    [answer, empty] = r.recommend([["no", "such"], []])
    assert answer.notes[1] == "no item of the history is known: this is the answer for an empty history"
    assert dataclasses.replace(answer, notes=[], unknown=0) == empty


@pytest.mark.parametrize("item", [True, np.bool_(True), np.float32(3), None, b"3", [3]], ids=repr)
def test_a_value_that_is_no_string_and_no_whole_number_is_refused(r, item):
    for ask in (
        lambda: r.recommend([[1, item]]),
        lambda: r.recommend([[1]], candidates=[2, item]),
        lambda: r.step(r.start(), item),
    ):
        with pytest.raises(InputError, match=r"item .* must be an id \(a string\) or a number from 1 to 20"):
            ask()


@pytest.mark.parametrize(
    "histories", [["Q0", "B7-long"], [[1], 2], "Q0", {"Q0": 1}, np.array([1, 2]), [None], [b"\x01\x02"], 7], ids=repr
)
def test_a_value_that_is_no_list_of_histories_is_refused_with_an_example(r, histories):
    with pytest.raises(InputError, match=r"histories must be a list such as \[.*'id', 'id'\].*, not"):
        r.recommend(histories)


def test_a_single_state_is_refused_as_it_must_be_in_a_list(r):
    with pytest.raises(InputError, match="histories must be a list such as"):
        r.recommend(r.start())


def test_a_very_long_id_is_shortened_in_the_note_and_costs_no_memory_per_item(r):
    tracemalloc.start()
    [answer] = r.recommend([["9" * 1_000_000]])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.notes[0].startswith("unknown: '99999") and len(answer.notes[0]) < 200
    assert peak < 5_000_000
