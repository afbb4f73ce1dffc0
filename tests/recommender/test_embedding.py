"""New products are encoded as in training."""

import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from datasets.features.text import LexicalEncoder
from datasets.text import NO_TEXT
from serving import Recommender
from tests.exported import write_export
from tests.made_up import random_model
from tests.prepared import draw_picture, item_features, put_in_hub_cache, write_tiny_bert
from tests.recommender.shop import ATTRIBUTES, HALF, IDS, N, assert_same_answer, everything, write_id_branch


class Frame:
    """Stands for a pandas DataFrame: one record per row, NaN in empty cells."""

    def __init__(self, records: list[dict]) -> None:
        self.rows = records

    def to_dict(self, orient: str) -> list[dict]:
        assert orient == "records"
        columns = dict.fromkeys(name for record in self.rows for name in record)
        return [{name: record.get(name, float("nan")) for name in columns} for record in self.rows]


def test_dicts_and_data_frames_are_encoded_as_in_training(shop, r):
    for products in (shop.records, Frame(shop.records)):
        np.testing.assert_array_equal(r.embed_items(products).astype(np.float16), shop.features)
    assert r.embed_items([]).shape == (0, 1264)


def test_a_product_encoded_and_added_scores_as_if_it_had_been_trained_on(shop, engine):
    r = shop.first(engine, "none", 16)
    r.add_items(IDS[16:], r.embed_items(shop.records[16:]))
    assert_same_answer(everything(r, [3, 18]), everything(shop.open(engine), [3, 18]), HALF)


def test_a_product_is_described_by_what_it_has(shop, r):
    title_alone = {"title": shop.records[1]["title"], "picture": Path(shop.records[1]["picture"]), "colour": "red"}
    text, picture = np.split(r.embed_items([title_alone]), [1024], axis=1)
    np.testing.assert_array_equal(picture[0].astype(np.float16), shop.features[1, 1024:])
    assert 0.1 < text[0] @ shop.features[1, :1024] < 0.95


@pytest.mark.parametrize("nothing", [None, float("nan"), ""], ids=repr)
def test_without_a_picture_its_features_are_zeros_as_in_training(shop, r, nothing):
    records = [shop.records[0], shop.records[1] | {"picture": nothing}]
    embedded = r.embed_items(records)
    np.testing.assert_array_equal(embedded[0].astype(np.float16), shop.features[0])
    np.testing.assert_array_equal(embedded[1, :1024].astype(np.float16), shop.features[1, :1024])
    assert not embedded[1, 1024:].any()


def test_without_a_text_but_with_a_picture_the_text_is_that_of_an_unknown_item(shop, r):
    [embedded] = r.embed_items([{"picture": shop.records[4]["picture"]}])
    np.testing.assert_array_equal(embedded[1024:].astype(np.float16), shop.features[4, 1024:])
    np.testing.assert_array_equal(embedded[:1024], LexicalEncoder().encode([NO_TEXT])[0])


@pytest.mark.parametrize(
    "record", [{}, {"title": " ", "price": float("nan"), "picture": float("nan"), "colour": "red"}]
)
def test_a_product_without_text_and_picture_is_refused_with_the_text_attributes(shop, r, record):
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


@pytest.mark.parametrize(
    ("products", "problem"),
    [
        (["a lamp"], "record 1 is 'a lamp'; give a dict with title, brand"),
        ([{"title": "a"}, None], "record 2 is None; give a dict"),
        ({"title": "a"}, r"products must be a list such as \[{'title': 'Rose soap'}\]"),
        ("a lamp", "products must be a list such as"),
        (3, "products must be a list such as"),
    ],
    ids=repr,
)
def test_a_value_that_is_no_list_of_dicts_is_refused(r, products, problem):
    with pytest.raises(InputError, match=problem):
        r.embed_items(products)


def test_a_missing_package_is_named_with_what_to_install(shop, r, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"needs a package that is not installed \(.*PIL.*pip install '.\[encoders\]'"):
        r.embed_items(shop.records)


def test_a_model_that_reads_pictures_alone_needs_no_text(shop, engine, tmp_path):
    model = random_model((4,), num_items=N, features=shop.features[:, 1024:])
    folder = write_export(tmp_path / "pictures", model, shop.catalog, use_language_encoder=False, use_img_encoder=True)
    embedded = Recommender.from_pretrained(folder, engine).embed_items([{"picture": shop.records[0]["picture"]}])
    np.testing.assert_array_equal(embedded.astype(np.float16), shop.features[:1, 1024:])


def test_a_model_trained_on_texts_alone_warns_that_pictures_are_not_used(shop, engine, tmp_path):
    model = random_model((4,), num_items=N, features=shop.features[:, :1024])
    r = Recommender.from_pretrained(write_export(tmp_path / "texts", model, shop.catalog), engine)
    with pytest.warns(UserWarning, match="trained on texts alone: the pictures are not used"):
        embedded = r.embed_items([shop.records[0] | {"picture": "no such.png"}])
    np.testing.assert_array_equal(embedded.astype(np.float16), shop.features[:1, :1024])
    with pytest.raises(InputError, match="record 1 has no text"):
        r.embed_items([{"picture": shop.records[0]["picture"]}])


def test_texts_are_made_of_the_attributes_of_the_training(shop, engine, tmp_path):
    model = random_model((4,), num_items=N, features=shop.features[:, :1024])
    folder = write_export(tmp_path / "brands", model, shop.catalog, item_attributes=("brand", "title"))
    embed = Recommender.from_pretrained(folder, engine).embed_items
    plain = embed([{"brand": "Alder", "title": "Red lamp"}])
    np.testing.assert_array_equal(plain, LexicalEncoder().encode(["Brand: Alder Title: Red lamp"]))
    np.testing.assert_array_equal(embed([{"title": "Red lamp", "price": 1, "brand": "Alder"}]), plain)
    with pytest.raises(InputError, match="has no text; give it one of brand, title"):
        embed([{"price": 1}])


def test_a_model_without_features_encodes_nothing(engine, tmp_path):
    r = Recommender.from_pretrained(write_id_branch(tmp_path / "learned"), engine)
    with pytest.raises(InputError, match="this model read no features, so there is nothing to embed"):
        r.embed_items([{"title": "a"}])


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
    np.testing.assert_allclose(r.embed_items(shop.catalog.metadata), features, rtol=HALF, atol=1e-6)  # it is loaded
    try:
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
    with pytest.raises(InputError) as raised:
        Recommender.from_pretrained(export).embed_items(shop.catalog.metadata, language_encoder=name)
    message = str(raised.value)
    assert message.startswith(f"the encoder {name!r} is not {str(root / 'bert')!r}, which the model was trained on")
    assert message.endswith("give the path of that one as language_encoder")


def test_another_picture_encoder_than_in_training_is_refused(shop, r):
    with pytest.raises(InputError, match=r"the encoder 'ViT-B-32/openai' is not 'pixel'.* as img_encoder"):
        r.embed_items(shop.records, img_encoder="ViT-B-32/openai")


def test_an_encoder_of_the_hub_is_read_at_the_commit_of_training(shop, engine, tmp_path, hub):
    pooling = {"pooling_mode_mean_tokens": True}
    put_in_hub_cache(hub, "org/tiny", "a" * 40, write_tiny_bert(tmp_path / "one", pooling, seed=1))
    features = item_features(shop.catalog, language="org/tiny", image=None, attributes=("title",), cache_root=tmp_path)
    model = random_model((4,), num_items=N, features=features)
    folder = write_export(
        tmp_path / "export", model, shop.catalog, language_encoder="org/tiny", item_attributes=("title",)
    )
    r = Recommender.from_pretrained(folder, engine)
    np.testing.assert_allclose(r.embed_items(shop.catalog.metadata), features, rtol=HALF, atol=1e-6)
    put_in_hub_cache(hub, "org/tiny", "b" * 40, write_tiny_bert(tmp_path / "two", pooling, seed=2))
    np.testing.assert_allclose(r.embed_items(shop.catalog.metadata), features, rtol=HALF, atol=1e-6)
