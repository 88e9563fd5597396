"""What files say, as typed records: one strict reader for JSON that a user, a disk or a bug may have changed.

A record is a dataclass; `JsonFile` is one that is a whole file, with the schema that it names itself by, its writer and
its reader. `read_record` reads a file into one and `parse_record` a value that was read already: types are
strict (a boolean is no number, a text no list), keys that a record lacks are ignored, and each error names the file,
the place in it as a JSON path, what was expected and what came. Ranges are the record's own: `__post_init__` calls
`check_range`, so that no size is used before it is bounded.

msgspec does the work. It is imported when the first file is read: kernels also run on machines that have torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from amq.errors import AmqError
from amq.util.files import read_json, write_json

Record = TypeVar("Record")
File = TypeVar("File", bound="JsonFile")

MOST = 2**31 - 1
"""Of any size or count that a file gives: beyond every model, and small enough that products of two fit 64 bits."""


def read_record(path: Path, kind: type[Record], floats: bool = False) -> Record:
    """The JSON file `path` as a `kind`, a dataclass or any type that msgspec knows.

    floats: NaN and infinity are allowed, which JSON does not have but config.json of some models holds.
    Raises AmqError naming the file, the place in it, what was expected and what came.
    """
    return parse_record(read_json(path, floats), kind, str(path))


def parse_record(data: Any, kind: type[Record], source: str) -> Record:
    """`data`, as `json` reads it, as a `kind`; `source` names in errors what holds it."""
    import msgspec

    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at ")
        where, reason = f" at {place.strip('`')}" if place else "", reason[:1].lower() + reason[1:]
        raise AmqError(f"{source}{where}: {reason}; the file is damaged or was edited") from None
    except UnicodeEncodeError as error:  # "\ud800", which JSON can spell
        what = shorten(error.object)
        raise AmqError(f"{source}: {what} holds half a character (a lone surrogate); the file is damaged") from None


def to_json(value: Any) -> Any:
    """A record as `json` writes it, and `parse_record` reads it back; what is None by default and still so is left
    out."""
    if is_dataclass(value):
        named = ((f, getattr(value, f.name)) for f in fields(value))
        return {f.name: to_json(v) for f, v in named if v is not None or f.default is not None}
    if isinstance(value, Mapping):
        return {key: to_json(v) for key, v in value.items()}
    return [to_json(v) for v in value] if isinstance(value, (list, tuple)) else value


class JsonFile:
    """A dataclass that is a JSON file of its own: `write` is the one writer of such files and `read` their one reader.

    A file names its own kind: the field `schema` is one of SCHEMAS, of which the first is written, and the others
    are of earlier versions. REMEDY: what to do about a file of another schema.
    """

    SCHEMAS: ClassVar[tuple[str, ...]]
    REMEDY: ClassVar[str] = "it is of another kind, or of another version of amq"

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        write_json(path, to_json(self))

    @classmethod
    def read(cls: type[File], path: Path) -> File:
        """Raises AmqError naming the file, the place in it, what was expected and what came."""
        return cls.parse(read_json(path), str(path))

    @classmethod
    def parse(cls: type[File], data: Any, source: str) -> File:
        """`read` of what was read already; `source` names in errors what holds it."""
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        if found not in cls.SCHEMAS:
            raise AmqError(f"{source}: expected schema {cls.SCHEMAS[0]!r}, got {shorten(found)}: {cls.REMEDY}")
        return parse_record(data, cls, source)


def check_range(record: Any, *names: str, least: float = 1, most: float = MOST) -> None:
    """For `__post_init__`: raises ValueError unless the numbers `names` of `record`, None aside, are in the range."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not ((isinstance(value, int) or math.isfinite(value)) and least <= value <= most):
            raise ValueError(f"expected {name} from {least} to {most}, got {shorten(value)}")


def shorten(value: Any, length: int = 60) -> str:
    """`value` as text for an error, cut where a damaged file has megabytes of it."""
    huge = isinstance(value, int) and abs(value) > 10**40
    text = f"a number of {value.bit_length()} bits" if huge else repr(value)
    return text if len(text) <= length else f"{text[:length]}…"
