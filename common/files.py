"""Read files with clear errors and write them atomically."""

import errno
import glob
import gzip
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success.

    Any error removes the temporary file and leaves `path` unchanged. Raises InputError if the folder is not writable or
    the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed calls of `replacing` left. The caller must be the only writer of `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the InputError for a failed write."""
    denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    hint = "run where you may write" if denied else "free space or choose another folder"
    return InputError(f"cannot write {path}: {error.strerror or error}; {hint}")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # ids may contain lone surrogates
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


def read_text(path: Path, hint: str) -> str:
    """Return the text of a UTF-8 file, gunzipped if its name ends in .gz.

    hint: how to fix the problem, the end of the error message. Raises InputError if the file is missing, damaged or
    empty.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {hint}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); {hint}") from None
    except (EOFError, OSError, zlib.error) as error:  # gzip raises EOFError for a truncated file
        raise InputError(f"{path} cannot be read ({error}); {hint}") from None
    if not text.strip():
        raise InputError(f"{path} is empty; {hint}")
    return text


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Return the JSON object in a file; hint and errors as in `read_text`."""
    try:
        value = json.loads(read_text(path, hint))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); {hint}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; {hint}")
    return value
