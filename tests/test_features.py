"""Items' features from encoders and files: made once, cached by all they depend on, remade if damaged."""

import dataclasses
import functools
import json
import os
import pickle
import resource
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from filelock import FileLock
from huggingface_hub import constants
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

import eval as eval_script
import train
from common.errors import InputError
from common.files import write_json
from datasets.catalog import Catalog, load_catalog
from datasets.features import arrays, cache, encode, image, text
from datasets.features.encode import encode_batches, in_order, longest_first, normalised, offline_without_network
from datasets.features.image import ImageModality, PixelEncoder
from datasets.features.image import fingerprint as image_fingerprint
from datasets.features.image import load_encoder as image_encoder
from datasets.features.text import LexicalEncoder, hub_commit
from datasets.features.text import fingerprint as language_fingerprint
from datasets.features.text import load_encoder as language_encoder
from datasets.items import NO_TEXT, item_text
from serving import Recommender
from serving import export as export_script
from tests.made_up import feature_parts, in_child, item_features, put_in_hub_cache, write_prepared, write_tiny_bert

ATTRIBUTES = ("title", "brand")
PICTURES = {"language": None, "image": "pixel"}  # arguments of item_features for pictures alone
FIRST = {"pooling_mode_cls_token": True}


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    """Seven items with text and pictures."""
    return load_catalog(write_prepared(tmp_path, users=5, items=7, pictures=True).parent, "tiny")


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

    def files(self) -> list[Path]:
        return list(self.cache_root.rglob("*.npy"))

    def sidecar(self) -> dict:
        [path] = self.cache_root.rglob("*/*.json")
        return json.loads(path.read_text())


def from_file(shop: Shop, catalog: Catalog, path: Path) -> np.ndarray:
    return shop.features(catalog, language=None, files=(f"visual={path}",))


@pytest.fixture
def shop(tmp_path, capsys) -> Shop:
    return Shop(tmp_path / "cache", capsys)


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
    unread = dataclasses.replace(catalog, metadata=[record | {"price": 5} for record in catalog.metadata])
    np.testing.assert_array_equal(shop.features(unread, image="pixel"), rows)
    assert (encoded, shop.said) == ([], []) and shop.features(catalog, language=None) is None


@pytest.mark.parametrize("change", ["text", "order", "picture's time", "picture's folder"])
def test_changed_items_are_encoded_into_another_cache(catalog, shop, encoded, change):
    arguments = PICTURES if "picture" in change else {}
    shop.features(catalog, **arguments)
    encoded.clear()
    picture, metadata = catalog.pictures[2], catalog.metadata
    if change == "text":
        catalog = dataclasses.replace(catalog, metadata=[metadata[0] | {"title": "Other"}, *metadata[1:]])
    elif change == "order":
        catalog = dataclasses.replace(catalog, asins=catalog.asins[::-1], metadata=metadata[::-1])
    elif change == "picture's time":
        os.utime(picture, ns=(1, picture.stat().st_mtime_ns + 1))
    else:
        (catalog.photos / "other").mkdir()
        catalog.pictures[2] = Path(shutil.copy2(picture, catalog.photos / "other"))
    shop.features(catalog, **arguments)
    assert (len(encoded), len(shop.files())) == (1, 2)


def test_the_cache_is_of_these_weights_and_needs_no_encoder(catalog, shop, tmp_path, monkeypatch):
    model = write_tiny_bert(tmp_path / "my bert!", seed=1)
    (model / "README.md").write_text("A model")
    with monkeypatch.context() as patch:  # versions that hashed every file of the folder
        patch.setattr(text, "_loaded_files", lambda folder: folder.rglob("*"))
        before = shop.features(catalog, language=str(model))
    with monkeypatch.context() as patch:
        patch.setattr(text, "load_encoder", None)  # a call fails
        np.testing.assert_array_equal(shop.features(catalog, language=str(model)), before)
    shutil.rmtree(model)
    write_tiny_bert(model, seed=2)
    assert not np.allclose(shop.features(catalog, language=str(model)), before)
    assert {path.name[:-21] for path in shop.files()} == {"language-my-bert"}


def test_another_commit_of_a_hub_encoder_is_reported_and_encoded_again(catalog, shop, hub, tmp_path, monkeypatch):
    def fetching(name, *arguments, load=text.load_encoder):
        put_in_hub_cache(hub, name, "a" * 40, write_tiny_bert(tmp_path / "one", FIRST, seed=1))
        return load(name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(text, "load_encoder", fetching)
        first = shop.features(catalog, language="org/tiny")
    assert shop.sidecar()["commit"] == "a" * 40
    np.testing.assert_array_equal(shop.features(catalog, language="org/tiny"), first)
    assert shop.said == []
    put_in_hub_cache(hub, "org/tiny", "b" * 40, write_tiny_bert(tmp_path / "two", FIRST, seed=2))
    assert not np.allclose(shop.features(catalog, language="org/tiny"), first)
    assert any("a" * 40 in line and "b" * 40 in line and "made again" in line for line in shop.said)


NO_KEY = {"key": {}, "commit": "", "sha256": "", "made": 0, "broken": {}}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: np.save(path, -np.load(path)), "its checksum differs"),
        (lambda path: os.truncate(path, 50), "its checksum differs"),
        (lambda path: path.with_suffix(".json").unlink(), "damaged"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "damaged"),
        (lambda path: write_json(path.with_suffix(".json"), NO_KEY), "of another key"),
    ],
)
def test_a_damaged_cache_is_reported_and_made_again(catalog, shop, encoded, damage, why):
    before = shop.features(catalog)
    [path] = shop.files()
    damage(path)
    encoded.clear()
    np.testing.assert_array_equal(shop.features(catalog), before)
    assert any(str(path) in line and why in line and "made again" in line for line in shop.said)
    shop.features(catalog)
    assert (len(encoded), shop.said) == (1, [])


def test_a_full_disk_is_named_and_leaves_no_partial_file(catalog, shop):
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(InputError, match=f"cannot write {shop.cache_root}"):
            shop.features(catalog)

    assert (in_child(fill), shop.files()) == (0, [])


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def enlarge(path: Path) -> None:
    Image.new("RGB", (40, 40)).save(path)


def eps(path: Path) -> None:
    with Image.open(path) as picture:
        picture.save(path, "EPS")  # decoding it would start Ghostscript


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.unlink, "No such file"),
        (fifo, "not a regular file"),
        (lambda path: path.write_text("<html>"), "cannot identify"),
        (eps, "cannot identify"),
        (lambda path: os.truncate(path, 60), ""),
        (enlarge, "40 x 40 pixels, more than 256"),
    ],
)
def test_an_unreadable_or_absent_picture_gives_zeros_at_every_use(catalog, shop, encoded, monkeypatch, make, reason):
    monkeypatch.setattr(image, "MAX_PIXELS", 16 * 16)  # as large as they are
    make(catalog.pictures[2])
    catalog.pictures[3] = None
    rows = shop.features(catalog, **PICTURES, batch_size=2)
    assert rows.any(axis=1).tolist() == [True, True, False, False, True, True, True]
    assert [len(batch) for batch in encoded] == [2, 2, 1]  # none of the unreadable batch
    broken = shop.sidecar()["broken"]
    assert list(broken) == catalog.asins[2:4] and broken["B000000004"] == "no picture listed"
    assert broken["B000000003"].startswith("B000000003.png: ") and reason in broken["B000000003"]
    for _ in range(2):
        assert "2 of 7 items have no readable picture" in shop.said[-1]
        shop.features(catalog, **PICTURES)
    assert len(encoded) == 3


def test_a_picture_is_opened_upright_on_white_and_in_8_bits(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(noise).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "noise", "PNG", exif=exif)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a", "PNG")
    Image.new("L", (2, 2), 0).save(tmp_path / "b", "GIF", transparency=0)
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "c", "PNG")
    opened, a, b, c = (np.asarray(image.open_picture(tmp_path / name)[0]) for name in ("noise", "a", "b", "c"))
    np.testing.assert_array_equal(opened, noise)
    assert (a == 255).all() and (b == 255).all() and c[0, :, 0].tolist() == [0, 128, 255]


def test_an_attribute_that_no_item_has_is_left_out_and_items_without_text_share_one(catalog, shop):
    without = shop.features(catalog)
    catalog = dataclasses.replace(catalog, metadata=[record | {"zero": 0, "size": [""]} for record in catalog.metadata])
    np.testing.assert_array_equal(shop.features(catalog, attributes=("title", "colour", "brand", "size")), without)
    assert shop.said[0].startswith("no item has colour or size: left out of the texts; --item_attributes can also name")
    shop.features(catalog, attributes=("zero",))
    assert shop.said == []
    rows = shop.features(dataclasses.replace(catalog, metadata=[{}, *catalog.metadata[1:6], {"title": None}]))
    assert shop.said == [f"2 of 7 items have no text: encoded as {NO_TEXT!r}"]
    np.testing.assert_array_equal(rows[[0, 6]], LexicalEncoder().encode([NO_TEXT] * 2))


def test_absent_inputs_and_unknown_encoders_are_refused_early(catalog, shop, encoded):
    for change, arguments, message in (
        ({}, {"attributes": ("colour",)}, "--item_attributes colour: no item of tiny .* has asin, brand, categories"),
        ({"metadata": [{}] * 7}, {}, r"tiny has no metadata.*meta\.json\.gz.*--features NAME=FILE.*sasrec"),
        ({"pictures": None}, PICTURES, r"tiny has no picture .* \(no item2img\.json\).*--no-use_img_encoder"),
        ({"pictures": [Path("a.png")] * 7}, PICTURES, r"tiny has no picture that can be read \(a\.png: "),
        ({}, {"files": ("my visual=a.npy",)}, "--features .*must be NAME=FILE"),
        ({}, {"files": ("image=a.npy",)}, "--features .*the name 'image' is taken"),
        ({}, {"files": ("brand=a.npy",)}, "--features .*'brand' is one of --item_attributes"),
        ({}, {"image": "clip"}, "--img_encoder 'clip' must be 'pixel', or MODEL/PRETRAINED"),
    ):
        with pytest.raises(InputError, match=message):
            shop.features(dataclasses.replace(catalog, **change), **arguments)
        assert (shop.files(), encoded) == ([], [])


def test_an_encoder_whose_features_say_nothing_is_refused(catalog, shop, monkeypatch):
    for arguments, value, message in (
        ({}, 1, "--language_encoder 'lexical' gave different texts the same"),
        (PICTURES, 1, "--img_encoder 'pixel' gave different pictures the same"),
        ({}, np.nan, "gave features that are not finite"),
    ):
        for encoder in (LexicalEncoder, PixelEncoder):
            monkeypatch.setattr(encoder, "forward", lambda self, x, value=value: np.full_like(x, value))
        with pytest.raises(InputError, match=message):
            shop.features(catalog, **arguments)
        assert shop.files() == []


N, WIDTH = 7, 4
ROWS = np.random.default_rng(0).normal(size=(N + 2, WIDTH)).astype(np.float32)
IDS = [*(f"B{i:09d}" for i in range(N, 0, -1)), "OTHER00001", "OTHER00002"]  # in another order, with unknown products
EXPECTED = (ROWS[:N] / np.linalg.norm(ROWS[:N], axis=1, keepdims=True))[::-1]  # of items 1..N


def write(name: str, folder: Path, rows=ROWS, ids=IDS) -> Path:
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


def refusal(shop: Shop, catalog: Catalog, path: Path) -> str:
    with pytest.raises(InputError) as raised:
        from_file(shop, catalog, path)
    assert shop.files() == [], "nothing of a bad file is kept"
    return str(raised.value)


@pytest.mark.parametrize("name", [*NAMES, "j.npy"])
def test_every_format_gives_the_items_rows_in_order_and_of_length_1(catalog, shop, tmp_path, monkeypatch, name):
    monkeypatch.setattr(arrays, "PIECE", 5)
    rows = from_file(shop, catalog, write(name, tmp_path))
    np.testing.assert_array_equal(rows[:, :WIDTH], EXPECTED.astype(np.float16))


def test_ids_in_a_table_stay_texts_even_if_they_look_like_numbers(catalog, shop, tmp_path):
    catalog = dataclasses.replace(catalog, asins=["0012", "NA", "7", *catalog.asins[3:]])
    rows = from_file(shop, catalog, write("visual.csv", tmp_path, ROWS[:3], catalog.asins[:3]))
    assert rows.any(axis=1).tolist() == [True] * 3 + [False] * 4


def test_items_missing_from_the_file_have_zeros_and_are_counted_at_every_use(catalog, shop, tmp_path):
    path = write("visual.npy", tmp_path, ROWS[: N - 2], IDS[: N - 2])
    for _ in range(2):
        assert from_file(shop, catalog, path).any(axis=1).tolist() == [False] * 2 + [True] * (N - 2)
        assert shop.said[-1].startswith(f"2 of {N} items are not in {path}: zero vectors, named in ")
        assert list(shop.sidecar()["broken"]) == catalog.asins[:2]


def test_a_file_is_read_once_until_its_content_changes(catalog, shop, tmp_path):
    path = write("visual.npy", tmp_path)
    first, time = from_file(shop, catalog, path), path.stat().st_mtime_ns
    np.save(path, -ROWS)
    os.utime(path, ns=(time, time))  # of the same size and time, so it is not hashed again
    np.testing.assert_array_equal(from_file(shop, catalog, path), first)
    assert shop.said == []
    os.utime(path, ns=(1, 1))
    assert not np.array_equal(from_file(shop, catalog, path), first) and len(shop.files()) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_not_finite_or_an_id_with_two_rows_is_refused_with_its_place(catalog, shop, tmp_path, name):
    rows = ROWS.copy()
    rows[5, 2] = np.nan
    path = write(name, tmp_path, rows)
    message = refusal(shop, catalog, path)
    assert message.startswith(f"{path}, ") and "finite" in message
    assert {"visual.csv": "line 7", "t.safetensors": "tensor (sorted by name) 2"}.get(path.name, " 6") in message
    if name == "t.safetensors":
        return  # a name is there once
    twice = [*IDS[:-1], IDS[3]]
    second, first = (10, 5) if path.suffix == ".csv" else (9, 4)
    message = refusal(shop, catalog, write(name, tmp_path, ROWS, twice))
    assert f"{second} has other numbers for {IDS[3]} than" in message and f" {first}; keep one" in message
    assert from_file(shop, catalog, write(name, tmp_path, [*ROWS[:-1], ROWS[3]], twice)).any(axis=1).all()


RAGGED = pd.DataFrame({"asin": IDS[:3], "vector": [[1.0, 2.0], [1.0, 2.0], [3.0]]})


def test_a_bad_file_is_refused_with_its_name_and_fault(catalog, shop, tmp_path):
    for name, content, message in (
        ("v.npy", lambda p: p.with_suffix(".ids.txt").unlink(), "v.ids.txt (an id per line) or v.ids.json"),
        ("v.npy", (ROWS, IDS[:-1]), f"has {N + 1} ids for the {N + 2} rows"),
        ("v.npy", (ROWS[0], IDS[:4]), "is float32 [4]; save a 2-d array of numbers"),
        ("v.npy", (ROWS[:2], ["X", "Y"]), f"none of the {N} items, whose ids are such as 'B000000001'"),
        ("v.npy", lambda p: np.save(p, np.array([{"a": 1}]), allow_pickle=True), "cannot be read"),  # or unpickled
        ("table.safetensors", (ROWS[0][:, None], IDS), "a 1-d tensor per product id"),
        ("t.safetensors", lambda p: save_file({"A": ROWS[0], "B": ROWS[0, :2]}, p), "'B' has shape [2], others [4]"),
        ("l.parquet", lambda p: RAGGED.to_parquet(p), "row 3 has 1 numbers, others 2"),
        *((name, cut, "cannot be read") for name in ("v.npy", "table.safetensors", "v.parquet")),
        ("i.b", cut, f"ends within record {N + 2} (16387 of 16394 bytes)"),
        ("v.csv", (np.ones((N, 2)), IDS[:N]), f"has the same vector for all {N} items"),
        ("v.csv", "asin,f0,f1\nA,1,2\nB,3\n", "line 3: column 'f1' has"),
        ("v.csv", "asin,f0,f1\nA,1,2\nB,3,4,5\n", "cannot be read"),
        ("v.csv", "asin,f0\nA,high\n", "line 2: column 'f0' has 'high'; give a finite number"),
        ("v.csv", f"asin,f0\nA,{'9' * 400}\n", "line 2: column 'f0' has "),
        ("v.csv", "f0,asin\n1,A\n", "has the columns f0, asin; write a header with asin or item_id or"),
        ("v.pkl", "x", "none of the known suffixes .npy, .safetensors, .csv, .parquet, .b"),
        ("absent.npy", Path.unlink, "does not exist"),
    ):
        path = write(name, tmp_path, *content) if isinstance(content, tuple) else write(name, tmp_path)
        if isinstance(content, str):
            path.write_text(content)
        elif not isinstance(content, tuple):
            content(path)
        refused = refusal(shop, catalog, path)
        assert message in refused and path.stem in refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Path]:
    """Return a run trained on the texts of data/tiny and visual.npy of the folder that it changes to."""
    flags = "--dataset_code tiny --language_encoder lexical --no-use_img_encoder --features visual=visual.npy "
    flags += "--whiten_features --item_embedding 2 --mrl_hidden_sizes 2,4 --num_epochs 1 --lru_num_blocks 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        write_prepared(Path("data"), users=20, items=N)
        write("visual.npy", Path())
        yield train.main(flags.split())


def test_a_run_keeps_the_digest_of_its_file_and_is_refused_with_another(trained):
    assert trained.name.endswith("-language+visual-4")
    [_, name] = json.loads((trained / "env.json").read_text())["features"]
    assert name.startswith(f"file-visual-{arrays.file_sha256(Path('visual.npy'), Path('cache'))}-")
    kept = np.load("visual.npy")
    try:
        np.save("visual.npy", kept * np.float32([1, 2, 3, 4]))
        with pytest.raises(InputError, match=r"--features visual=visual.npy is not the file that the run was trained"):
            eval_script.main(["--run", str(trained)])
    finally:
        np.save("visual.npy", kept)


def test_an_export_describes_the_file_and_takes_vectors_of_new_products(trained, tmp_path):
    export_script.main(["--run", str(trained), "--out", str(tmp_path / "export"), "--quantize", "none"])
    recommender = Recommender.from_pretrained(tmp_path / "export")
    features, digest = recommender.config["features"], arrays.file_sha256(Path("visual.npy"), Path("cache"))
    assert features["files"] == [{"name": "visual", "sha256": digest, "dim": WIDTH}]
    assert (features["dim"], features["whitened"]) == (1024 + WIDTH, [1024, WIDTH])
    metadata = load_catalog("data", "tiny").metadata[:3]
    records = [record | {"visual": ROWS[N - 1 - i].tolist()} for i, record in enumerate(metadata)]
    records += [{"title": "Red lamp"} | nothing for nothing in ({}, {"visual": None}, {"visual": float("nan")})]
    rows = recommender.embed_items(records)
    np.testing.assert_array_equal(rows[:3, 1024:].astype(np.float16), EXPECTED[:3].astype(np.float16))
    assert rows[3:, :1024].any(axis=1).all() and not rows[3:, 1024:].any()
    recommender.add_items([f"NEW{i}" for i in range(6)], rows)
    assert recommender.recommend([["NEW1"]], top_k=3)[0].ids
    for vector in ([1.0, 2.0], [1, 2, 3, float("inf")], "red", [10**400] * 4):
        with pytest.raises(InputError, match=r"'visual' of record 1 is .*give a list of 4 finite numbers, or nothing"):
            recommender.embed_items([{"title": "Red lamp", "visual": vector}])


# ------------------------------------------------------------------------------------------------------------- encoders
# Encode texts and pictures by frozen encoders, beside Hugging Face's `datasets`, which has our folder's name.

MEAN, FIRST_TOKEN = {"pooling_mode_mean_tokens": True}, {"pooling_mode_cls_token": True}
LAST, MAX = {"pooling_mode_lasttoken": True, "include_prompt": True}, {"pooling_mode_max_tokens": True}
SHORT, LONG = "red tent", "warm light lamp stove knife kettle gloves bottle"


@pytest.fixture(scope="module")
def mean_bert(tmp_path_factory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoders") / "mean-bert", MEAN)


@pytest.fixture
def copied(mean_bert, tmp_path) -> Path:
    return Path(shutil.copytree(mean_bert, tmp_path / "copy"))


def draw(colour: str, shape: str = "ellipse", at: int = 20) -> Image.Image:
    picture = Image.new("RGB", (96, 96), "white")
    getattr(ImageDraw.Draw(picture), shape)((at, at, at + 50, at + 50), fill=colour)
    return picture


def encoder_refusal(make, name: object) -> str:
    with pytest.raises(InputError) as raised:
        make(str(name), "cpu")
    return str(raised.value)


def test_lexical_puts_like_texts_nearer_than_unlike_ones():
    for like, nearer, farther in (
        ("Red camping tent", "red CAMPING tent!", "Green camping tent"),  # case and punctuation count little
        ("camping tents", "camping tent", "camping lamp"),  # parts of words count
        ("light blue lamp", "light blue tent", "blue tent, light"),  # so does the order
        ("tent lamp", "tent " * 50 + "lamp", "tent"),  # but not every repetition
    ):
        a, b, c, empty = language_encoder("lexical", "cpu").encode([like, nearer, farther, "!?"])
        assert a @ b > a @ c + 0.05 and not empty.any()


def test_pixel_puts_like_pictures_nearer_than_unlike_ones():
    red = draw("red")
    for nearer, farther in (
        (draw("red", at=24), draw("blue")),
        (draw("red", at=24), draw("red", "rectangle")),
        (red.resize((300, 300)), draw("orange")),
        (red.convert("CMYK"), draw("blue")),
    ):
        vectors = a, b, c = image_encoder("pixel", "cpu").encode([red, nearer, farther])
        assert a @ b > a @ c
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        np.testing.assert_array_equal(image_encoder("pixel", "cpu").encode([farther])[0], c)  # whatever the batch


def write_model(folder: Path, kind: str, pooling: dict | None) -> Path:
    """Write a random model of transformers that reads 12 tokens, with a tokenizer that pads on the left."""
    write_tiny_bert(folder, pooling)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"d_model": 16, "d_kv": 8, "d_ff": 32, "initializer_factor": 5.0} if kind == "T5Encoder" else {}
    positions = 14 if kind == "MPNet" else 12  # two of MPNet's are never used
    sizes |= {"vocab_size": 80, "max_position_embeddings": positions, "initializer_range": 0.5}
    config = getattr(transformers, f"{kind.removesuffix('Encoder')}Config")(**sizes)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    special |= {"cls_token": "[CLS]"} if kind == "MPNet" else {}
    file = str(folder / "tokenizer.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=file, padding_side="left", **special).save_pretrained(folder)
    return folder


def plain_states(model: Path, text: str, kind: str, limit: int) -> np.ndarray:
    """Return the last hidden states of one text's tokens, [tokens, 16], without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
    loaded = (transformers.T5EncoderModel if kind == "T5Encoder" else transformers.AutoModel).from_pretrained(model)
    with torch.inference_mode():
        return loaded(tokens["input_ids"]).last_hidden_state[0].numpy()


def modules(pooling_folder: str, **more: str) -> str:
    kinds = {"Transformer": "", "Pooling": pooling_folder} | more
    return json.dumps([{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()])


@pytest.mark.parametrize(
    ("kind", "pooling", "by"),
    [
        ("bert", MEAN, "the mean of the tokens (1_Pooling/config.json)"),
        ("bert", FIRST_TOKEN, "the first token (2_Pooling/config.json)"),
        ("bert", None, "the first token (the default, as the model has no 1_Pooling/config.json)"),
        ("bert", {"pooling_mode": "mean"}, "the mean of the tokens (1_Pooling/config.json)"),
        ("MPNet", LAST, "the last token (1_Pooling/config.json)"),
        ("GPT2", None, "the mean of the tokens (the default, as the model has no 1_Pooling/config.json and"),
        ("T5Encoder", MEAN, "the mean of the tokens (1_Pooling/config.json)"),
    ],
)
def test_a_text_is_its_tokens_pooled_as_the_model_says(tmp_path, kind, pooling, by):
    model = write_tiny_bert(tmp_path / "m", pooling) if kind == "bert" else write_model(tmp_path / "m", kind, pooling)
    limit = 4 if "2_Pooling" in by else 12
    if limit == 4:
        (model / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
        (model / "1_Pooling").rename(model / "2_Pooling")
        (model / "modules.json").write_text(modules("2_Pooling"))
    encoder = language_encoder(str(model), "cpu")
    assert encoder.note.startswith(f"{model} pools by {by}")
    assert encoder.note.endswith(f"and reads up to {limit} tokens of a text")
    texts = (SHORT, LONG, 3 * LONG)
    vectors = encoder.encode(texts)  # padding changes nothing
    for sentence, vector in zip(texts, vectors, strict=True):
        states = plain_states(model, sentence, kind, limit)
        expected = {"mean": states.mean(axis=0), "first": states[0], "last": states[-1]}[by.split()[1]]
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


def test_the_fingerprint_follows_the_files_that_are_loaded_not_the_folders_name(mean_bert, copied):
    original = language_fingerprint(str(mean_bert))
    for name in (".DS_Store", "README.md", "notes.txt"):
        (copied / name).write_text("x")
    assert language_fingerprint(str(copied)) == original == language_encoder(str(mean_bert), "cpu").fingerprint
    for path in map(copied.joinpath, ("model.safetensors", "tokenizer.json", "config.json", "1_Pooling/config.json")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert language_fingerprint(str(copied)) != original, path
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["nobody/no-such-encoder@v1", "./no/such/folder", "x/" + "x" * 300])
def test_an_unavailable_encoder_is_refused_with_the_offline_choices(name):
    message = encoder_refusal(language_encoder, name)
    assert message.startswith(f"--language_encoder {name!r} cannot be loaded")
    assert "local folder" in message and "'lexical'" in message


def change_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def bring_code(model: Path) -> None:
    change_config(model, model_type="strange", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    (model / "own.py").write_text(f"open({str(model / 'run')!r}, 'w')\n")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda model: os.truncate(model / "model.safetensors", 5000), "incomplete"),
        (lambda model: [path.unlink() for path in (*model.glob("tokenizer*"), model / "vocab.txt")], "no words"),
        (lambda model: (model / "config.json").unlink(), "config"),
        (lambda model: change_config(model, num_hidden_layers=4), "its weights lack encoder.layer.2"),
        (bring_code, ""),  # which is never run
        (lambda model: (model / "1_Pooling/config.json").write_text(json.dumps(MAX | MEAN)), "'mean_tokens'] is none"),
        (lambda model: (model / "modules.json").write_text(modules("1_Pooling", Dense="2_Dense")), "Dense"),
    ],
)
def test_a_local_encoder_that_is_incomplete_or_pools_otherwise_is_refused(copied, damage, why):
    damage(copied)
    message = encoder_refusal(language_encoder, copied)
    assert message.startswith(f"--language_encoder {str(copied)!r} cannot be loaded") and why in message
    assert not (copied / "run").exists()


@pytest.mark.parametrize("name", ["org/tiny", f"org/tiny@{'a' * 40}"])
def test_an_encoder_in_the_hubs_cache_is_that_encoder_with_its_pooling(hub, mean_bert, name):
    put_in_hub_cache(hub, "org/tiny", "a" * 40, mean_bert)
    expected = language_encoder(str(mean_bert), "cpu").encode([LONG])
    np.testing.assert_array_equal(language_encoder(name, "cpu").encode([LONG]), expected)
    assert (hub_commit(name), hub_commit("org/tiny@v2")) == ("a" * 40, None)
    assert "'org/tiny@v2' cannot be loaded" in encoder_refusal(language_encoder, "org/tiny@v2")
    shutil.rmtree(hub / "models--org--tiny" / "snapshots" / ("a" * 40) / "1_Pooling")
    assert "1_Pooling/config.json is not in the local cache" in encoder_refusal(language_encoder, name)


@pytest.mark.parametrize(("proxy", "offline"), [("", True), ("http://proxy.example:3128", False)])
def test_a_hub_without_address_is_asked_by_a_proxy_alone_and_never_for_a_folder(mean_bert, monkeypatch, proxy, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("name not known")))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    offline_without_network()
    assert constants.HF_HUB_OFFLINE is offline
    monkeypatch.setattr(text, "offline_without_network", None)  # a call fails
    assert language_encoder(str(mean_bert), "cpu").dim == 16


def test_open_clip_encodes_pictures_as_its_model_does(clip):
    name, weights = clip.split("/", 1)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.load_state_dict(torch.load(weights))
    with torch.inference_mode():
        expected = normalised(model.eval().encode_image(preprocess(draw("red"))[None]).numpy())
    encoder = image_encoder(clip, "cpu")
    vectors = encoder.encode([draw("red"), draw("blue").convert("L"), Image.new("RGB", (7, 90), "green")])
    assert vectors.shape == (3, encoder.dim) == (3, 24) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:1], expected, atol=1e-6)


def test_the_fingerprint_of_open_clip_follows_model_and_weights(clip, tmp_path):
    name, weights = clip.split("/", 1)
    moved = Path(shutil.copy(weights, tmp_path))
    assert image_fingerprint(f"{name}/{moved}") == image_fingerprint(clip) == image_encoder(clip, "cpu").fingerprint
    moved.write_bytes(moved.read_bytes() + b"x")
    names = (clip, f"{name}/{moved}", f"other/{weights}", "ViT-B-32/openai", "ViT-B-32/laion2b_s34b_b79k", "pixel")
    assert len({json.dumps(image_fingerprint(name)) for name in names}) == len(names)


def test_weights_of_siglip_from_a_file_are_given_pictures_as_in_its_training(clip, monkeypatch):
    name, weights = "ViT-L-16-SigLIP-256", clip.split("/", 1)[1]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, open_clip.get_model_config("tiny-clip"))
    preprocess = image_encoder(f"{name}/{weights}", "cpu").preprocess
    wide = Image.new("RGB", (96, 32), "white")
    ImageDraw.Draw(wide).rectangle((0, 0, 31, 32), fill="black")
    pixels = preprocess(wide)
    assert torch.allclose(pixels[:, 16, 2], torch.tensor(-1.0)), "the black left third was cropped or scaled otherwise"
    assert torch.allclose(pixels[:, 16, 29], torch.tensor(1.0))


def test_a_picture_model_that_is_unknown_unavailable_or_damaged_is_refused_with_the_choices(clip, hub, tmp_path):
    (name, weights), cut, other = clip.split("/", 1), tmp_path / "cut.pt", tmp_path / "other.pt"
    cut.write_bytes(Path(weights).read_bytes()[:-1000])
    torch.save({"visual.proj": torch.zeros(3, 3)}, other)
    for model in (f"{name}/{cut}", f"{name}/{other}", "ViT-B-32/no-such-tag", "ViT-B-32/laion2b_s34b_b79k"):
        message = encoder_refusal(image_encoder, model)
        assert message.startswith(f"--img_encoder '{model}' cannot be loaded")
        assert "path-to-weights of a local file" in message and "'pixel'" in message
    for model in ("no-such-model/openai", "ViT-B-32"):
        message = encoder_refusal(image_encoder, model)
        assert f"{model!r} must be 'pixel', or MODEL/PRETRAINED or MODEL/path-to-weights with one of" in message


LEXICAL = {"language": "lexical", "image": None, "attributes": ("title", "brand")}
PIXEL = LEXICAL | {"language": None, "image": "pixel"}
BATCHES, BEGUN = 10, 6  # batches of the 20 items below, two each; those done before an interruption


@pytest.fixture
def products(tmp_path) -> Catalog:
    """Return twenty items, two of whose pictures cannot be read."""
    write_prepared(tmp_path / "data", items=20, pictures=True)
    photos = sorted((tmp_path / "data/photos/tiny").iterdir())
    photos[0].write_text("<html>404</html>")
    photos[19].unlink()
    return load_catalog(tmp_path / "data", "tiny")


@pytest.fixture
def begun(products, tmp_path) -> Path:
    """Return the cache of a process that was interrupted after six of its ten batches of texts."""
    left = iter(range(BEGUN))

    def interrupted(self, prepared):
        return prepared if next(left, None) is not None else (_ for _ in ()).throw(KeyboardInterrupt)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LexicalEncoder, "forward", interrupted)
        item_features(products, **LEXICAL, batch_size=2, cache_root=tmp_path / "begun")
    return tmp_path / "begun"


def cached_arrays(cache_root: Path) -> dict[str, bytes]:
    """Return name -> bytes of the finished arrays; nothing else but their sidecars and the locks may be left."""
    assert not [path for path in cache_root.rglob("*") if ".partial." in path.name or ".done." in path.name]
    return {path.name: path.read_bytes() for path in cache_root.rglob("*.npy")}


@pytest.mark.slow
def test_after_a_kill_only_missing_batches_are_encoded_to_the_same_bytes(products, encoded, tmp_path, capsys):
    feature_parts(products, **PIXEL, batch_size=2, cache_root=tmp_path / "whole")
    forward, left = PixelEncoder.forward, iter(range(BATCHES - 1))

    def killed(self, read):
        return forward(self, read) if next(left, None) is not None else os.kill(os.getpid(), signal.SIGKILL)

    work = functools.partial(feature_parts, products, **PIXEL, batch_size=2, cache_root=tmp_path / "killed")
    assert in_child(lambda: (setattr(PixelEncoder, "forward", killed), work())) == -signal.SIGKILL
    encoded.clear()
    work()
    assert len(encoded) == 1 and "9 of 10 batches were encoded before: going on" in capsys.readouterr().out
    assert cached_arrays(tmp_path / "killed") == cached_arrays(tmp_path / "whole")
    [sidecar] = tmp_path.glob("killed/tiny/*.json")
    assert list(json.loads(sidecar.read_text())["broken"]) == ["B000000001", "B000000020"]


@pytest.mark.parametrize("change", ["batch size", "rows", "mark", "plan", "cut", "type"])
def test_a_partial_file_is_used_only_for_the_same_batches_and_if_intact(products, begun, encoded, tmp_path, change):
    [partial], [done] = begun.glob("tiny/*.partial.npy"), begun.glob("tiny/*.done.npy")
    if change == "rows":  # of an unfinished batch, and as a power loss may leave them of a finished one
        np.lib.format.open_memmap(partial, "r+")[:] *= 0
    elif change == "mark":
        np.lib.format.open_memmap(done, "r+")[0] ^= 1
    elif change == "plan":
        partial.with_suffix(".json").unlink()
    elif change == "cut":
        partial.write_bytes(partial.read_bytes()[:-1])
    elif change == "type":  # of an earlier version
        np.save(partial, np.load(partial).astype(np.float32))
    rows = item_features(products, **LEXICAL, batch_size=3 if change == "batch size" else 2, cache_root=begun)
    assert len(encoded) == {"batch size": 7, "mark": 5}.get(change, 10)
    np.testing.assert_array_equal(rows, item_features(products, **LEXICAL, cache_root=tmp_path / "new"))


def test_a_kill_before_the_final_rename_costs_no_batch_and_no_number_becomes_infinite(tmp_path):
    path, batches = tmp_path / "a.npy", in_order(5, 2)
    assert cache.begin(path, {"a": 1}, (5, 3), batches) == [0, 1, 2]
    writer = cache.Writer(path)
    for number, batch in enumerate(batches):
        writer.write(number, batch, np.full((len(batch), 3), number, np.float32))
    with pytest.raises(FloatingPointError, match="overflow"):
        writer.write(0, batches[0], np.full((2, 3), 65520, np.float32))
    writer.write(0, batches[0], np.full((2, 3), 65504, np.float32))
    cache.sidecar(path).write_text("{}")
    assert cache.begin(path, {"a": 1}, (5, 3), batches) == []
    header = cache.finish(path, {"key": {"k": 1}, "commit": "", "broken": {}}, batches)
    assert cache.read(path, {"k": 1}, None) == (header, "") and np.load(path)[:, 0].tolist() == [65504, 65504, 1, 1, 2]


def test_a_second_process_waits_for_the_first_and_reads_its_features(products, tmp_path, monkeypatch):
    item_features(products, **LEXICAL, cache_root=tmp_path / "cache")
    [path] = tmp_path.glob("cache/tiny/*.npy")
    before, away, said = path.stat().st_mtime_ns, path.rename(tmp_path / "away.npy"), []

    def appears(line: str) -> None:
        said.append(line)
        away.rename(path)
        lock.release()

    monkeypatch.setattr(cache, "print_main", appears)
    with FileLock(path.with_suffix(".lock")) as lock:
        item_features(products, **LEXICAL, cache_root=tmp_path / "cache")
    assert (said, path.stat().st_mtime_ns) == ([f"another process is making {path}: waiting for it"], before)


def precisions(tmp_path: Path) -> list[str]:
    sidecars = [path.with_suffix(".json") for path in tmp_path.glob("cache/tiny/*.npy")]
    return sorted(json.loads(path.read_text())["key"]["precision"] for path in sidecars)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_auto_takes_what_a_run_was_trained_on_or_was_made_first(products, mean_bert, tmp_path, monkeypatch, precision):
    arguments = LEXICAL | {"language": str(mean_bert), "cache_root": tmp_path / "cache"}
    features = functools.partial(item_features, products, **arguments)
    monkeypatch.setattr(encode, "best_precision", lambda device: precision)
    fast = features(precision="auto")
    [first] = tmp_path.glob("cache/tiny/*.npy")
    exact = features(precision="fp32")
    [second] = set(tmp_path.glob("cache/tiny/*.npy")) - {first}
    assert (exact * fast).sum(axis=1).min() > 0.999 and not np.array_equal(exact, fast)
    np.testing.assert_array_equal(features(precision="auto", trained_on=[second.name]), exact)
    np.testing.assert_array_equal(features(precision="auto"), fast)
    second.unlink()
    first.write_bytes(b"")  # damaged, but its precision is known
    monkeypatch.setattr(encode, "best_precision", lambda device: "fp32")
    np.testing.assert_array_equal(features(precision="auto"), fast)
    assert precisions(tmp_path) == [precision]


def test_precision_belongs_to_the_cache_of_encoders_with_weights_alone(products, clip, tmp_path):
    for precision in ("fp32", "bf16", "auto"):
        arguments = LEXICAL | {"image": "pixel", "precision": precision, "cache_root": tmp_path / "built in"}
        feature_parts(products, **arguments)
    assert len(cached_arrays(tmp_path / "built in")) == 2
    arguments = PIXEL | {"image": clip, "cache_root": tmp_path / "cache"}
    fp32, bf16 = (item_features(products, **arguments, precision=p) for p in ("fp32", "bf16"))
    assert not fp32[[0, 19]].any() and (fp32 * bf16)[1:19].sum(axis=1).min() > 0.999
    assert precisions(tmp_path) == ["bf16", "fp32"]


class KilledEncoder(PixelEncoder):
    def prepare(self, batch):  # as by a machine that is out of memory
        batch = list(batch)
        if batch[0].width > 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(batch)


@pytest.mark.slow
def test_a_worker_changes_no_bit_and_is_reported_with_a_remedy_if_it_is_killed(products, mean_bert, clip, tmp_path):
    draw("red").save(tmp_path / "large.png")
    pictures = [products.pictures[:7], products.pictures[7:]]
    batches = [*pictures, *pictures, [tmp_path / "large.png"]]  # a worker reads two batches ahead
    ahead = encode_batches(KilledEncoder(), ImageModality.read, batches, workers=1)
    for plain in encode_batches(PixelEncoder(), ImageModality.read, pictures):
        np.testing.assert_array_equal(next(ahead), plain)
    with pytest.raises(InputError, match=r"was killed \(DataLoader worker.*fewer --encoder_workers .* are kept"):
        list(ahead)
    texts = (language_encoder(str(mean_bert), "cpu"), [SHORT])
    for loaded, batch in (texts, (image_encoder(clip, "cpu"), [draw("red")])):
        there = pickle.loads(pickle.dumps(loaded.prepare))  # as in a worker
        np.testing.assert_array_equal(loaded.forward(there(loaded.tokenize(batch))), loaded.encode(batch))


def test_texts_of_similar_token_counts_share_a_batch():
    assert [batch.tolist() for batch in longest_first(["c", "aaaa", "bb", "aaa", "c"], 2)] == [[1, 3], [2, 0], [4]]


def test_features_are_mapped_from_the_file_copy_on_write(products, tmp_path):
    [rows] = feature_parts(products, **LEXICAL, cache_root=tmp_path / "cache")
    assert isinstance(rows, np.memmap)
    [file] = tmp_path.glob("cache/tiny/*.npy")
    before = file.read_bytes()
    torch.from_numpy(rows)[0] = 7.0  # torch warns of arrays that it may not write to
    rows.flush()
    assert file.read_bytes() == before
