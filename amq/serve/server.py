"""uvicorn around the app: the listening socket, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from starlette.applications import Starlette

from amq.errors import AmqError
from amq.serve.connections import BACKLOG, KEEP_ALIVE_SECONDS, Connection, Connections, connection_limit
from amq.serve.settings import ServeSettings
from amq.serve.worker import EngineThread

QUEUED_CONNECTIONS = 1024
"""That the system keeps for us while we look at others."""

CLOSE_SECONDS = 5
"""After the drain: how long the last bytes may take to reach their readers."""

FAILED_SECONDS = 2.0
"""How long a server whose engine has failed goes on to say so, to its clients and at /health."""

STARTUP_FAILED_STATUS = 3
"""As uvicorn's own command ends then."""

FAILED_STATUS = 70
"""EX_SOFTWARE of sysexits.h: supervisors start the process again, as after every status but 0."""


def bind(settings: ServeSettings) -> socket.socket:
    """Reserves the address, without listening yet. Raises AmqError where it is taken or does not exist.

    Done before the model is loaded, so that a taken port is noticed at once; until the model is there, connections are
    refused, which every probe understands.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise AmqError(f"cannot listen on {settings.host} port {settings.port}: {error}; try another --port") from None
    return listener


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Runs an app of `create_app`.

    The first SIGTERM or SIGINT drains: it goes on listening, answers 503, and ends when the running requests have
    finished or after `drain` seconds. A second one ends the process at once. When the engine has failed it ends too,
    after a little time for the answers that say so.

    status: what the process should end with: 0, FAILED_STATUS or STARTUP_FAILED_STATUS.
    """

    def __init__(self, app: Starlette, settings: ServeSettings, ready: Callable[[], None] = lambda: None) -> None:
        metrics = app.state.service.metrics
        limit = connection_limit(settings.max_connections)
        closed = metrics.connections_closed
        self._connections = Connections(
            limit, settings.header_timeout, settings.write_timeout, lambda why: closed.labels(why).inc()
        )
        metrics.gauge("amq_connections", "Connections that are open", lambda: len(self._connections))
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(type[asyncio.Protocol], partial(Connection, self._connections)),
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                loop="asyncio",
                ws="none",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                server_header=False,
                proxy_headers=bool(settings.trust_proxy),
                forwarded_allow_ips=list(settings.trust_proxy),
            )
        )
        self._worker: EngineThread = app.state.service.worker
        self._drain, self._ready, self._deadline = settings.drain, ready, 0.0
        self.status = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:  # the log says why
            self.status = STARTUP_FAILED_STATUS
            return
        for listener in sockets or ():
            listener.listen(QUEUED_CONNECTIONS)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would raise the signal again at the end, and the process would not exit with 0."""
        if self._deadline:
            os._exit(128 + sig)
        self.drain()

    def drain(self) -> None:
        self._deadline = time.monotonic() + self._drain

    async def on_tick(self, counter: int) -> bool:
        if self._worker.failed:
            if not self.status:
                self.status, self._deadline = FAILED_STATUS, time.monotonic() + FAILED_SECONDS
            return self.should_exit or time.monotonic() >= self._deadline
        if self._deadline:
            if not self._worker.draining:
                self._worker.drain()
            if time.monotonic() >= self._deadline:
                self._worker.abort()
            if self._worker.idle:
                return True
        return await super().on_tick(counter)
