"""What clients get: OpenAI's objects and server-sent events, and the response that sends them while tokens come.

Nothing is sent before the first token, so that a request which fails until then gets a status code of its own. What
has come when a write is due goes out in one write. The constant part of an event is made once per stream.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from amq.runtime.sampling import Choice
from amq.runtime.scheduler import Piece
from amq.runtime.tokenizer import Tokenizer
from amq.serve.errors import ApiError
from amq.serve.worker import EngineThread, Job

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON lacks."""

_quote = json.encoder.encode_basestring_ascii  # what json.dumps calls for a text


@dataclass
class Shape:
    """How one endpoint writes its answers; a new one for every request.

    echo: text that the answer begins with. logprobs: whether they were asked for. usage: a last event with the usage.
    """

    model: str
    tokenizer: Tokenizer
    logprobs: bool = False
    usage: bool = False
    echo: str = ""
    offset: int = field(default=0, init=False)  # characters of the answer's tokens so far
    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __post_init__(self) -> None:
        head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}
        self._head = {**head, "system_fingerprint": None}
        start = json.dumps({"object": self.chunk_object, **self._head})[:-1]
        usage = ', "usage": null' if self.usage else ""
        self._before = f'data: {start}{usage}, "choices": [{{"index": 0, {self._open}'.encode()
        self._after = f'{self._close}, "logprobs": null, "finish_reason": null}}]}}\n\n'.encode()

    _open: ClassVar[str]
    _close: ClassVar[str]

    def start(self) -> bytes:
        """Events before the first text."""
        return self._before + _quote(self.echo).encode() + self._after if self.echo else b""

    def event(self, piece: Piece) -> bytes:
        """The event of a piece; nothing where there is nothing to say yet."""
        if self.logprobs and piece.choices:
            logprobs = json.dumps(self.logprobs_object(piece.choices))
            end = f'{self._close}, "logprobs": {logprobs}, "finish_reason": null}}]}}\n\n'
            return self._before + (_quote(piece.text) + end).encode()
        return self._before + _quote(piece.text).encode() + self._after if piece.text else b""

    def end(self, job: Job) -> bytes:
        """The last events of a stream."""
        choice = {"index": 0, **self.empty, "logprobs": None, "finish_reason": job.finished}
        last = {"object": self.chunk_object, **self._head, **({"usage": None} if self.usage else {})}
        events = _event({**last, "choices": [choice], "timings": timings(job)})
        if self.usage:
            events += _event({**last, "choices": [], "usage": usage(job)})
        return events + DONE

    def whole(self, job: Job, text: str, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer that is not streamed."""
        logprobs = self.logprobs_object(choices) if self.logprobs else None
        choice = {"index": 0, **self.content(self.echo + text), "logprobs": logprobs, "finish_reason": job.finished}
        figures = {"usage": usage(job), "timings": timings(job)}
        return {"object": self.whole_object, **self._head, "choices": [choice], **figures}

    empty: ClassVar[Mapping[str, Any]]

    def content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs_object(self, choices: Sequence[Choice]) -> dict[str, Any]:
        raise NotImplementedError


class ChatShape(Shape):
    """/v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    _open, _close, empty = '"delta": {"content": ', "}", {"delta": {}}

    def start(self) -> bytes:
        return self._before.replace(b'"delta": {', b'"delta": {"role": "assistant", ') + b'""' + self._after

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs_object(self, choices: Sequence[Choice]) -> dict[str, Any]:
        tokens = [
            {
                **self._token(choice.token, choice.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in choice.top],
            }
            for choice in choices
        ]
        return {"content": tokens, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, data = self.tokenizer.token_text(token), self.tokenizer.token_bytes(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


class CompletionShape(Shape):
    """/v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    _open, _close, empty = '"text": ', "", {"text": ""}

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs_object(self, choices: Sequence[Choice]) -> dict[str, Any]:
        name = self.tokenizer.token_text
        tokens, offsets = [name(choice.token) for choice in choices], []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(choice.logprob) for choice in choices],
            "top_logprobs": [{name(token): _finite(p) for token, p in choice.top} for choice in choices],
            "text_offset": offsets,
        }


def usage(job: Job) -> dict[str, Any]:
    prompt, new = len(job.prompt), job.request.new_tokens
    details = {"prompt_tokens_details": {"cached_tokens": job.request.cached_tokens}}
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, **details}


def timings(job: Job) -> dict[str, float | None]:
    """Speeds of reading the prompt and of the tokens after the first; null where nothing was measured.

    first_token_seconds: since the request came, waiting included.
    """
    read, steps = len(job.prompt) - job.request.cached_tokens, job.request.new_tokens - 1
    return {
        "prompt_tokens_per_second": read / (job.first - job.started) if job.first > job.started else None,
        "tokens_per_second": steps / (job.last - job.first) if job.last > job.first else None,
        "first_token_seconds": job.first - job.created if job.first else None,
    }


class Answer(Response):
    """Sends what a job makes, streamed or whole, and cancels it when the client leaves."""

    def __init__(self, worker: EngineThread, job: Job, shape: Shape, stream: bool) -> None:
        super().__init__()
        self.worker, self.job, self.shape, self.stream = worker, job, shape, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(self._watch(receive))
        try:
            if self.stream:
                await self._stream(scope, receive, send)
            else:
                await self._whole(scope, receive, send)
        finally:
            watch.cancel()
            self.worker.cancel(self.job, "client")  # nothing where it has ended

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.worker.cancel(self.job, "client", Gone())

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[Piece] = []
        try:
            while not pieces or pieces[-1].finished is None:
                pieces += await self.job.pieces()
        except ApiError as error:
            if not isinstance(error, Gone):
                await error.response()(scope, receive, send)
            return
        choices = [choice for piece in pieces for choice in piece.choices]
        body = self.shape.whole(self.job, "".join(piece.text for piece in pieces), choices)
        await JSONResponse(body)(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            pieces = await self.job.pieces()
        except ApiError as error:
            if not isinstance(error, Gone):
                await error.response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        events = [self.shape.start()]
        event = self.shape.event
        try:
            while True:
                events += [event(piece) for piece in pieces]
                if pieces[-1].finished is not None:
                    break
                if data := b"".join(events):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                pieces, events = await self.job.pieces(), []
            events.append(self.shape.end(self.job))
        except ApiError as error:
            if isinstance(error, Gone):
                return
            events = [_event(error.body())]
        await send({"type": "http.response.body", "body": b"".join(events), "more_body": False})


class Gone(ApiError):
    """Made anew each time: an exception keeps the frames that it passed through, and with them the request."""

    def __init__(self) -> None:
        super().__init__(499, "the client left")


STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


def _event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
