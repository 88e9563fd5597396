"""A visit: one HTTP request, as queue, log and errors know it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amq.serve.worker import Job


@dataclass
class Visit:
    """id: what responses and logs call it. client, owner, created: as in scope["state"] (amq.serve.gate).
    jobs: what it made the engine do."""

    id: str
    client: str
    owner: str
    created: float
    jobs: list[Job] = field(default_factory=list)


current: ContextVar[Visit | None] = ContextVar("visit", default=None)
"""Of the task that answers a request; None elsewhere."""
