"""Make the demo catalogue from a seed, in the layout of every prepared dataset."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import InputError
from datasets import demo
from datasets.catalog import Catalog, load_catalog
from datasets.text import item_text
from tests.prepared import contents, write_prepared

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Catalog:
    """Return the demo as users get it."""
    return load_catalog(demo.prepare_demo(tmp_path_factory.mktemp("demo") / "data"), "demo")


@pytest.fixture
def small(monkeypatch) -> None:
    """Shrink the demo to 40 items and 30 users for tests that make it more than once."""
    monkeypatch.setattr(demo, "NUM_ITEMS", 40)
    monkeypatch.setattr(demo, "NUM_USERS", 30)


def test_the_demo_is_a_complete_prepared_dataset(shop):
    assert shop.notes == []
    assert (shop.num_items, len(shop.sequences)) == (demo.NUM_ITEMS, demo.NUM_USERS)
    assert all(path.is_file() for path in shop.pictures)
    assert all(record.keys() == {"asin", "title", "price", "brand", "categories"} for record in shop.metadata)


def test_histories_are_those_of_a_5_core_without_repetition(shop):
    lengths = np.diff(shop.sequences.offsets)
    assert lengths.min() >= 5
    assert np.median(lengths) < lengths.mean()  # a long tail
    assert len(np.unique(shop.sequences.items)) == shop.num_items
    histories = [shop.sequences.of(row) for row in range(len(shop.sequences))]
    assert all(len(set(history)) == len(history) for history in histories)


def test_texts_name_type_and_brand_but_neither_colour_nor_motif(shop):
    hidden = {word.lower() for word in (*demo.COLOURS, *demo.MOTIFS)}
    assert len(hidden) == len(demo.COLOURS) + len(demo.MOTIFS)
    for record in shop.metadata:
        assert record["title"].endswith(record["categories"][0][-1])
        assert item_text(record, ("title",)).startswith(f"Title: {record['brand']} ")
        words = set(re.findall(r"[a-z]+", " ".join(map(str, record.values())).lower()))
        assert not words & hidden


def test_pictures_show_the_colour_that_no_text_names(shop):
    """The median of the painted pixels is near one of the shop's colours; no two pictures are equal."""
    assert len({path.read_bytes() for path in shop.pictures}) == shop.num_items
    paints = np.array(list(demo.COLOURS.values()))
    for path in shop.pictures[:60]:
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=int).reshape(-1, 3)
        painted = pixels[np.abs(pixels - pixels[0]).sum(axis=1) > 150]
        assert np.abs(paints - np.median(painted, axis=0)).max(axis=1).min() <= 14


def test_the_same_seed_makes_the_same_bytes_in_every_process(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1e9)
        demo.prepare_demo(tmp_path / "here")
    code = (
        "import sys; from pathlib import Path; from datasets import demo\n"
        "demo.NUM_ITEMS, demo.NUM_USERS = 40, 30\n"
        "demo.prepare_demo(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], cwd=REPOSITORY, check=True, timeout=60)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert len(contents(tmp_path / "here")) == 40 + 5
    maps = json.loads((tmp_path / "here/demo/datamaps.json").read_text())
    for name, inverse in (("item2id", "id2item"), ("user2id", "id2user")):
        assert {number: key for key, number in maps[name].items()} == maps[inverse]


def test_an_existing_demo_is_left_alone(small, tmp_path):
    assert demo.prepare_demo(tmp_path) == tmp_path
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert demo.prepare_demo(tmp_path) == tmp_path
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("mark", [b"", b'{"version": 0}', b"\xff\xfe"], ids=str)
def test_a_demo_of_another_version_is_made_again(small, tmp_path, mark):
    demo.prepare_demo(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "demo" / "sequential_data.txt").write_text("1 1 2 3\n")
    (tmp_path / "demo" / "generated.json").write_bytes(mark)
    demo.prepare_demo(tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("name", ["VERSION", "SEED", "NUM_ITEMS", "NUM_USERS"])
def test_a_demo_of_other_settings_is_made_again(small, tmp_path, monkeypatch, name):
    demo.prepare_demo(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(demo, name, getattr(demo, name) + 1)
    demo.prepare_demo(tmp_path)
    after = contents(tmp_path)
    assert after["demo/generated.json"] != before["demo/generated.json"]
    assert load_catalog(tmp_path, "demo").num_items == demo.NUM_ITEMS
    if name == "SEED":
        for made in ("demo/sequential_data.txt", "demo/meta.json.gz", "photos/demo/DEMO000001.png"):
            assert after[made] != before[made]


def test_a_demo_whose_making_was_interrupted_is_made_again(small, tmp_path, monkeypatch):
    demo.prepare_demo(tmp_path)
    whole = contents(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "VERSION", demo.VERSION + 1)
        patch.setattr(demo, "_draw_picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.prepare_demo(tmp_path)
    demo.prepare_demo(tmp_path)
    assert contents(tmp_path) == whole


def test_a_users_dataset_named_demo_is_left_alone(tmp_path):
    folder = write_prepared(tmp_path, "demo")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"{folder} holds another dataset.*rename the folder"):
        demo.prepare_demo(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["", "demo", "photos"])
def test_a_folder_that_cannot_be_written_is_named(small, tmp_path, name):
    root = tmp_path / "data"
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("a file where a folder should be")
    with pytest.raises(InputError, match=f"cannot write .*{root / name}"):
        demo.prepare_demo(root)
