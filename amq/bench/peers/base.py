"""What is known of a peer before anything of it is imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from amq.util.machine import installed_versions


@dataclass(frozen=True)
class Package:
    """What a peer is installed as.

    project: on PyPI. module: what it is imported as. least: the oldest version that its bindings here fit, of numbers
    alone. install: the command.
    """

    project: str
    module: str
    least: str
    install: str

    def unsupported_reason(self) -> str | None:
        """Why it cannot run here; None where it can. Imports nothing."""
        if find_spec(self.module) is None:
            return f"{self.project} is not installed: {self.install}"
        found = self.version()
        if found and _numbers(found) < _numbers(self.least):
            return f"{self.project} {found} is older than {self.least}: {self.install}"
        return None

    def version(self) -> str:
        """Of what is installed; empty for a build that is on Python's path without metadata."""
        return installed_versions([self.project]).get(self.project, "")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


@dataclass(frozen=True)
class Quantizer:
    """What makes GGUF files of one type.

    kinds: its types that need no importance matrix.
    quantize: (source, output, kind, threads) writes a file. plan: (source, kind) returns the log of a run that writes
    none, which names every tensor with its size. Both are called in a process of their own.
    """

    package: Package
    kinds: Sequence[str]
    quantize: Callable[[str, str, str, int], None]
    plan: Callable[[str, str], str]


@dataclass(frozen=True)
class Peer:
    """A library that runs GGUF files.

    make: (path, threads, configuration, seed) → what a worker measures with. configurations: its ways to run a file,
    the most promising first. counted: what differs in what is counted of it. quantizer: of the files that it runs.
    """

    name: str
    package: Package
    make: Callable[[str, int, Any, int], Any]
    configurations: Sequence[Any]
    counted: str
    quantizer: Quantizer
