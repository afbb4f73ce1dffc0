"""Build command lines in which every settings field is a flag of that name."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from common.errors import InputError
from common.settings import Settings, format_value


def parse_args(
    argv: Sequence[str] | None,
    description: str,
    sections: Sequence[type[Settings]],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    names: Sequence[str] = (),
    presets: Mapping[str, dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], argparse.Namespace]:
    """Return the settings given as flags, and the script's own arguments.

    sections: settings classes; each is one group in --help. Extensions beyond the paper form a separate group.
    add_arguments: adds the script's own arguments.
    names: restricts the flags to these settings; empty means all.
    presets: described at the end of --help.
    Exits with status 2 on a bad flag.
    """
    parser = Parser(
        usage="%(prog)s [--setting value ...]",
        description=description,
        epilog="\n".join(
            ["Set a boolean with --NAME, --no-NAME, --NAME=true or --NAME=false.", *_describe_presets(presets)]
        ),
        formatter_class=_HelpFormatter,
    )
    if add_arguments:
        add_arguments(parser)
    groups: dict[str, list[Field]] = {}
    for section in sections:
        for f in fields(section):
            if not names or f.name in names:
                groups.setdefault("beyond the paper" if f.metadata["extension"] else section.group_title(), []).append(
                    f
                )
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for f in flags:
            _add_flag(group, f)
    namespace = parser.parse_args(argv)
    given = {f.name: vars(namespace).pop(f.name) for flags in groups.values() for f in flags if f.name in namespace}
    return given, namespace


def _describe_presets(presets: Mapping[str, dict[str, Any]] | None) -> list[str]:
    if not presets:
        return []
    lines = [
        "",
        "Precedence: flag > --preset > preset of the model > preset of the dataset > default.",
        "Presets:",
    ]
    for name, preset in presets.items():
        values = ", ".join(f"{setting} {format_value(value)}" for setting, value in preset.items())
        lines += textwrap.wrap(
            f"{name}: {values or 'the defaults'}", 108, initial_indent="  ", subsequent_indent="    "
        )
    return lines


def run_cli(main: Callable[[], Any]) -> None:
    """Run a script's main and turn errors into exit statuses.

    Exits with 2 on an InputError, which is printed as one line, and with 130 on Ctrl-C.
    Under torchrun only rank 0 prints an error that every rank has.
    """
    if spec := sys.modules["__main__"].__spec__:  # show "python -m MODULE" in the usage; Python 3.14 does it itself
        sys.argv[0] = f"python -m {spec.name.removesuffix('.__main__')}"
    try:
        main()
    except InputError as error:
        sys.exit(_fail(f"error: {error}", 2, error.on_every_rank))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        sys.exit(_fail(f"error: {str(error.filename)[:80]}... is too long for a file name; give a shorter one", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _fail(message: str, status: int, on_every_rank: bool = False) -> int:
    is_main = int(os.environ.get("WORLD_SIZE", 1)) == 1 or int(os.environ.get("RANK", 0)) == 0
    if not is_main and status != 130:
        time.sleep(3 if on_every_rank else 10)  # rank 0 prints the same error, or probably does; torchrun then ends us
    if is_main or not (on_every_rank or status == 130):
        print(message, file=sys.stderr)
    return status


def add_switch(group: Any, name: str, help: str) -> None:
    """Add a boolean flag, false by default, to a script's own arguments."""
    _add_boolean(group, name, help, False)


def _add_flag(group: Any, f: Field) -> None:
    default, flag = f.default, f"--{f.name}"
    help = f"{f.metadata['help']} (default: {format_value(default) or 'empty'})".replace("%", "%%")
    common = {"dest": f.name, "default": argparse.SUPPRESS}
    if isinstance(default, bool):
        _add_boolean(group, f.name, help, argparse.SUPPRESS)
    elif isinstance(default, tuple):
        element_type = type(default[0]) if default else str
        metavar = f.metadata["metavar"] or ("N,N,..." if element_type is int else "NAME,NAME,...")
        group.add_argument(flag, type=_tuple_parser(element_type), metavar=metavar, help=help, **common)
    else:
        metavar = f.metadata["metavar"] or {int: "N", float: "X", str: "NAME"}[type(default)]
        options = {"choices": f.metadata["choices"]} if f.metadata["choices"] else {"metavar": metavar}
        several = f.metadata["for_several"]
        parse = type(default) if isinstance(default, str) else _number_parser(type(default), several)
        group.add_argument(flag, type=parse, help=help, **options, **common)


def _add_boolean(group: Any, name: str, help: str, default: Any) -> None:
    common = {"dest": name, "default": default}
    group.add_argument(f"--{name}", nargs="?", const=True, type=_boolean, metavar="BOOL", help=help, **common)
    group.add_argument(f"--no-{name}", f"--no_{name}", action="store_false", help=argparse.SUPPRESS, **common)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _number_parser(kind: Any, for_several: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            hint = f"; for several: {for_several} {text}" if for_several and "," in text else ""
            number = "a whole number" if kind is int else "a number such as 0.6"
            raise argparse.ArgumentTypeError(f"{text!r} is not {number}{hint}") from None

    return parse


def _tuple_parser(element_type: type) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        elements = [element.strip() for element in text.split(",") if element.strip()]
        try:
            return tuple(element_type(element) for element in elements)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not a list of whole numbers such as "8,16,32"') from None

    return parse


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        numbers: dict[Any, str] = {int: "N", float: "X"}
        return numbers.get(action.type) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that suggests the nearest flag and expands ~ in every path."""

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"allow_abbrev": False, "formatter_class": _HelpFormatter}
        super().__init__(**defaults | options)

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        words = sys.argv[1:] if argv is None else argv  # the shell leaves --flag=~/folder and NAME=~/file as they are
        expanded = [re.sub(r"(?:^|(?<=[=,]))~(?=/|$)", lambda _: str(Path.home()), word) for word in words]
        parsed, unknown = self.parse_known_args(expanded, namespace)
        if unknown:
            if not unknown[0].startswith("-"):
                self.error(
                    f"unexpected argument {unknown[0]!r}; a flag begins with --, and its value is one word: a list "
                    'such as 8,16,32 has no spaces, or is in quotes: "8, 16, 32"'
                )
            word = unknown[0].split("=")[0]
            flags = list(self._option_string_actions)
            near = [flag for flag in flags if word.startswith(f"{flag}_")]  # --lr_rate
            near = near or difflib.get_close_matches(word, flags, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else "--help lists them all"
            self.error(f"unknown flag {word}; {hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{self.format_usage()}{self.prog}: error: {message}", 2))
