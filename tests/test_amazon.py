"""Raw files of three releases, recognised by what is in them, and what of a damaged one is counted or refused."""

import gzip
import json
import math

import pytest

from common.errors import InputError
from datasets import records
from datasets.prepare.amazon import picture_urls, product, read_products, read_reviews
from tests.raw import review, review_2023, write_raw


def reviews_at(tmp_path, records, name="reviews.json.gz"):
    return read_reviews(write_raw(tmp_path / name, records))


def products_in(path, wanted) -> tuple[dict[str, dict], list[str]]:
    products, notes = read_products(path, frozenset(wanted))
    return {asin: json.loads(line) for asin, line in products.items()}, notes


def refusal(tmp_path, records, name="reviews.json.gz") -> str:
    with pytest.raises(InputError) as raised:
        reviews_at(tmp_path, records, name)
    return str(raised.value)


GOOD = [review(f"U{n % 40}", f"I{n % 30}", 1000 + n) for n in range(1000)]


# ---------------------------------------------------------------------------------------------------------- reviews


@pytest.mark.parametrize("name", ["reviews.json.gz", "reviews.json", "no suffix"])
def test_reviews_of_2014_and_2018_are_read_gzipped_or_not(tmp_path, name):
    reviews = reviews_at(tmp_path, [review("U2", "B", 20, 3), review("U1", "A", 10), review("U2", "A", 30)], name)
    assert (reviews.users, reviews.items) == (["U2", "U1"], ["B", "A"])
    assert (reviews.user.tolist(), reviews.item.tolist()) == ([0, 1, 0], [0, 1, 1])
    assert (reviews.time.tolist(), reviews.rating.tolist()) == ([20, 10, 30], [3, 5, 5])
    assert reviews.notes == []


def test_a_review_of_2023_is_of_the_parent_product(tmp_path):
    reviews = reviews_at(tmp_path, [review_2023("U", "A", 10)])
    assert (reviews.users, reviews.items, reviews.time.tolist()) == (["U"], ["A"], [10_000])


def test_a_gz_name_on_a_plain_file_does_not_mislead(tmp_path):
    path = tmp_path / "reviews.json.gz"
    path.write_bytes(gzip.decompress(write_raw(path, GOOD).read_bytes()))
    assert len(read_reviews(path).user) == 1000


@pytest.mark.parametrize(
    "line",
    [
        "not a record",
        '["a", "list"]',
        '{"reviewerID": "U"',
        '{"reviewerID": "U", "asin": "A"}',
        '{"reviewerID": "", "asin": "A", "unixReviewTime": 1}',
        '{"reviewerID": "U", "asin": 7, "unixReviewTime": 1}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": -1}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": null}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": true}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": 1e3}',
        '{"reviewerID": "U", "asin": "A", "unixReviewTime": 9223372036854775808}',
        "[" * 100_000,
    ],
)
def test_a_line_without_user_item_or_time_is_counted_and_named(tmp_path, line):
    reviews = reviews_at(tmp_path, [*GOOD[:500], line, *GOOD[500:]])
    assert len(reviews.user) == 1000
    assert "1 of 1,001 lines are not reviews with a user, an item and a time (lines 501)" in reviews.notes[0]


def test_more_than_one_bad_line_in_a_hundred_is_refused_with_its_file(tmp_path):
    message = refusal(tmp_path, [*GOOD, *["<html>"] * 11])
    assert str(tmp_path / "reviews.json.gz") in message
    assert "more than 1% is refused" in message


def test_a_file_of_something_else_is_refused_with_the_keys_that_it_has(tmp_path):
    message = refusal(tmp_path, [{"asin": "A", "title": "Tent"}] * 3)
    assert "holds no reviews: its records have 'asin', 'title'" in message
    assert "reviewerID, asin, unixReviewTime" in message


def test_one_bad_line_in_a_hundred_is_not_too_many(tmp_path):
    assert len(reviews_at(tmp_path, [*GOOD[:99], "?"]).user) == 99
    assert "more than 1%" in refusal(tmp_path, [*GOOD[:98], "?"])


def test_a_file_that_begins_with_a_mark_of_utf8_and_time_0_are_fine(tmp_path):
    path = tmp_path / "reviews.json"
    path.write_text('\ufeff{"reviewerID": "U", "asin": "A", "unixReviewTime": 0, "overall": NaN}\n', encoding="utf-8")
    assert read_reviews(path).time.tolist() == [0]


def test_a_line_without_end_is_read_in_pieces_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    assert "10 of 10 lines are not reviews" in refusal(tmp_path, ['{"reviewerID": "' + "U" * 9900], "reviews.json")


def test_an_absent_or_odd_rating_is_no_number(tmp_path):
    records = [GOOD[0], {**GOOD[1], "overall": "five"}, {k: v for k, v in GOOD[2].items() if k != "overall"}]
    assert [math.isnan(r) for r in reviews_at(tmp_path, records).rating.tolist()] == [False, True, True]


def test_a_line_that_is_not_utf8_is_read_as_windows_1252_and_counted(tmp_path):
    path = tmp_path / "reviews.json"
    lines = [f'{{"reviewerID": "U{n}", "asin": "A", "unixReviewTime": 1}}' for n in range(200)]
    path.write_bytes("\n".join([*lines, '{"reviewerID": "Zoë", "asin": "A", "unixReviewTime": 2}']).encode("cp1252"))
    reviews = read_reviews(path)
    assert reviews.users[-1] == "Zoë"
    assert reviews.notes == ["reviews.json: 1 lines are not UTF-8: read as Windows-1252"]


@pytest.mark.parametrize(
    "head, kind", [("a".encode("utf-16"), "UTF-16"), (b"PK\3\4", "a zip archive"), (b"BZh9", "bzip2")]
)
def test_other_encodings_and_archives_are_named(tmp_path, head, kind):
    (tmp_path / "reviews.json.gz").write_bytes(head + b"rest")
    with pytest.raises(InputError, match=f"is {kind}, not lines of UTF-8"):
        read_reviews(tmp_path / "reviews.json.gz")


def test_a_gz_that_was_cut_short_is_refused_with_the_last_good_line(tmp_path):
    path = write_raw(tmp_path / "reviews.json.gz", GOOD)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"reviews.json.gz cannot be read beyond line \d+ .*give whole files"):
        read_reviews(path)


def test_a_gz_with_a_damaged_byte_is_refused(tmp_path):
    path = write_raw(tmp_path / "reviews.json.gz", GOOD)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"cannot be read beyond line|more than 1% is refused"):
        read_reviews(path)


def test_a_file_that_is_empty_or_missing_is_named(tmp_path):
    assert "reviews.json is empty" in refusal(tmp_path, [], "reviews.json")
    with pytest.raises(InputError, match=r"nowhere.json does not exist"):
        read_reviews(tmp_path / "nowhere.json")


# --------------------------------------------------------------------------------------------------------- metadata


def test_metadata_of_2014_are_literals_of_which_only_the_wanted_are_kept(tmp_path):
    tent = {"asin": "A", "title": "Tent", "price": 9.5, "brand": "Alder", "categories": [["Out", "Tents"]],
            "imUrl": "http://x/a.jpg", "related": {"also_bought": ["B"]}}  # fmt: skip
    path = write_raw(tmp_path / "meta.json.gz", [tent, {"asin": "B", "title": "Lamp"}], literals=True)
    products, notes = products_in(path, {"A", "C"})
    kept = {key: tent[key] for key in ("asin", "title", "price", "brand", "categories")} | {
        "images": ["http://x/a.jpg"]
    }
    assert (products, notes) == ({"A": kept}, [])


def test_the_words_of_2018_and_2023_become_those_of_2014():
    of_2018 = product("A", {"title": "Tent", "category": ["Out", "Tents"], "price": "$9.50", "brand": "",
                            "imageURL": ["https://x/small.jpg"], "imageURLHighRes": ["https://x/big.jpg"]})  # fmt: skip
    assert of_2018 == {"asin": "A", "title": "Tent", "categories": ["Out", "Tents"], "price": "$9.50",
                       "images": ["https://x/big.jpg", "https://x/small.jpg"]}  # fmt: skip
    of_2023 = product("A", {"title": "Tent", "store": "Alder", "categories": ["Out"], "price": None, "description": []})
    assert of_2023 == {"asin": "A", "title": "Tent", "brand": "Alder", "categories": ["Out"]}


def test_a_product_of_2023_is_found_by_its_parent_id(tmp_path):
    path = write_raw(tmp_path / "meta.jsonl", [{"parent_asin": "A", "title": "Tent", "details": {"asin": "Z"}}])
    assert products_in(path, {"A"})[0]["A"]["title"] == "Tent"
    assert products_in(path, {"Z"})[0] == {}


def test_page_code_is_neither_title_nor_price():
    assert product("A", {"title": "var aPageStart = (new Date()).getTime();", "price": ".a-box{width:1px} " * 9}) == {
        "asin": "A"
    }


def test_a_text_that_quotes_an_id_does_not_hide_the_product(tmp_path):
    records = [{"title": "\"asin\": 'OTHER'", "asin": "A"}, {"description": "'asin': 'A'", "asin": "OTHER"}]
    path = write_raw(tmp_path / "meta.json", records, literals=True)
    assert set(products_in(path, {"A"})[0]) == {"A"}


@pytest.mark.parametrize("asin", ["it's", 'a "b"', "back\\slash", "../../etc", "a b", "né", "\ud800"])
def test_a_product_with_odd_characters_in_its_id_is_found(tmp_path, asin):
    for literals in (True, False):
        path = write_raw(tmp_path / "meta.json", [{"asin": asin, "title": "Tent"}], literals)
        assert set(products_in(path, {asin})[0]) == {asin}


def test_reviews_are_no_metadata(tmp_path):
    path = write_raw(tmp_path / "reviews.json", GOOD)
    with pytest.raises(InputError, match="lines are not products with an id"):
        read_products(path, frozenset({"I1"}))


def test_code_in_metadata_is_not_executed(tmp_path):
    lines = [f"{{'asin': __import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()}}"] + [
        {"asin": f"A{n}"} for n in range(200)
    ]
    _, notes = read_products(write_raw(tmp_path / "meta.json", lines, literals=True), frozenset({"A1"}))
    assert "1 of 201 lines are not products" in notes[0]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("title", ["b'bytes'", "{1, 2}", "1e999j", "[" * 900 + "]" * 900, "0x" + "f" * 5000])
def test_a_literal_that_is_no_text_is_counted_as_no_product(tmp_path, title):
    lines = [f"{{'asin': 'A', 'title': {title}}}", *({"asin": f"A{n}"} for n in range(200))]
    products, notes = products_in(write_raw(tmp_path / "meta.json", lines, literals=True), {"A", "A1"})
    assert set(products) == {"A1"}
    assert "1 of 201 lines are not products" in notes[0]


def test_lines_cut_after_their_id_are_counted_whether_wanted_or_not(tmp_path):
    lines = [f"{{'asin': 'A{n}', 'title': 'Ten" for n in range(5)] + [{"asin": "A"}] * 100
    path = write_raw(tmp_path / "meta.json", lines, literals=True)
    with pytest.raises(InputError, match=r"5 of 105 lines are not products"):
        read_products(path, frozenset({"A"}))


def test_the_last_record_of_a_product_counts_and_a_parent_before_its_variant(tmp_path):
    records = [
        {"asin": "A", "title": "old"},
        {"parent_asin": "B", "asin": "A", "title": "of B"},
        {"asin": "A", "title": "new"},
    ]
    products, _ = products_in(write_raw(tmp_path / "meta.json", records), {"A", "B"})
    assert {asin: record["title"] for asin, record in products.items()} == {"A": "new", "B": "of B"}


def test_a_price_needs_a_digit_and_an_empty_brand_gives_way_to_the_store():
    assert product("A", {"price": "see cart", "brand": ["", None], "store": "Alder"}) == {"asin": "A", "brand": "Alder"}


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
    "record",
    [
        {},
        {"imUrl": None},
        {"imUrl": "file:///etc/passwd"},
        {"imUrl": ["ftp://x/a.jpg", 7]},
        {"images": {"large": "no list"}},
        {"images": [None, {"large": 3}]},
        {"imUrl": "http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-sm._CB192198896_.gif"},
    ],
)
def test_anything_but_a_web_address_of_a_picture_is_none(record):
    assert picture_urls(record) == []


def test_what_prepare_wrote_gives_the_same_addresses_again():
    record = {"imageURLHighRes": ["https://x/1.jpg", "https://x/2.jpg"]}
    assert picture_urls(product("A", record)) == picture_urls(record)
