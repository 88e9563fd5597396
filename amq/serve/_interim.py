"""Stand-ins for what other branches bring; goes with their merge."""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass, field

from amq.errors import AmqError
from amq.runtime.tokenizer import Tokenizer

try:
    from amq.runtime.grammar import Grammar, GrammarCompiler
except ImportError:

    @dataclass(frozen=True)
    class Grammar:
        kind: str
        text: str

    class GrammarCompiler:
        def __init__(self, tokenizer, vocab_size, end_ids):
            pass

        def constraint(self, grammar):
            raise AmqError("grammars are not supported")


try:
    from amq.runtime.chat import ChatOptions
    from amq.runtime.templates import BoundedRenderer
    from amq.runtime.tokenizer import TooLong
except ImportError:
    from amq.runtime.chat import render_chat

    class TooLong(AmqError):
        pass

    @dataclass(frozen=True)
    class ChatOptions:
        tools: object = None
        add_generation_prompt: bool = True
        continue_final_message: bool = False
        names: dict = field(default_factory=dict)
        special: bool = False

    @dataclass
    class ChatPrompt:
        tokens: list[int]
        text: str

    class BoundedRenderer:
        def close(self):
            pass

    encode = Tokenizer.encode

    def _encode(self, text, special=True, limit=None):
        return encode(self, text, special)

    def _encode_chat(self, messages, options=None, limit=None, render=None):
        if self._template is None:
            raise AmqError("the model has no chat template: give plain text (without --chat; /v1/completions)")
        names = {**self._names, **(options.names if options else {})}
        text = render_chat(self._template, messages, names)
        return ChatPrompt(encode(self, text, False), text)

    Tokenizer.encode, Tokenizer.encode_chat = _encode, _encode_chat
    Tokenizer.template = property(lambda self: self._template)

__all__ = ["BoundedRenderer", "ChatOptions", "Grammar", "GrammarCompiler", "TooLong"]
