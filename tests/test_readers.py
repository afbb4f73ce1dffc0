"""Readers: files of every format give the same events and items, and a damaged one is named with its mend."""

import gzip
import io
import json
import math
from datetime import date
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import InputError
from datasets import records
from datasets.prepare.read import attributes, item_record, picture_urls, read_events, read_items
from datasets.prepare.readers import lines as lines_module
from datasets.prepare.readers import tables
from datasets.text import NO_TEXT, is_junk, item_text
from tests.prepared import review, review_2023, write_raw

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


# ----------------------------------------------------------------------------------------------------------- events

MOVIELENS = (
    lines("\t", NUMBERS),
    lines("::", NUMBERS),
    lines(",", NUMBERS, "userId,movieId,rating,timestamp\n"),
    parquet(pd.DataFrame(NUMBERS, columns=NAMES)),
)
TWICE = io.BytesIO()
pq.write_table(pa.Table.from_pandas(TABLE).append_column("rating", pa.array(range(12))), TWICE)
FORMATS = {
    "JSON lines of 2014 and 2018": "".join(json.dumps(review(u, i, t, r)) + "\n" for u, i, r, t in ROWS).encode(),
    "Python literals": "".join(f"{review(u, i, t, r)}\n" for u, i, r, t in ROWS).encode(),
    "JSON lines with usual names": "".join(json.dumps(record) + "\n" for record in AS_JSON).encode(),
    "JSON array": json.dumps(AS_JSON, indent=1).encode(),
    "object around an array": json.dumps({"count": 12, "reviews": AS_JSON}).encode(),
    "object around an array, indented": json.dumps({"reviews": AS_JSON}, indent=1).encode(),
    "CSV": csv(),
    "TSV with other names": lines("\t", header="visitorid\tproduct id\tStars\tevent_time\n"),
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
    assert rows_of(events) == (ids if content in MOVIELENS else ROWS)
    assert events.notes == []


@pytest.mark.parametrize(
    "content", [b"7 3 1 2\n9 2 2\n", b'{"7": [3, 1, 2], "9": ["2", "2"]}'], ids=["S3Rec", "LETTER"]
)
def test_sequences_without_times_keep_their_order(tmp_path, content):
    events = read_events(file_of(tmp_path, content))
    assert [row[:2] for row in rows_of(events)] == [("7", "3"), ("7", "1"), ("7", "2"), ("9", "2"), ("9", "2")]
    assert np.all(np.diff(events.time) > 0)


def test_odd_events_are_read_as_far_as_they_can_be(tmp_path):
    whole = GOOD[0]
    raw = ["\ufeff" + json.dumps(whole | {"unixReviewTime": 0}), "", whole | {"overall": "five"}, f"{whole}\r"]
    raw += [{k: v for k, v in whole.items() if k != "overall"}, json.dumps(whole | {"overall": math.nan})]
    raw += [review_2023("U", "A", 10)]
    events = read_events(write_raw(tmp_path / "r", raw[:-1]))
    assert events.time.tolist() == [0, 1000, 1000, 1000, 1000]
    assert [math.isnan(rating) for rating in events.rating.tolist()] == [False, True, False, True, True]
    assert rows_of(read_events(write_raw(tmp_path / "r", raw[-1:]))) == [("U", "A", 5, 10_000)]


@pytest.mark.parametrize("content", [FORMATS["CSV"], FORMATS["JSON array"], FORMATS["JSON lines with usual names"]])
def test_gzip_and_zstd_are_unpacked_whatever_the_name(tmp_path, content):
    zstd = pa.compress(content, codec="zstd", asbytes=True)
    for packed in (gzip.compress(content), zstd):
        assert rows_of(read_events(file_of(tmp_path, packed, "events.csv"))) == ROWS


def test_a_folder_of_parquet_parts_is_read_part_by_part(tmp_path):
    for number, part in enumerate(np.array_split(np.arange(len(ROWS)), 3)):
        folder = tmp_path / "events" / f"day={number}"
        folder.mkdir(parents=True)
        TABLE.iloc[part].to_parquet(folder / "part-0.parquet", index=False)
    (tmp_path / "events" / "_SUCCESS").touch()
    assert rows_of(read_events(tmp_path / "events")) == ROWS


@pytest.mark.parametrize("name", ["CSV", "parquet", "JSON array", "JSON lines with usual names"])
def test_chunks_make_no_difference(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "CHUNK", 5)
    monkeypatch.setattr(lines_module, "LINES", 5)
    monkeypatch.setattr(lines_module, "PIECE", 90)
    assert rows_of(read_events(file_of(tmp_path, FORMATS[name]))) == ROWS


ISO = [pd.Timestamp(t, unit="s", tz="UTC").isoformat() for *_, t in ROWS]
TIMES = {
    "text": ([str(t) for *_, t in ROWS], 1),
    "float": ([float(t) for *_, t in ROWS], 1),
    "milliseconds": ([t * 1000 for *_, t in ROWS], 1000),
    "ISO 8601": (ISO, 1000),
    "ISO 8601 of another zone": ([t.replace("+00:00", "Z") for t in ISO], 1000),
}


@pytest.mark.parametrize(("times", "unit"), TIMES.values(), ids=TIMES.keys())
def test_times_may_be_text_floats_milliseconds_or_dates(tmp_path, times, unit):
    raw = [record | {"timestamp": time} for record, time in zip(AS_JSON, times, strict=True)]
    frame = pd.DataFrame(raw)
    contents = [json.dumps(raw).encode(), frame.to_csv(index=False).encode(), parquet(frame)]
    if isinstance(times[0], str) and "T" in times[0]:
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


@pytest.mark.parametrize(
    "line",
    [
        "not a record",
        '["a", "list"]',
        '{"reviewerID": "U"',
        '{"reviewerID": "", "asin": "A", "unixReviewTime": 1}',
        '{"reviewerID": "U", "asin": ["A"], "unixReviewTime": 1}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": -1}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": null}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": true}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": "yesterday"}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": 1' + "0" * 400 + "}",
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": ' + "[" * 990 + "]" * 990 + "}",
        "{'reviewerID': 0x" + "f" * 5000 + ", 'asin': 'A', 'unixReviewTime': 1}",
        "[" * 100_000,
    ],
)
def test_a_line_without_user_item_or_time_is_counted_and_named(tmp_path, line):
    events = read_events(write_raw(tmp_path / "reviews.json.gz", [*GOOD[:500], line, *GOOD[500:]]))
    assert len(events.user) == 1000
    assert "1 of 1,001 lines are not events with a user, an item and a time (lines 501; the first: " in events.notes[0]
    assert len(read_events(write_raw(tmp_path / "r", [*GOOD[:99], line])).user) == 99  # one in a hundred
    assert "more than 1% is refused" in refusal(write_raw(tmp_path / "r", [*GOOD[:98], line]))


def test_a_line_without_end_is_read_in_pieces_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    path = write_raw(tmp_path / "r", ['{"reviewerID": "' + "U" * 9900])
    assert "10 of 10 lines are not events" in refusal(path)


def test_bytes_that_are_not_utf8_are_read_as_windows_1252(tmp_path):
    raw = [f'{{"reviewerID": "U{n}", "asin": "A", "unixReviewTime": 1}}' for n in range(200)]
    raw.append('{"reviewerID": "Zoë", "asin": "A", "unixReviewTime": 2}')
    events = read_events(file_of(tmp_path, "\n".join(raw).encode("cp1252"), "reviews.json"))
    assert events.users[-1] == "Zoë"
    assert events.notes == ["reviews.json: 1 lines are not UTF-8: read as Windows-1252"]
    assert read_events(file_of(tmp_path, "user,item,time\nZoë,A,1\n".encode("cp1252"))).users == ["Zoë"]


# ------------------------------------------------------------------------------------------------------- bad events


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("a".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"PK\3\4", "a zip archive or an Excel workbook; unpack it"),
        (b"BZh9", "is bzip2; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid ", "a Git LFS pointer, not the data; .*git lfs pull"),
        (b"\x80\x04\x95", "a pickle, which may run code"),
        (b"<!DOCTYPE html>", "a web page, not the data"),
        (b"one word\n", "of no known format .it begins with 'one word'.; accepted are parquet"),
        (b"", "is empty"),
    ],
)
def test_a_file_of_another_kind_is_named_with_its_mend(tmp_path, head, words):
    with pytest.raises(InputError, match=words):
        read_events(file_of(tmp_path, head))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"asin": "A", "title": "Tent"}] * 3, ("holds no events", "'asin', 'title'", "--columns user=...")),
        (b"sku,when\nA,1\n", ("holds no events: it has the columns 'sku', 'when'", "--columns user=...")),
        (parquet(TABLE[["rating"]]), ("holds no events: it has the columns 'rating'",)),
        (csv(event_time=1), ("several columns for the time, 'timestamp', 'event_time'", "--columns time=timestamp")),
        (b"user,item,time,time\n1,2,3,4\n", ("two columns 'time'; rename one, or add the header line",)),
        (lines("\t", NUMBERS)[:-14], ("1 of 12 lines are not events", "lines 12; the first: no time")),
        (lines(",", [*ROWS, ("U", "B000000001", 5.0, "soon")]), ("1 of 13 lines", "lines 13; the first: time 'soon'")),
        (b"[]", ("is empty",)),
        (b"user,item,time\nU,A,1" + b"0" * 400 + b"\n", ("1 of 1 lines", "the first: time '1000")),
        (b'[{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}]", (": value 1 is nested too deep; at most 64 levels",)),
        (parquet(TABLE.assign(timestamp=[[1, 2]] * 12)), ("12 of 12 lines", "the first: time 'array([1, 2])'")),
        (TWICE.getvalue(), ("has two columns 'rating'; rename one",)),
        (b"1:7::5::3\n" + lines("::", NUMBERS), (":1: '1:7::5::3' is not user::item::rating::time, as the lines",)),
        (b"user,item,time\nU,A,1\nU,A,1,2,3\n", ("Expected 3 fields in line 3, saw 5", "as many cells as the first")),
        (b"user,item,time\nU,A,1,2\n", ("has more cells in its rows than in its header",)),
        (b"user,item,time\n", ("is empty",)),
        (b"user,item,time\nU,A,\nV,B,\n", ("2 of 2 lines are not events", "lines 2, 3; the first: no time")),
        (FORMATS["JSON array"][:-40], ("is cut short or not JSON: value 12 cannot be read",)),
        (FORMATS["parquet"][:-9], ("cannot be read as parquet",)),
        (gzip.compress(FORMATS["CSV"] * 90, mtime=0)[:-20], ("cannot be read", "give the whole file")),
        (pa.compress(FORMATS["CSV"] * 90, codec="zstd", asbytes=True)[:-9], ("cannot be read", "give the whole file")),
        (b'{"7": [1, 2', ("is cut short or not JSON: value 1",)),
        (b'{"7": [1, 2], "7": [3]}', ("1 of 2 lines are not events", "'7' occurs twice")),
        (b'[{"a": [' + b"[]," * 1_100_000 + b"[]]}]", ("value 1 has more than", "write an object a line")),
        (b'{"7": [' + b"1," * 1_100_000 + b"1]}", ("value 1 has more than", "write an object a line")),
        (b"1\t7\t5\n1\t8\t4\n", ("holds no events: it has the columns 'user', 'item', 'rating'",)),
        (b"1::7::5::\n1::8::4::\n", ("holds no events: it has the columns 'user', 'item', 'rating'",)),
        (b"1\t7\t5\t3\t1\n1\t8\t4\t9\t2\n", (":2: a second line of user '1'", "a header and a time")),
        (parquet(TABLE.assign(timestamp=True)), ("12 of 12 lines", "time 'True'")),
        (b"user,item,time\n" + b"U,A,1\n" * 50 + b"U,A,soon\n", ("1 of 51 lines", "lines 52; the first: time 'soon'")),
        (None, ("is a folder without parquet files",)),
        (b'{"7": [1], "8": []}', ("1 of 2 lines are not events", "'8' has no list of items")),
    ],
)  # fmt: skip
def test_bad_events_are_refused_in_one_sentence(tmp_path, content, words):
    if content is None:
        path = tmp_path
    else:
        path = write_raw(tmp_path / "r", content) if isinstance(content, list) else file_of(tmp_path, content)
    message = refusal(path)
    assert str(path) in message
    assert "\n" not in message
    for part in words:
        assert part in message


# ------------------------------------------------------------------------------------------------------------ items


def found_in(path, wanted, **columns) -> tuple[dict[str, dict], list[str]]:
    items = read_items(path, frozenset(wanted), columns)
    return {item: json.loads(line) for item, line in items.records.items()}, items.notes


SHOP = [{"item_id": "7", "title": "Tent", "colour": "red"}, {"item_id": "8", "title": "Lamp"}]
ITEM_FORMATS = {
    "JSON lines": "".join(json.dumps(record) + "\n" for record in SHOP).encode(),
    "JSON array": json.dumps(SHOP, indent=1).encode(),
    "LETTER": json.dumps({record["item_id"]: record for record in SHOP}).encode(),
    "CSV": pd.DataFrame(SHOP).to_csv(index=False).encode(),
    "RecBole": b"item_id:token\ttitle:token_seq\tcolour:token\n7\tTent\tred\n8\tLamp\t\n",
    "parquet": parquet(pd.DataFrame(SHOP)),
    "parquet with numbers": parquet(pd.DataFrame(SHOP).astype({"item_id": int})),
}


@pytest.mark.parametrize("content", ITEM_FORMATS.values(), ids=ITEM_FORMATS.keys())
def test_every_format_gives_the_same_items(tmp_path, content):
    items, notes = found_in(file_of(tmp_path, content), {"7", "8", "9"})
    assert items == {"7": {"asin": "7", "title": "Tent", "colour": "red"}, "8": {"asin": "8", "title": "Lamp"}}
    assert notes == []


def test_decimals_and_dates_of_parquet_are_text_in_lists_and_structs_too(tmp_path):
    day, price = date(2024, 5, 31), Decimal("9.50")
    shop = {"item_id": ["7"], "since": [pd.Timestamp(day)], "price": [price], "days": [[day]]}
    shop |= {"offer": [{"on": [day], "price": price}], "of": pa.array([[(day, 1)]], pa.map_(pa.date32(), pa.int8()))}
    pq.write_table(pa.table(shop), path := tmp_path / "items")
    found = found_in(path, {"7"})[0]["7"]
    assert found.pop("since").startswith("2024-05-31")
    assert found == {"asin": "7", "price": "9.50", "days": ["2024-05-31"], "of": [["2024-05-31", 1]],
                     "offer": {"on": ["2024-05-31"], "price": "9.50"}}  # fmt: skip


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
    tent = {"asin": asin, "title": "\"asin\": 'OTHER'", "price": 9.5, "brand": "Alder",
            "categories": [["Out", "Tents"]], "imUrl": "http://x/a.jpg", "related": {"also_bought": ["B"]}}  # fmt: skip
    other = {"description": f"'asin': {asin!r}", "asin": "OTHER"}
    path = write_raw(tmp_path / "meta.json.gz", [tent, other], literals)
    names = ("asin", "title", "price", "brand", "categories")
    kept = {asin: {k: tent[k] for k in names} | {"images": ["http://x/a.jpg"]}}
    assert found_in(path, {asin, "C"}) == (kept, [])


@pytest.mark.parametrize("record", ["{'asin': 'A', 'title': 'Ten", *(f"{{'asin': 'A', 'title': {title}}}" for title in (
    "b'bytes'", "{1, 2}", "[" * 900 + "]" * 900, "0x" + "f" * 5000))])  # fmt: skip
def test_a_cut_line_or_a_literal_that_is_no_text_is_counted_whether_wanted_or_not(tmp_path, record):
    raw = [record, *({"asin": f"A{n}", "title": "<b>" if n < 2 else "Tent"} for n in range(200))]
    items, notes = found_in(write_raw(tmp_path / "meta.json", raw, literals=True), {"A", "A1", "A5"})
    assert items == {"A1": {"asin": "A1"}, "A5": {"asin": "A5", "title": "Tent"}}
    assert "1 of 201 lines are not items" in notes[0]
    assert notes[1] == "title: 1 of 2 items have only markup, code or words for nothing: missing"


def known(record: dict) -> dict:
    return item_record("A", attributes(record), picture_urls(record))


def test_the_names_of_2018_and_2023_become_those_of_2014_and_the_others_stay():
    assert known({"title": "Tent", "category": ["Out", "Tents"], "price": "$9.50", "brand": "", "feature": ["soft"],
                  "imageURL": ["https://x/small.jpg"], "imageURLHighRes": ["https://x/big.jpg"]}) == {
        "asin": "A", "title": "Tent", "categories": ["Out", "Tents"], "price": "$9.50", "features": ["soft"],
        "images": ["https://x/big.jpg", "https://x/small.jpg"]}  # fmt: skip
    details = {"Item Form": "Cream"}
    assert known({"title": "Tent", "store": "Alder", "categories": [], "main_category": "Out", "price": None,
                  "details": json.dumps(details), "description": []}) == {
        "asin": "A", "title": "Tent", "store": "Alder", "brand": "Alder", "categories": "Out", "main_category": "Out",
        "details": details}  # fmt: skip


def test_an_item_is_found_by_its_parent_id_or_by_a_column_that_a_flag_names(tmp_path):
    path = write_raw(tmp_path / "meta.jsonl", [{"parent_asin": "A", "title": "Tent", "details": {"asin": "Z"}}])
    assert found_in(path, {"A"})[0]["A"]["title"] == "Tent"
    assert found_in(path, {"Z"})[0] == {}
    shop = [{"item_id": item, "title": "Tent", "details": {"asin": "Z"}} for item in ("A", "B")]
    assert set(found_in(write_raw(tmp_path / "shop.jsonl", shop), {"B"})[0]) == {"B"}
    path = file_of(tmp_path, b"code,id,name\nA,1,Tent\n")
    assert found_in(path, {"A"}, id="code")[0] == {"A": {"asin": "A", "id": "1", "title": "Tent"}}
    assert found_in(path, {"1"})[0]["1"]["code"] == "A"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([GOOD[1]], "lines are not items with an id .lines 1; the first: an event"),
        ([{"title": "Tent"}], "the first: no id"),
        (b"1::Tent::Out\n2:Lamp::In\n" + b"3::Mug::In\n" * 8, "lines 2; the first: '2:Lamp::In', not item::title::cat"),
        (b'[{"asin": "A", "title": ' + b"[" * 70 + b"]" * 70 + b"}]", "the first: no object, or nested over 64 deep"),
        (b"name,price\nTent,1\n", "no column with the items' ids: it has 'name', 'price'; name it: --columns id="),
        (b"1 2 3\n2 3 4\n", "holds sequences, not items"),
        (FORMATS["Amazon 2014 without header"], "no column with the items' ids"),
    ],
)
def test_a_file_without_items_is_refused(tmp_path, content, words):
    path = write_raw(tmp_path / "m", content) if isinstance(content, list) else file_of(tmp_path, content)
    with pytest.raises(InputError, match=words):
        read_items(path, frozenset({"I1"}))


def test_the_last_record_of_an_item_counts_and_a_parent_before_its_variant(tmp_path):
    raw = [
        {"asin": "A", "title": "old"},
        {"parent_asin": "B", "asin": "A", "title": "of B"},
        {"asin": "A", "title": "new"},
    ]
    items, _ = found_in(write_raw(tmp_path / "meta.json", raw), {"A", "B"})
    assert {asin: record["title"] for asin, record in items.items()} == {"A": "new", "B": "of B"}


# --------------------------------------------------------------------------------------------------------- pictures


def test_the_main_picture_comes_first_in_the_size_that_is_worth_fetching():
    back = {"variant": "BACK", "large": "https://x/back.jpg", "thumb": None}
    main = {"variant": "MAIN", "thumb": "https://x/t.jpg", "large": "https://x/l.jpg", "hi_res": "https://x/h.jpg"}
    expected = ["https://x/l.jpg", "https://x/h.jpg", "https://x/t.jpg", "https://x/back.jpg"]
    assert picture_urls({"images": [back, main]}) == expected
    another = main | {"large": "https://x/5.jpg"}
    assert picture_urls({"images": [back, main, another]}) == [*expected[:3], "https://x/5.jpg"]  # four are enough
    columns = {key: [back.get(key), main.get(key)] for key in ("variant", "thumb", "large", "hi_res")}
    assert picture_urls({"images": columns}) == expected


@pytest.mark.parametrize(
    ("name", "full"),
    [("a._SS40_.jpg", "a.jpg"), ("a._AC_US40_.png", "a.png"), ("a._SX38_SY50_CR,0,0,38,50_.jpg", "a.jpg"),
     *((name, name) for name in ("a._SX300_.jpg", "a._AC_SL1500_.jpg", "a._note_.jpg", "a.jpg"))],
)  # fmt: skip
def test_the_full_picture_is_asked_for_before_a_thumbnail(name, full):
    addresses = list(dict.fromkeys([f"https://x/{full}", f"https://x/{name}"]))
    assert picture_urls({"image": [f"https://x/{name}"]}) == addresses
    assert picture_urls(known({"image": [f"https://x/{name}"]})) == addresses  # what prepare wrote gives the same


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"imUrl": "file:///etc/passwd"},
        {"imUrl": ["ftp://x/a.jpg", 7]},
        {"images": {"large": "no list"}},
        {"images": [None, {"large": 3}]},
        {"imUrl": "http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-sm._CB192198896_.gif"},
    ],
)
def test_anything_but_a_web_address_of_a_picture_is_none(record):
    assert picture_urls(record) == []


# ------------------------------------------------------------------------------------------------------------ texts

ALL = ("title", "price", "brand", "categories")
PATHS = [["Outdoors, Fun & More", "Camping", "Tents"], ("Outdoors, Fun & More", "Hiking"), ["Gifts", ("Tents",)]]
DETAILS = {"Brand": "Acme", "Sizes": ["S", "M"], "Weight": None, "Box": {"Depth": 3}}


@pytest.mark.parametrize(
    ("record", "attributes", "text"),
    [
        ({"categories": ["Out"], "brand": "Birch", "price": 19.99, "title": "Bag"}, ALL,
         "Title: Bag Price: 19.99 Brand: Birch Categories: Out"),
        ({"title": "Bag", "brand": "Birch"}, ("brand", "title"), "Brand: Birch Title: Bag"),
        ({"categories": PATHS}, ALL, "Categories: Outdoors, Fun & More, Camping, Tents, Hiking, Gifts"),
        ({"details": DETAILS}, ("details",), "Details: Brand: Acme, Sizes: S, M, Box: Depth: 3"),
        ({"title": "  Warm\n\tSleeping \u00a0 Bag\r\n"}, ALL, "Title: Warm Sleeping Bag"),
        ({"title": "red \ud83d lamp"}, ALL, "Title: red ? lamp"),
        *(({"price": price}, ALL, f"Price: {price}") for price in (20, 0, "$5")),
        *(({"title": "Tent", "price": price}, ALL, "Title: Tent") for price in ("see cart", "9" * 41)),
        *(({"title": "Tent", "brand": nothing}, ALL, "Title: Tent")
          for nothing in (None, "   ", math.nan, [], ["", [None, math.nan]], "&nbsp;", {"Size": ""})),
        *((record, ALL, NO_TEXT) for record in ({}, {"asin": "B"}, {"title": None, "categories": [[]]})),
    ],
)  # fmt: skip
def test_an_items_text_has_its_known_attributes_in_the_order_asked_for(record, attributes, text):
    assert item_text(record, attributes) == text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Salt &amp; Pepper &quot;Duo&quot; &#39;14", 'Salt & Pepper "Duo" \'14'),
        ("Loel&amp;reg; &amp;amp; Co.", "Loel® & Co."),
        ("<b>Soft</b><br /> dress", "Soft dress"),
        ("&lt;b&gt;Soft&lt;/b&gt; dress", "Soft dress"),
        ('<span class="a-list-item">Hand wash only', "Hand wash only"),
        ("Tent <!-- page 2 --> for two<script>var a = 1 < 2;</script>", "Tent for two"),
        ("Tent<style>.a{b:c}</style>", "Tent"),
        pytest.param("<script " * 60_000, ("<script " * 60_000).strip(), id="in linear time"),
        ("by\n    \n    Microsoft", "Microsoft"),
        ("by Terry", "by Terry"),
        ("I <3 tents", "I <3 tents"),
        ("sizes <5 and >2, a<b", "sizes <5 and >2, a<b"),
        ("Nano {2: red}", "Nano {2: red}"),
        ("Nancy Null", "Nancy Null"),
    ],
)
def test_entities_and_markup_leave_readable_text(raw, clean):
    assert item_text({"title": raw, "categories": [[raw, "Toys"]]}, ALL) == f"Title: {clean} Categories: {clean}, Toys"


@pytest.mark.parametrize(
    "junk",
    [
        '<span class="a-size-medium a-color-secondary"',
        "</span></span></span>",
        "var aPageStart = (new Date()).getTime();",
        ".a-box-inner{background-color:#fff}#alm_price .a-icon{width:1px}",
        "None",
        "nan",
        "NULL",
        "-inf",
        float("inf"),
    ],
)
def test_markup_code_and_words_for_nothing_are_missing(junk):
    record = {"title": junk, "price": junk, "brand": [junk], "categories": [["Toys", junk]]}
    assert item_text(record, ALL) == "Categories: Toys"
    assert [is_junk(record, attribute) for attribute in ALL] == [True, True, True, False]
    assert not is_junk({"title": " ", "brand": [None, []]}, "title")
