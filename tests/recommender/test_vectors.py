"""Vectors of users and items, and items like an item."""

import numpy as np
import pytest

from common.errors import InputError
from tests.recommender.shop import IDS, N, everything


def test_a_users_vector_times_an_items_vector_is_the_score(shop, engine, kind):
    r, histories = shop.open(engine, kind), [[3, 17], [], [9, 1, 4, 20, 2, 7, 3], ["no", 5]]
    users, items = r.user_vectors(histories), r.item_vectors()
    assert users.dtype == items.dtype == np.float32 and items.shape == (N, 12)
    np.testing.assert_array_equal(r.item_vectors([IDS[4], 2]), items[[4, 1]])
    for history, user in zip(histories, users, strict=True):
        answer = everything(r, history)
        scores = (items @ user)[np.array(answer.numbers) - 1]
        # onnxruntime rounds a user's vector of an int8 export to 63 steps a side.
        tolerance = 0.05 if kind == "int8" and engine == "onnx" else 1e-5
        np.testing.assert_allclose(scores, answer.scores, atol=tolerance * np.abs(scores).max())
    np.testing.assert_allclose(r.user_vectors([r.start([3, 17])]), users[:1], rtol=1e-2, atol=1e-2)
    assert r.user_vectors([]).shape == (0, 12)


def test_similar_items_have_the_largest_cosine(shop, engine, kind, monkeypatch):
    monkeypatch.setattr("serving.recommender.CHUNK", 7)
    r = shop.open(engine, kind)
    unit = r.item_vectors() / np.linalg.norm(r.item_vectors(), axis=1, keepdims=True)
    for item, answer in zip([4, IDS[6]], r.similar_items([4, IDS[6]], top_k=5), strict=True):
        number = r.items.number(item)
        cosine = unit @ unit[number - 1]
        cosine[number - 1] = -np.inf
        best = np.argsort(-cosine)[:5]
        assert answer.numbers == (best + 1).tolist() and answer.ids == [IDS[i] for i in best]
        np.testing.assert_allclose(answer.scores, cosine[best], rtol=1e-4)
    [among] = r.similar_items([4], candidates=r.filter([4, 1, 2]))
    assert sorted(among.numbers) == [1, 2] and among.notes == ["only 2 items are left to rank, fewer than top_k 10"]
    with pytest.raises(InputError, match="unknown: 'no'"):
        r.similar_items(["no"])
