"""What a shop that serves an export asks of it: recommendations, users event by event, and new products."""

import dataclasses
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from config import InputError
from datasets.catalog import load_catalog
from datasets.encoders import LexicalEncoder
from datasets.text import NO_TEXT
from model import Recommender
from model.serving import engines, recommender
from tests.exported import write_export
from tests.made_up import NEAR_1, random_model
from tests.prepared import draw_picture, item_features, put_in_hub_cache, write_prepared, write_tiny_bert

REPOSITORY = Path(__file__).parent.parent
ENGINES, KINDS = ("torch", "onnx"), ("none", "float16", "int8")
ATTRIBUTES = ("title", "price", "brand", "categories")
N, MAX_LEN = 20, 5
HALF = np.finfo(np.float16).eps  # features of the training are rounded to float16, those of new products are not
# Ids neither in order nor of one length.
IDS = [f"{'QBXA'[i % 4]}{(i * 7) % N}{'-long' * (i % 3)}" for i in range(N)]


class Shop:
    """A dataset of 20 products with texts and pictures, a model that reads them, and its exports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        catalog = load_catalog(write_prepared(root, users=5, items=N, pictures=True).parent, "tiny")
        self.catalog = dataclasses.replace(catalog, asins=IDS)
        self.features = item_features(
            self.catalog, language="lexical", image="pixel", attributes=ATTRIBUTES, cache_root=root, say=lambda _: None
        )
        self.model = random_model((4, 12), num_items=N, features=self.features, ring=NEAR_1)
        self.records = [
            record | {"picture": str(picture)}
            for record, picture in zip(self.catalog.metadata, self.catalog.pictures, strict=True)
        ]

    def export(self, kind: str = "none", format: str = "onnx") -> Path:
        folder = self.root / f"{kind}-{format}"
        if not folder.exists():
            write_export(
                folder,
                self.model,
                self.catalog,
                max_len=MAX_LEN,
                quantize=kind,
                format=format,
                use_img_encoder=True,
                item_attributes=ATTRIBUTES,
            )
        return folder

    def open(self, engine: str, kind: str = "none") -> Recommender:
        return Recommender.from_pretrained(self.export(kind), engine, threads=1)

    def first(self, engine: str, kind: str, n: int) -> Recommender:
        """The same model, of a catalogue that ends after n products."""
        folder = self.root / f"{kind}-first-{n}"
        if not folder.exists():
            model = random_model((4, 12), num_items=n, features=self.features[:n], ring=NEAR_1)
            model.load_state_dict(self.model.state_dict())
            catalog = dataclasses.replace(self.catalog, asins=IDS[:n], metadata=self.catalog.metadata[:n])
            write_export(folder, model, catalog, max_len=MAX_LEN, quantize=kind, use_img_encoder=True)
        return Recommender.from_pretrained(folder, engine, threads=1)

    def scores(self, history: list[int]) -> np.ndarray:
        """What the model itself gives each item, [N+1], after a history that it reads whole."""
        tokens = torch.tensor(history or [0])
        with torch.no_grad():
            table = self.model.item_table()
            return (table @ self.model.encode(table[tokens], torch.arange(len(tokens)), len(tokens))[-1]).numpy()


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    return request.param


@pytest.fixture
def r(shop, engine) -> Recommender:
    """The export in float32, opened anew."""
    return shop.open(engine)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def write_shop_of_ids(folder: Path, shop: Shop, ids: list[str]) -> Path:
    """An export whose items have these ids."""
    model = random_model((4,), num_items=len(ids))
    catalog = dataclasses.replace(shop.catalog, asins=ids, metadata=shop.catalog.metadata[: len(ids)])
    return write_export(folder, model, catalog)


def write_id_branch(folder: Path) -> Path:
    """An export whose item table was learned outright."""
    return write_export(folder, random_model((4, 12), num_items=N), max_len=MAX_LEN)


# The histories of two engines or of two ways to the same state are summed in another order; in eight bits that can
# move an activation by one of its 127 steps.
SAME = {"none": 1e-5, "float16": 1e-5, "int8": 5e-3}


def assert_same_answer(actual, expected, tolerance=1e-5):
    """The same scores up to `tolerance` times the largest, of the same items but where their scores are that close."""
    unit = tolerance * np.abs(expected.scores).max()
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=0, atol=unit)
    of_item = dict(zip(expected.numbers, expected.scores, strict=True))
    for item, score in zip(actual.numbers[:-1], actual.scores, strict=False):  # the last may be a tie with the next
        assert score == pytest.approx(of_item[item], abs=2 * unit)


def everything(r: Recommender, history, **options):
    """The ranking of all items after a history."""
    [answer] = r.recommend([history], **{"top_k": len(r), "exclude_history": False} | options)
    return answer


# --------------------------------------------------------------------------------------------------------- the answer


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


# ------------------------------------------------------------------------------------------------------ naming items


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


# ---------------------------------------------------------------------------------------------------- event by event


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


# --------------------------------------------------------------------------------------------------------- new items


def test_items_that_are_added_can_be_recommended_and_be_in_histories_at_once(shop, engine):
    r = shop.first(engine, "none", 16)
    state = r.start([2])
    r.add_items(["NEW-1", "new 2"], shop.features[16:18], ["First", "Second"])
    assert len(r) == 18
    answer = everything(r, ["NEW-1", 18])
    assert sorted(answer.numbers) == list(range(1, 19))
    titles = dict(zip(answer.ids, answer.titles, strict=True))
    assert (titles["NEW-1"], titles["new 2"], titles[IDS[4]]) == ("First", "Second", shop.records[4]["title"])
    assert r.step(state, "new 2").items == (2, 18)
    assert everything(r, [], candidates=["NEW-1"], top_k=1).ids == ["NEW-1"]


@pytest.mark.parametrize("pieces", [[4], [1, 3], [1, 1, 1, 1]], ids=str)
def test_adding_items_is_exporting_a_catalogue_that_has_them(shop, engine, kind, pieces):
    r, whole = shop.first(engine, kind, N - 4), shop.open(engine, kind)
    start = N - 4
    for piece in pieces:
        end = start + piece
        r.add_items(IDS[start:end], shop.features[start:end], [x["title"] for x in shop.records[start:end]])
        start = end
    np.testing.assert_allclose(r._table.rows(), whole._table.rows(), rtol=1e-5 if kind == "none" else 0, atol=1e-6)
    histories = [[3, 17, 3, 20, 1], [18], []]
    for ask in (lambda r: histories, lambda r: [r.start(history) for history in histories]):
        answers = [x.recommend(ask(x), top_k=N, exclude_history=False) for x in (r, whole)]
        for grown, expected in zip(*answers, strict=True):
            assert_same_answer(grown, expected, 1e-5)
            assert (grown.ids, grown.titles) == (expected.ids, expected.titles)


def test_an_item_that_is_added_to_a_float16_export_is_rounded_as_the_others_are(shop, engine):
    r, exact = (shop.first(engine, kind, 16) for kind in ("float16", "none"))
    for x in (r, exact):
        x.add_items(["NEW"], shop.features[16:17])
    rows = [x._table.rows()[-1] for x in (r, exact)]
    np.testing.assert_array_equal(rows[0], rows[1].astype(np.float16))
    assert (rows[0] != rows[1]).any()


def test_items_without_titles_have_empty_ones(shop, engine):
    r = shop.first(engine, "none", 16)
    r.add_items(["NEW"], shop.features[16:17])
    assert everything(r, [], candidates=["NEW", 1], top_k=2).titles.count("") == 1


def test_no_items_can_be_added_too(shop, engine):
    r = shop.first(engine, "none", 16)
    before = everything(r, [3])
    r.add_items([], r.embed_items([]))
    assert everything(r, [3]) == before


NEW = ["NEW-1", "NEW-2"]
MATRIX = np.ones((2, 1264), dtype=np.float32)


@pytest.mark.parametrize(
    ("ids", "features", "titles", "message"),
    [
        (["NEW", "NEW"], MATRIX, None, "item id 'NEW' stands twice; ids must be unique"),
        (["NEW", IDS[4]], MATRIX, None, f"item '{IDS[4]}' is there already; remove it from the new ones"),
        (NEW, MATRIX[:, 1:], None, r"features of shape \[2, 1263\] for 2 items: must be \[2, 1264\]"),
        (NEW, MATRIX[:1], None, r"features of shape \[1, 1264\] for 2 items: must be \[2, 1264\]"),
        (NEW, MATRIX[0], None, r"features of shape \[1264\] for 2 items"),
        (NEW, MATRIX * [[1], [np.nan]], None, "the features of item 'NEW-2' are not finite, or far too large"),
        (NEW, MATRIX * [[np.inf], [1]], None, "the features of item 'NEW-1' are not finite, or far too large"),
        (NEW, MATRIX, ["one"], "1 titles for 2 items; give one a piece"),
        (["NEW", ""], MATRIX, None, "item id '' must be a text of 1 to 256 bytes"),
        (["NEW", "a\0"], MATRIX, None, "must be a text of 1 to 256 bytes in UTF-8 without NUL"),
        (["NEW", "ü" * 129], MATRIX, None, "must be a text of 1 to 256 bytes"),
        (["NEW", "a\udce9"], MATRIX, None, "must be a text of 1 to 256 bytes in UTF-8"),
        (["NEW", 7], MATRIX, None, "item id 7 must be a text"),
        (NEW, MATRIX, ["one", None], "the title of item 'NEW-2' is None; give a text"),
        (NEW, MATRIX, "ab", "titles must be a list such as"),
        (NEW, [["a"] * 1264] * 2, None, "features must be an array of numbers"),
        (NEW, [[1.0], [1.0, 2.0]], None, "features must be an array of numbers"),
        ("XY", MATRIX, None, r"ids must be a list such as \['id', 'id'\], not 'XY'"),
    ],
)
def test_items_that_cannot_be_added_are_refused_and_nothing_is_changed(shop, r, ids, features, titles, message):
    before, state = everything(r, [3, 17]), r.start([3])
    with pytest.raises(InputError, match=message):
        r.add_items(ids, features, titles)
    assert len(r) == N
    assert everything(r, [3, 17]) == before
    assert r.recommend([["NEW"]], top_k=1)[0].notes[0].startswith("unknown: 'NEW' (of 20 items)")
    r.add_items(["NEW"], shop.features[:1])  # nothing of it stayed behind
    assert r.step(state, "NEW").items == (3, N + 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kind", "large"), [("none", 3e38), ("float16", 1e6), ("int8", 3e38)])
def test_features_whose_embedding_overflows_are_refused(shop, engine, kind, large):
    r = shop.open(engine, kind)
    with pytest.raises(InputError, match="the features of item 'NEW' are not finite, or far too large"):
        r.add_items(["NEW"], np.full((1, 1264), large, dtype=np.float32))
    assert len(r) == N


def test_items_cannot_be_added_to_a_table_that_was_learned_without_features(engine, tmp_path):
    r = Recommender.from_pretrained(write_id_branch(tmp_path / "learned"), engine)
    with pytest.raises(InputError, match="learned without features, so items cannot be added"):
        r.add_items(["NEW"], np.ones((1, 12), dtype=np.float32))
    assert len(r.recommend([[3]], top_k=3)[0].ids) == 3


# -------------------------------------------------------------------------------------------------- saved and opened


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_grew_is_the_same_after_saving_and_opening(shop, engine, kind, tmp_path):
    r = shop.first(engine, kind, 16)
    r.add_items(IDS[16:], shop.features[16:], [f"Title {i}" for i in range(4)])
    if (engine, kind) == ("torch", "int8"):
        with pytest.raises(InputError, match="eight bits as float32; save it from engine='onnx'"):
            r.save_pretrained(tmp_path / "saved")
        assert not list(tmp_path.iterdir())
        return
    r.save_pretrained(tmp_path / "saved")
    for name in ENGINES:
        opened = Recommender.from_pretrained(tmp_path / "saved", name, threads=1)
        assert (len(opened), opened.config["num_items"], opened.config["quantize"]) == (N, N, kind)
        for history in ([], [3, 17, 20], opened.start([3, 17, 20])):
            given = r.start(history.items) if isinstance(history, recommender.State) else history
            expected, answer = everything(r, given), everything(opened, history)
            assert_same_answer(answer, expected, 1e-5 if name == engine else 0.05 if kind == "int8" else 1e-5)
            assert dict(zip(answer.ids, answer.titles, strict=True)) == dict(
                zip(expected.ids, expected.titles, strict=True)
            )
        stored = opened._table.rows() if (name, kind) != ("torch", "int8") else r._table.rows()
        np.testing.assert_array_equal(stored, r._table.rows())


def test_a_float16_export_is_saved_in_float16(shop, engine, tmp_path):
    r = shop.open(engine, "float16")
    r.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/items.safetensors").read_bytes() == (
        shop.export("float16") / "items.safetensors"
    ).read_bytes()


def test_a_model_can_be_added_to_saved_and_opened_again_and_again(shop, engine, tmp_path):
    r = shop.first(engine, "float16", 16)
    for i in range(16, N):
        r.add_items([IDS[i]], shop.features[i : i + 1], [shop.records[i]["title"]])
        r.save_pretrained(tmp_path / "saved", overwrite=True)
        r = Recommender.from_pretrained(tmp_path / "saved", engine, threads=1)
    answer, expected = everything(r, [18, 3]), everything(shop.open(engine, "float16"), [18, 3])
    assert_same_answer(answer, expected)
    assert answer.titles == expected.titles


def test_saving_does_not_replace_a_folder_unless_it_is_told_to(shop, r, tmp_path):
    r.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="exists; overwrite it"):
        r.save_pretrained(tmp_path / "saved")
    r.save_pretrained(tmp_path / "saved", overwrite=True)


def test_an_export_without_graphs_is_saved_without(shop, tmp_path):
    r = Recommender.from_pretrained(shop.export("none", format="torch"))
    r.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.onnx"))
    assert everything(Recommender.from_pretrained(tmp_path / "saved"), [3]) == everything(r, [3])


# -------------------------------------------------------------------------------------- a folder that was replaced


@pytest.fixture
def replaced(shop, engine, tmp_path):
    """(a recommender, its folder, a function that replaces it by another model's of the same shape)."""
    folder, seeds = tmp_path / "export", iter(range(1, 10))

    def replace():
        model = random_model((4, 12), features=shop.features, num_items=N, seed=next(seeds))
        write_export(folder, model, overwrite=True)

    replace()
    return Recommender.from_pretrained(folder, engine, threads=1), folder, replace


def test_a_model_that_is_open_does_not_need_its_folder(replaced):
    r, folder, replace = replaced
    before, stepped = everything(r, [3]), r.recommend([r.start([3])])
    replace()
    assert (everything(r, [3]), r.recommend([r.start([3])])) == (before, stepped)
    shutil.rmtree(folder)
    assert (everything(r, [3]), r.recommend([r.start([3])])) == (before, stepped)


def test_a_model_that_is_opened_before_its_graphs_are_used_does_not_need_its_folder(replaced):
    r, folder, replace = replaced
    expected = Recommender.from_pretrained(folder, "torch")
    replace()
    assert_same_answer(everything(r, [3]), everything(expected, [3]))
    assert_same_answer(everything(r, r.start([3])), everything(expected, [3]))


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_a_model_that_is_open_is_not_changed_by_writing_over_its_files(replaced, tmp_path, engine):
    r, folder, _ = replaced
    before = everything(r, r.start([3]))
    other = write_export(tmp_path / "other", random_model((4, 12), num_items=N, seed=20))
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert everything(r, r.start([3])) == before


def test_a_folder_that_is_replaced_while_it_is_opened_is_refused(replaced, engine, monkeypatch):
    _, folder, replace = replaced

    def slowly(*arguments, open_engine=recommender.open_engine):
        replace()
        return open_engine(*arguments)

    monkeypatch.setattr(recommender, "open_engine", slowly)
    with pytest.raises(InputError, match="export was replaced while it was opened; open it again"):
        Recommender.from_pretrained(folder, engine)


def test_a_model_whose_folder_was_replaced_is_not_saved_with_the_others_weights(replaced, tmp_path):
    r, _, replace = replaced
    replace()
    with pytest.raises(InputError, match="changed since it was opened; open it again"):
        r.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_whose_folder_is_gone_cannot_be_saved(replaced, tmp_path):
    r, folder, _ = replaced
    shutil.rmtree(folder)
    with pytest.raises(InputError):
        r.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_model_may_be_saved_over_the_folder_it_came_from(shop, replaced):
    r, folder, _ = replaced
    r.add_items(["NEW"], shop.features[:1])
    r.save_pretrained(folder, overwrite=True)
    opened = Recommender.from_pretrained(folder)
    assert len(opened) == N + 1
    assert_same_answer(everything(opened, ["NEW"]), everything(r, ["NEW"]))
    r.step(r.start(), "NEW")


# -------------------------------------------------------------------------------------------------------- embedding


class Frame:
    """As a pandas data frame: a record of every row, NaN where a cell is empty."""

    def __init__(self, records: list[dict]) -> None:
        self.rows = records

    def to_dict(self, orient: str) -> list[dict]:
        assert orient == "records"
        columns = dict.fromkeys(name for record in self.rows for name in record)
        return [{name: record.get(name, float("nan")) for name in columns} for record in self.rows]


def test_products_are_embedded_as_the_training_embedded_them(shop, r):
    np.testing.assert_array_equal(r.embed_items(shop.records).astype(np.float16), shop.features)


def test_a_data_frame_is_read_row_by_row(shop, r):
    np.testing.assert_array_equal(r.embed_items(Frame(shop.records)).astype(np.float16), shop.features)


def test_a_product_that_is_embedded_and_added_scores_as_the_one_it_is(shop, engine):
    r = shop.first(engine, "none", 16)
    r.add_items(IDS[16:], r.embed_items(shop.records[16:]))
    assert_same_answer(everything(r, [3, 18]), everything(shop.open(engine), [3, 18]), HALF)


def test_a_product_is_described_by_what_it_has(shop, r):
    title_alone = {"title": shop.records[1]["title"], "picture": Path(shop.records[1]["picture"]), "colour": "red"}
    text, picture = np.split(r.embed_items([title_alone]), [1024], axis=1)
    np.testing.assert_array_equal(picture[0].astype(np.float16), shop.features[1, 1024:])
    assert 0.1 < text[0] @ shop.features[1, :1024] < 0.95


@pytest.mark.parametrize("nothing", [None, float("nan"), "", np.nan], ids=repr)
def test_a_product_without_picture_has_zeros_for_it_as_in_training(shop, r, nothing):
    records = [shop.records[0], shop.records[1] | {"picture": nothing}]
    embedded = r.embed_items(records)
    np.testing.assert_array_equal(embedded[0].astype(np.float16), shop.features[0])
    np.testing.assert_array_equal(embedded[1, :1024].astype(np.float16), shop.features[1, :1024])
    assert not embedded[1, 1024:].any()


def test_a_product_with_a_picture_alone_has_the_text_of_an_unknown_item_as_in_training(shop, r):
    [embedded] = r.embed_items([{"picture": shop.records[4]["picture"]}])
    np.testing.assert_array_equal(embedded[1024:].astype(np.float16), shop.features[4, 1024:])
    np.testing.assert_array_equal(embedded[:1024], LexicalEncoder().encode([NO_TEXT])[0])


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"title": " "},
        {"title": None, "price": float("nan")},
        {"colour": "red"},
        {"title": None, "picture": float("nan")},  # as a data frame has it
    ],
)
def test_a_product_without_text_is_refused_with_what_a_text_is_made_of(shop, r, record):
    with pytest.raises(InputError, match="record 2 has no text; give it one of title, price, brand, categories"):
        r.embed_items([shop.records[0], record])


def test_a_picture_that_cannot_be_read_is_refused_with_the_reason(shop, r, tmp_path):
    (tmp_path / "broken.png").write_text("<html>404</html>")
    draw_picture(tmp_path / "good.png", (9, 9, 9))
    for name in ("broken.png", "missing.png"):
        records = [{"title": "a", "picture": tmp_path / "good.png"}, {"title": "b", "picture": str(tmp_path / name)}]
        with pytest.raises(
            InputError, match=rf"the picture of record 2 cannot be read \({name}: .*give another, or none"
        ):
            r.embed_items(records)


@pytest.mark.parametrize("records", [["a lamp"], [{"title": "a"}, None], {"title": "a"}], ids=repr)
def test_what_is_no_list_of_records_is_refused(r, records):
    with pytest.raises(InputError, match=r"record [12] is .*; give a dict with title, brand"):
        r.embed_items(records)
    with pytest.raises(InputError, match=r"record 2 is None; give"):
        r.embed_items([{"title": "a"}, None])


@pytest.mark.parametrize("records", ["a lamp", None, 3], ids=repr)
def test_what_is_no_list_of_products_is_refused(r, records):
    with pytest.raises(InputError, match="products must be a list such as"):
        r.embed_items(records)


def test_without_the_packages_of_the_training_embedding_is_refused_with_what_to_install(r, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets.embedding", None)
    with pytest.raises(InputError, match=r"embedding needs what training needs .*pip install -r requirements.txt"):
        r.embed_items([{"title": "a"}])


def test_no_products_have_no_features_but_their_width(r):
    assert r.embed_items([]).shape == (0, 1264)


def test_a_model_that_reads_pictures_alone_needs_no_text(shop, engine, tmp_path):
    model = random_model((4,), num_items=N, features=shop.features[:, 1024:])
    folder = write_export(tmp_path / "pictures", model, shop.catalog, use_language_encoder=False, use_img_encoder=True)
    embedded = Recommender.from_pretrained(folder, engine).embed_items([{"picture": shop.records[0]["picture"]}])
    np.testing.assert_array_equal(embedded.astype(np.float16), shop.features[:1, 1024:])


def test_a_model_that_reads_texts_alone_leaves_pictures_closed(shop, engine, tmp_path):
    model = random_model((4,), num_items=N, features=shop.features[:, :1024])
    r = Recommender.from_pretrained(write_export(tmp_path / "texts", model, shop.catalog), engine)
    embedded = r.embed_items([shop.records[0] | {"picture": "no such.png"}])
    np.testing.assert_array_equal(embedded.astype(np.float16), shop.features[:1, :1024])
    with pytest.raises(InputError, match="record 1 has no text"):
        r.embed_items([{"picture": shop.records[0]["picture"]}])


def test_a_text_is_made_of_the_attributes_that_the_model_was_trained_on(shop, engine, tmp_path):
    model = random_model((4,), num_items=N, features=shop.features[:, :1024])
    folder = write_export(tmp_path / "brands", model, shop.catalog, item_attributes=("brand", "title"))
    embed = Recommender.from_pretrained(folder, engine).embed_items
    plain = embed([{"brand": "Alder", "title": "Red lamp"}])
    np.testing.assert_array_equal(plain, LexicalEncoder().encode(["Brand: Alder Title: Red lamp"]))
    np.testing.assert_array_equal(embed([{"title": "Red lamp", "price": 1, "brand": "Alder"}]), plain)
    with pytest.raises(InputError, match="has no text; give it one of brand, title"):
        embed([{"price": 1}])


def test_a_model_that_read_no_features_embeds_nothing(engine, tmp_path):
    r = Recommender.from_pretrained(write_id_branch(tmp_path / "learned"), engine)
    with pytest.raises(InputError, match="this model read no features, so there is nothing to embed"):
        r.embed_items([{"title": "a"}])


@pytest.fixture(scope="module")
def with_bert(shop, tmp_path_factory):
    """(folder, an export of a model whose texts a small BERT in this folder read, its features of the products)."""
    root = tmp_path_factory.mktemp("bert")
    bert = write_tiny_bert(root / "bert", {"pooling_mode_mean_tokens": True})
    features = item_features(
        shop.catalog, language=str(bert), image=None, attributes=ATTRIBUTES, cache_root=root, say=lambda _: None
    )
    model = random_model((4,), num_items=N, features=features)
    return root, write_export(root / "export", model, shop.catalog, language_encoder=str(bert)), features


def test_the_encoder_of_the_training_is_found_where_it_lay(shop, with_bert):
    _, export, features = with_bert
    np.testing.assert_allclose(
        Recommender.from_pretrained(export).embed_items(shop.records), features, rtol=HALF, atol=1e-6
    )


def test_an_encoder_that_moved_is_taken_where_it_lies_now(shop, with_bert, tmp_path):
    root, export, features = with_bert
    moved = (root / "bert").rename(tmp_path / "elsewhere")
    r = Recommender.from_pretrained(export)
    try:
        with pytest.raises(InputError):
            r.embed_items(shop.records)
        embedded = r.embed_items(shop.records, language_encoder=str(moved))
    finally:
        moved.rename(root / "bert")
    np.testing.assert_allclose(embedded, features, rtol=HALF, atol=1e-6)


@pytest.mark.parametrize("other", ["lexical", "another bert", "another pooling"])
def test_an_encoder_that_is_not_the_one_of_the_training_is_refused(shop, with_bert, tmp_path, other):
    root, export, _ = with_bert
    pooling = {"pooling_mode_cls_token" if other == "another pooling" else "pooling_mode_mean_tokens": True}
    seed = 1 if other == "another bert" else 0
    name = other if other == "lexical" else str(write_tiny_bert(tmp_path / "bert", pooling, seed))
    with pytest.raises(InputError) as raised:
        Recommender.from_pretrained(export).embed_items(shop.records, language_encoder=name)
    message = str(raised.value)
    assert message.startswith(f"the encoder {name!r} is not {str(root / 'bert')!r}, which the model was trained on")
    assert message.endswith("give the path of that one as language_encoder")


def test_a_picture_encoder_that_is_not_the_one_of_the_training_is_refused(shop, r):
    with pytest.raises(InputError, match=r"the encoder 'ViT-B-32/openai' is not 'pixel'.* as img_encoder"):
        r.embed_items(shop.records, img_encoder="ViT-B-32/openai")


def test_an_encoder_of_the_hub_is_read_at_the_commit_of_training(shop, engine, tmp_path, hub):
    pooling = {"pooling_mode_mean_tokens": True}
    put_in_hub_cache(hub, "org/tiny", "a" * 40, write_tiny_bert(tmp_path / "one", pooling, seed=1))
    features = item_features(
        shop.catalog, language="org/tiny", image=None, attributes=("title",), cache_root=tmp_path, say=lambda _: None
    )
    model = random_model((4,), num_items=N, features=features)
    folder = write_export(
        tmp_path / "export", model, shop.catalog, language_encoder="org/tiny", item_attributes=("title",)
    )
    r = Recommender.from_pretrained(folder, engine)
    np.testing.assert_allclose(r.embed_items(shop.records), features, rtol=HALF, atol=1e-6)
    put_in_hub_cache(hub, "org/tiny", "b" * 40, write_tiny_bert(tmp_path / "two", pooling, seed=2))
    np.testing.assert_allclose(r.embed_items(shop.records), features, rtol=HALF, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- without torch


def test_a_server_of_an_onnx_export_loads_neither_torch_nor_anything_else_of_the_training(shop, tmp_path):
    serve = (
        "import sys; import numpy as np\n"
        "from model import Recommender\n"
        "r = Recommender.from_pretrained(sys.argv[1])\n"
        "state = r.step(r.start(), 3)\n"
        "a, b = r.recommend([[3], state], top_k=3)\n"
        "assert a.ids == b.ids, (a, b)\n"
        "r.add_items(['NEW'], np.ones((1, 1264)))\n"
        "assert 'NEW' in r.recommend([[]], top_k=21)[0].ids\n"
        "r.save_pretrained(sys.argv[2])\n"
        "heavy = ('torch', 'transformers', 'pandas', 'matplotlib', 'onnx', 'open_clip', 'PIL')\n"
        "print(*a.ids, *(name for name in heavy if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", serve, str(shop.export("float16")), str(tmp_path / "saved")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == shop.open("onnx", "float16").recommend([[3]], top_k=3)[0].ids


def test_an_encoder_whose_folder_is_gone_is_named(shop, engine, tmp_path):
    bert = write_tiny_bert(tmp_path / "bert", {"pooling_mode_mean_tokens": True})
    features = item_features(
        shop.catalog, language=str(bert), image=None, attributes=("title",), cache_root=tmp_path, say=lambda _: None
    )
    model = random_model((4,), num_items=N, features=features)
    settings = {"language_encoder": str(bert), "item_attributes": ("title",)}
    folder = write_export(tmp_path / "export", model, shop.catalog, **settings)
    bert.rename(tmp_path / "moved")
    r = Recommender.from_pretrained(folder, engine)
    with pytest.raises(
        InputError, match="bert' is not there any more; give the folder it is in now as language_encoder"
    ):
        r.embed_items(shop.records)
    moved = r.embed_items(shop.records, language_encoder=str(tmp_path / "moved"))
    np.testing.assert_allclose(moved, features, rtol=HALF, atol=1e-6)
