"""New products are added without training."""

import numpy as np
import pytest

from common.errors import InputError
from serving import Recommender
from tests.recommender.shop import IDS, N, assert_same_answer, everything, write_id_branch


def test_added_items_can_be_recommended_and_be_in_histories(shop, engine):
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


def test_items_added_to_a_float16_export_are_rounded_to_float16(shop, engine):
    r, exact = (shop.first(engine, kind, 16) for kind in ("float16", "none"))
    for x in (r, exact):
        x.add_items(["NEW"], shop.features[16:17])
    rows = [x.items.table.rows()[-1] for x in (r, exact)]
    np.testing.assert_array_equal(rows[0], rows[1].astype(np.float16))
    assert (rows[0] != rows[1]).any()


def test_titles_are_optional_and_no_items_can_be_added_too(shop, engine):
    r = shop.first(engine, "none", 16)
    r.add_items(["NEW"], shop.features[16:17])
    assert everything(r, [], candidates=["NEW", 1], top_k=2).titles.count("") == 1
    before = everything(r, [3])
    r.add_items([], r.embed_items([]))
    assert everything(r, [3]) == before


NEW = ["NEW-1", "NEW-2"]
MATRIX = np.ones((2, 1264), dtype=np.float32)


@pytest.mark.parametrize(
    ("ids", "features", "titles", "message"),
    [
        (["NEW", IDS[4]], MATRIX, None, f"item '{IDS[4]}' exists already; leave it out"),
        (NEW, MATRIX[:, 1:], None, r"features of shape \[2, 1263\] for 2 items: must be \[2, 1264\]"),
        (NEW, MATRIX * [[1], [np.nan]], None, "the features of item 'NEW-2' are not finite, or far too large"),
        (NEW, MATRIX, ["one", None], "the title of item 'NEW-2' is None; give a string"),
        (NEW, MATRIX, "ab", "titles must be a list such as"),
        (NEW, [[1.0], [1.0, 2.0]], None, "features must be an array of numbers"),
        ("XY", MATRIX, None, r"ids must be a list such as \['id', 'id'\], not 'XY'"),
    ],
)
def test_invalid_items_are_refused_and_nothing_changes(shop, r, ids, features, titles, message):
    before, state = everything(r, [3, 17]), r.start([3])
    with pytest.raises(InputError, match=message):
        r.add_items(ids, features, titles)
    assert len(r) == N
    assert everything(r, [3, 17]) == before
    assert r.recommend([["NEW"]], top_k=1)[0].notes[0].startswith("unknown: 'NEW' (of 20 items)")
    r.add_items(["NEW"], shop.features[:1])
    assert r.step(state, "NEW").items == (3, N + 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kind", "large"), [("none", 3e38), ("float16", 1e6), ("int8", 3e38)])
def test_features_whose_embedding_overflows_are_refused(shop, engine, kind, large):
    r = shop.open(engine, kind)
    with pytest.raises(InputError, match="the features of item 'NEW' are not finite, or far too large"):
        r.add_items(["NEW"], np.full((1, 1264), large, dtype=np.float32))
    assert len(r) == N


def test_a_table_learned_without_features_cannot_grow(engine, tmp_path):
    r = Recommender.from_pretrained(write_id_branch(tmp_path / "learned"), engine)
    with pytest.raises(InputError, match="learned without features, so no items can be added"):
        r.add_items(["NEW"], np.ones((1, 12), dtype=np.float32))
    assert len(r.recommend([[3]], top_k=3)[0].ids) == 3
