"""Grammars that hold a reply to calls of the client's tools, or to a JSON schema.

They are written in llguidance's dialect of lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md):
`%json {…}` is a text that a JSON schema describes, `<[7]>` the special token 7, and a rule marked `[lazy]` ends as soon
as it can. What they allow is exactly what the format's models were trained to write, and what ReplyParser reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from amq.errors import AmqError
from amq.runtime.grammar import Grammar
from amq.serve.replies.formats import ToolFormat

Special = Callable[[str], int | None]
"""Tokenizer.special_named: the id of the special token that is exactly this text."""
Thoughts = Literal["none", "allowed", "open"]
"""Before the reply: none, some between the markers of formats.THINKING, or the rest of some that the prompt opened."""

CALL_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python's json writes it, which is what models read in training."""
ANSWER_STYLE = {"whitespace_pattern": r"[ \n\t]{0,64}"}
"""Enough for indentation. Models that are held to JSON otherwise go on with white space until their tokens end."""
SPACE = r"/[ \n]{0,4}/"
TEXT = r"/(.|\n)*/"
PLAIN = r"/[ \n\r\t]*[^{ \n\r\t](.|\n)*/"
"""Text that does not begin as a call without a marker does."""


def response_grammar(
    response_format: Mapping[str, Any] | None, thoughts: Thoughts = "none", special: Special = lambda text: None
) -> Grammar | None:
    """Of OpenAI's response_format: any JSON object, or what a schema describes; None for text.

    Raises AmqError where it has no schema. Whether the schema's keywords are supported, the compiler says.
    """
    schema = _response_schema(response_format)
    if schema is None:
        return None
    if thoughts == "none":
        return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))
    rules = [f"start: {_thoughts(thoughts)} answer", *_thought_rules(special, thoughts), f"answer: {_json(schema)}"]
    return Grammar("lark", "\n".join(rules))


def tools_grammar(
    format: ToolFormat | None,
    tools: Sequence[Mapping[str, Any]],
    choice: str = "auto",
    parallel: bool = True,
    *,
    response_format: Mapping[str, Any] | None = None,
    thoughts: Thoughts = "none",
    special: Special = lambda text: None,
) -> Grammar | None:
    """Of a request with tools, [{"type": "function", "function": {…}}].

    choice: "required", one call or more; a tool's name, one call of it; "auto", what the model likes: calls are held to
    the tools' schemas if one of the tools is `strict`, and the answer to `response_format`. "none": no calls.
    parallel: more than one call is allowed.
    Returns None where the text is free. Raises AmqError for a tool that is not there, and for what this format cannot.
    """
    if choice == "none" or not tools:
        return response_grammar(response_format, thoughts, special)
    functions = [tool["function"] for tool in tools]
    schema = _response_schema(response_format)
    if choice == "auto" and schema is None and not any(function.get("strict") for function in functions):
        return None
    if format is None:
        raise AmqError("tools: the model has no chat template, so how it calls tools is not known")
    if choice not in ("auto", "required"):
        functions = [function for function in functions if function["name"] == choice]
        if not functions:
            raise AmqError(f"tool_choice: there is no tool {choice!r} in tools")
        parallel = False
    rules = _Rules(format, special)
    calls = rules.calls(functions, parallel and format.several)
    if choice != "auto":
        body = calls
    elif schema is not None:
        body = rules.calls_or_json(calls, schema)
    else:
        body = rules.calls_in_text(calls)
    start = f"start: {_thoughts(thoughts)} {body}"
    return Grammar("lark", "\n".join([start, *_thought_rules(special, thoughts), *rules.lines]))


class _Rules:
    """The rules of a format's calls, as lines of lark."""

    def __init__(self, format: ToolFormat, special: Special) -> None:
        self.format, self.lines = format, list[str]()
        known = {text: special(text) for text in format.spellings}
        self._special = {text: token for text, token in known.items() if token is not None}

    def calls(self, functions: Sequence[Mapping[str, Any]], several: bool) -> str:
        for place, function in enumerate(functions):
            self.lines.append(f"call{place}: {self._call(function, f'call{place}')}")
        self.lines.append("call: " + " | ".join(f"call{place}" for place in range(len(functions))))
        more = f"({self._literal(self.format.between)} call)*" if several else ""
        opens = ' " "? '.join(self._literal(part) for part in self.format.opens.split(" "))
        self.lines.append(f"calls: {opens} call {more} {self._literal(self.format.closes)}")
        return "calls"

    def calls_or_json(self, calls: str, schema: Mapping[str, Any]) -> str:
        if self._begins_as_json:
            raise AmqError(
                "response_format: not together with tools for this model, whose calls look like a JSON answer; set "
                "tool_choice to required or none"
            )
        self.lines.append(f"answer: {_json(schema)}")
        return f"({calls} | answer)"

    def calls_in_text(self, calls: str) -> str:
        """Text with calls where it has the marker of one; without a marker, nothing but calls, or text."""
        first = self._literal(self.format.opens + self.format.call[0])
        if self._begins_as_json:
            self.lines.append(f"TEXT: {PLAIN}")
            return f"({calls} | TEXT)?"
        self.lines.append(f"TEXT: {TEXT}")
        trigger, _, rest = first.partition(" ")
        raise NotImplementedError(trigger, rest)

    @property
    def _begins_as_json(self) -> bool:
        return (self.format.opens + self.format.call[0]).startswith("{")

    def _call(self, function: Mapping[str, Any], rule: str) -> str:
        before, middle, behind = self.format.call
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        name = function["name"]
        if self.format.xml:
            arguments = self._xml_arguments(schema, rule)
        else:
            name = json.dumps(name, ensure_ascii=False)[1:-1] if before.endswith('"') else name
            arguments = _json(schema, {**CALL_STYLE, "lenient": not function.get("strict")})
        return f"{self._literal(before + name + middle)} {arguments} {self._literal(behind)}"
