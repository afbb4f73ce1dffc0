"""Answers of a Recommender, in Python and over HTTP."""

import asyncio
import base64
import dataclasses
import gc
import itertools
import sys
import weakref

import numpy as np
import pytest

from common.errors import InputError
from serving import Recommender, http, ranking, recommender, torch_engine
from serving.batching import Batcher
from serving.metrics import Metrics
from serving.states import State
from tests.made_up import IDS, SAME, N, assert_same_answer, everything, made_up_catalog, random_model, write_export

LONG = [3, 17, 5, 9, 1, 4, 20, 2]  # longer than the shop's histories of training, 5


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


@pytest.mark.parametrize("scores_at_once", [1, 2 * (N + 1)])
def test_answers_come_in_the_order_of_the_histories_also_from_several_batches(r, monkeypatch, scores_at_once):
    histories = [[5, 2, 9], [], r.start([8]), [1], [7, 7, 7, 7, 7], r.start([3, 1]), LONG, [9]]
    expected, asked, true = [r.recommend([history], top_k=8)[0] for history in histories], [], recommender.ranked
    monkeypatch.setattr(recommender, "ranked", lambda *given: asked.append(len(given[1])) or true(*given))
    monkeypatch.setattr(ranking, "SCORES", scores_at_once)
    monkeypatch.setattr(torch_engine, "CHUNK", 3)
    for actual, answer in zip(r.recommend(histories, top_k=8), expected, strict=True):
        assert_same_answer(actual, answer)
    assert max(asked) == max(scores_at_once // (N + 1), 1)


def test_the_last_items_of_a_long_history_are_read_and_all_are_excluded(r):
    long, tail = everything(r, LONG), everything(r, LONG[-5:])
    assert long.notes == ["the last 5 of 8 items are read, as in training"]
    assert dataclasses.replace(long, notes=[]) == tail
    [answer] = r.recommend([["no", *LONG[:5], "no"]])  # unknown items do not count
    assert answer.notes == ["unknown: 'no', 'no' (of 20 items); skipped"]
    [answer] = r.recommend([LONG], top_k=N - 8)
    assert answer.numbers == [i for i in tail.numbers if i not in LONG]


def test_a_user_with_too_few_items_left_gets_fewer_and_a_note_and_the_others_all(r):
    histories = [[1, 2, 3], list(range(1, 9)), r.start([4]), r.start(range(1, N + 1))]
    answers = r.recommend(histories, top_k=np.int64(13))
    assert [len(answer.ids) for answer in answers] == [13, 12, 13, 0]
    assert answers[0].notes == [] and answers[1].notes[-1] == "only 12 items are left to rank, fewer than top_k 13"
    assert_same_answer(answers[1], r.recommend([histories[1]], top_k=12)[0])


def scores_of(answer):
    return dict(zip(answer.numbers, answer.scores, strict=True))


FEW, MANY = [IDS[7], 2], [IDS[7], 2, 19, 2, 5, 11]  # ranked from gathered rows, and from the whole table


@pytest.mark.parametrize("candidates", [FEW, MANY], ids=len)
def test_only_candidates_are_ranked_with_the_scores_of_the_whole_ranking(shop, engine, kind, candidates):
    r = shop.open(engine, kind)
    numbers = {r.items.number(item) for item in candidates}
    for history in ([3, 9], [], r.start([3, 9])):
        best = {i: score for i, score in scores_of(everything(r, history)).items() if i in numbers}
        [answer] = r.recommend([history], top_k=len(numbers), candidates=candidates)
        assert answer.numbers == list(best) and answer.notes == []
        np.testing.assert_allclose(answer.scores, list(best.values()), rtol=SAME[kind])


@pytest.mark.parametrize(("kind", "index"), [("none", None), ("float16", "int8"), ("int8", None)])
def test_the_history_bias_is_added_to_items_of_the_history_that_may_be_recommended(engine, kind, index, tmp_path):
    model = random_model((4, 12), num_items=N, history_bias=(3.0, 0.7))
    folder = write_export(tmp_path / "e", model, quantize=kind, index=index)
    r, plain = (Recommender.from_pretrained(folder, engine) for _ in range(2))
    assert plain.config.pop("history_bias") == pytest.approx(0.7)
    ways = {}, {"boost": np.linspace(-1, 1, N)}, {"candidates": [3, 9]}, {"candidates": [*range(2, 16)]}
    histories = ([3, 9, 17, 3], {3, 9, 17}), ([], set()), (r.start([9, 4]), {9, 4})
    for bias, options, (history, read) in itertools.product((0.7, -4.0), ways, histories):
        r.config["history_bias"] = bias
        whole = scores_of(everything(plain, history, **options))
        scores = {i: score + bias * (i in read) for i, score in whole.items()}
        best = sorted(scores, key=lambda i: -scores[i])[:5]
        answer = everything(r, history, top_k=5, **options)
        assert answer.numbers == best
        np.testing.assert_allclose(answer.scores, [scores[i] for i in best], rtol=SAME[kind], atol=SAME[kind])
        excluded = (everything(each, history, exclude_history=True, **options) for each in (r, plain))
        assert len({tuple(answer.scores) for answer in excluded}) == 1
    r.remove_items([9])
    assert 9 not in everything(r, [3, 9]).numbers


def test_each_history_may_have_candidates_of_its_own(r):
    histories, own = [[3], r.start([2]), [2], [5]], [[1, 2], MANY, [2], ["no", 5, 6]]
    answers = r.recommend(histories, top_k=2, candidates=own)
    for history, candidates, answer in list(zip(histories, own, answers, strict=True))[:2]:
        assert_same_answer(answer, r.recommend([history], top_k=2, candidates=candidates)[0])
    assert (answers[2].numbers, answers[2].notes) == ([], ["only 0 items are left to rank, fewer than top_k 2"])
    assert set(answers[3].numbers) == {6}
    assert answers[3].notes[0] == "candidates unknown: 'no' (of 20 items); skipped"
    with pytest.raises(InputError, match="2 lists of candidates for 4 histories; give one for each"):
        r.recommend(histories, candidates=own[:2])


@pytest.mark.parametrize("chosen", [FEW, MANY, np.arange(N) % 2 == 0, [True] * 3], ids=str)
def test_a_filter_answers_as_its_candidates_do_gathered_or_not(r, chosen, monkeypatch):
    items = r.filter(chosen)
    numbers = [r.items.number(i) for i in chosen] if isinstance(chosen[0], str) else np.flatnonzero(chosen) + 1
    for history in ([3], [9, 1]):
        expected = r.recommend([history], candidates=numbers)
        assert r.recommend([history], candidates=items) == expected
    monkeypatch.setattr(ranking, "FEW", 1)  # gather all of them
    assert_same_answer(r.recommend([[9, 1]], candidates=numbers)[0], expected[0])


def test_a_filter_follows_the_catalogue_and_keeps_no_former_one_in_memory(shop, engine):
    r = shop.first(engine, "none", 16)
    rule, boosted, former = r.filter(range(1, 7)), r.filter(boost=np.ones(16)), weakref.ref(r.items)
    for each in (rule, boosted):
        r.recommend([[3]], candidates=each)
    r.remove_items([2])
    r.add_items(["NEW"], shop.features[16:17])
    gc.collect()
    assert former() is None
    assert sorted(everything(r, [], candidates=rule).numbers) == [1, 3, 4, 5, 6]
    plain, raised = (scores_of(everything(r, [3], candidates=each)) for each in (None, boosted))
    assert raised == pytest.approx({i: score + (i != 17) for i, score in plain.items()}, abs=1e-4)  # 17: added later


@pytest.mark.parametrize("candidates", [None, FEW, MANY, [MANY]], ids=str)
def test_boosts_are_added_to_the_scores(shop, engine, kind, candidates):
    r, boost = shop.open(engine, kind), np.linspace(-3, 3, N)
    for history in ([3, 9], [], r.start([3, 9])):
        plain = scores_of(everything(r, history, candidates=candidates))
        boosted = everything(r, history, candidates=candidates, boost=boost)
        expected = {i: score + boost[i - 1] for i, score in plain.items()}
        assert scores_of(boosted) == pytest.approx(expected, abs=SAME[kind] * max(map(abs, expected.values())))
        assert boosted.scores == sorted(boosted.scores, reverse=True)


def test_an_invalid_argument_is_refused(r):
    for ask, problem in (
        (lambda: r.recommend([[]], top_k=0), "top_k 0 must be a whole number from 1"),
        (lambda: r.recommend([[]], top_k=True), "top_k True must be a whole number from 1"),
        (lambda: r.recommend([[]], top_k=10**5000), "top_k .* must be a whole number from 1"),
        (lambda: r.recommend(r.start()), "histories must be a list such as"),
        (lambda: r.recommend("Q0"), r"histories must be a list such as \[.*'id', 'id'\].*, not 'Q0'"),
        (lambda: r.recommend([{"Q0": 1}]), r"each of the histories must be a list such as \['id', 'id'\], not {"),
        (lambda: r.start(7), r"a history must be a list such as \['id', 'id'\], not 7"),
        (lambda: r.recommend([[]], candidates="Q0"), r"candidates must be a list such as \['id', 'id'\], or a list"),
        (lambda: r.recommend([[1]], candidates=["no", 99]), "no candidate is known, so there is nothing to rank"),
        (lambda: r.filter([True] * (N + 1)), "a mask must have a truth value for each of at most 20 items"),
        (lambda: r.filter([False, []]), "a mask must have a truth value for each of at most 20 items"),
        (lambda: r.filter(boost=np.ones(N + 1)), "boost must be an array of at most 20 numbers"),
        (lambda: r.filter(boost=[np.inf]), "boost must be finite; leave items out by a mask"),
        (lambda: r.filter("Q0"), r"items must be a list such as \["),
        (lambda: r.recommend([[1]], candidates=r.filter([1]), boost=[1]), "candidates is a filter, so give"),
    ):
        with pytest.raises(InputError, match=problem):
            ask()


def test_a_users_vector_times_an_items_vector_is_the_score(shop, engine, kind):
    r, histories = shop.open(engine, kind), [[3, 17], [], [9, 1, 4, 20, 2, 7, 3], ["no", 5]]
    users, items = r.user_vectors(histories), r.item_vectors()
    assert users.dtype == items.dtype == np.float32 and items.shape == (N, 12)
    np.testing.assert_array_equal(r.item_vectors([IDS[4], 2]), items[[4, 1]])
    # onnxruntime rounds a user's vector of an int8 export to 63 steps a side.
    tolerance = 0.05 if (engine, kind) == ("onnx", "int8") else 1e-5
    for answer, scores in zip((everything(r, history) for history in histories), users @ items.T, strict=True):
        scores = scores[np.array(answer.numbers) - 1]
        np.testing.assert_allclose(scores, answer.scores, atol=tolerance * np.abs(scores).max())
    np.testing.assert_allclose(r.user_vectors([r.start([3, 17])]), users[:1], rtol=1e-2, atol=1e-2)
    assert r.user_vectors([]).shape == (0, 12)


def test_similar_items_have_the_largest_cosine(shop, engine, kind, monkeypatch):
    monkeypatch.setattr("serving.recommender.CHUNK", 7)
    r = shop.open(engine, kind)
    unit = r.item_vectors() / np.linalg.norm(r.item_vectors(), axis=1, keepdims=True)
    for number, answer in zip([4, 7], r.similar_items([4, IDS[6]], top_k=5), strict=True):
        cosine = unit @ unit[number - 1]
        cosine[number - 1] = -np.inf
        best = np.argsort(-cosine)[:5]
        assert answer.numbers == (best + 1).tolist() and answer.ids == [IDS[i] for i in best]
        np.testing.assert_allclose(answer.scores, cosine[best], rtol=1e-4)
    [among] = r.similar_items([4], candidates=r.filter([4, 1, 2]))
    assert sorted(among.numbers) == [1, 2] and among.notes == ["only 2 items are left to rank, fewer than top_k 10"]
    with pytest.raises(InputError, match="unknown: 'no'"):
        r.similar_items(["no"])


@pytest.mark.parametrize(
    "ids", [["4", "2", "x", "30"], ["Ü1", "ü", "日本"], ["a b", "a", "A", "x" * 256], ["42", "7", "1", "007"]]
)
def test_a_string_is_an_id_and_so_is_a_number_if_all_ids_are_whole_numbers(engine, tmp_path, ids):
    catalog = dataclasses.replace(made_up_catalog(len(ids)), asins=ids)
    folder = write_export(tmp_path / "export", random_model((4,), num_items=len(ids)), catalog)
    r = Recommender.from_pretrained(folder, engine)
    assert r.start(ids).items == tuple(range(1, len(ids) + 1))
    assert sorted(everything(r, []).ids) == sorted(ids)
    assert ids[0] in r and 1 in r and "3" not in r and 5 not in r and r.recommend([]) == []
    if ids[0] == "42":
        assert r.start([7, "7", np.int32(1), "007"]).items == (2, 2, 3, 4)
        assert r.recommend([[4, 42]])[0].notes[0] == "unknown: 4 (of 4 items); skipped"
    elif "2" in ids:
        assert r.start(np.array([2, 4])).items == (2, 4) == r.start(iter(["2", np.uint8(4)])).items


def test_unknown_items_are_skipped_five_are_named_and_alone_they_are_an_empty_history(r):
    unknown = ["", "a\0b", IDS[0] + "\0", IDS[0][:-1], max(IDS, key=len) + "g", "a\udce9", "1", "x" * 70, 0, N + 1]
    *answers, expected = r.recommend([*([3, item, 17] for item in unknown), [3, 17]])
    for item, answer in zip(unknown, answers, strict=True):
        assert answer.notes == [f"unknown: {item!r} (of 20 items); skipped"] and answer.unknown == 1
        assert dataclasses.replace(answer, notes=[], unknown=0) == expected  # which has no note
    [answer, empty, long] = r.recommend([[f"no{i}" for i in range(7)], [], ["9" * 1_000_000]])
    assert answer.notes[0] == "unknown: 'no0', 'no1', 'no2', 'no3', 'no4', ... (of 20 items); skipped"
    assert answer.notes[1] == "no item of the history is known: this is the answer for an empty history"
    assert dataclasses.replace(answer, notes=[], unknown=0) == empty
    assert long.notes[0].startswith("unknown: '99999") and len(long.notes[0]) < 200


@pytest.mark.parametrize("item", [True, np.bool_(True), np.float32(3), None, b"3", [3]], ids=repr)
def test_a_value_that_is_no_string_and_no_whole_number_is_refused(r, item):
    for ask in (lambda: r.recommend([[1, item]]), lambda: r.filter([2, item]), lambda: r.step(r.start(), item)):
        with pytest.raises(InputError, match=r"item .* must be an id \(a string\) or a number from 1 to 20"):
            ask()


# ----------------------------------------------------------------------------------------------------------------- http


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("http") / "export", random_model((4, 12), num_items=N))


@pytest.fixture(scope="module")
def client(export):
    """A client of the application on the export."""
    testclient = pytest.importorskip("fastapi.testclient", reason="the server needs the extra http")
    with testclient.TestClient(http.create_app(Recommender.from_pretrained(export))) as client:
        yield client


@pytest.mark.parametrize("history", [[], ["A3", 5]], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "exclude_history": False, "candidates": ["A1", "A3", "A9"]}])
def test_a_recommendation_is_that_of_the_recommender(client, export, history, options):
    [expected] = Recommender.from_pretrained(export).recommend([history], **options)
    answer = client.post("/recommend", json={"history": history} | options).raise_for_status().json()
    assert (answer["ids"], answer["titles"], answer["notes"]) == (expected.ids, expected.titles, expected.notes)
    assert answer["scores"] == pytest.approx(expected.scores, rel=1e-5)


def test_events_lead_to_a_state_and_similar_items_and_the_version_are_those_of_the_recommender(client, export):
    served, body = Recommender.from_pretrained(export), {}
    for item in ("A3", "A5"):
        body = client.post("/events", json={"item": item} | body).raise_for_status().json()
    assert State.from_bytes(base64.b64decode(body["state"])).items == (3, 5)
    assert client.post("/recommend", json=body).json()["ids"] == served.recommend([["A3", "A5"]])[0].ids
    answers = client.post("/similar", json={"items": ["A3", "A4"], "top_k": 2}).json()
    assert [answer["ids"] for answer in answers] == [answer.ids for answer in served.similar_items(["A3", "A4"], 2)]
    version = client.get("/version").json()
    assert version == version | {"model": served.model, "items": N, "status": "ok"} == client.get("/health").json()


def test_a_bad_request_is_refused_with_the_reason(client):
    for path, body, status, problem in (
        ("/recommend", {"history": "A3"}, 422, "valid list"),
        ("/recommend", {"history": [True]}, 422, "valid string"),
        ("/recommend", {"top_k": 1001}, 422, "less than or equal to 1000"),
        ("/recommend", {"history": ["A"] * 10_001}, 422, "at most 10000 items"),
        ("/recommend", {"topk": 3}, 422, "Extra inputs"),
        ("/recommend", {"state": "no base64"}, 400, "not base64"),
        ("/recommend", {"state": "AAAA"}, 400, "not a state of version 1"),
        ("/recommend", {"state": "AAAA", "history": ["A3"]}, 400, "a history or a state, not both"),
        ("/similar", {"items": ["no"]}, 400, "unknown: 'no'"),
        ("/events", {"item": "no"}, 400, "unknown: 'no' (of 20 items); the state is unchanged"),
        ("/recommend", {"history": ["A" * (1 << 20)]}, 413, "at most 1048576 bytes"),
        ("/nothing", {}, 404, "Not Found"),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == status and problem in answer.text
    for body, headers in ((iter([b"{}"]), {}), (b"{}", {"Transfer-Encoding": "chunked", "Content-Length": "2"})):
        assert client.post("/recommend", content=body, headers=headers).status_code == 413  # without its length
    without = client.build_request("POST", "/reload")
    del without.headers["Content-Length"]  # as curl -X POST sends it: no body
    assert client.send(without).json()["reloaded"] is False


def test_metrics_count_requests_seconds_and_unknown_ids(client):
    def counts():
        lines = client.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = counts()
    client.post("/recommend", json={"history": ["no", "A3", "nope"]})
    client.post("/recommend", json={"top_k": 0})
    client.post("/events", json={"item": "no"})
    change = {name: value - before.get(name, 0) for name, value in counts().items()}
    assert change["fmrlrec_unknown_ids_total"] == 3 and before["fmrlrec_items"] == N
    assert [change[f'fmrlrec_requests_total{{path="/recommend",status="{n}"}}'] for n in (200, 422)] == [1, 1]
    assert change['fmrlrec_request_seconds_count{path="/recommend"}'] == 2
    assert change['fmrlrec_request_seconds_bucket{path="/recommend",le="+Inf"}'] == 2


def test_a_replaced_export_is_served_after_reload(client, export):
    before = client.get("/version").json()["model"]
    assert client.post("/reload").json() == {"reloaded": False, "model": before}
    write_export(export, random_model((4, 12), num_items=N, seed=1), overwrite=True)
    state = client.post("/events", json={"item": "A3"}).json()["state"]
    answer = client.post("/reload").json()
    assert answer["reloaded"] and answer["model"] != before
    assert "encode the history again" in client.post("/recommend", json={"state": state}).json()["detail"]


def test_waiting_requests_are_answered_together_and_a_bad_one_fails_alone(export, monkeypatch):
    served, sizes = Recommender.from_pretrained(export), []
    recommend = served.recommend
    monkeypatch.setattr(served, "recommend", lambda asked, *rest: sizes.append(len(asked)) or recommend(asked, *rest))
    options = {"top_k": 3, "exclude_history": True, "candidates": None}
    some = options | {"candidates": ["A1", "A2"]}
    requests = [([1], options), ([2], options), ([3], options), ([1], some), ([2], some), ([None], options)]

    async def ask():
        batcher = Batcher(served, Metrics())
        asked = asyncio.gather(*(batcher.ask(*request) for request in requests), return_exceptions=True)
        await asyncio.sleep(0)
        task = asyncio.create_task(batcher.run())
        answers = await asked
        task.cancel()
        return answers

    *answers, refused = asyncio.run(ask())
    assert sizes == [4, 1, 1, 1, 1, 2]  # together, then each alone as one was refused, then those with candidates
    assert [answer.ids for answer in answers[:3]] == [recommend([[i]], 3)[0].ids for i in (1, 2, 3)]
    assert [answer.ids for answer in answers[3:]] == [["A2"], ["A1"]]
    assert isinstance(refused, InputError)


def test_without_fastapi_the_command_says_what_to_install(export, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(InputError, match=r"the server needs FastAPI and uvicorn .*pip install '.\[http\]'"):
        http.main([str(export)])
