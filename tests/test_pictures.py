"""Pictures: those in the folder stay, the others are fetched, and every item has a picture or a reason."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from benchmarks.picture_server import flat_png, good, picture, redirect, stalled, status
from common.errors import InputError
from datasets.catalog import load_catalog
from datasets.prepare import pictures
from datasets.prepare.http import Policy
from datasets.prepare.pictures import NO_URL, FetchOptions, fetch_pictures, find_pictures, prepare_pictures
from tests.prepared import write_item2img, write_prepared

REPOSITORY = Path(__file__).parent.parent
QUICK = FetchOptions(
    workers=4,
    per_second=1000,
    allow_private=True,
    policy=Policy(connect=1, read=0.3, total=0.6, tries=2, backoff=0.01, max_retry_after=0.1),
)
JPEG, PNG = picture("JPEG"), picture("PNG")


@pytest.fixture
def photos(tmp_path) -> Path:
    return tmp_path / "photos" / "tiny"


def fetch(web, photos, pages: dict) -> dict:
    """Return the manifest of items whose only URL serves these pages."""
    web.pages |= {f"/{number}": page for number, page in enumerate(pages.values())}
    return fetch_pictures({asin: [f"{web.url}/{n}"] for n, asin in enumerate(pages)}, photos, QUICK)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))  # noqa: PTH208 (hidden files count too)


class Dataset:
    """A prepared dataset of four items without pictures, and prepare_pictures for it."""

    def __init__(self, root: Path) -> None:
        self.folder, self.photos = write_prepared(root, items=4), root / "photos" / "tiny"
        self.asins, self.log = load_catalog(root, "tiny").asins, []

    def prepare(self, urls: dict | None = None, fetch: bool = True) -> dict:
        options = QUICK if fetch else None
        return prepare_pictures(self.asins, urls or {}, self.photos, self.folder, options, self.log.append)

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return Dataset(tmp_path)


# ---------------------------------------------------------------------------------------------------- fetching


def test_a_picture_keeps_its_bytes_under_its_id_and_the_suffix_of_its_format(web, photos):
    suffixes = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "TIFF": ".tiff"}
    data = {f"B{form}": picture(form) for form in suffixes}
    manifest = fetch(web, photos, {asin: good(content) for asin, content in data.items()})
    assert manifest == {f"B{form}": {"file": f"B{form}{suffix}"} for form, suffix in suffixes.items()}
    assert {asin: (photos / manifest[asin]["file"]).read_bytes() for asin in data} == data
    assert len(names(photos)) == 6


@pytest.mark.parametrize(
    ("page", "kind", "reason"),
    [
        (status(404), "missing", "404 Not Found"),
        (status(503), "broken", "503 Service Unavailable"),
        (good(b"<html>no</html>"), "broken", "not a picture of a known format"),
        (good(picture("PPM")), "broken", "not a picture of a known format"),
        (good(flat_png(10_000, 10_000)), "broken", "10000 x 10000 pixels, more than 50,000,000"),
        (good(JPEG[: len(JPEG) * 2 // 3]), "broken", "the picture cannot be read"),
        (good(PNG[: len(PNG) * 2 // 3]), "broken", "the picture cannot be read"),
        (stalled(JPEG[:100]), "broken", "no answer within 0.3 s"),
        (good(bytes(20_001)), "broken", "20,001 bytes, more than 20,000"),
    ],
    ids=["404", "503", "html", "PPM", "bomb", "half a JPEG", "half a PNG", "stalled", "too many bytes"],
)
def test_a_bad_answer_gives_a_reason_that_names_the_url_and_leaves_no_file(
    web, photos, page, kind, reason, monkeypatch
):
    monkeypatch.setattr(pictures, "MAX_BYTES", 20_000 if "bytes" in reason else 10**6)
    with warnings.catch_warnings(record=True) as warned:
        manifest = fetch(web, photos, {"B1": page, "B2": good(PNG)})
    assert list(manifest["B1"]) == [kind]
    assert manifest["B1"][kind].startswith(f"{web.url}/0: ")
    assert reason in manifest["B1"][kind]
    assert names(photos) == ["B2.png"]
    assert warned == []


def test_the_first_url_that_serves_a_picture_is_used(web, photos):
    web.pages |= {"/html": good(b"<html>"), "/moved": redirect("/jpeg"), "/jpeg": good(JPEG), "/png": good(PNG)}
    urls = {"B1": [f"{web.url}/{page}" for page in ("gone", "html", "moved", "png")], "B2": [f"{web.url}/gone"] * 2}
    manifest = fetch_pictures(urls, photos, QUICK)
    assert manifest["B1"] == {"file": "B1.jpg"}
    assert manifest["B2"]["missing"].count("404") == 2
    assert "/png" not in web.requests


def test_items_without_a_valid_url_have_their_reason(photos):
    urls = {"B1": [], "B2": ["ftp://host/a.jpg"], "B3": ["\ud800\n"], "B4": [None], "B5": ["http://127.0.0.1/a"]}
    manifest = fetch_pictures(urls, photos, FetchOptions(workers=2, per_second=100))
    assert manifest["B1"] == {"missing": NO_URL}
    assert manifest["B2"] == {"broken": "ftp://host/a.jpg: ftp: is not fetched, only http and https are"}
    assert "without a scheme" in manifest["B4"]["broken"]
    assert manifest["B5"]["broken"].endswith("address 127.0.0.1; give --allow_private_addresses to fetch from it")
    json.dumps(manifest, ensure_ascii=False).encode()


def test_ids_that_are_no_safe_file_names_become_digests_that_are_found_again(web, photos, tmp_path):
    odd = ["../../up", "/etc/x", "b1", "B1", "a\0b", "Ünï", "", ".", "B" * 33, "C\n", "item-99"]
    manifest = fetch(web, photos, {asin: good(JPEG) for asin in odd})
    assert manifest["B1"] == {"file": "B1.jpg"}
    fetched = [entry["file"] for asin, entry in manifest.items() if asin != "B1"]
    assert all(re.fullmatch(r"item-[0-9a-f]{20}\.jpg", name) for name in fetched)
    assert names(photos) == sorted({"B1.jpg", *fetched})
    assert len(set(fetched)) == len(odd) - 1
    assert names(tmp_path) == ["photos"]
    assert find_pictures(odd[::-1], photos) == manifest


def start(urls: dict[str, list[str]], photos: Path, before: str = "") -> subprocess.Popen:
    """Fetch pictures in a process of its own, after some code."""
    code = (
        f"import json, resource, socket, sys, time\n{before}\n"
        "from common.cli import run_cli\nfrom datasets.prepare.pictures import *\n"
        "options = FetchOptions(8, 200, allow_private=True)\n"
        "run_cli(lambda: fetch_pictures(json.loads(sys.argv[1]), Path(sys.argv[2]), options))"
    )
    command = [sys.executable, "-c", code, json.dumps(urls), photos]
    environment = os.environ | {"NO_PROXY": "*"}
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_a_picture_leaves_none_and_is_named(web, photos):
    web.pages["/a"] = good(JPEG)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))"
    with start({f"B{i}": [f"{web.url}/a"] for i in range(99)}, photos, limit) as process:
        assert process.wait(timeout=60) == 2
        assert "File too large; free space" in process.stderr.read()
    assert [name for name in names(photos) if not name.endswith(".tmp")] == []


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_stalled_servers_or_name_servers(web, photos):
    web.pages["/a"] = stalled()
    slow_names = "real = socket.getaddrinfo\nsocket.getaddrinfo = lambda host, *a, flags=0, **k: "
    slow_names += "time.sleep(99) if host == 'slow' and not flags else real(host, *a, flags=flags, **k)"
    with start(
        {f"B{i}": [f"{web.url}/a" if i % 2 else "http://slow/"] for i in range(99)}, photos, slow_names
    ) as process:
        while len(web.requests) < 4:
            time.sleep(0.01)
            assert process.poll() is None
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert time.monotonic() - started < 3


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(web, dataset):
    held, asins = threading.Event(), [f"B{i}" for i in range(12)]
    web.pages = {f"/{i}": good(JPEG) for i in range(6)}
    web.pages |= {f"/{i}": lambda handler: (held.wait(), good(PNG)(handler)) for i in range(6, 12)}
    urls = {asin: [f"{web.url}/{asin[1:]}"] for asin in asins}
    with start(urls, dataset.photos) as process:
        while len(list(dataset.photos.glob("B*"))) < 6 or len(web.requests) < 12:
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
    held.set()
    touch(dataset.photos, ".B7.jpg.abcdefgh.tmp", ".mine.tmp")
    web.requests.clear()
    dataset.asins = asins
    manifest = dataset.prepare(urls)
    assert [entry["file"] for entry in manifest.values()] == [f"B{i}{'.jpg' if i < 6 else '.png'}" for i in range(12)]
    assert names(dataset.photos) == sorted([".mine.tmp", *(entry["file"] for entry in manifest.values())])
    assert len(web.requests) == 6


# --------------------------------------------------------------------------------------------- existing pictures


def pickled(tmp_path: Path, value: object, protocol: int = 4) -> Path:
    path = tmp_path / "item2img_dict.pkl"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


def touch(photos: Path, *paths: str) -> None:
    for path in paths:
        (photos / path).parent.mkdir(parents=True, exist_ok=True)
        (photos / path).write_bytes(b"not decoded")


def test_files_named_by_an_items_id_are_its_pictures_and_links_out_of_the_folder_are_not(photos, tmp_path):
    assert list(find_pictures(["B1"], photos)["B1"]) == ["missing"]  # no folder
    touch(photos, "B1.jpg", "B2.PNG", "B3.jpeg", "B3.jpg", "b4-x.webp", "B5.txt", "other.jpg")
    (photos / "B6.jpg").mkdir()
    touch(tmp_path, "secret.jpg")
    (photos / "B7.jpg").symlink_to(tmp_path / "secret.jpg")
    manifest = find_pictures(["B1", "B2", "B3", "b4-x", "B5", "B6", "B7"], photos)
    found = [entry.get("file") for entry in manifest.values()]
    assert found == ["B1.jpg", "B2.PNG", "B3.jpg", "b4-x.webp", None, None, None]


@pytest.mark.parametrize("protocol", (0, 2, 5))
def test_paths_of_another_machine_are_found_by_their_end(photos, tmp_path, protocol):
    touch(photos, "deep/a.jpg", "a.jpg", "c.jpg", "B5.jpg")
    touch(tmp_path, "secret.jpg")
    paths = {"B1": "/data/x/photos/tiny/deep/a.jpg", "B2": "photos/tiny/a.jpg", "B3": "D:\\pictures\\c.jpg"}
    paths |= {"B4": "/data/gone.jpg", "B5": "/data/gone.jpg", "Ünï": "../../c.jpg", "B6": "x/../../../secret.jpg"}
    manifest = find_pictures(list(paths), photos, pickled(tmp_path, paths, protocol))
    found = [entry.get("file") for entry in manifest.values()]
    assert found == ["deep/a.jpg", "a.jpg", "c.jpg", None, "B5.jpg", "c.jpg", None]
    assert "item2img_dict.pkl names /data/gone.jpg" in manifest["B4"]["missing"]


class Call:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "value",
    [
        *(pickle.dumps({"B1": "a.jpg", "B2": [Call()]}, protocol) for protocol in (0, 2, 5)),
        {"B1": 1},
        {1: "B1"},
        b"not a pickle",
        pickle.dumps({"B1": "a.jpg"})[:-5],
        b"}" + b"r\xff\xff\xff\x7f" + b".",  # a memo of 2 billion entries, which are 16 GB
        b"}\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a string of 2**63 bytes
        b"}}U\x01as.",  # a dict as a key
    ],
    ids=repr,
)
def test_a_pickle_of_anything_but_a_dict_of_strings_is_refused_and_calls_nothing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"item2img_dict\.pkl .*a pickled dict of strings"):
        find_pictures(["B1"], tmp_path, pickled(tmp_path, value))
    assert not Path("executed").exists()


# ------------------------------------------------------------------------------------------------- all together


def test_existing_pictures_stay_the_rest_is_fetched_and_the_catalogue_reads_both(web, dataset):
    a, b, c, d = dataset.asins
    touch(dataset.photos, "x.jpg", f"{b}.png")
    pickled(dataset.folder, {a: "/far/x.jpg"})
    web.pages["/good"] = good(JPEG)
    manifest = dataset.prepare({a: [f"{web.url}/good"], c: [f"{web.url}/good"]})
    files_of = {a: "x.jpg", b: f"{b}.png", c: f"{c}.jpg"}
    assert manifest == {asin: {"file": name} for asin, name in files_of.items()} | {d: {"missing": NO_URL}}
    assert list(manifest) == dataset.asins
    assert (dataset.json("pictures.json"), dataset.json("item2img.json")) == (manifest, files_of)
    assert len(web.requests) == 1
    assert dataset.log == [
        "pictures: 3 of 4 items (2 were there, 1 fetched), 1 missing, 0 broken; "
        f"{dataset.folder / 'pictures.json'} says why"
    ]
    found = load_catalog(dataset.folder.parent, "tiny").pictures
    assert [path and path.name for path in found] == [*files_of.values(), None]


def test_without_fetching_nothing_is_requested_and_earlier_reasons_stay(web, dataset):
    a, b, c, _ = dataset.asins
    urls = {a: [f"{web.url}/gone"], b: [f"{web.url}/gone"]}
    first = dataset.prepare(urls, fetch=False)
    assert (first[a], web.requests) == ({"missing": "not fetched"}, [])
    assert NO_URL in first[c]["missing"]
    second = dataset.prepare(urls)
    assert "404" in second[a]["missing"]
    assert dataset.prepare(urls, fetch=False) == second


def test_a_second_run_changes_no_byte_and_requests_failures_and_deleted_pictures_alone(web, dataset):
    a, b, c, _ = dataset.asins
    web.pages |= {"/a": good(JPEG), "/c": good(PNG)}
    urls = {a: [f"{web.url}/a"], b: [f"{web.url}/gone"], c: [f"{web.url}/c"]}

    def content() -> dict:
        return {path: path.read_bytes() for path in dataset.folder.parent.rglob("*") if path.is_file()}

    dataset.prepare(urls)
    before = content()
    (dataset.photos / f"{c}.png").unlink()
    web.requests.clear()
    dataset.prepare(urls)
    assert content() == before
    assert sorted(web.requests) == ["/c", "/gone"]


def test_what_a_user_listed_is_never_lost(web, dataset):
    a, b, c, d = dataset.asins
    touch(dataset.photos, "mine.jpg", f"{a}.jpg")
    write_item2img(dataset.folder, {a: "mine.jpg", "2": "deep/not there yet.jpg"})
    web.pages["/good"] = good(JPEG)
    urls = {asin: [f"{web.url}/good"] for asin in dataset.asins}
    for _ in range(2):
        manifest = dataset.prepare(urls)
        assert manifest[a] == {"file": "mine.jpg"}
        assert "does not exist" in manifest[b]["broken"]
        listed = {a: "mine.jpg", b: "deep/not there yet.jpg", c: f"{c}.jpg", d: f"{d}.jpg"}
        assert dataset.json("item2img.json") == listed


@pytest.mark.parametrize("text", ['{"B1": {}}', '{"B1": {"file": 1}}', '{"B1": {"lost": "x"}}'])
def test_a_damaged_manifest_is_named(dataset, text):
    (dataset.folder / "pictures.json").write_text(text)
    with pytest.raises(InputError, match=r"pictures\.json .*delete it"):
        dataset.prepare()
