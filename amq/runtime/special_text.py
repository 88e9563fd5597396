"""Special tokens that users spell: `<|im_end|>` in a message is a text, not the end of the message.

Before a conversation is rendered, a mark goes into every such spelling; afterwards the text is cut at the marks, and
the tokenizer gets the parts, of which none holds the token. Only conversations that spell a special token have marks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from amq.errors import AmqError
from amq.runtime.chat import ChatOptions, Messages

MARKS = range(0xF0000, 0xF0100)
"""Private-use characters: the first that a conversation does not have is its mark."""
UNTRUSTED = frozenset({"user", "tool"})
"""Roles whose messages neither a developer nor a model wrote."""


class SpecialText:
    """Finds what must not become a special token.

    special: texts of special tokens. added: of all tokens that are looked for before a text is split into words. Where
    a template writes one of these that is not special (such as DeepSeek's `<｜User｜>`), users and tools cannot spell
    it either; models and developers can, who write `<think>` or `<tool_call>`.
    """

    def __init__(self, special: Iterable[str], added: Iterable[str], template: str) -> None:
        self._template = template
        special = set(special)
        self._special = _Spellings(special)
        self._all = _Spellings(special | {text for text in added if text.strip() and text in template})

    def marked(self, messages: Messages, options: ChatOptions) -> tuple[Messages, ChatOptions, str]:
        """Copies with marks in all strings, keys too, and the mark; what was given and "" where nothing is spelled.

        A string that ends with the beginning of a special token has a mark there: the template may put the rest of
        the token behind it, from another string.
        """
        ours = [options.tools, options.names]
        given = [(self._all if m.get("role") in UNTRUSTED else self._special, m) for m in messages]
        try:
            strings = [(spellings, text) for spellings, m in [*given, (self._special, ours)] for text in _strings(m)]
        except RecursionError as error:
            raise AmqError("the conversation is nested too deeply") from error
        if not any(spellings.touch(text) for spellings, text in strings):
            return messages, options, ""
        known = [self._template, *(text for _, text in strings)]
        mark = next((chr(code) for code in MARKS if not any(chr(code) in text for text in known)), "")
        if not mark:
            raise AmqError("the conversation spells special tokens, and every private-use character that could tell")
        tools, names = _marked(ours, self._special, mark)
        return [_marked(m, spellings, mark) for spellings, m in given], replace(options, tools=tools, names=names), mark

    def parts(self, text: str, mark: str) -> list[str]:
        """A rendered text without marks, cut where they stood within a special token's text; never empty."""
        if not mark or mark not in text:
            return [text]
        pieces = text.split(mark)
        plain = "".join(pieces)
        inside = bytearray(len(plain) + 1)  # of the places between two characters: 1 within a special token's text
        for start, length in self._all.places(plain):
            inside[start + 1 : start + length] = b"\1" * (length - 1)
        parts, begin, at = [], 0, 0
        for piece in pieces[:-1]:
            at += len(piece)
            if inside[at]:
                parts.append(plain[begin:at])
                begin = at
        return [*parts, plain[begin:]]


class _Spellings:
    """Texts, all of which have two characters or more: one of a single character cannot be cut."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted(text for text in texts if len(text) > 1)
        self._heads = {text[:2] for text in self._texts}
        self._first = {text[0] for text in self._texts}
        self._begun = {text[:n] for text in self._texts for n in range(1, len(text))}
        self._longest = max(map(len, self._begun), default=0)

    def touch(self, text: str) -> bool:
        """Whether `marked` changes anything."""
        if any(head in text for head in self._heads) and any(spelled in text for spelled in self._texts):
            return True
        return self._begins_at_end(text.rstrip())

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, length) of each text, also of those that overlap."""
        for spelled in self._texts:
            if spelled[:2] in text:
                start = text.find(spelled)
                while start >= 0:
                    yield start, len(spelled)
                    start = text.find(spelled, start + 1)

    def marked(self, text: str, mark: str) -> str:
        cuts = {start + 1 for start, _ in self.places(text)}
        end = text.rstrip()
        if self._begins_at_end(end):
            cuts.add(len(end))
        edges = [0, *sorted(cuts), len(text)]
        return mark.join(text[a:b] for a, b in zip(edges, edges[1:], strict=False))

    def _begins_at_end(self, text: str) -> bool:
        tail = text[-self._longest :] if self._longest else ""
        if not any(character in tail for character in self._first):
            return False
        return any(tail[at:] in self._begun for at in range(len(tail)))


def _strings(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, Mapping):
        for key, value in given.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(given, Sequence):
        for value in given:
            yield from _strings(value)


def _marked(given: Any, spellings: _Spellings, mark: str) -> Any:
    if isinstance(given, str):
        return spellings.marked(given, mark)
    if isinstance(given, Mapping):
        return {_marked(key, spellings, mark): _marked(value, spellings, mark) for key, value in given.items()}
    return [_marked(value, spellings, mark) for value in given] if isinstance(given, Sequence) else given
