"""Settings as dataclass fields with a default, help text and accepted values.

common/cli.py turns every field into a flag.
"""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from common.errors import InputError

MAX_NAME = 200  # bytes of a folder's name; file systems take 255, and a run's name begins with its time


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    folder_name: bool = False,
    taken_names: tuple[str, ...] = (),
    runtime: bool = False,
    extension: bool = False,
    used_if: Callable[[Any], bool] | None = None,
    for_several: str = "",
    metavar: str = "",
) -> Any:
    """Return a dataclass field for one setting.

    choices, at_least, above, below, at_most: the accepted values. Numbers must be finite. A tuple of whole numbers must
    start at 1 or more and increase.
    folder_name: the value must be the name of a single folder.
    taken_names: the value is a tuple of NAME=FILE entries that must not use these names.
    runtime: the setting affects how a run executes, not its result; --resume may change it.
    extension: the setting goes beyond the paper.
    for_several: the command that runs several values of the setting, named where a user gives a list of numbers.
    metavar: what the help shows as the value; empty: by its type.
    used_if: returns whether the setting has an effect, given all settings; None: it always has one.
    """
    limits = {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    metadata: dict[str, Any] = {
        "help": help,
        "choices": choices,
        "limits": {k: v for k, v in limits.items() if v is not None},
    }
    metadata |= {"numbers": isinstance(default, tuple) and default != () and isinstance(default[0], int)}
    metadata |= {
        "folder_name": folder_name,
        "taken_names": taken_names,
        "may_be_empty": default == "",
        "runtime": runtime,
        "extension": extension,
        "used_if": used_if,
        "for_several": for_several,
        "metavar": metavar,
    }
    return field(default=default, metadata=metadata)


MAX_WHOLE = 2**31 - 1  # of a whole number without another limit
MAX_SIZE = 1 << 16  # of the numbers in a tuple: sizes and cut-offs


@dataclass(frozen=True)
class Settings:
    """Base class of all settings.

    Raises InputError that names the flag of an invalid value.
    """

    def __post_init__(self) -> None:
        for problem in self.problems():
            raise InputError(problem)

    @classmethod
    def group_title(cls) -> str:
        """Return the group title in --help: the class name without "Settings"."""
        return cls.__name__.removesuffix("Settings").lower()

    def problems(self) -> Iterator[str]:
        """Yield an error message for every invalid value."""
        for f in fields(self):
            if reason := _reason(f.metadata, getattr(self, f.name)):
                yield f"--{f.name} {_quoted(getattr(self, f.name))}{reason}"


def _reason(metadata: Any, value: Any) -> str:
    """Return why a value is invalid, or "" if it is valid."""
    if metadata["choices"] and value not in metadata["choices"]:
        return f" must be one of {', '.join(metadata['choices'])}"
    if metadata["numbers"] and (
        not value or value[0] < 1 or value[-1] > MAX_SIZE or any(a >= b for a, b in itertools.pairwise(value))
    ):
        return f' must be increasing whole numbers from 1 to {MAX_SIZE}, such as "8,16,32"'
    if isinstance(value, str) and not value.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in value):
        return " must be valid UTF-8"
    if metadata["folder_name"] and len(value.encode()) > MAX_NAME:
        return f" must be a folder name of at most {MAX_NAME} bytes"
    if metadata["folder_name"] and (
        value in (".", "..") or any(s in value for s in "/\\\0") or not (value or metadata["may_be_empty"])
    ):
        return " must be a folder name without / and \\"
    if metadata["taken_names"]:
        names = [entry.partition("=")[0] for entry in value]
        if not all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*=.+", entry) for entry in value):
            return " must be NAME=FILE,NAME=FILE; a name has letters, digits and _, such as visual=visual.npy"
        if taken := [name for name in names if name in metadata["taken_names"] or names.count(name) > 1]:
            return f": the name {taken[0]!r} is taken; choose another"
    limits = metadata["limits"]
    tests = {
        "at_least": lambda v, limit: v >= limit,
        "above": lambda v, limit: v > limit,
        "below": lambda v, limit: v < limit,
        "at_most": lambda v, limit: v <= limit,
    }
    if isinstance(value, int) and not limits.keys() & {"below", "at_most"} and abs(value) > MAX_WHOLE:
        return f" must be at most {MAX_WHOLE}"
    if isinstance(value, str) and not _is_path(value, 200 if metadata["folder_name"] else 4000):
        return " must be shorter, and valid text without control characters"
    finite = isinstance(value, int) or not limits or math.isfinite(value)
    if not finite or not all(tests[name](value, limit) for name, limit in limits.items()):
        words = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
        return f" must be {'a finite number, ' if isinstance(value, float) else ''}{words}"
    return ""


def _is_path(text: str, longest: int) -> bool:
    """Return whether a text may be a path of up to `longest` bytes."""
    try:
        return len(os.fsencode(text)) <= longest and all(ord(character) >= 32 for character in text)
    except UnicodeEncodeError:
        return False


def _quoted(value: Any) -> str:
    if isinstance(value, tuple):
        return f'"{format_value(value)}"'
    return repr(value) if isinstance(value, str) else format_value(value)


def format_value(value: Any) -> str:
    """Return a setting's value in command-line syntax."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def is_runtime(settings: type[Settings], name: str) -> bool:
    """Return whether a setting affects only how a run executes, not its result."""
    return settings.__dataclass_fields__[name].metadata["runtime"]


def check_types(settings: type[Settings], values: dict[str, Any], path: str) -> dict[str, Any]:
    """Return settings read from a file, with lists converted to tuples.

    path: the file, named in errors. Raises InputError for an unknown setting or a value of the wrong type.
    """
    known = {f.name: f for f in fields(settings)}
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"{path} has unknown settings {unknown}: it was written by another version")
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in typed.items():
        default = known[name].default
        valid = type(value) is type(default) or (type(default) is float and type(value) is int)
        if isinstance(value, tuple) and valid:
            element_type = int if known[name].metadata["numbers"] else str
            valid = all(type(element) is element_type for element in value)
        if not valid:
            raise InputError(f"{path} has {name} {value!r}, which must be of type {type(default).__name__}")
    return typed
