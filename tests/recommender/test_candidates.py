"""Which items are candidates, and what is added to their scores."""

import gc
import weakref

import numpy as np
import pytest

from common.errors import InputError
from serving import filters
from tests.recommender.shop import IDS, SAME, N, assert_same_answer, everything

FEW, MANY = [IDS[7], 2], [IDS[7], 2, 19, 2, 5, 11]  # ranked from gathered rows, and from the whole table


@pytest.mark.parametrize("candidates", [FEW, MANY], ids=len)
def test_only_candidates_are_ranked_with_the_scores_of_the_whole_ranking(shop, engine, kind, candidates):
    r = shop.open(engine, kind)
    numbers = {r.items.number(item) for item in candidates}
    for history in ([3, 9], [], r.start([3, 9])):
        whole = everything(r, history)
        best = [(i, s) for i, s in zip(whole.numbers, whole.scores, strict=True) if i in numbers]
        [answer] = r.recommend([history], top_k=len(numbers), candidates=candidates)
        assert answer.numbers == [i for i, _ in best] and answer.notes == []
        np.testing.assert_allclose(answer.scores, [s for _, s in best], rtol=SAME[kind])


def test_each_history_may_have_candidates_of_its_own(r):
    histories, own = [[3], r.start([2]), [2], [5]], [[1, 2], MANY, [2], ["no", 5, 6]]
    answers = r.recommend(histories, top_k=2, candidates=own)
    for history, candidates, answer in list(zip(histories, own, answers, strict=True))[:2]:
        assert_same_answer(answer, r.recommend([history], top_k=2, candidates=candidates)[0])
    assert set(answers[1].numbers) < set(r.items.numbers(MANY)) and set(answers[3].numbers) == {6}
    assert (answers[2].numbers, answers[2].notes) == ([], ["only 0 items are left to rank, fewer than top_k 2"])
    assert answers[3].notes[0] == "candidates unknown: 'no' (of 20 items); skipped"
    with pytest.raises(InputError, match="2 lists of candidates for 4 histories; give one for each"):
        r.recommend(histories, candidates=own[:2])


def test_every_answer_notes_unknown_candidates(r):
    for answer in r.recommend([[1], ["no"]], top_k=1, candidates=[4, "nope"]):
        assert answer.numbers == [4]
        assert answer.notes[-1] == "candidates unknown: 'nope' (of 20 items); skipped"


@pytest.mark.parametrize("candidates", [[], ["nope", 99]])
def test_without_a_known_candidate_the_request_is_refused(r, candidates):
    with pytest.raises(InputError, match="no candidate is known, so there is nothing to rank"):
        r.recommend([[1]], top_k=1, candidates=candidates)


def test_few_candidates_are_gathered_and_the_table_is_not_scored(shop, monkeypatch):
    r, widths = shop.open("onnx"), []
    recommend = r._now.engine.recommend
    monkeypatch.setattr(r._now.engine, "recommend", lambda *a: widths.append(a[1].width) or recommend(*a))
    monkeypatch.setattr("serving.ranking.FEWEST_COLUMNS", 1)
    r.recommend([[3, 4]], top_k=1, candidates=FEW)
    assert widths == [5]  # token 0, two candidates, two items of the history


@pytest.mark.parametrize("chosen", [FEW, MANY, np.arange(N) % 2 == 0, [True] * 3], ids=str)
def test_a_filter_is_reused_and_answers_as_its_candidates_do(r, chosen):
    items = r.filter(chosen)
    numbers = [r.items.number(i) for i in chosen] if isinstance(chosen[0], str) else np.flatnonzero(chosen) + 1
    for history in ([3], [9, 1]):
        expected = r.recommend([history], candidates=numbers)
        assert r.recommend([history], candidates=items) == expected
        assert items.choice(r.items) is items.choice(r.items)


def test_a_filter_follows_the_catalogue(shop, engine):
    r = shop.first(engine, "none", 16)
    rule, boosted = r.filter(range(1, 7)), r.filter(boost=np.ones(16))
    r.remove_items([2])
    r.add_items(["NEW"], shop.features[16:17])
    assert sorted(everything(r, [], candidates=rule).numbers) == [1, 3, 4, 5, 6]
    plain, raised = everything(r, [3]), everything(r, [3], candidates=boosted)
    before = dict(zip(plain.numbers, plain.scores, strict=True))
    change = {i: score - before[i] for i, score in zip(raised.numbers, raised.scores, strict=True)}
    assert change.pop(17) == pytest.approx(0, abs=1e-5)  # added later
    assert change.keys() == set(range(1, 17)) - {2} and list(change.values()) == pytest.approx([1] * 15, abs=1e-4)


def test_a_filter_keeps_no_former_catalogue_in_memory(shop):
    r = shop.open("onnx")
    rule, former = r.filter(MANY), weakref.ref(r.items)
    r.recommend([[3]], candidates=rule)
    r.update_items([4], shop.features[[9]])
    gc.collect()
    assert former() is None


@pytest.mark.parametrize("candidates", [None, FEW, MANY, [MANY]], ids=str)
def test_boosts_are_added_to_the_scores(shop, engine, kind, candidates):
    r, boost = shop.open(engine, kind), np.linspace(-3, 3, N)
    for history in ([3, 9], [], r.start([3, 9])):
        plain, boosted = (
            r.recommend([history], top_k=N, candidates=candidates, exclude_history=False, boost=b)[0]
            for b in (None, boost)
        )
        expected = {i: s + boost[i - 1] for i, s in zip(plain.numbers, plain.scores, strict=True)}
        found = dict(zip(boosted.numbers, boosted.scores, strict=True))
        tolerance = (5e-3 if kind == "int8" else 1e-5) * max(map(abs, expected.values()))
        assert found == pytest.approx(expected, abs=tolerance)
        assert boosted.scores == sorted(boosted.scores, reverse=True)


@pytest.mark.parametrize(
    ("ask", "problem"),
    [
        (lambda r: r.filter([True] * (N + 1)), "a mask must have a truth value for each of at most 20 items"),
        (lambda r: r.filter(boost=np.ones(N + 1)), "boost must be an array of at most 20 numbers"),
        (lambda r: r.filter(boost=["a"]), "boost must be an array of at most 20 numbers"),
        (lambda r: r.filter(boost=[np.inf]), "boost must be finite; leave items out by a mask"),
        (lambda r: r.filter("Q0"), r"items must be a list such as \["),
        (lambda r: r.recommend([[1]], candidates=r.filter([1]), boost=[1]), "candidates is a filter, so give"),
    ],
)  # fmt: skip
def test_an_invalid_filter_or_boost_is_refused(r, ask, problem):
    with pytest.raises(InputError, match=problem):
        ask(r)


def test_the_limit_between_gathering_and_masking_changes_no_answer(r, monkeypatch):
    expected = r.recommend([[3], [9]], candidates=MANY)
    monkeypatch.setattr(filters, "FEW", 1)
    for actual, answer in zip(r.recommend([[3], [9]], candidates=MANY), expected, strict=True):
        assert_same_answer(actual, answer)
