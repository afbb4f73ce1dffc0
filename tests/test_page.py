"""python -m serving.page: the page in a real browser recommends what Python does, and says what is wrong."""

import functools
import http.server
import json
import os
import shlex
import shutil
import threading

import numpy as np
import pytest

import train
from common.errors import InputError
from serving import Recommender, export
from serving.page import __main__ as page
from tests.made_up import write_plane
from tests.prepared import write_metadata, write_prepared

SIZES, ITEMS, MAX_LEN = (4, 8, 16), 90, 6
TRAIN = (
    "--dataset_code tiny --num_epochs 1 --lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --device cpu "
    f"--lru_max_len {MAX_LEN} --language_encoder lexical --img_encoder pixel --mrl_hidden_sizes 4,8,16"
)
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
DONE = "#best > li, #message:not([hidden]):not(:has(code))"  # an answer, or a message other than the first


def missing(what):
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {what}")  # never skipped in CI


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a trained run of 90 items with pictures."""
    folder = tmp_path_factory.mktemp("home")
    records = [
        {"asin": f"B{i:09d}", "title": f"Lamp {i} word{i * 7 % 40} word{i * 11 % 37}"} for i in range(1, ITEMS + 1)
    ]
    write_metadata(write_prepared(folder / "data", "tiny", users=60, items=ITEMS, pictures=True), records)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_plane(train.main(shlex.split(TRAIN)), SIZES, ITEMS)
        yield folder


@pytest.fixture(scope="module")
def built(home):
    if not (page.RUNTIME / page.RUNTIME_FILES[0]).is_file():
        missing("npm ci --prefix serving/page")
    return home / page.main(["--out", "page"])


@pytest.fixture(scope="module")
def recommenders(home):
    """Size -> the Recommender of that size, stored as in the page."""
    folders = export.main(["--size", "all", "--out", "exports"])
    return {size: Recommender.from_pretrained(folder) for size, folder in zip(SIZES, folders, strict=True)}


@pytest.fixture(scope="module")
def address(built):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=built)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromium"):
        missing("the browser chromium")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
        yield browser.new_context()
        browser.close()


@pytest.fixture
def tab(browser):
    """A new tab; at the end of the test it must have had no errors and loaded nothing from elsewhere."""
    tab, wrong = browser.new_page(), []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: wrong.append(request.url))
    yield tab
    tab.close()
    assert [each for each in wrong if not each.startswith(("data:", "http://127.0.0.1:"))] == []


def load(tab, address, fragment=""):
    tab.goto(address + fragment)
    tab.wait_for_selector(DONE)


def shown(tab):
    return tab.eval_on_selector_all("#best .row .item", "items => items.map(item => Number(item.dataset.item))")


def message(tab):
    return "" if tab.is_hidden("#message") else tab.inner_text("#message")


def test_the_browser_recommends_the_ten_items_that_python_does_at_every_size(tab, address, recommenders):
    load(tab, address)
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, size=n % (2 * MAX_LEN)).tolist() for n in range(200)]
    ask = "async ([size, histories]) => { const page = await import('./page.js'); const found = [];"
    ask += " for (const items of histories) found.push((await page.recommend(size, items)).best); return found; }"
    for size, recommender in recommenders.items():
        found = tab.evaluate(ask, [size, histories])
        assert found == [answer.numbers for answer in recommender.recommend(histories)]
        similar = tab.evaluate("async (size) => (await import('./page.js')).similar(size, 5)", size)
        assert similar == recommender.similar_items([5], top_k=page.SIMILAR)[0].numbers


@pytest.mark.parametrize("width", [390, 1440])
def test_a_history_and_a_size_are_chosen_by_keyboard_and_the_page_fits_its_width(
    tab, address, built, recommenders, width
):
    tab.set_viewport_size({"width": width, "height": 844})
    load(tab, address, "#size=4&history=B000000003,B000000007")
    full = set(recommenders[16].recommend([[3, 7]])[0].numbers)
    for size in SIZES:
        expected = recommenders[size].recommend([[3, 7]])[0].numbers
        tab.wait_for_function(
            "want => want === [...document.querySelectorAll('#best .row .item')].map(i => i.dataset.item).join()",
            arg=",".join(map(str, expected)),
        )
        assert tab.inner_text("#size") == str(size) and tab.inner_text("#same") == f"{len(full & set(expected))} of 10"
        assert tab.inner_text("#bytes") == f"{(built / f'models/{size}.onnx').stat().st_size / 1e3:.0f} kB"
        assert tab.inner_text("#milliseconds").endswith(" ms") and not message(tab)
        tab.focus("#slider")
        tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.eval_on_selector("#catalogue img", "image => image.complete && image.naturalWidth > 0")

    tab.focus("#best > li:first-child .item")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".similar .item")
    assert len(tab.query_selector_all(".similar .item")) == page.SIMILAR
    tab.fill("#search", "b000000011")
    tab.focus("#catalogue .item")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => location.hash.endsWith('B000000011')")
    assert tab.eval_on_selector_all("#history .item", "items => items.map(i => i.dataset.item)") == ["3", "7", "11"]


@pytest.mark.parametrize("width", [390, 1440])
def test_a_table_width_is_chosen_by_keyboard_among_those_of_the_encoder_and_charts_show_all(tab, address, width):
    tab.set_viewport_size({"width": width, "height": 844})
    load(tab, address, "#size=16&history=B000000003")
    tab.focus("#plane > summary")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#by-time circle.cell")
    assert tab.eval_on_selector_all("#plane polyline", "lines => lines.length") == 2 * len(SIZES)
    assert tab.eval_on_selector_all("#cells tr", "rows => rows.length") == 6 == tab.locator("#by-bytes circle").count()
    for pressed, of_cell in (("", ["16 of 16", "0.0256"]), ("ArrowLeft", ["8 of 16", "0.0128 50% of the whole's"])):
        tab.focus("#width")
        tab.keyboard.press(pressed) if pressed else None
        assert [tab.inner_text("#width-text"), tab.inner_text("#cell-quality")] == of_cell
    assert tab.inner_text("#cell-command") == "python -m serving.export --size 16 --table_width 8"
    assert tab.text_content("#by-bytes text.own") == "16" and tab.text_content("#by-time text.own") == "8"
    tab.focus("#slider")
    tab.keyboard.press("ArrowLeft")  # an encoder of 8 has no wider table
    assert tab.inner_text("#width-text") == "8 of 8" and tab.inner_text("#cell-time") == "0.08 ms"
    assert tab.text_content("#cells tr.chosen").startswith("88")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_a_page_of_a_run_that_was_not_cut_has_no_choice_of_a_table_width(tab, address, built):
    catalogue = json.loads((built / "catalogue.json").read_text(encoding="utf-8")) | {"plane": []}
    tab.route("**/catalogue.json", lambda route: route.fulfill(json=catalogue))
    load(tab, address)
    assert tab.is_hidden("#plane") and len(shown(tab)) == 10


@pytest.mark.parametrize("fault", ["is missing (status 404)", "is damaged: its checksum differs"])
def test_a_missing_or_damaged_model_is_named_and_other_sizes_still_answer(tab, address, built, fault):
    content = bytearray((built / "models/8.onnx").read_bytes())
    content[-1000] ^= 1
    status = 404 if "404" in fault else 200
    tab.route("**/models/8.onnx", lambda route: route.fulfill(status=status, body=bytes(content)))
    load(tab, address, "#size=8&history=B000000003")
    assert f"models/8.onnx {fault}" in message(tab) and not shown(tab)
    tab.focus("#slider")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector("#best > li")
    assert message(tab) == "" and len(shown(tab)) == 10


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("catalogue.json", None, "is missing (status 404). Build the page again with python -m serving.page."),
        ("catalogue.json", "[", "is damaged: it is not JSON. Copy or build the page again."),
        ("ort/ort.wasm.min.mjs", None, "is damaged: it is missing or no module. Copy or build the page again."),
    ],
)
def test_a_missing_or_damaged_file_of_the_page_is_named(tab, address, file, content, problem):
    tab.route(f"**/{file}", lambda route: route.fulfill(status=200 if content else 404, body=content or ""))
    load(tab, address)
    assert message(tab) == f"{file} {problem}" and tab.is_hidden("#app")


def test_damaged_similar_items_are_named(tab, address):
    load(tab, address, "#size=8&history=B000000003")
    tab.route("**/models/8.similar", lambda route: route.fulfill(body="1234567"))
    tab.click("#best > li:first-child .item")
    tab.wait_for_selector("#message:not([hidden])")
    assert message(tab).startswith(
        f"models/8.similar is damaged: it has 7 bytes instead of {4 * ITEMS * page.SIMILAR}. "
    )


def test_unknown_ids_are_named_and_without_webassembly_the_page_says_so(tab, address, recommenders):
    load(tab, address, "#size=16&history=OLD,OLDER")
    assert message(tab).startswith("Unknown and skipped: OLD, OLDER. No item of the history is known")
    assert shown(tab) == recommenders[16].recommend([[]])[0].numbers
    tab.add_init_script("delete window.WebAssembly")
    tab.goto(address + "?again")
    tab.wait_for_selector(DONE)
    assert "no WebAssembly" in message(tab) and tab.is_hidden("#app")


def test_the_catalogue_holds_titles_pictures_and_the_metrics_of_each_size(built, home):
    found = json.loads((built / "catalogue.json").read_text(encoding="utf-8"))
    assert found["titles"][2].startswith("Lamp 3 ") and all((built / path).is_file() for path in found["pictures"])
    [metrics] = home.glob("experiments/runs/tiny/*/test_mrl_metrics.json")
    of_size = json.loads(metrics.read_text(encoding="utf-8"))
    assert [model["ndcg"] for model in found["models"]] == [of_size[str(size)]["NDCG@10"] for size in SIZES]
    with pytest.raises(InputError, match="pass --overwrite to replace it"):
        page.main(["--out", str(built)])


def test_other_folders_are_not_replaced_and_a_missing_npm_package_is_named(home, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"is not a page of serving\.page"):
        page.main(["--out", str(tmp_path), "--overwrite"])
    monkeypatch.setattr(page, "RUNTIME", tmp_path)
    with pytest.raises(InputError, match=r"install onnxruntime-web: npm ci --prefix .*serving/page"):
        page.main(["--out", str(tmp_path / "page")])
