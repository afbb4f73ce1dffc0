"""A user whose events come one by one, as a state."""

import numpy as np
import pytest

from common.errors import InputError
from serving import Recommender
from tests.exported import write_export
from tests.made_up import random_model
from tests.recommender.shop import IDS, MAX_LEN, SAME, N, assert_same_answer, everything


@pytest.mark.parametrize("length", range(MAX_LEN + 1))
def test_stepping_through_a_history_gives_the_answer_for_the_whole_of_it(shop, engine, kind, length):
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


def test_a_state_remembers_what_lies_beyond_the_trained_length(shop, r):
    history = [3, 17, 5, 9, 1, 4, 20, 2]
    answer, expected = everything(r, r.start(history)), shop.scores(history)
    np.testing.assert_allclose(answer.scores, expected[answer.numbers], atol=1e-5 * np.abs(expected).max())
    assert answer.notes == ["the state remembers 8 items, training had at most 5"]
    assert not np.allclose(answer.scores, everything(r, history).scores, rtol=1e-3)


def test_a_state_excludes_all_that_it_has_seen(r):
    history = [3, 17, 5, 9, 1, 4, 20, 2]
    [answer] = r.recommend([r.start(history)], top_k=N - 8)
    assert sorted([*answer.numbers, *history]) == list(range(1, N + 1))


def test_a_step_leaves_the_state_before_it_as_it_was(r):
    state = r.start([3])
    hidden, z = state.hidden.copy(), state.z.copy()
    one, other = r.step(state, 5), r.step(state, 5)
    r.recommend([state, one])
    np.testing.assert_array_equal(state.hidden, hidden)
    np.testing.assert_array_equal(state.z, z)
    assert state.items == (3,)
    np.testing.assert_array_equal(one.z, other.z)
    assert not np.allclose(one.z, z)


def test_states_can_be_kept_in_sets_and_be_compared(r):
    state, other = r.start([3]), r.start([3])
    assert state == state and state in {state}
    assert state != other


def test_states_and_histories_are_answered_in_the_order_they_are_given_in(r):
    asked = [[5, 2], r.start([1]), [], r.start([7, 3, 2]), r.start(), [1], [9, 9, 9]]
    plain = [[5, 2], [1], [], [7, 3, 2], [], [1], [9, 9, 9]]
    for answer, expected in zip(r.recommend(asked, top_k=6), r.recommend(plain, top_k=6), strict=True):
        assert_same_answer(answer, expected)


def test_an_unknown_item_is_no_step_and_is_named(r):
    state = r.start([3])
    with pytest.raises(InputError, match=r"unknown: 'no-such' \(of 20 items\); the state stays as it is"):
        r.step(state, "no-such")
    assert state.items == (3,)
    with pytest.raises(InputError, match="unknown: 'no-such'"):
        r.start([1, "no-such", 2])


def test_a_state_of_a_model_of_another_size_is_refused(shop, r, engine, tmp_path):
    other = write_export(tmp_path / "other", random_model((4, 8), num_items=N))
    state = Recommender.from_pretrained(other, engine).start([3])
    with pytest.raises(InputError, match=r"the state is of another model; make one with start\(\)"):
        r.recommend([[1], state])


def test_a_state_that_saw_items_that_are_not_there_is_refused(shop, r, engine):
    state = r.start([N])
    with pytest.raises(InputError, match="the state is of another model"):
        shop.first(engine, "none", 16).recommend([state])


def test_a_step_from_a_state_of_a_model_of_another_size_is_refused(r, engine, tmp_path):
    other = write_export(tmp_path / "other", random_model((4, 8), num_items=N))
    state = Recommender.from_pretrained(other, engine).start([3])
    with pytest.raises(InputError, match="the state is of another model"):
        r.step(state, 1)


def test_a_state_of_a_model_of_other_depth_is_refused(r, engine, tmp_path):
    other = write_export(tmp_path / "other", random_model((4, 12), num_blocks=3, num_items=N))
    state = Recommender.from_pretrained(other, engine).start([3])
    for ask in (lambda: r.recommend([state]), lambda: r.step(state, 1)):
        with pytest.raises(InputError, match="the state is of another model"):
            ask()
