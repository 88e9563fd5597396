"""Connections: how many there may be, and what each may take its time for.

A connection is *silent* while it has no whole request: it has sent nothing, or a part of a request's head or body, or
waits for its client's next one. When there are as many as there may be, a newcomer takes the place of the one that has
been silent longest, of the client that has most of these; without any it is answered with 503. So whoever opens many
connections and says nothing on them closes its own.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from amq.serve.door import client_address
from amq.serve.errors import ApiError
from amq.serve.responses import to_json

log = logging.getLogger("amq.serve")

KEEP_ALIVE_SECONDS = 60
"""How long a connection may wait for its client's next request."""

LINGER_SECONDS, LINGERING = 2.0, 32
"""How long a client that was refused may take to read why, and how many of them at once: who closes while the client
still sends makes its system throw the answer away."""

BACKLOG = 128
"""Connections that asyncio accepts before any of them is looked at."""

READ_BYTES = 2**16
"""Of one read. asyncio's own 256 KiB, cut to what came, leave holes: 300 bodies of 1 MiB that do not end cost 100 to
130 MiB with them and 48 without, 32 MiB of bodies being kept."""

RESERVED = 64 + BACKLOG
"""File descriptors that are kept for everything else."""


def connection_limit(wanted: int) -> int:
    """As many of `wanted` as the process's file descriptors allow, whose limit is raised where it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < wanted + RESERVED:
        soft = wanted + RESERVED if hard == unlimited else min(wanted + RESERVED, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == unlimited or soft >= wanted + RESERVED:
        return wanted
    limit = max(soft - RESERVED, 1)
    log.warning("%d connections at most, not %d: the process may have %d open files (ulimit -n)", limit, wanted, soft)
    return limit


class Connections:
    """All connections of a server.

    limit: how many there may be. header_seconds: that the head of a request may take, from the connection or the first
        byte. write_seconds: that a client may leave a full write buffer alone.
    closed: told why, whenever one is ended: `full`, `evicted`, `headers`, `reader`.
    """

    def __init__(
        self, limit: int, header_seconds: float, write_seconds: float, closed: Callable[[str], None] = lambda why: None
    ) -> None:
        self.limit, self.header_seconds, self.write_seconds, self.closed = limit, header_seconds, write_seconds, closed
        self.lingering = 0
        self._open: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Connection) -> bool:
        """Whether there is a place for it, perhaps another's."""
        if len(self._open) >= self.limit:
            silent = [other for other in self._open if other.silent]
            if not silent:
                return False
            counts = Counter(other.address for other in silent)
            oldest = min(silent, key=lambda other: (-counts[other.address], other.since))
            self.leave(oldest)
            oldest.evict()
        self._open[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        self._open.pop(connection, None)


class Connection(H11Protocol):
    """One of `connections`. address: of its client. since: when it was made, or ended its latest answer."""

    def __init__(self, connections: Connections, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._all, self.address, self.since = connections, "", 0.0
        self._refused = False
        self._timers: dict[str, asyncio.TimerHandle] = {}  # by what is waited for

    @property
    def silent(self) -> bool:
        return not self._answering or self.cycle.more_body

    @property
    def _answering(self) -> bool:
        """Whether a request's head is here, and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        self.address, self.since = client_address(self.client[0] if self.client else ""), time.monotonic()
        if self._all.enter(self):
            self._wait("headers", self._all.header_seconds, self._no_headers)
        else:
            self._all.closed("full")
            text = "the server has as many connections as it takes, and all of them are at work: try again later"
            self._refuse(ApiError(503, text, "too_many_connections", None, 1))

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._wait_for_headers()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        self.cycle.body = self.cycle.body[:0]  # what nobody asked for; bytes or a bytearray, by uvicorn's version
        super().on_response_complete()  # begins with a request that came meanwhile

    def _wait_for_headers(self) -> None:
        """Of the next request, once its first byte is here."""
        if self._answering:
            self._stop("headers")
        elif "headers" not in self._timers:
            self._wait("headers", self._all.header_seconds, self._no_headers)

    def _no_headers(self) -> None:
        self._all.closed("headers")
        self.transport.abort()

    def evict(self) -> None:
        """Another needs its place."""
        self._all.closed("evicted")
        if self._answering and not self.cycle.response_started:
            text = "the server needs this connection's place, and the request's body had not arrived: try again later"
            self._refuse(ApiError(503, text, "too_many_connections", None, 1))
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answers without the app, which hears that the client has left; then closes."""
        self._refused = True
        self._stop("headers")
        if self.transport.is_closing() or self._all.lingering >= LINGERING:
            self.transport.abort()
            return
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        self._all.lingering += 1
        self._wait("linger", LINGER_SECONDS, self.transport.abort)
        self.transport.write(_answer(error))
        self.transport.write_eof()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait("reader", self._all.write_seconds, self._no_reader)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("reader")

    def _no_reader(self) -> None:
        self._all.closed("reader")
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.leave(self)
        self._all.lingering -= "linger" in self._timers
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(exc)

    def _wait(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, then)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


def _answer(error: ApiError) -> bytes:
    """An HTTP response."""
    body = to_json(error.body())
    head = [f"HTTP/1.1 {error.status} ", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    if error.retry_after is not None:
        head.append(f"Retry-After: {error.retry_after}")
    return "\r\n".join([*head, "Connection: close", "", ""]).encode() + body
