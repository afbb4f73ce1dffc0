"""Downloads: requests and their limits, large files that resume, and a picture or a reason for every item."""

import asyncio
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

from benchmarks.pictures import (
    cut_short,
    drip,
    endless,
    flat_png,
    good,
    in_turn,
    picture,
    ranges,
    redirect,
    stalled,
    status,
)
from common.errors import InputError
from datasets.catalog import load_catalog
from datasets.prepare import pictures
from datasets.prepare.http import Client, FetchError, Policy, check_file, fetch_file, is_public, parse_url, retry_after
from datasets.prepare.pictures import NO_URL, FetchOptions, fetch_pictures, find_pictures, prepare_pictures
from tests.prepared import in_child, write_item2img, write_prepared

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


PATIENT = Policy(connect=1, read=0.3, total=0.6, tries=3, backoff=0.01, max_retry_after=0.3)


def get(url: str, max_bytes: int = 10**6, policy: Policy = PATIENT, allow_private: bool = True) -> bytes:
    async def run() -> bytes:
        async with Client(policy, allow_private=allow_private) as client:
            return await client.get(url, max_bytes)

    return asyncio.run(run())


def page_of(web, page, max_bytes: int = 10**6) -> bytes:
    web.pages["/a"] = page
    return get(f"{web.url}/a", max_bytes)


def error_of(web, page, max_bytes: int = 10**6) -> FetchError:
    with pytest.raises(FetchError) as raised:
        page_of(web, page, max_bytes)
    return raised.value


# ----------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (status(503), "the server answers 503 Service Unavailable"),
        (status(429), "the server answers 429 Too Many Requests"),
        (cut_short(b"whole", 2), "the answer was cut short or is invalid (peer closed connection"),
        (stalled(b"wh"), "no answer within 0.3 s"),
    ],
    ids=["503", "429", "cut short", "stalled"],
)
def test_a_temporary_failure_is_tried_again_and_given_up_with_its_reason_if_it_stays(web, page, reason):
    assert page_of(web, in_turn(page, good(b"whole"))) == b"whole"
    assert web.requests == ["/a", "/a"]
    error = error_of(web, page)
    assert (str(error).startswith(reason), error.gone) == (True, False)
    assert len(web.requests) == 2 + PATIENT.tries
    for code, gone in ((404, True), (403, False)):  # lasting answers
        assert error_of(web, status(code)).gone == gone
    assert len(web.requests) == 2 + PATIENT.tries + 2


def test_retry_after_is_seconds_or_a_date_and_respected_up_to_a_limit(web):
    started = time.monotonic()
    assert page_of(web, in_turn(status(503, Retry_After="3600"), good(b"whole"))) == b"whole"
    assert time.monotonic() - started >= PATIENT.max_retry_after
    assert retry_after("7") == 7
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


# ------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "url", ["file:///a", "data:,a", "a.jpg", "//host/a", "http://", "http://a..b/c", "http://a\0/"]
)
def test_only_valid_http_and_https_urls_are_fetched(url, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(FetchError) as raised:
        get(url)
    assert not raised.value.again


@pytest.mark.parametrize(
    "page",
    [good(bytes(1001)), good(gzip.compress(bytes(10**5), mtime=0), Content_Encoding="gzip"), endless(bytes(100))],
    ids=["by its length", "decompressed", "streamed"],
)
def test_more_bytes_than_allowed_are_refused(web, page):
    error = error_of(web, page, 1000)
    assert "more than 1,000" in str(error)
    assert not error.again
    assert page_of(web, good(gzip.compress(bytes(1000)), Content_Encoding="gzip"), 1000) == bytes(1000)


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        b"HTTP/1.0 200 OK\r\n\r\n",
    ],
    ids=["status", "header", "body", "chunk size", "body without length"],
)
def test_a_dripping_server_is_left_at_the_total_time_limit(web, start):
    web.pages["/a"] = drip(start, b"x", 0.05)
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"too slow: not finished within 0\.6 s"):
        get(f"{web.url}/a", policy=Policy(read=0.3, total=0.6, tries=1))
    assert time.monotonic() - started < 0.9


def test_the_rate_limit_holds_for_all_tasks_together_and_each_reuses_its_connection(web):
    web.pages["/a"] = good(b"whole")
    connections, serve = set(), web.finish_request
    web.finish_request = lambda request, address: (connections.add(address), serve(request, address))

    async def run() -> None:
        async with Client(PATIENT, per_second=50, allow_private=True) as client:

            async def work() -> None:
                for _ in range(5):
                    await client.get(f"{web.url}/a", 100)

            await asyncio.gather(work(), work())

    started = time.monotonic()
    asyncio.run(run())
    assert (len(web.requests), len(connections)) == (10, 2)
    assert time.monotonic() - started >= 9 / 50


# --------------------------------------------------------------------------------- redirects, proxies, addresses


def test_a_redirect_is_followed_but_not_to_another_scheme_from_https_to_http_or_without_end(web):
    web.pages["/b"] = good(b"whole")
    assert page_of(web, redirect("/b", 308)) == b"whole"
    assert page_of(web, endless(bytes(10**5), 302, Location=f"{web.url}/b")) == b"whole"
    web.requests.clear()
    error = error_of(web, redirect("file:///etc/hostname"))
    assert str(error).startswith("a redirect to file:///etc/hostname: file: is not fetched")
    assert len(web.requests) == 1
    with pytest.raises(FetchError, match="a redirect to http://b/c: from https to http"):
        parse_url("http://b/c", origin=httpx.URL("https://a/b"))
    assert parse_url("//b/c", origin=httpx.URL("https://a/b")) == "https://b/c"
    for address, why in (("http://xn--a/", "Codepoint"), ("http://a:99999/", "port 99999"), ("http://a:0/", "port 0")):
        with pytest.raises(FetchError, match=rf"a redirect to .*: not a valid URL \({why}"):
            parse_url(address, origin=httpx.URL("http://a/b"))
    assert str(error_of(web, redirect("/a"))) == "more than 5 redirects"


def test_the_proxy_of_the_environment_is_used_except_for_hosts_in_no_proxy(web, monkeypatch):
    monkeypatch.setenv("http_proxy", web.url)
    web.pages |= {"http://shop.example/a": good(b"by proxy"), "/a": good(b"directly")}
    assert get("http://shop.example/a", allow_private=False) == b"by proxy"
    assert get(f"{web.url}/a") == b"directly"
    with pytest.raises(FetchError, match=r"private or reserved address 127\.0\.0\.9"):
        get("http://0x7f.9/a", allow_private=False)
    monkeypatch.setenv("http_proxy", "ldap://proxy")
    with pytest.raises(InputError, match=r"ldap://proxy.*; set http_proxy"):
        get("http://shop.example/a")


PRIVATE = ("127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "::1",
           "fe80::1", "fc00::1", "fec0::1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::")  # fmt: skip


def test_private_loopback_link_local_and_reserved_addresses_are_not_public():
    assert [address for address in PRIVATE if is_public(address)] == []
    assert all(map(is_public, ("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808")))


def fake_names(monkeypatch, names: dict[str, list[str]]) -> list[str]:
    """Resolve these names. Returns the names that are looked up from now on."""
    asked, real = [], socket.getaddrinfo

    def resolve(host, port, *arguments, flags=0, **options):
        if host not in names or flags:
            return real(host, port, *arguments, flags=flags, **options)
        asked.append(host)
        if not names[host]:
            raise socket.gaierror(-2, "Name or service not known")
        return [found for address in names[host] for found in real(address, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_a_name_of_a_private_address_is_refused_before_any_connection(web, monkeypatch):
    fake_names(monkeypatch, {"shop.example": ["8.8.8.8", "127.0.0.1"]})
    with pytest.raises(
        FetchError, match=r"shop\.example has the private or reserved address 127\.0\.0\.1; give --allow_"
    ):
        get(f"http://shop.example:{web.server_address[1]}/a", allow_private=False)
    assert web.requests == []


def test_a_redirect_to_a_private_address_is_refused(web, monkeypatch):
    web.pages |= {"/a": redirect(f"{web.url.replace('127.0.0.1', '127.0.0.2')}/b"), "/b": good(b"secret")}
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("datasets.prepare.http.is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(FetchError, match=r"private or reserved address 127\.0\.0\.2"):
        get(f"{web.url}/a", allow_private=False)
    assert web.requests == ["/a"]


def test_a_name_is_looked_up_once_and_its_next_address_is_used_if_one_fails(web, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    asked = fake_names(monkeypatch, {"shop.example": ["127.0.0.3", "127.0.0.1"], "nowhere.example": []})
    web.pages["/a"] = lambda handler: good(handler.headers["Host"].encode())(handler)
    host = f"shop.example:{web.server_address[1]}"
    assert get(f"http://{host}/a") == host.encode()
    assert asked == ["shop.example"]
    with pytest.raises(FetchError, match="Name or service not known"):
        get("http://nowhere.example/a")


# ------------------------------------------------------------------------------------------------- large files

DATA = bytes(range(256)) * 4000  # 1 MB, four chunks


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
    assert path.read_bytes() == DATA
    record = {"sha256": hashlib.sha256(DATA).hexdigest(), "size": len(DATA), "url": f"{web.url}/raw.bin"}
    assert json.loads((path.parent / "checksums.json").read_text()) == {"raw.bin": record}
    assert {p.name for p in path.parent.iterdir()} == {".checksums.json.lock", "checksums.json", "raw.bin"}
    fetch_data(web, tmp_path, good(DATA))
    assert web.requests == ["/raw.bin"]


def test_a_broken_download_resumes_and_progress_renews_the_tries(web, tmp_path):
    drops = (300_000, 300_000, 5, 5, 5, 300_000)
    path = fetch_data(web, tmp_path, ranges(DATA, drops=drops))
    assert path.read_bytes() == DATA
    assert web.requests[:3] == ["/raw.bin from 0", "/raw.bin from 300000", "/raw.bin from 600000"]


OTHER = DATA[::-1]


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (ranges(DATA, drops=(500_000,), honour=False), DATA),
        (ranges(DATA, None, (500_000,)), DATA),
        (ranges(DATA, 'W/"weak"', (500_000,)), DATA),
        (in_turn(ranges(DATA, '"1"', drops=(500_000,)), *[ranges(OTHER, '"2"')] * 2), OTHER),
        (in_turn(ranges(DATA, '"1"', drops=(500_000,)), *[in_turn(status(416), good(OTHER))] * 2), OTHER),
    ],
    ids=["no ranges", "no ETag", "weak ETag", "another ETag", "416"],
)
def test_a_download_that_cannot_resume_or_has_changed_starts_again(web, tmp_path, page, expected):
    assert fetch_data(web, tmp_path, page).read_bytes() == expected
    if expected == DATA:
        assert web.requests == ["/raw.bin from 0"] * 2


def test_a_download_that_gets_no_further_is_given_up(web, tmp_path):
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
    assert not (tmp_path / "raw" / "raw.bin").exists()
    assert fetch_data(web, tmp_path, ranges(DATA)).read_bytes() == DATA
    assert web.requests == [f"/raw.bin from {start}" for start in (0, *drops)]


def test_another_content_than_the_recorded_one_is_refused_with_both_checksums(web, tmp_path):
    path = fetch_data(web, tmp_path, good(DATA))
    path.write_bytes(b"changed")
    message = file_error(web, tmp_path, good(DATA))
    for data in (DATA, b"changed"):
        assert hashlib.sha256(data).hexdigest() in message
    assert str(path) in message and "delete the file" in message
    path.unlink()
    assert "SHA-256" in file_error(web, tmp_path, good(b"other"))
    assert not path.exists()
    path.touch()
    for damaged in ("[]", '{"raw.bin": {}}'):
        (path.parent / "checksums.json").write_text(damaged)
        with pytest.raises(InputError, match=r"checksums\.json.*delete it"):
            check_file(path)


def test_a_file_that_cannot_be_fetched_is_named_with_the_ways_out(web, tmp_path):
    message = file_error(web, tmp_path, status(404))
    assert message.startswith(f"cannot fetch {web.url}/raw.bin: the server answers 404 Not Found; ")
    assert "--raw_root FOLDER" in message and "--base_url" in message


def test_a_gz_is_stored_as_sent_and_must_be_intact(web, tmp_path):
    data = gzip.compress(DATA)
    assert fetch_data(web, tmp_path, good(data, Content_Encoding="x-gzip"), "raw.gz").read_bytes() == data
    assert "compressed as gzip" in file_error(web, tmp_path, good(data, Content_Encoding="gzip"))
    for damaged in (data[:-20], b"<html>sign in</html>"):
        assert "no intact gzip file" in file_error(web, tmp_path, good(damaged), "new.gz")
    assert fetch_data(web, tmp_path, good(data), "new.gz").read_bytes() == data


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


def test_the_first_url_that_serves_a_picture_is_used_and_an_item_without_one_has_its_reason(web, photos):
    web.pages |= {"/html": good(b"<html>"), "/moved": redirect("/jpeg"), "/jpeg": good(JPEG), "/png": good(PNG)}
    urls = {"B1": [f"{web.url}/{page}" for page in ("gone", "html", "moved", "png")], "B2": [f"{web.url}/gone"] * 2}
    manifest = fetch_pictures(urls | {"B3": [], "B4": ["ftp://host/a.jpg"], "B5": ["\ud800\n"]}, photos, QUICK)
    assert manifest["B1"] == {"file": "B1.jpg"}
    assert manifest["B2"]["missing"].count("404 Not Found") == 2
    assert manifest["B3"] == {"missing": NO_URL}
    assert manifest["B4"] == {"broken": "ftp://host/a.jpg: ftp: is not fetched, only http and https are"}
    assert "/png" not in web.requests
    json.dumps(manifest, ensure_ascii=False).encode()
    refused = fetch_pictures({"B5": ["http://127.0.0.1/a"]}, photos, FetchOptions(workers=2, per_second=100))
    assert refused["B5"]["broken"].endswith("127.0.0.1; give --allow_private_addresses to fetch from it")


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
        f"import socket, time\n{before}\nfrom common.cli import run_cli\nfrom datasets.prepare.pictures import *\n"
        f"options = FetchOptions(8, 200, allow_private=True)\n"
        f"run_cli(lambda: fetch_pictures({urls!r}, Path({str(photos)!r}), options))"
    )
    environment = os.environ | {"NO_PROXY": "*"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=environment)


@pytest.mark.parametrize(
    "fetch_all",
    [
        lambda url, photos: fetch_pictures({f"B{i}": [url] for i in range(99)}, photos, QUICK),
        lambda url, photos: fetch_file(url, photos / "a.bin", policy=PATIENT),
    ],
    ids=["pictures", "file"],
)
def test_a_disk_that_fills_up_is_named_and_leaves_no_part_of_a_picture(web, photos, fetch_all):
    web.pages["/a"] = good(JPEG)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        with pytest.raises(InputError, match="File too large; free space"):
            fetch_all(f"{web.url}/a", photos)

    assert in_child(fill) == 0
    assert [name for name in names(photos) if name.endswith((".jpg", ".bin"))] == []


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_stalled_servers_or_name_servers(web, photos):
    web.pages["/a"] = stalled()
    slow_names = "real = socket.getaddrinfo\nsocket.getaddrinfo = lambda host, *a, flags=0, **k: "
    slow_names += "time.sleep(99) if host == 'slow' and not flags else real(host, *a, flags=flags, **k)"
    urls = {f"B{i}": [f"{web.url}/a" if i % 2 else "http://slow/"] for i in range(99)}
    with start(urls, photos, slow_names) as process:
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


def test_a_second_run_changes_no_byte_and_requests_failures_and_deleted_pictures_alone(web, dataset):
    a, b, c, _ = dataset.asins
    web.pages |= {"/a": good(JPEG), "/c": good(PNG)}
    urls = {a: [f"{web.url}/a"], b: [f"{web.url}/gone"], c: [f"{web.url}/c"]}

    assert dataset.prepare(urls, fetch=False)[a] == {"missing": "not fetched"}
    assert web.requests == []

    def content() -> dict:
        return {path: path.read_bytes() for path in dataset.folder.parent.rglob("*") if path.is_file()}

    dataset.prepare(urls)
    before = content()
    assert "404" in dataset.prepare(urls, fetch=False)[b]["missing"]
    assert content() == before
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
