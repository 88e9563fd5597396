"""One of the engines that take turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from amq.bench.worker import ChildProcess


@dataclass
class Contender:
    """An engine's facts, its configuration by kind of case (True: decode), and its processes, likewise.

    counted: what differs in what is counted of it. trials: what every way to run it reached, or why it failed.
    """

    name: str
    facts: dict[str, Any]
    workers: dict[bool, ChildProcess]
    configurations: dict[bool, str]
    counted: str = ""
    trials: list[dict[str, Any]] = field(default_factory=list)


class PeerMissing(Exception):
    """Why there is no peer to measure."""
