"""Check values from data files against schemas: msgspec structs that state types and ranges."""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from common.errors import InputError
from common.files import parse_json, read_text

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
