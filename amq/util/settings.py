"""One frozen dataclass per stage is the command line, the JSON and the Python arguments.

A stage's settings derive from `Settings`. A field declared with `flag(default, help, group)` becomes
`--name-with-dashes`: booleans are switches, lists may be repeated, `positional=True` takes the name away. Its range,
its choices and whether it is a size or a time are declared there too and hold for all three: `Settings` checks them
when it is made, and `limits` hands them to JSON schemas. A field without `flag` is for Python and JSON alone.

Nothing here or in a stage's settings.py imports torch or numpy, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import math
import numbers
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from amq.errors import AmqError
from amq.util.files import is_out_of_memory, reason

log = logging.getLogger(__name__)

REACH, CHOOSE, MEASURE, RUN = "what to reach", "what to choose from", "how to measure", "how to run"
"""Groups of flags that several verbs have, and their order in a help text; a verb's own come before the last."""
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
TIME_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
REQUIRED = dataclasses.MISSING
"""As `flag`'s default: the setting must be given."""


@dataclass(frozen=True)
class Flag:
    """What `flag` declares besides the default.

    help: empty where the setting is no flag of any command.
    choices: names that the value, or each of a list's, must be among; a registry may grow.
    least, above, most: the value is at least `least`, or above `above`, and at most `most`.
    parse: reads a size or a time and raises AmqError for anything else; the field keeps what was written.
    name: of the flag, where Python's name of the field is not it.
    """

    help: str
    group: str
    metavar: str | None = None
    choices: Collection[str] | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    parse: Callable[[Any], float] | None = None
    positional: bool = False
    name: str | None = None


def flag(default: Any, help: str, group: str = RUN, **details: Any) -> Any:
    """A dataclass field that is also a command-line flag; `details` are fields of `Flag`."""
    declared: dict[str, Any] = {"metadata": {"flag": Flag(help, group, **details)}}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, **declared)
    return dataclasses.field(**declared) if default is REQUIRED else dataclasses.field(default=default, **declared)


@dataclass(frozen=True)
class Declared:
    """A field with its flag. kind: its type without `| None`; of a list, `list`. required: it has no default."""

    name: str
    flag: Flag
    kind: type
    optional: bool
    default: Any
    required: bool

    @property
    def many(self) -> bool:
        return self.kind in (list, tuple)

    @property
    def spelling(self) -> str:
        """As on the command line: `--window-length`, or `model` where it has no dashes."""
        return self.name if self.flag.positional else "--" + (self.flag.name or self.name).replace("_", "-")


def _declared(settings: type) -> dict[str, Declared]:
    hints, found = typing.get_type_hints(settings), {}
    for field in dataclasses.fields(settings):
        if (own := field.metadata.get("flag")) is None:
            continue
        union = typing.get_origin(hints[field.name]) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hints[field.name]) if union else (hints[field.name],)
        kind = next(k for k in kinds if k is not type(None))
        required = field.default is REQUIRED and field.default_factory is REQUIRED
        plain = typing.get_origin(kind) or kind
        found[field.name] = Declared(field.name, own, plain, type(None) in kinds, field.default, required)
    return found


declared: Callable[[type], dict[str, Declared]] = functools.cache(_declared)
"""The flags of a dataclass by field."""


Made = TypeVar("Made", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """What every stage's settings are. Making one raises AmqError for a value out of range, by the flag's name.

    VERB, ABOUT, EXAMPLES: of the command whose flags these are: its name, what it does in a line, two command lines.
    Settings of no command (VERB empty) call their fields by Python's names in errors.
    """

    VERB: ClassVar[str] = ""
    ABOUT: ClassVar[str] = ""
    EXAMPLES: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, field in declared(type(self)).items():
            _check(getattr(self, name), field, field.spelling if self.VERB else name)

    def json(self) -> dict[str, Any]:
        """All fields, as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def make(cls: type[Made], **given: Any) -> Made:
        """Settings from keyword arguments; an unknown name, or one that is missing, is an AmqError."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in given:
            if name not in known:
                expected = ", ".join(sorted(known))
                kind = f"{cls.VERB} setting" if cls.VERB else "setting"
                raise AmqError(f"unknown {kind} {name!r}: expected one of {expected}")
        for name, field in declared(cls).items():
            if field.required and name not in given:
                raise AmqError(f"{field.spelling} is missing: {field.flag.help}")
        return cls(**given)


def _check(value: Any, field: Declared, name: str) -> None:
    if value is None:
        if not field.optional:
            raise AmqError(f"{name} must be given, got None")
        return
    if field.flag.parse is not None:
        try:
            field.flag.parse(value)
        except AmqError as error:
            raise AmqError(f"{name}: {error}") from None
    elif field.kind in (int, float):
        _check_number(value, field, name)
    elif field.flag.choices is not None:
        for chosen in value if field.many else [value]:
            if chosen not in field.flag.choices:
                raise AmqError(f"{name} must be one of {', '.join(field.flag.choices)}, got {chosen!r}")


def _check_number(value: Any, field: Declared, name: str) -> None:
    own, kind = field.flag, numbers.Integral if field.kind is int else numbers.Real  # numpy's numbers too
    typed = isinstance(value, kind) and not isinstance(value, bool)
    typed = typed and (isinstance(value, int) or math.isfinite(value))  # isfinite(10**400) overflows
    fits = typed and (own.least is None or value >= own.least) and (own.above is None or value > own.above)
    if not fits or (own.most is not None and value > own.most):
        number = "" if typed else "a whole number" if field.kind is int else "a number"
        expected = " ".join(filter(None, (number, _range(own))))
        raise AmqError(f"{name} must be {expected}, got {value!r}")


def _range(own: Flag) -> str:
    if own.least is not None and own.most is not None:
        return f"from {own.least} to {own.most}"
    bounds = {"at least": own.least, "above": own.above, "at most": own.most}
    return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)


def limits(settings: type, name: str) -> dict[str, float]:
    """The range of a field in JSON schema's words."""
    own = declared(settings)[name].flag
    given = {"minimum": own.least, "exclusiveMinimum": own.above, "maximum": own.most}
    return {word: value for word, value in given.items() if value is not None}


def parse_command(argv: Sequence[str] | None, settings: type[Settings], *others: type) -> dict[str, Any]:
    """What a command line gives of the fields of `settings` and `others`, dataclasses of flags.

    What is not given is absent, so that a run's settings can tell what was asked for from what is the default.
    """
    parser = argparse.ArgumentParser(
        prog=f"amq {settings.VERB}",
        usage=_usage(settings, *others),
        description=settings.ABOUT[:1].upper() + settings.ABOUT[1:] + ".",
        epilog="\n".join(["examples:", *(f"  {line}" for line in settings.EXAMPLES)]),
        formatter_class=_Help,
    )
    add_flags(parser, settings, *others)
    given = vars(parser.parse_args(argv))
    tuples = {f.name for kind in (settings, *others) for f in declared(kind).values() if f.kind is tuple}
    return {name: tuple(value) if name in tuples else value for name, value in given.items()}


def add_flags(parser: argparse.ArgumentParser, *settings: type) -> None:
    """The flags of dataclasses, each group under its title: what is required first, `RUN` last."""
    fields = [field for kind in settings for field in declared(kind).values() if field.flag.help]
    fields.sort(key=lambda field: not field.required)
    titles = dict.fromkeys(field.flag.group for field in fields if not field.flag.positional)
    groups = {title: parser.add_argument_group(title) for title in sorted(titles, key=_place)}
    for field in fields:
        _add(parser if field.flag.positional else groups[field.flag.group], field)


def _place(group: str) -> int:
    order = (REACH, CHOOSE, MEASURE)
    return order.index(group) if group in order else len(order) + (group == RUN)


def _usage(settings: type[Settings], *others: type) -> str:
    """What must be given alone: a verb may have forty flags, which the groups list."""
    required = [field for kind in (settings, *others) for field in declared(kind).values() if field.required]
    words = [field.name.upper() for field in required if field.flag.positional]
    words += [f"{field.spelling} {field.flag.metavar}" for field in required if not field.flag.positional]
    return " ".join([f"amq {settings.VERB}", *words, "[flags]"])


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines, fits the screen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def _add(parser: argparse._ActionsContainer, field: Declared) -> None:
    own, text = field.flag, field.flag.help
    if field.default not in (None, REQUIRED, "", ()) and not isinstance(field.default, bool):  # 0 is shown
        text += f" (default {field.default})"
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if field.kind is bool:
        options["action"] = "store_false" if field.default else "store_true"
    else:
        options["metavar"] = own.metavar
        if own.choices is not None:
            options["choices"] = list(own.choices)
        if not field.many:
            options["type"] = field.kind
    if own.positional:
        options |= {"metavar": field.name.upper()} | ({"nargs": "+"} if field.many else {})
        parser.add_argument(field.name, **options)
        return
    if field.many:
        options["action"] = "append"
    parser.add_argument(field.spelling, dest=field.name, required=field.required, **options)


def parse_size(text: str | int) -> int:
    """`6GiB`, `512 MB`, `1000` → bytes."""
    return int(_parse(str(text), {"": 1, **SIZE_UNITS}, "a size such as 6GiB or 800MB"))


def parse_time(text: str | float) -> float:
    """`10min`, `90s`, `1.5h`, `90` → seconds."""
    return _parse(str(text), {"": 1.0, **TIME_UNITS}, "a time such as 10min or 90s")


def _parse(text: str, units: dict[str, float], expected: str) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    lower = {name.lower(): value for name, value in units.items()}
    if not match or match[2].lower() not in lower:
        raise AmqError(f"{text!r} is not {expected}")
    return float(match[1]) * lower[match[2].lower()]


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command's main: an AmqError becomes one line on stderr and status 2, Ctrl-C becomes 130.

    So does what the system refuses (a folder that cannot be written, a disk that fails, memory), wherever it was asked.
    """
    try:
        return main(argv)
    except AmqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError as error:
        return _reader_has_gone(error)
    except (MemoryError, OSError, RuntimeError) as error:
        log.debug("where this came from", exc_info=True)
        if is_out_of_memory(error):
            remedy = "use --dtype bfloat16, a smaller --cache-memory, or a larger machine"
            print(f"error: out of memory; {remedy}", file=sys.stderr)
        elif isinstance(error, OSError):
            print(f"error: {reason(error)}", file=sys.stderr)
        else:
            raise
        return 2
    except ValueError as error:
        if "embedded null" not in str(error):  # of a path
            raise
        print("error: a path holds a NUL character, which no file name can: give another", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; run the same command with --resume", file=sys.stderr)
        return 130


def _reader_has_gone(error: BrokenPipeError) -> int:
    """Whoever read our output (`| head`) wants no more: nothing to complain of, and nothing to flush at exit."""
    if error.filename is not None:  # a pipe of ours, by its name
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
