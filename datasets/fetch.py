"""Polite GETs for raw files and pictures: bounded in time and size, tried again, and no other scheme than http(s)."""

import email.utils
import os
import random
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

from config import InputError
from datasets.files import cannot_write, read_json, sha256, write_json

MAX_REDIRECTS = 5
MAX_FILE_BYTES = 100 * 10**9
CHUNK = 1 << 18  # bytes read at once; fetch_file's deadline is for one
CHECKSUMS = "checksums.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds, and how often to try."""

    connect: float = 10.0
    read: float = 15.0  # without a byte
    attempt: float = 60.0  # a whole answer; in fetch_file each CHUNK, so that 4 kB/s is the slowest that is waited for
    tries: int = 5
    backoff: float = 0.5  # before the second try; doubled before every further one, with jitter
    longest: float = 60.0  # that a server's Retry-After is followed for


PATIENCE = Patience()


class FetchError(Exception):
    """Why a URL gave nothing. gone: the server says that there is no such thing. again: another try may help, in
    `after` seconds at the earliest."""

    def __init__(self, why: str, *, gone: bool = False, again: bool = False, after: float = 0.0) -> None:
        super().__init__(why)
        self.gone, self.again, self.after = gone, again, after


class Fetcher:
    """GETs that many threads may make at once, each on connections of its own. per_second: requests that start in a
    second, over all threads; None does not limit them. `stop` (an Event) ends waits and downloads early. answered:
    whether any server ever answered; unreached: URLs that were given up before one did."""

    def __init__(self, patience: Patience = PATIENCE, per_second: float | None = None) -> None:
        self.patience, self.stop = patience, threading.Event()
        self.answered, self.unreached = False, 0
        self._interval = 1 / per_second if per_second else 0.0
        self._next, self._lock, self._local = 0.0, threading.Lock(), threading.local()

    def get(self, url: str, max_bytes: int) -> bytes:
        """The body. Raises FetchError with the reason, after all tries."""
        try:
            return self.retry(lambda: self._get(url, max_bytes))
        except FetchError as error:
            with self._lock:
                self.unreached += error.again and not self.answered
            raise

    def _get(self, url: str, max_bytes: int) -> bytes:
        with self.open(url) as (response, _):
            _check_status(response, self.patience)
            data = b"".join(self.body(response, max_bytes))
            encoding = _content_encoding(response)
        return data if not encoding else _decoded(data, encoding, max_bytes)

    def retry(self, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """attempt(), again while it raises a FetchError that another try may mend. Tries are counted from the start
        again when `progress()` has become more."""
        tries, best = 0, progress()
        while True:
            try:
                return attempt()
            except FetchError as error:
                if progress() > best:
                    tries, best = 0, progress()
                tries += 1
                if not error.again or tries >= self.patience.tries:
                    raise
                wait = self.patience.backoff * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
                self._wait(max(wait, error.after))

    @contextmanager
    def open(self, url: str, headers: dict[str, str] | None = None) -> Iterator[tuple[Any, "_Deadline"]]:
        """The response at the end of the redirects, its body not read yet, and the attempt's deadline. Whatever fails
        until the block ends is raised as FetchError."""
        import requests
        import urllib3

        deadline = _watched.deadline = _Deadline()
        try:
            response = self._follow(_checked(url), headers or {}, deadline)
            with response:
                yield response, deadline
            if deadline.expired:  # a connection that was shut down looks like the end of a body without a length
                raise _too_slow(self.patience)
        except (FetchError, requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError) as error:
            if deadline.expired:
                raise _too_slow(self.patience) from None
            raise error if isinstance(error, FetchError) else _failure(error, self.patience) from None
        finally:
            deadline.end()

    def _follow(self, url: str, headers: dict[str, str], deadline: "_Deadline") -> Any:
        import requests

        session = self._session()
        for _ in range(MAX_REDIRECTS + 1):
            self._take_turn()
            deadline.restart(self.patience.attempt)
            response = session.get(
                url,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(self.patience.connect, self.patience.read),
            )
            self.answered = True
            target = requests.Session.get_redirect_target(session, response)
            if target is None:
                return response
            response.close()
            url = redirected(url, target)
        raise FetchError(f"more than {MAX_REDIRECTS} redirects")

    def body(self, response: Any, max_bytes: int) -> Iterator[bytes]:
        """The body's bytes as they come over the line, in chunks; refused where more than `max_bytes`, or fewer than
        the Content-Length, come."""
        expected, count = _content_length(response), 0
        if expected is not None and expected > max_bytes:
            raise FetchError(f"{expected:,} bytes, more than {max_bytes:,}")
        while chunk := response.raw.read(CHUNK, decode_content=False):
            count += len(chunk)
            if count > max_bytes:
                raise FetchError(f"more than {max_bytes:,} bytes")
            if self.stop.is_set():
                raise FetchError("interrupted")
            yield chunk
        if expected is not None and count < expected:
            raise _cut_short()

    def _take_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        self._wait(turn - now)

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds) if seconds > 0 else self.stop.is_set():
            raise FetchError("interrupted")

    def _session(self) -> Any:
        if not hasattr(self._local, "session"):
            self._local.session = _new_session()
        return self._local.session


# ------------------------------------------------------------------------------------------------------ what is refused


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise FetchError(f"no valid URL ({error})") from None
    if parts.scheme.lower() not in ("http", "https"):
        kind = f"{shown(parts.scheme)}:" if parts.scheme else "a URL without a scheme"
        raise FetchError(f"{kind} is not fetched, only http and https are")
    if not host:
        raise FetchError("no valid URL (it names no host)")
    return url


def redirected(url: str, location: str) -> str:
    """Where a redirect leads. Raises FetchError for a scheme other than http(s), and for one from https to http."""
    try:
        target = urljoin(url, location)
    except ValueError as error:
        raise FetchError(f"a redirect to no valid URL ({error})") from None
    try:
        _checked(target)
    except FetchError as error:
        raise FetchError(f"a redirect to {shown(target)}: {error}") from None
    if url.lower().startswith("https:") and not target.lower().startswith("https:"):
        raise FetchError(f"a redirect from https to {shown(target)} is not followed")
    return target


def _check_status(response: Any, patience: Patience) -> None:
    status = response.status_code
    if status == 200:
        return
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    raise FetchError(
        f"the server answers {status} {phrase}".rstrip(),
        gone=status in (404, 410),
        again=status == 429 or status >= 500,
        after=_retry_after(response.headers.get("Retry-After", ""), patience.longest),
    )


def _retry_after(value: str, longest: float) -> float:
    """Seconds; the header has seconds or a date."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        seconds = float(value)
    else:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except (ValueError, IndexError, OverflowError):
            return 0.0
        now = datetime.now(UTC)
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()
    return min(max(seconds, 0.0), longest)


def _content_length(response: Any) -> int | None:
    value = response.headers.get("Content-Length", "").strip()
    chunked = response.headers.get("Transfer-Encoding")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 and not chunked else None


def _content_encoding(response: Any) -> str:
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def _decoded(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body of a server that compresses unasked, `max_bytes` at most."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError(f"the answer is compressed as {shown(encoding)}, which was not asked for")
    decompress = zlib.decompressobj(wbits=47)  # gzip and zlib
    try:
        decoded = decompress.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise FetchError(f"the answer's {encoding} is damaged ({error})", again=True) from None
    if len(decoded) > max_bytes:
        raise FetchError(f"more than {max_bytes:,} bytes, decompressed")
    if not decompress.eof:
        raise _cut_short()
    return decoded


def _cut_short() -> FetchError:
    return FetchError("the answer was cut short", again=True)


def _too_slow(patience: Patience) -> FetchError:
    return FetchError(f"too slow: no end within {patience.attempt:g} s", again=True)


def _failure(error: Exception, patience: Patience) -> FetchError:
    """A library's error in words that are the same for the same cause."""
    import requests
    import urllib3

    if isinstance(error, requests.ConnectTimeout):
        return FetchError(f"no connection within {patience.connect:g} s", again=True)
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return FetchError(f"no answer within {patience.read:g} s", again=True)
    cause = error.args[0] if error.args else error
    cause = getattr(cause, "reason", None) or cause
    words = re.sub(r"<[^>]* object at 0x[0-9a-fA-F]+>:? ?|\w+\(host=.*?\): ", "", str(cause))
    words = re.sub(r"\s+", " ", words).strip()[:200] or type(error).__name__
    bad_url = urllib3.exceptions.LocationValueError | requests.exceptions.InvalidURL | UnicodeError
    if isinstance(error, bad_url):
        return FetchError(f"no valid URL ({words})")
    if urllib3.exceptions.ProtocolError in (type(error), type(cause)):
        return FetchError("the connection broke before the answer was whole", again=True)
    again = isinstance(error, requests.ConnectionError | urllib3.exceptions.HTTPError)
    return FetchError(f"no connection ({words})" if again else words, again=again)


def shown(url: Any) -> str:
    """A URL from anywhere, fit for a message and for JSON."""
    text = str(url).encode("ascii", "backslashreplace").decode()
    text = re.sub(r"[\x00-\x1f\x7f]", "?", text)
    return text if len(text) <= 200 else text[:197] + "..."


# ------------------------------------------------------------------------------------------------------------ deadlines
# A timeout of the socket is for one recv: a server that sends a byte now and then would hold a thread for days. So a
# timer shuts the attempt's socket down, whatever is being read: the TLS handshake, headers, chunk sizes or the body.

_watched = threading.local()  # deadline: of the attempt that this thread makes


class _Deadline:
    def __init__(self) -> None:
        self.expired, self._socket, self._lock = False, None, threading.Lock()
        self._timer = threading.Timer(0, self._expire)

    def restart(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, connected: socket.socket) -> None:
        """Of this socket. A duplicate is kept, since the libraries wrap and close theirs."""
        twin = socket.socket(fileno=os.dup(connected.fileno()))
        with self._lock:
            old, self._socket = self._socket, twin
        if old is not None:
            old.close()
        if self.expired:
            self._expire()

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


class _Watched:
    """Of a urllib3 connection: its sockets are under the deadline of the attempt that uses them."""

    def _new_conn(self) -> socket.socket:
        connected = super()._new_conn()
        _watched.deadline.watch(connected)
        return connected

    def getresponse(self, *args: Any, **kwargs: Any) -> Any:
        if self.sock is not None:
            _watched.deadline.watch(self.sock)
        return super().getresponse(*args, **kwargs)


def _new_session() -> Any:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool

    pools = {}
    for scheme, pool in (("http", HTTPConnectionPool), ("https", HTTPSConnectionPool)):
        connection = type("Connection", (_Watched, pool.ConnectionCls), {})
        pools[scheme] = type("Pool", (pool,), {"ConnectionCls": connection})

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = pools

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            manager.pool_classes_by_scheme = pools
            return manager

    class Session(requests.Session):
        def get_redirect_target(self, response: Any) -> None:
            """Of no use to requests, which would read the redirect's whole body."""

    session = Session()
    session.headers.update({"User-Agent": "fMRLRec", "Accept": "*/*", "Accept-Encoding": "identity"})
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session


# ---------------------------------------------------------------------------------------------------------- large files


def fetch_file(
    url: str,
    path: Path,
    *,
    say: Callable[[str], None] = print,
    patience: Patience = PATIENCE,
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Download `url` to `path`, which is whole or absent; a file that is there is checked and kept. What a kill or a
    drop leaves in `path`.part is gone on with where the server can (Range, If-Range). The bytes are kept as they are
    sent. Their SHA-256, size and URL are recorded in checksums.json beside the file.

    Raises InputError where the URL cannot be had, the file is not what was recorded, or the disk cannot be written.
    """
    path = Path(path)
    if path.exists():
        check_file(path)
        return
    part, fetcher = path.with_name(f"{path.name}.part"), Fetcher(patience)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = _resumable(part, url)[0]
        say(f"fetching {shown(url)} to {path}" + (f", from byte {start:,} on" if start else ""))
        with tqdm(desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
            furthest = [start]
            fetcher.retry(lambda: _fetch_part(fetcher, url, part, max_bytes, bar, furthest), lambda: furthest[0])
        _record(path, part, url)
        part.replace(path)
        _state(part).unlink(missing_ok=True)
    except FetchError as error:
        raise InputError(
            f"cannot fetch {shown(url)}: {error}; try again later, give --raw_root FOLDER if the file is there "
            f"already (as {path.name}), or --base_url another location"
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from error


def check_file(path: Path) -> None:
    """Raises InputError where checksums.json beside a file records another content than it has."""
    record = _checksums(path.parent).get(path.name)
    if record is not None:
        _compare(path, sha256(path), record)


def _compare(path: Path, found: str, record: dict[str, Any]) -> None:
    if found != record["sha256"]:
        raise InputError(
            f"{path} has SHA-256 {found}, but {path.parent / CHECKSUMS} records {record['sha256']}; delete the file to "
            f"fetch it again, or take its entry out of {CHECKSUMS} if the change was wanted"
        )


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    mends = "delete it: the files are then taken as they are"
    records = read_json(path, mends)
    if not isinstance(records, dict) or not all(
        isinstance(r, dict) and isinstance(r.get("sha256"), str) for r in records.values()
    ):
        raise InputError(f"{path} does not map names to a sha256; {mends}")
    return records


def _record(path: Path, part: Path, url: str) -> None:
    """Record what was fetched, before it takes its name: a kill in between is mended by the next run."""
    records, found = _checksums(path.parent), sha256(part)
    if path.name in records:
        _compare(part, found, records[path.name])
    records[path.name] = {"sha256": found, "size": part.stat().st_size, "url": url}
    write_json(path.parent / CHECKSUMS, records)


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _resumable(part: Path, url: str) -> tuple[int, dict[str, Any]]:
    """How many bytes of `url` lie in `part`, and what the server said of the whole: its validator and size."""
    if not part.exists() or not _state(part).exists():
        return 0, {}
    try:
        state = read_json(_state(part), "")
    except InputError:
        return 0, {}
    size = part.stat().st_size
    if not isinstance(state, dict) or state.get("url") != url or not state.get("validator"):
        return 0, {}
    return (size, state) if state.get("size") is None or size <= state["size"] else (0, {})


def _fetch_part(fetcher: Fetcher, url: str, part: Path, max_bytes: int, bar: tqdm, furthest: list[int]) -> None:
    """One attempt: from where `part` ends, if the server can, to the end."""
    start, state = _resumable(part, url)
    if start and start == state["size"]:
        return  # a kill between the last byte and the file's name
    headers = {"Range": f"bytes={start}-", "If-Range": state["validator"]} if start else {}
    with fetcher.open(url, headers) as (response, deadline):
        if start and response.status_code == 206:
            got = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            if not got or int(got[1]) != start or got[2] not in ("*", str(state["size"])):
                _state(part).unlink()
                raise FetchError("the server continues another file than it began", again=True)
        elif start and response.status_code == 416:
            _state(part).unlink()
            raise FetchError("the server does not have the rest of what it began", again=True)
        else:
            _check_status(response, fetcher.patience)
            start, state = 0, _begin(response, part, url)
        bar.total = state["size"]
        bar.n = bar.last_print_n = start
        bar.refresh()
        with part.open("r+b") as file:
            file.seek(start)
            for chunk in fetcher.body(response, max_bytes - start):
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))
                furthest[0] = max(furthest[0], file.tell())
                deadline.restart(fetcher.patience.attempt)
            os.fsync(file.fileno())


def _begin(response: Any, part: Path, url: str) -> dict[str, Any]:
    """An empty `part`, and beside it what the server says of the whole file."""
    encoding = _content_encoding(response)
    if encoding and part.suffixes[-2:-1] != [".gz"]:  # of a .gz some servers say so, and mean the file itself
        raise FetchError(f"the answer is compressed as {shown(encoding)}, which was not asked for")
    etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    validator = etag if etag.startswith('"') else modified  # If-Range takes no weak ETag
    state = {"url": url, "size": _content_length(response), "validator": validator}
    _state(part).unlink(missing_ok=True)  # first, so that no kill leaves it beside the bytes of another file
    part.write_bytes(b"")
    write_json(_state(part), state)
    return state
