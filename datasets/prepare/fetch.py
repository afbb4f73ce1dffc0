"""Fetch large files: resumed after a kill, verified, and recorded by their SHA-256."""

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock
from isal import igzip, isal_zlib
from tqdm import tqdm

from common.errors import InputError
from common.files import cannot_write, read_json, sha256, write_json
from datasets.prepare.http import POLICY, Client, FetchError, Policy, check_status, content_length, limited, printable

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
