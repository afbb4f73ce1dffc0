"""HTTP requests and large files: what is tried again, what is refused, what is limited, and what resumes."""

import asyncio
import email.utils
import gzip
import hashlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.picture_server import cut_short, drip, endless, good, in_turn, ranges, redirect, stalled, status
from common.errors import InputError
from datasets.prepare.fetch import check_file, fetch_file
from datasets.prepare.http import Client, FetchError, Policy, is_public, parse_url, retry_after

REPOSITORY = Path(__file__).parent.parent
QUICK = Policy(connect=1, read=0.3, total=0.6, tries=3, backoff=0.01, max_retry_after=0.3)


def get(url: str, max_bytes: int = 10**6, policy: Policy = QUICK, allow_private: bool = True) -> bytes:
    async def run() -> bytes:
        async with Client(policy, allow_private=allow_private) as client:
            return await client.get(url, max_bytes)

    return asyncio.run(run())


def get_page(web, page, max_bytes: int = 10**6) -> bytes:
    web.pages["/a"] = page
    return get(f"{web.url}/a", max_bytes)


def error_of(web, page, max_bytes: int = 10**6) -> FetchError:
    with pytest.raises(FetchError) as raised:
        get_page(web, page, max_bytes)
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
    assert get_page(web, in_turn(page, good(b"whole"))) == b"whole"
    assert web.requests == ["/a", "/a"]
    error = error_of(web, page)
    assert str(error).startswith(reason)
    assert not error.gone
    assert len(web.requests) == 2 + QUICK.tries


@pytest.mark.parametrize(("code", "gone"), [(404, True), (403, False)])
def test_a_lasting_answer_is_not_tried_again(web, code, gone):
    error = error_of(web, status(code))
    assert (error.gone, len(web.requests)) == (gone, 1)


def test_retry_after_is_seconds_or_a_date_and_respected_up_to_a_limit(web):
    started = time.monotonic()
    assert get_page(web, in_turn(status(503, Retry_After="3600"), good(b"whole"))) == b"whole"
    assert time.monotonic() - started >= QUICK.max_retry_after
    assert retry_after("7") == 7
    assert 35 < retry_after(email.utils.formatdate(time.time() + 40, usegmt=True)) <= 40
    assert retry_after(email.utils.formatdate(time.time() - 40)) == 0
    assert [retry_after(nonsense) for nonsense in ("", "soon", "-5", "9" * 30)] == [0, 0, 0, 0]


def test_a_host_is_given_up_after_many_urls_without_an_answer_and_other_hosts_are_not(web, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("datasets.prepare.http.MAX_SILENT", 2)
    web.pages["/a"] = good(b"whole")

    async def run() -> bytes:
        async with Client(QUICK, allow_private=True) as client:
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
    [good(bytes(1001)), good(gzip.compress(bytes(10**5)), Content_Encoding="gzip"), endless(bytes(100))],
    ids=["by its length", "decompressed", "streamed"],
)
def test_more_bytes_than_allowed_are_refused(web, page):
    error = error_of(web, page, 1000)
    assert "more than 1,000" in str(error)
    assert not error.again
    assert get_page(web, good(gzip.compress(bytes(1000)), Content_Encoding="gzip"), 1000) == bytes(1000)


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
        async with Client(QUICK, per_second=50, allow_private=True) as client:

            async def work() -> None:
                for _ in range(5):
                    await client.get(f"{web.url}/a", 100)

            await asyncio.gather(work(), work())

    started = time.monotonic()
    asyncio.run(run())
    assert (len(web.requests), len(connections)) == (10, 2)
    assert time.monotonic() - started >= 9 / 50


# --------------------------------------------------------------------------------- redirects, proxies, addresses


def test_a_redirect_is_followed_without_reading_its_body(web):
    web.pages["/b"] = good(b"whole")
    assert get_page(web, redirect("/b", 308)) == b"whole"
    assert get_page(web, endless(bytes(10**5), 302, Location=f"{web.url}/b")) == b"whole"


def test_a_redirect_to_another_scheme_from_https_to_http_or_without_end_is_refused(web):
    error = error_of(web, redirect("file:///etc/hostname"))
    assert str(error).startswith("a redirect to file:///etc/hostname: file: is not fetched")
    assert len(web.requests) == 1
    with pytest.raises(FetchError, match="a redirect to http://b/c: from https to http"):
        parse_url("http://b/c", origin=httpx.URL("https://a/b"))
    assert parse_url("//b/c", origin=httpx.URL("https://a/b")) == "https://b/c"
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
    fetch_file(f"{web.url}/{name}", path, log=lambda line: None, policy=QUICK)
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


@pytest.mark.parametrize(
    "page",
    [
        ranges(DATA, drops=(500_000,), honour=False),
        ranges(DATA, None, (500_000,)),
        ranges(DATA, 'W/"weak"', (500_000,)),
    ],
    ids=["no ranges", "no ETag", "weak ETag"],
)
def test_a_download_that_cannot_resume_safely_starts_again(web, tmp_path, page):
    assert fetch_data(web, tmp_path, page).read_bytes() == DATA
    assert web.requests == ["/raw.bin from 0"] * 2
    always = ranges(DATA, drops=(500_000,) * 50, honour=False)
    assert "cut short" in file_error(web, tmp_path, always, "other.bin")  # given up, as no try gets further


@pytest.mark.parametrize(
    "second", [ranges(DATA[::-1], '"2"'), in_turn(status(416), good(DATA[::-1]))], ids=["ETag", "416"]
)
def test_a_file_that_changed_between_two_tries_is_fetched_from_the_start(web, tmp_path, second):
    path = fetch_data(web, tmp_path, in_turn(ranges(DATA, '"1"', drops=(500_000,)), second, second))
    assert path.read_bytes() == DATA[::-1]


@pytest.mark.slow
def test_a_killed_download_resumes(web, tmp_path):
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


def test_a_kill_before_a_complete_file_gets_its_name_needs_no_request(web, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("datasets.prepare.fetch._record", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_data(web, tmp_path, ranges(DATA))
    assert fetch_data(web, tmp_path, ranges(DATA)).read_bytes() == DATA
    assert len(web.requests) == 1


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


@pytest.mark.parametrize("text", ["[]", '{"raw.bin": {}}'])
def test_damaged_checksums_are_named(tmp_path, text):
    (tmp_path / "raw.bin").touch()
    (tmp_path / "checksums.json").write_text(text)
    with pytest.raises(InputError, match=r"checksums\.json.*delete it"):
        check_file(tmp_path / "raw.bin")


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


@pytest.mark.slow
def test_a_full_disk_is_named(web, tmp_path):
    web.pages["/raw.bin"] = good(DATA)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "from pathlib import Path; from common.cli import run_cli; from datasets.prepare.fetch import fetch_file\n"
        "run_cli(lambda: fetch_file(sys.argv[1], Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, f"{web.url}/raw.bin", str(tmp_path / "raw.bin")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"cannot write {tmp_path / 'raw.bin'}: File too large; free space" in done.stderr
