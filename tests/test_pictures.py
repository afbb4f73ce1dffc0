"""Downloads: requests and their limits, large files that resume, and a picture or a reason for every item."""

import asyncio
import dataclasses
import email.utils
import gzip
import hashlib
import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import httpx
import pytest

from benchmarks import pictures as served
from benchmarks.pictures import cut_short, endless, flat_png, good, in_turn, picture, ranges, redirect, stalled, status
from common.errors import InputError
from common.files import read_json
from datasets.catalog import Catalog, load_catalog
from datasets.prepare import pictures
from datasets.prepare.http import Client, FetchError, Policy, check_file, fetch_file, is_public, parse_url, retry_after
from datasets.prepare.pictures import NO_URL, FetchOptions, fetch_pictures, find_pictures, prepare_pictures
from tests.made_up import contents, in_child, write_item2img, write_prepared
from trainer.runs import REPOSITORY

PATIENT = Policy(connect=1, read=0.3, total=0.6, tries=3, backoff=0.01, max_retry_after=0.3)
QUICK = FetchOptions(4, 1000, allow_private=True, policy=dataclasses.replace(PATIENT, tries=2, max_retry_after=0.1))
JPEG, PNG = picture("JPEG"), picture("PNG")


@pytest.fixture
def photos(tmp_path) -> Path:
    return tmp_path / "photos" / "tiny"


def fetch(web, photos, pages: dict) -> dict:
    web.pages |= {f"/{number}": page for number, page in enumerate(pages.values())}
    return fetch_pictures({asin: [f"{web.url}/{n}"] for n, asin in enumerate(pages)}, photos, QUICK)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))  # noqa: PTH208 (hidden files count too)


@pytest.fixture
def dataset(tmp_path) -> Catalog:
    write_prepared(tmp_path, items=4)
    return load_catalog(tmp_path, "tiny")


def prepare(dataset: Catalog, urls: dict, options: FetchOptions | None = QUICK) -> dict:
    return prepare_pictures(dataset.asins, urls, dataset.photos, folder_of(dataset), options)


def folder_of(dataset: Catalog) -> Path:
    return dataset.photos.parents[1] / "tiny"


def get(url: str, max_bytes: int = 10**6, allow_private: bool = True) -> bytes:
    async def run() -> bytes:
        async with Client(PATIENT, allow_private=allow_private) as client:
            return await client.get(url, max_bytes)

    return asyncio.run(run())


def page_of(web, page, max_bytes: int = 10**6) -> bytes:
    web.pages["/a"] = page
    return get(f"{web.url}/a", max_bytes)


def error_of(web, page, max_bytes: int = 10**6) -> FetchError:
    with pytest.raises(FetchError) as raised:
        page_of(web, page, max_bytes)
    return raised.value


ZEROS = good(gzip.compress(bytes(1001)), Content_Encoding="gzip")


@pytest.mark.parametrize(
    ("page", "reason", "tries"),
    [
        (status(503), "the server answers 503 Service Unavailable", PATIENT.tries),
        (status(429), "the server answers 429 Too Many Requests", PATIENT.tries),
        (status(404), "the server answers 404 Not Found", 1),
        (status(403), "the server answers 403 Forbidden", 1),
        (cut_short(b"whole", 2), "the answer was cut short or is invalid (peer closed connection", PATIENT.tries),
        (stalled(b"wh"), "no answer within 0.3 s", PATIENT.tries),
        (served.drip(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.05), "too slow: not finished within 0.6 s", PATIENT.tries),
        (served.drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.05), "too slow: not finished within 0.6 s", PATIENT.tries),
        (good(bytes(1001)), "1,001 bytes, more than 1,000", 1),
        (ZEROS, "more than 1,000 bytes", 1),
        (endless(bytes(100)), "more than 1,000 bytes", 1),
    ],
)
def test_a_failure_is_named_and_only_a_temporary_one_is_tried_again(web, page, reason, tries):
    started = time.monotonic()
    error = error_of(web, page, 1000)
    assert str(error).startswith(reason) and error.gone == ("404" in reason)
    assert len(web.requests) == tries and time.monotonic() - started < 4
    if tries > 1:
        assert page_of(web, in_turn(page, good(b"whole"))) == b"whole"
    assert page_of(web, ZEROS, 1001) == bytes(1001)


def test_retry_after_is_seconds_or_a_date_and_respected_up_to_a_limit(web):
    started = time.monotonic()
    assert page_of(web, in_turn(status(503, Retry_After="3600"), good(b"whole"))) == b"whole"
    assert time.monotonic() - started >= PATIENT.max_retry_after and retry_after("7") == 7
    assert 35 < retry_after(email.utils.formatdate(time.time() + 40, usegmt=True)) <= 40
    assert retry_after(email.utils.formatdate(time.time() - 40)) == 0
    assert [retry_after(nonsense) for nonsense in ("", "soon", "-5", "9" * 30)] == [0, 0, 0, 0]


def test_a_host_is_given_up_after_many_urls_without_an_answer_and_other_hosts_are_not(web, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("datasets.prepare.http.MAX_SILENT", 2)
    web.pages["/a"] = good(b"whole")

    async def run() -> bytes:
        async with Client(PATIENT, allow_private=True) as client:
            for reason in (r"no connection \(Connection refused\)", "refused", r"not tried, as 127\.0\.0\.2 did not"):
                with pytest.raises(FetchError, match=reason):
                    await client.get("http://127.0.0.2:1/a", 100)
            return await client.get(f"{web.url}/a", 100)

    assert asyncio.run(run()) == b"whole"


def test_the_rate_limit_holds_for_all_tasks_together(web):
    web.pages["/a"] = good(b"whole")

    async def run() -> None:
        async with Client(PATIENT, per_second=50, allow_private=True) as client:
            await asyncio.gather(*(client.get(f"{web.url}/a", 100) for _ in range(10)))

    started = time.monotonic()
    asyncio.run(run())
    assert len(web.requests) == 10 and time.monotonic() - started >= 9 / 50


def test_a_redirect_is_followed_but_not_to_another_scheme_from_https_to_http_or_without_end(web):
    web.pages["/b"] = good(b"whole")
    assert page_of(web, redirect("/b", 308)) == b"whole"
    assert page_of(web, endless(bytes(10**5), 302, Location=f"{web.url}/b")) == b"whole"
    error = error_of(web, redirect("file:///etc/hostname"))
    assert str(error).startswith("a redirect to file:///etc/hostname: file: is not fetched")
    assert str(error_of(web, redirect("/a"))) == "more than 5 redirects"


@pytest.mark.parametrize("url", ["file:///a", "a.jpg", "//host/a", "http://", "http://a\x00/", "http://a:0/"])
def test_only_valid_http_and_https_urls_are_fetched(url):
    with pytest.raises(FetchError, match=r"not a valid URL|only http and https are"):
        parse_url(url)
    with pytest.raises(FetchError, match="a redirect to http://b/c: from https to http"):
        parse_url("http://b/c", origin=httpx.URL("https://a/b"))
    assert parse_url("//b/c", origin=httpx.URL("https://a/b")) == "https://b/c"


def test_the_proxy_of_the_environment_is_used_except_for_hosts_in_no_proxy(web, monkeypatch):
    monkeypatch.setenv("http_proxy", web.url)
    web.pages |= {"http://shop.example/a": good(b"by proxy"), "/a": good(b"directly")}
    assert get("http://shop.example/a", allow_private=False) == b"by proxy" and get(f"{web.url}/a") == b"directly"
    with pytest.raises(FetchError, match=r"private or reserved address 127\.0\.0\.9"):
        get("http://0x7f.9/a", allow_private=False)
    monkeypatch.setenv("http_proxy", "ldap://proxy")
    with pytest.raises(InputError, match=r"ldap://proxy.*; set http_proxy"):
        get("http://shop.example/a")


def test_private_loopback_link_local_and_reserved_addresses_are_not_public():
    private = "127.0.0.1 10.1.2.3 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1 ::1 fe80::1 fc00::1 fec0::1"
    private += " ::ffff:127.0.0.1 64:ff9b::a00:1 2002:7f00:1::"
    assert not any(map(is_public, private.split()))
    assert all(map(is_public, ("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808")))


def fake_names(monkeypatch, names: dict[str, list[str]]) -> list[str]:
    """Resolve these names. Returns the names that are looked up from now on."""
    asked, real = [], socket.getaddrinfo

    def resolve(host, port, *arguments, flags=0, **options):
        if host not in names or flags:
            return real(host, port, *arguments, flags=flags, **options)
        asked.append(host)
        return [found for address in names[host] for found in real(address, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_a_private_address_is_refused_before_any_connection_behind_a_name_and_a_redirect(web, monkeypatch):
    fake_names(monkeypatch, {"shop.example": ["8.8.8.8", "127.0.0.1"]})
    with pytest.raises(FetchError, match=r"shop\.example has the private .* 127\.0\.0\.1; give --allow_private"):
        get(f"http://shop.example:{web.server_address[1]}/a", allow_private=False)
    assert web.requests == []
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("datasets.prepare.http.is_public", lambda address: address == "127.0.0.1")
    web.pages |= {"/a": redirect(f"{web.url.replace('127.0.0.1', '127.0.0.2')}/b"), "/b": good(b"secret")}
    with pytest.raises(FetchError, match=r"private or reserved address 127\.0\.0\.2"):
        get(f"{web.url}/a", allow_private=False)
    assert web.requests == ["/a"]


def test_a_name_is_looked_up_once_and_its_next_address_is_used_if_one_fails(web, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    asked = fake_names(monkeypatch, {"shop.example": ["127.0.0.3", "127.0.0.1"]})
    web.pages["/a"] = lambda handler: good(handler.headers["Host"].encode())(handler)
    host = f"shop.example:{web.server_address[1]}"
    assert (get(f"http://{host}/a"), asked) == (host.encode(), ["shop.example"])


DATA = bytes(range(256)) * 4000  # 1 MB, four chunks
OTHER = DATA[::-1]


def fetch_data(web, tmp_path, page, name: str = "raw.bin") -> Path:
    web.pages[f"/{name}"] = page
    path = tmp_path / "raw" / name
    fetch_file(f"{web.url}/{name}", path, log=lambda line: None, policy=PATIENT)
    return path


def file_error(web, tmp_path, page, name: str = "raw.bin") -> str:
    with pytest.raises(InputError) as raised:
        fetch_data(web, tmp_path, page, name)
    return str(raised.value)


def test_a_file_is_fetched_recorded_and_not_fetched_again(web, tmp_path):
    path = fetch_data(web, tmp_path, good(DATA))
    record = {"sha256": hashlib.sha256(DATA).hexdigest(), "size": len(DATA), "url": f"{web.url}/raw.bin"}
    assert json.loads((path.parent / "checksums.json").read_text()) == {"raw.bin": record}
    assert {p.name for p in path.parent.iterdir()} == {".checksums.json.lock", "checksums.json", "raw.bin"}
    fetch_data(web, tmp_path, good(DATA))
    assert web.requests == ["/raw.bin"]


FAR, STUCK, NEVER = (300_000, 300_000, 5, 5, 5, 300_000), (500_000,), status(416)


@pytest.mark.parametrize(
    ("page", "expected", "starts"),
    [
        (ranges(DATA, drops=FAR), DATA, [0, 300_000, 600_000]),  # progress renews the tries
        (ranges(DATA, drops=STUCK, honour=False), DATA, [0, 0]),
        (ranges(DATA, 'W/"weak"', STUCK), DATA, [0, 0]),
        (in_turn(ranges(DATA, '"1"', drops=STUCK), *[ranges(OTHER, '"2"')] * 2), OTHER, [0]),
        (in_turn(ranges(DATA, '"1"', drops=STUCK), *[in_turn(NEVER, good(OTHER))] * 2), OTHER, [0]),
    ],
    ids=["resumes", "no ranges", "weak ETag", "another ETag", "416"],
)
def test_a_broken_download_resumes_unless_it_cannot_or_the_file_has_changed(web, tmp_path, page, expected, starts):
    assert fetch_data(web, tmp_path, page).read_bytes() == expected
    assert web.requests[: len(starts)] == [f"/raw.bin from {start}" for start in starts]


def test_a_download_that_gets_no_further_is_given_up_with_the_ways_out(web, tmp_path):
    message = file_error(web, tmp_path, status(404))
    assert message.startswith(f"cannot fetch {web.url}/raw.bin: the server answers 404 Not Found; ")
    assert "--raw_root FOLDER" in message and "--base_url" in message
    assert "cut short" in file_error(web, tmp_path, ranges(DATA, drops=(500_000,) * 50, honour=False))


@pytest.mark.parametrize("drops", [(), (300_000,)], ids=["complete but for its name", "in the middle"])
def test_a_killed_download_resumes(web, tmp_path, monkeypatch, drops):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("datasets.prepare.http._record", killed)
        patched.setattr("random.uniform", killed)  # before a second try
        with pytest.raises(KeyboardInterrupt):
            fetch_data(web, tmp_path, ranges(DATA, drops=drops))
    assert fetch_data(web, tmp_path, ranges(DATA)).read_bytes() == DATA
    assert web.requests == [f"/raw.bin from {start}" for start in (0, *drops)]


def test_another_content_than_the_recorded_one_is_refused_with_both_checksums(web, tmp_path):
    path = fetch_data(web, tmp_path, good(DATA))
    path.write_bytes(b"changed")
    message = file_error(web, tmp_path, good(DATA))
    assert all(hashlib.sha256(data).hexdigest() in message for data in (DATA, b"changed"))
    assert str(path) in message and "delete the file" in message
    path.unlink()
    assert "SHA-256" in file_error(web, tmp_path, good(b"other")) and not path.exists()
    path.touch()
    (path.parent / "checksums.json").write_text('{"raw.bin": {}}')
    with pytest.raises(InputError, match=r"checksums\.json does not map file names to a sha256; delete it"):
        check_file(path)


def test_a_gz_is_stored_as_sent_and_must_be_intact(web, tmp_path):
    data = gzip.compress(DATA)
    assert fetch_data(web, tmp_path, good(data, Content_Encoding="x-gzip"), "raw.gz").read_bytes() == data
    assert "compressed as gzip" in file_error(web, tmp_path, good(data, Content_Encoding="gzip"))
    for damaged in (data[:-20], b"<html>sign in</html>"):
        assert "no intact gzip file" in file_error(web, tmp_path, good(damaged), "new.gz")
    assert fetch_data(web, tmp_path, good(data), "new.gz").read_bytes() == data


def test_a_picture_keeps_its_bytes_under_its_id_and_the_suffix_of_its_format(web, photos):
    suffixes = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "TIFF": ".tiff"}
    data = {f"B{form}": picture(form) for form in suffixes}
    manifest = fetch(web, photos, {asin: good(content) for asin, content in data.items()})
    assert manifest == {f"B{form}": {"file": f"B{form}{suffix}"} for form, suffix in suffixes.items()}
    assert {asin: (photos / manifest[asin]["file"]).read_bytes() for asin in data} == data


@pytest.mark.parametrize(
    ("page", "kind", "reason"),
    [
        (status(404), "missing", "404 Not Found"),
        (good(picture("PPM")), "broken", "not a picture of a known format"),
        (good(flat_png(10_000, 10_000)), "broken", "10000 x 10000 pixels, more than 50,000,000"),
        (good(JPEG[: len(JPEG) * 2 // 3]), "broken", "the picture cannot be read"),
        (stalled(JPEG[:100]), "broken", "no answer within 0.3 s"),
        (good(bytes(20_001)), "broken", "20,001 bytes, more than 20,000"),
    ],
)
def test_a_bad_answer_gives_a_reason_with_its_url_and_leaves_no_file(web, photos, monkeypatch, page, kind, reason):
    monkeypatch.setattr(pictures, "MAX_BYTES", 20_000 if "bytes" in reason else 10**6)
    with warnings.catch_warnings(record=True) as warned:
        manifest = fetch(web, photos, {"B1": page, "B2": good(PNG)})
    assert list(manifest["B1"]) == [kind]
    assert manifest["B1"][kind].startswith(f"{web.url}/0: ") and reason in manifest["B1"][kind]
    assert (names(photos), warned) == (["B2.png"], [])


def test_the_first_url_that_serves_a_picture_is_used_and_an_item_without_one_has_its_reason(web, photos):
    web.pages |= {"/html": good(b"<html>"), "/moved": redirect("/jpeg"), "/jpeg": good(JPEG), "/png": good(PNG)}
    urls = {"B1": [f"{web.url}/{page}" for page in ("gone", "html", "moved", "png")], "B2": [f"{web.url}/gone"] * 2}
    urls |= {"B3": [], "B4": ["ftp://host/a.jpg"], "B5": ["\ud800\n", "http://a..b/c"]}
    manifest = fetch_pictures(urls, photos, QUICK)
    assert manifest["B1"] == {"file": "B1.jpg"} and manifest["B2"]["missing"].count("404 Not Found") == 2
    assert (manifest["B3"], list(manifest["B5"])) == ({"missing": NO_URL}, ["broken"])
    assert manifest["B4"] == {"broken": "ftp://host/a.jpg: ftp: is not fetched, only http and https are"}
    assert "/png" not in web.requests
    json.dumps(manifest, ensure_ascii=False).encode()
    refused = fetch_pictures({"B5": ["http://127.0.0.1/a"]}, photos, FetchOptions(workers=2, per_second=100))
    assert refused["B5"]["broken"].endswith("127.0.0.1; give --allow_private_addresses to fetch from it")


def test_ids_that_are_no_safe_file_names_become_digests_that_are_found_again(web, photos, tmp_path):
    odd = ["../../up", "/etc/x", "b1", "B1", "a\0b", "Ünï", "", ".", "B" * 33, "C\n", "item-99"]
    manifest = fetch(web, photos, {asin: good(JPEG) for asin in odd})
    assert manifest["B1"] == {"file": "B1.jpg"}
    fetched = {entry["file"] for asin, entry in manifest.items() if asin != "B1"}
    assert all(re.fullmatch(r"item-[0-9a-f]{20}\.jpg", name) for name in fetched) and len(fetched) == len(odd) - 1
    assert (names(photos), names(tmp_path)) == (sorted({"B1.jpg", *fetched}), ["photos"])
    assert find_pictures(odd[::-1], photos) == manifest


def start(urls: dict[str, list[str]], photos: Path, ready, before: str = "") -> subprocess.Popen:
    """Fetch pictures in a process of its own, after some code, and return it when `ready`."""
    # A background job of a shell ignores SIGINT, and so would this process.
    code = "import signal, socket, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"{before}\nfrom common.cli import run_cli\nfrom datasets.prepare.pictures import *\n"
    code += f"urls, photos, options = {urls!r}, Path({str(photos)!r}), FetchOptions(8, 200, allow_private=True)\n"
    code += "run_cli(lambda: fetch_pictures(urls, photos, options))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | {"NO_PROXY": "*"})
    while not ready():
        time.sleep(0.01)
        assert process.poll() is None
    return process


@pytest.mark.parametrize("picture", [True, False])
def test_a_disk_that_fills_up_is_named_and_leaves_no_part_of_a_picture(web, photos, picture):
    web.pages["/a"], url = good(JPEG), f"{web.url}/a"

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        with pytest.raises(InputError, match="File too large; free space"):
            fetch_pictures({"B1": [url]}, photos, QUICK) if picture else fetch_file(url, photos / "a.bin")

    assert in_child(fill) == 0 and [name for name in names(photos) if name.endswith((".jpg", ".bin"))] == []


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_stalled_servers_or_name_servers(web, photos):
    web.pages["/a"] = stalled()
    slow_names = "real = socket.getaddrinfo\nsocket.getaddrinfo = lambda host, *a, flags=0, **k: "
    slow_names += "time.sleep(99) if host == 'slow' and not flags else real(host, *a, flags=flags, **k)"
    urls = {f"B{i}": [f"{web.url}/a" if i % 2 else "http://slow/"] for i in range(99)}
    with start(urls, photos, lambda: len(web.requests) >= 4, slow_names) as process:
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130 and time.monotonic() - started < 3


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(web, dataset):
    held, photos = threading.Event(), dataset.photos
    dataset = dataclasses.replace(dataset, asins=[f"B{i}" for i in range(12)])
    web.pages = {f"/{i}": good(JPEG) for i in range(6)}
    web.pages |= {f"/{i}": lambda handler: (held.wait(), good(PNG)(handler)) for i in range(6, 12)}
    urls = {asin: [f"{web.url}/{asin[1:]}"] for asin in dataset.asins}
    with start(urls, photos, lambda: len([*photos.glob("B*")]) >= 6 and len(web.requests) >= 12) as process:
        process.kill()
    held.set()
    touch(photos, ".B7.jpg.abcdefgh.tmp", ".mine.tmp")
    web.requests.clear()
    files = [entry["file"] for entry in prepare(dataset, urls).values()]
    assert files == [f"B{i}{'.jpg' if i < 6 else '.png'}" for i in range(12)]
    assert (names(photos), len(web.requests)) == (sorted([".mine.tmp", *files]), 6)


def pickled(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "item2img_dict.pkl"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
    return path


def touch(photos: Path, *paths: str) -> None:
    for path in paths:
        (photos / path).parent.mkdir(parents=True, exist_ok=True)
        (photos / path).write_bytes(b"not decoded")


def test_files_named_by_an_items_id_are_its_pictures_and_links_out_of_the_folder_are_not(photos, tmp_path):
    assert list(find_pictures(["B1"], photos)["B1"]) == ["missing"]  # no folder
    touch(photos, "B1.jpg", "B2.PNG", "B3.jpeg", "B3.jpg", "b4-x.webp", "B5.txt", "other.jpg", "B6.jpg/file")
    touch(tmp_path, "secret.jpg")
    (photos / "B7.jpg").symlink_to(tmp_path / "secret.jpg")
    found = find_pictures(["B1", "B2", "B3", "b4-x", "B5", "B6", "B7"], photos).values()
    assert [entry.get("file") for entry in found] == ["B1.jpg", "B2.PNG", "B3.jpg", "b4-x.webp", None, None, None]


def test_paths_of_another_machine_are_found_by_their_end(photos, tmp_path):
    touch(photos, "deep/a.jpg", "a.jpg", "c.jpg", "B5.jpg")
    touch(tmp_path, "secret.jpg")
    paths = {"B1": "/data/x/photos/tiny/deep/a.jpg", "B2": "photos/tiny/a.jpg", "B3": "D:\\pictures\\c.jpg"}
    paths |= {"B4": "/data/gone.jpg", "B5": "/data/gone.jpg", "Ünï": "../../c.jpg", "B6": "x/../../../secret.jpg"}
    manifest = find_pictures(list(paths), photos, pickled(tmp_path, paths))
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


def test_existing_pictures_stay_the_rest_is_fetched_and_the_catalogue_reads_both(web, dataset):
    (a, b, c, d), folder = dataset.asins, folder_of(dataset)
    touch(dataset.photos, "x.jpg", f"{b}.png")
    pickled(folder, {a: "/far/x.jpg"})
    web.pages["/good"] = good(JPEG)
    manifest = prepare(dataset, {a: [f"{web.url}/good"], c: [f"{web.url}/good"]})
    files_of = {a: "x.jpg", b: f"{b}.png", c: f"{c}.jpg"}
    assert manifest == {asin: {"file": name} for asin, name in files_of.items()} | {d: {"missing": NO_URL}}
    assert [read_json(folder / f"{name}.json", "") for name in ("pictures", "item2img")] == [manifest, files_of]
    assert len(web.requests) == 1
    found = load_catalog(folder.parent, "tiny").pictures
    assert [path and path.name for path in found] == [*files_of.values(), None]


def test_a_second_run_needs_a_whole_manifest_and_requests_failures_and_deleted_pictures_alone(web, dataset):
    (a, b, c, _), root = dataset.asins, dataset.photos.parents[1]
    web.pages |= {"/a": good(JPEG), "/c": good(PNG)}
    urls = {a: [f"{web.url}/a"], b: [f"{web.url}/gone"], c: [f"{web.url}/c"]}
    assert (prepare(dataset, urls, None)[a], web.requests) == ({"missing": "not fetched"}, [])
    prepare(dataset, urls)
    before = contents(root)
    assert "404" in prepare(dataset, urls, None)[b]["missing"] and contents(root) == before
    (dataset.photos / f"{c}.png").unlink()
    web.requests.clear()
    prepare(dataset, urls)
    assert (contents(root), sorted(web.requests)) == (before, ["/c", "/gone"])
    (root / "tiny/pictures.json").write_text('{"B1": {"lost": "x"}}')
    with pytest.raises(InputError, match=r"pictures\.json .*delete it"):
        prepare(dataset, urls)


def test_what_a_user_listed_is_never_lost(web, dataset):
    a, b, c, d = dataset.asins
    touch(dataset.photos, "mine.jpg", f"{a}.jpg")
    write_item2img(folder_of(dataset), {a: "mine.jpg", "2": "deep/not there yet.jpg"})
    web.pages["/good"] = good(JPEG)
    for _ in range(2):
        manifest = prepare(dataset, {asin: [f"{web.url}/good"] for asin in dataset.asins})
        assert manifest[a] == {"file": "mine.jpg"} and "does not exist" in manifest[b]["broken"]
        listed = {a: "mine.jpg", b: "deep/not there yet.jpg", c: f"{c}.jpg", d: f"{d}.jpg"}
        assert read_json(folder_of(dataset) / "item2img.json", "") == listed
