"""Text that arrives in pieces, read as if it were there in full: generators pause where it is used up.

A reader is written top down, as for a complete text, and `yield from`s the methods here, which yield nothing but
pauses. Each character is looked at a bounded number of times, however the text is cut and whatever it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

from amq.runtime.text_stream import overlap

T = TypeVar("T")
Waiting = Generator[None, None, T]
"""Pauses until there is more text, then returns a T."""
Emit = Callable[[str], object]
"""Takes the next piece of something that is read."""

SPACE = re.compile(r"[ \t\n\r]+")
STRING = re.compile(r'[^"\\\x00-\x1f]+')
LITERAL = re.compile(r'[^\s,:\[\]{}"]+')
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
MAX_DEPTH = 64
"""Nested objects and lists in arguments. Templates and clients read them by recursion."""


class Broken(Exception):
    """The text is not what the reader expects, or ends too early."""


class Reading:
    """The text that has arrived and not been taken yet.

    ended: no more comes.
    """

    def __init__(self) -> None:
        self._text, self._at = "", 0
        self.ended = False
        self._kept: list[str] | None = None  # what was taken since `keep`; None: nothing is kept

    def push(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    def keep(self) -> None:
        self._kept = []

    def give_back(self) -> str:
        """What was kept; nothing is kept from here on."""
        kept, self._kept = self._kept or [], None
        return "".join(kept)

    @property
    def used_up(self) -> bool:
        return self._at == len(self._text)

    def take(self, count: int = 1) -> str:
        """The next `count` characters, which are there."""
        taken = self._text[self._at : self._at + count]
        self._at += count
        if self._kept is not None:
            self._kept.append(taken)
        return taken

    def peek(self) -> Waiting[str]:
        """The next character, "" at the end."""
        while self.used_up:
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def take_run(self, pattern: re.Pattern[str]) -> str:
        """What of the text that is there matches `pattern` from here on; "" if nothing does."""
        found = pattern.match(self._text, self._at)
        return self.take(found.end() - self._at) if found else ""

    def run(self, pattern: re.Pattern[str]) -> Waiting[str]:
        """All characters of a pattern of one class, [abc]+, up to one that is not of it."""
        taken = []
        while (yield from self.peek()) and (run := self.take_run(pattern)):
            taken.append(run)
        return "".join(taken)

    def space(self, emit: Emit = len) -> Waiting[None]:
        """Takes JSON's white space."""
        while (yield from self.peek()) and (run := self.take_run(SPACE)):
            emit(run)

    def expect(self, text: str, emit: Emit = len) -> Waiting[None]:
        """Takes `text`; raises Broken where something else comes."""
        for character in text:
            if (yield from self.peek()) != character:
                raise Broken
            emit(self.take())

    def begins(self, text: str) -> Waiting[bool]:
        """Whether `text` comes next. Takes nothing."""
        while True:
            there = self._text[self._at : self._at + len(text)]
            if there == text:
                return True
            if self.ended or not text.startswith(there):
                return False
            yield

    def rest(self, emit: Emit, marker: str = "") -> Waiting[None]:
        """Hands out all that comes before `marker`, or before the end."""
        if marker:
            yield from self.until((marker,), emit)
            return
        while (yield from self.peek()):
            emit(self.take(len(self._text) - self._at))

    def until(self, markers: tuple[str, ...], emit: Emit) -> Waiting[str]:
        """Hands out the text before the first of `markers`, which is returned and not taken; "" at the end."""
        pattern = _any_of(markers)
        while True:
            if found := pattern.search(self._text, self._at):
                emit(self.take(found.start() - self._at))
                return found[0]
            left = len(self._text) - self._at
            emit(self.take(left - (0 if self.ended else _overlap(self._text[self._at :], markers))))
            if self.ended:
                return ""
            yield


def _overlap(text: str, markers: tuple[str, ...]) -> int:
    """The longest end of `text` with which one of `markers` begins, not all of that marker."""
    tail = text[-max(map(len, markers)) :]
    if not any(marker[0] in tail for marker in markers):  # nearly always
        return 0
    return max(overlap(tail, marker) for marker in markers)


@lru_cache(maxsize=64)
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))


def read_value(reading: Reading, emit: Emit) -> Waiting[None]:
    """One value of JSON; its text goes to `emit` as it comes.

    Control characters inside strings, which models write as they are, come out escaped. Raises Broken, and everything
    taken by then has gone to `emit`.
    """
    closing: list[str] = []
    while True:
        character = yield from reading.peek()
        if character in ("{", "["):
            if len(closing) == MAX_DEPTH:
                raise Broken
            emit(reading.take())
            closing.append("}" if character == "{" else "]")
            yield from reading.space(emit)
            if (yield from reading.peek()) != closing[-1]:
                if character == "{":
                    yield from _read_key(reading, emit)
                continue
        elif character == '"':
            yield from read_string(reading, emit)
        else:
            yield from _read_literal(reading, emit)
        if not (yield from _read_after_value(reading, closing, emit)):
            return


def _read_after_value(reading: Reading, closing: list[str], emit: Emit) -> Waiting[bool]:
    """The commas and brackets behind a value; whether another value follows."""
    while closing:
        yield from reading.space(emit)
        character = yield from reading.peek()
        if character == closing[-1]:
            emit(reading.take())
            closing.pop()
        elif character == ",":
            emit(reading.take())
            yield from reading.space(emit)
            if closing[-1] == "}":
                yield from _read_key(reading, emit)
            return True
        else:
            raise Broken
    return False


def _read_key(reading: Reading, emit: Emit) -> Waiting[None]:
    yield from read_string(reading, emit)
    yield from reading.space(emit)
    yield from reading.expect(":", emit)
    yield from reading.space(emit)


def read_string(reading: Reading, emit: Emit) -> Waiting[None]:
    yield from reading.expect('"', emit)
    while True:
        character = yield from reading.peek()
        if character == '"':
            emit(reading.take())
            return
        if character == "\\":
            yield from _read_escape(reading, emit)
        elif not character:
            raise Broken
        elif character < " ":
            emit(json.dumps(reading.take())[1:-1])
        else:
            emit(reading.take_run(STRING))


def _read_escape(reading: Reading, emit: Emit) -> Waiting[None]:
    emit(reading.take())
    character = yield from reading.peek()
    if not character or character not in '"\\/bfnrtu':
        raise Broken
    emit(reading.take())
    for _ in range(4 if character == "u" else 0):
        digit = yield from reading.peek()
        if not digit or digit not in "0123456789abcdefABCDEF":
            raise Broken
        emit(reading.take())


def _read_literal(reading: Reading, emit: Emit) -> Waiting[None]:
    text = yield from reading.run(LITERAL)
    emit(text)
    if not NUMBER.fullmatch(text):
        raise Broken


def read_text(reading: Reading) -> Waiting[str]:
    """A string of JSON, decoded."""
    pieces: list[str] = []
    yield from read_string(reading, pieces.append)
    return str(json.loads("".join(pieces)))
