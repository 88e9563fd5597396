"""One dataclass per stage is the command line, the JSON and the Python arguments.

A field declared with `flag(default, help)` becomes `--name-with-dashes`; booleans are switches, lists may be repeated.
Sizes and times are given as people write them (`6GiB`, `10min`) and parsed by `parse_size` and `parse_time`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any

from amq.errors import AmqError
from amq.util.files import is_out_of_memory, reason

log = logging.getLogger(__name__)

TRUST_REMOTE_CODE = "run the Python code that the model's folder brings along, with all your rights"
"""What `--trust-remote-code` does, in every verb that loads a model."""
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
TIME_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def flag(default: Any, help: str, choices: Collection[str] | None = None, metavar: str | None = None) -> Any:
    """A dataclass field that is also a command-line flag."""
    metadata = {"help": help, "choices": choices, "metavar": metavar}
    if isinstance(default, list):
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag per field of the dataclass `settings` that was declared with `flag`."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if "help" not in field.metadata:
            continue
        kind = hints[field.name]
        options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%"), "dest": field.name}
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kind) is list:
            options.update(action="append", metavar=field.metadata["metavar"])
        else:
            options.update(type=_plain(kind), metavar=field.metadata["metavar"])
            if field.metadata["choices"]:
                options["choices"] = list(field.metadata["choices"])
                options["metavar"] = None
        shown = field.default not in (None, dataclasses.MISSING, "") and field.default is not False  # 0 is shown
        if shown:
            options["help"] += f" (default {field.default})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **options)


def _plain(kind: Any) -> Callable[[str], Any]:
    """`float | None` → float."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


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
