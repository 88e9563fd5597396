"""A visit: one HTTP request, as queue, log and errors know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amq.serve.worker import Job


@dataclass
class Visit:
    """Made by amq.serve.gate, which puts it into scope["state"] as `visit`.

    id: what responses and logs call it: the client's own X-Request-Id where that is short and plain, else a new one.
    client: whose turn it is in fair queues, `key:…` or `address:…`.
    owner: whose cached prefixes it may share: the digest of the key that was sent, "" where the server has none.
    created: when it came, of time.perf_counter. jobs: what it made the engine do.
    """

    id: str
    client: str
    owner: str
    created: float
    jobs: list[Job] = field(default_factory=list)
