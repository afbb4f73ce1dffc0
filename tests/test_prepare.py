"""`python -m datasets.prepare`: events to sequences, and raw files to a dataset that trains."""

import io
import os
import random
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.pictures import good, serving
from common.cli import run_cli
from common.errors import InputError
from common.files import read_json
from dataloader import eval_rows, times_trained, train_items, train_rows
from datasets.catalog import load_catalog
from datasets.prepare import __main__ as command
from datasets.prepare.__main__ import main
from datasets.prepare.read import Events
from datasets.prepare.sequences import k_core, make_sequences
from experiments.store import keep
from tests.prepared import contents, in_child, item_features, reviews_of, write_raw
from train import main as train

REPO = Path(__file__).parent.parent
AMAZON = REPO.parent / "shared" / "amazon"
FILES = ("sequential_data.txt", "datamaps.json", "meta.json.gz")
BUILT_IN = ("--language_encoder=lexical", "--img_encoder=pixel")

# Ten users with the same five items each, in turn: a 5-core.
HISTORIES = [(f"USER{u}", [f"ITEM{(u + k) % 5}" for k in range(5)]) for u in range(10)]
PRODUCTS = [{"asin": f"ITEM{i}", "title": f"Tent {i}", "price": 9.99} for i in range(4)] + [{"asin": "RARE"}]


# ---------------------------------------------------------------------------------------------- events to sequences


def events_from(rows: list[tuple], lines: list[int] | None = None) -> Events:
    """(user, item, time[, rating]) in the file's order. lines: equal for copies of a line."""
    users, items = list(dict.fromkeys(row[0] for row in rows)), list(dict.fromkeys(row[1] for row in rows))
    return Events(
        users,
        items,
        np.array([users.index(row[0]) for row in rows], dtype=np.int32),
        np.array([items.index(row[1]) for row in rows], dtype=np.int32),
        np.array([row[2] for row in rows], dtype=np.float64),
        np.array([row[3] if len(row) > 3 else 5.0 for row in rows], dtype=np.float32),
        np.array(lines) if lines else None,
        [],
    )


def histories(made) -> dict[str, list[str]]:
    return {user: [made.items[i - 1] for i in made.sequences.of(row)] for row, user in enumerate(made.users)}


def make(rows, lines=None, **options):
    return make_sequences(events_from(rows, lines), **{"min_uc": 1, "min_sc": 1, **options})


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (
            [("U", "late", 9), ("U", "tie 1", 5), ("U", "early", 1), ("V", "x", 5), ("U", "tie 2", 5)],
            {},
            {"U": ["early", "tie 1", "tie 2", "late"], "V": ["x"]},
        ),
        (  # a goes, then U1, then b, then U2; c keeps U3
            [*zip(("U1", "U1", "U2", "U2", "U3", "U3", "U3"), "abbcccc", range(7), strict=True)],
            {"min_uc": 2, "min_sc": 2},
            {"U3": ["c", "c", "c"]},
        ),
        (
            [("U", "a", 1, 2.0), ("U", "b", 2, 4.0), ("U", "c", 3, np.nan), ("U", "d", 4), ("U", "e", 5, 4.5)],
            {"min_rating": 4},
            {"U": ["b", "d", "e"]},
        ),
        (
            [("U", "a", 9), ("U", "b", 5), ("U", "a", 1), ("V", "a", 2), ("U", "c", 4), ("V", "d", 1), ("U", "d", 6)],
            {"repeats": "drop"},
            {"U": ["a", "c", "b", "d"], "V": ["d", "a"]},
        ),
        (
            [("U", "a", 1), ("U", "b", 2), ("U", "c", 2), ("V", "a", 1), ("V", "b", 2), ("V", "d", 3)],
            {"ties": "drop_user"},
            {"V": ["a", "b", "d"]},
        ),
    ],
    ids=["order of time, then of the file", "k-core again and again", "ratings", "repeats", "ties"],
)
def test_events_become_histories(rows, options, expected):
    assert histories(make(rows, **options)) == expected


def test_users_are_numbered_by_their_first_line_and_items_by_their_first_appearance_in_the_histories():
    made = make([("V", "b", 9), ("U", "c", 1), ("V", "a", 1), ("U", "b", 2), ("V", "d", 10)])
    assert (made.users, made.items) == (["V", "U"], ["a", "b", "d", "c"])
    assert [made.sequences.of(row).tolist() for row in (0, 1)] == [[1, 2, 3], [4, 2]]


def test_the_core_is_what_a_loop_over_dicts_leaves():
    rng = random.Random(0)
    for trial in range(20):
        pairs = [(rng.randrange(30), rng.randrange(25)) for _ in range(rng.randrange(1, 250))]
        left = pairs
        while True:
            users, items = Counter(u for u, _ in left), Counter(i for _, i in left)
            kept = [(u, i) for u, i in left if users[u] >= 4 and items[i] >= 3]
            if kept == left:
                break
            left = kept
        rows = k_core(*np.array(pairs, dtype=np.int32).T, min_uc=4, min_sc=3)
        assert [pairs[row] for row in rows] == left, trial


def test_copies_of_a_line_are_one_event_and_counted():
    rows = [("U", "a", 1), ("U", "b", 1), ("U", "a", 1), ("U", "a", 1), ("U", "a", 2), ("U", "a", 1, 3.0)]
    made = make(rows)
    assert histories(made) == {"U": ["a", "b", "a", "a"]}
    assert made.notes[0] == "2 events are copies of another: counted once"
    assert made.filters[1] == {"after": "copies of a line left out", "users": 1, "items": 2, "interactions": 4}
    assert histories(make(rows, lines=[1, 2, 1, 4, 5, 6])) == {"U": ["a", "b", "a", "a", "a"]}


def test_the_notes_tell_repeats_and_ties():
    rows = [("U", "a", 1), ("U", "b", 2), ("U", "b", 3), ("V", "a", 1), ("V", "b", 2), ("V", "c", 2)]
    assert make(rows).notes == [
        "1 interactions repeat an item of the same user; --repeats drop keeps the first, as the benchmark splits of "
        "Amazon 2023 do",
        "1 of 2 users (50.0%) have the item before their target as the target again",
        "1 of 2 users (50.0%) have their last two events at the same time: --ties file decides which is the target",
    ]
    assert make([*rows[3:5], ("V", "c", 3), ("W", "a", 1)]).notes == []
    for one, rows in (("user", [("V", i, 1) for i in "abc"]), ("item", [("V", "a", t) for t in (1, 2, 3)])):
        assert any(note.startswith(f"there is only one {one}: ranks say nothing") for note in make(rows).notes)


def test_ties_are_shuffled_alike_each_time():
    rows = [("U", f"i{n:02}", n // 10) for n in range(40)]
    (first,) = histories(make(rows, ties="shuffle")).values()
    assert [int(item[1:]) // 10 for item in first] == [n // 10 for n in range(40)]
    assert first != [row[1] for row in rows]
    assert histories(make(rows, ties="shuffle")) == {"U": first}


def test_every_filter_is_counted():
    rows = [("U", "a", 1), ("U", "b", 2), ("U", "a", 3), ("V", "a", 2, 1.0), ("W", "c", 2), ("U", "d", 4)]
    made = make(rows, min_rating=2, repeats="drop", min_uc=2)
    assert [tuple(step.values()) for step in made.filters] == [
        ("reading", 3, 4, 6),
        ("ratings below 2 left out", 2, 4, 5),
        ("repeats left out", 2, 4, 4),
        ("2-core of users, 1-core of items", 1, 3, 3),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_uc": 10**9, "min_sc": 5}, "leaves none of 9 events; --min_uc 3 --min_sc 3 would leave 9 of them"),
        ({"min_uc": 4, "min_sc": 2}, "--min_uc 3 --min_sc 2 would leave 9 of them"),
        ({"min_uc": 1, "min_sc": 9}, "--min_uc 1 --min_sc 3 would leave 9 of them"),
        ({"min_rating": 6}, "lower --min_rating"),
        ({"ties": "drop_user"}, "--ties file or shuffle"),
        ({"repeats": "drop", "min_rating": 5.5}, "no user has 3 events or more"),
    ],
)
def test_when_nothing_is_left_the_flag_that_would_leave_something_is_named(options, words):
    rows = [(f"U{u}", f"I{i}", 1) for u in range(3) for i in range(3)]
    if words.startswith("no user"):
        rows = [("U", "a", 1, 6.0), ("U", "b", 2, 6.0), ("V", "a", 3, 6.0)]
    with pytest.raises(InputError, match=words):
        make(rows, **options)


BY_TIME = [("U", "a", 10), ("U", "b", 20), ("U", "c", 30), ("V", "a", 1), ("V", "c", 2), ("V", "b", 45), ("V", "a", 46),
           ("W", "b", 31), ("W", "c", 41), ("W", "a", 41), ("X", "a", 1), ("X", "b", 2), ("X", "c", 3)]  # fmt: skip


def test_a_split_by_time_trains_on_nothing_after_validation_begins():
    sequences = make(BY_TIME, split=("20", "40")).sequences
    assert sequences.cuts.tolist() == [[1, 3], [2, 2], [0, 1], [3, 3]]
    assert sequences.split == "time 20 40"
    users, items = train_items(sequences)
    assert (users.tolist(), items.tolist()) == ([0, 1, 1, 3, 3, 3], [1, 1, 3, 1, 2, 3])
    assert train_rows(sequences, 9).labels.tolist() == items.tolist()
    assert len(train_rows(sequences, 9, first_item=False)) == 2
    assert times_trained(sequences, 3).tolist() == [0, 3, 1, 2]
    for part, targets, histories in (("val", [2], [[1]]), ("test", [2, 3], [[1, 3], [2]])):
        rows = eval_rows(sequences, 9, part)
        assert rows.targets.tolist() == targets
        read = [sequences.items[a:b].tolist() for a, b in zip(rows.starts, rows.ends, strict=True)]
        assert read == histories


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (("40", "20"), "--val_from 40 is not before --test_from 20; the events are from 1 .1970-01-01. to 46"),
        (("20", "99"), "no user has an event in the test period .* from 1 .* to 46"),
        (("1", "40"), "no user has an event in the validation period"),
        (("1970-01-01", "2020-01-01"), "no user has an event in the validation period"),
    ],
)
def test_a_period_without_users_is_refused_with_the_range_of_the_events(split, words):
    with pytest.raises(InputError, match=words):
        make(BY_TIME, split=split)


def test_a_user_of_two_events_is_evaluated_under_a_split_by_time_alone(tmp_path):
    rows = [("U", "a", 10), ("U", "b", 20), ("V", "b", 1), ("V", "a", 50), ("W", "a", 2)]
    events = [dict(zip(("user", "item", "time"), row, strict=True)) for row in rows]
    raw = write_raw(tmp_path / "raw" / "events.json", events).parent
    flags = ["--events=events.json", "--min_uc=1", "--min_sc=1"]
    assert "no user has 3 events or more" in refusal(raw, *flags, dataset="shop")
    folder = prepare(raw, *flags, "--split=time", "--val_from=15", "--test_from=30", dataset="shop")
    sequences = load_catalog(folder.parent, "shop").sequences
    assert len(train_items(sequences)[1]) == 3
    assert [len(eval_rows(sequences, 9, part)) for part in ("val", "test")] == [1, 1]


@pytest.mark.parametrize("unit", [1, 1000], ids=["seconds", "milliseconds"])
def test_dates_and_numbers_split_alike(unit):
    rows = [(user, item, (1_600_000_000 + 86_400 * time) * unit) for user, item, time in BY_TIME]
    dates = ("2020-10-03T12:26:40", "2020-10-23T14:26:40+02:00")  # 20 and 40 days later
    assert make(rows, split=dates).sequences.cuts.tolist() == [[1, 3], [2, 2], [0, 1], [3, 3]]


# -------------------------------------------------------------------------------------------------- raw files to data


@pytest.fixture
def raw(tmp_path) -> Path:
    """Raw files of Beauty, in miniature."""
    folder = tmp_path / "raw"
    write_raw(folder / "reviews_Beauty_5.json.gz", reviews_of(HISTORIES))
    write_raw(folder / "meta_Beauty.json.gz", PRODUCTS, literals=True)
    return folder


def prepare(raw: Path, *flags: str, dataset: str = "beauty") -> Path:
    """The data step; returns the dataset's folder."""
    root = raw.parent / "data"
    return main([f"--dataset_code={dataset}", f"--raw_root={raw}", f"--data_root={root}", "--only=data", *flags])


def refusal(raw: Path, *flags: str, dataset: str = "beauty") -> str:
    with pytest.raises(InputError) as raised:
        prepare(raw, *flags, dataset=dataset)
    return str(raised.value)


@pytest.mark.parametrize("flags", [[], ["--min_rating=2", "--repeats=drop", "--ties=drop_user"], ["--min_uc=20"]])
def test_counts_on_disk_make_the_same_files(tmp_path, flags):
    pytest.importorskip("duckdb", reason="the optional package duckdb is not installed")
    rng = random.Random(0)
    rows = [
        {"user_id": f"U{int(rng.random() ** 2 * 60)}", "item_id": f"I{int(rng.random() ** 2 * 50)}\ud800",
         "timestamp": rng.randrange(99), "rating": rng.choice([1, 2, 3, 5, None])}
        for _ in range(1500)
    ]  # fmt: skip
    write_raw(tmp_path / "raw" / "events.json", rows + rng.sample(rows, 50))
    flags = ["--events=events.json", "--overwrite", *flags]
    folders = (prepare(tmp_path / "raw", *flags, f"--counts={where}", dataset="shop") for where in ("memory", "duckdb"))
    in_memory, on_disk = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert on_disk == in_memory
    assert not list((tmp_path / "data").glob("*.counts"))


def test_counts_on_disk_that_cannot_be_made_are_refused_with_the_mend(raw, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert "pip install 'duckdb>=1.1,<2'; or leave --counts out" in refusal(raw, "--counts=duckdb")
    monkeypatch.undo()
    pytest.importorskip("duckdb", reason="the optional package duckdb is not installed")
    assert "give --ties file or drop_user" in refusal(raw, "--counts=duckdb", "--ties=shuffle")
    assert "lower --min_uc" in refusal(raw, "--counts=duckdb", "--min_uc=50")


@pytest.mark.skipif(not AMAZON.exists(), reason="the paper's data are not at hand")
@pytest.mark.parametrize("name, category", [("beauty", "Beauty"), ("sports", "Sports_and_Outdoors")])
def test_the_published_sequences_come_back_byte_for_byte(tmp_path, name, category):
    published = load_catalog(AMAZON, name)
    users = read_json(AMAZON / name / "datamaps.json", "")["id2user"]
    known = [
        (users[str(row + 1)], [published.asins[i - 1] for i in published.sequences.of(row)])
        for row in range(len(published.sequences))
    ]
    write_raw(tmp_path / "raw" / f"reviews_{category}_5.json", reviews_of(known))
    write_raw(tmp_path / "raw" / f"meta_{category}.json.gz", [r for r in published.metadata if r], literals=True)
    folder = prepare(tmp_path / "raw", dataset=name)
    for file in ("sequential_data.txt", "datamaps.json"):
        assert (folder / file).read_bytes() == (AMAZON / name / file).read_bytes(), file
    assert load_catalog(folder.parent, name).metadata == published.metadata
    report = read_json(folder / "prepare_report.json", "")
    assert report["summary"]["warnings"] == []


def test_a_shop_needs_its_events_and_items_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    events = [(user, item, f"2024-01-{day:02}") for user, items in HISTORIES for day, item in enumerate(items, start=1)]
    pd.DataFrame(events, columns=["customer_id", "product_id", "date"]).to_parquet("shop.parquet")
    Path("img").mkdir()
    Path("img/a.png").write_bytes(picture((1, 2, 3)))
    rows = ["Product ID,Name,Price,colour,photo", "ITEM0,Tent,9.5,red,img/a.png", "ITEM1,<b>,see cart,,/etc/passwd"]
    Path("products.csv").write_text("\n".join(rows))
    folder = main(["--events=shop.parquet", "--items=products.csv", "--dataset_code=shop", *BUILT_IN])
    catalog = load_catalog("data", "shop")
    names = [[catalog.asins[i - 1] for i in catalog.sequences.of(row)] for row in range(10)]
    assert names == [items for _, items in HISTORIES]
    assert catalog.metadata[:2] == [
        {"asin": "ITEM0", "colour": "red", "title": "Tent", "price": "9.5"},
        {"asin": "ITEM1"},
    ]
    assert catalog.pictures[0].read_bytes() == picture((1, 2, 3))
    assert catalog.pictures[1] is None
    summary = read_json(folder / "prepare_report.json", "")["summary"]
    assert (summary["items_with"]["colour"], summary["picture_sides"]["median"]) == (0.2, 30)
    printed = capsys.readouterr().out
    assert "1 of 2 paths copied to data/photos/shop; the others, such as '/etc/passwd', are no pictures" in printed
    assert "note: title: 1 of 2 items have only markup, code or words for nothing: missing" in printed
    assert "pictures' shorter side: smallest 30" in printed
    assert "100.0% are smaller than 64 pixels" in printed


def test_without_items_a_dataset_has_ids_alone(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = main([f"--events={raw / 'reviews_Beauty_5.json.gz'}", "--dataset_code=ids", "--no-use_img_encoder"])
    assert not (folder / "meta.json.gz").exists()
    assert load_catalog("data", "ids").notes == ["no meta.json.gz: items have no text"]
    assert "ids has no metadata, so there is no text to encode; give --items" in capsys.readouterr().out


def test_the_report_says_what_every_filter_left_and_where_the_paper_differs(raw, capsys):
    report = read_json(prepare(raw) / "prepare_report.json", "")
    before, after = report["prepared"]["filters"]
    assert (before["users"], before["items"], before["interactions"]) == (30, 6, 134)
    assert (after["users"], after["items"], after["interactions"]) == (10, 5, 50)
    assert report["summary"]["history_lengths"]["median"] == 5
    assert report["summary"]["items_with"] == {
        "title": 0.8, "price": 0.8, "brand": 0, "categories": 0, "description": 0}  # fmt: skip
    assert "10 users, but the paper's Table 1 has 22,363" in report["summary"]["warnings"]
    out = capsys.readouterr().out
    assert "warning: 50 interactions, but the paper's Table 1 has 198,502" in out
    assert "items with title 80.0%, price 80.0%" in out


def test_a_user_id_or_item_id_with_odd_characters_comes_through(tmp_path):
    odd = ["../../etc/passwd", "a b", "C:\\x", "né\u2028", "\ud800", "NUL\0"]
    write_raw(tmp_path / "raw" / "r.json", reviews_of([(f"{u}/{u}", odd) for u in odd]))
    write_raw(tmp_path / "raw" / "m.json", [{"asin": asin, "title": asin} for asin in odd])
    folder = prepare(tmp_path / "raw", "--events=r.json", "--items=m.json", dataset="odd")
    catalog = load_catalog(folder.parent, "odd")
    assert catalog.asins == odd
    assert [record["title"] for record in catalog.metadata] == odd
    assert {path.name for path in (tmp_path / "data" / "odd").iterdir()} == {
        *FILES, "prepare_report.json"}  # fmt: skip


# ---------------------------------------------------------------------------------- the whole command, again and again


def picture(colour: tuple[int, int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def shop(raw):
    """A web server with the raw files of Beauty and the pictures of two of its items; a third one's is gone."""
    with serving({}) as server:
        for i in range(2):
            server.pages[f"/{i}.png"] = good(picture((100 * i, 50, 50)))
        products = [product | {"imUrl": f"{server.url}/{n}.png"} for n, product in enumerate(PRODUCTS[:3])]
        write_raw(raw / "meta_Beauty.json.gz", products, literals=True)
        for path in raw.iterdir():
            server.pages[f"/files/{path.name}"] = good(path.read_bytes())
        yield server


def test_one_command_fetches_and_prepares_all_that_training_needs(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_code=beauty", f"--base_url={shop.url}/files/", "--allow_private_addresses", *BUILT_IN]
    folder = main(flags)
    assert folder == Path("data/beauty")
    manifest = read_json(folder / "pictures.json", "")
    assert [next(iter(manifest[f"ITEM{i}"])) for i in range(5)] == ["file", "file", "missing", "missing", "missing"]
    assert "404" in manifest["ITEM2"]["missing"]
    printed = capsys.readouterr().out
    assert "picture 40.0%" in printed
    assert "features of 5 items, 1024 wide" in printed
    asked = len(shop.requests)
    main(flags)
    assert shop.requests[asked:] == ["/2.png"]  # what was not there is asked for again, and nothing else

    features = item_features(load_catalog("data", "beauty"), language="lexical", image="pixel", attributes=("title",))
    assert features.shape[0] == 5
    assert features[:2, 1024:].any(axis=1).all() and not features[2:, 1024:].any()


def test_with_raw_files_at_hand_nothing_is_fetched(shop, raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "data" / "photos" / "beauty"
    photos.mkdir(parents=True)
    (photos / "ITEM4.png").write_bytes(picture((9, 9, 9)))
    folder = main(["--dataset_code=beauty", f"--raw_root={raw}", *BUILT_IN])
    assert read_json(folder / "item2img.json", "") == {"ITEM4": "ITEM4.png"}
    assert shop.requests == []
    command = "to fetch them: python -m datasets.prepare --dataset_code beauty --only pictures"
    assert f"3 pictures have an address and were not fetched; {command}" in capsys.readouterr().out
    main([*command.partition("prepare ")[2].split(), "--allow_private_addresses"])
    assert len(read_json(folder / "item2img.json", "")) == 3


def test_another_k_core_keeps_the_pictures_and_drops_what_named_them(shop, raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_code=beauty", f"--base_url={shop.url}/files", "--allow_private_addresses"]
    folder = main([*flags, "--only=data,pictures"])
    main([*flags, "--only=data", "--min_uc=4", "--min_sc=4", "--overwrite"])
    assert load_catalog("data", "beauty").pictures is None
    main([*flags, "--only=pictures"])
    assert read_json(folder / "item2img.json", "") == {"ITEM0": "ITEM0.png", "ITEM1": "ITEM1.png"}
    assert [path for path in shop.requests if path != "/2.png"].count("/1.png") == 1


def test_raw_files_that_are_not_what_was_fetched_are_refused(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_code=beauty", f"--base_url={shop.url}/files", "--only=data"]
    main(flags)
    write_raw(Path("data/raw/meta_Beauty.json.gz"), PRODUCTS[:1])
    with pytest.raises(InputError, match=r"checksums\.json records"):
        main([*flags, "--overwrite"])


def test_a_list_of_pictures_by_the_user_is_never_deleted(raw):
    folder = raw.parent / "data" / "beauty"
    folder.mkdir(parents=True)
    mine = '{"ITEM0": "mine.png"}'
    (folder / "item2img.json").write_text(mine, encoding="utf-8")
    prepare(raw)
    assert (folder / "item2img.json").read_text(encoding="utf-8") == mine
    prepare(raw, "--min_uc=4", "--overwrite")
    assert not (folder / "item2img.json").exists()
    assert (folder / "item2img.json.old").read_text(encoding="utf-8") == mine


def test_other_settings_or_files_are_refused_until_they_may_overwrite(raw):
    folder = prepare(raw)
    first = contents(folder)
    for flag, made in {"min_uc": 5, "min_rating": 0.0, "repeats": "keep", "ties": "file", "columns": {}}.items():
        given = {"repeats": "drop", "ties": "shuffle", "columns": "user=reviewerID"}.get(flag, "2")
        assert f"made with {flag} {made!r}" in refusal(raw, f"--{flag}={given}")
    write_raw(raw / "reviews_Beauty_5.json.gz", reviews_of(HISTORIES, seed=1))
    assert "made with events" in refusal(raw)
    assert contents(folder) == first
    flags = ("--min_uc=4", "--min_sc=4", "--min_rating=2", "--repeats=drop")
    filters = read_json(prepare(raw, *flags, "--overwrite") / "prepare_report.json", "")["prepared"]["filters"]
    assert [step["after"] for step in filters[-3:-1]] == ["ratings below 2 left out", "repeats left out"]
    (folder / "sequential_data.txt").write_text("1 1 2 3\n", encoding="utf-8")
    assert "sequential_data.txt, changed since" in refusal(raw, *flags)
    (folder / "prepare_report.json").unlink()
    assert "made by other means; --overwrite" in refusal(raw)


def test_a_split_by_time_is_trained_tested_and_named_in_the_run_and_its_kept_rows(raw, tmp_path, capsys):
    default = load_catalog(prepare(raw).parent, "beauty")
    days = [10**9 + 86_400 * day for day in (2, 4)]
    flags = ["--split=time", *(f"--{part}_from={day}" for part, day in zip(("val", "test"), days, strict=True))]
    assert "made with split None" in refusal(raw, *flags)
    folder = prepare(raw, *flags, "--overwrite")
    catalog = load_catalog(folder.parent, "beauty")
    assert catalog.digest() != default.digest()
    assert np.array_equal(catalog.sequences.items, default.sequences.items)
    run = train([f"--data_root={folder.parent}", f"--runs_root={tmp_path / 'runs'}", "--dataset_code=beauty",
                 "--model_code=popularity"])  # fmt: skip
    name = f"time {days[0]} {days[1]}"
    assert read_json(run / "env.json", "")["split"] == name
    assert f"split by {name}" in capsys.readouterr().out
    keep(run, tmp_path / "results")
    assert set(pd.read_csv(tmp_path / "results" / "metrics.csv")["dataset"]) == {f"beauty, {name}"}
    (folder / "split.json").write_text('{"name": "time", "cuts": [[1, 2]]}')
    with pytest.raises(InputError, match=r"split\.json does not fit line 2"):
        load_catalog(folder.parent, "beauty")
    prepare(raw, "--overwrite")
    assert load_catalog(folder.parent, "beauty").digest() == default.digest()


def test_a_second_time_nothing_is_read_and_raw_files_are_needed_no_more(raw, capsys):
    folder = prepare(raw)
    first, written = contents(folder), (folder / FILES[0]).stat().st_mtime_ns
    assert prepare(raw) == folder
    assert "is prepared already" in capsys.readouterr().out
    for path in raw.iterdir():
        path.unlink()
    assert main(["--dataset_code=beauty", f"--data_root={folder.parent}", "--only=data"]) == folder
    assert (contents(folder), (folder / FILES[0]).stat().st_mtime_ns) == (first, written)


def test_a_dataset_in_a_folder_that_is_only_read_has_its_features_cached_elsewhere(raw, tmp_path, monkeypatch):
    folder = prepare(raw)
    monkeypatch.chdir(tmp_path)
    first = contents(folder)
    refuse = InputError("cannot write")
    monkeypatch.setattr(command, "write_json", lambda *_: (_ for _ in ()).throw(refuse))
    main(["--dataset_code=beauty", f"--data_root={folder.parent}", "--only=features", *BUILT_IN])
    assert contents(folder) == first
    assert len(list(Path("data/features/beauty").glob("*.npy"))) == 1  # the text's: there are no pictures


def kill_at_write(number: int) -> None:
    """Kill this process before its write of this number, from 0 on, below a folder `data`."""
    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        writes = event in ("os.rename", "os.remove") or (event == "open" and "w" in str(arguments[1]))
        if writes and "data" in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)

    sys.addaudithook(hook)


def test_killed_before_any_change_to_the_disk_and_run_again_it_makes_the_same_bytes(raw, tmp_path):
    undisturbed = contents(prepare(raw))
    for count in range(100):
        root = tmp_path / f"data{count}"
        flags = ["--dataset_code=beauty", f"--raw_root={raw}", f"--data_root={root}", "--only=data"]
        status = in_child(lambda: (kill_at_write(count), main(flags)))  # noqa: B023 (called at once)
        if status == 0:
            break
        assert status == -9
        try:
            load_catalog(root, "beauty")
        except InputError as error:
            assert "python -m datasets.prepare --dataset_code" in str(error)
        main(flags)
        assert contents(root / "beauty") == undisturbed, count
    assert count > 8
    assert contents(root / "beauty") == undisturbed


def test_a_full_disk_is_named_and_the_next_run_goes_on(raw, tmp_path, capfd):
    undisturbed = contents(prepare(raw))
    flags = ["--dataset_code=beauty", f"--raw_root={raw}", f"--data_root={tmp_path}/full", "--only=data"]

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # a file may have no more bytes
        run_cli(lambda: main(flags))

    assert in_child(fill) == 2
    assert f"cannot write {tmp_path}/full/beauty/datamaps.json" in capfd.readouterr().err
    main(flags)
    assert contents(tmp_path / "full" / "beauty") == undisturbed


def test_the_second_of_two_at_once_says_who_holds_the_lock(raw):
    folder = raw.parent / "data" / "beauty"
    with command.only_one(folder):
        assert f"is being prepared by process {os.getpid()} on {os.uname().nodename}" in refusal(raw)
    assert prepare(raw) == folder


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--dataset_code=demo"], "demo is built in"),
        (["--only=features", "--min_uc=2"], "--min_uc is for the data, which --only features leaves out"),
        (["--only=pictures", "--overwrite"], "--overwrite is for the data"),
        (["--only=pictures", "--no-use_img_encoder"], "leave out one of the two"),
        (["--dataset_code=photos"], "choose another name"),
        (["--raw_root=nowhere"], "--raw_root nowhere is not a folder"),
        (["--only=data,pixels"], "'data,pixels': give one or more of data, pictures, features"),
        (["--only=features"], "python -m datasets.prepare --dataset_code beauty"),
        (["--dataset_code=beuty"], "did you mean beauty.*--events FILE, and --items FILE"),
        (["--split=time", "--val_from=2024-01-01"], "needs --split time --val_from DATE --test_from DATE"),
        (["--val_from=soon"], "--val_from: 'soon' is no date such as"),
        (["--min_uc=0"], "--min_uc: '0' is not a whole number"),
        (["--min_sc=x"], "--min_sc: 'x' is not a whole number"),
        (["--min_rating=nan"], "--min_rating: 'nan' is not a number"),
        (["--min_rating=-1"], "--min_rating: '-1' is not a number"),
        (["--pictures_per_second=0"], "--pictures_per_second: 0 would fetch nothing"),
    ],
)
def test_flags_that_make_no_sense_are_refused_and_leave_nothing(flags, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, SystemExit)) as raised:
        main(["--dataset_code=beauty", *flags])
    assert re.search(problem, f"{raised.value} {capsys.readouterr().err}")
    assert not list(Path().glob("data/b*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--events=meta_Beauty.json.gz"], ["holds no events"]),
        (["--items=other.json"], ["has none of the 5 items of reviews_Beauty_5.json.gz"]),
        (["--min_uc=50"], ["would leave"]),
        (["--items=nowhere"], ["nowhere is not in", "other.json", "--items FILE"]),
        (["--items=damaged.json.gz"], ["cannot be read"]),
    ],
)
def test_what_cannot_be_prepared_leaves_the_data_as_they_were(raw, flags, words):
    write_raw(raw / "other.json", [{"asin": "OTHER"}])
    (raw / "damaged.json.gz").write_bytes((raw / "meta_Beauty.json.gz").read_bytes()[:-9])
    first = contents(prepare(raw))
    message = refusal(raw, "--overwrite", *flags)
    assert all(part in message for part in words)
    assert contents(raw.parent / "data" / "beauty") == first


@pytest.mark.parametrize(("text", "wrong"), [("{}", "is not a report of .*"), ("[]", "is not a JSON object")])
def test_a_report_that_is_none_is_named(raw, text, wrong):
    folder = prepare(raw)
    (folder / "prepare_report.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"prepare_report\.json {wrong}; remove it"):
        load_catalog(folder.parent, "beauty")


def test_help_answers_without_heavy_imports():
    script = """
import sys, datasets.prepare.__main__ as prepare
try:
    prepare.main(["--help"])
finally:
    print({"torch", "PIL", "transformers", "httpx"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO)
    assert done.stdout.endswith("set()\n"), done.stderr
    assert "--min_uc" in done.stdout
    assert "--lr " not in done.stdout
