"""A user's events one by one, as a State."""

import numpy as np
import pytest

from common.errors import InputError
from serving import Recommender, states
from serving.states import State
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


@pytest.mark.parametrize("length", [2, 30], ids=str)
def test_starting_from_a_history_is_stepping_through_it(shop, engine, kind, length, monkeypatch):
    r, history = shop.open(engine, kind), (np.arange(length) * 7 % N + 1).tolist()
    monkeypatch.setattr(states, "ROWS", 8)  # several pieces
    started, stepped = r.start(history), r.start()
    for item in history:
        stepped = r.step(stepped, item)
    assert started.items == stepped.items == tuple(history)
    for found, expected in ((started.hidden, stepped.hidden), (started.z, stepped.z)):
        assert abs(found - expected).max() <= SAME[kind] * abs(expected).max()


def test_a_long_history_takes_a_few_calls_of_the_engine(r, monkeypatch):
    calls, step = [], r._now.engine.step
    monkeypatch.setattr(r._now.engine, "step", lambda *a: calls.append(a) or step(*a))
    assert len(r.start([1, 2, 3, 4] * 500).items) == 2000
    assert len(calls) == r.config["num_blocks"] + 1


def test_a_state_is_the_same_after_its_bytes(shop, r):
    for state in (r.start(), r.start([3, 17]), r.start([IDS[i % N] for i in range(40)])):
        content = state.to_bytes()
        found = State.from_bytes(content)
        assert (found.items, found.model) == (state.items, r.model)
        np.testing.assert_array_equal(found.hidden, state.hidden)
        np.testing.assert_array_equal(found.z, state.z)
        assert r.recommend([found]) == r.recommend([state])
        assert r.step(found, 5).items == (*state.items, 5)
    assert len(content) == state.hidden.nbytes + state.z.nbytes + 4 * 40 + len(r.model) + 18


@pytest.mark.parametrize("damage", [b"", b"x", b"\x80\x04K\x01.", "cut", "flipped", "longer", "text", None], ids=repr)
def test_bytes_that_are_no_state_are_refused(r, damage):
    content = r.start([3]).to_bytes()
    changed = {"cut": content[:-1], "longer": content + b"0", "text": "fMRL" * 20}.get(damage, damage)
    if damage == "flipped":
        changed = content[:60] + bytes([content[60] ^ 1]) + content[61:]
    with pytest.raises(InputError, match=r"(not a state of version 1|damaged).*encode the history again"):
        State.from_bytes(changed)


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


@pytest.mark.parametrize(("sizes", "num_blocks", "seed"), [((4, 8), 2, 0), ((4, 12), 3, 0), ((4, 12), 2, 1)])
def test_a_state_of_another_model_is_refused(r, engine, tmp_path, sizes, num_blocks, seed):
    other = write_export(tmp_path / "other", random_model(sizes, num_blocks=num_blocks, num_items=N, seed=seed))
    state = State.from_bytes(Recommender.from_pretrained(other, engine).start([1]).to_bytes())
    for ask in (lambda: r.recommend([[1], state]), lambda: r.step(state, 1), lambda: r.user_vectors([state])):
        with pytest.raises(InputError, match=rf"made by the model '.*', this is '{r.model}'; encode the history again"):
            ask()


def test_a_forged_state_is_refused(r):
    small = np.zeros((r.config["num_blocks"], 2, 3), dtype=np.float32)
    forged = State.from_bytes(State(small, np.zeros(3, dtype=np.float32), (1,), r.model).to_bytes())
    with pytest.raises(InputError, match="the state is damaged: it has another size than its model"):
        r.step(forged, 1)


def test_a_state_stays_valid_while_the_catalogue_changes(shop, engine):
    r, other = (shop.first(engine, "none", 16) for _ in range(2))
    r.add_items(["NEW"], shop.features[16:17])
    state = r.start(["NEW", 3])
    r.remove_items([3, "NEW"])
    r.update_items([4], titles=["Another title"])
    assert r.step(state, 4).items == (17, 3, 4)
    with pytest.raises(InputError, match="the state remembers item 17, this catalogue has 16; reload the catalogue"):
        other.recommend([state])
