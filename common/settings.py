"""Settings as dataclass fields: each has a default, a help text, and the values that it accepts.

`common/cli.py` makes a flag of every field.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from common.errors import InputError


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
    runtime: bool = False,
    extension: bool = False,
    used_if: Callable[[Any], bool] | None = None,
) -> Any:
    """Return a dataclass field.

    choices, at_least, above, below, at_most: the accepted values; numbers must be finite. A tuple of whole numbers must
    increase from 1 on. folder_name: a text that names one folder. runtime: how to run, not what is trained; --resume
    may change it. extension: beyond the paper. used_if: tells from all settings whether this one has an effect; None:
    always.
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
        "may_be_empty": default == "",
        "runtime": runtime,
        "extension": extension,
        "used_if": used_if,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Base of all settings. Raises InputError, naming the flag, for a value that is not accepted."""

    def __post_init__(self) -> None:
        for problem in self.problems():
            raise InputError(problem)

    @classmethod
    def group_title(cls) -> str:
        """Return the title of the flags in --help: the class's name without Settings."""
        return cls.__name__.removesuffix("Settings").lower()

    def problems(self) -> Iterator[str]:
        """Yield a sentence for every value that is not accepted."""
        for f in fields(self):
            if reason := _reason(f.metadata, getattr(self, f.name)):
                yield f"--{f.name} {_quoted(getattr(self, f.name))}{reason}"


def _reason(metadata: Any, value: Any) -> str:
    """Why a field refuses a value; "" if it is accepted."""
    if metadata["choices"] and value not in metadata["choices"]:
        return f" must be one of {', '.join(metadata['choices'])}"
    if metadata["numbers"] and (not value or value[0] < 1 or any(a >= b for a, b in itertools.pairwise(value))):
        return ': need whole numbers from 1 on, each larger than the last: "8,16,32"'
    if metadata["folder_name"] and (
        value in (".", "..") or any(s in value for s in "/\\\0") or not (value or metadata["may_be_empty"])
    ):
        return " is not a folder name; leave out / and \\"
    limits = metadata["limits"]
    tests = {
        "at_least": lambda v, limit: v >= limit,
        "above": lambda v, limit: v > limit,
        "below": lambda v, limit: v < limit,
        "at_most": lambda v, limit: v <= limit,
    }
    if limits and not (math.isfinite(value) and all(tests[name](value, limit) for name, limit in limits.items())):
        words = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
        return f" must be {'a finite number, ' if isinstance(value, float) else ''}{words}"
    return ""


def _quoted(value: Any) -> str:
    if isinstance(value, tuple):
        return f'"{format_value(value)}"'
    return repr(value) if isinstance(value, str) else format_value(value)


def format_value(value: Any) -> str:
    """Return a setting's value as it is given on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def is_runtime(settings: type[Settings], name: str) -> bool:
    """Return whether a setting says how to run, not what is trained."""
    return settings.__dataclass_fields__[name].metadata["runtime"]


def check_types(settings: type[Settings], values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return settings read from a file, with lists as tuples.

    where: the file, for messages. Raises InputError that names the file and the unknown or wrongly typed setting.
    """
    known: dict[str, Any] = {f.name: f.default for f in fields(settings)}
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"{where} has unknown settings {unknown}: it was made by another version")
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in typed.items():
        default = known[name]
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if isinstance(value, tuple) and fits:
            kind = type(default[0]) if default else str
            fits = all(type(part) is kind for part in value)
        if not fits:
            raise InputError(f"{where} has {name} {value!r}, which is no {type(default).__name__}")
    return typed
