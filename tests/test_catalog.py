"""A prepared dataset: what is read, what is left out with a note, and what is refused by file and line."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from datasets.catalog import Catalog, describe, load_catalog
from datasets.records import parse_record
from tests.prepared import write_item2img, write_maps, write_metadata, write_prepared

AMAZON = Path(__file__).parent.parent.parent / "shared" / "amazon"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole prepared dataset of 5 items, for a test to change one thing in."""
    return write_prepared(tmp_path, users=6, items=5)


def load(folder: Path) -> Catalog:
    return load_catalog(folder.parent, folder.name)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as raised:
        load(folder)
    return str(raised.value)


def write_sequences(folder: Path, *lines: str) -> None:
    """These lines, and as many users in the maps."""
    maps = folder / "datamaps.json"
    if maps.exists():
        users = sum(bool(line.strip()) for line in lines)
        write_maps(folder, json.loads(maps.read_text(encoding="utf-8"))["item2id"], users)
    (folder / "sequential_data.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def records(count: int) -> list[dict | str]:
    """Metadata of `count` products that the dataset does not have."""
    return [{"asin": f"X{i}", "title": "Other"} for i in range(count)]


# --------------------------------------------------------------------------------------------------------- what is read


def test_a_prepared_folder_is_read_as_it_was_written(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    write_sequences(folder, "7 3 1 2", "9 2 2 1 3 1")
    write_maps(folder, {"BBB": "2", "AAA": "1", "CCC": "3"})
    tent, lamp = {"asin": "AAA", "title": "Tent"}, {"asin": "CCC", "title": "Lamp", "price": 4.99}
    write_metadata(folder, [lamp, tent, {"asin": "BBB", "brand": "Birch"}])

    catalog = load_catalog(tmp_path, "shop")
    assert catalog.name == "shop"
    assert [catalog.sequences.of(row).tolist() for row in range(len(catalog.sequences))] == [[3, 1, 2], [2, 2, 1, 3, 1]]
    assert (catalog.num_items, catalog.asins) == (3, ["AAA", "BBB", "CCC"])
    assert catalog.metadata == [tent, {"asin": "BBB", "brand": "Birch"}, lamp]
    assert catalog.pictures is None
    assert catalog.notes == []


def test_ids_may_be_texts_or_numbers(folder):
    by_text = load(folder).asins
    write_maps(folder, {asin: number for number, asin in enumerate(by_text, start=1)})
    assert load(folder).asins == by_text


def test_users_who_are_not_in_user2id_are_fine(folder):
    before = len(load(folder).sequences)
    maps = json.loads((folder / "datamaps.json").read_text())
    (folder / "datamaps.json").write_text(json.dumps({"item2id": maps["item2id"], "user2id": {}}))
    assert (len(load(folder).sequences), load(folder).notes) == (before, [])


def test_blank_lines_and_tabs_in_the_sequences_are_fine(folder):
    write_sequences(folder, "1 1 2 3", "", "2\t3  4\t5 ")
    assert load(folder).sequences.items.tolist() == [1, 2, 3, 3, 4, 5]


def test_a_description_counts_users_items_interactions_and_known_attributes(folder):
    write_sequences(folder, "1 1 2 3", "2 3 4 5 1 2")
    write_metadata(
        folder, [{"asin": asin, "title": "T", "brand": "", "price": None} for asin in load(folder).asins[:4]]
    )
    line = describe(load(folder))
    assert line == "tiny: 2 users, 5 items, 8 interactions (median history 4); title 80%"


# --------------------------------------------------------------------------------------------------- missing and broken


def test_an_unknown_dataset_is_refused_with_what_is_there(tmp_path):
    write_prepared(tmp_path, "beauty")
    write_prepared(tmp_path, "sports")
    message = refusal(tmp_path / "beuty")
    assert "'beuty'" in message
    assert str(tmp_path / "beuty") in message
    assert "beauty, sports" in message
    assert "To prepare it: python -m datasets.prepare --dataset_code beuty --data_root" in message
    assert "--events FILE --items FILE" in message


@pytest.mark.parametrize("data_root", ["", "not there"])
def test_an_empty_or_missing_data_root_is_refused_with_the_way_to_the_demo(tmp_path, data_root):
    message = refusal(tmp_path / data_root / "beauty")
    assert "nothing is prepared there" in message
    assert "--dataset_code demo" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sequential_data.txt", None, "does not exist"),
        ("datamaps.json", None, "does not exist"),
        ("meta.json.gz", b"", "is empty"),
        ("sequential_data.txt", b"", "is empty"),
        ("sequential_data.txt", "1 1 2 3 é\n".encode("latin-1"), "is not UTF-8"),
        ("datamaps.json", b"{'item2id': {'A': 1}}", "is not JSON"),
        ("meta.json.gz", gzip.compress(b"{'asin': 'B1'}\n")[:-9], "cannot be read"),
    ],
)
def test_a_missing_or_damaged_file_is_named(folder, name, content, words):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert refusal(folder).startswith(f"{folder / name} {words}")


# ------------------------------------------------------------------------------------------------------------ sequences


@pytest.mark.parametrize("line", ["2 1 two 3", "2 1 2.5 3", "2 1_0 2 3"])
def test_a_line_that_is_no_sequence_is_named_and_shown(folder, line):
    write_sequences(folder, "1 1 2 3", "", line)
    assert refusal(folder).startswith(f"{folder / 'sequential_data.txt'}:3: {line!r}")


@pytest.mark.parametrize(("user", "reason"), [(0, "ids start at 1"), (2**63, "ids end at 2**63 - 1")])
def test_a_user_id_out_of_range_is_named_with_its_line(folder, user, reason):
    write_sequences(folder, "1 1 2 3", f"{user} 1 2 3")
    assert refusal(folder) == f"{folder / 'sequential_data.txt'}:2: user {user}: {reason}"


@pytest.mark.parametrize("item", [0, 6, 10**30])
def test_an_item_outside_the_maps_is_named_with_its_line_and_the_range(folder, item):
    write_sequences(folder, "1 1 2 3", f"2 1 2 3 {item}")
    message = refusal(folder)
    assert message.startswith(f"{folder / 'sequential_data.txt'}:2: item {item} ")
    assert "1..5" in message


@pytest.mark.parametrize("first", ["4 1 2 3", "4 1 2"], ids=["long", "too short to be kept"])
def test_a_user_with_two_lines_is_named_with_both(folder, first):
    write_sequences(folder, "1 1 2 3", first, "4 3 2 1")
    assert refusal(folder) == f"{folder / 'sequential_data.txt'}:3: user 4: the user is already on line 2"


def test_users_with_fewer_than_3_items_are_left_out_and_counted(folder):
    write_sequences(folder, "1 1 2", "2 1 2 3", "3 4", "5", "6 5 4 3 2")
    catalog = load(folder)
    assert [catalog.sequences.of(row).tolist() for row in range(2)] == [[1, 2, 3], [5, 4, 3, 2]]
    assert catalog.notes == ["3 users with fewer than 3 items dropped"]


def test_sequences_that_were_cut_short_are_refused(folder):
    path = folder / "sequential_data.txt"
    path.write_bytes(path.read_bytes()[:-20])
    assert "users, but datamaps.json's user2id has 6: the file is truncated; copy it again" in refusal(folder)


def test_a_dataset_without_a_long_enough_history_is_refused(folder):
    write_sequences(folder, "1 1 2", "2 1 3")
    assert "no user has at least 3 items" in refusal(folder)


# ----------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("text", ["[]", '{"user2id": {"A": 1}}', '{"item2id": ["A"]}'])
def test_maps_without_items_are_refused(folder, text):
    (folder / "datamaps.json").write_text(text)
    wrong = "has no 'item2id' map" if text.startswith("{") else "is not a JSON object"
    assert refusal(folder).startswith(f"{folder / 'datamaps.json'} {wrong}; ")


@pytest.mark.parametrize("number", ["0", "5", "2", 1.5, "one", None, True, "9" * 5000])
def test_item_ids_that_are_not_1_to_n_each_once_are_refused_by_name(folder, number):
    write_maps(folder, {"A": "1", "B": "2", "C": "3", "D": number})
    message = refusal(folder)
    assert message.startswith(f"{folder / 'datamaps.json'}: item 'D' has id {number!r:.80}")
    assert "1..4" in message


# ------------------------------------------------------------------------------------------------------------- metadata


def test_metadata_may_be_python_literals_or_json_even_in_one_file(folder):
    first, second, third = load(folder).asins[:3]
    as_literal = f"{{'asin': '{first}', 'title': \"Cook's Knife\", 'brand': None}}"
    as_json = json.dumps({"asin": second, "title": "Cook's Knife", "brand": None})
    write_metadata(folder, [as_literal, as_json, {"asin": third}])
    metadata = load(folder).metadata
    assert metadata[0] == {"asin": first, "title": "Cook's Knife", "brand": None}
    assert metadata[1] == {"asin": second, "title": "Cook's Knife", "brand": None}


def test_python_code_in_metadata_is_never_executed(folder, tmp_path):
    mark = tmp_path / "executed"
    asin = load(folder).asins[0]
    attacks = [
        f"__import__('os').system('touch {mark}')",
        f"{{'asin': '{asin}', 'title': __import__('pathlib').Path('{mark}').touch()}}",
        f"{{'asin': '{asin}', 'title': f\"{{open('{mark}', 'w')}}\"}}",
        f"[open('{mark}', 'w') for _ in range(3)]",
    ]
    write_metadata(folder, [*attacks, *records(996)])
    assert load(folder).metadata[0] == {}
    assert not mark.exists()


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("['asin', 'B1']", id="list"),
        pytest.param("{'asin': 'B1'", id="cut"),
        pytest.param("{'asin': 'B1', 'price': 1 / 2}", id="calculation"),
        pytest.param("{['asin']: 'B1'}", id="unhashable key"),
        pytest.param("[" * 100_000, id="nested too deep"),
        pytest.param("-" * 100_000 + "1", id="signs without end"),
        pytest.param("{'asin': 'B1\0'}", id="null byte"),
        pytest.param("9" * 5000, id="number without end"),
    ],
)
def test_a_line_that_is_no_record_is_none(line):
    assert parse_record(line) is None


def test_a_few_malformed_lines_are_left_out_counted_and_named(folder):
    lines = records(1000)
    lines[2], lines[40], lines[999] = "{'asin': ", "{'title': 'no asin'}", "{'asin': 12}"
    write_metadata(folder, lines)
    assert "meta.json.gz: 3 of 1,000 lines are not records with an 'asin' (lines 3, 41, 1000)" in load(folder).notes


def test_items_without_metadata_are_counted(folder):
    write_metadata(folder, [{"asin": asin, "title": "T"} for asin in load(folder).asins[:3]] + records(2))
    catalog = load(folder)
    assert catalog.metadata[3:] == [{}, {}]
    assert catalog.notes == ["2 of 5 items have no metadata"]


def test_a_dataset_without_metadata_is_noted_and_has_no_text(folder):
    (folder / "meta.json.gz").unlink()
    catalog = load(folder)
    assert catalog.metadata == [{}] * 5
    assert catalog.notes == ["no meta.json.gz: items have no text"]
    assert "no metadata" in describe(catalog)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_found_by_item_id_and_by_asin(folder):
    asins = load(folder).asins
    write_item2img(folder, {"1": "first.png", asins[2]: "deeper/third.jpg"})
    photos = folder.parent / "photos" / folder.name
    pictures = load(folder).pictures
    assert pictures[0] == photos / "first.png"
    assert pictures[2] == photos / "deeper/third.jpg"
    assert pictures[1] is pictures[3] is pictures[4] is None


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ({"6": "a.png"}, "item2img.json: item '6' is not in datamaps.json"),
        ({"1": "../../x.png"}, "item2img.json: picture '../../x.png' of item '1' lies outside"),
        ({"1": "/etc/hostname"}, "item2img.json: picture '/etc/hostname' of item '1' lies outside"),
        ({"1": "a\0b.png"}, "item2img.json: picture 'a\\x00b.png' of item '1' lies outside"),
        ({"1": None}, "item2img.json must map strings to strings"),
        (["a.png"], "item2img.json is not a JSON object"),
    ],
)
def test_a_list_of_pictures_that_cannot_be_is_refused(folder, listed, words):
    write_item2img(folder, listed)
    assert words in refusal(folder)


def test_a_pickled_list_of_pictures_is_read_as_it_is(folder):
    asins, photos = load(folder).asins, folder.parent / "photos" / folder.name
    photos.mkdir(parents=True)
    (photos / "first.jpg").touch()
    (folder / "item2img_dict.pkl").write_bytes(
        pickle.dumps({asins[0]: "/home/x/photos/first.jpg", asins[1]: "gone.jpg"})
    )
    assert load(folder).pictures == [photos / "first.jpg", None, None, None, None]


def test_a_link_that_leaves_the_photos_is_refused(folder, tmp_path):
    photos = tmp_path / "photos" / folder.name
    photos.mkdir(parents=True)
    (tmp_path / "secret.png").touch()
    (photos / "link.png").symlink_to(tmp_path / "secret.png")
    write_item2img(folder, {"1": "link.png"})
    assert "lies outside" in refusal(folder)


def test_photos_that_are_a_link_to_another_disk_are_fine(folder, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.png").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / folder.name).symlink_to(tmp_path / "disk")
    write_item2img(folder, {"1": "a.png"})
    assert load(folder).pictures[0].is_file()


# -------------------------------------------------------------------------------------------------------- real datasets


@pytest.mark.skipif(not AMAZON.is_dir(), reason="the Amazon datasets are not beside the repository")
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"),
    [
        ("beauty", 22_363, 12_101, 198_502),
        ("sports", 35_598, 18_357, 296_337),
        ("clothing", 39_387, 23_033, 278_677),
    ],
)
def test_the_papers_datasets_have_the_papers_counts(name, users, items, interactions):
    catalog = load_catalog(AMAZON, name)
    lengths = np.diff(catalog.sequences.offsets)
    assert (len(catalog.sequences), catalog.num_items, lengths.sum()) == (users, items, interactions)
    assert lengths.min() >= 5  # 5-core
    assert np.unique(catalog.sequences.items).tolist() == list(range(1, items + 1))
    assert catalog.pictures is None
    assert catalog.notes == []
