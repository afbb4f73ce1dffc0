"""GETs: what is tried again, what is refused, what cannot hold a thread, and large files that go on after a kill."""

import email.utils
import gzip
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.picture_server import (
    cut_short,
    drip,
    endless,
    good,
    in_turn,
    ranges,
    redirect,
    stalled,
    status,
)
from common.errors import InputError
from datasets.prepare.fetch import check_file, fetch_file
from datasets.prepare.web import Fetcher, FetchError, Patience, _retry_after, redirected

REPOSITORY = Path(__file__).parent.parent
QUICK = Patience(connect=1, read=0.3, attempt=0.6, tries=3, backoff=0.01, longest=0.3)


def get(web, page, max_bytes: int = 10**6) -> bytes:
    web.pages["/a"] = page
    return Fetcher(QUICK).get(f"{web.url}/a", max_bytes)


def problem(web, page, max_bytes: int = 10**6) -> FetchError:
    with pytest.raises(FetchError) as raised:
        get(web, page, max_bytes)
    return raised.value


# ---------------------------------------------------------------------------------------------------------- tried again


@pytest.mark.parametrize(
    "first",
    [status(503), status(500), status(429), status(503, Retry_After="0"), cut_short(b"whole", 2), stalled(b"wh")],
    ids=["503", "500", "429", "retry-after", "cut short", "stalled"],
)
def test_what_a_second_try_may_mend_is_tried_again(web, first):
    assert get(web, in_turn(first, good(b"whole"))) == b"whole"
    assert web.requests == ["/a", "/a"]


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (status(503), "the server answers 503 Service Unavailable"),
        (status(429), "the server answers 429 Too Many Requests"),
        (cut_short(b"whole", 2), "the connection broke before the answer was whole"),
        (stalled(), "no answer within 0.3 s"),
    ],
    ids=["503", "429", "cut short", "stalled"],
)
def test_what_stays_bad_is_given_up_after_all_tries_with_the_reason(web, page, why):
    error = problem(web, page)
    assert str(error) == why
    assert not error.gone
    assert len(web.requests) == QUICK.tries


@pytest.mark.parametrize(("code", "gone"), [(404, True), (410, True), (403, False), (400, False), (204, False)])
def test_an_answer_that_will_not_change_is_not_tried_again(web, code, gone):
    error = problem(web, status(code))
    assert f"the server answers {code}" in str(error)
    assert error.gone is gone
    assert len(web.requests) == 1


def test_retry_after_is_waited_for_but_not_longer_than_the_patience(web):
    started = time.monotonic()
    assert get(web, in_turn(status(503, Retry_After="3600"), good(b"whole"))) == b"whole"
    assert time.monotonic() - started >= QUICK.longest


def test_retry_after_may_be_seconds_a_date_or_nonsense():
    later = email.utils.formatdate(time.time() + 40, usegmt=True)
    assert _retry_after("7", 60) == 7
    assert 35 < _retry_after(later, 60) <= 40
    assert _retry_after(email.utils.formatdate(time.time() - 40), 60) == 0
    assert [_retry_after(value, 60) for value in ("", "soon", "-5", "9" * 30)] == [0, 0, 0, 60]


def test_a_port_where_nothing_listens_is_named_without_an_address_in_memory():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a"
    with pytest.raises(FetchError, match="Connection refused") as raised:
        Fetcher(QUICK).get(url, 100)
    assert "0x" not in str(raised.value)


def test_a_connection_is_used_again(web):
    web.pages |= {f"/{i}": good(b"whole") for i in range(3)}
    ports = set()
    serve = web.finish_request

    def remember(request, client):
        ports.add(client)
        serve(request, client)

    web.finish_request = remember
    fetcher = Fetcher(QUICK)
    assert [fetcher.get(f"{web.url}/{i}", 100) for i in range(3)] == [b"whole"] * 3
    assert len(ports) == 1


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://host/a", "data:text/plain,a", "a.jpg", "//host/a", "http://", "http://[::1/a",
            "http://a..b/c", "", "javascript:alert(1)"]
)  # fmt: skip
def test_any_url_but_http_and_https_is_refused_without_a_try(url):
    with pytest.raises(FetchError) as raised:
        Fetcher(Patience(backoff=60)).get(url, 100)
    assert not raised.value.again


def test_a_redirect_to_another_page_is_followed(web):
    web.pages["/b"] = good(b"whole")
    assert get(web, redirect("/b")) == b"whole"
    assert get(web, redirect(f"{web.url}/b", 308)) == b"whole"


@pytest.mark.parametrize("to", ["file:///etc/hostname", "ftp://127.0.0.1/a", "data:,a", "http://[::1"])
def test_a_redirect_to_another_scheme_is_refused_by_name(web, to):
    error = problem(web, redirect(to))
    assert "redirect" in str(error)
    assert to.partition(":")[0] in str(error) or "no valid URL" in str(error)
    assert not error.gone
    assert len(web.requests) == 1


def test_a_redirect_from_https_to_http_is_refused_and_within_https_or_up_to_it_is_not():
    with pytest.raises(FetchError, match="from https to http://b/c"):
        redirected("https://a/b", "http://b/c")
    assert redirected("https://a/b", "//b/c") == "https://b/c"
    assert redirected("http://a/b", "https://b/c") == "https://b/c"


def test_the_body_of_a_redirect_is_not_read(web):
    web.pages["/b"] = good(b"whole")
    assert get(web, endless(bytes(10**5), 302, Location="/b")) == b"whole"


def test_redirects_without_end_are_refused(web):
    assert str(problem(web, redirect("/a"))) == "more than 5 redirects"
    assert len(web.requests) == 6


@pytest.mark.parametrize(
    "page",
    [
        good(bytes(1001)),
        good(gzip.compress(bytes(10**7)), Content_Encoding="gzip"),
        endless(bytes(100)),
    ],
    ids=["by its length", "decompressed", "streamed"],
)
def test_more_bytes_than_allowed_are_refused(web, page):
    error = problem(web, page, 1000)
    assert "more than 1,000" in str(error)
    assert not error.again


def test_a_body_of_exactly_the_allowed_bytes_is_taken(web):
    assert get(web, good(bytes(1000)), 1000) == bytes(1000)


def test_a_server_that_compresses_unasked_is_understood(web):
    assert get(web, good(gzip.compress(b"whole"), Content_Encoding="gzip")) == b"whole"
    assert "compressed as br" in str(problem(web, good(b"?", Content_Encoding="br")))
    assert "cut short" in str(problem(web, good(gzip.compress(bytes(1000))[:-12], Content_Encoding="gzip")))


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
def test_a_server_that_drips_does_not_hold_a_thread(web, start):
    web.pages["/a"] = drip(start, b"x", 0.05)
    with pytest.raises(FetchError, match=r"too slow: no end within 0\.6 s"):
        Fetcher(Patience(read=0.3, attempt=0.6, tries=1)).get(f"{web.url}/a", 10**6)


# --------------------------------------------------------------------------------------------------------- many at once


def test_no_more_requests_start_in_a_second_than_asked_for_whatever_the_threads(web):
    web.pages["/a"] = good(b"whole")
    fetcher = Fetcher(QUICK, per_second=50)
    threads = [threading.Thread(target=fetcher.get, args=(f"{web.url}/a", 100)) for _ in range(11)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(web.requests) == 11
    assert time.monotonic() - started >= 10 / 50


def test_a_stop_ends_a_wait(web):
    fetcher = Fetcher(Patience(backoff=3600))
    web.pages["/a"] = lambda handler: (fetcher.stop.set(), status(503)(handler))
    with pytest.raises(FetchError, match="interrupted"):
        fetcher.get(f"{web.url}/a", 100)


def test_a_proxy_of_the_environment_is_used(web, monkeypatch):
    monkeypatch.setenv("http_proxy", web.url)
    web.pages["http://shop.example/a"] = good(b"by proxy")
    assert Fetcher(QUICK).get("http://shop.example/a", 100) == b"by proxy"


# ---------------------------------------------------------------------------------------------------------- large files

DATA = bytes(range(256)) * 4000  # 1 MB, four chunks


def fetch_data(web, tmp_path, page, name: str = "raw.bin") -> Path:
    web.pages[f"/{name}"] = page
    path = tmp_path / "raw" / name
    fetch_file(f"{web.url}/{name}", path, say=lambda line: None, patience=QUICK)
    return path


def refused_file(web, tmp_path, page) -> str:
    with pytest.raises(InputError) as raised:
        fetch_data(web, tmp_path, page)
    return str(raised.value)


def test_a_file_is_fetched_recorded_and_not_fetched_again(web, tmp_path):
    path = fetch_data(web, tmp_path, good(DATA))
    assert path.read_bytes() == DATA
    record = {"sha256": hashlib.sha256(DATA).hexdigest(), "size": len(DATA), "url": f"{web.url}/raw.bin"}
    assert json.loads((path.parent / "checksums.json").read_text()) == {"raw.bin": record}
    assert {p.name for p in path.parent.iterdir()} == {".checksums.json.lock", "checksums.json", "raw.bin"}
    fetch_data(web, tmp_path, good(DATA))
    assert web.requests == ["/raw.bin"]


def test_a_download_that_drops_goes_on_where_it_was(web, tmp_path):
    drops = (300_000, 300_000, 5, 5, 5, 300_000)  # more than the tries, but every one gets on
    path = fetch_data(web, tmp_path, ranges(DATA, drops=drops))
    assert path.read_bytes() == DATA
    assert web.requests[:3] == ["/raw.bin from 0", "/raw.bin from 300000", "/raw.bin from 600000"]


def test_a_server_without_ranges_is_asked_from_the_start(web, tmp_path):
    path = fetch_data(web, tmp_path, ranges(DATA, drops=(500_000,), honour=False))
    assert path.read_bytes() == DATA
    assert web.requests == ["/raw.bin from 0"] * 2


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_a_server_that_cannot_say_whether_the_file_changed_is_asked_from_the_start(web, tmp_path, etag):
    path = fetch_data(web, tmp_path, ranges(DATA, etag, drops=(500_000,)))
    assert path.read_bytes() == DATA
    assert web.requests == ["/raw.bin from 0"] * 2


def test_a_server_without_ranges_that_always_drops_is_given_up(web, tmp_path):
    assert "broke" in refused_file(web, tmp_path, ranges(DATA, drops=(500_000,) * 50, honour=False))
    assert len(web.requests) <= 1 + QUICK.tries


def test_a_file_that_changed_between_two_tries_is_fetched_whole(web, tmp_path):
    new = DATA[::-1]
    path = fetch_data(web, tmp_path, in_turn(ranges(DATA, '"1"', drops=(500_000,)), ranges(new, '"2"')))
    assert path.read_bytes() == new


def test_a_kill_in_the_middle_is_gone_on_from(web, tmp_path):
    path, half = tmp_path / "raw" / "raw.bin", len(DATA) // 2
    header = f'HTTP/1.1 200 OK\r\nContent-Length: {len(DATA)}\r\nETag: "1"\r\n\r\n'
    web.pages["/raw.bin"] = drip(header.encode() + DATA[:half], b"", 0.1)
    code = (
        "import sys; from pathlib import Path; from datasets.prepare.fetch import fetch_file\n"
        "fetch_file(sys.argv[1], Path(sys.argv[2]))"
    )
    part = path.with_name("raw.bin.part")
    with subprocess.Popen([sys.executable, "-c", code, f"{web.url}/raw.bin", str(path)], cwd=REPOSITORY) as process:
        while not part.exists() or not part.stat().st_size:
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
    assert not path.exists()
    size = part.stat().st_size
    assert fetch_data(web, tmp_path, ranges(DATA)).read_bytes() == DATA
    assert web.requests[1:] == [f"/raw.bin from {size}"]


def test_a_kill_between_the_last_byte_and_the_name_needs_no_request(web, tmp_path, monkeypatch):
    replace = Path.replace

    def killed(path, name):
        if path.suffix == ".part":
            raise KeyboardInterrupt
        return replace(path, name)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_data(web, tmp_path, ranges(DATA))
    assert fetch_data(web, tmp_path, ranges(DATA)).read_bytes() == DATA
    assert len(web.requests) == 1


def test_a_recorded_file_that_changed_is_refused_with_both_sums(web, tmp_path):
    path = fetch_data(web, tmp_path, good(DATA))
    path.write_bytes(b"changed")
    with pytest.raises(InputError) as raised:
        check_file(path)
    message = str(raised.value)
    for word in (
        str(path),
        hashlib.sha256(DATA).hexdigest(),
        hashlib.sha256(b"changed").hexdigest(),
        "delete the file",
    ):
        assert word in message
    assert message == refused_file(web, tmp_path, good(DATA))
    (path.parent / "checksums.json").write_text("{}")
    check_file(path)


def test_a_file_that_is_not_recorded_is_taken_as_it_is(web, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/raw.bin").write_bytes(b"mine")
    assert fetch_data(web, tmp_path, good(DATA)).read_bytes() == b"mine"
    assert web.requests == []


def test_another_content_than_was_once_recorded_does_not_take_the_files_name(web, tmp_path):
    fetch_data(web, tmp_path, good(DATA)).unlink()
    assert "SHA-256" in refused_file(web, tmp_path, good(b"other"))
    assert not (tmp_path / "raw/raw.bin").exists()


@pytest.mark.parametrize("text", ["[]", '{"raw.bin": {}}', "{"])
def test_damaged_checksums_are_named(web, tmp_path, text):
    path = fetch_data(web, tmp_path, good(DATA))
    (path.parent / "checksums.json").write_text(text)
    with pytest.raises(InputError, match=r"checksums\.json"):
        check_file(path)


def test_a_file_that_cannot_be_had_is_named_with_the_ways_out(web, tmp_path):
    message = refused_file(web, tmp_path, status(404))
    assert message.startswith(f"cannot fetch {web.url}/raw.bin: the server answers 404 Not Found; ")
    assert "--raw_root FOLDER" in message
    assert "--base_url" in message


def test_a_host_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(InputError, match=r"cannot fetch http://nowhere\.example/a: .*Name or service not known"):
        fetch_file("http://nowhere.example/a", tmp_path / "a", say=print, patience=QUICK)


def test_a_gz_that_a_server_calls_compressed_is_kept_as_it_is_and_another_file_is_refused(web, tmp_path):
    data = gzip.compress(DATA)
    assert fetch_data(web, tmp_path, good(data, Content_Encoding="x-gzip"), "raw.gz").read_bytes() == data
    assert "compressed" in refused_file(web, tmp_path, good(data, Content_Encoding="gzip"))


def test_a_full_disk_is_named(web, tmp_path):
    web.pages["/raw.bin"] = good(DATA)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path; from common.cli import run_cli; from datasets.prepare.fetch import fetch_file\n"
        "run_cli(lambda: fetch_file(sys.argv[1], Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, f"{web.url}/raw.bin", str(tmp_path / "raw.bin")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"cannot write {tmp_path / 'raw.bin'}: File too large; free space" in done.stderr
