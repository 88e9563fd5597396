"""A reply's text → its parts: reasoning, content, calls of tools. Text comes in any pieces; the parts are the same.

Content is handed out as soon as it can be nothing else. White space around thoughts and calls belongs to none of them.
A call whose arguments have begun to be handed out stays one, whatever follows: what the model broke is then handed out
as arguments, as far as the closing marker. All other text that turns out to be no call is content, in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from amq.model.conversations import THINKING
from amq.serve.replies.calls import Calls, Types, read_calls
from amq.serve.replies.formats import BARE, Marker, ToolFormat
from amq.serve.replies.parts import CallStart, Content, Part, Reasoning
from amq.serve.replies.reading import Broken, Reading, Waiting


class ReplyParser:
    """Reads one reply: `push` each piece of text, `finish` at the end.

    format: how calls are spelled; None: there are none (the client gave no tools).
    thinking: thoughts at the beginning are parted from the answer; else they are content.
    think_open: the prompt ended inside the thoughts (formats.thinks_open).
    new_id: of a call; the format's own by default.
    tools: as the client gave them, [{"type": "function", "function": {…}}]; they tell which arguments of an XML call
    are text and which are JSON.
    """

    def __init__(
        self,
        format: ToolFormat | None,
        thinking: bool = False,
        think_open: bool = False,
        new_id: Callable[[], str] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._format, self._thinking, self._think_open = format, thinking, think_open
        self._types = _types(tools)
        self._parts: list[Part] = []
        self._space: list[str] = []
        self._reading = Reading()
        self._calls = Calls(lambda part: self._parts.append(part), new_id or (format.new_id if format else str))
        self._reader = self._read()

    @property
    def has_calls(self) -> bool:
        return self._calls.count > 0

    def push(self, text: str) -> list[Part]:
        """The parts that are certain with this text."""
        self._reading.push(text)
        return self._resume()

    def finish(self) -> list[Part]:
        """The parts that were held back: no more text comes."""
        self._reading.ended = True
        return self._resume()

    def _resume(self) -> list[Part]:
        next(self._reader, None)
        parts, self._parts = self._parts, []
        return _joined(parts)

    def _read(self) -> Waiting[None]:
        if self._thinking:
            yield from self._read_thoughts()
        if self._format is None:
            self._parts.append(Content("".join(self._space)))
            yield from self._reading.rest(lambda text: self._parts.append(Content(text)))
            return
        yield from self._read_answer(self._format)
        if not self.has_calls:  # white space at the end of an answer is the answer's
            self._parts.append(Content("".join(self._space)))

    def _read_thoughts(self) -> Waiting[None]:
        """Those at the beginning. Where they are not closed, all is thought."""
        reading = self._reading
        closing = tuple(closes for _, closes in THINKING)
        if not self._think_open:
            reading.keep()
            yield from reading.space()
            for opens, closes in THINKING:
                if (yield from reading.begins(opens)):
                    reading.take(len(opens))
                    closing = (closes,)
                    break
            else:
                self._content(reading.give_back())
                return
            reading.give_back()
        yield from reading.space()
        found = yield from reading.until(closing, lambda text: self._hold_space(text, Reasoning))
        reading.take(len(found))
        self._space.clear()
        yield from reading.space()

    def _read_answer(self, format: ToolFormat) -> Waiting[None]:
        openings = {marker.opens: marker for marker in format.markers}
        bare = format.bare  # nothing but white space has come, or just a call has been read
        while True:
            if bare and (yield from self._object_begins()):
                marker = BARE
            elif found := (yield from self._reading.until(tuple(openings), self._content)):
                marker = openings[found]
                self._reading.keep()
            else:
                return
            bare = (yield from self._read_calls(marker)) and format.bare

    def _object_begins(self) -> Waiting[bool]:
        """Whether an object comes next, after a call maybe behind a semicolon. What is taken before it is kept."""
        reading = self._reading
        reading.keep()
        yield from reading.space()
        if self.has_calls and (yield from reading.peek()) == ";":
            reading.take()
            yield from reading.space()
        if (yield from reading.peek()) == "{":
            return True
        self._content(reading.give_back())
        return False

    def _read_calls(self, marker: Marker) -> Waiting[bool]:
        """The calls behind a marker; whether there are any. What is none becomes content."""
        reading, calls, before = self._reading, self._calls, self._calls.count
        reading.take(len(marker.opens))
        try:
            yield from read_calls(reading, calls, marker, self._types)
            broken = False
        except Broken:
            broken = True
        if not broken or calls.count > before:
            self._space.clear()  # what stood before the calls
        kept = reading.give_back()
        if broken and not calls.started:
            self._content(kept)
            return False
        if broken:
            yield from reading.rest(calls.more, marker.closes)
            calls.started = False
        yield from reading.space()
        if marker.closes and (yield from reading.begins(marker.closes)):
            reading.take(len(marker.closes))
            yield from reading.space()
        return True

    def _content(self, text: str) -> None:
        self._hold_space(text, Content)

    def _hold_space(self, text: str, kind: type[Content] | type[Reasoning]) -> None:
        """Hands out the text up to the white space at its end, which may stand before something else."""
        solid = text.rstrip()
        if solid:
            self._parts.append(kind("".join(self._space) + solid))
            self._space.clear()
        self._space.append(text[len(solid) :])


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of one kind as one; without the empty ones."""
    if not parts:
        return []
    joined: list[Part] = []
    for _, group in groupby(parts, key=lambda part: (type(part), getattr(part, "index", 0))):
        some = list(group)
        first = some[0]
        if isinstance(first, CallStart):
            joined += some
        elif text := "".join(part.text for part in some if not isinstance(part, CallStart)):
            joined.append(replace(first, text=text))
    return joined


def _types(tools: Sequence[Mapping[str, Any]]) -> Types:
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        schema = tool["function"].get("parameters")
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        found[tool["function"]["name"]] = properties if isinstance(properties, Mapping) else {}
    return found
