"""Read files with clear errors, check values from them against schemas, and write files atomically."""

import errno
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from common.errors import InputError

# What numpy.load raises on damaged files. It parses a header as Python, so even TokenError may come.
ARRAY_ERRORS = (
    ValueError, OSError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError,
)  # fmt: skip
ABANDONED = 3600  # seconds after which a temporary file of an unknown process counts as left by a kill
MAX_TEXT = 1 << 30  # bytes of a text file
MAX_DEPTH = 64  # of nested JSON objects and arrays


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{_owner()}.", suffix=".tmp")
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


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` on success; a link's target, not the link.

    Any error removes the temporary folder and leaves `folder` unchanged. A process killed between the two renames
    leaves the former folder as `former_folder(folder)`, from where `restore_folder` brings it back. Raises InputError
    if the parent folder is not writable or the disk is full.
    """
    folder = folder.resolve()
    temporary, former = None, former_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, folder.name)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.{_owner()}.", suffix=".tmp"))
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
        temporary.rename(folder)
        if former.exists():  # one step, so restore_folder never finds half of it
            former.rename(temporary)
    except OSError as error:
        with suppress(InputError):  # another writer may restore it, or replace it
            restore_folder(folder)
        raise cannot_write(folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def former_folder(folder: Path) -> Path:
    """Return what a folder is called while `replacing_folder` replaces it."""
    return folder.parent / f".{folder.name}.former"


def restore_folder(folder: Path) -> None:
    """Bring a folder back if a process was killed while it replaced it. Raises InputError if that fails."""
    try:
        if not folder.exists() and former_folder(folder).exists():
            former_folder(folder).rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _owner() -> str:
    """Return this host and process for the name of a temporary file."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}-{os.getpid()}"


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files and folders of `folder / name` that a killed process left.

    Those of another host, and those of earlier versions, whose names have no process, go after an hour.
    """
    host = _owner().partition("-")[0]
    for path in folder.glob(f".{glob.escape(name)}.*.tmp"):
        owner = re.fullmatch(rf"{host}-(\d+)\.\w+", path.name[len(name) + 2 : -len(".tmp")])
        with suppress(OSError):  # gone meanwhile, or not ours to remove
            if not _is_alive(int(owner[1])) if owner else time.time() - path.lstat().st_mtime > ABANDONED:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_alive(process: int) -> bool:
    """Return whether a process of this host may be running."""
    if os.name != "posix":  # os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file's content, in hexadecimal."""
    with open_regular(path) as file:
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


def check_regular(path: Path, hint: str) -> None:
    """Raise InputError if a path exists and is no regular file: reading a FIFO or a device would hang."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} cannot be read (not a regular file); {hint}")


def file_exists(name: str) -> bool:
    """Return whether a file has this name; False also for a text that no file can have as its name."""
    return os.path.isfile(name)  # noqa: PTH113  # Path.is_file raises OSError for a long one


def folder_exists(name: str) -> bool:
    """Return whether a folder has this name; False also for a text that no folder can have as its name."""
    return os.path.isdir(name)  # noqa: PTH112


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading bytes.

    Raises OSError for a folder, a FIFO, a socket or a device, none of which blocks, and for a name that cannot exist.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    except ValueError as error:  # a NUL character or a lone surrogate in the name
        raise OSError(errno.EINVAL, f"invalid name: {error}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def read_text(path: Path, hint: str, limit: int = MAX_TEXT) -> str:
    """Return the text of a UTF-8 file without its byte order mark, gunzipped if its name ends in .gz.

    hint: how to fix the problem, the end of the error message. limit: bytes of the text. Raises InputError if the file
    is missing, not a regular file, damaged, empty or too large.
    """
    try:
        check_regular(path, hint)
        with open_regular(path) as file:
            # one byte more than the limit, so a small file that unpacks to terabytes is refused early
            data = (gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file).read(limit + 1)
        if len(data) > limit:
            raise InputError(f"{path} has more than {limit:,} bytes; {hint}")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {hint}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); {hint}") from None
    except (EOFError, OSError, zlib.error) as error:  # gzip raises EOFError for a truncated file
        raise InputError(f"{path} cannot be read ({error}); {hint}") from None
    if not text.strip():
        raise InputError(f"{path} is empty; {hint}")
    return text


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError if it is not JSON, is nested over MAX_DEPTH deep or has an integer of over 4,300 digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    if is_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def is_deep(value: Any) -> bool:
    """Return whether dicts, lists, tuples and sets are nested over MAX_DEPTH deep, where recursion may fail."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [each for each in level if isinstance(each, dict | list | tuple | set)]
        if not level:
            return False
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return True


def read_json(path: Path, hint: str, limit: int = MAX_TEXT) -> dict[str, Any]:
    """Return the JSON object in a file; hint, limit and errors as in `read_text` and `parse_json`."""
    try:
        value = parse_json(read_text(path, hint, limit))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); {hint}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; {hint}")
    return value


# --------------------------------------------------------------------------------------------------------------- schema
# Check values from data files against schemas: msgspec structs that state types and ranges.

T = TypeVar("T")
Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Number = Annotated[float, Meta(ge=-1e308, le=1e308)]  # finite
MAX_ID = 256  # bytes of an item's id in UTF-8


def check_schema(value: T, schema: Any, where: Path | str, hint: str) -> T:
    """Return `value`, as read from JSON, if it fits the schema; unknown fields are accepted.

    where: the file, and line if it has several, named in errors. hint: how to fix the problem. Raises InputError that
    names the field, its value and the accepted values.
    """
    try:
        msgspec.convert(value, schema)
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has text that is not valid Unicode: {error.object!r:.80}; {hint}") from None
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `")
        raise InputError(f"{where}{_describe(value, problem.replace('`', ''), place.rstrip('`'))}; {hint}") from None
    return value


def read_json_lines(path: Path, schema: Any, hint: str) -> list[Any]:
    """Return the values of a file with one JSON value a line. Raises InputError that names the first invalid line."""
    values = []
    for number, line in enumerate(read_text(path, hint).split("\n"), start=1):
        if line.strip():
            try:
                values.append(check_schema(parse_json(line), schema, f"{path}:{number}", hint))
            except ValueError as error:
                raise InputError(f"{path}:{number} is not JSON ({error}); {hint}") from None
    return values


def _describe(value: Any, problem: str, place: str) -> str:
    """Return what is wrong at a place such as "$.features.files[0].dim"."""
    at = place.removeprefix("key` in `").removeprefix("$").removeprefix(".")
    inside = f" in {at}" if at else ""
    if missing := re.fullmatch(r"Object missing required field (\S+)", problem):
        return f" has no {missing[1]!r}{inside}"
    if "[...]" in at or place.startswith("key"):  # of an object with any keys; msgspec does not name the key
        return f" has an invalid entry{inside}: {problem}"
    for index, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", at):
        value = value[int(index)] if index else value[name]
    return f" has {at} {value!r:.80}: {problem}" if at else f": {problem}"
