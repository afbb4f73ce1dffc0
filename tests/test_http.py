"""The HTTP server: its answers, limits, counters and batches, and the benchmark that runs it in a process."""

import asyncio
import base64
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import server
from common.errors import InputError
from serving import Recommender, http
from serving.batching import Batcher
from serving.metrics import Metrics
from serving.states import State
from tests.exported import N, write_export
from tests.made_up import random_model

testclient = pytest.importorskip("fastapi.testclient", reason="the server needs the extra http")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("http") / "export", random_model((4, 12), num_items=N))


@pytest.fixture(scope="module")
def client(export):
    """A client of the application on the export."""
    with testclient.TestClient(http.create_app(Recommender.from_pretrained(export))) as client:
        yield client


@pytest.fixture(scope="module")
def r(export):
    return Recommender.from_pretrained(export)


def counts(client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.mark.parametrize(
    ("history", "options"),
    [
        ([], {}),
        (["A3", 5], {}),
        (["A3"], {"top_k": 3, "exclude_history": False}),
        (["A3"], {"candidates": ["A1", "A9"], "top_k": 2}),
    ],
)
def test_a_recommendation_is_that_of_the_recommender(client, r, history, options):
    [expected] = r.recommend([history], **options)
    answer = client.post("/recommend", json={"history": history} | options).raise_for_status().json()
    assert (answer["ids"], answer["titles"], answer["notes"]) == (expected.ids, expected.titles, expected.notes)
    assert answer["scores"] == pytest.approx(expected.scores, rel=1e-5)


def test_events_lead_to_the_state_of_the_history(client, r):
    body = {}
    for item in ("A3", "A5"):
        body = client.post("/events", json={"item": item} | body).raise_for_status().json()
    assert State.from_bytes(base64.b64decode(body["state"])).items == (3, 5)
    assert client.post("/recommend", json=body).json()["ids"] == r.recommend([["A3", "A5"]])[0].ids


def test_similar_items_and_the_version(client, r):
    answers = client.post("/similar", json={"items": ["A3", "A4"], "top_k": 2}).json()
    assert [answer["ids"] for answer in answers] == [answer.ids for answer in r.similar_items(["A3", "A4"], 2)]
    version = client.get("/version").json()
    assert version == version | {"model": r.model, "items": N, "status": "ok"} == client.get("/health").json()


@pytest.mark.parametrize(
    ("path", "body", "status", "problem"),
    [
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
    ],
)
def test_a_bad_request_is_refused_with_the_reason(client, path, body, status, problem):
    answer = client.post(path, json=body)
    assert answer.status_code == status and problem in answer.text


def test_a_body_without_its_length_is_refused(client):
    for body, headers in ((iter([b"{}"]), {}), (b"{}", {"Transfer-Encoding": "chunked", "Content-Length": "2"})):
        assert client.post("/recommend", content=body, headers=headers).status_code == 413


def test_metrics_count_requests_seconds_and_unknown_ids(client):
    before = counts(client)
    client.post("/recommend", json={"history": ["no", "A3", "nope"]})
    client.post("/recommend", json={"top_k": 0})
    client.post("/events", json={"item": "no"})
    change = {name: value - before.get(name, 0) for name, value in counts(client).items()}
    assert change["fmrlrec_unknown_ids_total"] == 3
    assert change['fmrlrec_requests_total{path="/recommend",status="200"}'] == 1
    assert change['fmrlrec_requests_total{path="/recommend",status="422"}'] == 1
    assert change['fmrlrec_request_seconds_count{path="/recommend"}'] == 2
    assert change['fmrlrec_request_seconds_bucket{path="/recommend",le="+Inf"}'] == 2
    assert before["fmrlrec_items"] == N


def test_many_clients_get_their_own_answers(client, r):
    def ask(i: int) -> list[str]:
        return client.post("/recommend", json={"history": [i]}).json()["ids"]

    histories = [i % N + 1 for i in range(100)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, histories))
    assert found == [answer.ids for answer in r.recommend([[i] for i in histories])]


def test_a_replaced_export_is_served_after_reload(client, export):
    before = client.get("/version").json()["model"]
    assert client.post("/reload").json() == {"reloaded": False, "model": before}
    write_export(export, random_model((4, 12), num_items=N, seed=1), overwrite=True)
    state = client.post("/events", json={"item": "A3"}).json()["state"]
    answer = client.post("/reload").json()
    assert answer["reloaded"] and answer["model"] != before
    assert "encode the history again" in client.post("/recommend", json={"state": state}).json()["detail"]


def test_the_benchmark_compares_the_server_with_the_bare_recommender(export, capsys):
    rows = server.main([str(export), "--requests", "20", "--clients", "1,3"])
    assert [row["what"] for row in rows] == ["Recommender, 1 thread", "HTTP, 1 clients", "HTTP, 3 clients"]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] and row["per_second"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_waiting_requests_are_answered_together_and_a_bad_one_fails_alone(export, monkeypatch):
    r, sizes = Recommender.from_pretrained(export), []
    recommend = r.recommend
    monkeypatch.setattr(r, "recommend", lambda asked, *rest: sizes.append(len(asked)) or recommend(asked, *rest))
    options = {"top_k": 3, "exclude_history": True, "candidates": None}
    some = options | {"candidates": ["A1", "A2"]}
    requests = [([1], options), ([2], options), ([3], options), ([1], some), ([2], some), ([None], options)]

    async def ask():
        batcher = Batcher(r, Metrics())
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
