"""`python -m datasets.prepare`: events to sequences, and raw files to a dataset that trains."""

import io
import os
import re
import resource
import shutil
import sys
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
from datasets.prepare.sequences import make_sequences
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


def histories(made) -> dict[str, list[str]]:
    return {user: [made.items[i - 1] for i in made.sequences.of(row)] for row, user in enumerate(made.users)}


def rows_of(text: str) -> list[tuple]:
    """Return the events of "user item time[ rating], ..."."""
    return [(user, item, *map(float, rest)) for user, item, *rest in map(str.split, text.split(", "))]


def make(rows: str | list[tuple], lines: list[int] | None = None, **options):
    """Make sequences of (user, item, time[, rating]) in the file's order. lines: equal for copies of a line."""
    rows = rows_of(rows) if isinstance(rows, str) else rows
    (user, users), (item, items) = (pd.factorize(np.array([row[k] for row in rows], object)) for k in (0, 1))
    time, rating = (np.array([(*row, 5.0)[k] for row in rows], float) for k in (2, 3))
    line = np.array(lines) if lines else None
    events = Events(list(users), list(items), user.astype(np.int32), item.astype(np.int32), time, rating, line, [])
    return make_sequences(events, **{"min_uc": 1, "min_sc": 1, **options})


def test_events_become_histories():
    for events, options, expected in (
        ("V b 9, U c 1, V a 1, U b 2, V d 10", {}, "V a b d, U c b"),  # users by their first line
        ("U late 9, U tie1 5, U early 1, V x 5, U tie2 5", {}, "U early tie1 tie2 late, V x"),  # by time, then line
        ("A a 0, A b 1, B b 2, B c 3, C c 4, C c 5, C c 6", {"min_uc": 2, "min_sc": 2}, "C c c c"),  # k-core again
        ("U a 1 2, U b 2 4, U c 3 nan, U d 4, U e 5 4.5", {"min_rating": 4}, "U b d e"),
        ("U a 9, U b 5, U a 1, V a 2, U c 4, V d 1, U d 6", {"repeats": "drop"}, "U a c b d, V d a"),
        ("U a 1, U b 2, U c 2, V a 1, V b 2, V d 3", {"ties": "drop_user"}, "V a b d"),
    ):
        made = histories(make(events, **options))
        assert [" ".join([user, *items]) for user, items in made.items()] == expected.split(", ")


def test_copies_of_a_line_are_one_event_and_counted():
    rows = "U a 1, U b 1, U a 1, U a 1, U a 2, U a 1 3"
    made = make(rows)
    assert histories(made) == {"U": ["a", "b", "a", "a"]}
    assert made.notes[0] == "2 events are copies of another: counted once"
    assert made.filters[1] == {"after": "copies of a line left out", "users": 1, "items": 2, "interactions": 4}
    assert histories(make(rows, lines=[1, 2, 1, 4, 5, 6])) == {"U": ["a", "b", "a", "a", "a"]}


def test_the_notes_tell_repeats_and_ties():
    repeats, again, ties = make("U a 1, U b 2, U b 3, V a 1, V b 2, V c 2").notes
    assert repeats.startswith("1 interactions repeat an item of the same user; --repeats drop keeps the first")
    assert again == "1 of 2 users (50.0%) have the item before their target as the target again"
    assert ties.startswith("1 of 2 users (50.0%) have their last two events at the same time")
    assert make("V a 1, V b 2, V c 3, W a 1").notes == []
    for one, events in (("user", "V a 1, V b 1, V c 1"), ("item", "V a 1, V a 2, V a 3")):
        assert any(note.startswith(f"there is only one {one}: ranks say") for note in make(events).notes)


def test_ties_are_shuffled_alike_each_time():
    rows = [("U", f"i{n:02}", n // 10) for n in range(40)]
    (first,) = histories(make(rows, ties="shuffle")).values()
    assert [int(item[1:]) // 10 for item in first] == [n // 10 for n in range(40)]
    assert first != [row[1] for row in rows]
    assert histories(make(rows, ties="shuffle")) == {"U": first}


NINE = [(f"U{u}", f"I{i}", 1) for u in range(3) for i in range(3)]
BY_TIME = rows_of("U a 10, U b 20, U c 30, V a 1, V c 2, V b 45, V a 46, W b 31, W c 41, W a 41, X a 1, X b 2, X c 3")


def test_a_split_by_time_trains_on_nothing_after_validation_begins():
    sequences = make(BY_TIME, split=("20", "40")).sequences
    assert (sequences.split, sequences.cuts.tolist()) == ("time 20 40", [[1, 3], [2, 2], [0, 1], [3, 3]])
    users, items = train_items(sequences)
    assert (users.tolist(), items.tolist()) == ([0, 1, 1, 3, 3, 3], [1, 1, 3, 1, 2, 3])
    assert train_rows(sequences, 9).labels.tolist() == items.tolist()
    assert len(train_rows(sequences, 9, first_item=False)) == 2
    assert times_trained(sequences, 3).tolist() == [0, 3, 1, 2]
    for part, targets, histories in (("val", [2], [[1]]), ("test", [2, 3], [[1, 3], [2]])):
        rows = eval_rows(sequences, 9, part)
        read = [sequences.items[a:b].tolist() for a, b in zip(rows.starts, rows.ends, strict=True)]
        assert (rows.targets.tolist(), read) == (targets, histories)


def test_when_nothing_is_left_the_flag_that_would_leave_something_is_named():
    for rows, options, words in (
        (NINE, {"min_uc": 10**9, "min_sc": 5}, "leaves none of 9 events; --min_uc 3 --min_sc 3 would leave 9 of them"),
        (NINE, {"min_uc": 4, "min_sc": 2}, "--min_uc 3 --min_sc 2 would leave 9 of them"),
        (NINE, {"min_uc": 1, "min_sc": 9}, "--min_uc 1 --min_sc 3 would leave 9 of them"),
        (NINE, {"min_rating": 6}, "lower --min_rating"),
        (NINE, {"ties": "drop_user"}, "--ties file or shuffle"),
        ("U a 1, U b 2, V a 3", {}, "no user has 3 events or more"),
        (BY_TIME, {"split": ("40", "20")}, "--val_from 40 is not before --test_from 20; .* from 1 .1970-01-01. to 46"),
        (BY_TIME, {"split": ("20", "99")}, "no user has an event in the test period .* from 1 .* to 46"),
        (BY_TIME, {"split": ("1970-01-01", "2020-01-01")}, "no user has an event in the validation period"),
    ):
        with pytest.raises(InputError, match=words):
            make(rows, **options)


def test_a_user_of_two_events_is_evaluated_under_a_split_by_time_alone(tmp_path):
    rows = rows_of("U a 10, U b 20, V b 1, V a 50, W a 2")
    raw = write_raw(tmp_path / "raw" / "e", [{"user": user, "item": i, "time": t} for user, i, t in rows]).parent
    flags = ["--events=e", "--min_uc=1", "--min_sc=1"]
    assert "no user has 3 events or more" in refusal(raw, *flags, dataset="shop")
    prepare(raw, *flags, "--split=time", "--val_from=15", "--test_from=30", dataset="shop")
    sequences = load_catalog(tmp_path / "data", "shop").sequences
    assert [len(eval_rows(sequences, 9, part)) for part in ("val", "test")] == [1, 1]


@pytest.mark.parametrize("unit", [1, 1000])
def test_dates_and_numbers_split_alike(unit):
    rows = [(user, item, (1_600_000_000 + 86_400 * time) * unit) for user, item, time in BY_TIME]
    dates = ("2020-10-03T12:26:40", "2020-10-23T14:26:40+02:00")  # 20 and 40 days later
    assert make(rows, split=dates).sequences.cuts.tolist() == [[1, 3], [2, 2], [0, 1], [3, 3]]


@pytest.fixture
def raw(tmp_path) -> Path:
    folder = tmp_path / "raw"
    write_raw(folder / "reviews_Beauty_5.json.gz", reviews_of(HISTORIES))
    write_raw(folder / "meta_Beauty.json.gz", PRODUCTS, literals=True)
    return folder


def prepare(raw: Path, *flags: str, dataset: str = "beauty") -> Path:
    root = raw.parent / "data"
    return main([f"--dataset_code={dataset}", f"--raw_root={raw}", f"--data_root={root}", "--only=data", *flags])


def refusal(raw: Path, *flags: str, dataset: str = "beauty") -> str:
    with pytest.raises(InputError) as raised:
        prepare(raw, *flags, dataset=dataset)
    return str(raised.value)


@pytest.mark.parametrize("flags", [[], ["--min_rating=2", "--repeats=drop", "--ties=drop_user"], ["--min_uc=20"]])
def test_counts_on_disk_make_the_same_files(tmp_path, flags):
    pytest.importorskip("duckdb", reason="the optional package duckdb is not installed")
    rng = np.random.default_rng(0)
    users, items = ((rng.random(1500) ** 2 * most).astype(int).tolist() for most in (60, 50))
    times, ratings = rng.integers(99, size=1500).tolist(), rng.choice([1, 2, 3, 5, None], size=1500).tolist()
    columns = zip(users, items, times, ratings, strict=True)
    rows = [{"user": f"U{u}", "item": f"I{i}\ud800", "time": t, "rating": r} for u, i, t, r in columns]
    raw, flags = write_raw(tmp_path / "raw" / "e", rows + rows[:50]).parent, ["--events=e", "--overwrite", *flags]
    made = [contents(prepare(raw, *flags, f"--counts={where}", dataset="shop")) for where in ("memory", "duckdb")]
    assert made[0] == made[1] and not list((tmp_path / "data").glob("*.counts"))


def test_counts_on_disk_without_duckdb_name_the_package(raw, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert "pip install 'duckdb>=1.1,<2'; or leave --counts out" in refusal(raw, "--counts=duckdb")


@pytest.mark.skipif(not AMAZON.exists(), reason="the paper's data are not at hand")
@pytest.mark.parametrize("name, category", [("beauty", "Beauty"), ("sports", "Sports_and_Outdoors")])
def test_the_published_sequences_come_back_byte_for_byte(tmp_path, name, category):
    published = load_catalog(AMAZON, name)
    users, rows = read_json(AMAZON / name / "datamaps.json", "")["id2user"], range(len(published.sequences))
    known = [(users[str(u + 1)], [published.asins[i - 1] for i in published.sequences.of(u)]) for u in rows]
    write_raw(tmp_path / "raw" / f"reviews_{category}_5.json", reviews_of(known))
    write_raw(tmp_path / "raw" / f"meta_{category}.json.gz", [r for r in published.metadata if r], literals=True)
    folder = prepare(tmp_path / "raw", dataset=name)
    for file in FILES[:2]:
        assert (folder / file).read_bytes() == (AMAZON / name / file).read_bytes(), file
    assert load_catalog(folder.parent, name).metadata == published.metadata
    assert read_json(folder / "prepare_report.json", "")["summary"]["warnings"] == []


def test_a_shop_needs_its_events_and_for_texts_and_pictures_its_items(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    events = [(user, item, f"2024-01-{day:02}") for user, items in HISTORIES for day, item in enumerate(items, start=1)]
    pd.DataFrame(events, columns=["customer_id", "product_id", "date"]).to_parquet("shop.parquet")
    Path("img").mkdir()
    Path("img/a.png").write_bytes(picture((1, 2, 3)))
    rows = ["Product ID,Name,Price,colour,photo", "ITEM0,Tent,9.5,red,img/a.png", "ITEM1,<b>,see cart,,/etc/passwd"]
    Path("products.csv").write_text("\n".join(rows))
    folder = main(["--events=shop.parquet", "--items=products.csv", "--dataset_code=shop", *BUILT_IN])
    catalog = load_catalog("data", "shop")
    assert [catalog.asins[i - 1] for i in catalog.sequences.items] == [item for _, items in HISTORIES for item in items]
    assert catalog.metadata[0] == {"asin": "ITEM0", "colour": "red", "title": "Tent", "price": "9.5"}
    assert catalog.metadata[1] == {"asin": "ITEM1"}
    assert contents(Path("data/photos/shop")) == {catalog.pictures[0].name: picture((1, 2, 3))}  # not /etc/passwd
    summary = read_json(folder / "prepare_report.json", "")["summary"]
    assert (summary["items_with"]["colour"], summary["picture_sides"]["median"]) == (0.2, 30)
    main(["--events=shop.parquet", "--dataset_code=ids", "--no-use_img_encoder"])
    assert load_catalog("data", "ids").notes == ["no meta.json.gz: items have no text"]
    assert "ids has no metadata, so there is no text to encode; give --items" in capsys.readouterr().out


def test_the_report_says_what_every_filter_left_and_where_the_paper_differs(raw):
    report = read_json(prepare(raw, "--min_rating=2", "--repeats=drop") / "prepare_report.json", "")
    assert [tuple(step.values()) for step in report["prepared"]["filters"]] == [
        ("reading", 30, 6, 134),
        ("ratings below 2 left out", 30, 6, 134),
        ("repeats left out", 30, 6, 120),
        ("5-core of users, 5-core of items", 10, 5, 50),
    ]
    assert (report["summary"]["history_lengths"]["median"], report["summary"]["items_with"]["title"]) == (5, 0.8)
    assert "10 users, but the paper's Table 1 has 22,363" in report["summary"]["warnings"]


def test_a_user_id_or_item_id_with_odd_characters_comes_through(tmp_path):
    odd = ["../../etc/passwd", "a b", "C:\\x", "né\u2028", "\ud800", "NUL\0"]
    write_raw(tmp_path / "raw" / "r.json", reviews_of([(f"{u}/{u}", odd) for u in odd]))
    write_raw(tmp_path / "raw" / "m.json", [{"asin": asin, "title": asin} for asin in odd])
    folder = prepare(tmp_path / "raw", "--events=r.json", "--items=m.json", dataset="odd")
    catalog = load_catalog(folder.parent, "odd")
    assert catalog.asins == [record["title"] for record in catalog.metadata] == odd
    assert {path.name for path in folder.iterdir()} == {*FILES, "prepare_report.json"}


def picture(colour: tuple[int, int, int]) -> bytes:
    Image.new("RGB", (40, 30), colour).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


@pytest.fixture
def shop(raw):
    """A web server with the raw files of Beauty and the pictures of two of its items; a third one's is gone."""
    with serving({}) as server:
        server.pages |= {f"/{i}.png": good(picture((100 * i, 50, 50))) for i in range(2)}
        products = [product | {"imUrl": f"{server.url}/{n}.png"} for n, product in enumerate(PRODUCTS[:3])]
        write_raw(raw / "meta_Beauty.json.gz", products, literals=True)
        server.pages |= {f"/files/{path.name}": good(path.read_bytes()) for path in raw.iterdir()}
        yield server


def test_one_command_fetches_and_prepares_all_that_training_needs(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_code=beauty", f"--base_url={shop.url}/files/", "--allow_private_addresses", *BUILT_IN]
    folder = main(flags)
    manifest = read_json(folder / "pictures.json", "")
    assert [next(iter(manifest[f"ITEM{i}"])) for i in range(5)] == ["file", "file", "missing", "missing", "missing"]
    assert "404" in manifest["ITEM2"]["missing"]
    shop.requests.clear()
    main(flags)
    assert shop.requests == ["/2.png"]  # what was not there is asked for again, and nothing else
    pictures = item_features(load_catalog("data", "beauty"), image="pixel")
    assert pictures.any(axis=1).tolist() == [True, True, False, False, False]


def test_pictures_are_fetched_only_when_asked_for_and_outlive_a_k_core(shop, raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data/photos/beauty").mkdir(parents=True)
    Path("data/photos/beauty/ITEM4.png").write_bytes(picture((9, 9, 9)))
    folder = main(["--dataset_code=beauty", f"--raw_root={raw}", *BUILT_IN])
    assert (read_json(folder / "item2img.json", ""), shop.requests) == ({"ITEM4": "ITEM4.png"}, [])
    command = "--dataset_code beauty --only pictures"
    assert command in capsys.readouterr().out  # what to give to fetch them
    main([*command.split(), "--allow_private_addresses"])
    main(["--dataset_code=beauty", f"--raw_root={raw}", "--only=data", "--min_uc=4", "--overwrite"])
    assert load_catalog("data", "beauty").pictures is None
    main([*command.split(), "--allow_private_addresses"])
    assert read_json(folder / "item2img.json", "") == {f"ITEM{i}": f"ITEM{i}.png" for i in (0, 1, 4)}
    assert sorted(shop.requests) == ["/0.png", "/1.png", "/2.png", "/2.png"]


def test_a_list_of_pictures_by_the_user_is_never_deleted(raw):
    folder, mine = raw.parent / "data" / "beauty", '{"ITEM0": "mine.png"}'
    folder.mkdir(parents=True)
    (folder / "item2img.json").write_text(mine)
    prepare(raw)
    assert (folder / "item2img.json").read_text() == mine
    prepare(raw, "--min_uc=4", "--overwrite")
    assert not (folder / "item2img.json").exists() and (folder / "item2img.json.old").read_text() == mine


def test_other_settings_or_files_are_refused_until_they_may_overwrite(raw):
    folder = prepare(raw)
    first = contents(folder)
    for flag, made in {"min_uc": 5, "min_rating": 0.0, "repeats": "keep", "ties": "file", "columns": {}}.items():
        given = {"repeats": "drop", "ties": "shuffle", "columns": "user=reviewerID"}.get(flag, "2")
        assert f"made with {flag} {made!r}" in refusal(raw, f"--{flag}={given}")
    write_raw(raw / "reviews_Beauty_5.json.gz", reviews_of(HISTORIES, seed=1))
    assert "made with events" in refusal(raw) and contents(folder) == first
    prepare(raw, "--min_uc=4", "--overwrite")
    (folder / "sequential_data.txt").write_text("1 1 2 3\n", encoding="utf-8")
    assert "sequential_data.txt, changed since" in refusal(raw, "--min_uc=4")
    (folder / "prepare_report.json").unlink()
    assert "made by other means; --overwrite" in refusal(raw)


def test_a_split_by_time_is_trained_tested_and_named_in_the_run_and_its_kept_rows(raw, tmp_path, capsys):
    default = load_catalog(prepare(raw).parent, "beauty")
    days = [10**9 + 86_400 * day for day in (2, 4)]
    flags = ["--split=time", f"--val_from={days[0]}", f"--test_from={days[1]}"]
    assert "made with split None" in refusal(raw, *flags)
    folder = prepare(raw, *flags, "--overwrite")
    catalog = load_catalog(folder.parent, "beauty")
    assert catalog.digest() != default.digest() and np.array_equal(catalog.sequences.items, default.sequences.items)
    roots, name = [f"--data_root={folder.parent}", f"--runs_root={tmp_path / 'runs'}"], f"time {days[0]} {days[1]}"
    run = train(["--dataset_code=beauty", "--model_code=popularity", *roots])
    assert read_json(run / "env.json", "")["split"] == name
    assert f"split by {name}" in capsys.readouterr().out
    keep(run, tmp_path / "results")
    assert set(pd.read_csv(tmp_path / "results" / "metrics.csv")["dataset"]) == {f"beauty, {name}"}
    (folder / "split.json").write_text('{"name": "time", "cuts": [[1, 2]]}')
    with pytest.raises(InputError, match=r"split\.json does not fit line 2"):
        load_catalog(folder.parent, "beauty")


def test_a_second_time_nothing_is_read_and_raw_files_are_needed_no_more(raw, capsys):
    folder = prepare(raw)
    first, written = contents(folder), (folder / FILES[0]).stat().st_mtime_ns
    prepare(raw)
    assert "is prepared already" in capsys.readouterr().out
    shutil.rmtree(raw)
    main(["--dataset_code=beauty", f"--data_root={folder.parent}", "--only=data"])
    assert (contents(folder), (folder / FILES[0]).stat().st_mtime_ns) == (first, written)


def test_a_dataset_in_a_folder_that_is_only_read_has_its_features_cached_elsewhere(raw, tmp_path, monkeypatch):
    folder = prepare(raw)
    monkeypatch.chdir(tmp_path)
    first = contents(folder)
    monkeypatch.setattr(command, "write_json", lambda *_: (_ for _ in ()).throw(InputError("cannot write")))
    main(["--dataset_code=beauty", f"--data_root={folder.parent}", "--only=features", *BUILT_IN])
    assert contents(folder) == first
    assert len(list(Path("data/features/beauty").glob("*.npy"))) == 1  # the text's: there are no pictures


def kill_at_write(number: int) -> None:
    """Kill this process before its write of this number, from 0 on, below a folder `data`."""
    left = iter(range(number))

    def hook(event: str, arguments: tuple) -> None:
        writes = event in ("os.rename", "os.remove") or (event == "open" and "w" in str(arguments[1]))
        if writes and "data" in str(arguments[0]) and next(left, None) is None:
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
    assert count > 8 and contents(root / "beauty") == undisturbed


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
    with command.only_one(raw.parent / "data" / "beauty"):
        assert f"is being prepared by process {os.getpid()} on {os.uname().nodename}" in refusal(raw)
    prepare(raw)


def test_flags_that_make_no_sense_are_refused_and_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, problem in (
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
        (["--pictures_per_second=0"], "--pictures_per_second: 0 would fetch nothing"),
    ):
        with pytest.raises((InputError, SystemExit)) as raised:
            main(["--dataset_code=beauty", *flags])
        assert re.search(problem, f"{raised.value} {capsys.readouterr().err}")
        assert not list(Path().glob("data/b*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--events=meta_Beauty.json.gz"], "holds no events"),
        (["--items=other.json"], "has none of the 5 items of reviews_Beauty_5.json.gz"),
        (["--min_uc=50"], "would leave"),
        (["--items=nowhere"], r"nowhere is not in .*other\.json.*--items FILE"),
        (["--items=damaged.json.gz"], "cannot be read"),
        (["--counts=duckdb", "--ties=shuffle"], "give --ties file or drop_user"),
        (["--counts=duckdb", "--min_uc=50"], "lower --min_uc"),
    ],
)
def test_what_cannot_be_prepared_leaves_the_data_as_they_were(raw, flags, words):
    if "--counts=duckdb" in flags:
        pytest.importorskip("duckdb", reason="the optional package duckdb is not installed")
    write_raw(raw / "other.json", [{"asin": "OTHER"}])
    (raw / "damaged.json.gz").write_bytes((raw / "meta_Beauty.json.gz").read_bytes()[:-9])
    first = contents(prepare(raw))
    assert re.search(words, refusal(raw, "--overwrite", *flags))
    assert contents(raw.parent / "data" / "beauty") == first
