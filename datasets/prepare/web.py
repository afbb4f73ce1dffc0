"""Polite GETs for raw files and pictures: bounded in time and size, tried again, and no other scheme than http(s)."""

import email.utils
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from datasets.prepare.deadlines import Deadline, new_session, watched

MAX_REDIRECTS = 5
CHUNK = 1 << 18  # bytes read at once

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
            check_status(response, self.patience)
            data = b"".join(self.body(response, max_bytes))
            encoding = content_encoding(response)
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
    def open(self, url: str, headers: dict[str, str] | None = None) -> Iterator[tuple[Any, Deadline]]:
        """The response at the end of the redirects, its body not read yet, and the attempt's deadline. Whatever fails
        until the block ends is raised as FetchError."""
        import requests
        import urllib3

        deadline = watched.deadline = Deadline()
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

    def _follow(self, url: str, headers: dict[str, str], deadline: Deadline) -> Any:
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
        expected, count = content_length(response), 0
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
            self._local.session = new_session()
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


def check_status(response: Any, patience: Patience) -> None:
    """Raises FetchError for any status but 200."""
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


def content_length(response: Any) -> int | None:
    """The bytes that the answer will have, where it says so."""
    value = response.headers.get("Content-Length", "").strip()
    chunked = response.headers.get("Transfer-Encoding")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 and not chunked else None


def content_encoding(response: Any) -> str:
    """How the answer is compressed; "" where it is not."""
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
