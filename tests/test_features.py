"""Items' features from encoders and from files: made once, cached by everything they depend on, remade if damaged."""

import dataclasses
import json
import os
import re
import resource
import shlex
import shutil
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

import eval as eval_script
import train
from common.errors import InputError
from datasets.catalog import Catalog, load_catalog
from datasets.features import arrays, cache, image, text
from datasets.features.image import PixelEncoder
from datasets.features.text import LexicalEncoder
from datasets.text import NO_TEXT, item_text
from serving import Recommender
from serving import export as export_script
from tests.prepared import (
    draw_picture,
    feature_parts,
    in_child,
    item_features,
    put_in_hub_cache,
    write_prepared,
    write_tiny_bert,
)

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
    """item_features with its own cache, the lexical encoder by default, and the lines it printed."""

    def __init__(self, cache_root: Path, capsys) -> None:
        self.cache_root, self.capsys, self.said = cache_root, capsys, []

    def features(self, catalog: Catalog, **changes) -> np.ndarray | None:
        self.capsys.readouterr()
        arguments = {"language": "lexical", "image": None, "attributes": ATTRIBUTES} | changes
        rows = item_features(catalog, **arguments, cache_root=self.cache_root)
        self.said = self.capsys.readouterr().out.splitlines()
        return rows

    def from_file(self, catalog: Catalog, path: Path) -> np.ndarray:
        return self.features(catalog, language=None, files=(f"visual={path}",))

    def files(self) -> list[Path]:
        """Return the cached features, unfinished ones included."""
        return list(self.cache_root.rglob("*.npy"))

    @property
    def file(self) -> Path:
        [path] = self.files()
        return path

    @property
    def broken(self) -> dict[str, str]:
        assert any(str(self.file.with_suffix(".json")) in line for line in self.said)
        return sidecar_of(self.file)["broken"]


@pytest.fixture
def shop(tmp_path, capsys) -> Shop:
    return Shop(tmp_path / "cache", capsys)


def sidecar_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def with_metadata(catalog: Catalog, metadata: list[dict]) -> Catalog:
    return dataclasses.replace(catalog, metadata=metadata)


def test_rows_hold_the_texts_then_the_pictures_of_the_items_in_order(catalog, shop, encoded):
    texts = [item_text(record, ATTRIBUTES) for record in catalog.metadata]
    assert len(set(map(len, texts))) > 2  # texts are encoded longest first
    expected = (LexicalEncoder().encode(texts), PixelEncoder().encode([Image.open(path) for path in catalog.pictures]))
    encoded.clear()
    rows = shop.features(catalog, image="pixel", batch_size=3)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.concatenate(expected, axis=1).astype(np.float16))
    assert [len(batch) for batch in encoded] == [3, 3, 1] * 2
    encoded.clear()
    unread = with_metadata(catalog, [record | {"price": 5} for record in catalog.metadata])
    np.testing.assert_array_equal(shop.features(unread, image="pixel"), rows)
    assert (encoded, shop.said) == ([], [])
    assert shop.features(catalog, language=None) is None


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


def test_the_cache_is_of_these_weights_and_needs_no_encoder(catalog, shop, tmp_path, monkeypatch):
    model = write_tiny_bert(tmp_path / "my bert!", seed=1)
    (model / "README.md").write_text("A model")
    with monkeypatch.context() as earlier:  # versions that hashed every file of the folder
        earlier.setattr(text, "_loaded_files", lambda folder: folder.rglob("*"))
        before = shop.features(catalog, language=str(model))
    with monkeypatch.context() as patch:
        patch.setattr(text, "load_encoder", None)  # a call fails
        np.testing.assert_array_equal(shop.features(catalog, language=str(model)), before)
    shutil.rmtree(model)
    write_tiny_bert(model, seed=2)
    assert not np.allclose(shop.features(catalog, language=str(model)), before)
    shop.features(dataclasses.replace(catalog, name="other"), image="pixel")
    names = sorted(str(path.relative_to(shop.cache_root).with_suffix(""))[:-17] for path in shop.files())
    assert names == ["other/image-pixel", "other/language-lexical", *["tiny/language-my-bert"] * 2]


def test_another_commit_of_a_hub_encoder_is_reported_and_encoded_again(catalog, shop, hub, tmp_path, monkeypatch):
    def fetching(name, *arguments, load=text.load_encoder):
        put_in_hub_cache(hub, name, "a" * 40, write_tiny_bert(tmp_path / "one", FIRST, seed=1))
        return load(name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(text, "load_encoder", fetching)
        first = shop.features(catalog, language="org/tiny")
    assert sidecar_of(shop.file)["commit"] == "a" * 40
    np.testing.assert_array_equal(shop.features(catalog, language="org/tiny"), first)
    assert shop.said == []
    put_in_hub_cache(hub, "org/tiny", "b" * 40, write_tiny_bert(tmp_path / "two", FIRST, seed=2))
    assert not np.allclose(shop.features(catalog, language="org/tiny"), first)
    assert any("a" * 40 in line and "b" * 40 in line and "made again" in line for line in shop.said)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: flip_a_byte(path.with_suffix(".json")),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("[]"),
    ],
)
def test_a_damaged_cache_is_reported_and_made_again(catalog, shop, encoded, damage):
    before = shop.features(catalog)
    damage(shop.file)
    encoded.clear()
    np.testing.assert_array_equal(shop.features(catalog), before)
    assert any(str(shop.file) in line and "made again" in line for line in shop.said)
    shop.features(catalog)
    assert (len(encoded), shop.said) == (1, [])


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_fifo_in_the_cache_is_refused_by_name(catalog, shop, suffix):
    shop.features(catalog)
    path = shop.file.with_suffix(suffix)
    fifo(path)
    with pytest.raises(InputError, match=f"^{path} cannot be read .not a regular file.; remove it"):
        shop.features(catalog)


@pytest.mark.parametrize(("suffixes", "reason"), [([".npy"], "checksum"), ([".npy", ".json"], "another key")])
def test_a_cache_of_other_items_is_not_used(catalog, shop, suffixes, reason):
    before, own = shop.features(catalog), shop.file
    shop.features(reversed_items(catalog))
    [other] = set(shop.files()) - {own}
    for suffix in suffixes:
        own.with_suffix(suffix).write_bytes(other.with_suffix(suffix).read_bytes())
    np.testing.assert_array_equal(shop.features(catalog), before)
    assert any(reason in line for line in shop.said)


def test_ctrl_c_while_finishing_costs_no_batch(catalog, shop, encoded, tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "sha256", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shop.features(catalog)
    assert all(path.stem.endswith((".partial", ".done")) for path in shop.files())
    encoded.clear()
    rows = shop.features(catalog)
    assert (encoded, len(shop.files())) == ([], 1)
    np.testing.assert_array_equal(rows, Shop(tmp_path / "new", shop.capsys).features(catalog))


def test_a_full_disk_is_named_and_leaves_no_partial_file(catalog, shop):
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(InputError, match=f"cannot write {shop.cache_root}"):
            shop.features(catalog)

    assert in_child(fill) == 0
    assert shop.files() == []


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def eps(path: Path) -> None:
    with Image.open(path) as picture:
        picture.save(path, "EPS")  # decoding it would start Ghostscript


@pytest.mark.parametrize("make", [Path.unlink, fifo, lambda path: path.write_text("<html>404</html>"), truncated, eps])
def test_an_unreadable_picture_gives_zeros_and_is_named_with_the_reason_at_every_use(catalog, shop, encoded, make):
    for path in catalog.pictures[2:4]:
        make(path)
    rows = shop.features(catalog, **PICTURES, batch_size=2)
    assert rows.any(axis=1).tolist() == [True, True, False, False, True, True, True]
    assert [len(batch) for batch in encoded] == [2, 2, 1]  # none of the unreadable batch
    for asin, path in zip(catalog.asins[2:4], catalog.pictures[2:4], strict=True):
        assert re.match(rf"{path.name}: \S", shop.broken[asin])
    for _ in range(2):
        assert "2 of 7 items have no readable picture" in shop.said[-1]
        shop.features(catalog, **PICTURES)
    assert len(encoded) == 3


@pytest.mark.parametrize(("listed", "reason"), [(True, r"B000000001\.png: .*"), (False, r"no item2img\.json")])
def test_a_dataset_without_any_readable_picture_is_refused(catalog, shop, listed, reason):
    for path in catalog.pictures:
        path.unlink()
    with pytest.raises(InputError, match=rf"tiny has no picture that can be read \({reason}\).*--no-use_img_encoder"):
        shop.features(catalog if listed else dataclasses.replace(catalog, pictures=None), **PICTURES)
    assert shop.files() == []


def test_a_picture_larger_than_memory_allows_or_not_listed_gives_zeros(catalog, shop, monkeypatch):
    draw_picture(catalog.pictures[1], (9, 9, 9), side=40)
    monkeypatch.setattr(image, "MAX_PIXELS", 16 * 16)  # as large as the others
    catalog = dataclasses.replace(catalog, pictures=[*catalog.pictures[:6], None])
    assert shop.features(catalog, **PICTURES).any(axis=1).tolist() == [True, False, *[True] * 4, False]
    assert "40 x 40 pixels, more than 256" in shop.broken[catalog.asins[1]]
    assert shop.broken[catalog.asins[6]] == "no picture listed"


def test_a_picture_is_opened_upright_on_white_and_in_8_bits(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
    for kind in ("PNG", "GIF", "WEBP"):
        Image.fromarray(noise).save(tmp_path / "a", kind)
        np.testing.assert_array_equal(image.open_picture(tmp_path / "a")[0], Image.open(tmp_path / "a").convert("RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(noise).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "d.png", exif=exif)
    np.testing.assert_array_equal(image.open_picture(tmp_path / "d.png")[0], noise)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (2, 2), 0).save(tmp_path / "b.png", transparency=0)
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "c.png")
    a, b, c = (np.asarray(image.open_picture(tmp_path / name)[0]) for name in ("a.png", "b.png", "c.png"))
    assert (a == 255).all() and (b == 255).all()
    assert c[0, :, 0].tolist() == [0, 128, 255]


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


def test_a_dataset_without_the_asked_texts_is_refused_with_the_known_ones_or_the_ways_to_do_without(catalog, shop):
    known = "metadata has asin, brand, categories, price, title"
    with pytest.raises(InputError, match=f"^--item_attributes colour,size: no item of tiny has any of them.*{known}"):
        shop.features(catalog, attributes=("colour", "size"))
    assert shop.files() == []
    with pytest.raises(InputError, match=r"tiny has no metadata.*meta\.json\.gz.*--features NAME=FILE.*sasrec"):
        shop.features(with_metadata(catalog, [{}] * 7))


def test_a_text_does_not_depend_on_the_order_of_a_set_and_leaves_out_what_is_nested_too_deep():
    nested: list = ["deep"]
    for _ in range(990):
        nested = [nested]
    assert item_text({"title": {"b", "c", "a"}, "brand": nested}, ATTRIBUTES) == "Title: a, b, c"


def test_a_picture_encoder_without_weights_is_refused_before_texts_are_encoded(catalog, shop, encoded):
    with pytest.raises(InputError, match="--img_encoder 'clip' must be 'pixel', or MODEL/PRETRAINED"):
        shop.features(catalog, image="clip")
    assert encoded == []


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
    picture = catalog.pictures[0].read_bytes()
    for path in catalog.pictures:
        path.write_bytes(picture)
    alike = with_metadata(catalog, [{"title": "Lamp"}] * 7)
    assert len(np.unique(shop.features(alike, image="pixel"), axis=0)) == 1


N, WIDTH = 7, 4
ROWS = np.random.default_rng(0).normal(size=(N + 2, WIDTH)).astype(np.float32)
IDS = [*(f"B{i:09d}" for i in range(N, 0, -1)), "OTHER00001", "OTHER00002"]  # in another order, with unknown products
EXPECTED = (ROWS[:N] / np.linalg.norm(ROWS[:N], axis=1, keepdims=True))[::-1]  # of items 1..N


def write(name: str, folder: Path, rows=ROWS, ids=IDS) -> Path:
    """Write vectors in the format of a file's name."""
    path, rows = folder / name, np.asarray(rows)
    if path.suffix == ".npy":
        np.save(path, rows)
        if name == "j.npy":
            path.with_suffix(".ids.json").write_text(json.dumps(ids))
        else:
            path.with_suffix(".ids.txt").write_text("".join(f"{item}\n" for item in ids))
    elif name == "table.safetensors":
        codes = np.array([item.encode() for item in ids]).view(np.uint8).reshape(len(ids), -1)
        save_file({"features": rows, "ids": codes}, path)
    elif path.suffix == ".safetensors":
        save_file({item: np.ascontiguousarray(row) for item, row in zip(ids, rows, strict=True)}, path)
    elif path.suffix == ".b":  # 4096 numbers a product, of which the first are given
        padded = np.pad(rows.astype("<f4"), ((0, 0), (0, 4096 - rows.shape[1])))
        path.write_bytes(b"".join(i.encode().ljust(10) + row.tobytes() for i, row in zip(ids, padded, strict=True)))
    elif name == "lists.parquet":
        pd.DataFrame({"product_id": ids, "vector": [list(map(float, row)) for row in rows]}).to_parquet(path)
    else:
        table = pd.DataFrame({"asin": ids} | {f"f{k}": rows[:, k] for k in range(rows.shape[1])})
        if path.suffix == ".csv":
            table.to_csv(path, index=False)
        else:  # whatever pandas' own notes say
            pq.write_table(pa.Table.from_pandas(table).replace_schema_metadata({"pandas": "{"}), path)
    return path


NAMES = ["visual.npy", "table.safetensors", "t.safetensors", "visual.csv", "visual.parquet", "lists.parquet", "i.b"]


def changed(at, value) -> np.ndarray:
    array = ROWS.copy()
    array[at] = value
    return array


def refusal(shop: Shop, catalog: Catalog, path: Path) -> str:
    with pytest.raises(InputError) as raised:
        shop.from_file(catalog, path)
    assert shop.files() == [], "nothing of a bad file is kept"
    return str(raised.value)


@pytest.mark.parametrize("name", [*NAMES, "j.npy"])
def test_every_format_gives_the_items_rows_in_order_and_of_length_1(catalog, shop, tmp_path, monkeypatch, name):
    monkeypatch.setattr(arrays, "PIECE", 5)
    rows = shop.from_file(catalog, write(name, tmp_path))
    np.testing.assert_array_equal(rows[:, :WIDTH], EXPECTED.astype(np.float16))


def test_ids_in_a_table_stay_texts_even_if_they_look_like_numbers(catalog, shop, tmp_path):
    catalog = dataclasses.replace(catalog, asins=["0012", "NA", "7", *catalog.asins[3:]])
    rows = shop.from_file(catalog, write("visual.csv", tmp_path, ROWS[:3], catalog.asins[:3]))
    assert rows.any(axis=1).tolist() == [True] * 3 + [False] * 4


def test_text_and_pictures_come_before_files_in_the_given_order(catalog, tmp_path):
    files = (f"zebra={write('i.npy', tmp_path)}", f"apple={write('i.csv', tmp_path, ROWS[:, :2])}")
    parts = feature_parts(catalog, language="lexical", files=files, cache_root=tmp_path / "cache")
    assert [part.shape[1] for part in parts] == [1024, WIDTH, 2]


def test_items_missing_from_the_file_have_zeros_and_are_counted_at_every_use(catalog, shop, tmp_path):
    path = write("visual.npy", tmp_path, ROWS[: N - 2], IDS[: N - 2])
    for _ in range(2):
        assert shop.from_file(catalog, path).any(axis=1).tolist() == [False] * 2 + [True] * (N - 2)
        assert shop.said[-1].startswith(f"2 of {N} items are not in {path}: zero vectors, named in ")
        assert list(shop.broken) == catalog.asins[:2]


def test_a_file_is_read_once_until_its_content_changes(catalog, shop, tmp_path):
    path = write("visual.npy", tmp_path)
    first = shop.from_file(catalog, path)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    np.save(path, -ROWS)
    os.utime(path, ns=times)  # of the same size and time, so it is not hashed again
    np.testing.assert_array_equal(shop.from_file(catalog, path), first)
    assert shop.said == []
    os.utime(path, ns=(1, 1))
    assert not np.array_equal(shop.from_file(catalog, path), first)
    assert len(shop.files()) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_not_finite_or_an_id_with_two_rows_is_refused_with_its_place(catalog, shop, tmp_path, name):
    path = write(name, tmp_path, changed((5, 2), np.nan))
    message = refusal(shop, catalog, path)
    assert message.startswith(f"{path}, ") and "finite" in message
    assert {"visual.csv": "line 7", "t.safetensors": "tensor (sorted by name) 2"}.get(path.name, " 6") in message
    if name == "t.safetensors":
        return  # a name is there once
    twice = [*IDS[:-1], IDS[3]]
    second, first = (10, 5) if path.suffix == ".csv" else (9, 4)
    message = refusal(shop, catalog, write(name, tmp_path, ROWS, twice))
    assert f"{second} has other numbers for {IDS[3]} than" in message and f" {first}; keep one" in message
    assert shop.from_file(catalog, write(name, tmp_path, changed(N + 1, ROWS[3]), twice)).any(axis=1).all()


RAGGED = pd.DataFrame({"asin": IDS[:3], "vector": [[1.0, 2.0], [1.0, 2.0], [3.0]]})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "visual.npy",
            lambda p: p.with_suffix(".ids.txt").unlink(),
            "visual.ids.txt (an id per line) or visual.ids.json",
        ),
        ("visual.npy", (ROWS, IDS[:-1]), f"has {N + 1} ids for the {N + 2} rows"),
        ("visual.npy", (ROWS[0], IDS[:4]), "is float32 [4]; save a 2-d array of numbers"),
        ("visual.npy", (ROWS[:2], ["X", "Y"]), f"none of the {N} items, whose ids are such as 'B000000001'"),
        ("visual.npy", lambda p: np.save(p, np.array([{"a": 1}]), allow_pickle=True), "cannot be read"),  # or unpickled
        ("table.safetensors", (ROWS[0][:, None], IDS), "a 1-d tensor per product id"),
        (
            "t.safetensors",
            lambda p: save_file({"A": np.ones(3), "B": np.ones(2)}, p),
            "tensor 'B' has shape [2], others [3]",
        ),
        ("l.parquet", lambda p: RAGGED.to_parquet(p), "row 3 has 1 numbers, others 2"),
        *((name, cut, "cannot be read") for name in ("visual.npy", "table.safetensors", "visual.parquet")),
        ("i.b", cut, f"ends within record {N + 2} (16387 of 16394 bytes)"),
        ("visual.csv", (np.ones((N, 2)), IDS[:N]), f"has the same vector for all {N} items"),
        ("visual.csv", "asin,f0,f1\nA,1,2\nB,3\n", "line 3: column 'f1' has"),
        ("visual.csv", "asin,f0,f1\nA,1,2\nB,3,4,5\n", "cannot be read"),
        ("visual.csv", "asin,f0\nA,high\n", "line 2: column 'f0' has 'high'; give a finite number"),
        ("visual.csv", f"asin,f0\nA,{'9' * 400}\n", "line 2: column 'f0' has "),
        ("visual.csv", "f0,asin\n1,A\n", "has the columns f0, asin; write a header with asin or item_id or"),
        ("visual.csv", "", "cannot be read"),
        ("visual.pkl", "x", "none of the known suffixes .npy, .safetensors, .csv, .parquet, .b"),
        ("absent.npy", Path.unlink, "does not exist"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_fault(catalog, shop, tmp_path, name, content, message):
    if isinstance(content, str):
        path = tmp_path / name
        path.write_text(content)
    elif isinstance(content, tuple):
        path = write(name, tmp_path, *content)
    else:
        path = write(name, tmp_path)
        content(path)
    refused = refusal(shop, catalog, path)
    assert message in refused and path.stem in refused


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (("my visual=a.npy",), "must be NAME=FILE"),
        (("a=x.npy", "a=y.npy"), "the name 'a' is taken"),
        (("image=x.npy",), "the name 'image' is taken"),
        (("brand=a.npy",), "'brand' is one of --item_attributes"),
    ],
)
def test_a_wrong_name_is_refused(catalog, tmp_path, features, message):
    with pytest.raises(InputError, match=f"--features .*{message}"):
        feature_parts(catalog, files=features, cache_root=tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Return a folder with data/tiny and visual.npy, and a run in it trained on the texts and visual.npy."""
    folder = tmp_path_factory.mktemp("trained")
    write_prepared(folder / "data", users=20, items=N)
    write("visual.npy", folder)
    flags = (
        "--dataset_code tiny --language_encoder lexical --no-use_img_encoder --features visual=visual.npy "
        "--whiten_features --item_embedding 2 --mrl_hidden_sizes 2,4 --num_epochs 1 --lru_num_blocks 1"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, folder / train.main(shlex.split(flags))


@pytest.fixture
def at_work(trained, monkeypatch) -> Path:
    """Change to the folder of the run and return the run."""
    monkeypatch.chdir(trained[0])
    return trained[1]


def test_a_run_keeps_the_digest_of_its_file_and_is_refused_with_another(at_work):
    assert at_work.name.endswith("-language+visual-4")
    [_, name] = json.loads((at_work / "env.json").read_text())["features"]
    assert name.startswith(f"file-visual-{arrays.file_sha256(Path('visual.npy'), Path('cache'))}-")
    try:
        write("visual.npy", Path(), ROWS * np.float32([1, 2, 3, 4]))
        with pytest.raises(InputError, match=r"--features visual=visual.npy is not the file that the run was trained"):
            eval_script.main(["--run", str(at_work)])
    finally:
        write("visual.npy", Path())


def test_an_export_describes_the_file_and_takes_vectors_of_new_products(at_work, tmp_path):
    export_script.main(["--run", str(at_work), "--out", str(tmp_path / "export"), "--quantize", "none"])
    recommender = Recommender.from_pretrained(tmp_path / "export")
    features = recommender.config["features"]
    assert features["files"] == [
        {"name": "visual", "sha256": arrays.file_sha256(Path("visual.npy"), Path("cache")), "dim": WIDTH}
    ]
    assert (features["dim"], features["whitened"]) == (1024 + WIDTH, [1024, WIDTH])
    metadata = load_catalog("data", "tiny").metadata[:3]
    records = [record | {"visual": ROWS[N - 1 - i].tolist()} for i, record in enumerate(metadata)]
    records += [{"title": "Red lamp"} | nothing for nothing in ({}, {"visual": None}, {"visual": float("nan")})]
    rows = recommender.embed_items(records)
    np.testing.assert_array_equal(rows[:3, 1024:].astype(np.float16), EXPECTED[:3].astype(np.float16))
    assert rows[3:, :1024].any(axis=1).all() and not rows[3:, 1024:].any()
    recommender.add_items([f"NEW{i}" for i in range(6)], rows)
    assert recommender.recommend([["NEW1"]], top_k=3)[0].ids
    for vector in ([1.0, 2.0], [1, 2, 3, float("inf")], "red", [[1.0] * WIDTH], [10**400] * 4):
        with pytest.raises(InputError, match=r"'visual' of record 1 is .*give a list of 4 finite numbers, or nothing"):
            recommender.embed_items([{"title": "Red lamp", "visual": vector}])
