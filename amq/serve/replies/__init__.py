"""Stand-in until tool calls and thinking are parsed: everything is content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


@dataclass(frozen=True)
class ToolFormat:
    name: str

    def shown(self, tokenizer: Any) -> tuple[int, ...]:
        return ()


class ReplyParser:
    has_calls = False

    def __init__(self, format: ToolFormat | None, thinking: bool, think_open: bool) -> None:
        pass

    def push(self, text: str) -> list[Part]:
        return [Content(text)]

    def finish(self) -> list[Part]:
        return []


def format_of(template: str | None) -> ToolFormat | None:
    return None


def tools_grammar(format: ToolFormat | None, tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool) -> Any:
    return None


def response_grammar(response_format: Mapping[str, Any]) -> Any:
    return None
