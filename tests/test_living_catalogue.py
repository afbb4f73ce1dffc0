"""A catalogue that changes, users' states, new products, and a folder that is saved, replaced and reloaded."""

import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from common.errors import InputError
from dataloader import eval_rows
from datasets.features.text import LexicalEncoder
from datasets.items import NO_TEXT
from serving import Recommender, engines, recommender
from serving.engines import State
from serving.folder import FAISS, INDEX, SCAN
from serving.graphs import build_scan
from serving.index import FaissIndex, Int8Index, build_faiss, build_index
from serving.weights import STEPS, user_weighted_pca
from tests.made_up import (
    IDS,
    SAME,
    N,
    as_sequences,
    assert_same_answer,
    everything,
    item_features,
    random_model,
    write_export,
    write_tiny_bert,
)

CLOSE = {"rtol": 2**-10, "atol": 1e-6}  # to features or rows that are stored as float16


def test_updated_items_have_the_embeddings_and_titles_of_their_new_features(shop, engine, kind):
    r = shop.open(engine, kind)
    old, rows, expected = r.items, r.items.table.rows().copy(), r.item_vectors([7, 9])
    r.update_items([IDS[1], 5], shop.features[[6, 8]])
    np.testing.assert_allclose(r.item_vectors([2, 5]), expected, **CLOSE)
    np.testing.assert_array_equal(old.table.rows(), rows)
    r.update_items([2], titles=["Another title"])
    r.update_items([5], titles=["A third"])
    assert (r.items.title(2), old.title(2)) == ("Another title", shop.records[1]["title"])
    assert r.items.id(2) == IDS[1] and len(r) == N


def test_a_removed_item_is_never_recommended_but_may_be_in_a_history(r):
    whole, gone = everything(r, [3, 17]), [IDS[4], 9]
    similar = r.similar_items([1], top_k=N)[0]
    r.remove_items(gone)
    answer = everything(r, [3, 17])
    assert answer.numbers == [i for i in whole.numbers if i not in (5, 9)]
    assert len(r) == N - 2 and IDS[4] not in r and 5 not in r and IDS[5] in r
    assert everything(r, [], candidates=[5, 6, 9], top_k=1).numbers == [6]
    assert everything(r, [], candidates=[[5, 9]], top_k=1).numbers == []
    assert r.recommend([[5, 9]])[0].notes == [] and r.step(r.start([5]), 9).items == (5, 9)
    assert r.similar_items([1], top_k=N)[0].numbers == [i for i in similar.numbers if i not in (5, 9)]


def test_a_removed_item_comes_back_under_its_old_number(shop, engine, kind):
    r = shop.first(engine, kind, 16)
    r.remove_items([IDS[4]])
    r.add_items([IDS[16], IDS[4]], shop.features[[16, 9]], ["New", "Back"])
    assert r.items.numbers([IDS[4], IDS[16]]) == [5, 17]
    assert (r.items.title(5), r.items.title(17), len(r)) == ("Back", "New", 17)
    expected = shop.open(engine, kind).item_vectors([10])
    np.testing.assert_allclose(r.item_vectors([5]), expected, **CLOSE)
    assert 5 in everything(r, []).numbers


def test_rows_that_are_extended_twice_stay_apart():
    rows = engines.Growing(np.zeros((8, 2)), 3)
    first, second = (rows.extended(np.full((1, 2), number)) for number in (1, 2))
    assert (first.values[3:].tolist(), second.values[3:].tolist()) == ([[1, 1]], [[2, 2]])


NEW, MATRIX = ["NEW-1", "NEW-2"], np.ones((2, 1264), dtype=np.float32)


def test_a_change_that_is_refused_changes_nothing(shop, r):
    r.remove_items([20])
    before, catalogue, state = everything(r, [3]), r.items, r.start([3])
    for change, problem in (
        (lambda: r.remove_items([1, "no"]), r"unknown: 'no' \(of 20 items\); leave unknown items out"),
        (lambda: r.update_items([1, 1], titles=["a", "b"]), "occurs twice"),
        (lambda: r.update_items([1], np.ones((1, 3))), r"shape \[1, 3\] for 1 items: must be \[1, 1264\]"),
        (lambda: r.update_items([20], titles=["a"]), "is removed; bring it back by add_items"),
        (lambda: r.add_items(["NEW", IDS[4]], MATRIX), f"item '{IDS[4]}' exists already; leave it out"),
        (lambda: r.add_items(NEW, MATRIX * [[1], [np.nan]]), "features of item 'NEW-2' are not finite, or far too"),
        (lambda: r.add_items(NEW, MATRIX, "ab"), "titles must be a list such as"),
        (lambda: r.add_items(NEW, [10**400]), "features must be an array of numbers"),
        (lambda: r.add_items("XY", MATRIX), r"ids must be a list such as \['id', 'id'\], not 'XY'"),
    ):
        with pytest.raises(InputError, match=problem):
            change()
        assert r.items is catalogue and everything(r, [3]) == before and "NEW" not in r
    r.add_items(["NEW"], shop.features[:1])
    assert r.step(state, "NEW").items == (3, N + 1) and r.items.title(N + 1) == ""
    assert everything(r, ["NEW"], candidates=["NEW"]).ids == ["NEW"]
    assert (len(catalogue), catalogue.number("NEW")) == (N, 0)


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_while_threads_change_the_catalogue_every_answer_is_that_of_one_catalogue(shop, kind, monkeypatch):
    r = shop.first("onnx", kind, 16)
    changes = (
        lambda: r.update_items([13], shop.features[[2]], ["Updated"]),
        lambda: r.remove_items([13, 14]),
        lambda: r.add_items(IDS[12:14], shop.features[12:14], ["Back", "Back"]),
    )

    def answer():
        found = everything(r, [3, 13], candidates=range(1, 17))
        return repr((found.ids, found.titles))

    for possible in (set(), set()):  # the second time they start from where they end
        for change in changes:
            change()
            possible.add(answer())
    assert len(possible) == 3
    for name in ("project", "read_request"):  # let other threads run after each
        true = getattr(recommender, name)
        monkeypatch.setattr(recommender, name, lambda *given, true=true: (true(*given), time.sleep(1e-3))[0])
    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(lambda: [change() for change in 20 * changes])]
        for n in range(3):
            rows = shop.features[[n]]
            writers.append(pool.submit(lambda n=n, rows=rows: [r.add_items([f"{n}-{i}"], rows) for i in range(20)]))
        readers = [pool.submit(lambda: {answer() for _ in range(50)}) for _ in range(4)]
    assert all(writer.result() for writer in writers) and len(r) == 16 + 3 * 20
    assert set().union(*(reader.result() for reader in readers)) <= possible


@pytest.mark.parametrize("pieces", [[4], [1, 3]], ids=str)
def test_adding_items_equals_exporting_the_larger_catalogue(shop, engine, kind, pieces):
    start = N - 4
    r, whole = shop.first(engine, kind, start), shop.open(engine, kind)
    for piece in pieces:
        more = slice(start, start + piece)
        r.add_items(IDS[more], shop.features[more], [record["title"] for record in shop.records[more]])
        start += piece
    # A value halfway between two float16 values is rounded to either, depending on the order of summation.
    tolerance = {"none": 1e-5, "float16": 2**-10, "int8": 0}[kind]
    np.testing.assert_allclose(r.items.table.rows(), whole.items.table.rows(), rtol=tolerance, atol=1e-6)
    if kind == "float16":
        assert np.mean(abs(r.items.table.rows() - whole.items.table.rows()) > 1e-6) < 0.01  # nearly all are the same
    for history in ([3, 17, 3, 20, 1], [18], []):
        for ask in (lambda r, history: history, Recommender.start):
            grown, expected = (everything(each, ask(each, history)) for each in (r, whole))
            assert_same_answer(grown, expected, max(tolerance, 1e-5))
            assert (grown.ids, grown.titles) == (expected.ids, expected.titles)


@pytest.fixture
def replaced(shop, engine, tmp_path):
    """(a recommender, its folder, a function that replaces the folder by another model of the same shape)."""
    folder, seeds = tmp_path / "export", iter(range(1, 10))

    def replace():
        model = random_model((4, 12), features=shop.features, num_items=N, seed=next(seeds))
        write_export(folder, model, overwrite=True)

    replace()
    return Recommender.from_pretrained(folder, engine, threads=1), folder, replace


def test_a_folder_is_opened_again_only_if_it_changed(replaced, engine):
    r, folder, replace = replaced
    before, state, model, rule = everything(r, [3]), r.start([3]), r.model, r.filter([1, 2])
    assert not r.reload() and everything(r, [3]) == before
    replace()
    assert everything(r, [3]) == before and r.reload() and not r.reload()
    assert everything(r, [3]) == everything(Recommender.from_pretrained(folder, engine), [3]) != before
    with pytest.raises(InputError, match=f"made by the model '{model}', this is '{r.model}'"):
        r.step(state, 1)
    with pytest.raises(InputError, match="the filter was made before the export was reloaded; make it again"):
        r.recommend([[3]], candidates=rule)


def test_a_reload_waits_for_a_change_that_has_begun(replaced, shop, monkeypatch):
    r, _, replace = replaced
    replace()
    with ThreadPoolExecutor(1) as pool:

        def project(*given, true=recommender.project):
            reloads.append(pool.submit(r.reload))
            wait(reloads, timeout=0.3)
            return true(*given)

        reloads: list = []
        monkeypatch.setattr(recommender, "project", project)
        r.add_items(["NEW"], shop.features[:1])
        assert reloads[0].result() and "NEW" not in r


def test_reload_follows_a_link_and_keeps_the_open_model_if_the_folder_is_broken(replaced, tmp_path):
    _, folder, _ = replaced
    other = write_export(tmp_path / "other", random_model((4,), num_items=N, seed=2))
    (tmp_path / "current").symlink_to(folder)
    r = Recommender.from_pretrained(tmp_path / "current")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(other)
    assert r.reload() and r.config["size"] == 4
    before = everything(r, [3])
    write_export(other, random_model((4,), num_items=N, seed=3), overwrite=True)
    (other / "items.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"items.safetensors has 3 bytes instead of"):
        r.reload()
    assert everything(r, [3]) == before


def test_an_open_model_does_not_need_its_folder(replaced):
    r, folder, replace = replaced
    expected = Recommender.from_pretrained(folder, "torch")
    replace()  # before any graph has run
    assert_same_answer(everything(r, [3]), everything(expected, [3]))
    before, stepped = everything(r, [3]), r.recommend([r.start([3])])
    (folder / "model.safetensors").write_bytes(b"overwritten")
    assert everything(r, r.start([3])).numbers == everything(expected, [3]).numbers
    shutil.rmtree(folder)
    assert (everything(r, [3]), r.recommend([r.start([3])])) == (before, stepped)


def test_a_folder_that_is_replaced_while_it_is_being_opened_is_refused(replaced, engine, monkeypatch):
    _, folder, replace = replaced
    true = recommender.open_engine
    monkeypatch.setattr(recommender, "open_engine", lambda *arguments: replace() or true(*arguments))
    with pytest.raises(InputError, match="export was replaced while it was being opened; open it again"):
        Recommender.from_pretrained(folder, engine)


def test_a_changed_catalogue_is_the_same_after_saving_and_opening(shop, engine, kind, tmp_path):
    r = shop.first(engine, kind, 16)
    r.add_items(IDS[16:18], shop.features[16:18], ["New", "Newer"])
    r.remove_items([3, 17])
    r.update_items([2, 18], shop.features[[9, 9]], ["Second", "Last"])
    if (engine, kind) == ("torch", "int8"):
        with pytest.raises(InputError, match="dequantized this int8 export; save it from engine='onnx'"):
            r.save_pretrained(tmp_path / "saved")
        return
    r.save_pretrained(tmp_path / "saved")
    assert "ranks 16 items" in (tmp_path / "saved/README.md").read_text()
    for name in ("torch", "onnx"):
        opened = Recommender.from_pretrained(tmp_path / "saved", name, threads=1)
        assert (len(opened), opened.config["num_items"], opened.config["quantize"]) == (16, 18, kind)
        assert [opened.items.title(i) for i in (2, 18, 17)] == ["Second", "Last", "New"]
        for history, given in (([], []), ([3, 17, 2], [3, 17, 2]), (opened.start([3, 17]), r.start([3, 17]))):
            expected, answer = everything(r, given), everything(opened, history)
            assert_same_answer(answer, expected, 0.05 if kind == "int8" and name != engine else 1e-5)
            assert sorted(answer.ids) == sorted(expected.ids) and answer.notes == []
        if (name, kind) != ("torch", "int8"):
            np.testing.assert_array_equal(opened.items.table.rows(), r.items.table.rows())
    assert opened.config["version"] == 2
    r.add_items([IDS[2], IDS[16]], shop.features[[2, 16]])
    r.save_pretrained(tmp_path / "saved", overwrite=True)
    assert Recommender.from_pretrained(tmp_path / "saved").config["version"] == 1


def test_a_model_may_be_saved_over_the_folder_it_came_from_unless_that_was_replaced(shop, replaced):
    r, folder, replace = replaced
    r.add_items(["NEW"], shop.features[:1])
    r.save_pretrained(folder, overwrite=True)
    assert_same_answer(everything(Recommender.from_pretrained(folder), ["NEW"]), everything(r, ["NEW"]))
    replace()
    with pytest.raises(InputError, match="changed since it was opened; open it again"):
        r.save_pretrained(folder, overwrite=True)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="cannot write"):
        r.save_pretrained(folder)
    assert not folder.exists()


@pytest.mark.parametrize(("index", "kind"), [("int8", "none"), ("int8", "float16"), ("faiss", "none")])
def test_an_index_finds_the_items_of_the_table_while_the_catalogue_changes(tmp_path, monkeypatch, index, kind):
    monkeypatch.setattr("serving.index.SHORTLIST", 500)
    rng = np.random.default_rng(0)
    model = random_model((4, 12), num_items=2000, features=rng.normal(size=(2000, 16)).astype(np.float32))
    folders = [write_export(tmp_path / str(each), model, quantize=kind, index=each) for each in (None, index)]
    plain, found = map(Recommender.from_pretrained, folders)
    histories, boost = [rng.integers(1, 2001, n).tolist() for n in (0, 1, 4, 9)], rng.normal(size=2000)
    lengths, true = [], found._now.index.shortlist
    found._now.index.shortlist = lambda *given: lengths.append(len(true(*given))) or true(*given)

    def same():
        for options in ({}, {"boost": boost}, {"candidates": range(1, 1500), "top_k": 50}):
            for ask in (lambda r: histories, lambda r: [r.start(history) for history in histories]):
                answers = (r.recommend(ask(r), **options) for r in (found, plain))
                for answer, expected in zip(*answers, strict=True):
                    assert_same_answer(answer, expected)
                    assert index == "faiss" or (answer.ids, answer.notes) == (expected.ids, expected.notes)

    same()
    assert 10 <= max(lengths) < 200 if index == "int8" else max(lengths) == 500
    for gone, new in ((range(1, 200), ["NEW", "A5"]), (range(302, 1900), ["A6", "A302"])):
        for r in (plain, found):
            r.remove_items(gone)
        best = plain.recommend([[]], top_k=40)[0].numbers
        for r in (plain, found):
            r.update_items(best, np.full((40, 16), 20.0))
            r.add_items(new, np.full((2, 16), -20.0))
        same()
    assert index == "int8" or len(lengths) == 3 * 2 * len(histories)  # not with boost or candidates
    found.save_pretrained(tmp_path / "saved")
    found = Recommender.from_pretrained(tmp_path / "saved")
    same()


def test_the_int8_scan_allows_for_the_rounding_of_a_users_vector(tmp_path):
    table = np.array([[0, 0, 0, 0], [0, 127, 127, 0], [127, 0, 0, 127]], np.float32)  # exact in int8
    packed = build_index(table)
    (tmp_path / INDEX).write_bytes(packed)
    (tmp_path / SCAN).write_bytes(build_scan(packed))
    below = np.array([0, 0.45, 0.45, 0.55])  # 1, in units of the rounded vector: rounded to 0, 0, 0 and 1
    z = (1 - below / (2 * STEPS**2)).astype(np.float32)[None]
    bias = np.array([[-np.inf, 0, 0]], np.float32)
    assert Int8Index(tmp_path, table.shape, 1).rank(z, engines.Table(table, None), bias, 1)[1].tolist() == [[2]]


def test_a_damaged_faiss_index_and_a_missing_package_are_named(tmp_path, monkeypatch):
    for content in (b"\0" * 200, build_faiss(np.ones((30, 4), np.float32))):
        (tmp_path / FAISS).write_bytes(content)
        with pytest.raises(InputError, match=r"faiss is (damaged|not the index of a table \[31, 4\]).*export the m"):
            FaissIndex(tmp_path, (31, 4))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"--index faiss needs the package faiss-cpu .*pip install faiss-cpu"):
        build_faiss(np.ones((30, 4), np.float32))


@pytest.mark.parametrize(("kind", "index", "tolerance"), [("none", None, 1e-5), ("float16", "int8", 2e-3)])
def test_a_narrow_table_scores_as_the_cut_of_users_and_items(engine, kind, index, tolerance, tmp_path):
    features = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    model = random_model((4, 12), num_items=300, features=features)
    sequences = [[(7 * user + 5 * step * step) % 300 + 1 for step in range(3 + user % 6)] for user in range(200)]
    cut = {"table_width": 5, "users": eval_rows(as_sequences(sequences), 7, "val")}
    plain = Recommender.from_pretrained(write_export(tmp_path / "plain", model), engine)
    r = Recommender.from_pretrained(write_export(tmp_path / "a", model, cut=cut, quantize=kind, index=index), engine)
    users, items = user_weighted_pca(plain.user_vectors([each[:-2] for each in sequences]), plain.item_vectors())
    for gone in ([], [5]):
        if gone:
            for each in (plain, r):
                each.remove_items(gone)
                each.update_items([2, 300], np.linspace(-2, 2, 32).reshape(2, 16))
                each.add_items(["NEW-1", "NEW-2"], np.outer([-2.0, 1.5], np.ones(16)))
            r.save_pretrained(tmp_path / "saved")
            r = Recommender.from_pretrained(tmp_path / "saved", engine)
        history, vectors = [3, 300, 2, len(r.items) - 1, len(r.items)], plain.item_vectors() @ items[:, :5]
        scores = plain.user_vectors([history])[0] @ users[:, :5] @ vectors.T
        lengths, boost, few = np.linalg.norm(vectors, axis=1), np.linspace(0, 1, 300), [7, 8, 2, 10]
        for answer, expected, without in (
            (everything(r, history), scores, gone),
            (everything(r, r.step(r.start(history[:-1]), history[-1])), scores, gone),
            (everything(r, history, boost=boost, candidates=range(1, 290)), scores[:289] + boost[:289], gone),
            (everything(r, history, candidates=few), scores, set(range(1, 303)) - set(few)),
            (r.similar_items([1], top_k=300)[0], vectors @ vectors[0] / lengths / lengths[0], [1, *gone]),
        ):
            ranked = [i for i in (np.argsort(-expected) + 1).tolist() if i not in without]
            best = SimpleNamespace(numbers=ranked, scores=expected[np.array(ranked) - 1])
            assert_same_answer(answer, best, tolerance)


@pytest.mark.parametrize("length", [0, 1, 5, 30])
def test_a_state_is_the_same_from_its_history_and_from_steps(shop, engine, kind, length, monkeypatch):
    r, history = shop.open(engine, kind), (np.arange(length) * 7 % N + 1).tolist()
    monkeypatch.setattr(engines, "STEP_ROWS", 8)  # several pieces
    started, stepped = r.start(history), r.start()
    for item in history:
        stepped = r.step(stepped, item)
    assert started.items == stepped.items == tuple(history) and r.start().items == ()
    for found, expected in ((started.hidden, stepped.hidden), (started.z, stepped.z)):
        assert abs(found - expected).max() <= SAME[kind] * abs(expected).max()
    if length <= 5:  # as in training
        [answer] = r.recommend([stepped], top_k=8)
        assert_same_answer(answer, r.recommend([history], top_k=8)[0], SAME[kind])
        assert answer.notes == [] and not set(answer.numbers) & set(history)


def test_a_state_is_the_same_after_its_bytes_and_damaged_ones_are_refused(r):
    for state in (r.start(), r.start([3, 17]), r.start([IDS[i % N] for i in range(40)])):
        content = state.to_bytes()
        found = State.from_bytes(content)
        assert (found.items, found.model) == (state.items, r.model)
        np.testing.assert_array_equal(found.hidden, state.hidden)
        np.testing.assert_array_equal(found.z, state.z)
        assert r.recommend([found]) == r.recommend([state]) and r.step(found, 5).items == (*state.items, 5)
    assert len(content) == state.hidden.nbytes + state.z.nbytes + 4 * 40 + len(r.model) + 18
    flipped = content[:60] + bytes([content[60] ^ 1]) + content[61:]
    for damaged in (b"", b"\x80\x04K\x01.", content[:-1], content + b"0", flipped, "fMRL" * 20, None):
        with pytest.raises(InputError, match=r"(not a state of version 1|damaged).*encode the history again"):
            State.from_bytes(damaged)


def test_a_state_remembers_and_excludes_items_beyond_the_trained_length(shop, r):
    history = [3, 17, 5, 9, 1, 4, 20, 2]
    answer, expected = everything(r, r.start(history)), shop.scores(history)
    np.testing.assert_allclose(answer.scores, expected[answer.numbers], atol=1e-5 * np.abs(expected).max())
    assert answer.notes == ["the state remembers 8 items, training had at most 5"]
    [answer] = r.recommend([r.start(history)], top_k=N - 8)
    assert sorted([*answer.numbers, *history]) == list(range(1, N + 1))


def test_a_state_of_another_model_or_of_unknown_items_is_refused(r, engine, tmp_path):
    other = write_export(tmp_path / "other", random_model((4, 12), num_items=N, seed=1))
    state = Recommender.from_pretrained(other, engine).start([1])
    small = State(np.zeros((2, 2, 3), dtype=np.float32), np.zeros(3, dtype=np.float32), (1,), r.model)
    for ask, problem in (
        (lambda: r.recommend([[1], state]), rf"the model '.*', this is '{r.model}'; encode the history again"),
        (lambda: r.step(state, 1), "made by the model"),
        (lambda: r.step(small, 1), "the state is damaged: it has another size than its model"),
        (lambda: r.step(r.start([3]), "no-such"), r"unknown: 'no-such' \(of 20 items\); the state is unchanged"),
        (lambda: r.start([1, "no-such", 2]), "unknown: 'no-such'"),
    ):
        with pytest.raises(InputError, match=problem):
            ask()


def test_a_state_stays_valid_while_the_catalogue_changes(shop, engine):
    r, other = (shop.first(engine, "none", 16) for _ in range(2))
    r.add_items(["NEW"], shop.features[16:17])
    state = r.start(["NEW", 3])
    r.remove_items([3, "NEW"])
    assert r.step(state, 4).items == (17, 3, 4)
    with pytest.raises(InputError, match="the state remembers item 17, this catalogue has 16; reload the catalogue"):
        other.recommend([state])


def test_products_are_encoded_as_in_training_from_what_they_have(shop, r):
    for products in (shop.records, pd.DataFrame(shop.records)):
        np.testing.assert_array_equal(r.embed_items(products).astype(np.float16), shop.features)
    assert r.embed_items([]).shape == (0, 1264)
    expected, pictures = shop.features[:, :1024], shop.features[:, 1024:]
    title_alone = {"title": shop.records[1]["title"], "picture": Path(shop.records[1]["picture"]), "colour": "red"}
    [text], [picture] = np.split(r.embed_items([title_alone]), [1024], axis=1)
    np.testing.assert_array_equal(picture.astype(np.float16), pictures[1])
    assert 0.1 < text @ expected[1] < 0.95
    for without in r.embed_items([shop.records[1] | {"picture": nothing} for nothing in (None, float("nan"), "")]):
        np.testing.assert_array_equal(without[:1024].astype(np.float16), expected[1])
        assert not without[1024:].any()
    [untitled] = r.embed_items([{"picture": shop.records[4]["picture"]}])
    np.testing.assert_array_equal(untitled[1024:].astype(np.float16), pictures[4])
    np.testing.assert_array_equal(untitled[:1024], LexicalEncoder().encode([NO_TEXT])[0])


def test_products_that_are_not_described_and_a_missing_package_are_refused(r, monkeypatch):
    nothing = {"title": " ", "price": float("nan"), "picture": float("nan"), "colour": "red"}
    for products, problem in (
        (["a lamp"], "record 1 is 'a lamp'; give a dict with title, brand"),
        ({"title": "a"}, r"products must be a list such as \[{'title': 'Rose soap'}\]"),
        ([{"title": "a"}, nothing], "record 2 has no text; give it one of title, price, brand, categories"),
        ([{"picture": "missing.png"}], r"the picture of record 1 cannot be read \(missing.png: .*give another"),
        ([{"title": "a"}, {"picture": __file__}], r"the picture of record 2 cannot be read \(test_.*give another"),
    ):
        with pytest.raises(InputError, match=problem):
            r.embed_items(products)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"needs a package that is not installed \(.*PIL.*pip install '.\[encoders\]'"):
        r.embed_items([{"picture": __file__}])


def test_a_model_of_one_modality_reads_only_it_and_one_of_none_nothing(shop, tmp_path):
    def opened(features, **options):
        model = random_model((4,), num_items=N, features=features)
        return Recommender.from_pretrained(write_export(tmp_path / str(len(options)), model, shop.catalog, **options))

    pictures = opened(shop.features[:, 1024:], use_language_encoder=False, use_img_encoder=True)
    embedded = pictures.embed_items([{"picture": shop.records[0]["picture"]}])
    np.testing.assert_array_equal(embedded.astype(np.float16), shop.features[:1, 1024:])
    texts = opened(shop.features[:, :1024], item_attributes=("brand", "title"))
    with pytest.warns(UserWarning, match="trained on texts alone: the pictures are not used"):
        plain = texts.embed_items([{"title": "Red lamp", "price": 1, "brand": "Alder", "picture": "no such.png"}])
    np.testing.assert_array_equal(plain, LexicalEncoder().encode(["Brand: Alder Title: Red lamp"]))
    for product in ({"price": 1}, {"picture": shop.records[0]["picture"]}):
        with pytest.raises(InputError, match="record 1 has no text; give it one of brand, title"):
            texts.embed_items([product])
    with pytest.raises(InputError, match="this model read no features, so there is nothing to embed"):
        opened(None).embed_items([{"title": "a"}])


def test_an_encoder_that_moved_is_read_where_it_is_now_and_another_is_refused(shop, tmp_path):
    mean, records = {"pooling_mode_mean_tokens": True}, shop.catalog.metadata
    bert = write_tiny_bert(tmp_path / "bert", mean)
    features = item_features(shop.catalog, language=str(bert), cache_root=tmp_path)
    model = random_model((4,), num_items=N, features=features)
    export = write_export(tmp_path / "export", model, shop.catalog, language_encoder=str(bert))
    r, again = (Recommender.from_pretrained(export) for _ in range(2))
    for pooling, seed in ((mean, 1), ({"pooling_mode_cls_token": True}, 0)):
        other = write_tiny_bert(tmp_path / f"other {seed}", pooling, seed)
        problem = rf"the encoder '{other}' is not '{bert}', which the model was trained on.* as language_encoder$"
        with pytest.raises(InputError, match=problem):
            r.embed_items(records, language_encoder=str(other))
    with pytest.raises(InputError, match=r"the encoder 'ViT-B-32/openai' is not 'pixel'.* as img_encoder"):
        shop.open("onnx").embed_items(shop.records, img_encoder="ViT-B-32/openai")
    np.testing.assert_allclose(r.embed_items(records), features, **CLOSE)
    moved = bert.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="bert' is not there any more; give the folder it is in now as lang"):
        again.embed_items(records)
    with pytest.raises(InputError, match=r"trained on \(there is no encoder '.*bert' here\); .* run where it is"):
        item_features(shop.catalog, language=str(bert), cache_root=tmp_path, trained_on=("its features",))
    for embedded in (r.embed_items(records), again.embed_items(records, language_encoder=str(moved))):
        np.testing.assert_allclose(embedded, features, **CLOSE)
