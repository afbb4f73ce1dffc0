"""Compute items' features once, cache them by everything they depend on, and make damaged caches again."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import InputError
from datasets.catalog import Catalog, load_catalog
from datasets.features import cache, image, text
from datasets.features.image import PixelEncoder
from datasets.features.text import LexicalEncoder
from datasets.text import NO_TEXT, item_text
from tests.prepared import (
    draw_picture,
    item_features,
    put_in_hub_cache,
    write_item2img,
    write_prepared,
    write_tiny_bert,
)

REPOSITORY = Path(__file__).parent.parent
ATTRIBUTES = ("title", "brand")
PICTURES = {"language": None, "image": "pixel"}  # arguments of item_features for pictures alone
FIRST = {"pooling_mode_cls_token": True}


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    """Seven items with text and pictures."""
    return load_catalog(write_prepared(tmp_path, users=5, items=7, pictures=True).parent, "tiny")


@pytest.fixture
def encoded(monkeypatch) -> list[list]:
    """Return a list that collects the batches given to the built-in encoders."""
    batches = []
    for encoder in (LexicalEncoder, PixelEncoder):

        def counting(self, prepared, forward=encoder.forward):
            batches.append(prepared)
            return forward(self, prepared)

        monkeypatch.setattr(encoder, "forward", counting)
    return batches


class Shop:
    """item_features with its own cache, the lexical encoder by default, and the lines it reported."""

    def __init__(self, cache_root: Path) -> None:
        self.cache_root, self.said = cache_root, []

    def features(self, catalog: Catalog, **changes) -> np.ndarray | None:
        self.said.clear()
        arguments = {"language": "lexical", "image": None, "attributes": ATTRIBUTES} | changes
        return item_features(catalog, **arguments, cache_root=self.cache_root, say=self.said.append)

    def files(self) -> list[Path]:
        """The cached features, unfinished ones included."""
        return list(self.cache_root.rglob("*.npy"))

    @property
    def file(self) -> Path:
        [path] = self.files()
        return path


@pytest.fixture
def shop(tmp_path) -> Shop:
    return Shop(tmp_path / "cache")


def sidecar_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def with_metadata(catalog: Catalog, metadata: list[dict]) -> Catalog:
    return dataclasses.replace(catalog, metadata=metadata)


# ------------------------------------------------------------------------------------------------------------ features


def test_rows_hold_the_texts_then_the_pictures_of_the_items_in_order(catalog, shop, encoded):
    texts = [item_text(record, ATTRIBUTES) for record in catalog.metadata]
    assert len(set(map(len, texts))) > 2  # texts are encoded longest first
    expected = (LexicalEncoder().encode(texts), PixelEncoder().encode([Image.open(path) for path in catalog.pictures]))
    encoded.clear()
    rows = shop.features(catalog, image="pixel", batch_size=3)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.concatenate(expected, axis=1).astype(np.float16))
    assert [len(batch) for batch in encoded] == [3, 3, 1] * 2


def test_without_encoders_there_are_no_features_and_no_files(catalog, shop):
    assert shop.features(catalog, language=None) is None
    assert shop.files() == []


def test_pictures_are_decoded_one_after_another_however_large_the_batch(catalog, shop, monkeypatch):
    opened, alive = [], []

    def watching(path, open_picture=image.open_picture):
        picture, reason = open_picture(path)
        opened.append(weakref.ref(picture))
        alive.append(sum(picture() is not None for picture in opened))
        return picture, reason

    monkeypatch.setattr(image, "open_picture", watching)
    shop.features(catalog, **PICTURES, batch_size=7)
    assert len(alive) == 7
    assert max(alive) <= 3  # the first of a batch, the last and this one


# ----------------------------------------------------------------------------------------------------------- the cache


def test_cached_features_are_returned_without_encoding_again(catalog, shop, encoded):
    first = shop.features(catalog, image="pixel")
    encoded.clear()
    unread = with_metadata(catalog, [record | {"price": 5} for record in catalog.metadata])
    np.testing.assert_array_equal(shop.features(unread, image="pixel"), first)
    assert (encoded, shop.said) == ([], [])


def changed_text(catalog: Catalog) -> Catalog:
    return with_metadata(catalog, [catalog.metadata[0] | {"title": "Other"}, *catalog.metadata[1:]])


def changed_picture(catalog: Catalog) -> Catalog:
    """Replace a picture by one of the same name and size in bytes."""
    picture = catalog.pictures[2]
    os.utime(picture, ns=(1, picture.stat().st_mtime_ns + 1))
    return catalog


def moved_picture(catalog: Catalog) -> Catalog:
    """Read a picture of the same name, size and time from another folder."""
    (catalog.photos / "other").mkdir()
    moved = shutil.copy2(catalog.pictures[2], catalog.photos / "other")
    return dataclasses.replace(catalog, pictures=[*catalog.pictures[:2], Path(moved), *catalog.pictures[3:]])


def reversed_items(catalog: Catalog) -> Catalog:
    return dataclasses.replace(catalog, asins=catalog.asins[::-1], metadata=catalog.metadata[::-1])


@pytest.mark.parametrize("change", [changed_text, reversed_items, changed_picture, moved_picture])
def test_changed_items_are_encoded_into_another_cache(catalog, shop, encoded, change):
    arguments = PICTURES if "picture" in change.__name__ else {}
    shop.features(catalog, **arguments)
    encoded.clear()
    shop.features(change(catalog), **arguments)
    assert (len(encoded), len(shop.files())) == (1, 2)


def test_other_weights_of_the_encoder_fill_another_cache(catalog, shop, tmp_path):
    model = write_tiny_bert(tmp_path / "bert", seed=1)
    before = shop.features(catalog, language=str(model))
    shutil.rmtree(model)
    write_tiny_bert(tmp_path / "bert", seed=2)
    assert not np.allclose(shop.features(catalog, language=str(model)), before)
    assert len(shop.files()) == 2


def test_a_cache_keyed_by_every_file_of_the_encoder_is_still_used(catalog, shop, tmp_path, monkeypatch):
    model = write_tiny_bert(tmp_path / "bert")
    (model / "README.md").write_text("A model")
    with monkeypatch.context() as earlier:
        earlier.setattr(text, "_loaded_files", lambda folder: folder.rglob("*"))
        before = shop.features(catalog, language=str(model))
    np.testing.assert_array_equal(shop.features(catalog, language=str(model)), before)
    assert len(shop.files()) == 1


def test_cached_features_need_no_encoder(catalog, shop, tmp_path, monkeypatch):
    model = write_tiny_bert(tmp_path / "bert")
    before = shop.features(catalog, language=str(model))
    monkeypatch.setattr(text, "load_encoder", None)  # a call fails
    np.testing.assert_array_equal(shop.features(catalog, language=str(model)), before)


def test_another_commit_of_a_hub_encoder_is_reported_and_encoded_again(catalog, shop, hub, tmp_path):
    put_in_hub_cache(hub, "org/tiny", "a" * 40, write_tiny_bert(tmp_path / "one", FIRST, seed=1))
    first = shop.features(catalog, language="org/tiny")
    np.testing.assert_array_equal(shop.features(catalog, language="org/tiny"), first)
    assert shop.said == []

    put_in_hub_cache(hub, "org/tiny", "b" * 40, write_tiny_bert(tmp_path / "two", FIRST, seed=2))
    assert not np.allclose(shop.features(catalog, language="org/tiny"), first)
    assert any("a" * 40 in line and "b" * 40 in line and "made again" in line for line in shop.said)


def test_the_commit_that_the_first_encoding_downloads_is_noted(catalog, shop, hub, tmp_path, monkeypatch):
    def fetching(name, *arguments, load=text.load_encoder):
        put_in_hub_cache(hub, name, "a" * 40, write_tiny_bert(tmp_path / "model", FIRST))
        return load(name, *arguments)

    monkeypatch.setattr(text, "load_encoder", fetching)
    shop.features(catalog, language="org/tiny")
    assert sidecar_of(shop.file)["commit"] == "a" * 40


def test_the_name_of_a_cache_tells_dataset_and_encoder(catalog, shop, tmp_path):
    shop.features(catalog, image="pixel")
    shop.features(dataclasses.replace(catalog, name="other"))
    shop.features(catalog, language=str(write_tiny_bert(tmp_path / "my bert!")))
    names = sorted(str(path.relative_to(shop.cache_root).with_suffix(""))[:-17] for path in shop.files())
    assert names == ["other/language-lexical", "tiny/image-pixel", "tiny/language-lexical", "tiny/language-my-bert"]


# ------------------------------------------------------------------------------------------------------ damaged caches


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-5]), id="truncated"),
        pytest.param(flip_a_byte, id="flipped bit"),
        pytest.param(lambda path: flip_a_byte(path.with_suffix(".json")), id="flipped bit in the sidecar"),
        pytest.param(lambda path: path.with_suffix(".json").unlink(), id="no sidecar"),
        pytest.param(lambda path: path.with_suffix(".json").write_text("[]"), id="invalid sidecar"),
    ],
)
def test_a_damaged_cache_is_reported_and_made_again(catalog, shop, encoded, damage):
    before = shop.features(catalog)
    damage(shop.file)
    encoded.clear()
    np.testing.assert_array_equal(shop.features(catalog), before)
    assert len(encoded) == 1
    assert any(str(shop.file) in line and "made again" in line for line in shop.said)
    shop.features(catalog)
    assert (len(encoded), shop.said) == (1, [])


@pytest.mark.parametrize(("suffixes", "reason"), [([".npy"], "checksum"), ([".npy", ".json"], "another key")])
def test_a_cache_of_other_items_is_not_used(catalog, shop, suffixes, reason):
    before, own = shop.features(catalog), shop.file
    shop.features(reversed_items(catalog))
    [other] = set(shop.files()) - {own}
    for suffix in suffixes:
        own.with_suffix(suffix).write_bytes(other.with_suffix(suffix).read_bytes())
    np.testing.assert_array_equal(shop.features(catalog), before)
    assert any(reason in line for line in shop.said)


def test_ctrl_c_while_finishing_costs_no_batch(catalog, shop, encoded, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "sha256", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shop.features(catalog)
    assert not [path for path in shop.files() if not path.stem.endswith((".partial", ".done"))]
    encoded.clear()
    rows = shop.features(catalog)
    assert (encoded, len(shop.files())) == ([], 1)
    expected = LexicalEncoder().encode([item_text(record, ATTRIBUTES) for record in catalog.metadata])
    np.testing.assert_array_equal(rows, expected.astype(np.float16))


@pytest.mark.slow
def test_a_full_disk_is_reported_in_one_line_and_leaves_no_partial_file(catalog, shop, tmp_path):
    limit_file_size = (
        "import resource, sys; from pathlib import Path\n"
        "from common.cli import run_cli; from datasets.catalog import load_catalog\n"
        "from config import FeatureSettings; from datasets.features.load import load_features\n"
        "settings = FeatureSettings(language_encoder='lexical', use_img_encoder=False)\n"
        "catalog = load_catalog(sys.argv[1], 'tiny')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "run_cli(lambda: load_features(settings, catalog, 'cpu', cache_root=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", limit_file_size, str(tmp_path), str(shop.cache_root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert shop.files() == []
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: cannot write {shop.cache_root}")


# ------------------------------------------------------------------------------------------------------------ pictures


def broken_list(shop: Shop) -> dict[str, str]:
    assert any(str(shop.file.with_suffix(".json")) in line for line in shop.said)
    return sidecar_of(shop.file)["broken"]


def missing(path: Path) -> None:
    path.unlink()


def html(path: Path) -> None:
    path.write_text("<html>404</html>")


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def eps(path: Path) -> None:
    with Image.open(path) as picture:
        picture.save(path, "EPS")  # decoding it would start Ghostscript


@pytest.mark.parametrize("make", [missing, html, truncated, eps])
def test_an_unreadable_picture_gives_zeros_and_is_named_with_the_reason_at_every_use(catalog, shop, encoded, make):
    for path in catalog.pictures[2:4]:
        make(path)
    rows = shop.features(catalog, **PICTURES, batch_size=2)
    assert rows.any(axis=1).tolist() == [True, True, False, False, True, True, True]
    assert [len(batch) for batch in encoded] == [2, 2, 1]  # none of the unreadable batch
    assert "2 of 7 items have no readable picture" in shop.said[0]
    for asin, path in zip(catalog.asins[2:4], catalog.pictures[2:4], strict=True):
        assert re.match(rf"{path.name}: \S", broken_list(shop)[asin])
    first = list(shop.said)
    shop.features(catalog, **PICTURES)
    assert (shop.said, len(encoded)) == (first, 3)


@pytest.mark.parametrize(("listed", "reason"), [(True, r"B000000001\.png: .*"), (False, r"no item2img\.json")])
def test_a_dataset_without_any_readable_picture_is_refused(catalog, shop, listed, reason):
    for path in catalog.pictures:
        path.unlink()
    with pytest.raises(InputError, match=rf"tiny has no picture that can be read \({reason}\).*--no-use_img_encoder"):
        shop.features(catalog if listed else dataclasses.replace(catalog, pictures=None), **PICTURES)
    assert shop.files() == []


def test_a_picture_larger_than_memory_allows_is_not_decoded(catalog, shop, monkeypatch):
    draw_picture(catalog.pictures[1], (9, 9, 9), side=40)
    monkeypatch.setattr(image, "MAX_PIXELS", 16 * 16)  # as large as the others
    assert shop.features(catalog, **PICTURES).any(axis=1).tolist() == [True, False, *[True] * 5]
    assert "40 x 40 pixels, more than 256" in broken_list(shop)[catalog.asins[1]]


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(image.open_picture(tmp_path / "a.png")[0], upright)


def test_transparency_becomes_white_and_16_bits_of_grey_become_8(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (2, 2), 0).save(tmp_path / "b.png", transparency=0)
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "c.png")
    a, b, c = (np.asarray(image.open_picture(tmp_path / name)[0]) for name in ("a.png", "b.png", "c.png"))
    assert (a == 255).all() and (b == 255).all()
    assert c[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_an_ordinary_picture_is_decoded_as_by_pillow(tmp_path, kind):
    noise = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a", kind)
    np.testing.assert_array_equal(image.open_picture(tmp_path / "a")[0], Image.open(tmp_path / "a").convert("RGB"))


def test_an_item_without_picture_gives_zeros_and_is_counted(tmp_path, shop):
    folder = write_prepared(tmp_path, "gaps", users=3, items=5, pictures=True)
    write_item2img(folder, {"2": "B000000002.png", "4": "B000000004.png"})
    catalog = load_catalog(tmp_path, "gaps")
    assert shop.features(catalog, **PICTURES).any(axis=1).tolist() == [False, True, False, True, False]
    assert "3 of 5 items have no readable picture" in shop.said[0]
    assert broken_list(shop) == dict.fromkeys(catalog.asins[::2], "no picture listed")


# --------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("nothing", [{}, {"colour": None}, {"colour": [[""]]}, {"colour": float("nan")}], ids=repr)
def test_an_attribute_that_no_item_has_is_reported_and_left_out(catalog, shop, nothing):
    without = shop.features(catalog)
    catalog = with_metadata(catalog, [record | {"zero": 0} | nothing for record in catalog.metadata])
    np.testing.assert_array_equal(shop.features(catalog, attributes=("title", "colour", "brand", "size")), without)
    assert shop.said == ["no item has colour or size: left out of the texts"]
    shop.features(catalog, attributes=("zero",))
    assert shop.said == []


def test_items_without_text_are_counted_and_share_one_text(catalog, shop):
    rows = shop.features(with_metadata(catalog, [{}, *catalog.metadata[1:6], {"title": None}]))
    assert shop.said == [f"2 of 7 items have no text: encoded as {NO_TEXT!r}"]
    np.testing.assert_array_equal(rows[[0, 6]], LexicalEncoder().encode([NO_TEXT] * 2))


def test_a_list_of_unknown_attributes_is_refused_with_the_known_ones(catalog, shop):
    with pytest.raises(InputError) as raised:
        shop.features(catalog, attributes=("colour", "size"))
    message = str(raised.value)
    assert message.startswith("--item_attributes colour,size: no item of tiny has any of them")
    for known in ("title", "price", "brand", "categories"):
        assert known in message
    assert shop.files() == []


def test_an_encoder_with_weights_that_are_not_finite_is_refused(catalog, shop, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    model = write_tiny_bert(tmp_path / "bert")
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.bias"] += torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        shop.features(catalog, language=str(model))
    assert shop.files() == []


@pytest.mark.parametrize(("arguments", "flag"), [({}, "language_encoder"), (PICTURES, "img_encoder")])
def test_an_encoder_that_encodes_different_items_alike_is_refused(catalog, shop, monkeypatch, arguments, flag):
    def collapsed(self, prepared):
        return np.ones_like(prepared) / np.sqrt(self.dim)

    for encoder in (LexicalEncoder, PixelEncoder):
        monkeypatch.setattr(encoder, "forward", collapsed)
    with pytest.raises(InputError, match=rf"--{flag} '(lexical|pixel)' gave different (texts|pictures) the same"):
        shop.features(catalog, **arguments)
    assert shop.files() == []


def test_items_that_are_all_alike_may_have_the_same_features(catalog, shop):
    alike = with_metadata(catalog, [{"title": "Lamp"}] * 7)
    shutil.copytree(catalog.photos, catalog.photos / "copies")
    for path in catalog.pictures:
        shutil.copy(catalog.pictures[0].parent / "copies" / catalog.pictures[0].name, path)
    assert len(np.unique(shop.features(alike, image="pixel"), axis=0)) == 1
