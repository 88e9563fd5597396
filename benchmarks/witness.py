"""What others see of a server while somebody attacks it: watched from a process of its own, which nothing holds up.

Three threads: a client that streams one long answer after another, one that asks small questions, and /health. Times
are of time.monotonic(), which all processes of a machine share.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from serving import Client, Served, completion

TICK = 0.05
PATIENCE = 300.0
"""Seconds after which the witness itself gives up on an answer."""


Call = tuple[float, float | None, int]
"""(start, seconds, status); while it runs, None and 200: it is as slow as it is, but was not refused."""


@dataclass
class Notes:
    """streams: when bytes of each came; ends: how those that have ended ended ("" for well)."""

    streams: list[list[float]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    health: list[Call] = field(default_factory=list)
    second: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """The worst of a stretch of time, in seconds. refused: statuses other than 200 that the second client got."""

    pause: float
    second: float
    health: float
    refused: tuple[int, ...]
    unwell: tuple[int, ...]
    broken: tuple[str, ...]


class Witness:
    """`with Witness(server, victim, second) as witness`: watches from the first token of the victim's stream on."""

    def __init__(self, server: Served, victim: Client, second: Client, tokens: int) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()  # forked, it is there at once; this process has no threads yet
        arguments = (server.model, victim, second, tokens, theirs)
        self._process = context.Process(target=watch, args=arguments, daemon=True)
        self._notes: Notes | None = None

    def __enter__(self) -> Witness:
        self._process.start()
        if not self._pipe.poll(PATIENCE):
            raise RuntimeError("the witness's stream did not begin")
        self._pipe.recv()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        """Ends the watching and fetches what was noted."""
        self._pipe.send("stop")
        self._notes = self._pipe.recv()

    def seen(self, start: float, end: float) -> Seen:
        """The worst between two moments; what had not come by then counts as if it came at `end`."""
        notes = self._notes
        assert notes is not None, "stop it first"
        pauses = [0.0]
        for number, times in enumerate(notes.streams):
            known = [*times, end] if number >= len(notes.ends) else times
            pairs = zip(known, known[1:], strict=False)
            pauses += [min(b, end) - a for a, b in pairs if b >= start and a < end]
        second, health = _within(notes.second, start, end), _within(notes.health, start, end)
        return Seen(
            pause=max(pauses),
            second=max((seconds for seconds, _ in second), default=0.0),
            health=max((seconds for seconds, _ in health), default=0.0),
            refused=tuple(sorted({status for _, status in second} - {200})),
            unwell=tuple(sorted({status for _, status in health} - {200})),
            broken=tuple(sorted({end for end in notes.ends if end})),
        )


def _within(calls: list[Call], start: float, end: float) -> list[tuple[float, int]]:
    found = []
    for begun, seconds, status in calls:
        took = end - begun if seconds is None else seconds
        if begun < end and begun + took >= start:
            found.append((took, status))
    return found


# the watching process


def watch(model: str, victim: Client, second: Client, tokens: int, pipe: Connection) -> None:
    notes, begun = Notes(), threading.Event()
    body = completion(model, "Once upon a time", max_tokens=tokens, stream=True, ignore_eos=True)
    question = completion(model, "The sea", ignore_eos=True)
    for run, arguments in (
        (_stream, (victim, body, notes, begun)),
        (_repeat, (notes.second, second, "POST", "/v1/completions", question, 4 * TICK)),
        (_repeat, (notes.health, victim, "GET", "/health", None, TICK)),
    ):
        threading.Thread(target=run, args=arguments, daemon=True).start()
    begun.wait(PATIENCE)
    pipe.send("begun")
    pipe.recv()
    pipe.send(notes)


def _repeat(noted: list[Call], client: Client, method: str, path: str, body: Any, pause: float) -> None:
    while True:
        start = time.monotonic()
        noted.append((start, None, 200))
        answer = client.call(method, path, body, timeout=PATIENCE)
        noted[-1] = (start, answer.seconds, answer.status)
        time.sleep(pause)


def _stream(client: Client, body: dict[str, Any], notes: Notes, begun: threading.Event) -> None:
    import json

    content = json.dumps(body).encode()
    request = client.head("/v1/completions", len(content)).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    while True:
        times: list[float] = []
        notes.streams.append(times)
        parts, ended = [], ""
        try:
            with client.connect(PATIENCE) as connection:
                connection.sendall(request + content)
                while part := connection.recv(2**16):
                    times.append(time.monotonic())
                    parts.append(part)
                    begun.set()
            if b"data: [DONE]" not in b"".join(parts[-2:]):
                ended = (b"".join(parts)[-120:]).decode(errors="replace") or "closed without a word"
        except OSError as error:
            ended = repr(error)
        notes.ends.append(ended)
        if ended:
            time.sleep(TICK)
