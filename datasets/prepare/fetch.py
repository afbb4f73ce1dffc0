"""Large files, fetched once: what a kill leaves is gone on with, and what came is recorded by its checksum."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from common.errors import InputError
from common.files import cannot_write, read_json, sha256, write_json
from datasets.prepare.web import (
    PATIENCE,
    Fetcher,
    FetchError,
    Patience,
    check_status,
    content_encoding,
    content_length,
    shown,
)

MAX_FILE_BYTES = 100 * 10**9
CHECKSUMS = "checksums.json"


def fetch_file(
    url: str,
    path: Path,
    *,
    say: Callable[[str], None] = print,
    patience: Patience = PATIENCE,
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
            fetcher.retry(lambda: _fetch_part(fetcher, url, part, bar, furthest), lambda: furthest[0])
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


def check_file(path: Path) -> str:
    """A file's SHA-256. Raises InputError where checksums.json beside it records another."""
    found, record = sha256(path), _checksums(path.parent).get(path.name)
    if record is not None:
        _compare(path, found, record)
    return found


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
    hint = "delete it: the files are then taken as they are"
    records = read_json(path, hint)
    if not all(isinstance(r, dict) and isinstance(r.get("sha256"), str) for r in records.values()):
        raise InputError(f"{path} does not map names to a sha256; {hint}")
    return records


def _record(path: Path, part: Path, url: str) -> None:
    """Record what was fetched, before it takes its name: a kill in between is mended by the next run."""
    found = sha256(part)
    with FileLock(path.with_name(f".{CHECKSUMS}.lock")):  # another dataset's files may come at the same time
        records = _checksums(path.parent)
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
    if state.get("url") != url or not state.get("validator"):
        return 0, {}
    return (size, state) if state.get("size") is None or size <= state["size"] else (0, {})


def _fetch_part(fetcher: Fetcher, url: str, part: Path, bar: tqdm, furthest: list[int]) -> None:
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
            check_status(response, fetcher.patience)
            start, state = 0, _begin(response, part, url)
        bar.total = state["size"]
        bar.n = bar.last_print_n = start
        bar.refresh()
        with part.open("r+b") as file:
            file.seek(start)
            for chunk in fetcher.body(response, MAX_FILE_BYTES - start):
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))
                furthest[0] = max(furthest[0], file.tell())
                deadline.restart(fetcher.patience.attempt)
            os.fsync(file.fileno())


def _begin(response: Any, part: Path, url: str) -> dict[str, Any]:
    """An empty `part`, and beside it what the server says of the whole file."""
    encoding = content_encoding(response)
    if encoding and part.suffixes[-2:-1] != [".gz"]:  # of a .gz some servers say so, and mean the file itself
        raise FetchError(f"the answer is compressed as {shown(encoding)}, which was not asked for")
    etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    validator = etag if etag.startswith('"') else modified  # If-Range takes no weak ETag
    state = {"url": url, "size": content_length(response), "validator": validator}
    _state(part).unlink(missing_ok=True)  # first, so that no kill leaves it beside the bytes of another file
    part.write_bytes(b"")
    write_json(_state(part), state)
    return state
