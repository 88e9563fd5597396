"""What comparisons have in common that go on where they stopped: a file in a folder, and what may not have changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from amq.errors import AmqError
from amq.util.files import check_place
from amq.util.records import JsonFile
from amq.util.settings import Settings, declared

Table = TypeVar("Table", bound=JsonFile)
"""With a field `settings`."""


def open_table(kind: type[Table], path: Path, settings: Settings, free: Collection[str]) -> Table | None:
    """The table at `path`, with `settings` for its own; None where there is none yet. free: settings that may change.

    Raises AmqError where it is of other settings, or where its folder holds something else.
    """
    output = path.parent
    check_place(output, "--output")
    if not path.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise AmqError(f"--output {output} is not empty and holds no {path.name}: give another folder")
        return None
    table: Any = kind.read(path)
    flags, old = declared(type(settings)), table.settings.json()
    changed = [
        f"{flags[name].spelling} was {old[name]}, is {value}"
        for name, value in settings.json().items()
        if name not in free and old[name] != value
    ]
    if changed:
        raise AmqError(
            f"--output {output} holds a table of other settings: {'; '.join(changed)}; give these, or another folder"
        )
    return replace(table, settings=settings)


def check_same(old: JsonFile, new: JsonFile, output: str, names: Mapping[str, str]) -> None:
    """Raises AmqError where a name in the settings stands for something else now. names: fields, and what they are."""
    for name, what in names.items():
        was, found = getattr(old, name), getattr(new, name)
        if was != found:
            raise AmqError(
                f"--output {output} holds a table of another {what}: it has {was}, this is {found}; give another folder"
            )


def numbers(what: str, text: str) -> list[float]:
    """`3,3.5` → its numbers. Raises AmqError for anything else. what: the flag."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise AmqError(f"{what} {text}: expected numbers such as 3,3.5") from None
    if not all(math.isfinite(number) for number in found):
        raise AmqError(f"{what} {text}: expected finite numbers")
    return found


def whole_numbers(what: str, text: str, least: int = 0) -> list[int]:
    """`0,1,2` → its numbers, each once."""
    found = numbers(what, text)
    if odd := next((number for number in found if number != int(number) or number < least), None):
        raise AmqError(f"{what}: expected whole numbers from {least} on, got {odd:g}")
    return [int(number) for number in dict.fromkeys(found)]


def names_of(what: str, text: str, known: Collection[str]) -> list[str]:
    """`gptq,hqq` → its names, each once and in the order of `known`; empty for all."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := next((name for name in found if name not in known), None):
        raise AmqError(f"{what}: {unknown!r} is none of {', '.join(known)}")
    return [name for name in known if not found or name in found]
