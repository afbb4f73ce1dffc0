"""Files that are whole or absent: written under a temporary name in the same folder, then renamed."""

import errno
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
    """Yield a temporary path; on success it takes the name `path`, on any error it is removed and `path` stays as it
    was. Raises InputError where the folder cannot be written or the disk is full."""
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


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(path: Path, error: OSError) -> InputError:
    """What to tell a user of an error in writing."""
    denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    hint = "run where you may write" if denied else "free space or choose another folder"
    return InputError(f"cannot write {path}: {error.strerror or error}; {hint}")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people to read, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, as ids may have
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


def read_text(path: Path, hint: str) -> str:
    """Read a UTF-8 text file, gzipped if its name ends in .gz. `mends`: what to do where it is missing or damaged."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {hint}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); {hint}") from None
    except (EOFError, OSError, zlib.error) as error:  # gzip raises EOFError where a file was cut short
        raise InputError(f"{path} cannot be read ({error}); {hint}") from None
    if not text.strip():
        raise InputError(f"{path} is empty; {hint}")
    return text


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object from a file. `mends`: what to do where it is missing or damaged."""
    try:
        found = json.loads(read_text(path, hint))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); {hint}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object; {hint}")
    return found
