"""Calibration text from a .jsonl file, one document a line: a conversation, or plain text.

    {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}      `tools` may be absent
    {"text": "…"}

A conversation becomes text by the model's own chat template, with everything its messages hold (tool calls,
`reasoning_content`): what the template keeps, thinking included, is kept, and its special tokens become tokens. The
tokens that begin every window (BOS) are taken off: a template puts them before each conversation, where they would
stand in the middle of windows. Other keys of a line or a message are the template's business.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.util.records import parse_record, shorten

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"
CHARACTERS = 4_000_000
"""Of text that is taken from a file; what stands behind is not read."""
LINE = 64 * 2**20
"""Characters that a line may have."""
THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""What models write around their thoughts."""
EXPECTED = 'expected an object with "messages" (a list of {"role", "content"}) or with "text" (a string)'


@dataclass(frozen=True)
class _Message:
    """What every message must have; the template sees all of it."""

    role: str


@dataclass(frozen=True)
class _Line:
    messages: list[_Message] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None


def is_conversations(source: str) -> bool:
    return source.lower().endswith(SUFFIX)


def conversations_text(path: Path, tokenizer: Any, begin: str) -> str:
    """The documents of a file, one after the other, each followed by a line's end.

    begin: what is taken off the beginning of each, the tokenizer's own tokens as text.
    Raises AmqError that names the file and the line, what was expected, and what came.
    """
    if not path.is_file():
        raise AmqError(f"no file {path}: expected one whose lines are conversations or texts, in JSON")
    parts: list[str] = []
    size = 0
    for where, data in _lines(path):
        document = _document(data, where, tokenizer).removeprefix(begin)
        parts.append(document if document.endswith("\n") else document + "\n")
        size += len(document)
        if size >= CHARACTERS:
            log.warning("%s: the text ends at line %s, which is %d characters", path, where.rpartition(":")[2], size)
            break
    if not parts:
        raise AmqError(f"{path} holds no line: {EXPECTED} in each")
    return "".join(parts)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(`FILE:LINE`, what the line holds); empty lines are passed over."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(LINE):
                number += 1
                where = f"{path}:{number}"
                if len(line) == LINE:
                    raise AmqError(f"{where}: the line is longer than {LINE} characters: split it")
                if line.strip():
                    yield where, _json(line, where)
    except UnicodeDecodeError as error:
        raise AmqError(f"{path} is not UTF-8 text: {error} (after line {number})") from None
    except OSError as error:
        raise AmqError(f"{path} cannot be read: {error}") from None


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise AmqError(f"{where}: not valid JSON ({reason}): {EXPECTED}, got {shorten(line.strip())}") from None


def _document(data: Any, where: str, tokenizer: Any) -> str:
    if not isinstance(data, dict) or ("messages" in data) == ("text" in data):
        came = f"an object with {', '.join(map(repr, data)) or 'nothing'}" if isinstance(data, dict) else shorten(data)
        raise AmqError(f"{where}: {EXPECTED}, one of the two, got {came[:200]}")
    line = parse_record(data, _Line, where)
    if line.text is None and not line.messages:
        raise AmqError(f"{where}: {EXPECTED}, got no messages")
    text = render(tokenizer, data["messages"], where, data.get("tools")) if line.text is None else line.text
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800", which JSON can spell, deep in a message
        raise AmqError(f"{where}: it holds half a character (a lone surrogate)") from None
    return text


def render(tokenizer: Any, messages: list[dict[str, Any]], where: str, tools: Any = None, answer: bool = False) -> str:
    """A conversation as the tokenizer's chat template writes it; answer: up to where the assistant begins to.

    Raises AmqError, which `where` begins, for a tokenizer without a template and for what the template refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise AmqError(f'{where}: the model has no chat template for "messages": give lines with "text"')
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=answer, tokenize=False)
    except Exception as error:  # a template is a program: what it makes of a conversation may fail in any way
        raise AmqError(
            f"{where}: the model's chat template does not take this conversation ({type(error).__name__}: {error})"
        ) from error
    return str(text)
