"""What is recommended, to whom and how much of it."""

import dataclasses

import numpy as np
import pytest

from common.errors import InputError
from serving import engines, recommender
from tests.recommender.shop import ENGINES, IDS, MAX_LEN, N, assert_same_answer, everything


@pytest.mark.parametrize("history", [[], [3], [3, 17, 3], [9, 1, 4, 20, 2]], ids=str)
def test_the_answer_is_the_models_own_ranking(shop, r, history):
    expected = shop.scores(history)
    answer = everything(r, history)
    best = np.argsort(-expected[1:], kind="stable") + 1
    assert answer.numbers == best.tolist()
    np.testing.assert_allclose(answer.scores, expected[best], atol=1e-5 * np.abs(expected).max())


def test_an_answer_names_its_items_by_number_id_and_title(shop, r):
    answer = everything(r, [3])
    assert sorted(answer.numbers) == list(range(1, N + 1))
    assert answer.ids == [IDS[i - 1] for i in answer.numbers]
    assert answer.titles == [shop.catalog.metadata[i - 1]["title"] for i in answer.numbers]
    assert answer.notes == []
    assert {type(number) for number in answer.numbers} == {int}
    assert {type(score) for score in answer.scores} == {float}


def test_ten_items_are_recommended_where_no_number_is_given(r):
    [answer] = r.recommend([[1]])
    assert len(answer.ids) == len(answer.numbers) == len(answer.titles) == len(answer.scores) == 10


def test_the_best_come_first(r):
    for answer in r.recommend([[1], [2, 3], []], top_k=12):
        assert answer.scores == sorted(answer.scores, reverse=True)


def test_one_answer_comes_back_for_each_history_in_their_order(r):
    histories = [[5, 2, 9], [], [1], [7, 7, 7, 7, 7], [2, 5], [9]]
    for history, answer in zip(histories, r.recommend(histories, top_k=4), strict=True):
        assert_same_answer(answer, r.recommend([history], top_k=4)[0])


def test_no_histories_have_no_answers(r):
    assert r.recommend([]) == []


def test_histories_may_come_from_a_generator_and_be_of_any_sequence(r):
    expected = r.recommend([[1, 2], [3]])
    kinds = [iter([(1, 2), (3,)]), (np.array(h) for h in ([1, 2], [3])), [iter([IDS[0], IDS[1]]), {IDS[2]: None}]]
    for histories in kinds:
        assert r.recommend(histories) == expected


def test_the_engines_give_the_same_answers(shop, kind):
    histories = [[3, 17, 3], [], [9, 1, 4, 20, 2], [5]]
    answers = [shop.open(engine, kind).recommend(histories, top_k=N, exclude_history=False) for engine in ENGINES]
    for with_torch, with_onnx in zip(*answers, strict=True):
        assert_same_answer(with_onnx, with_torch, tolerance=0.05 if kind == "int8" else 1e-5)


def test_however_numbers_are_stored_the_scores_are_near_those_of_float32(shop, engine, kind):
    exact, stored = (everything(shop.open(engine, k), [3, 17]) for k in ("none", kind))
    expected = dict(zip(exact.numbers, exact.scores, strict=True))
    worst = max(abs(expected[i] - s) for i, s in zip(stored.numbers, stored.scores, strict=True))
    assert worst <= {"none": 0, "float16": 1e-3, "int8": 0.05}[kind] * max(map(abs, exact.scores))


def watching(call, see):
    """An engine's method that is seen the rows and the table it is called with."""

    def watched(rows, table, *rest):
        see(rows, table)
        return call(rows, table, *rest)

    return watched


@pytest.mark.parametrize("scores_at_once", [1, 2 * (N + 1), 1000])
def test_a_catalogue_too_large_for_one_batch_is_ranked_in_more_with_the_same_answers(r, monkeypatch, scores_at_once):
    histories = [[5, 2, 9], [], r.start([8]), [1], [7, 7, 7, 7, 7], r.start([3, 1]), [2, 5], [9]]
    expected, asked = r.recommend(histories, top_k=8), []
    for method in ("recommend", "rank"):
        watched = watching(getattr(r._engine, method), lambda rows, table: asked.append(len(rows) * len(table)))
        monkeypatch.setattr(r._engine, method, watched)
    monkeypatch.setattr(recommender, "SCORES", scores_at_once)
    monkeypatch.setattr(engines, "RANKED", 3)
    for actual, answer in zip(r.recommend(histories, top_k=8), expected, strict=True):
        assert_same_answer(actual, answer)
    assert max(asked) <= max(scores_at_once, N + 1)


def test_histories_of_like_length_are_encoded_together(shop, monkeypatch):
    r, shapes = shop.open("onnx"), []
    watched = watching(r._engine.recommend, lambda rows, table: shapes.append(rows.shape))
    monkeypatch.setattr(r._engine, "recommend", watched)
    monkeypatch.setattr(recommender, "TOGETHER", 2)
    r.recommend([[1], [1, 2, 3, 4], [2], [2, 3, 4, 5], [], [1] * 9], top_k=3)
    assert shapes == [(2, 1), (2, 4), (2, MAX_LEN)]


# --------------------------------------------------------------------------------------------------- long histories


def test_of_a_long_history_the_last_items_are_read_and_that_is_noted(r):
    history = [3, 17, 5, 9, 1, 4, 20, 2]
    long, tail = everything(r, history), everything(r, history[-MAX_LEN:])
    assert long.notes == ["the last 5 of 8 items are read, as in training"]
    assert dataclasses.replace(long, notes=[]) == tail
    assert tail.notes == []


def test_unknown_items_do_not_count_towards_the_length_of_a_history(r):
    assert [len(note) for note in r.recommend([[1, 2, "no", 3, 4, "no", 5]])[0].notes] == [
        len("unknown: 'no', 'no' (of 20 items); skipped")
    ]


def test_what_a_long_history_began_with_is_excluded_too(r):
    history = [3, 17, 5, 9, 1, 4, 20, 2]
    [answer] = r.recommend([history], top_k=N - 8)
    assert not set(history) & set(answer.numbers)


def test_long_and_short_histories_share_a_batch(r):
    histories = [[3, 17, 5, 9, 1, 4, 20, 2], [3], list(range(1, N + 1)) * 3]
    for history, answer in zip(histories, r.recommend(histories, top_k=N, exclude_history=False), strict=True):
        assert_same_answer(answer, everything(r, history[-MAX_LEN:]))


# ---------------------------------------------------------------------------------------- what is ranked, how many


def test_what_the_user_had_is_not_recommended(r):
    answers = r.recommend([[3, 17, 3], [5]], top_k=N - 2)
    assert sorted([*answers[0].numbers, 3, 17]) == list(range(1, N + 1))
    assert 5 not in answers[1].numbers
    assert {3, 17} <= set(answers[1].numbers)  # which another had


def test_leaving_out_the_history_keeps_the_order_and_the_scores_of_the_rest(r):
    whole, [rest] = everything(r, [3, 17]), r.recommend([[3, 17]], top_k=N - 2)
    kept = [(i, s) for i, s in zip(whole.numbers, whole.scores, strict=True) if i not in (3, 17)]
    assert [i for i, _ in kept] == rest.numbers
    np.testing.assert_allclose([s for _, s in kept], rest.scores, rtol=1e-6)


def test_what_the_user_had_is_recommended_where_it_is_not_excluded(r):
    assert {3, 17} <= set(everything(r, [3, 17], exclude_history=False).numbers)


def test_candidates_alone_are_ranked_in_the_order_of_the_whole_ranking(r):
    whole = everything(r, [3])
    answer = everything(r, [3], candidates=[IDS[7], 2, 19, 2], top_k=3)
    assert sorted(answer.numbers) == [2, 8, 19]
    assert answer.numbers == [i for i in whole.numbers if i in (2, 8, 19)]
    assert answer.notes == []


def test_a_candidate_that_the_user_had_is_excluded(r):
    [answer] = r.recommend([[3]], top_k=2, candidates=[3, 4, 5])
    assert sorted(answer.numbers) == [4, 5]


def test_unknown_candidates_are_noted_in_every_answer(r):
    for answer in r.recommend([[1], ["no"]], top_k=1, candidates=[4, "nope"]):
        assert answer.numbers == [4]
        assert answer.notes[-1] == "candidates unknown: 'nope' (of 20 items); skipped"


@pytest.mark.parametrize("candidates", [[], ["nope", 99]])
def test_without_a_known_candidate_there_is_nothing_to_rank(r, candidates):
    with pytest.raises(InputError, match="no candidate is known, so there is nothing to rank"):
        r.recommend([[1]], top_k=1, candidates=candidates)


def test_candidates_that_are_one_text_are_refused_rather_than_read_letter_by_letter(r):
    with pytest.raises(InputError, match=r"candidates must be a list such as \['id', 'id'\], not 'B7-long'"):
        r.recommend([[]], top_k=1, candidates="B7-long")


def test_a_history_that_is_one_text_is_refused_rather_than_read_letter_by_letter(r):
    with pytest.raises(InputError, match=r"a history must be a list such as \['id', 'id'\], not '12'"):
        r.start("12")


@pytest.mark.parametrize("top_k", [0, -1, N + 1, 2.0, "3", None], ids=repr)
def test_a_number_of_items_that_cannot_be_had_is_refused_with_what_can(r, top_k):
    with pytest.raises(InputError, match=r"top_k .* must be a whole number from 1 to 20, the items there are to rank"):
        r.recommend([[]], top_k=top_k)


def test_true_is_no_number_of_items(r):
    with pytest.raises(InputError, match="top_k True must be a whole number"):
        r.recommend([[]], top_k=True)


def test_the_number_of_items_may_be_one_of_numpys(r):
    assert r.recommend([[1]], top_k=np.int64(3)) == r.recommend([[1]], top_k=3)


def test_no_more_items_than_candidates_can_be_asked_for(r):
    with pytest.raises(InputError, match=r"top_k 3 must be a whole number from 1 to 2,"):
        r.recommend([[]], top_k=3, candidates=[5, 6, 5, "nope"])


def test_a_history_that_leaves_too_few_items_is_named(r):
    histories = [[1, 2, 3], list(range(1, 9)), [1], [4], [1] * 30]
    with pytest.raises(
        InputError, match=r"history 1: 12 items are left to rank .* fewer than top_k 13; .*exclude_hist"
    ):
        r.recommend(histories, top_k=13)
    assert len(r.recommend(histories, top_k=12)[1].ids) == 12
    assert len(r.recommend(histories, top_k=13, exclude_history=False)[1].ids) == 13


def test_a_state_that_leaves_too_few_items_is_named(r):
    with pytest.raises(InputError, match=r"history 1: 0 items are left to rank"):
        r.recommend([[2], r.start([3, 4])], top_k=1, candidates=[3, 4])


def test_all_items_can_be_asked_for(r):
    assert len(everything(r, [3], top_k=N).ids) == len(r) == N
