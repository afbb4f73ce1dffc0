"""Items' features from encoders and from files: made once, cached by everything they depend on, remade if damaged."""

import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Iterator
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
from common.files import write_json
from datasets.catalog import Catalog, load_catalog
from datasets.features import arrays, image, text
from datasets.features.image import PixelEncoder
from datasets.features.text import LexicalEncoder
from datasets.text import NO_TEXT, item_text
from serving import Recommender
from serving import export as export_script
from tests.prepared import in_child, item_features, put_in_hub_cache, write_prepared, write_tiny_bert

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
    assert (encoded, shop.said) == ([], [])
    assert shop.features(catalog, language=None) is None


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
    assert (a == 255).all() and (b == 255).all()
    assert c[0, :, 0].tolist() == [0, 128, 255]


def test_an_attribute_that_no_item_has_is_left_out_and_items_without_text_share_one(catalog, shop):
    without = shop.features(catalog)
    catalog = dataclasses.replace(catalog, metadata=[record | {"zero": 0, "size": [""]} for record in catalog.metadata])
    np.testing.assert_array_equal(shop.features(catalog, attributes=("title", "colour", "brand", "size")), without)
    assert shop.said == ["no item has colour or size: left out of the texts"]
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
