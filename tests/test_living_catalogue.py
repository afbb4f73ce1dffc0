"""A catalogue that changes, users' states, new products, and a folder that is saved, replaced and reloaded."""

import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from common.errors import InputError
from dataloader import eval_rows
from datasets.features.text import LexicalEncoder
from datasets.text import NO_TEXT
from serving import Recommender, index, recommender, states
from serving.folder import FAISS
from serving.index import FaissIndex, build_faiss
from serving.states import State
from serving.widths import user_weighted_pca
from tests.made_up import (
    ATTRIBUTES,
    ENGINES,
    HALF,
    IDS,
    MAX_LEN,
    SAME,
    N,
    as_sequences,
    assert_same_answer,
    everything,
    random_model,
    write_export,
)
from tests.prepared import draw_picture, item_features, write_tiny_bert


def test_updated_items_have_the_embeddings_and_titles_of_their_new_features(shop, engine, kind):
    r, expected = shop.open(engine, kind), shop.open(engine, kind)
    old, before = r.items, everything(r, [3])
    r.update_items([IDS[1], 5], shop.features[[6, 8]])
    expected_rows = expected.item_vectors()[[6, 8]]
    np.testing.assert_allclose(r.item_vectors([2, 5]), expected_rows, rtol=2**-10, atol=1e-6)
    assert everything(r, [3]) != before
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
    np.testing.assert_allclose(r.item_vectors([5]), expected, rtol=2**-10, atol=1e-6)
    assert 5 in everything(r, []).numbers


NEW, MATRIX = ["NEW-1", "NEW-2"], np.ones((2, 1264), dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r.remove_items([1, "no"]), r"unknown: 'no' \(of 20 items\); leave unknown items out"),
        (lambda r: r.remove_items("Q0"), "ids must be a list such as"),
        (lambda r: r.update_items([1, "no"], titles=["a", "b"]), "unknown: 'no'"),
        (lambda r: r.update_items([1, 1], titles=["a", "b"]), "occurs twice"),
        (lambda r: r.update_items([1], titles=["a", "b"]), "2 titles for 1 items"),
        (lambda r: r.update_items([1], np.ones((1, 3))), r"features of shape \[1, 3\] for 1 items"),
        (lambda r: r.update_items([20], titles=["a"]), "is removed; bring it back by add_items"),
        (lambda r: r.add_items(["NEW", IDS[4]], MATRIX), f"item '{IDS[4]}' exists already; leave it out"),
        (lambda r: r.add_items(NEW, MATRIX[:, 1:]), r"shape \[2, 1263\] for 2 items: must be \[2, 1264\]"),
        (lambda r: r.add_items(NEW, MATRIX * [[1], [np.nan]]), "features of item 'NEW-2' are not finite, or far too"),
        (lambda r: r.add_items(NEW, MATRIX * 3e38), "features of item 'NEW-1' are not finite, or far too large"),
        (lambda r: r.add_items(NEW, MATRIX, ["one", None]), "the title of item 'NEW-2' is None; give a string"),
        (lambda r: r.add_items(NEW, MATRIX, "ab"), "titles must be a list such as"),
        (lambda r: r.add_items(NEW, [[1.0], [1.0, 2.0]]), "features must be an array of numbers"),
        (lambda r: r.add_items(NEW, [10**400]), "features must be an array of numbers"),
        (lambda r: r.add_items("XY", MATRIX), r"ids must be a list such as \['id', 'id'\], not 'XY'"),
    ],
)
def test_a_change_that_is_refused_changes_nothing(shop, r, change, problem):
    r.remove_items([20])
    before, catalogue, state = everything(r, [3]), r.items, r.start([3])
    with pytest.raises(InputError, match=problem):
        change(r)
    assert r.items is catalogue and everything(r, [3]) == before
    assert "NEW" not in r
    r.add_items(["NEW"], shop.features[:1])
    assert r.step(state, "NEW").items == (3, N + 1)


def test_a_learned_table_can_be_thinned_but_not_grow(engine, tmp_path):
    export = write_export(tmp_path / "learned", random_model((4, 12), num_items=N), max_len=MAX_LEN)
    assert "features: none, the item table is learned" in (export / "README.md").read_text(encoding="utf-8")
    r = Recommender.from_pretrained(export, engine)
    r.remove_items([1])
    for change in (lambda: r.update_items([2], np.ones((1, 12))), lambda: r.add_items(["NEW"], np.ones((1, 12)))):
        with pytest.raises(InputError, match="learned without features, so no items can be added"):
            change()
    with pytest.raises(InputError, match="this model read no features, so there is nothing to embed"):
        r.embed_items([{"title": "a"}])
    assert len(r) == N - 1 and len(r.recommend([[3]], top_k=3)[0].ids) == 3


class Watched(Recommender):
    """Keeps every snapshot in `snapshots`."""

    def __setattr__(self, name, value):
        if name == "_now":
            self.snapshots.append(value)
        super().__setattr__(name, value)


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_while_threads_change_the_catalogue_every_answer_is_that_of_one_catalogue(shop, kind, monkeypatch):
    """Four writers own one item each, so that every catalogue can be told apart by the items that it has."""
    for name in ("project", "read_request"):  # let other threads run after each
        true = getattr(recommender, name)
        monkeypatch.setattr(recommender, name, lambda *given, true=true: (true(*given), time.sleep(1e-3))[0])
    r, opened = shop.first("onnx", kind, 16), shop.first("onnx", kind, 16)
    r.snapshots, r.__class__ = [r._now], Watched
    histories, stop = [[3, 5], ["NEW-1", 2], []], time.monotonic() + 1

    def write(writer):
        new, own = f"NEW-{writer}", 13 + writer
        r.add_items([new], shop.features[[16 + writer]])
        while time.monotonic() < stop:
            r.update_items([own], shop.features[[own % 7]])
            r.remove_items([new, own])
            r.add_items([new, IDS[own - 1]], shop.features[[16 + writer, own - 1]])
            r.add_items([f"{new}-{time.monotonic_ns()}"], shop.features[[writer]])
            time.sleep(0.05)

    def read(which):
        answers = []
        while time.monotonic() < stop:
            answers.append(repr(r.recommend([histories[which]], top_k=8)[0]))
        return answers

    with ThreadPoolExecutor(10) as pool:
        writers = [pool.submit(write, writer) for writer in range(4)]
        readers = [pool.submit(read, reader % 3) for reader in range(6)]
    assert not any(writer.result() for writer in writers)
    possible = [set(), set(), set()]
    for snapshot in r.snapshots:
        opened._now = snapshot
        for which, history in enumerate(histories):
            possible[which].add(repr(opened.recommend([history], top_k=8)[0]))
    for reader, answers in enumerate(readers):
        assert answers.result() and set(answers.result()) <= possible[reader % 3]
    assert len(r.snapshots) > 20


def test_added_items_may_be_untitled_and_be_in_histories_and_candidates(shop, engine):
    r = shop.first(engine, "none", 16)
    state = r.start([2])
    r.add_items(["NEW-1", "new 2"], shop.features[16:18], ["First", ""])
    r.add_items([], r.embed_items([]))
    r.add_items(["untitled"], shop.features[18:19])
    assert [r.items.title(i) for i in (5, 17, 18, 19)] == [shop.records[4]["title"], "First", "", ""]
    assert sorted(everything(r, ["NEW-1", 18]).numbers) == list(range(1, 20))
    assert r.step(state, "new 2").items == (2, 18)
    assert everything(r, [], candidates=["NEW-1"], top_k=1).ids == ["NEW-1"]


@pytest.mark.parametrize("pieces", [[4], [1, 3]], ids=str)
def test_adding_items_equals_exporting_the_larger_catalogue(shop, engine, kind, pieces):
    r, whole = shop.first(engine, kind, N - 4), shop.open(engine, kind)
    start = N - 4
    for piece in pieces:
        end = start + piece
        r.add_items(IDS[start:end], shop.features[start:end], [x["title"] for x in shop.records[start:end]])
        start = end
    # A value halfway between two float16 values is rounded to either, depending on the order of summation.
    tolerance = {"none": 1e-5, "float16": 2**-10, "int8": 0}[kind]
    np.testing.assert_allclose(r.items.table.rows(), whole.items.table.rows(), rtol=tolerance, atol=1e-6)
    if kind == "float16":
        assert np.mean(abs(r.items.table.rows() - whole.items.table.rows()) > 1e-6) < 0.01  # nearly all are the same
    histories = [[3, 17, 3, 20, 1], [18], []]
    for ask in (lambda r: histories, lambda r: [r.start(history) for history in histories]):
        answers = [x.recommend(ask(x), top_k=N, exclude_history=False) for x in (r, whole)]
        for grown, expected in zip(*answers, strict=True):
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
    assert everything(r, [3]) == before
    assert r.reload() and not r.reload()
    assert everything(r, [3]) == everything(Recommender.from_pretrained(folder, engine), [3]) != before
    with pytest.raises(InputError, match=f"made by the model '{model}', this is '{r.model}'"):
        r.step(state, 1)
    with pytest.raises(InputError, match="the filter was made before the export was reloaded; make it again"):
        r.recommend([[3]], candidates=rule)


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
        assert not list(tmp_path.iterdir())
        return
    r.save_pretrained(tmp_path / "saved")
    assert "ranks 16 items" in (tmp_path / "saved/README.md").read_text()
    for name in ENGINES:
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
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        r.save_pretrained(folder)
    r.save_pretrained(folder, overwrite=True)
    assert_same_answer(everything(Recommender.from_pretrained(folder), ["NEW"]), everything(r, ["NEW"]))
    replace()
    with pytest.raises(InputError, match="changed since it was opened; open it again"):
        r.save_pretrained(folder, overwrite=True)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="cannot write"):
        r.save_pretrained(folder)
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["none", "float16"])
def test_the_int8_scan_answers_exactly_as_the_table_does_while_the_catalogue_changes(tmp_path, kind):
    rng = np.random.default_rng(0)
    model = random_model((4, 12), num_items=2000, features=rng.normal(size=(2000, 16)).astype(np.float32))
    folders = [write_export(tmp_path / str(index), model, quantize=kind, index=index) for index in (None, "int8")]
    plain, scanned = map(Recommender.from_pretrained, folders)
    histories, boost = [rng.integers(1, 2001, n).tolist() for n in (0, 1, 4, 9)], rng.normal(size=2000)
    lengths, true = [], scanned._now.index.shortlist
    scanned._now.index.shortlist = lambda *given: lengths.append(len(true(*given))) or true(*given)

    def same(one, other, **options):
        for ask in (lambda r: histories, lambda r: [r.start(history) for history in histories]):
            answers = [r.recommend(ask(r), **options) for r in (one, other)]
            for expected, answer in zip(*answers, strict=True):
                assert (answer.ids, answer.notes) == (expected.ids, expected.notes)
                np.testing.assert_allclose(answer.scores, expected.scores, rtol=1e-5, atol=1e-5)

    same(plain, scanned)
    assert 10 <= max(lengths) < 200
    same(plain, scanned, boost=boost)
    same(plain, scanned, candidates=list(range(1, 1500)), top_k=50)
    best = plain.recommend([[]], top_k=40, candidates=list(range(200, 2001)))[0].numbers
    for r in (plain, scanned):
        r.remove_items(range(1, 200))
        r.update_items(best, np.full((40, 16), 20.0))
        r.add_items(["NEW", "A5"], np.full((2, 16), -20.0))
    same(plain, scanned, top_k=50)
    scanned.save_pretrained(tmp_path / "saved")
    same(plain, Recommender.from_pretrained(tmp_path / "saved"), top_k=50)


def test_faiss_finds_the_items_of_the_table_while_the_catalogue_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SHORTLIST", 500)
    rng = np.random.default_rng(0)
    model = random_model((4, 12), num_items=2000, features=rng.normal(size=(2000, 16)).astype(np.float32))
    folders = [write_export(tmp_path / str(kind), model, index=kind) for kind in (None, "faiss")]
    plain, found = map(Recommender.from_pretrained, folders)
    searches, true = [], found._now.index.shortlist
    found._now.index.shortlist = lambda *given: searches.append(len(true(*given))) or true(*given)
    histories = [rng.integers(1, 2001, n).tolist() for n in (0, 1, 4, 9)]
    for change in ("none", "some", "most", "saved"):
        if change == "saved":
            found.save_pretrained(tmp_path / "saved")
            found = Recommender.from_pretrained(tmp_path / "saved")
        elif change != "none":
            for r in (plain, found):
                r.remove_items(range(1, 200) if change == "some" else range(302, 1900))
                r.update_items([300, 301], np.full((2, 16), 2.0))
                r.add_items([f"NEW {change}"], np.full((1, 16), -2.0))
        for answer, expected in zip(found.recommend(histories), plain.recommend(histories), strict=True):
            assert_same_answer(answer, expected)
        for options in ({"boost": rng.normal(size=2000)}, {"candidates": list(range(250, 1900))}):
            assert found.recommend(histories, **options) == plain.recommend(histories, **options)
    assert len(searches) == 3 * len(histories) and max(searches) == 500


@pytest.mark.parametrize("content", [b"", b"\0" * 200, "other"], ids=["empty", "zeros", "another table"])
def test_a_damaged_faiss_index_is_refused(tmp_path, content):
    if content == "other":
        content = build_faiss(np.ones((30, 4), np.float32))
    (tmp_path / FAISS).write_bytes(content)
    with pytest.raises(
        InputError, match=r"index.faiss is (damaged|not the index of a table \[31, 4\]).*export the model"
    ):
        FaissIndex(tmp_path, (31, 4))


def test_without_faiss_the_package_to_install_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"--index faiss needs the package faiss-cpu .*pip install faiss-cpu"):
        write_export(tmp_path / "a", random_model((4,), num_items=20), index="faiss")


# --------------------------------------------------------------------------------------------------------- two widths

SEQUENCES = [[(7 * user + 5 * step * step) % 300 + 1 for step in range(3 + user % 6)] for user in range(200)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(a model of 300 items, its export of one width)."""
    features = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    model = random_model((4, 12), num_items=300, features=features)
    return model, write_export(tmp_path_factory.mktemp("wide") / "export", model)


def write_narrow(folder: Path, model, width: int, **options) -> Path:
    users = eval_rows(as_sequences(SEQUENCES), 7, "val")
    return write_export(folder, model, cut={"table_width": width, "users": users}, **options)


def change(r: Recommender) -> None:
    r.remove_items([5])
    r.update_items([2, 300], np.linspace(-2, 2, 32).reshape(2, 16))
    r.add_items(["NEW"], np.full((1, 16), -2.0))


def test_a_table_as_wide_as_the_encoder_answers_as_one_width(wide, engine, tmp_path):
    plain, narrow = (
        Recommender.from_pretrained(f, engine) for f in (wide[1], write_narrow(tmp_path / "a", wide[0], 12))
    )
    for r in (plain, narrow):
        change(r)
    rules = {"boost": np.linspace(0, 1, 300), "candidates": list(range(1, 290))}
    for options in ({}, rules, {"candidates": [7, 8, 2, 10]}):
        for history in ([], [3, 300, 7], ["NEW"]):
            expected = everything(plain, history, **options)
            assert_same_answer(everything(narrow, history, **options), expected)
            assert_same_answer(everything(narrow, narrow.start(history), **options), expected)


@pytest.mark.parametrize(("kind", "index", "tolerance"), [("none", None, 1e-5), ("float16", "int8", 2e-3)])
def test_a_narrow_table_scores_as_the_cut_of_users_and_items(wide, engine, kind, index, tolerance, tmp_path):
    plain = Recommender.from_pretrained(wide[1], engine)
    r = Recommender.from_pretrained(write_narrow(tmp_path / "a", wide[0], 5, quantize=kind, index=index), engine)
    users, items = user_weighted_pca(plain.user_vectors([each[:-2] for each in SEQUENCES]), plain.item_vectors())
    for changed in (False, True):
        if changed:
            change(plain)
            change(r)
            r.save_pretrained(tmp_path / "saved")
            r = Recommender.from_pretrained(tmp_path / "saved", engine)
        history, vectors = [3, 300, 2, len(r.items)], plain.item_vectors() @ items[:, :5]
        scores = plain.user_vectors([history])[0] @ users[:, :5] @ vectors.T
        lengths = np.linalg.norm(vectors, axis=1)
        for answer, expected, without in (
            (everything(r, history), scores, []),
            (everything(r, r.step(r.start(history[:-1]), history[-1])), scores, []),
            (r.similar_items([1], top_k=300)[0], vectors @ vectors[0] / lengths / lengths[0], [1]),
        ):
            ranked = [i for i in (np.argsort(-expected) + 1).tolist() if i not in (without + [5] * changed)]
            assert_same_answer(
                answer, SimpleNamespace(numbers=ranked, scores=expected[np.array(ranked) - 1]), tolerance
            )


@pytest.mark.parametrize("length", [0, 1, MAX_LEN, 30])
def test_a_state_is_the_same_from_its_history_and_from_steps(shop, engine, kind, length, monkeypatch):
    r, history = shop.open(engine, kind), (np.arange(length) * 7 % N + 1).tolist()
    monkeypatch.setattr(states, "ROWS", 8)  # several pieces
    started, stepped = r.start(history), r.start()
    for item in history:
        stepped = r.step(stepped, item)
    assert started.items == stepped.items == tuple(history) and r.start().items == ()
    for found, expected in ((started.hidden, stepped.hidden), (started.z, stepped.z)):
        assert abs(found - expected).max() <= SAME[kind] * abs(expected).max()
    if length <= MAX_LEN:
        [answer] = r.recommend([stepped], top_k=8)
        assert_same_answer(answer, r.recommend([history], top_k=8)[0], SAME[kind])
        assert answer.notes == [] and not set(answer.numbers) & set(history)


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


@pytest.mark.parametrize("damage", [b"", b"\x80\x04K\x01.", "cut", "flipped", "longer", "text", None], ids=repr)
def test_bytes_that_are_no_state_are_refused(r, damage):
    content = r.start([3]).to_bytes()
    flipped = content[:60] + bytes([content[60] ^ 1]) + content[61:]
    changed = {"cut": content[:-1], "longer": content + b"0", "text": "fMRL" * 20, "flipped": flipped}
    with pytest.raises(InputError, match=r"(not a state of version 1|damaged).*encode the history again"):
        State.from_bytes(changed.get(damage, damage))


def test_a_state_remembers_and_excludes_items_beyond_the_trained_length(shop, r):
    history = [3, 17, 5, 9, 1, 4, 20, 2]
    state, expected = r.start(history), shop.scores(history)
    answer = everything(r, state)
    np.testing.assert_allclose(answer.scores, expected[answer.numbers], atol=1e-5 * np.abs(expected).max())
    assert answer.notes == ["the state remembers 8 items, training had at most 5"]
    assert not np.allclose(answer.scores, everything(r, history).scores, rtol=1e-3)
    [answer] = r.recommend([state], top_k=N - 8)
    assert sorted([*answer.numbers, *history]) == list(range(1, N + 1))


@pytest.mark.parametrize(("num_blocks", "seed"), [(3, 0), (2, 1)])
def test_a_state_of_another_model_or_of_unknown_items_is_refused(r, engine, tmp_path, num_blocks, seed):
    other = write_export(tmp_path / "other", random_model((4, 12), num_blocks=num_blocks, num_items=N, seed=seed))
    state = State.from_bytes(Recommender.from_pretrained(other, engine).start([1]).to_bytes())
    small = State(np.zeros((2, 2, 3), dtype=np.float32), np.zeros(3, dtype=np.float32), (1,), r.model)
    for ask, problem in (
        (lambda: r.recommend([[1], state]), rf"the model '.*', this is '{r.model}'; encode the history again"),
        (lambda: r.step(state, 1), "made by the model"),
        (lambda: r.user_vectors([state]), "made by the model"),
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
    r.update_items([4], titles=["Another title"])
    assert r.step(state, 4).items == (17, 3, 4)
    with pytest.raises(InputError, match="the state remembers item 17, this catalogue has 16; reload the catalogue"):
        other.recommend([state])


def test_dicts_and_data_frames_are_encoded_as_in_training(shop, r):
    for products in (shop.records, pd.DataFrame(shop.records)):
        np.testing.assert_array_equal(r.embed_items(products).astype(np.float16), shop.features)
    assert r.embed_items([]).shape == (0, 1264)


def test_a_product_is_described_by_what_it_has(shop, r):
    expected, pictures = shop.features[:, :1024], shop.features[:, 1024:]
    title_alone = {"title": shop.records[1]["title"], "picture": Path(shop.records[1]["picture"]), "colour": "red"}
    [text], [picture] = np.split(r.embed_items([title_alone]), [1024], axis=1)
    np.testing.assert_array_equal(picture.astype(np.float16), pictures[1])
    assert 0.1 < text @ expected[1] < 0.95
    for nothing in (None, float("nan"), ""):
        [without] = r.embed_items([shop.records[1] | {"picture": nothing}])
        np.testing.assert_array_equal(without[:1024].astype(np.float16), expected[1])
        assert not without[1024:].any()
    [untitled] = r.embed_items([{"picture": shop.records[4]["picture"]}])
    np.testing.assert_array_equal(untitled[1024:].astype(np.float16), pictures[4])
    np.testing.assert_array_equal(untitled[:1024], LexicalEncoder().encode([NO_TEXT])[0])


@pytest.mark.parametrize(
    ("products", "problem"),
    [
        (["a lamp"], "record 1 is 'a lamp'; give a dict with title, brand"),
        ([{"title": "a"}, None], "record 2 is None; give a dict"),
        ({"title": "a"}, r"products must be a list such as \[{'title': 'Rose soap'}\]"),
        ([{"title": "a"}, {}], "record 2 has no text; give it one of title, price, brand, categories"),
        ([{"title": " ", "price": float("nan"), "picture": float("nan"), "colour": "red"}], "record 1 has no text"),
    ],
    ids=repr,
)
def test_products_that_are_not_described_are_refused(r, products, problem):
    with pytest.raises(InputError, match=problem):
        r.embed_items(products)


def test_a_picture_that_cannot_be_read_is_refused_with_the_reason(shop, r, tmp_path):
    (tmp_path / "broken.png").write_text("<html>404</html>")
    draw_picture(tmp_path / "good.png", (9, 9, 9))
    for name in ("broken.png", "missing.png"):
        records = [{"title": "a", "picture": tmp_path / "good.png"}, {"title": "b", "picture": str(tmp_path / name)}]
        with pytest.raises(InputError, match=rf"the picture of record 2 cannot be read \({name}: .*give another"):
            r.embed_items(records)


def test_a_missing_package_is_named_with_what_to_install(shop, r, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"needs a package that is not installed \(.*PIL.*pip install '.\[encoders\]'"):
        r.embed_items(shop.records)


@pytest.fixture
def opened(shop, tmp_path):
    """A function that exports a model of some features and opens it."""

    def open_export(features, **options):
        model = random_model((4,), num_items=N, features=features)
        return Recommender.from_pretrained(write_export(tmp_path / "export", model, shop.catalog, **options))

    return open_export


def test_a_model_of_pictures_alone_reads_only_them(shop, opened):
    r = opened(shop.features[:, 1024:], use_language_encoder=False, use_img_encoder=True)
    embedded = r.embed_items([{"picture": shop.records[0]["picture"]}])
    np.testing.assert_array_equal(embedded.astype(np.float16), shop.features[:1, 1024:])


def test_a_model_of_texts_alone_reads_only_its_attributes(shop, opened):
    r = opened(shop.features[:, :1024], item_attributes=("brand", "title"))
    with pytest.warns(UserWarning, match="trained on texts alone: the pictures are not used"):
        plain = r.embed_items([{"title": "Red lamp", "price": 1, "brand": "Alder", "picture": "no such.png"}])
    np.testing.assert_array_equal(plain, LexicalEncoder().encode(["Brand: Alder Title: Red lamp"]))
    for product in ({"price": 1}, {"picture": shop.records[0]["picture"]}):
        with pytest.raises(InputError, match="record 1 has no text; give it one of brand, title"):
            r.embed_items([product])


@pytest.fixture(scope="module")
def with_bert(shop, tmp_path_factory):
    """(folder with a small BERT, an export of a model trained with it, features of the products)."""
    root = tmp_path_factory.mktemp("bert")
    bert = write_tiny_bert(root / "bert", {"pooling_mode_mean_tokens": True})
    features = item_features(shop.catalog, language=str(bert), image=None, attributes=ATTRIBUTES, cache_root=root)
    model = random_model((4,), num_items=N, features=features)
    return root, write_export(root / "export", model, shop.catalog, language_encoder=str(bert)), features


def test_an_encoder_that_moved_is_read_where_it_is_now(shop, with_bert, tmp_path):
    root, export, features = with_bert
    r = Recommender.from_pretrained(export)
    np.testing.assert_allclose(r.embed_items(shop.catalog.metadata), features, rtol=HALF, atol=1e-6)
    moved = (root / "bert").rename(tmp_path / "elsewhere")
    try:
        np.testing.assert_allclose(r.embed_items(shop.catalog.metadata), features, rtol=HALF, atol=1e-6)  # it is loaded
        r = Recommender.from_pretrained(export)
        with pytest.raises(InputError, match="bert' is not there any more; give the folder it is in now as lang"):
            r.embed_items(shop.catalog.metadata)
        embedded = r.embed_items(shop.catalog.metadata, language_encoder=str(moved))
    finally:
        moved.rename(root / "bert")
    np.testing.assert_allclose(embedded, features, rtol=HALF, atol=1e-6)


@pytest.mark.parametrize("other", ["lexical", "another bert", "another pooling"])
def test_another_encoder_than_in_training_is_refused(shop, with_bert, tmp_path, other):
    root, export, _ = with_bert
    pooling = {"pooling_mode_cls_token" if other == "another pooling" else "pooling_mode_mean_tokens": True}
    seed = 1 if other == "another bert" else 0
    name = other if other == "lexical" else str(write_tiny_bert(tmp_path / "bert", pooling, seed))
    trained = re.escape(str(root / "bert"))
    problem = rf"the encoder '{name}' is not '{trained}', which the model was trained on.* as language_encoder$"
    with pytest.raises(InputError, match=problem):
        Recommender.from_pretrained(export).embed_items(shop.catalog.metadata, language_encoder=name)
    with pytest.raises(InputError, match=r"the encoder 'ViT-B-32/openai' is not 'pixel'.* as img_encoder"):
        shop.open("onnx").embed_items(shop.records, img_encoder="ViT-B-32/openai")
