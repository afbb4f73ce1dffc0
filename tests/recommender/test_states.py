"""A user's events one by one, as a State."""

import numpy as np
import pytest

from common.errors import InputError
from serving import Recommender
from tests.exported import write_export
from tests.made_up import random_model
from tests.recommender.shop import IDS, MAX_LEN, SAME, N, assert_same_answer, everything


@pytest.mark.parametrize("length", [0, 1, MAX_LEN])
def test_stepping_through_a_history_gives_the_answer_for_the_history(shop, engine, kind, length):
    r, history = shop.open(engine, kind), [3, 17, 3, 9, 1][:length]
    state = r.start()
    for item in history:
        state = r.step(state, item)
    [answer] = r.recommend([state], top_k=8)
    assert_same_answer(answer, r.recommend([history], top_k=8)[0], SAME[kind])
    assert answer.notes == []
    assert not set(answer.numbers) & set(history)


def test_starting_from_a_history_is_stepping_through_it(r):
    started, stepped = r.start([3, IDS[16]]), r.step(r.step(r.start(), 3), 17)
    assert started.items == stepped.items == (3, 17)
    np.testing.assert_array_equal(started.hidden, stepped.hidden)
    np.testing.assert_array_equal(started.z, stepped.z)


def test_a_state_remembers_and_excludes_items_beyond_the_trained_length(shop, r):
    history = [3, 17, 5, 9, 1, 4, 20, 2]
    state, expected = r.start(history), shop.scores(history)
    answer = everything(r, state)
    np.testing.assert_allclose(answer.scores, expected[answer.numbers], atol=1e-5 * np.abs(expected).max())
    assert answer.notes == ["the state remembers 8 items, training had at most 5"]
    assert not np.allclose(answer.scores, everything(r, history).scores, rtol=1e-3)
    [answer] = r.recommend([state], top_k=N - 8)
    assert sorted([*answer.numbers, *history]) == list(range(1, N + 1))


def test_a_step_does_not_change_the_state_before_it(r):
    state = r.start([3])
    hidden, z = state.hidden.copy(), state.z.copy()
    one, other = r.step(state, 5), r.step(state, 5)
    r.recommend([state, one])
    np.testing.assert_array_equal(state.hidden, hidden)
    np.testing.assert_array_equal(state.z, z)
    assert state.items == (3,)
    np.testing.assert_array_equal(one.z, other.z)
    assert not np.allclose(one.z, z)
    assert state in {state} and one != other  # by identity


def test_states_and_histories_are_answered_in_their_order(r):
    mixed = [[5, 2], r.start([1]), [], r.start([7, 3, 2]), r.start(), [1], [9, 9, 9]]
    plain = [[5, 2], [1], [], [7, 3, 2], [], [1], [9, 9, 9]]
    for answer, expected in zip(r.recommend(mixed, top_k=6), r.recommend(plain, top_k=6), strict=True):
        assert_same_answer(answer, expected)


def test_an_unknown_item_is_refused_by_start_and_step(r):
    with pytest.raises(InputError, match=r"unknown: 'no-such' \(of 20 items\); the state is unchanged"):
        r.step(r.start([3]), "no-such")
    with pytest.raises(InputError, match="unknown: 'no-such'"):
        r.start([1, "no-such", 2])


@pytest.mark.parametrize(("sizes", "num_blocks", "num_items"), [((4, 8), 2, N), ((4, 12), 3, N), ((4, 12), 2, N + 1)])
def test_a_state_of_another_model_is_refused(r, engine, tmp_path, sizes, num_blocks, num_items):
    other = write_export(tmp_path / "other", random_model(sizes, num_blocks=num_blocks, num_items=num_items))
    state = Recommender.from_pretrained(other, engine).start([num_items])
    for ask in (lambda: r.recommend([[1], state]), lambda: r.step(state, 1)):
        with pytest.raises(InputError, match=r"the state is of another model; make one with start\(\)"):
            ask()
