"""An item's text: cleaned of markup and code, as the text encoder reads it."""

import math

import pytest

from datasets.text import NO_TEXT, is_junk, item_text

ALL = ("title", "price", "brand", "categories")
RECORD = {
    "asin": "B000000001",
    "title": "Warm Sleeping Bag",
    "price": 19.99,
    "brand": "Birch",
    "categories": [["Sports & Outdoors", "Camping"]],
}


def test_the_papers_template_is_title_price_brand_categories():
    expected = "Title: Warm Sleeping Bag Price: 19.99 Brand: Birch Categories: Sports & Outdoors, Camping"
    assert item_text(RECORD, ALL) == expected


def test_attributes_stand_in_the_order_that_is_asked_for_whatever_the_records_order():
    assert item_text(RECORD, ("brand", "title")) == "Brand: Birch Title: Warm Sleeping Bag"
    assert item_text(dict(reversed(RECORD.items())), ALL) == item_text(RECORD, ALL)


@pytest.mark.parametrize(
    "nothing",
    [None, "", "   ", math.nan, [], ["", [None, math.nan]], "&nbsp;", {"Size": ""}],
)
def test_an_attribute_without_value_is_left_out_with_its_name(nothing):
    assert item_text({**RECORD, "brand": nothing}, ("title", "brand")) == "Title: Warm Sleeping Bag"


@pytest.mark.parametrize("record", [{}, {"asin": "B1"}, {"title": None, "price": math.nan, "categories": [[]]}])
def test_an_item_of_which_nothing_is_known_has_a_text_of_its_own(record):
    assert item_text(record, ALL) == NO_TEXT
    assert NO_TEXT.strip()


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


@pytest.mark.parametrize("price", ["see cart", "9" * 41])
def test_a_price_needs_a_digit_and_is_short(price):
    assert item_text({"title": "Tent", "price": price}, ALL) == "Title: Tent"


def test_lists_and_dicts_become_readable_text():
    details = {"Brand": "Acme", "Sizes": ["S", "M"], "Weight": None, "Box": {"Depth": 3}}
    assert item_text({"details": details}, ("details",)) == "Details: Brand: Acme, Sizes: S, M, Box: Depth: 3"


def test_line_breaks_and_runs_of_blanks_become_one_blank():
    assert item_text({"title": "  Warm\n\tSleeping \u00a0 Bag\r\n"}, ALL) == "Title: Warm Sleeping Bag"


def test_paths_that_share_their_head_name_each_category_once_in_order():
    paths = [["Outdoors", "Camping", "Tents"], ["Outdoors", "Hiking"], ["Gifts", "Tents"]]
    assert item_text({"categories": paths}, ALL) == "Categories: Outdoors, Camping, Tents, Hiking, Gifts"
    assert item_text({"categories": ("Outdoors", ("Camping",))}, ALL) == "Categories: Outdoors, Camping"


def test_a_name_with_commas_stays_one_name():
    paths = [["Clothing, Shoes & Jewelry", "Shoes"], ["Clothing, Shoes & Jewelry", "Jewelry"]]
    assert item_text({"categories": paths}, ALL) == "Categories: Clothing, Shoes & Jewelry, Shoes, Jewelry"


@pytest.mark.parametrize(("price", "text"), [(19.99, "19.99"), (20, "20"), (0, "0"), ("$5", "$5")])
def test_a_price_is_written_as_it_is_even_when_it_is_nothing(price, text):
    assert item_text({"price": price}, ALL) == f"Price: {text}"


def test_half_an_emoji_becomes_a_question_mark():
    assert item_text({"title": "red \ud83d lamp"}, ("title",)) == "Title: red ? lamp"
