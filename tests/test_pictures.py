"""Pictures: what a folder has is taken, the rest is fetched, and every item has a picture or a reason."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from benchmarks.picture_server import (
    cut_short,
    drip,
    flat_png,
    good,
    in_turn,
    picture,
    redirect,
    stalled,
    status,
)
from common import files
from common.errors import InputError
from datasets.catalog import load_catalog
from datasets.prepare import picture_fetch, pictures
from datasets.prepare.picture_fetch import NO_URL, fetch_pictures
from datasets.prepare.pictures import adopt_pictures, prepare_pictures
from datasets.prepare.web import Patience
from tests.prepared import write_item2img, write_prepared

REPOSITORY = Path(__file__).parent.parent
QUICK = Patience(connect=1, read=0.3, attempt=0.6, tries=2, backoff=0.01, longest=0.1)
JPEG, PNG = picture("JPEG"), picture("PNG")


@pytest.fixture
def photos(tmp_path) -> Path:
    return tmp_path / "photos" / "tiny"


def fetch(web, photos, pages: dict, **arguments) -> dict:
    """The manifest of items whose only URL has these pages."""
    web.pages |= {f"/{number}": page for number, page in enumerate(pages.values())}
    urls = {asin: [f"{web.url}/{number}"] for number, asin in enumerate(pages)}
    return fetch_pictures(urls, photos, **({"patience": QUICK, "workers": 4} | arguments))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))  # noqa: PTH208 (hidden files count too)


# ------------------------------------------------------------------------------------------------------------- fetching


def test_a_good_picture_is_kept_byte_by_byte_under_the_items_id_and_the_suffix_of_its_format(web, photos):
    forms = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tiff"}
    data = {f"B{form}": picture(form) for form in forms}
    manifest = fetch(web, photos, {asin: good(content) for asin, content in data.items()})
    assert manifest == {f"B{form}": {"file": f"B{form}{suffix}"} for form, suffix in forms.items()}
    assert {asin: (photos / manifest[asin]["file"]).read_bytes() for asin in data} == data
    assert len(names(photos)) == 6


@pytest.mark.parametrize(
    ("page", "kind", "why"),
    [
        (status(404), "missing", "404 Not Found"),
        (status(410), "missing", "410 Gone"),
        (status(403), "broken", "403 Forbidden"),
        (status(503), "broken", "503 Service Unavailable"),
        (cut_short(JPEG, 500), "broken", "broke before the answer was whole"),
        (good(b"<html>no</html>"), "broken", "not a picture"),
        (good(b""), "broken", "not a picture"),
        (good(flat_png(10_000, 10_000)), "broken", "10000 x 10000 pixels, more than 50,000,000"),
        (good(flat_png(20_000, 20_000)), "broken", "400000000 pixels"),
        (stalled(JPEG[:100]), "broken", "no answer within 0.3 s"),
        (drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", 0.05), "broken", "no end within 0.6 s"),
        (redirect("file:///etc/hostname"), "broken", "a redirect to file:///etc/hostname: file: is not fetched"),
        (good(bytes(2001)), "broken", "2,001 bytes, more than 2,000"),
    ],
    ids=["404", "410", "403", "503", "cut short", "html", "empty", "bomb", "larger bomb", "stalled", "drip",
         "redirect to a file", "too many bytes"],
)  # fmt: skip
def test_a_bad_answer_is_a_reason_that_names_the_url_and_leaves_no_file(web, photos, page, kind, why):
    max_bytes = 2000 if "2,000" in why else 10**6
    with warnings.catch_warnings(record=True) as warned:
        manifest = fetch(web, photos, {"B1": page, "B2": good(PNG)}, max_bytes=max_bytes)
    assert list(manifest["B1"]) == [kind]
    assert manifest["B1"][kind].startswith(f"{web.url}/0: ")
    assert why in manifest["B1"][kind]
    assert names(photos) == ["B2.png"]
    assert warned == []


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_that_was_cut_short_before_it_was_served_is_broken(web, photos, form):
    data = picture(form)
    manifest = fetch(web, photos, {"B1": good(data[: len(data) * 2 // 3])})
    assert list(manifest["B1"]) == ["broken"]
    assert names(photos) == []


def test_a_format_that_is_not_for_the_web_is_not_opened(web, photos):
    manifest = fetch(web, photos, {"B1": good(picture("PPM")), "B2": good(picture("EPS"))})
    assert all("not a picture of a known format" in entry["broken"] for entry in manifest.values())


def test_a_503_that_passes_is_no_failure(web, photos):
    first = {"B1": status(503), "B2": status(503, Retry_After="0"), "B3": cut_short(JPEG, 100), "B4": stalled()}
    manifest = fetch(web, photos, {asin: in_turn(page, good(JPEG)) for asin, page in first.items()})
    assert manifest == {asin: {"file": f"{asin}.jpg"} for asin in first}


def test_the_first_url_that_gives_a_picture_is_taken(web, photos):
    web.pages |= {"/html": good(b"<html>"), "/moved": redirect("/jpeg"), "/jpeg": good(JPEG), "/png": good(PNG)}
    urls = {"B1": [f"{web.url}/{page}" for page in ("gone", "html", "moved", "png")], "B2": [f"{web.url}/gone"] * 2}
    manifest = fetch_pictures(urls, photos, patience=QUICK)
    assert manifest["B1"] == {"file": "B1.jpg"}
    assert manifest["B2"]["missing"].count("404") == 2
    assert "/png" not in web.requests


def test_an_item_without_a_url_and_one_with_a_strange_one_have_their_reason(photos):
    urls = {"B1": [], "B2": ["ftp://host/a.jpg"], "B3": ["\ud800\n"], "B4": [None]}
    manifest = fetch_pictures(urls, photos, patience=QUICK)
    assert manifest["B1"] == {"missing": NO_URL}
    assert manifest["B2"] == {"broken": "ftp://host/a.jpg: ftp: is not fetched, only http and https are"}
    assert all("scheme" in manifest[asin]["broken"] for asin in ("B3", "B4"))
    json.dumps(manifest, ensure_ascii=False).encode()


def test_ids_that_are_no_file_names_become_digests(web, photos, tmp_path):
    odd = ["../../up", "/etc/x", "b1", "B1", "a\0b", "Ünï", "", ".", "B" * 33, "C\n", "item-99"]
    manifest = fetch(web, photos, {asin: good(JPEG) for asin in odd})
    assert manifest["B1"] == {"file": "B1.jpg"}
    files = [entry["file"] for asin, entry in manifest.items() if asin != "B1"]
    assert all(re.fullmatch(r"item-[0-9a-f]{20}\.jpg", name) for name in files)
    assert len(set(files)) == len(odd) - 1
    assert names(photos) == sorted(["B1.jpg", *files])
    assert names(tmp_path) == ["photos"]


def test_an_odd_ids_picture_is_its_own_in_any_order_of_items(web, photos):
    first = fetch(web, photos, {"a/1": good(JPEG), "a/2": good(PNG)})
    assert adopt_pictures(["a/2", "a/3", "a/1"], photos)["a/2"] == first["a/2"]
    assert "missing" in adopt_pictures(["a/3"], photos)["a/3"]


def test_a_picture_that_is_there_is_not_fetched_again_and_a_failure_is_tried_again(web, photos):
    first = fetch(web, photos, {"B1": good(JPEG), "B2": status(404)})
    assert first["B1"] == {"file": "B1.jpg"}
    web.requests.clear()
    second = fetch(web, photos, {"B1": good(PNG), "B2": good(PNG)})
    assert second == {"B1": {"file": "B1.jpg"}, "B2": {"file": "B2.png"}}
    assert web.requests == ["/1"]
    assert (photos / "B1.jpg").read_bytes() == JPEG


def test_what_a_killed_run_left_is_cleared_and_other_hidden_files_are_not(web, photos):
    photos.mkdir(parents=True)
    for name in (".B1.jpg.ab_12cd9.tmp", ".item-00112233445566778899.png.abcdefgh.tmp", ".mine.tmp", ".B1.jpg"):
        (photos / name).touch()
    fetch(web, photos, {"B1": good(JPEG)})
    assert names(photos) == [".B1.jpg", ".mine.tmp", "B1.jpg"]


def test_where_nothing_can_be_reached_the_rest_is_not_tried(photos, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(picture_fetch, "UNREACHABLE", 3)
    urls = {f"B{i}": ["http://127.0.0.1:1/a"] for i in range(100)}
    manifest = fetch_pictures(urls, photos, workers=1, patience=QUICK)
    assert "Connection refused" in manifest["B0"]["broken"]
    assert manifest["B99"]["broken"].startswith("not tried")
    assert len(manifest) == 100


def test_bad_urls_alone_do_not_keep_the_good_ones_from_being_tried(web, photos, monkeypatch):
    monkeypatch.setattr(picture_fetch, "UNREACHABLE", 3)
    web.pages["/a"] = good(JPEG)
    urls = {f"B{i}": ["ftp://host/a"] for i in range(20)} | {"C": [f"{web.url}/a"]}
    assert fetch_pictures(urls, photos, workers=1, patience=QUICK)["C"] == {"file": "C.jpg"}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_ends_it_all_with_one_error(web, photos, monkeypatch, error):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    with pytest.raises(InputError, match=f"cannot write .*: {os.strerror(error)}"):
        fetch(web, photos, {f"B{i}": good(JPEG) for i in range(200)})
    assert len(web.requests) < 50


def test_a_disk_that_fills_up_in_the_middle_of_a_picture_leaves_none(web, photos):
    web.pages["/a"] = good(JPEG)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "from pathlib import Path; from common.cli import run_cli\n"
        "from datasets.prepare.picture_fetch import fetch_pictures\n"
        "run_cli(lambda: fetch_pictures({f'B{i}': [sys.argv[1]] for i in range(99)}, Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, f"{web.url}/a", str(photos)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "File too large; free space" in done.stderr
    assert [name for name in names(photos) if not name.endswith(".tmp")] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_named(web, photos):
    photos.mkdir(parents=True)
    photos.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot write .*run where you may write"):
        fetch(web, photos, {"B1": good(JPEG)})


def test_a_file_in_the_place_of_the_folder_is_named(web, photos):
    photos.parent.mkdir()
    photos.touch()
    with pytest.raises(InputError, match=f"cannot write {photos}"):
        fetch(web, photos, {"B1": good(JPEG)})


def test_an_interrupt_does_not_wait_for_what_is_queued_or_stalled(web, photos, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(picture_fetch.tqdm, "update", interrupt)
    pages = {"B0": good(JPEG)} | {f"B{i}": stalled() for i in range(1, 100)}
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch(web, photos, pages, patience=Patience())
    assert time.monotonic() - started < 10  # one stalled answer is waited for 15 s


def test_only_a_bounded_number_of_items_is_handed_to_the_threads(monkeypatch):
    taken, allowed, most = [], threading.Event(), []

    def tasks():
        for i in range(100):
            taken.append(i)
            if len(taken) == 9:  # 2 in each of 4 threads are under way
                allowed.set()
            yield str(i)

    def work(task: str) -> int:
        allowed.wait(10)
        return int(task)

    def done(task: str, result: int) -> bool:
        most.append(len(taken) - len(most))
        return True

    picture_fetch._in_threads(work, tasks(), 4, threading.Event(), done)
    assert len(most) == 100
    assert max(most) <= 9


# ------------------------------------------------------------------------------------------------ what is there already


def pickled(tmp_path: Path, value: object, protocol: int = 4) -> Path:
    path = tmp_path / "item2img_dict.pkl"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


def touch(photos: Path, *paths: str) -> None:
    for path in paths:
        (photos / path).parent.mkdir(parents=True, exist_ok=True)
        (photos / path).write_bytes(b"taken as it is")


def test_files_called_by_an_items_id_are_adopted_whatever_is_in_them(photos):
    touch(photos, "B1.jpg", "B2.PNG", "B3.jpeg", "B3.jpg", "b4-x.webp", "B5.txt", "other.jpg")
    (photos / "B6.jpg").mkdir()
    manifest = adopt_pictures(["B1", "B2", "B3", "b4-x", "B5", "B6"], photos)
    assert [entry.get("file") for entry in manifest.values()] == ["B1.jpg", "B2.PNG", "B3.jpg", "b4-x.webp", None, None]
    assert "missing" in manifest["B5"]


def test_a_folder_that_is_not_there_has_no_pictures(photos):
    assert list(adopt_pictures(["B1"], photos)["B1"]) == ["missing"]


@pytest.mark.parametrize("protocol", range(6))
def test_paths_of_another_machine_are_found_by_their_end_or_their_name(photos, tmp_path, protocol):
    touch(photos, "deep/a.jpg", "a.jpg", "c.jpg", "B5.jpg")
    paths = {
        "B1": "/data/x/photos/tiny/deep/a.jpg",
        "B2": "photos/tiny/a.jpg",
        "B3": "D:\\pictures\\c.jpg",
        "B4": "/data/gone.jpg",
        "B5": "/data/also gone.jpg",
        "Ünï": "../../c.jpg",
        "UNKNOWN": "a.jpg",
    }
    asins = ["B1", "B2", "B3", "B4", "B5", "Ünï", "B6"]
    manifest = adopt_pictures(asins, photos, pickled(tmp_path, paths, protocol))
    files = ["deep/a.jpg", "a.jpg", "c.jpg", None, "B5.jpg", "c.jpg", None]
    assert [manifest[asin].get("file") for asin in asins] == files
    assert "item2img_dict.pkl names /data/gone.jpg" in manifest["B4"]["missing"]


def test_links_that_leave_the_folder_are_not_adopted(photos, tmp_path):
    touch(tmp_path, "secret.jpg")
    photos.mkdir(parents=True)
    (photos / "B1.jpg").symlink_to(tmp_path / "secret.jpg")
    assert "missing" in adopt_pictures(["B1"], photos)["B1"]
    assert "missing" in adopt_pictures(["B1"], photos, pickled(tmp_path, {"B1": "x/../../../secret.jpg"}))["B1"]


class Call:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_calls_is_refused_by_name_and_calls_nothing(photos, tmp_path, protocol):
    mark = tmp_path / "executed"
    for value in (Call(mark), {"B1": Call(mark)}, {"B1": "a.jpg", "B2": [Call(mark)]}):
        with pytest.raises(InputError, match=r"item2img_dict\.pkl holds more than a dict of texts"):
            adopt_pictures(["B1"], photos, pickled(tmp_path, value, protocol))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (["B1"], "list"),
        ("B1", "str"),
        ({"B1": 1}, "int"),
        ({1: "B1"}, "int"),
        ({"B1": None}, "None"),
        ({"B1": {"path": "a.jpg"}}, "dict"),
        ({"B1": ("a.jpg",)}, "tuple"),
        ({"B1": b"a.jpg"}, "bytes"),
        ({"B1": Path("a.jpg")}, "pathlib PosixPath"),
    ],
    ids=repr,
)
def test_a_pickle_of_anything_but_a_dict_of_texts_is_refused_by_what_it_holds(photos, tmp_path, value, named):
    with pytest.raises(InputError) as raised:
        adopt_pictures(["B1"], photos, pickled(tmp_path, value))
    assert str(raised.value).startswith(f"{tmp_path / 'item2img_dict.pkl'} holds")
    assert named in str(raised.value).partition(";")[0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps({"B1": "a.jpg"})[:-5],
        b"}" + b"r\xff\xff\xff\x7f" + b".",  # a memo of 2 billion entries, which are 16 GB
        b"}\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a text of 2**63 bytes
        b"}}U\x01as.",  # a dict as a key
    ],
    ids=["empty", "text", "cut short", "memo", "text without end", "dict as a key"],
)
def test_a_damaged_pickle_is_refused(photos, tmp_path, data):
    with pytest.raises(InputError, match=r"item2img_dict\.pkl"):
        adopt_pictures(["B1"], photos, pickled(tmp_path, data))


def test_a_pickle_that_is_too_large_is_not_read(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PICKLE", 10)
    with pytest.raises(InputError, match="more than 10 bytes"):
        adopt_pictures(["B1"], photos, pickled(tmp_path, {"B1": "a.jpg"}))


# --------------------------------------------------------------------------------------------------------- all together


class Dataset:
    """A prepared dataset of four items without pictures, and prepare_pictures for it."""

    def __init__(self, root: Path) -> None:
        self.folder, self.photos = write_prepared(root, items=4), root / "photos" / "tiny"
        self.asins, self.said = load_catalog(root, "tiny").asins, []

    def prepare(self, urls: dict | None = None, fetch: bool = True, asins: list[str] | None = None) -> dict:
        self.said.clear()
        arguments = {"fetch": fetch, "say": self.said.append, "patience": QUICK}
        return prepare_pictures(asins or self.asins, urls or {}, self.photos, self.folder, **arguments)

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return Dataset(tmp_path)


def test_adopted_pictures_stay_the_rest_is_fetched_and_the_catalogue_reads_both(web, dataset):
    a, b, c, d = dataset.asins
    touch(dataset.photos, "x.jpg", f"{b}.png")
    pickled(dataset.folder, {a: "/far/x.jpg"})
    web.pages["/good"] = good(JPEG)
    manifest = dataset.prepare({a: [f"{web.url}/good"], c: [f"{web.url}/good"]})
    assert manifest == {
        a: {"file": "x.jpg"},
        b: {"file": f"{b}.png"},
        c: {"file": f"{c}.jpg"},
        d: {"missing": NO_URL},
    }
    assert list(manifest) == dataset.asins
    assert dataset.json("pictures.json") == manifest
    assert dataset.json("item2img.json") == {a: "x.jpg", b: f"{b}.png", c: f"{c}.jpg"}
    assert len(web.requests) == 1
    assert dataset.said == [
        "pictures: 3 of 4 items (2 were there, 1 fetched), 1 missing, 0 broken; "
        f"{dataset.folder / 'pictures.json'} says why"
    ]
    found = load_catalog(dataset.folder.parent, "tiny").pictures
    assert [path and path.name for path in found] == ["x.jpg", f"{b}.png", f"{c}.jpg", None]


def test_without_fetching_nothing_is_asked_for_and_earlier_reasons_are_kept(web, dataset):
    a, b, c, _ = dataset.asins
    urls = {a: [f"{web.url}/gone"], b: [f"{web.url}/gone"]}
    first = dataset.prepare(urls, fetch=False)
    assert (first[a], web.requests) == ({"missing": "not fetched"}, [])
    assert NO_URL in first[c]["missing"]
    second = dataset.prepare(urls)
    assert "404" in second[a]["missing"]
    assert dataset.prepare(urls, fetch=False) == second


def test_a_second_run_changes_no_byte_and_asks_for_failures_alone(web, dataset):
    a, b, c, _ = dataset.asins
    web.pages["/good"] = good(JPEG)
    urls = {a: [f"{web.url}/good"], b: [f"{web.url}/gone"], c: [f"{web.url}/good"]}
    dataset.prepare(urls)
    before = {path: path.read_bytes() for path in dataset.folder.parent.rglob("*") if path.is_file()}
    web.requests.clear()
    dataset.prepare(urls)
    assert before == {path: path.read_bytes() for path in dataset.folder.parent.rglob("*") if path.is_file()}
    assert web.requests == ["/gone"]


def test_what_a_user_listed_is_never_lost(web, dataset):
    a, b, c, d = dataset.asins
    touch(dataset.photos, "mine.jpg", f"{a}.jpg")
    write_item2img(dataset.folder, {a: "mine.jpg", "2": "deep/not there yet.jpg"})
    web.pages["/good"] = good(JPEG)
    urls = {asin: [f"{web.url}/good"] for asin in dataset.asins}
    for _ in range(2):
        manifest = dataset.prepare(urls)
        assert manifest[a] == {"file": "mine.jpg"}
        assert "not there" in manifest[b]["broken"]
        listed = {a: "mine.jpg", b: "deep/not there yet.jpg", c: f"{c}.jpg", d: f"{d}.jpg"}
        assert dataset.json("item2img.json") == listed


def test_a_fetched_picture_that_was_deleted_is_fetched_again(web, dataset):
    a, *_ = dataset.asins
    web.pages["/good"] = in_turn(good(JPEG), good(PNG))
    dataset.prepare({a: [f"{web.url}/good"]})
    (dataset.photos / f"{a}.jpg").unlink()
    assert dataset.prepare({a: [f"{web.url}/good"]})[a] == {"file": f"{a}.png"}


def test_a_catalogue_that_shrank_or_changed_its_order_mixes_no_pictures_up(web, dataset):
    colours = {"odd red": (255, 0, 0), "odd green": (0, 255, 0), "odd blue": (0, 0, 255)}
    expected = {asin: picture("PNG", colour=colour) for asin, colour in colours.items()}
    web.pages |= {f"/{asin[4:]}": good(data) for asin, data in expected.items()}
    urls = {asin: [f"{web.url}/{asin[4:]}"] for asin in expected}
    assert "file" in dataset.prepare(urls, asins=["odd red"])["odd red"]
    for asins in (["odd blue", "odd red"], ["odd blue"], ["odd green", "odd blue"], list(expected)):
        manifest = dataset.prepare(urls, asins=asins)
        for asin in asins:
            assert (dataset.photos / manifest[asin]["file"]).read_bytes() == expected[asin]


@pytest.mark.parametrize("text", ["[]", '{"B1": {}}', '{"B1": {"file": 1}}', '{"B1": {"lost": "x"}}', "{"])
def test_a_damaged_manifest_is_named(dataset, text):
    (dataset.folder / "pictures.json").write_text(text)
    with pytest.raises(InputError, match=r"pictures\.json .*delete it"):
        dataset.prepare()


@pytest.mark.parametrize("listed", [[], {"1": 2}, {"UNKNOWN": "a.jpg"}, {"1": "../../a.jpg"}, {"1": "a\0"}], ids=str)
def test_a_list_of_the_users_that_the_catalogue_would_refuse_is_refused(dataset, listed):
    write_item2img(dataset.folder, listed)
    with pytest.raises(InputError, match=r"item2img\.json"):
        dataset.prepare()
    assert dataset.json("item2img.json") == listed


def test_a_run_that_is_killed_in_the_middle_and_repeated_leaves_what_an_undisturbed_one_does(web, tmp_path):
    pages = {f"/{i}": good(picture("JPEG", colour=(i * 10, 0, 0))) for i in range(20)}
    pages["/3"], pages["/5"] = status(404), good(b"<html>")
    held = threading.Event()

    def when_allowed(page):
        return lambda handler: (held.wait(), page(handler))

    slow = {path: when_allowed(page) for path, page in list(pages.items())[10:]}
    code = (
        "import json, sys; from pathlib import Path; from datasets.prepare.pictures import prepare_pictures\n"
        "root, urls = Path(sys.argv[1]), json.loads(sys.argv[2])\n"
        "prepare_pictures(list(urls), urls, root / 'photos', root / 'data', fetch=True, workers=4)"
    )
    urls = {("odd/" if i == 2 else "B") + str(i): [f"{web.url}/{i}"] for i in range(20)}
    command = [sys.executable, "-c", code]

    def content(root: Path) -> dict:
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    web.pages = pages | slow
    killed = tmp_path / "killed"
    with subprocess.Popen([*command, killed, json.dumps(urls)], cwd=REPOSITORY) as process:
        while len(list(killed.glob("photos/[Bi]*"))) < 8 or len(web.requests) < 14:  # four are held
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
    held.set()
    assert not (killed / "data").exists()
    (killed / "photos/.B7.jpg.abcdefgh.tmp").write_bytes(b"half")
    before = len(web.requests)
    for root in (killed, tmp_path / "undisturbed"):
        subprocess.run([*command, root, json.dumps(urls)], cwd=REPOSITORY, check=True, capture_output=True)
    assert content(killed) == content(tmp_path / "undisturbed")
    assert len(web.requests) - before == 12 + 20  # the eight that were there are not asked for again
