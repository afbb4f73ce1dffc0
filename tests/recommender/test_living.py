"""A catalogue that changes while many threads read it, and a folder that is replaced."""

import threading
import time

import numpy as np
import pytest

from common.errors import InputError
from serving import Recommender
from tests.exported import write_export
from tests.made_up import random_model
from tests.recommender.shop import IDS, N, assert_same_answer, everything, write_id_branch

# --------------------------------------------------------------------------------------------------- update and remove


def test_updated_items_have_the_embeddings_and_titles_of_their_new_features(shop, engine, kind):
    r, expected = shop.open(engine, kind), shop.open(engine, kind)
    old, before = r.items, everything(r, [3])
    r.update_items([IDS[1], 5], shop.features[[6, 8]])
    expected_rows = expected.item_vectors()[[6, 8]]
    np.testing.assert_allclose(r.item_vectors([2, 5]), expected_rows, rtol=2**-10, atol=1e-6)
    assert everything(r, [3]) != before
    r.update_items([2], titles=["Another title"])
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
    ],
)
def test_a_change_that_is_refused_changes_nothing(r, change, problem):
    r.remove_items([20])
    before, catalogue = everything(r, [3]), r.items
    with pytest.raises(InputError, match=problem):
        change(r)
    assert r.items is catalogue and everything(r, [3]) == before


def test_a_learned_table_can_be_thinned_but_not_grow(engine, tmp_path):
    r = Recommender.from_pretrained(write_id_branch(tmp_path / "learned"), engine)
    r.remove_items([1])
    with pytest.raises(InputError, match="learned without features"):
        r.update_items([2], np.ones((1, 12)))
    assert len(r) == N - 1


def test_adding_an_item_copies_neither_the_table_nor_the_ids(shop, engine, kind):
    r = shop.first(engine, kind, 16)
    for number in range(3):
        before = r.items
        r.add_items([f"NEW-{number}"], shop.features[[16]])
        assert np.shares_memory(before.table.rows(), r.items.table.rows())
        assert r.items.exported is before.exported
        assert len(before) == 16 + number and f"NEW-{number}" in r and not before.number(f"NEW-{number}")


# ------------------------------------------------------------------------------------------------------- many threads


def race(shop, seconds: float, readers: int = 8, engine: str = "onnx", kind: str = "none") -> int:
    """Let readers answer while four writers change the catalogue; check every answer. Returns how many there were.

    Each writer owns one item, so that every catalogue can be told apart by the items that it has.
    """
    r, stop = shop.first(engine, kind, 16), time.monotonic() + seconds
    snapshots, lock = {id(r._now): r._now}, threading.Lock()
    answers, errors = [], []

    def changes(writer: int):
        new, own = f"NEW-{writer}", 13 + writer
        yield lambda: r.add_items([new], shop.features[[16 + writer]])
        while True:
            yield lambda: r.update_items([own], shop.features[[own % 7]])
            yield lambda: r.remove_items([new, own])
            yield lambda: r.add_items([new, IDS[own - 1]], shop.features[[16 + writer, own - 1]])
            yield lambda: r.add_items([f"{new}-{time.monotonic_ns()}"], shop.features[[writer]])

    def write(writer: int):
        for change in changes(writer):
            if time.monotonic() > stop:
                return
            with lock:  # to see each snapshot; the readers do not take it
                change()
                snapshots[id(r._now)] = r._now
            time.sleep(0.02)

    def read(reader: int):
        histories = [[3, 5], ["NEW-1", 2], []]
        while time.monotonic() < stop:
            answers.append((reader % 3, r.recommend([histories[reader % 3]], top_k=8)[0]))

    def guarded(call, number):
        try:
            call(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(write, i)) for i in range(4)]
    threads += [threading.Thread(target=guarded, args=(read, i)) for i in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    possible = [set(), set(), set()]
    opened = shop.first(engine, kind, 16)
    for snapshot in snapshots.values():
        opened._now = snapshot
        for which, history in enumerate([[3, 5], ["NEW-1", 2], []]):
            possible[which].add(repr(opened.recommend([history], top_k=8)[0]))
    assert all(repr(answer) in possible[which] for which, answer in answers)
    assert len(snapshots) > 20
    return len(answers)


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_while_threads_change_the_catalogue_every_answer_is_that_of_one_catalogue(shop, kind):
    assert race(shop, seconds=2, kind=kind) > 100


# -------------------------------------------------------------------------------------------------------- hot reload


@pytest.fixture
def folder(shop, tmp_path):
    return write_export(tmp_path / "export", random_model((4, 12), features=shop.features, num_items=N, seed=1))


def replace_by(folder, shop, seed):
    model = random_model((4, 12), features=shop.features, num_items=N, seed=seed)
    write_export(folder, model, overwrite=True)


def test_a_folder_is_opened_again_only_if_it_changed(shop, engine, folder):
    r = Recommender.from_pretrained(folder, engine)
    before, state, model, rule = everything(r, [3]), r.start([3]), r.model, r.filter([1, 2])
    assert not r.reload() and everything(r, [3]) == before
    replace_by(folder, shop, seed=2)
    assert everything(r, [3]) == before
    assert r.reload() and not r.reload()
    assert everything(r, [3]) == everything(Recommender.from_pretrained(folder, engine), [3]) != before
    with pytest.raises(InputError, match=f"made by the model '{model}', this is '{r.model}'"):
        r.step(state, 1)
    with pytest.raises(InputError, match="the filter was made before the export was reloaded; make it again"):
        r.recommend([[3]], candidates=rule)


def test_a_link_that_points_to_another_export_is_followed(shop, folder, tmp_path):
    other = write_export(tmp_path / "other", random_model((4,), num_items=N, seed=2))
    (tmp_path / "current").symlink_to(folder)
    r = Recommender.from_pretrained(tmp_path / "current")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(other)
    assert r.reload() and r.config["size"] == 4


def test_a_broken_folder_is_refused_and_the_open_model_stays(r, shop, folder):
    r = Recommender.from_pretrained(folder)
    before = everything(r, [3])
    replace_by(folder, shop, seed=2)
    (folder / "items.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"items.safetensors has 3 bytes instead of"):
        r.reload()
    assert everything(r, [3]) == before


# ------------------------------------------------------------------------------------------------------------- saving


def test_a_changed_catalogue_is_saved_and_opened(shop, engine, tmp_path):
    r = shop.first(engine, "float16", 16)
    r.add_items(IDS[16:18], shop.features[16:18], ["New", "Newer"])
    r.remove_items([3, 17])
    r.update_items([2, 18], shop.features[[9, 9]], ["Second", "Last"])
    r.save_pretrained(tmp_path / "saved")
    opened = Recommender.from_pretrained(tmp_path / "saved", engine)
    assert (len(opened), len(opened.items), opened.config["version"]) == (16, 18, 2)
    assert "ranks 16 items" in (tmp_path / "saved/README.md").read_text()
    assert [opened.items.title(i) for i in (2, 18, 17)] == ["Second", "Last", "New"]
    assert_same_answer(everything(opened, [2, 3]), everything(r, [2, 3]))
    assert opened.recommend([r.start([17])])[0].notes == []
    opened.add_items([IDS[2], IDS[16]], shop.features[[2, 16]])
    opened.save_pretrained(tmp_path / "whole")
    assert Recommender.from_pretrained(tmp_path / "whole").config["version"] == 1
