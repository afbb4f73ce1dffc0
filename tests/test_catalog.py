"""A prepared dataset and the demo: what is read, left out with a note or refused by file and line. Rows and batches."""

import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from dataloader import TrainLoader, bucket, eval_batches, eval_rows, share_rows, train_rows
from datasets import demo
from datasets.catalog import FILES, Catalog, describe, load_catalog
from datasets.items import item_text
from datasets.records import parse_record
from tests.made_up import as_sequences, contents, write_item2img, write_maps, write_metadata, write_prepared
from trainer.runs import REPOSITORY

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_prepared(tmp_path, users=6, items=5)


def load(folder: Path) -> Catalog:
    return load_catalog(folder.parent, folder.name)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as raised:
        load(folder)
    return str(raised.value)


def test_a_prepared_folder_is_read_as_it_was_written(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "sequential_data.txt").write_text("7 3 1 2\n\n9 2\t2  1 3 1 \n")
    write_maps(folder, {"BBB": "2", "AAA": 1, "CCC": "3"}, users=0)  # ids as texts or numbers; users may be missing
    tent, bag = {"asin": "AAA", "title": "Cook's Tent"}, {"parent_asin": "BBB", "brand": ""}
    lamp = {"asin": "CCC", "price": 5}
    write_metadata(folder, ["\ufeff" + repr(lamp), json.dumps(tent), bag])  # Python literals and JSON
    for name in ("sequential_data.txt", "datamaps.json"):  # with a byte order mark too
        (folder / name).write_bytes("\ufeff".encode() + (folder / name).read_bytes())
    catalog = load(folder)
    assert (catalog.name, catalog.num_items, catalog.asins) == ("shop", 3, ["AAA", "BBB", "CCC"])
    assert [catalog.sequences.of(row).tolist() for row in range(len(catalog.sequences))] == [[3, 1, 2], [2, 2, 1, 3, 1]]
    assert (catalog.metadata, catalog.pictures, catalog.notes) == ([tent, bag, lamp], None, [])
    assert describe(catalog) == "shop: 2 users, 3 items, 8 interactions (median history 4); title 33%, price 33%"


def test_an_unknown_dataset_is_refused_with_what_is_there_and_the_ways_to_another(tmp_path):
    assert "nothing is prepared there" in refusal(tmp_path / "beauty")
    write_prepared(tmp_path / "my data", "beauty")
    message = refusal(tmp_path / "my data" / "b'euty")
    assert f"at {tmp_path / 'my data'}/b'euty (prepared there: beauty); did you mean beauty? To prepare it: " in message
    assert f"--dataset_code 'b'\"'\"'euty' --data_root '{tmp_path / 'my data'}' --events FILE --items FILE" in message
    assert "or --dataset_code demo" in message


@pytest.mark.parametrize(
    ("root", "name", "words"),
    [("", name, "--dataset_code .* must be") for name in ("x" * 201, "a/b", "a\0b", "..", "", "\ud800")]
    + [("x" * 256, "tiny", "--data_root .* cannot be read .File name too long.; give another folder")],
)
def test_a_name_that_no_folder_has_is_refused_by_the_loader(tmp_path, root, name, words):
    with pytest.raises(InputError, match=words):
        load_catalog(tmp_path / root, name)


@pytest.mark.parametrize(("flag", "message"), [("--seed=1,2", "run --seeds 1,2"), ("--seed=1", "'none' is not at")])
def test_a_bad_flag_and_a_missing_dataset_are_refused_before_torch_is_imported(tmp_path, flag, message):
    code = "import sys; sys.modules['torch'] = None; import train; from common.cli import run_cli; run_cli(train.main)"
    command = [sys.executable, "-c", code, f"--data_root={tmp_path}", "--dataset_code=none", flag]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


NO_IDS, NO_NAMES = ("0", "5", "2", 1.5, "one", True, "9" * 900), ("", "é" * 129, "\ud800" * 100)


def item_ids(**more: object) -> bytes:
    return json.dumps({"item2id": {"A": 1, "B": "2", "C": "3"} | more}).encode()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sequential_data.txt", lambda path: None, " does not exist"),
        ("meta.json.gz", b"", " is empty"),
        ("meta.json.gz", gzip.compress(b"{'asin': 'B1'}\n", mtime=0)[:-9], " cannot be read"),
        ("sequential_data.txt", b"1 1 2 3\n\n2 1 two 3", ":3: '2 1 two 3' is not 'user item item"),
        ("sequential_data.txt", b"1 1 2 3\n2 1_0 2 3", ":2: '2 1_0 2 3' is not 'user item item"),
        ("sequential_data.txt", b"1 1 2 3\n0 1 2 3", ":2: user 0: ids start at 1"),
        ("sequential_data.txt", b"%d 1 2 3" % 2**63, f":1: user {2**63}: ids end at 2**63 - 1"),
        ("sequential_data.txt", b"4 1 2\n4 3 2 1", ":2: user 4: the user is already on line 1"),
        ("sequential_data.txt", b"1 1 2 0", ":1: item 0 is not in datamaps.json; its item2id has 1..5"),
        ("sequential_data.txt", b"1 1 2 6", ":1: item 6 is not in datamaps.json; its item2id has 1..5"),
        ("sequential_data.txt", b"1 1 2 3\n", " has 1 users, but datamaps.json's user2id has 6: the file is truncated"),
        ("sequential_data.txt", b"".join(b"%d 1 2\n" % u for u in range(1, 7)), ": no user has at least 3 items"),
        ("datamaps.json", b"[]", " is not a JSON object"),
        ("datamaps.json", b'{"user2id": {"A": 1}}', " has no 'item2id' map"),
        *(("datamaps.json", item_ids(D=bad), f": item 'D' has id {bad!r}; ids must be 1..4, each") for bad in NO_IDS),
        *(("datamaps.json", item_ids(**{bad: 4}), f": item id {bad[:80]!r} must have 1 to 256") for bad in NO_NAMES),
        *((name, os.mkfifo, " cannot be read (not a regular file); ") for name in (*FILES, "item2img.json")),
        ("split.json", b'{"name": "time", "cuts": [[0.5, 2]]}', " has cuts[0][0] 0.5: Expected int"),
        ("split.json", b'{"name": "\\ud800", "cuts": []}', " has name"),
        ("split.json", b'{"name": "time", "cuts": [[2, 1]]}', " does not fit line 1 of sequential_data.txt"),
        ("prepare_report.json", b"{}", " is not a report of datasets.prepare; remove it"),
        ("item2img.json", b'{"6": "a.png"}', ": item '6' is not in datamaps.json"),
        ("item2img.json", b'{"1": "../../x.png"}', ": picture '../../x.png' of item '1' lies outside"),
        ("item2img.json", b'{"1": "a\\u0000b.png"}', ": picture 'a\\x00b.png' of item '1' lies outside"),
        ("item2img.json", b'{"1": null}', " must map strings to strings"),
        ("item2img.json", b'{"1": "%s"}' % (b"x" * 256), f": picture '{'x' * 80}' of item '1' is too long"),
    ],
)
def test_a_missing_or_damaged_file_is_named_with_its_line(folder, name, content, words):
    (folder / name).unlink(missing_ok=True)
    content(folder / name) if callable(content) else (folder / name).write_bytes(content)
    assert refusal(folder).startswith(f"{folder / name}{words}")


def test_users_with_fewer_than_3_items_are_left_out_and_counted(folder):
    (folder / "sequential_data.txt").write_text("1 1 2\n2 1 2 3\n3 4\n5\n6 5 4 3 2\n7 1 2")
    catalog = load(folder)
    assert [catalog.sequences.of(row).tolist() for row in range(2)] == [[1, 2, 3], [5, 4, 3, 2]]
    assert catalog.notes == ["4 users with fewer than 3 items dropped"]


def test_python_code_in_metadata_is_never_executed_and_bad_lines_are_counted(folder, tmp_path):
    mark, asin = tmp_path / "executed", load(folder).asins[0]
    lines = [{"asin": f"X{i}"} for i in range(1000)]
    lines[:3] = [
        f"{{'asin': '{asin}', 'title': __import__('pathlib').Path('{mark}').touch()}}",
        f"[open('{mark}', 'w') for _ in range(3)]",
        f"{{'asin': '{asin}', 'title': f\"{{open('{mark}', 'w')}}\"}}",
    ]
    lines[40], lines[999] = {"title": "no asin"}, {"asin": 12}
    write_metadata(folder, lines)
    assert load(folder).metadata == [{}] * 5 and not mark.exists()
    assert load(folder).notes == [
        "meta.json.gz: 5 of 1,000 lines are not records with an 'asin' or 'parent_asin' (lines 1, 2, 3, 41, 1000)",
        "5 of 5 items have no metadata",
    ]


@pytest.mark.parametrize(
    "line",
    [
        *("['asin', 'B1']", "{'asin': 'B1'", "{'price': 1 / 2}", "{['asin']: 'B1'}", "{'asin': 'B1\0'}", "9" * 5000),
        *("[" * 100_000, "-" * 100_000 + "1", "{'asin': 'B1', 'price': 0x" + "f" * 5000 + "}"),
        *("{" + f"{q}asin{q}: {q}B1{q}, {q}a{q}: " + "[" * 70 + "]" * 70 + "}" for q in "'\""),
        '{"a": [' + "[]," * 999_999 + "[]]}",  # cheap in bytes, but not in what parsing costs, as the others below
        "{'a': '''x' ''', 'b': [" + "1," * 60_000 + "]}",
        "{'a': #'\r[" + "1," * 60_000 + "]}",
        "{'a': f'{\"'\"}', 'b': [" + "1," * 60_000 + "]}",
        "{'a': " + "'\\" * 60_000,
    ],
    ids=lambda line: line[:12],
)
def test_a_line_that_is_no_record_or_too_costly_is_none_without_parsing_it(line, monkeypatch):
    if len(line) > 100_000 and not line.endswith("\\"):
        monkeypatch.setattr("ast.literal_eval", lambda text: pytest.fail("it was parsed"))
    assert parse_record(line) is None


def test_a_long_record_of_few_values_is_read():
    record = {"related": [f"B{i:09d}" for i in range(3000)], "description": "It's a, \"b\"; # f'c' " * 1000}
    assert parse_record(repr(record)) == record


def test_pictures_are_found_by_item_id_and_by_asin_or_in_a_pickled_list(folder):
    asins, photos = load(folder).asins, folder.parent / "photos" / folder.name
    photos.mkdir(parents=True)
    (photos / "first.jpg").touch()
    (folder / "item2img_dict.pkl").write_bytes(pickle.dumps({asins[0]: "/home/x/first.jpg", asins[1]: "gone.jpg"}))
    assert load(folder).pictures == [photos / "first.jpg", *[None] * 4]
    write_item2img(folder, {"1": "a.png", asins[2]: "deeper/third.jpg"})
    assert load(folder).pictures == [photos / "a.png", None, photos / "deeper/third.jpg", None, None]


def test_photos_may_be_a_link_and_links_out_of_them_are_left_out_with_a_note(folder, tmp_path):
    disk, photos = tmp_path / "disk", tmp_path / "photos" / folder.name
    disk.mkdir()
    photos.parent.mkdir()
    photos.symlink_to(disk)
    (disk / "a.png").touch()
    (disk / "out.png").symlink_to(folder / "datamaps.json")
    (disk / "circle.png").symlink_to("circle.png")
    write_item2img(folder, {"1": "a.png", "2": str(photos / "a.png"), "3": "out.png", "4": "circle.png"})
    assert load(folder).pictures == [disk / "a.png", disk / "a.png", None, None, None]
    [note] = load(folder).notes
    assert note == f"2 pictures are links to files outside {disk}: left out (the first: 'out.png')"


# ----------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Iterator[Catalog]:
    """Return the demo, which is smaller while a test of this file uses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "NUM_ITEMS", 60)
        patch.setattr(demo, "NUM_USERS", 500)
        yield load_catalog(demo.prepare_demo(tmp_path_factory.mktemp("demo")), "demo")


def test_the_demo_is_a_5_core_without_repetition_whose_pictures_alone_show_colour_and_motif(shop):
    assert (shop.notes, shop.num_items, len(shop.sequences)) == ([], 60, 500)
    lengths, items = np.diff(shop.sequences.offsets), shop.sequences.items
    assert lengths.min() >= 5 and np.median(lengths) < lengths.mean()  # a long tail
    assert len(np.unique(items)) == 60 and all(len({*shop.sequences.of(u)}) == lengths[u] for u in range(500))
    hidden = {word.lower() for word in (*demo.COLOURS, *demo.MOTIFS)}
    for record in shop.metadata:
        assert record["title"].endswith(record["categories"][0][-1])
        assert item_text(record, ("title",)).startswith(f"Title: {record['brand']} ")
        assert not set(re.findall(r"[a-z]+", " ".join(map(str, record.values())).lower())) & hidden
    assert len({path.read_bytes() for path in shop.pictures}) == shop.num_items
    paints = np.array(list(demo.COLOURS.values()))
    for path in shop.pictures:
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=int).reshape(-1, 3)
        painted = np.median(pixels[np.abs(pixels - pixels[0]).sum(axis=1) > 150], axis=0)
        assert np.abs(paints - painted).max(axis=1).min() <= 14  # one of the demo's colours


def test_the_same_seed_makes_the_same_bytes_in_every_process_once(shop, tmp_path):
    here = shop.photos.parents[1]
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    demo.prepare_demo(here)
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
    code = "import sys; from pathlib import Path; from datasets import demo; demo.NUM_ITEMS, demo.NUM_USERS = 60, 500; "
    code += "demo.prepare_demo(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, check=True, timeout=60)
    assert contents(tmp_path) == contents(here) and len(contents(here)) == 60 + 6


@pytest.mark.parametrize("change", ["VERSION", "SEED", "NUM_ITEMS", "NUM_USERS"])
def test_a_demo_of_another_version_or_an_interrupted_one_is_made_again(shop, tmp_path, monkeypatch, change):
    shutil.copytree(shop.photos.parents[1], tmp_path, dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(demo, change, getattr(demo, change) - 1)
        patch.setattr(demo, "_draw_picture", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            demo.prepare_demo(tmp_path)
    demo.prepare_demo(tmp_path)
    assert contents(tmp_path) == contents(shop.photos.parents[1])


def test_the_demo_neither_replaces_a_users_dataset_nor_a_file_in_its_place(tmp_path):
    folder = write_prepared(tmp_path, "demo")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"{folder} holds another dataset.*rename the folder"):
        demo.prepare_demo(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"cannot write .*{tmp_path / 'file'}"):
        demo.prepare_demo(tmp_path / "file")


# -------------------------------------------------------------------------------------------------------------- batches

NUM_USERS = 23


def random_histories() -> list[list[int]]:
    """Return histories of every third length from 3 to 120 and of about 50 training items, in random order."""
    random = np.random.default_rng(0)
    lengths = [*range(3, 121, 3), 4, 50, 52, 53, 55]
    return [random.integers(1, 1000, size=n).tolist() for n in random.permutation(lengths)]


def plain_train_row(v: list[int], max_len: int) -> tuple[list[int], ...]:
    """Return tokens, labels and position of one user: token 0 and all training items, or the last max_len of them."""
    items = v[:-2]
    if len(items) <= max_len:
        return [0, *items[:-1]], items, [0, *range(len(items) - 1)]
    return items[-max_len - 1 : -1], items[-max_len:], list(range(max_len))


def cut(rows, cuts) -> list[tuple[list[int], ...]]:
    parts = (rows.tokens, rows.labels, rows.position)
    return [tuple(part[low:high].tolist() for part in parts) for low, high in pairwise(cuts)]


def rows_of_batch(batch) -> list[tuple[list[int], ...]]:
    """Return every row of a batch in which all rows fit, so that each begins with token 0 and a label."""
    starts = [t for t in range(len(batch.tokens)) if batch.tokens[t] == 0 and batch.labels[t] != 0]
    return cut(batch, [*starts, int((batch.labels != 0).sum())])


@pytest.mark.parametrize("max_len", [1, 7, 50])
def test_training_rows_are_those_of_one_user_at_a_time(max_len):
    histories = random_histories()
    rows = train_rows(as_sequences(histories), max_len)
    assert cut(rows, rows.offsets) == [plain_train_row(v, max_len) for v in histories]


def test_without_the_first_label_rows_lack_token_0():
    histories = [[7, 8, 9], *(v for v in random_histories() if len(v) > 3)]
    rows, kept = (train_rows(as_sequences(histories), 7, first) for first in (True, False))
    several = cut(rows, rows.offsets)[1:]  # the first user has one training item and so no row
    assert cut(kept, kept.offsets) == [tuple(part[row[0][0] == 0 :] for part in row) for row in several]
    with pytest.raises(InputError, match=r"no user has two training items.*--first_item_label"):
        train_rows(as_sequences([[7, 8, 9]]), 50, first_item=False)


@pytest.mark.parametrize(("max_len", "batch_size", "part"), [(3, 7, "val"), (50, 1, "test")])
def test_evaluation_batches_hold_every_user_once_in_order(max_len, batch_size, part):
    histories = random_histories()
    left_out, users = {"val": 2, "test": 1}[part], iter(histories)
    for batch in eval_batches(eval_rows(as_sequences(histories), max_len, part), batch_size, CPU):
        of_batch = [next(users) for _ in batch.targets]
        read = [v[:-left_out][-max_len:] for v in of_batch]
        assert len(of_batch) <= batch_size and batch.longest == max(map(len, read))
        assert batch.tokens.tolist() == [*chain(*read)]
        assert batch.position.tolist() == [*chain(*(range(len(items)) for items in read))]
        assert batch.last.tolist() == (np.cumsum([len(items) for items in read]) - 1).tolist()
        assert batch.targets.tolist() == [v[-left_out] for v in of_batch]
        seen = list(zip(batch.seen_rows.tolist(), batch.seen_items.tolist(), strict=True))
        assert seen == [(row, item) for row, v in enumerate(of_batch) for item in v[:-left_out]]
    assert next(users, None) is None


def known_users(batch_size: int = 4, seed: int = 5) -> tuple[TrainLoader, list[list[int]]]:
    """Return a loader in which user u has u % 5 + 1 training items, the first u + 1, and the users' histories."""
    histories = [[u + 1, *range(100, 100 + u % 5), 98, 99] for u in range(NUM_USERS)]
    return TrainLoader(train_rows(as_sequences(histories), 50), batch_size, seed, CPU), histories


def users_of(batches) -> list[int]:
    return [labels[0] - 1 for batch in batches for _, labels, _ in rows_of_batch(batch)]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_an_epoch_visits_every_user_once_in_batches_of_rows_then_padding(batch_size):
    loader, histories = known_users(batch_size)
    batches = list(loader.epoch(3))
    assert len(batches) == len(loader) == -(-NUM_USERS // batch_size)
    assert sorted(users_of(batches)) == list(range(NUM_USERS))
    labels = [label for v in histories for label in v[:-2]]
    assert loader.label_counts(200).tolist() == [labels.count(i) for i in range(201)]
    assert [bucket(n) for n in (0, 1, 3, 17, 128, 129, 256, 257)] == [1, 1, 4, 32, 128, 256, 256, 384]
    assert [len(rows_of_batch(batch)) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for batch in batches:
        users, length = users_of([batch]), int((batch.labels > 0).sum())
        assert rows_of_batch(batch) == [plain_train_row(histories[u], 50) for u in users]
        assert batch.longest == max(len(histories[u]) - 2 for u in users)
        assert len(batch.tokens) == len(batch.labels) == len(batch.position) == bucket(length)
        assert not any(part[length:].any() for part in (batch.tokens, batch.labels, batch.position))


def test_the_order_depends_on_seed_and_epoch_alone():
    loader, _ = known_users()
    expected = users_of(loader.epoch(2))
    np.random.seed(1)
    torch.manual_seed(1)
    assert users_of(known_users(batch_size=6)[0].epoch(2)) == users_of(loader.epoch(2)) == expected
    for seed, epoch in ((5, 3), (6, 2), (0, 0)):
        assert users_of(known_users(seed=seed)[0].epoch(epoch)) != expected != list(range(NUM_USERS))


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 1), (3, 6), (8, 100)])
def test_ranks_share_every_batch_in_its_order(world_size, batch_size):
    rows = train_rows(as_sequences(random_histories()), 50)
    wholes = TrainLoader(rows, batch_size, seed=0, device=CPU).epoch(1)
    loaders = [TrainLoader(rows, batch_size, 0, CPU, rank, world_size).epoch(1) for rank in range(world_size)]
    for whole, *shares in zip(wholes, *loaders, strict=True):
        length, begin = int(whole.num_labels), 0
        assert length == int((whole.labels > 0).sum()) and whole.share == (0, len(whole.tokens))
        for share in shares:
            own = int((share.labels > 0).sum())
            assert share.share == (begin, len(whole.tokens)) and share.num_labels == length
            assert 1 <= share.longest <= max(own, 1)
            for name in ("tokens", "labels", "position"):
                part = getattr(share, name)
                assert torch.equal(part[:own], getattr(whole, name)[begin : begin + own])
                assert len(part) == bucket(own) and not part[own:].any()
            begin += own
        assert begin == length and max(share.longest for share in shares) == whole.longest


def test_shares_are_within_half_a_row_of_equal():
    offsets = np.cumsum([0, *np.random.default_rng(0).integers(1, 51, size=40)])
    equal = offsets[-1] * np.arange(4) / 3
    assert (abs(offsets[share_rows(offsets, 3)] - equal) <= 25).all()
