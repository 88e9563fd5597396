"""`TextStream` turns tokens into text one at a time.

Where the tokenizer's decoder works on bytes (byte-level BPE, and SentencePiece with byte fallback: nearly every
language model), a token costs a dictionary lookup, however long the text is. Other decoders are asked with the tokens
since the last complete character.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from amq.runtime.tokenizer import Tokenizer

LOST = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes of UTF-8, and so tokens, that a character has at most."""


class TextStream:
    """Tokens → text, piece by piece: joined, the pieces are `Tokenizer.decode` of all tokens, up to the stop text.

    shown: special tokens that become their text; the others are left out. stop: may be changed between tokens; what was
    handed out by then ends nothing.
    No piece ends in half a character, nor in what may become a stop text; bytes that can be no character's are U+FFFD.
    (One difference: after an invalid byte, tokenizers with byte fallback give up the valid characters before it too.
    Those have been handed out by then.)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self.stop = tokenizer, tuple(stop)
        self._shown, self._hidden = shown, tokenizer.special_ids - shown
        self._text = _decoder(tokenizer)
        self._strip, self._left = tokenizer.decoding.strip
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is complete with this token; "" once a stop text has come."""
        if self.stopped or token in self._hidden:
            return ""
        if token in self._shown:
            return self._release(self._stripped(self._text.finish()) + self._tokenizer.token_name(token))
        return self._release(self._stripped(self._text.push(token)))

    def finish(self) -> str:
        """What was held back: no more tokens come. "" after a stop text."""
        if self.stopped:
            return ""
        text = self._release(self._stripped(self._text.finish()))
        if not self.stopped:
            text += self._held
            self._held = ""
        return text

    def _stripped(self, text: str) -> str:
        while self._left and text:
            if not text.startswith(self._strip):
                self._left = 0
                break
            text, self._left = text[len(self._strip) :], self._left - 1
        return text

    def _release(self, new: str) -> str:
        """Of what was held and the new text, the part that belongs to no stop text; notices the first stop text."""
        if not self.stop or not new:
            return new
        text = self._held + new
        found = [(place + len(stop), place) for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:  # the one that is complete first
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(overlap(text, stop) for stop in self.stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Decoder(Protocol):
    """Tokens that are not special → text."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str:
        """What an incomplete character becomes where tokens end, or one of another kind comes."""


def _decoder(tokenizer: Tokenizer) -> _Decoder:
    if not tokenizer.decoding.exact:
        return _Windows(tokenizer)
    return _Bytes(tokenizer) if tokenizer.decoding.byte_level else _Fallback(tokenizer)


class _Bytes:
    """Byte-level tokens: any of them may end within a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._token_bytes(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Fallback:
    """Tokens of whole characters, and others of a byte each: a run of these is UTF-8, or each byte of it is lost."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._how = tokenizer, tokenizer.decoding
        self._first, self._started = self._how.first, False
        self._run = b""  # bytes of an incomplete character
        self._wrong = False  # the run had a byte that is no UTF-8

    def push(self, token: int) -> str:
        data = self._tokenizer.token_bytes(token)
        if not data:
            return ""
        first, self._started, started = self._first, True, self._started
        if self._tokenizer.is_byte(token):
            text = self._byte(data)
            return text.replace(first, "").replace(*self._how.replaced) if self._how.metaspace else text
        self._first = ""
        text = self._tokenizer.token_name(token)
        return self.finish() + (text if started else text.replace(first, "")).replace(*self._how.replaced)

    def _byte(self, byte: bytes) -> str:
        if self._wrong:
            return LOST
        self._run += byte
        try:
            text = self._run.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            text, self._wrong = LOST * len(self._run), True
        self._run = b""
        return text

    def finish(self) -> str:
        text, self._run, self._wrong = LOST * len(self._run), b"", False
        return text


class _Windows:
    """For decoders that look at a token's neighbours at most: decodes the last piece's tokens and those after it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decode = tokenizer, tokenizer.decode
        self._before: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        if not self._tokenizer.token_name(token):
            return ""  # an unknown id, which is nobody's neighbour
        self._pending.append(token)
        text = self._decode([*self._before, *self._pending])
        if text.endswith(LOST) and len(self._pending) < LONGEST_CHARACTER:
            return ""
        return self._new(text)

    def finish(self) -> str:
        return self._new(self._decode([*self._before, *self._pending])) if self._pending else ""

    def _new(self, text: str) -> str:
        new = text[len(self._decode(self._before)) :]
        self._before, self._pending = self._pending, []
        return new


def overlap(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` begins, not all of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
