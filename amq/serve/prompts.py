"""The one thread that makes prompts: templates, tokens, grammars.

All that costs is done here and never on the event loop, whose every stream would stand still; in turns between
clients, like the slots of the engine, and bounded, so that nobody's long texts hold up the others' short ones.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from amq.serve.errors import ApiError
from amq.serve.queue import FairQueue

T = TypeVar("T")


class _Draft(Generic[T]):
    """Something that is to be made. result: set on the event loop."""

    def __init__(self, client: str, function: Callable[[], T], result: asyncio.Future[T]) -> None:
        self.client, self.function, self.result = client, function, result

    def end(self, value: T | None, error: BaseException | None) -> None:
        if self.result.done():
            return  # the client left meanwhile
        if error is not None:
            self.result.set_exception(error)
        else:
            self.result.set_result(value)  # type: ignore[arg-type]


class PromptThread:
    """`start` and `stop` it on the event loop that uses it.

    room: how many may wait. full: makes the error of who has to leave because more came.
    """

    def __init__(self, room: int, full: Callable[[], ApiError]) -> None:
        self.room, self._full = room, full
        self._wake = threading.Condition()
        self._waiting: FairQueue[_Draft[Any]] = FairQueue()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="amq-prompts", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread once it has made what it is at; the server has nobody left to answer by then."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    async def make(self, client: str, function: Callable[[], T]) -> T:
        """`function()`, called in the thread; not at all where the caller is cancelled before its turn.

        Raises what the function raises, and ApiError 429 where too many wait and this client has most of them.
        """
        draft = _Draft(client, function, asyncio.get_running_loop().create_future())
        with self._wake:
            refused = self._waiting.push(draft, len(self._waiting) >= self.room)
            self._wake.notify()
        if refused is draft:
            raise self._full()
        if refused is not None:
            refused.end(None, self._full())
        try:
            return await draft.result
        finally:
            with self._wake:
                self._waiting.remove(draft)

    def _run(self) -> None:
        assert self._loop is not None  # `start` set it before it started the thread
        while True:
            with self._wake:
                while not self._stopping and not len(self._waiting):
                    self._wake.wait()
                draft = self._waiting.pop()
                if self._stopping or draft is None:
                    return
            value, error = None, None
            try:
                value = draft.function()
            except BaseException as raised:  # noqa: BLE001 (a Rust panic is no Exception, and is this request's alone)
                error = raised if isinstance(raised, Exception) else RuntimeError(f"{type(raised).__name__}: {raised}")
            with suppress(RuntimeError):  # the loop is closed: the server ended, and nobody waits any more
                self._loop.call_soon_threadsafe(draft.end, value, error)
            del draft, value, error  # or the thread would hold the last prompt until the next one comes
