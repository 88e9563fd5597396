"""Answers as they come: the choices of a request, streamed or whole.

Nothing is sent before the first token, so that a request which fails until then gets a status code of its own. What
has come of all choices when a write is due goes out in one write.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from amq.runtime.scheduler import Piece
from amq.serve.errors import ApiError, Gone
from amq.serve.responses import TypedResponse
from amq.serve.responses import event as event_of
from amq.serve.shapes import Candidate, Shape
from amq.serve.worker import EngineThread

T = TypeVar("T")

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the events
}


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
    """What `work` returns; it is cancelled where the client leaves, or after `seconds`.

    Raises what it raises; Gone once the client has left, and ApiError 504 for one that took too long.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, watch), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone() if watch.done() else ApiError(504, "the request took too long", "timeout")
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer(Response):
    """Sends what the jobs of its candidates make, and cancels them when the client leaves or one of them fails."""

    def __init__(
        self,
        worker: EngineThread,
        candidates: Sequence[Candidate],
        shape: Shape,
        stream: bool,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.worker, self.candidates, self.shape, self.stream, self.given = worker, candidates, shape, stream, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, (self._stream if self.stream else self._whole)(scope, receive, send))
        except Gone:
            return
        finally:
            for candidate in self.candidates:
                self.worker.cancel(candidate.job, "client")  # nothing where it has ended

    async def _apart(self, write: Callable[[], T]) -> T:
        """What `write` makes; in a thread where it may be megabytes, so that other streams go on."""
        return await asyncio.to_thread(write) if self.shape.logprobs else write()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for batch in batches(self.candidates):
                for candidate, pieces in batch:
                    candidate.keep(pieces)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        response = await self._apart(lambda: TypedResponse(self.shape.whole(self.candidates), 200, self.given))
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, shape, begun = False, self.shape, set[int]()
        try:
            async for batch in batches(self.candidates):
                events: list[bytes] = []
                for candidate, pieces in batch:
                    if candidate.index not in begun:  # what is known of its prompt comes with its first piece
                        begun.add(candidate.index)
                        events += await self._apart(partial(list, shape.start(candidate)))
                    events += [event for piece in pieces for event in shape.events(candidate, piece)]
                if data := b"".join(events):
                    if not started:
                        headers = [(k.encode(), v.encode()) for k, v in {**STREAM_HEADERS, **self.given}.items()]
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                        started = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            data = shape.last(self.candidates)
        except ApiError as error:
            if not started:
                await error.response()(scope, receive, send)
                return
            data = event_of(error.body())
        await send({"type": "http.response.body", "body": data, "more_body": False})


async def batches(candidates: Sequence[Candidate]) -> AsyncIterator[list[tuple[Candidate, list[Piece]]]]:
    """What has come, of those of whom something has come, until all have finished. Raises the ApiError of the first
    that fails."""
    if len(candidates) == 1:  # without the tasks of many
        pieces: list[Piece] = []
        while not pieces or pieces[-1].finished is None:
            pieces = await candidates[0].job.pieces()
            yield [(candidates[0], pieces)]
        return
    waiting = {asyncio.ensure_future(candidate.job.pieces()): candidate for candidate in candidates}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            failures = [error for task in done if (error := task.exception()) is not None]  # of all: none is logged
            if failures:
                raise failures[0]
            came = [(waiting.pop(task), task.result()) for task in done]
            more = [candidate for candidate, pieces in came if pieces[-1].finished is None]
            waiting |= {asyncio.ensure_future(candidate.job.pieces()): candidate for candidate in more}
            yield sorted(came, key=lambda pair: pair[0].index)
    finally:
        for task in waiting:
            task.cancel()
