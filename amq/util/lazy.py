"""Names that are known at once and whose code is imported when it is asked for: help texts need no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from amq.errors import AmqError

Member = TypeVar("Member")


class Registry(Generic[Member]):
    """What users choose by name, in order: each name stands for `module:attribute`, or for the thing itself.

    what: says in errors what the names are of, such as "solver".
    """

    def __init__(self, what: str, entries: Mapping[str, str | Member]) -> None:
        self._what, self._entries = what, dict(entries)

    def __getitem__(self, name: str) -> Member:
        """Raises AmqError for a name that is not in the registry."""
        if name not in self._entries:
            raise AmqError(f"unknown {self._what} {name!r}: expected one of {', '.join(self)}")
        entry = self._entries[name]
        return cast(Member, load(entry) if isinstance(entry, str) else entry)

    def __setitem__(self, name: str, member: Member) -> None:
        self._entries[name] = member

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def items(self) -> Iterator[tuple[str, Member]]:
        """Imports everything."""
        return ((name, self[name]) for name in self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def load(place: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def lazy(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: its public names, {name: module that has it}, imported at first use."""

    def getattr_(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return getattr_
