"""GET requests with httpx: retried, rate limited, bounded in time and size, and kept off private networks.

httpx limits a single read, not a request, follows any redirect and connects to any address. So the total time limit,
the redirects, the retries and the address check are written here. Large files are resumed after a kill and verified.
"""

import asyncio
import email.utils
import ipaddress
import os
import random
import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpcore
import httpx
from filelock import FileLock
from isal import igzip, isal_zlib
from tqdm import tqdm

from common.errors import InputError
from common.files import cannot_write, read_json, sha256, write_json

MAX_REDIRECTS = 5
MAX_SILENT = 50  # URLs of a host that fail in a row without an answer, before the host is given up
HEADERS = {"User-Agent": "fMRLRec", "Accept-Encoding": "identity"}
NAT64 = ipaddress.ip_network("64:ff9b::/96")

T = TypeVar("T")


@dataclass(frozen=True)
class Policy:
    """Time limits in seconds, and retries."""

    connect: float = 10.0
    read: float = 15.0  # between two bytes
    total: float = 60.0  # for a request and its answer; fetch_file: for each CHUNK of the answer
    tries: int = 5
    backoff: float = 0.5  # before the second try; doubles for every further one, with jitter
    max_retry_after: float = 60.0  # a longer Retry-After is shortened to this


POLICY = Policy()


class FetchError(Exception):
    """Why a URL could not be fetched. gone: the server says that it does not exist. again: another try may succeed,
    at the earliest after `after` seconds."""

    def __init__(self, reason: str, *, gone: bool = False, again: bool = False, after: float = 0.0) -> None:
        super().__init__(reason)
        self.gone, self.again, self.after = gone, again, after


class Client:
    """An HTTP client for many tasks at once; use as `async with`. per_second: limit on requests started in a second.
    allow_private: connect to private and reserved addresses too. Raises InputError for an unusable proxy."""

    def __init__(self, policy: Policy = POLICY, per_second: float | None = None, allow_private: bool = False) -> None:
        self.policy, self.allow_private = policy, allow_private
        self._interval, self._next_turn = 1 / per_second if per_second else 0.0, 0.0
        self._silent: Counter[str] = Counter()  # host -> URLs that failed since its last answer
        self._ssl = httpx.create_ssl_context()
        self._clients: dict[
            Any, httpx.AsyncClient
        ] = {}  # task -> its own: httpx scans all connections of a client often

    def _client(self) -> httpx.AsyncClient:
        task = asyncio.current_task()
        if task not in self._clients:
            timeout = httpx.Timeout(self.policy.read, connect=self.policy.connect, pool=None)
            try:
                client: Any = httpx.AsyncClient(timeout=timeout, verify=self._ssl, headers=HEADERS)
            except (ImportError, ValueError, httpx.InvalidURL) as error:
                hint = "set http_proxy, https_proxy and all_proxy to http:// addresses, or unset them"
                raise InputError(f"a proxy of the environment cannot be used ({error}); {hint}") from None
            pool = client._transport._pool  # for requests without a proxy; httpx has no public way to reach it
            pool._network_backend = _CheckedConnections(pool._network_backend, self.allow_private)
            self._clients[task] = client
        return self._clients[task]

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in list(self._clients.values()):
            await client.aclose()

    async def get(self, url: str, max_bytes: int) -> bytes:
        """Return the body. Raises FetchError after all tries, or at once for a host that was given up."""
        host = parse_url(url).host
        if self._silent[host] >= MAX_SILENT:
            reason = f"not tried, as {host} did not answer for {MAX_SILENT} others"
            raise FetchError(f"{reason}; check the network and the proxy, and run this again")
        try:
            return await self.retry(lambda: self._get(url, max_bytes))
        except FetchError as error:
            self._silent[host] += error.again
            raise

    async def _get(self, url: str, max_bytes: int) -> bytes:
        async with self.stream(url) as (response, _):
            check_status(response, self.policy)
            if (encoding := response.headers.get("Content-Encoding", "gzip")) not in ("gzip", "deflate", "identity"):
                raise FetchError(f"the answer is compressed as {printable(encoding)}, which was not asked for")
            return b"".join([chunk async for chunk in limited(response, response.aiter_bytes(), max_bytes)])

    async def retry(self, attempt: Callable[[], Awaitable[T]], progress: Callable[[], int] = lambda: 0) -> T:
        """Return attempt(), repeated while its FetchError says that another try may succeed. The count of tries
        restarts whenever `progress()` exceeds its maximum so far."""
        tries, best = 0, progress()
        while True:
            try:
                return await attempt()
            except FetchError as error:
                if progress() > best:
                    tries, best = 0, progress()
                tries += 1
                if not error.again or tries >= self.policy.tries:
                    raise
                wait = self.policy.backoff * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
                await asyncio.sleep(max(wait, error.after))

    @asynccontextmanager
    async def stream(
        self, url: str, headers: dict[str, str] | None = None
    ) -> AsyncIterator[tuple[httpx.Response, asyncio.Timeout]]:
        """Yield the response after all redirects, its body unread, and the running time limit. A failure of the network
        inside the block is raised as FetchError."""
        target = parse_url(url)
        try:
            async with asyncio.timeout(None) as limit:
                for _ in range(MAX_REDIRECTS + 1):
                    limit.reschedule(None)  # waiting for a turn does not count
                    await self._wait_for_turn()
                    limit.reschedule(asyncio.get_running_loop().time() + self.policy.total)
                    look_up(target.raw_host.decode(), self.allow_private, socket.AI_NUMERICHOST)
                    async with self._client().stream("GET", target, headers=headers) as response:
                        self._silent[target.host] = 0
                        if not response.has_redirect_location:
                            yield response, limit
                            return
                        target = parse_url(response.headers["Location"], origin=target)
                raise FetchError(f"more than {MAX_REDIRECTS} redirects")
        except TimeoutError:
            raise FetchError(f"too slow: not finished within {self.policy.total:g} s", again=True) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _network_error(error, self.policy) from None

    async def _wait_for_turn(self) -> None:
        now = asyncio.get_running_loop().time()
        turn = max(now, self._next_turn)
        self._next_turn = turn + self._interval
        await asyncio.sleep(turn - now)


class _CheckedConnections(httpcore.AsyncNetworkBackend):
    """Looks a host up, checks its addresses and connects to these; a second look-up could give others."""

    def __init__(self, backend: httpcore.AsyncNetworkBackend, allow_private: bool) -> None:
        self._backend, self._allow_private = backend, allow_private

    async def connect_tcp(self, host: str, *arguments: Any, **options: Any) -> Any:
        addresses = await _in_daemon_thread(look_up, host, self._allow_private)
        for address in addresses:
            try:
                return await self._backend.connect_tcp(address, *arguments, **options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if address == addresses[-1]:
                    raise


def look_up(host: str, allow_private: bool, flags: int = 0) -> list[str]:
    """Return a host's addresses. Raises FetchError for private ones. With flags AI_NUMERICHOST names have no address,
    but every notation of an address has (127.1, 0x7f000001): all that can be checked if a proxy looks names up."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:
        if flags:
            return []
        raise FetchError(f"no connection ({error})", again=isinstance(error, OSError)) from None
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    private = [address for address in addresses if not is_public(address)]
    if private and not allow_private:
        hint = "give --allow_private_addresses to fetch from it"
        raise FetchError(f"{printable(host)} has the private or reserved address {private[0]}; {hint}")
    return addresses


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet. An IPv4 address within an IPv6 address counts as itself."""
    ip: Any = ipaddress.ip_address(address)
    if ip.version == 6:
        inner = ipaddress.IPv4Address(ip.packed[-4:]) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
        ip = ip if inner is None else inner
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False))


async def _in_daemon_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Return function(*arguments). With asyncio.to_thread, Ctrl-C would wait for a name server that does not answer."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised again by `await`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


# ------------------------------------------------------------------------------------------------ URLs and answers


def parse_url(text: str, origin: httpx.URL | None = None) -> httpx.URL:
    """Return an http(s) URL with a host, or the target of a redirect from `origin`. Raises FetchError for other URLs,
    and for redirects from https to http."""
    redirect = f"a redirect to {printable(text)}: " if origin else ""
    try:
        url = origin.join(text) if origin else httpx.URL(text)
        host = url.host  # decodes it, which may fail
    except (httpx.InvalidURL, UnicodeError) as error:
        raise FetchError(f"{redirect}not a valid URL ({printable(error)})") from None
    if url.scheme not in ("http", "https"):
        kind = f"{printable(url.scheme)}:" if url.scheme else "a URL without a scheme"
        raise FetchError(f"{redirect}{kind} is not fetched, only http and https are")
    if not host:
        raise FetchError(f"{redirect}not a valid URL (it names no host)")
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise FetchError(f"{redirect}not a valid URL (port {url.port}; ports are 1 to 65535)")
    if origin and origin.scheme == "https" and url.scheme == "http":
        raise FetchError(f"{redirect}from https to http is not followed")
    return url


def check_status(response: httpx.Response, policy: Policy) -> None:
    """Raises FetchError for any status but 200."""
    status = response.status_code
    if status != 200:
        raise FetchError(
            f"the server answers {status} {httpx.codes.get_reason_phrase(status)}".rstrip(),
            gone=status in (404, 410),
            again=status == 429 or status >= 500,
            after=min(retry_after(response.headers.get("Retry-After", "")), policy.max_retry_after),
        )


def retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header asks to wait; it holds seconds or a date."""
    if re.fullmatch(r"[0-9]{1,10}", value.strip()):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (ValueError, IndexError, OverflowError):
        return 0.0
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def content_length(response: httpx.Response) -> int | None:
    value = response.headers.get("Content-Length")
    return int(value) if value and "Transfer-Encoding" not in response.headers else None


async def limited(response: httpx.Response, chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the chunks of a body. Raises FetchError for more than `max_bytes`, and at once if the length says so."""
    count = content_length(response) or 0
    if count > max_bytes:
        raise FetchError(f"{count:,} bytes, more than {max_bytes:,}")
    count = 0
    async for chunk in chunks:
        count += len(chunk)
        if count > max_bytes:
            raise FetchError(f"more than {max_bytes:,} bytes")
        yield chunk


def _network_error(error: httpx.HTTPError | httpx.InvalidURL, policy: Policy) -> FetchError:
    if isinstance(error, httpx.ConnectTimeout):
        return FetchError(f"no connection within {policy.connect:g} s", again=True)
    if isinstance(error, httpx.TimeoutException):
        return FetchError(f"no answer within {policy.read:g} s", again=True)
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    system = isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and cause.errno
    words = printable((os.strerror(system) if system else str(cause)) or type(cause).__name__)
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return FetchError(f"no connection ({words})", again=True)
    if isinstance(error, httpx.LocalProtocolError | httpx.InvalidURL):
        return FetchError(f"not a valid request ({words})")
    return FetchError(f"the answer was cut short or is invalid ({words})", again=True)


def printable(value: Any) -> str:
    """Return a URL or message of foreign origin as ASCII of at most 200 characters, for messages and JSON."""
    text = re.sub(r"[\x00-\x1f\x7f]", "?", str(value).encode("ascii", "backslashreplace").decode())
    return text if len(text) <= 200 else f"{text[:197]}..."


# ---------------------------------------------------------------------------------------------------------------- fetch
# Fetch large files: resumed after a kill, verified, and recorded by their SHA-256.

MAX_FILE_BYTES = 100 * 10**9
CHUNK = 1 << 18  # bytes that must arrive within Policy.total
CHECKSUMS = "checksums.json"


def fetch_file(url: str, path: Path, *, log: Callable[[str], None] = print, policy: Policy = POLICY) -> None:
    """Download `url` to `path`; a file that exists is only verified.

    The bytes arrive in `path`.part. A later call resumes them if the server supports it (Range, If-Range). A .gz must
    decompress without an error before it gets its name. SHA-256, size and URL are recorded in checksums.json beside
    the file. Raises InputError if the URL fails, the content differs from the record, or the disk cannot be written.
    """
    path = Path(path)
    if path.exists():
        check_file(path)
        return
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = _resumable(part, url)[0]
        log(f"fetching {printable(url)} to {path}" + (f", from byte {start:,} on" if start else ""))
        asyncio.run(_download(url, part, policy))
        if path.suffix == ".gz":
            _check_gzip(part)
        _record(path, part, url)
        part.replace(path)
        _state(part).unlink(missing_ok=True)
    except FetchError as error:
        raise InputError(
            f"cannot fetch {printable(url)}: {error}; try again later, give --raw_root FOLDER if the file is there "
            f"already (as {path.name}), or --base_url another location"
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from error


def check_file(path: Path) -> str:
    """Return a file's SHA-256. Raises InputError if checksums.json beside it records another one."""
    return _verify(path, path, _checksums(path.parent))


def _verify(path: Path, content: Path, records: dict[str, dict[str, Any]]) -> str:
    found, recorded = sha256(content), records.get(path.name)
    if recorded and found != recorded["sha256"]:
        raise InputError(
            f"{path} has SHA-256 {found}, but {path.parent / CHECKSUMS} records {recorded['sha256']}; delete the file "
            f"to fetch it again, or remove its entry from {CHECKSUMS} if the change is intended"
        )
    return found


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    path, hint = folder / CHECKSUMS, "delete it: the files are then used unverified"
    records = read_json(path, hint) if path.exists() else {}
    if not all(isinstance(r, dict) and isinstance(r.get("sha256"), str) for r in records.values()):
        raise InputError(f"{path} does not map file names to a sha256; {hint}")
    return records


def _record(path: Path, part: Path, url: str) -> None:
    """Record a file before it gets its name, so that a kill in between leaves no unrecorded file."""
    with FileLock(path.with_name(f".{CHECKSUMS}.lock")):  # another process may fetch other files
        records = _checksums(path.parent)
        entry = {"sha256": _verify(path, part, records), "size": part.stat().st_size, "url": url}
        write_json(path.parent / CHECKSUMS, records | {path.name: entry})


def _check_gzip(part: Path) -> None:
    try:
        with igzip.open(part) as file:
            while file.read(1 << 20):
                pass
    except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]  # typed as an instance, is a class
        part.unlink()
        raise FetchError(f"the server sent no intact gzip file ({error})") from None


async def _download(url: str, part: Path, policy: Policy) -> None:
    def progress() -> int:
        return part.stat().st_size if part.exists() else 0

    with tqdm(desc=part.stem, unit="B", unit_scale=True, disable=None) as bar:
        async with Client(policy, allow_private=True) as client:  # the user chose this server
            await client.retry(lambda: _fetch_part(client, url, part, bar), progress)


async def _fetch_part(client: Client, url: str, part: Path, bar: tqdm) -> None:
    """Make one attempt, from the end of `part` if the server supports it."""
    start, state = _resumable(part, url)
    if start and start == state["size"]:
        return  # a kill between the last byte and the file's name
    headers = {"Range": f"bytes={start}-", "If-Range": state["validator"]} if start else {}
    async with client.stream(url, headers) as (response, time_limit):
        if start and response.status_code in (206, 416):
            rest = rf"bytes {start}-\d+/(\*|{state['size']})"
            if response.status_code == 416 or not re.fullmatch(rest, response.headers.get("Content-Range", "")):
                _state(part).unlink()
                raise FetchError("the server no longer has the file that it began to send", again=True)
        else:
            check_status(response, client.policy)
            start, state = 0, _begin(response, part, url)
        bar.reset(state["size"])
        bar.update(start)
        received = 0
        with part.open("r+b") as file:
            file.seek(start)
            async for chunk in limited(response, response.aiter_raw(), MAX_FILE_BYTES - start):
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))
                received += len(chunk)
                if received >= CHUNK:
                    time_limit.reschedule(asyncio.get_running_loop().time() + client.policy.total)
                    received = 0
            os.fsync(file.fileno())


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _resumable(part: Path, url: str) -> tuple[int, dict[str, Any]]:
    """Return how many bytes of `url` lie in `part`, and the size and validator that the server gave."""
    try:
        state, size = read_json(_state(part), ""), part.stat().st_size
    except (InputError, FileNotFoundError):
        return 0, {}
    fits = state.get("url") == url and state.get("validator") and size <= (state.get("size") or size)
    return (size, state) if fits else (0, {})


def _begin(response: httpx.Response, part: Path, url: str) -> dict[str, Any]:
    """Create an empty `part`, and beside it what the server says of the whole file."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity" and part.suffixes[-2:-1] != [".gz"]:  # some servers describe a .gz file itself so
        raise FetchError(f"the answer is compressed as {printable(encoding)}, which was not asked for")
    etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    validator = etag if etag.startswith('"') else modified  # If-Range takes no weak ETag
    state = {"url": url, "size": content_length(response), "validator": validator}
    _state(part).unlink(missing_ok=True)  # first, so that no kill leaves it beside the bytes of another file
    part.write_bytes(b"")
    write_json(_state(part), state)
    return state
