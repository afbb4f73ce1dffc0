"""Readers: files of every format give the same events and items, and a damaged one is named with its mend."""

import functools
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
from tests.prepared import review, write_raw

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
MOVIELENS = (lines("\t", NUMBERS), lines("::", NUMBERS), RATINGS, parquet(pd.DataFrame(NUMBERS, columns=NAMES)))
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
    whole, unrated = GOOD[0], {k: v for k, v in GOOD[0].items() if k != "overall"}
    raw = ["\ufeff" + json.dumps(whole | {"unixReviewTime": 0}), "", whole | {"overall": "five"}, f"{whole}\r", unrated]
    events = read_events(write_raw(tmp_path / "r", [*raw, json.dumps(whole | {"overall": math.nan})]))
    assert events.time.tolist() == [0, 1000, 1000, 1000, 1000]
    assert [math.isnan(rating) for rating in events.rating.tolist()] == [False, True, False, True, True]
    of_2023 = {"user_id": "U", "parent_asin": "A", "asin": "A-RED", "rating": 5.0, "timestamp": 10_000}
    assert rows_of(read_events(write_raw(tmp_path / "r", [of_2023]))) == [("U", "A", 5, 10_000)]


def test_a_folder_of_parquet_parts_is_read_part_by_part(tmp_path):
    assert "is a folder without parquet files" in refusal(tmp_path)
    for start in (0, 4, 8):
        folder = tmp_path / f"day={start}"
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


@pytest.mark.parametrize("written", [str, float, lambda time: time * 1000, iso])
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
    assert events.users[-1] == "Zoë"
    assert events.notes == ["reviews.json: 1 lines are not UTF-8: read as Windows-1252"]
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
    assert found_in(path, {"A"})[0]["A"]["title"] == "Tent"
    assert found_in(path, {"Z"})[0] == {}
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
