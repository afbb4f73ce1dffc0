"""Which items are recommended, in which order, and how many."""

import dataclasses

import numpy as np
import pytest

from common.errors import InputError
from serving import ranking, torch_engine
from tests.recommender.shop import IDS, MAX_LEN, N, assert_same_answer, everything

LONG = [3, 17, 5, 9, 1, 4, 20, 2]  # longer than MAX_LEN


@pytest.mark.parametrize("history", [[], [3], [9, 1, 4, 20, 9]], ids=str)
def test_the_answer_is_the_models_own_ranking_with_ids_and_titles(shop, r, history):
    expected = shop.scores(history)
    answer = everything(r, history)
    best = np.argsort(-expected[1:], kind="stable") + 1
    assert answer.numbers == best.tolist()
    np.testing.assert_allclose(answer.scores, expected[best], atol=1e-5 * np.abs(expected).max())
    assert answer.ids == [IDS[i - 1] for i in best]
    assert answer.titles == [shop.catalog.metadata[i - 1]["title"] for i in best]
    assert answer.notes == []
    assert {type(value) for value in [*answer.numbers, *answer.scores]} == {int, float}


def test_ten_items_are_recommended_by_default(r):
    [answer] = r.recommend([[1]])
    assert len(answer.ids) == len(answer.numbers) == len(answer.titles) == len(answer.scores) == 10


def test_answers_come_in_the_order_of_the_histories(r):
    histories = [[5, 2, 9], [], [1], [7, 7, 7, 7, 7], LONG, [2, 5], [9]]
    for history, answer in zip(histories, r.recommend(histories, top_k=4), strict=True):
        assert_same_answer(answer, r.recommend([history], top_k=4)[0])
    assert r.recommend([]) == []


def test_histories_may_be_iterators_tuples_or_arrays(r):
    expected = r.recommend([[1, 2], [3]])
    for histories in (iter([(1, 2), (3,)]), (np.array(h) for h in ([1, 2], [3]))):
        assert r.recommend(histories) == expected


def test_in_every_storage_the_scores_are_near_those_of_float32(shop, engine, kind):
    exact, stored = (everything(shop.open(engine, k), [3, 17]) for k in ("none", kind))
    expected = dict(zip(exact.numbers, exact.scores, strict=True))
    worst = max(abs(expected[i] - s) for i, s in zip(stored.numbers, stored.scores, strict=True))
    assert worst <= {"none": 0, "float16": 1e-3, "int8": 0.05}[kind] * max(map(abs, exact.scores))


def watching(call, see):
    """Wrap an engine's method; show its rows and table to `see`."""

    def watched(rows, table, *rest):
        see(rows, table)
        return call(rows, table, *rest)

    return watched


@pytest.mark.parametrize("scores_at_once", [1, 2 * (N + 1)])
def test_a_large_catalogue_is_ranked_in_several_batches_with_the_same_answers(r, monkeypatch, scores_at_once):
    histories = [[5, 2, 9], [], r.start([8]), [1], [7, 7, 7, 7, 7], r.start([3, 1]), [2, 5], [9]]
    expected, asked = r.recommend(histories, top_k=8), []
    for method in ("recommend", "rank"):
        watched = watching(getattr(r._now.engine, method), lambda rows, table: asked.append(len(rows) * len(table)))
        monkeypatch.setattr(r._now.engine, method, watched)
    monkeypatch.setattr(ranking, "SCORES", scores_at_once)
    monkeypatch.setattr(torch_engine, "CHUNK", 3)
    for actual, answer in zip(r.recommend(histories, top_k=8), expected, strict=True):
        assert_same_answer(actual, answer)
    assert max(asked) <= max(scores_at_once, N + 1)


def test_histories_of_similar_length_are_encoded_together(shop, monkeypatch):
    r, shapes = shop.open("onnx"), []
    watched = watching(r._now.engine.recommend, lambda rows, table: shapes.append(rows.shape))
    monkeypatch.setattr(r._now.engine, "recommend", watched)
    monkeypatch.setattr(ranking, "TOGETHER", 2)
    r.recommend([[1], [1, 2, 3, 4], [2], [2, 3, 4, 5], [], [1] * 9], top_k=3)
    assert shapes == [(2, 1), (2, 4), (2, MAX_LEN)]


# ----------------------------------------------------------------------------------------------------- long histories


def test_the_last_items_of_a_long_history_are_read_and_a_note_says_so(r):
    long, tail = everything(r, LONG), everything(r, LONG[-MAX_LEN:])
    assert long.notes == ["the last 5 of 8 items are read, as in training"]
    assert dataclasses.replace(long, notes=[]) == tail
    [answer] = r.recommend([["no", *LONG[:MAX_LEN], "no"]])  # unknown items do not count
    assert answer.notes == ["unknown: 'no', 'no' (of 20 items); skipped"]


def test_all_items_of_a_long_history_are_excluded(r):
    [answer] = r.recommend([LONG], top_k=N - 8)
    assert not set(LONG) & set(answer.numbers)


# ------------------------------------------------------------------------------------------ what is ranked, how many


def test_each_users_history_is_excluded_and_the_rest_keeps_order_and_scores(r):
    answers = r.recommend([[3, 17, 3], [5]], top_k=N - 2)
    for history, answer in zip(([3, 17], [5]), answers, strict=True):
        whole = everything(r, [3, 17, 3] if history == [3, 17] else [5])
        kept = [(i, s) for i, s in zip(whole.numbers, whole.scores, strict=True) if i not in history][: N - 2]
        assert answer.numbers == [i for i, _ in kept]
        np.testing.assert_allclose(answer.scores, [s for _, s in kept], rtol=1e-5)


@pytest.mark.parametrize("value", ["B7-long", {"B7-long": 1}, 7], ids=repr)
def test_a_string_a_dict_or_a_number_is_not_a_list_of_items(r, value):
    for ask in (
        lambda: r.recommend([[]], top_k=1, candidates=value),
        lambda: r.recommend([value]),
        lambda: r.start(value),
    ):
        with pytest.raises(InputError, match=r"(candidates|each of the histories|a history) must be a list such as \["):
            ask()


@pytest.mark.parametrize("top_k", [0, 2.0, "3", True], ids=repr)
def test_an_impossible_top_k_is_refused(r, top_k):
    with pytest.raises(InputError, match=r"top_k .* must be a whole number from 1"):
        r.recommend([[]], top_k=top_k)


def test_a_user_with_too_few_items_left_gets_fewer_and_a_note_and_the_others_all(r):
    histories = [[1, 2, 3], list(range(1, 9)), r.start([4]), r.start(range(1, N + 1))]
    answers = r.recommend(histories, top_k=np.int64(13))
    assert [len(answer.ids) for answer in answers] == [13, 12, 13, 0]
    assert answers[0].notes == []
    assert answers[1].notes[-1] == "only 12 items are left to rank, fewer than top_k 13"
    assert_same_answer(answers[1], r.recommend([histories[1]], top_k=12)[0])
    assert len(r.recommend(histories, top_k=13, exclude_history=False)[1].ids) == 13
    assert len(r.recommend([[]], top_k=N + 5)[0].ids) == N
