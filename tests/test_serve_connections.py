"""Connections that say nothing, say it slowly, or are too many; bodies that do not end. On real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="part of the test extra")
pytest.importorskip("starlette", reason="the server needs the extra `serve`")

from helpers.processes import python_path  # noqa: E402
from helpers.serving import SECONDS, fake_runtime, serving, wait_for  # noqa: E402

from amq.serve import connections as connections_module  # noqa: E402
from amq.serve.connections import RESERVED, Connections  # noqa: E402
from amq.serve.uploads import Upload, Uploads  # noqa: E402

PATH = "/v1/completions"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextmanager
def connection(server: SimpleNamespace, data: bytes = b"") -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as link:
        link.sendall(data)
        yield link


def request(**more: Any) -> bytes:
    body = json.dumps({"model": "fake", "prompt": "abc", "max_tokens": 5, **more}).encode()
    return f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body


def answer(link: socket.socket) -> bytes:
    """One whole response, whose head may come by itself."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += link.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
    )
    while len(body) < length:
        body += link.recv(65536)
    return head


def rest(link: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := link.recv(65536):
            parts.append(part)
    return b"".join(parts)


def open_now(server: SimpleNamespace) -> int:
    return len(server.server._connections)


def closed(server: SimpleNamespace, why: str) -> float:
    registry = server.service.metrics.registry
    return registry.get_sample_value("amq_connections_closed_total", {"reason": why}) or 0.0


def test_silent_connections_lock_nobody_out():
    with serving(max_connections=4) as server, ExitStack() as held:
        silent = [held.enter_context(connection(server)) for _ in range(10)]
        wait_for(lambda: closed(server, "evicted") == 6)
        assert rest(silent[0]) == b""  # the oldest of them
        answer = httpx.post(f"{server.url}{PATH}", json={"model": "fake", "prompt": "abc"}, timeout=SECONDS)
        assert answer.status_code == 200
        silent[-1].sendall(request())
        assert silent[-1].recv(100).startswith(b"HTTP/1.1 200")  # the newest is still served
        assert open_now(server) <= 4


@dataclass(eq=False)
class Fake:
    """A connection, as others see it."""

    address: str
    since: float
    silent: bool = True
    evicted: bool = False

    def evict(self) -> None:
        self.evicted = True


def test_who_makes_room():
    """The oldest of the client with most silent connections; nobody who is at work."""
    room = Connections(5, 10, 10)
    quiet, busy = Fake("a", 1.0), Fake("b", 0.0, silent=False)
    many = [Fake("b", since) for since in (7.0, 5.0, 6.0)]
    for one in (quiet, busy, *many):
        assert room.enter(one)
    assert room.enter(Fake("a", 8.0)) and many[1].evicted
    assert not any(one.evicted for one in (quiet, busy, many[0], many[2])) and len(room) == 5
    assert room.enter(Fake("c", 9.0)) and quiet.evicted  # two each: the oldest of all
    for one in room._open:
        one.silent = False
    assert not room.enter(Fake("d", 9.0)) and len(room) == 5


def test_a_newcomer_among_busy_connections_is_told_to_come_again():
    with serving(fake_runtime(max_sequences=2), max_connections=2) as server, ExitStack() as held:
        server.engine.gate.clear()
        busy = [held.enter_context(connection(server, request())) for _ in range(2)]
        wait_for(lambda: len(server.worker._live) == 2)
        with connection(server, request()) as late:
            head, _, body = rest(late).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: 1" in head and b"Connection: close" in head
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        wait_for(lambda: closed(server, "full") == 1)
        server.engine.gate.set()
        assert all(link.recv(100).startswith(b"HTTP/1.1 200") for link in busy)
        with connection(server, request()) as later:  # both are silent now
            assert later.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: server.server._connections.lingering == 0)


def test_many_newcomers_are_cut_off(monkeypatch):
    monkeypatch.setattr(connections_module, "LINGERING", 0)
    with serving(fake_runtime(max_sequences=1), max_connections=1) as server:
        server.engine.gate.clear()
        with connection(server, request()) as busy:
            wait_for(lambda: len(server.engine.slots) == 1)
            with connection(server) as late:
                assert rest(late) == b""
            server.engine.gate.set()
            assert busy.recv(100).startswith(b"HTTP/1.1 200")


def test_slow_heads():
    with serving(header_timeout=1.0) as server:
        for head in (b"", HEAD.encode()):
            with connection(server, head) as link:
                assert rest(link) == b""
        assert closed(server, "headers") == 2
        with connection(server, request()) as link:  # the limit is not one of answers, nor of pauses between requests
            assert answer(link).startswith(b"HTTP/1.1 200")
            with pytest.raises(TimeoutError):
                link.settimeout(2.0)
                link.recv(1)
            link.settimeout(SECONDS)
            link.sendall(b"GET /health HTTP/1.1\r\n")
            assert rest(link) == b""
        wait_for(lambda: open_now(server) == 0)


def test_a_slow_answer_is_no_slow_head():
    runtime = fake_runtime()
    with serving(runtime, header_timeout=1.0) as server, connection(server, request()[:-10]) as link:
        runtime.engine.gate.clear()
        wait_for(lambda: open_now(server) == 1)
        with connection(server) as other:
            assert rest(other) == b""  # so much time has passed
        link.sendall(request()[-10:])
        wait_for(lambda: len(server.engine.slots) == 1)
        with connection(server) as other:
            assert rest(other) == b""
        runtime.engine.gate.set()
        assert link.recv(100).startswith(b"HTTP/1.1 200")


def test_a_body_that_does_not_come_makes_room():
    with serving(max_connections=1) as server, connection(server, request()[:-5]) as slow:
        wait_for(lambda: closed(server, "evicted") == 0 and open_now(server) == 1)
        wait_for(lambda: next(iter(server.server._connections._open))._answering)
        with connection(server, request()) as link:
            assert link.recv(100).startswith(b"HTTP/1.1 200")
        assert rest(slow).startswith(b"HTTP/1.1 503 ")
        assert not server.engine.slots


def test_memory_of_uploads_is_bounded():
    """The oldest of the client with most bytes is ended, and its bytes are gone."""

    async def arrive() -> None:
        uploads = Uploads(100)
        first, second, other = Upload("a"), Upload("a"), Upload("b")
        for upload, size in ((other, 40), (first, 30), (second, 30)):
            uploads.add(upload, bytes(size))
        assert uploads.size == 100 and not first.ended
        uploads.add(second, b"x")
        assert first.ended and not first.parts and uploads.size == 71 and not other.ended
        uploads.add(first, b"more")
        assert uploads.size == 71 and not first.parts
        uploads.remove(second)
        uploads.add(other, bytes(61))
        assert other.ended and uploads.size == len(uploads) == 0

    asyncio.run(arrive())


def test_uploads_that_do_not_end():
    """32 bodies of the largest size together: of 80 of one client 48 are ended, another's and later ones are served."""
    size = 20_000
    with serving(max_body=str(size), max_connections=200) as server, ExitStack() as held:
        uploads = server.app.middleware_stack
        while not hasattr(uploads, "_uploads"):
            uploads = uploads.app
        uploads = uploads._uploads
        assert uploads.limit == 32 * size
        part = f"{HEAD}Content-Length: {size}\r\n\r\n".encode() + b" " * (size - 1)
        links = [held.enter_context(connection(server, part)) for _ in range(80)]
        wait_for(lambda: sum(map(answered, links)) == 80 - 32)
        assert len(uploads) == 32 and uploads.size == 32 * (size - 1)
        ended = [link for link in links if answered(link)]
        assert all(b'"too_many_uploads"' in link.recv(65536) for link in ended)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"{server.url}{PATH}", json={"model": "fake", "prompt": "abc"})
            assert answer.result(SECONDS).status_code == 200
    assert len(uploads) == 0


def answered(link: socket.socket) -> bool:
    """Whether something has come."""
    link.setblocking(False)
    try:
        return bool(link.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        link.settimeout(SECONDS)


@pytest.mark.parametrize(
    ("soft", "hard", "limit", "now"),
    [
        (1024, 4096, 512, 1024),
        (256, 4096, 512, 512 + RESERVED),
        (256, resource.RLIM_INFINITY, 512, 512 + RESERVED),
        (256, 300, 300 - RESERVED, 300),
        (64, 64, 1, 64),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 512, resource.RLIM_INFINITY),
    ],
)
def test_file_descriptors_limit_connections(monkeypatch, caplog, soft, hard, limit, now):
    limits = [soft, hard]
    monkeypatch.setattr(connections_module.resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(connections_module.resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    assert connections_module.connection_limit(512) == limit
    assert limits == [now, hard]
    assert ("ulimit" in caplog.text) == (limit < 512)


PROCESS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
from helpers.serving import fake_runtime
from amq.serve import Server, ServeSettings, bind, create_app
from amq.serve.server import url
settings = ServeSettings(port=0, header_timeout=600.0)
listener = bind(settings)
app = create_app(fake_runtime(), settings)
Server(app, settings, lambda: print(url(listener), flush=True)).run([listener])
"""


def test_more_silent_connections_than_file_descriptors():
    """At once: asyncio accepts several before it looks at any."""
    command, environment = [sys.executable, "-c", PROCESS], {**os.environ, **python_path("tests")}
    with subprocess.Popen(command, text=True, env=environment, stdout=subprocess.PIPE) as process:
        try:
            server = SimpleNamespace(url=process.stdout.readline().strip())
            with ExitStack() as held:
                for _ in range(450):
                    held.enter_context(connection(server))
                for _ in range(3):
                    answer = httpx.post(f"{server.url}{PATH}", json={"model": "fake", "prompt": "abc"}, timeout=SECONDS)
                    assert answer.status_code == 200
        finally:
            process.kill()
