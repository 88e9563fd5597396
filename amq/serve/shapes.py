"""How each endpoint writes what the engine makes: a request's choices as OpenAI's objects."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from msgspec import UNSET, UnsetType

from amq.runtime.sampling import Choice
from amq.runtime.scheduler import Piece
from amq.runtime.tokenizer import Tokenizer
from amq.serve import responses as r
from amq.serve.replies import CallArguments, CallStart, Content, Part, Reasoning, ReplyParser
from amq.serve.worker import Job

MARK = uuid.uuid4().hex
"""Where the text of an event will stand: nobody else writes it."""
UTF8 = codecs.getincrementaldecoder("utf-8")
LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON lacks."""


@dataclass(eq=False)
class Candidate:
    """One choice of an answer, and the job that makes it.

    repeated: its prompt is another candidate's too, and counted there. echo: text that it begins with. parser: of
    calls and thinking, where there may be any.
    """

    index: int
    job: Job
    repeated: bool = False
    echo: str = ""
    parser: ReplyParser | None = None
    offset: int = field(default=0, init=False)  # characters of the tokens so far that are complete
    utf8: codecs.IncrementalDecoder = field(default_factory=lambda: UTF8("replace"), init=False)
    frame: tuple[bytes, bytes] | None = field(default=None, init=False)  # of its events, around their text
    _pieces: list[Piece] = field(default_factory=list, init=False)

    def parts(self, piece: Piece) -> list[Part]:
        if self.parser is None:
            return [Content(piece.text)] if piece.text else []
        parts = self.parser.push(piece.text) if piece.text else []
        return parts if piece.finished is None else parts + self.parser.finish()

    @property
    def finished(self) -> str:
        assert self.job.finished is not None  # asked for after the last piece only
        called = self.parser is not None and self.parser.has_calls
        return "tool_calls" if called and self.job.finished == "stop" else self.job.finished

    def keep(self, pieces: Sequence[Piece]) -> None:
        """For an answer that goes out whole."""
        self._pieces += pieces

    @property
    def kept(self) -> Piece:
        """All pieces as one."""
        choices = tuple(choice for piece in self._pieces for choice in piece.choices)
        return Piece("".join(piece.text for piece in self._pieces), choices, self.job.finished)


@dataclass
class Shape:
    """How one endpoint writes its answers; a new one for every request.

    identity: of the request, which the answer's id is made of. logprobs: whether they were asked for. usage: a last
    event with the usage; every_usage: each has the usage so far. legacy: calls as OpenAI had them before tools.
    """

    identity: str
    model: str
    tokenizer: Tokenizer
    logprobs: bool = False
    usage: bool = False
    every_usage: bool = False
    legacy: bool = False
    prefix: ClassVar[str]
    whole_kind: ClassVar[type[r.ChatCompletion] | type[r.Completion]]
    chunk_kind: ClassVar[type[r.ChatChunk] | type[r.CompletionChunk]]

    def __post_init__(self) -> None:
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{self.identity}",
            "created": int(time.time()),
            "model": self.model,
        }
        self._no_usage: None | UnsetType = None if self.usage else UNSET

    def start(self, candidate: Candidate) -> list[bytes]:
        """Events before the first text, once the first piece is here."""
        raise NotImplementedError

    def events(self, candidate: Candidate, piece: Piece) -> list[bytes]:
        """Those of a piece; none where there is nothing to say yet."""
        raise NotImplementedError

    def text_event(self, candidate: Candidate, text: str) -> bytes:
        """`text_chunk` as an event. All but the text is made once: it takes a tenth of the time, for every token."""
        if self.every_usage:
            return r.event(self.text_chunk(candidate, text))
        if candidate.frame is None:
            before, after = r.event(self.text_chunk(candidate, MARK)).split(r.to_json(MARK))
            candidate.frame = (before, after)
        before, after = candidate.frame
        return before + r.to_json(text) + after

    def text_chunk(self, candidate: Candidate, text: str, logprobs: Any = None) -> Any:
        """An event that is text."""
        raise NotImplementedError

    def last(self, candidates: Sequence[Candidate]) -> bytes:
        """The events after those of all candidates."""
        return (r.event(self.chunk([], usage(candidates))) if self.usage else b"") + r.DONE

    def last_event(self, candidate: Candidate) -> bytes:
        """Why a candidate ended, and its speed."""
        choices = [self.last_choice(candidate)]
        return r.event(self.chunk(choices, self.used(candidate), timings([candidate.job])))

    def last_choice(self, candidate: Candidate) -> Any:
        raise NotImplementedError

    def whole(self, candidates: Sequence[Candidate]) -> Any:
        """The answer that is not streamed."""
        choices: Any = [self.choice(candidate, candidate.kept) for candidate in candidates]
        speeds = timings([candidate.job for candidate in candidates])
        return self.whole_kind(**self._head, choices=choices, usage=usage(candidates), timings=speeds)

    def choice(self, candidate: Candidate, piece: Piece) -> Any:
        """piece: all that came."""
        raise NotImplementedError

    def chunk(self, choices: Any, usage: Any, timings: Any = UNSET) -> Any:
        return self.chunk_kind(**self._head, choices=choices, usage=usage, timings=timings)

    def used(self, candidate: Candidate) -> Any:
        """The usage that an event of `candidate` tells."""
        return usage([candidate]) if self.every_usage else self._no_usage


class ChatShape(Shape):
    """/v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", r.ChatCompletion, r.ChatChunk

    def start(self, candidate: Candidate) -> list[bytes]:
        choice = r.ChatChunkChoice(candidate.index, r.Delta(role="assistant", content=""))
        return [r.event(self.chunk([choice], self._no_usage))]

    def events(self, candidate: Candidate, piece: Piece) -> list[bytes]:
        if candidate.parser is None and piece.finished is None and not self.logprobs:  # most events
            return [self.text_event(candidate, piece.text)] if piece.text else []
        logprobs = self._logprobs(piece.choices) if self.logprobs and piece.choices else None
        parts, events = candidate.parts(piece), []
        if logprobs is not None and not parts:
            parts = [Content("")]
        for part in parts:
            if self.legacy and isinstance(part, CallStart | CallArguments) and part.index:
                continue  # the older form has one call
            if isinstance(part, Content) and logprobs is None:
                events.append(self.text_event(candidate, part.text))
                continue
            choice = r.ChatChunkChoice(candidate.index, self._delta(part), logprobs)
            events.append(r.event(self.chunk([choice], self.used(candidate))))
            logprobs = None
        if piece.finished is not None:
            events.append(self.last_event(candidate))
        return events

    def last_choice(self, candidate: Candidate) -> r.ChatChunkChoice:
        return r.ChatChunkChoice(candidate.index, r.Delta(), None, self._finished(candidate))

    def text_chunk(self, candidate: Candidate, text: str, logprobs: Any = None) -> Any:
        return self.chunk([r.ChatChunkChoice(candidate.index, r.Delta(content=text), logprobs)], self.used(candidate))

    def choice(self, candidate: Candidate, piece: Piece) -> r.ChatChoice:
        message = self._message(candidate.parts(piece))
        logprobs = self._logprobs(piece.choices) if self.logprobs else None
        return r.ChatChoice(candidate.index, message, logprobs, self._finished(candidate))

    def _finished(self, candidate: Candidate) -> str:
        finished = candidate.finished
        return "function_call" if self.legacy and finished == "tool_calls" else finished

    def _delta(self, part: Part) -> r.Delta:
        if isinstance(part, Content):
            return r.Delta(content=part.text)
        if isinstance(part, Reasoning):
            return r.Delta(reasoning_content=part.text)
        if isinstance(part, CallStart):
            function = r.CallDelta(name=part.name, arguments="")
            call = r.ToolCallDelta(index=part.index, id=part.id, type="function", function=function)
        else:
            function = r.CallDelta(arguments=part.text)
            call = r.ToolCallDelta(index=part.index, function=function)
        return r.Delta(function_call=function) if self.legacy else r.Delta(tool_calls=[call])

    def _message(self, parts: Sequence[Part]) -> r.ChatMessage:
        content = "".join(part.text for part in parts if isinstance(part, Content))
        thoughts = "".join(part.text for part in parts if isinstance(part, Reasoning))
        calls = {p.index: r.MadeCall(id=p.id, function=r.Call(p.name, "")) for p in parts if isinstance(p, CallStart)}
        for part in parts:
            if isinstance(part, CallArguments):
                calls[part.index].function.arguments += part.text
        message = r.ChatMessage(content=None if calls and not content else content)
        if thoughts:
            message.reasoning_content = thoughts
        if calls and self.legacy:
            message.function_call = next(iter(calls.values())).function
        elif calls:
            message.tool_calls = list(calls.values())
        return message

    def _logprobs(self, choices: Sequence[Choice]) -> r.ChatLogprobs:
        entries = []
        for choice in choices:
            top = [self._token(token, logprob) for token, logprob in choice.top]
            own = self._token(choice.token, choice.logprob)
            entries.append(r.ChosenLogprob(own.token, own.logprob, own.bytes, top))
        return r.ChatLogprobs(entries)

    def _token(self, token: int, logprob: float | None) -> r.TokenLogprob:
        text, data = self.tokenizer.token_text(token), self.tokenizer.token_bytes(token)
        return r.TokenLogprob(text, _finite(logprob), list(data))


class CompletionShape(Shape):
    """/v1/completions."""

    prefix, whole_kind, chunk_kind = "cmpl", r.Completion, r.CompletionChunk

    def start(self, candidate: Candidate) -> list[bytes]:
        if not candidate.echo:
            return []
        return [r.event(self.text_chunk(candidate, candidate.echo, self._prompt_logprobs(candidate)))]

    def events(self, candidate: Candidate, piece: Piece) -> list[bytes]:
        events = []
        if self.logprobs and piece.choices:
            logprobs = self._logprobs(candidate, piece.choices)
            events.append(r.event(self.text_chunk(candidate, piece.text, logprobs)))
        elif piece.text:
            events.append(self.text_event(candidate, piece.text))
        if piece.finished is not None:
            events.append(self.last_event(candidate))
        return events

    def last_choice(self, candidate: Candidate) -> r.CompletionChoice:
        return r.CompletionChoice(candidate.index, "", None, candidate.finished)

    def text_chunk(self, candidate: Candidate, text: str, logprobs: Any = None) -> Any:
        return self.chunk([r.CompletionChoice(candidate.index, text, logprobs)], self.used(candidate))

    def choice(self, candidate: Candidate, piece: Piece) -> r.CompletionChoice:
        logprobs = self._prompt_logprobs(candidate)
        if self.logprobs:
            logprobs = _joined(logprobs, self._logprobs(candidate, piece.choices))
        return r.CompletionChoice(candidate.index, candidate.echo + piece.text, logprobs, candidate.finished)

    def _prompt_logprobs(self, candidate: Candidate) -> r.CompletionLogprobs | None:
        """Of an echoed prompt; nothing is known of its first token, which nothing came before."""
        if not self.logprobs or not candidate.echo:
            return None
        first = self._logprobs(candidate, [Choice(candidate.job.prompt[0])])
        first.top_logprobs = [None]
        return _joined(first, self._logprobs(candidate, candidate.job.request.prompt_choices))

    def _logprobs(self, candidate: Candidate, choices: Sequence[Choice]) -> r.CompletionLogprobs:
        offsets = []
        for choice in choices:
            offsets.append(candidate.offset)
            candidate.offset += self._length(candidate, choice.token)
        return r.CompletionLogprobs(
            [self._name(choice.token) for choice in choices],
            [_finite(choice.logprob) for choice in choices],
            [self._top(choice) for choice in choices],
            offsets,
        )

    def _top(self, choice: Choice) -> dict[str, float] | None:
        """By text. Of several tokens with one text the likeliest counts; the chosen one is always there."""
        found: dict[str, float] = {}
        for token, logprob in (*choice.top, (choice.token, choice.logprob)):
            if logprob is not None:
                found.setdefault(self._name(token), max(logprob, LEAST_LOGPROB))
        return found

    def _length(self, candidate: Candidate, token: int) -> int:
        """Characters of the text that are complete with a token."""
        if token in self.tokenizer.special_ids and token not in candidate.job.sampling.shown_special:
            return 0
        return len(candidate.utf8.decode(self.tokenizer.token_bytes(token)))

    def _name(self, token: int) -> str:
        """As text; part of a character as its bytes, which are another token's too where they are replaced."""
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _joined(first: r.CompletionLogprobs | None, second: r.CompletionLogprobs) -> r.CompletionLogprobs:
    if first is None:
        return second
    return r.CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )


def usage(candidates: Sequence[Candidate]) -> r.Usage:
    """Of all together; a prompt counts once, however many choices it has."""
    prompts = [candidate.job for candidate in candidates if not candidate.repeated]
    prompt = sum(len(job.prompt) for job in prompts)
    new = sum(candidate.job.request.new_tokens for candidate in candidates)
    cached = sum(job.request.cached_tokens for job in prompts)
    return r.Usage(prompt, new, prompt + new, r.PromptDetails(cached))


def timings(jobs: Sequence[Job]) -> r.Timings:
    """Of all together, from the first that began to the last that ended."""
    begun = [job for job in jobs if job.first]
    if not begun:
        return r.Timings(None, None, None)
    read = sum(len(job.prompt) - job.request.cached_tokens for job in begun)
    steps = sum(max(job.request.new_tokens - 1, 0) for job in begun)
    started, first = min(job.started for job in begun), min(job.first for job in begun)
    all_read, last = max(job.first for job in begun), max(job.last for job in begun)
    return r.Timings(
        read / (all_read - started) if all_read > started else None,
        steps / (last - first) if last > first else None,
        first - min(job.visit.created for job in begun),
    )


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
