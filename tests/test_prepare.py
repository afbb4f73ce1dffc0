"""Raw files of every format to events and items, and those to a dataset that trains."""

import functools
import gzip
import io
import json
import math
import os
import re
import resource
import shutil
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.pictures import good, serving
from common.cli import run_cli
from common.errors import InputError
from common.files import read_json
from dataloader import eval_rows, times_trained, train_items, train_rows
from datasets import records
from datasets.catalog import load_catalog
from datasets.items import NO_TEXT, is_junk, item_text
from datasets.prepare import __main__ as command
from datasets.prepare.__main__ import main
from datasets.prepare.read import Events, attributes, item_record, picture_urls, read_events, read_items
from datasets.prepare.readers import lines as lines_module
from datasets.prepare.readers import tables
from datasets.prepare.sequences import make_sequences
from experiments.store import keep
from tests.made_up import contents, in_child, item_features, review, reviews_of, write_raw
from train import main as train
from trainer.runs import REPOSITORY

# -------------------------------------------------------------------------------------------------------------- readers

START = 1_400_000_000
PAIRS = [(u, i) for u in range(4) for i in range(3)]
ROWS = [(f"A{u}USER", f"B{i:09d}", float(1 + (u + i) % 5), START + 86_400 * (u + i)) for u, i in PAIRS]
NAMES = ["user_id", "item_id", "rating", "timestamp"]
TABLE = pd.DataFrame(ROWS, columns=NAMES)
NUMBERS = [(u, i, 5, START + u + i) for u, i in PAIRS]
GOOD = [review(f"U{n % 40}", f"I{n % 30}", 1000 + n) for n in range(1000)]
AS_JSON = [dict(zip(NAMES, row, strict=True)) for row in ROWS]


def lines(separator: str, rows=ROWS, header: str = "") -> bytes:
    return (header + "".join(separator.join(map(str, row)) + "\n" for row in rows)).encode()


def csv(**columns) -> bytes:
    return TABLE.assign(**columns).to_csv(index=False).encode()


def parquet(table: pd.DataFrame) -> bytes:
    return table.to_parquet(index=False)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def json_lines(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def file_of(tmp_path, content: bytes, name="events"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def rows_of(events) -> list[tuple]:
    users, items = np.array(events.users, dtype=object), np.array(events.items, dtype=object)
    columns = users[events.user], items[events.item], events.rating, events.time
    return list(zip(*(column.tolist() for column in columns), strict=True))


def refusal(path, **columns) -> str:
    with pytest.raises(InputError) as raised:
        read_events(path, columns)
    return str(raised.value)


RATINGS = lines(",", NUMBERS, "userId,movieId,rating,timestamp\n")
DECIMALS = [(Decimal(user), item, rating, time) for user, item, rating, time in NUMBERS]
MOVIELENS = (lines("\t", NUMBERS), lines("::", NUMBERS), RATINGS, parquet(pd.DataFrame(DECIMALS, columns=NAMES)))
TWICE = io.BytesIO()
pq.write_table(pa.Table.from_pandas(TABLE).append_column("rating", pa.array(range(12))), TWICE)
FORMATS = {
    "JSON lines of 2014 and 2018": json_lines(review(u, i, t, r) for u, i, r, t in ROWS),
    "Python literals": "".join(f"{review(u, i, t, r)}\n" for u, i, r, t in ROWS).encode(),
    "JSON lines with usual names": json_lines(AS_JSON),
    "JSON array": json.dumps(AS_JSON, indent=1).encode(),
    "object around an array": json.dumps({"count": 12, "reviews": AS_JSON}).encode(),
    "object around an array, indented": json.dumps({"reviews": AS_JSON}, indent=1).encode(),
    "CSV": csv(),
    "TSV with other names": lines("\t", header="visitorid\tproduct id\tStars\tevent_time\n"),
    "TSV with an index": TABLE.to_csv(sep="\t").encode(),
    "semicolons and quotes": TABLE.to_csv(index=False, sep=";", quoting=1).encode(),
    "RecBole": lines("\t", header="user_id:token\titem_id:token\trating:float\ttimestamp:float\n"),
    "parquet": parquet(TABLE),
    "parquet with an index": TABLE.set_index("user_id").to_parquet(),
    "parquet with more columns": parquet(TABLE.assign(text="fine")[["text", *reversed(NAMES)]]),
    "Amazon 2014 without header": lines(",", ROWS),
    **dict(zip(("u.data", "ratings.dat", "ratings.csv", "parquet of numbers"), MOVIELENS, strict=True)),
    "Amazon 2018 without header": lines(",", [(i, u, r, t) for u, i, r, t in ROWS]),
}


@pytest.mark.parametrize("content", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_gives_the_same_events(tmp_path, content):
    events = read_events(file_of(tmp_path, content))
    ids = [(str(u), str(i), r, t) for u, i, r, t in NUMBERS]
    assert (rows_of(events), events.notes) == (ids if content in MOVIELENS else ROWS, [])


@pytest.mark.parametrize("content", [b"7 3 1 2\n9 2 2\n", b'{"7": [3, 1, 2], "9": ["2", "2"]}'])
def test_sequences_without_times_keep_their_order(tmp_path, content):
    events = read_events(file_of(tmp_path, content))
    assert [row[:2] for row in rows_of(events)] == [("7", "3"), ("7", "1"), ("7", "2"), ("9", "2"), ("9", "2")]
    assert np.all(np.diff(events.time) > 0)


def test_odd_events_are_read_as_far_as_they_can_be(tmp_path):
    whole, bare = GOOD[0], {k: v for k, v in GOOD[0].items() if k != "overall"}
    raw = ["\ufeff" + json.dumps(bare | {"unixReviewTime": 0}), "", whole | {"overall": "five"}, f"{whole}\r", bare]
    events = read_events(write_raw(tmp_path / "r", [*raw, json.dumps(whole | {"overall": math.nan})]))
    assert events.time.tolist() == [0, 1000, 1000, 1000, 1000]
    assert [math.isnan(rating) for rating in events.rating.tolist()] == [True, True, False, True, True]
    of_2023 = {"user_id": "U", "parent_asin": "A", "asin": "A-RED", "rating": 5.0, "timestamp": 10_000}
    assert rows_of(read_events(write_raw(tmp_path / "r", [of_2023]))) == [("U", "A", 5, 10_000)]


def test_a_folder_of_parquet_parts_is_read_part_by_part(tmp_path):
    assert "is a folder without parquet files" in refusal(tmp_path)
    for start in (0, 4, 8):
        folder = tmp_path / f"day={start + 4}"
        folder.mkdir()
        TABLE[start : start + 4].to_parquet(folder / "part-0.parquet", index=False)
    (tmp_path / "_SUCCESS").touch()
    assert rows_of(read_events(tmp_path)) == ROWS


@pytest.mark.parametrize("name", ["CSV", "parquet", "JSON array", "JSON lines with usual names"])
def test_neither_chunks_nor_gzip_and_zstd_under_any_name_make_a_difference(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "CHUNK", 5)
    monkeypatch.setattr(lines_module, "LINES", 5)
    monkeypatch.setattr(lines_module, "PIECE", 90)
    for pack in (bytes,) if name == "parquet" else (bytes, gzip.compress, zstd):
        assert rows_of(read_events(file_of(tmp_path, pack(FORMATS[name]), "events.csv"))) == ROWS


def iso(time: int) -> str:
    return pd.Timestamp(time, unit="s").isoformat() + "Z"


@pytest.mark.parametrize("written", [str, float, lambda t: t * 1000, iso, lambda t: iso(t).replace("Z", " UTC")])
def test_times_may_be_text_floats_milliseconds_or_dates(tmp_path, written):
    frame, unit = TABLE.assign(timestamp=TABLE["timestamp"].map(written)), 1 if written in (str, float) else 1000
    contents = [frame.to_json(orient="records").encode(), frame.to_csv(index=False).encode(), parquet(frame)]
    if written is iso:
        contents.append(parquet(frame.assign(timestamp=pd.to_datetime(frame["timestamp"]))))
    for content in contents:
        assert read_events(file_of(tmp_path, content)).time.tolist() == [t * unit for *_, t in ROWS]


def test_columns_of_any_name_are_named_by_a_flag(tmp_path):
    renamed = TABLE.rename(columns=dict(zip(NAMES, ["who", "what", "how", "when"], strict=True)))
    given = {"user": "who", "item": "what", "time": "when", "rating": "how"}
    for content in (renamed.to_csv(index=False).encode(), parquet(renamed), renamed.to_json(orient="records").encode()):
        assert rows_of(read_events(file_of(tmp_path, content), given)) == ROWS
    assert "has no column 'what' (--columns item=what)" in refusal(file_of(tmp_path, csv()), item="what")
    assert "column 'item_id' cannot be user and item; give each" in refusal(file_of(tmp_path, csv()), user="item_id")
    path = file_of(tmp_path, b"x1,y1,5.0,1400000000\n")
    assert "could each be the items; say which: --columns user=1,item=2" in refusal(path)
    assert read_events(path, {"user": "2", "item": "1"}).users == ["y1"]


BAD_TIMES = ("-1", "null", "true", '"yesterday"', "1" + "0" * 400, "[" * 990 + "]" * 990)


@pytest.mark.parametrize(
    "line",
    [
        "not a record",
        '["a", "list"]',
        '{"reviewerID": "", "asin": "A", "unixReviewTime": 1}',
        '{"reviewerID": "U", "asin": ["A"], "unixReviewTime": 1}',
        *(f'{{"reviewerID": "U", "asin": "A", "unixReviewTime": {time}}}' for time in BAD_TIMES),
        "{'reviewerID': 0x" + "f" * 5000 + ", 'asin': 'A', 'unixReviewTime': 1}",
        "[" * 100_000,
    ],
    ids=lambda line: line[:70],
)
def test_a_line_without_user_item_or_time_is_counted_and_named(tmp_path, line):
    events = read_events(write_raw(tmp_path / "reviews.json.gz", [*GOOD[:500], line, *GOOD[500:]]))
    assert len(events.user) == 1000
    assert "1 of 1,001 lines are not events with a user, an item and a time (lines 501; the first: " in events.notes[0]
    assert len(read_events(write_raw(tmp_path / "r", [*GOOD[:99], line])).user) == 99  # one in a hundred
    assert "more than 1% is refused" in refusal(write_raw(tmp_path / "r", [*GOOD[:98], line]))


def test_a_line_without_end_is_read_in_pieces_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    assert "10 of 10 lines are not events" in refusal(write_raw(tmp_path / "r", ['{"reviewerID": "' + "U" * 9900]))


def test_bytes_that_are_not_utf8_are_read_as_windows_1252(tmp_path):
    raw = [f'{{"reviewerID": "U{n}", "asin": "A", "unixReviewTime": 1}}' for n in range(200)]
    raw.append('{"reviewerID": "Zoë", "asin": "A", "unixReviewTime": 2}')
    events = read_events(file_of(tmp_path, "\n".join(raw).encode("cp1252"), "reviews.json"))
    assert events.users[-1] == "Zoë" and events.notes == ["reviews.json: 1 lines are not UTF-8: read as Windows-1252"]
    assert read_events(file_of(tmp_path, "user,item,time\nZoë,A,1\n".encode("cp1252"))).users == ["Zoë"]


def test_bad_events_are_refused_in_one_sentence(tmp_path):
    for content, words in (
        ("a".encode("utf-16"), ("is UTF-16; save it as UTF-8",)),
        (b"version https://git-lfs.github.com/spec/v1\noid ", ("a Git LFS pointer, not the data", "git lfs pull")),
        (b"\x80\x04\x95", ("a pickle, which may run code",)),
        (b"one word\n", ("of no known format (it begins with 'one word'); accepted are parquet",)),
        (json_lines([{"asin": "A", "title": "Tent"}]), ("holds no events", "'asin', 'title'", "--columns user=...")),
        (b"sku,when\nA,1\n", ("holds no events: it has the columns 'sku', 'when'", "--columns user=...")),
        (csv(event_time=1), ("several columns for the time, 'timestamp', 'event_time'", "--columns time=timestamp")),
        (b"user,item,time,time\n1,2,3,4\n", ("two columns 'time'; rename one, or add the header line",)),
        (lines("\t", NUMBERS)[:-14], ("1 of 12 lines are not events", "lines 12; the first: no time")),
        (b"[]", ("is empty",)),
        (b"user,item,time\nU,A,1" + b"0" * 400 + b"\n", ("1 of 1 lines", "the first: time '1000")),
        (b'[{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}]", (": value 1 is nested too deep; at most 64 levels",)),
        (parquet(TABLE.assign(timestamp=[[1, 2]] * 12)), ("12 of 12 lines", "the first: time 'array([1, 2])'")),
        (TWICE.getvalue(), ("has two columns 'rating'; rename one",)),
        (b"1:7::5::3\n" + lines("::", NUMBERS), (":1: '1:7::5::3' is not user::item::rating::time, as the lines",)),
        (b"user,item,time\nU,A,1,2\n", ("has more cells in its rows than in its header",)),
        (b"id,user,item,time\n1,U,A,7,2\n2,V,B,8,2\n", ("has more cells in its rows than in its header",)),
        (FORMATS["JSON array"] * 2, ("goes on after its first JSON array or object, with '[",)),
        (b"user,item,time\nU,A,\nV,B,\n", ("2 of 2 lines are not events", "lines 2, 3; the first: no time")),
        (FORMATS["JSON array"][:-40], ("is cut short or not JSON: value 12 cannot be read",)),
        (FORMATS["parquet"][:-9], ("cannot be read as parquet",)),
        (gzip.compress(FORMATS["CSV"] * 90, mtime=0)[:-20], ("cannot be read", "give the whole file")),
        (b'{"7": [1, 2], "7": [3]}', ("1 of 2 lines are not events", "'7' occurs twice")),
        (b'[{"a": [' + b"[]," * 1_100_000 + b"[]]}]", ("value 1 has more than", "write an object a line")),
        (b"1\t7\t5\n1\t8\t4\n", ("holds no events: it has the columns 'user', 'item', 'rating'",)),
        (b"1\t7\t5\t3\t1\n1\t8\t4\t9\t2\n", (":2: a second line of user '1'", "a header and a time")),
        (parquet(TABLE.assign(timestamp=True)), ("12 of 12 lines", "time 'True'")),
        (b"user,item,time\n" + b"U,A,1\n" * 50 + b"U,A,soon\n", ("1 of 51 lines", "lines 52; the first: time 'soon'")),
        (b"user,item,time\nU,A,1\nU,A,1,2,3\n", ("Expected 3 fields in line 3, saw 5", "as many cells as the first")),
        (b'{"7": [1], "8": []}', ("1 of 2 lines are not events", "'8' has no list of items")),
    ):  # fmt: skip
        message = refusal(path := file_of(tmp_path, content))
        assert "\n" not in message and all(part in message for part in (str(path), *words))


def found_in(path, wanted, **columns) -> tuple[dict[str, dict], list[str]]:
    items = read_items(path, frozenset(wanted), columns)
    return {item: json.loads(line) for item, line in items.records.items()}, items.notes


SHOP = [{"item_id": "7", "title": "Tent", "colour": "red"}, {"item_id": "8", "title": "Lamp"}]
ITEM_FORMATS = {
    "JSON lines": json_lines(SHOP),
    "JSON array": json.dumps(SHOP, indent=1).encode(),
    "LETTER": json.dumps({record["item_id"]: record for record in SHOP}).encode(),
    "CSV": pd.DataFrame(SHOP).to_csv(index=False).encode(),
    "RecBole": b"item_id:token\ttitle:token_seq\tcolour:token\n7\tTent\tred\n8\tLamp\t\n",
    "parquet": parquet(pd.DataFrame(SHOP)),
    "parquet with numbers": parquet(pd.DataFrame(SHOP).astype({"item_id": int})),
}


@pytest.mark.parametrize("content", ITEM_FORMATS.values(), ids=ITEM_FORMATS.keys())
def test_every_format_gives_the_same_items(tmp_path, content):
    items = {"7": {"asin": "7", "title": "Tent", "colour": "red"}, "8": {"asin": "8", "title": "Lamp"}}
    assert found_in(file_of(tmp_path, content), {"7", "8", "9"}) == (items, [])


def test_decimals_and_dates_of_parquet_are_text_in_lists_and_structs_too(tmp_path):
    day, price = date(2024, 5, 31), Decimal("9.50")
    shop = {"item_id": ["7"], "since": [pd.Timestamp(day)], "days": [[day]], "offer": [{"on": [day], "price": price}]}
    shop |= {"of": pa.array([[(day, 1)]], pa.map_(pa.date32(), pa.int8()))}
    pq.write_table(pa.table(shop), path := tmp_path / "items")
    found, text = found_in(path, {"7"})[0]["7"], "2024-05-31"
    assert found.pop("since").startswith(text)
    assert found == {"asin": "7", "days": [text], "of": [[text, 1]], "offer": {"on": [text], "price": "9.50"}}


def test_parquet_keeps_every_digit_of_an_id_and_dates_that_no_timestamp_reaches(tmp_path):
    ids, day = [2**60 + 1, None, *range(200)], 2**31 - 1
    times = pa.array([day] * 202, pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"user_id": ids, "item_id": ids[:1] * 202, "date": times}), path := tmp_path / "events")
    events = read_events(path)
    assert events.users[:2] == [str(2**60 + 1), "0"] and events.items == [str(2**60 + 1)]
    assert set(events.time.tolist()) == {day * 86_400_000}


@pytest.mark.parametrize("start", ["1::Toy Story: I (1995)::", "movieId,title,genres\n1,Toy Story: I (1995),"])
def test_movies_have_titles_and_genres(tmp_path, start):
    items, _ = found_in(file_of(tmp_path, f"{start}Animation|Comedy\n".encode()), {"1"})
    assert items["1"] == {"asin": "1", "title": "Toy Story: I (1995)", "categories": ["Animation", "Comedy"]}


@pytest.mark.parametrize("asin", ["A", "it's", "back\\slash", "../../etc", "né", "\ud800"])
@pytest.mark.parametrize("literals", [True, False])
def test_only_the_wanted_metadata_are_kept_whatever_their_text_quotes(tmp_path, asin, literals):
    kept = {"asin": asin, "title": "\"asin\": 'OTHER'", "price": 9.5, "categories": [["Out", "Tents"]]}
    tent = kept | {"imUrl": "http://x/a.jpg", "related": {"also_bought": ["B"]}}
    other = {"description": f"'asin': {asin!r}", "asin": "OTHER"}
    path = write_raw(tmp_path / "meta.json.gz", [tent, other], literals)
    assert found_in(path, {asin, "C"}) == ({asin: kept | {"images": ["http://x/a.jpg"]}}, [])


NO_TEXTS = ["'Ten", "b'bytes'}", "{1, 2}}", "[" * 900 + "]" * 900 + "}", "0x" + "f" * 5000 + "}"]


@pytest.mark.parametrize("title", NO_TEXTS)
def test_a_cut_line_or_a_literal_that_is_no_text_is_counted_whether_wanted_or_not(tmp_path, title):
    raw = [{"asin": f"A{n}", "title": "<b>" if n < 2 else "Tent"} for n in range(200)]
    path = write_raw(tmp_path / "meta.json", [f"{{'asin': 'A', 'title': {title}", *raw], literals=True)
    items, notes = found_in(path, {"A", "A1", "A5"})
    assert items == {"A1": {"asin": "A1"}, "A5": {"asin": "A5", "title": "Tent"}}
    assert "1 of 201 lines are not items" in notes[0]
    assert notes[1] == "title: 1 of 2 items have only markup, code or words for nothing: missing"


def known(record: dict) -> dict:
    return item_record("A", attributes(record), picture_urls(record))


def test_the_names_of_2018_and_2023_become_those_of_2014_and_the_others_stay():
    tent = {"title": "Tent", "category": ["Out", "Tents"], "price": "$9.50", "brand": "", "feature": ["soft"]}
    kept = {"asin": "A", "title": "Tent", "categories": ["Out", "Tents"], "price": "$9.50", "features": ["soft"]}
    small, big = "https://x/small.jpg", "https://x/big.jpg"
    assert known(tent | {"imageURL": [small], "imageURLHighRes": [big]}) == kept | {"images": [big, small]}
    tent = {"title": "Tent", "store": "Alder", "categories": [], "main_category": "Out", "price": None}
    kept = {"asin": "A", "title": "Tent", "store": "Alder", "brand": "Alder", "main_category": "Out"}
    details = {"Item Form": "Cream"}
    kept |= {"categories": "Out", "details": details}
    assert known(tent | {"details": json.dumps(details), "description": []}) == kept


def test_an_item_is_the_last_record_of_its_parent_id_or_of_a_column_that_a_flag_names(tmp_path):
    path = write_raw(tmp_path / "meta.jsonl", [{"parent_asin": "A", "title": "Tent", "details": {"asin": "Z"}}])
    assert found_in(path, {"A"})[0]["A"]["title"] == "Tent" and found_in(path, {"Z"})[0] == {}
    shop = [{"item_id": item, "title": "Tent", "details": {"asin": "Z"}} for item in ("A", "B")]
    assert set(found_in(write_raw(tmp_path / "shop.jsonl", shop), {"B"})[0]) == {"B"}
    path = file_of(tmp_path, b"code,id,name\nA,1,Tent\n")
    assert found_in(path, {"A"}, id="code")[0] == {"A": {"asin": "A", "id": "1", "title": "Tent"}}
    assert found_in(path, {"1"})[0]["1"]["code"] == "A"
    twice = (
        b'{"asin": "A", "title": "old"}\n{"parent_asin": "B", "asin": "A", "title": "B"}\n{"asin": "A", "title": "new"}'
    )
    items, _ = found_in(file_of(tmp_path, twice), {"A", "B"})
    assert [items["A"]["title"], items["B"]["title"]] == ["new", "B"]


def test_a_file_without_items_is_refused(tmp_path):
    for content, words in (
        (json_lines([GOOD[1]]), "lines are not items with an id .lines 1; the first: an event"),
        (b'{"title": "Tent"}', "the first: no id"),
        (b"1::Tent::Out\n2:Lamp::In\n" + b"3::Mug::In\n" * 8, "lines 2; the first: '2:Lamp::In', not item::title::cat"),
        (b'[{"asin": "A", "title": ' + b"[" * 70 + b"]" * 70 + b"}]", "the first: no object, or nested over 64 deep"),
        (b"name,price\nTent,1\n", "no column with the items' ids: it has 'name', 'price'; name it: --columns id="),
        (b"1 2 3\n2 3 4\n", "holds sequences, not items"),
        (FORMATS["Amazon 2014 without header"], "no column with the items' ids"),
    ):
        with pytest.raises(InputError, match=words):
            read_items(file_of(tmp_path, content), frozenset({"I1"}))


def test_the_main_picture_comes_first_in_the_size_that_is_worth_fetching():
    back = {"variant": "BACK", "large": "https://x/back.jpg", "thumb": None}
    main = {"variant": "MAIN", "thumb": "https://x/t.jpg", "large": "https://x/l.jpg", "hi_res": "https://x/h.jpg"}
    expected = ["https://x/l.jpg", "https://x/h.jpg", "https://x/t.jpg", "https://x/back.jpg"]
    assert picture_urls({"images": [back, main]}) == expected
    another = main | {"large": "https://x/5.jpg"}
    assert picture_urls({"images": [back, main, another]}) == [*expected[:3], "https://x/5.jpg"]  # four are enough
    columns = {key: [back.get(key), main.get(key)] for key in ("variant", "thumb", "large", "hi_res")}
    assert picture_urls({"images": columns}) == expected


def test_the_full_picture_is_asked_for_before_a_thumbnail_and_anything_but_a_web_address_is_none():
    for name in ("a._SS40_.jpg", "a._AC_US40_.jpg", "a._SX38_SY50_CR,0,0,38,50_.jpg"):
        addresses = ["https://x/a.jpg", f"https://x/{name}"]
        assert picture_urls({"image": [f"https://x/{name}"]}) == addresses
        assert picture_urls(known({"image": [f"https://x/{name}"]})) == addresses  # what prepare wrote gives the same
    for large in ("https://x/a._SX300_.jpg", "https://x/a._note_.jpg"):
        assert picture_urls({"image": [large]}) == [large]
    for no_address in ("file:///etc/passwd", ["ftp://x/a.jpg", 7], "http://x/no-img-sm._CB192198896_.gif"):
        assert picture_urls({"imUrl": no_address}) == []
    assert picture_urls({"images": {"large": "no list"}}) == picture_urls({"images": [None, {"large": 3}]}) == []


ALL = ("title", "price", "brand", "categories")
PATHS = [["Outdoors, Fun & More", "Camping", "Tents"], ("Outdoors, Fun & More", "Hiking"), ["Gifts", ("Tents",)]]
DEEP = functools.reduce(lambda inner, _: [inner], range(990), "deep")
DETAILS = {"Brand": "Acme", "Sizes": ["S", "M"], "Weight": None, "Box": {"Depth": 3}}


def test_an_items_text_has_its_known_attributes_in_the_order_asked_for():
    for record, text in (
        ({"categories": ["Out"], "price": 19.99, "title": "Bag"}, "Title: Bag Price: 19.99 Categories: Out"),
        ({"categories": PATHS}, "Categories: Outdoors, Fun & More, Camping, Tents, Hiking, Gifts"),
        ({"brand": DETAILS}, "Brand: Brand: Acme, Sizes: S, M, Box: Depth: 3"),
        ({"title": "  Warm\n\tSleeping \u00a0 Bag\r\n"}, "Title: Warm Sleeping Bag"),
        ({"title": "red \ud83d lamp", "brand": {"b", "c", "a"}}, "Title: red ? lamp Brand: a, b, c"),
        *(({"price": price}, f"Price: {price}") for price in (20, 0, "$5")),
        *(({"title": "Tent", "price": price}, "Title: Tent") for price in ("see cart", "9" * 41)),
        *(({"brand": nothing}, NO_TEXT) for nothing in (None, " ", math.nan, ["", [None]], "&nbsp;", {"S": ""})),
        *((record, NO_TEXT) for record in ({}, {"asin": "B"}, {"title": DEEP})),
    ):
        assert item_text(record, ALL) == text


def test_entities_and_markup_leave_readable_text():
    for raw, clean in (
        ("Salt &amp; Pepper &quot;Duo&quot; &#39;14", 'Salt & Pepper "Duo" \'14'),
        ("Loel&amp;reg; &amp;amp; Co.", "Loel® & Co."),
        ("<b>Soft</b><br /> &lt;b&gt;dress&lt;/b&gt;", "Soft dress"),
        ('<span class="a-list-item">Hand wash only', "Hand wash only"),
        ("Tent <!-- page 2 --> for two<script>var a = 1 < 2;</script>", "Tent for two"),
        ("<script " * 60_000, ("<script " * 60_000).strip()),  # in linear time
        ("by\n    \n    Microsoft", "Microsoft"),
        *((text, text) for text in ("by Terry", "sizes <5 and >2, a<b", "Nancy Null")),
    ):
        record = {"title": raw, "categories": [[raw, "Toys"]]}
        assert item_text(record, ALL) == f"Title: {clean} Categories: {clean}, Toys"


JUNK = ['<span class="a"', "</span>", "var a = (new Date()).getTime();", ".a{b:#fff}#c .d{e:1px}", "NULL", math.inf]


@pytest.mark.parametrize("junk", JUNK)
def test_markup_code_and_words_for_nothing_are_missing(junk):
    record = {"title": junk, "price": junk, "brand": [junk], "categories": [["Toys", junk]]}
    assert item_text(record, ALL) == "Categories: Toys"
    assert [is_junk(record, attribute) for attribute in ALL] == [True, True, True, False]
    assert not is_junk({"title": " ", "brand": [None, []]}, "title")


# -------------------------------------------------------------------------------------------------------------- prepare

AMAZON = REPOSITORY.parent / "shared" / "amazon"
FILES = ("sequential_data.txt", "datamaps.json", "meta.json.gz")
BUILT_IN = ("--language_encoder=lexical", "--img_encoder=pixel")

# Ten users with the same five items each, in turn: a 5-core.
HISTORIES = [(f"USER{u}", [f"ITEM{(u + k) % 5}" for k in range(5)]) for u in range(10)]
PRODUCTS = [{"asin": f"ITEM{i}", "title": f"Tent {i}", "price": 9.99} for i in range(4)] + [{"asin": "RARE"}]


def histories(made) -> dict[str, list[str]]:
    return {user: [made.items[i - 1] for i in made.sequences.of(row)] for row, user in enumerate(made.users)}


def events_of(text: str) -> list[tuple]:
    return [(user, item, *map(float, rest)) for user, item, *rest in map(str.split, text.split(", "))]


def make(rows: str | list[tuple], lines: list[int] | None = None, **options):
    """Make sequences of (user, item, time[, rating]) in the file's order. lines: equal for copies of a line."""
    rows = events_of(rows) if isinstance(rows, str) else rows
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
    assert [int(item[1:]) // 10 for item in first] == [n // 10 for n in range(40)] and first != [row[1] for row in rows]
    assert histories(make(rows, ties="shuffle")) == {"U": first}


NINE = [(f"U{u}", f"I{i}", 1) for u in range(3) for i in range(3)]
BY_TIME = events_of("U a 10, U b 20, U c 30, V a 1, V c 2, V b 45, V a 46, W b 31, W c 41, W a 41, X a 1, X b 2, X c 3")


def test_a_split_by_time_trains_on_nothing_after_validation_begins():
    sequences = make(BY_TIME, split=("20", "40")).sequences
    assert (sequences.split, sequences.cuts.tolist()) == ("time 20 40", [[1, 3], [2, 2], [0, 1], [3, 3]])
    users, items = train_items(sequences)
    assert (users.tolist(), items.tolist()) == ([0, 1, 1, 3, 3, 3], [1, 1, 3, 1, 2, 3])
    assert train_rows(sequences, 9).labels.tolist() == items.tolist()
    assert len(train_rows(sequences, 9, first_item=False)) == 2 and times_trained(sequences, 3).tolist() == [0, 3, 1, 2]
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
        ("U a 1 nan, U b 2 nan, U c 3 nan", {"min_rating": 1}, "no event has a rating; leave --min_rating out"),
        (NINE, {"ties": "drop_user"}, "--ties file or shuffle"),
        ("U a 1, U b 2, V a 3", {}, "no user has 3 events or more"),
        (BY_TIME, {"split": ("40", "20")}, "--val_from 40 is not before --test_from 20; .* from 1 .1970-01-01. to 46"),
        (BY_TIME, {"split": ("20", "99")}, "no user has an event in the test period .* from 1 .* to 46"),
        (BY_TIME, {"split": ("1970-01-01", "2020-01-01")}, "no user has an event in the validation period"),
    ):
        with pytest.raises(InputError, match=words):
            make(rows, **options)


def test_a_user_of_two_events_is_evaluated_under_a_split_by_time_alone(tmp_path):
    rows = events_of("U a 10, U b 20, V b 1, V a 50, W a 2")
    raw = write_raw(tmp_path / "raw" / "e", [{"user": user, "item": i, "time": t} for user, i, t in rows]).parent
    flags = ["--events=e", "--min_uc=1", "--min_sc=1"]
    assert "no user has 3 events or more" in prepare_refusal(raw, *flags, dataset="shop")
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


def prepare_refusal(raw: Path, *flags: str, dataset: str = "beauty") -> str:
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
    assert "pip install 'duckdb>=1.1,<2'; or leave --counts out" in prepare_refusal(raw, "--counts=duckdb")


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
    for name in ("a.png", "b.bmp"):  # another picture of the same size, then one under another name
        Path("img", name).write_bytes(picture((9, 2, len(name))))
        Path("products.csv").write_text("\n".join(rows).replace("a.png", name))
        main(["--events=shop.parquet", "--items=products.csv", "--dataset_code=shop", *BUILT_IN, "--overwrite"])
        assert load_catalog("data", "shop").pictures[0].read_bytes() == Path("img", name).read_bytes()
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
        assert f"made with {flag} {made!r}" in prepare_refusal(raw, f"--{flag}={given}")
    write_raw(raw / "reviews_Beauty_5.json.gz", reviews_of(HISTORIES, seed=1))
    assert "made with events" in prepare_refusal(raw) and contents(folder) == first
    prepare(raw, "--min_uc=4", "--overwrite")
    (folder / "sequential_data.txt").write_text("1 1 2 3\n", encoding="utf-8")
    assert "sequential_data.txt, changed since" in prepare_refusal(raw, "--min_uc=4")
    (folder / "prepare_report.json").unlink()
    assert "made by other means; --overwrite" in prepare_refusal(raw)


def test_a_split_by_time_is_trained_tested_and_named_in_the_run_and_its_kept_rows(raw, tmp_path, capsys):
    default = load_catalog(prepare(raw).parent, "beauty")
    days = [10**9 + 86_400 * day for day in (2, 4)]
    flags = ["--split=time", f"--val_from={days[0]}", f"--test_from={days[1]}"]
    assert "made with split None" in prepare_refusal(raw, *flags)
    folder = prepare(raw, *flags, "--overwrite")
    catalog = load_catalog(folder.parent, "beauty")
    assert catalog.digest() != default.digest() and np.array_equal(catalog.sequences.items, default.sequences.items)
    roots, name = [f"--data_root={folder.parent}", f"--runs_root={tmp_path / 'runs'}"], f"time {days[0]} {days[1]}"
    run = train(["--dataset_code=beauty", "--model_code=popularity", *roots])
    assert read_json(run / "env.json", "")["split"] == name and f"split by {name}" in capsys.readouterr().out
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

    assert in_child(fill) == 2 and f"cannot write {tmp_path}/full/beauty/datamaps.json" in capfd.readouterr().err
    main(flags)
    assert contents(tmp_path / "full" / "beauty") == undisturbed


def test_the_second_of_two_at_once_says_who_holds_the_lock(raw):
    with command.only_one(raw.parent / "data" / "beauty"):
        assert f"is being prepared by process {os.getpid()} on {os.uname().nodename}" in prepare_refusal(raw)
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
        assert re.search(problem, f"{raised.value} {capsys.readouterr().err}") and not list(Path().glob("data/b*"))


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
    assert re.search(words, prepare_refusal(raw, "--overwrite", *flags))
    assert contents(raw.parent / "data" / "beauty") == first
