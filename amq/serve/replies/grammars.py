"""Grammars that hold a reply to calls of the client's tools, or to a JSON schema.

They are written in llguidance's dialect of lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md):
`%json {…}` is a text that a JSON schema describes, `<[7]>` the special token 7, and a rule marked `[lazy]` ends as soon
as it can. What they allow is exactly what the format's models were trained to write, and what ReplyParser reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from amq.errors import AmqError
from amq.model.conversations import THINKING
from amq.runtime.closed_schemas import closed
from amq.runtime.grammar import WHITESPACE, Grammar
from amq.serve.replies.calls import MAX_NAME, NAME, types_of
from amq.serve.replies.formats import ToolFormat

Special = Callable[[str], int | None]
"""Tokenizer.added_named: the id of the added token that is exactly this text.

llguidance takes all of these for special, also those that the tokenizer does not (<tool_call> of Qwen), and no literal
and no pattern matches the text of a special token.
"""
Thoughts = Literal["none", "allowed", "open"]
"""Before the reply: none, some between the markers of THINKING, or the rest of some that the prompt opened."""

CALL_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python's json writes it, which is what models read in training."""
LENIENT = {"lenient": True}
"""Keywords that llguidance lacks (uniqueItems of Python's sets, formats of paths and passwords) count for nothing, as
at OpenAI where a schema is not `strict`; in one that is, they are refused."""
MOST_CALLS = 16
"""Of one reply whose calls are held to a grammar: small models that have to call something do not find an end."""
SPACE = r"/[ \n]{0,4}/"
TEXT = r"/(.|\n)*/"
XML_TEXT = r"xml_text[lazy]: /(.|\n)*<\/parameter>/"
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
        return Grammar("json_schema", _dumped(schema))
    before, rules = _thoughts(thoughts, special)
    return Grammar("lark", "\n".join([f"start: {before} answer", *rules, f"answer: {_answer(schema)}"]))


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
    before, lines = _thoughts(thoughts, special)
    rules = _Rules(format, special, functions, parallel and format.several)
    if choice != "auto":
        body = rules.calls()
    elif schema is not None:
        body = rules.calls_or(schema)
    else:
        body = rules.calls_in_text()
    return Grammar("lark", "\n".join([f"start: {before} {body}", *lines, *rules.lines]))


class _Rules:
    """The rules of a format's calls, as lines of lark. Each method returns what `start` is, and adds the lines for it.

    several: more than one call is allowed.
    """

    def __init__(
        self, format: ToolFormat, special: Special, functions: Sequence[Mapping[str, Any]], several: bool
    ) -> None:
        self._format, self._functions, self._several = format, functions, several
        known = {text: special(text) for text in format.spellings}
        self._special = {text: token for text, token in known.items() if token is not None}
        self.lines: list[str] = []

    def calls(self, skip: str = "") -> str:
        """skip: the beginning of the first call, which has been written already."""
        opens, (before, *_) = self._format.opens, self._format.call
        if opens:
            opens = opens.removeprefix(skip)
        else:
            before = before.removeprefix(skip)
        names = [f"call{place}" for place in range(len(self._functions))]
        self.lines += [
            f"{name}: {self._call(function, before, name)}"
            for name, function in zip(names, self._functions, strict=True)
        ]
        self.lines.append(f"call: {' | '.join(names)}")
        again = f"{{0,{MOST_CALLS - 1}}}"
        more = f"({self._literal(self._format.between)} call){again}" if self._several and (opens or not skip) else ""
        first = ' " "? '.join(self._literal(part) for part in opens.split(" "))
        self.lines.append(f"calls: {first} call {more} {self._literal(self._format.closes)}")
        return "calls"

    def calls_or(self, schema: Mapping[str, Any]) -> str:
        """Calls, or an answer of this schema."""
        if self._begins_as_json:
            raise AmqError(
                "response_format: not together with tools for this model, whose calls look like a JSON answer; set "
                "tool_choice to required or none"
            )
        self.lines.append(f"answer: {_answer(schema)}")
        return f"({self.calls()} | answer)"

    def calls_in_text(self) -> str:
        """Text, with a call behind each marker. Where calls have no marker: calls, or text that looks like none."""
        if self._begins_as_json:
            self.lines.append(f"PLAIN: {PLAIN}")
            return f"({self.calls()} | PLAIN)?"
        marker = self._format.markers[0].opens
        lead, lazy = self._literal(marker), "" if marker in self._special else "[lazy]"
        self.lines += [f"TEXT: {TEXT}", f"lead{lazy}: TEXT {lead}"]
        return (
            f"(lead {self.calls(skip=marker)})* TEXT" if self._several else f"(lead {self.calls(skip=marker)} | TEXT)"
        )

    @property
    def _begins_as_json(self) -> bool:
        return (self._format.opens + self._format.call[0]).startswith("{")

    def _call(self, function: Mapping[str, Any], before: str, rule: str) -> str:
        _, middle, behind = self._format.call
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        if self._format.xml and isinstance(schema, Mapping):
            arguments = self._xml_arguments(schema, rule)
        else:
            arguments = _json(schema, {**CALL_STYLE, "lenient": not function.get("strict")})
        return f"{self._literal(before + _spelled(function['name']) + middle)} {arguments} {self._literal(behind)}"

    def _xml_arguments(self, schema: Mapping[str, Any], rule: str) -> str:
        """The arguments in the order of the schema; those that are not required may be missing."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise AmqError("tools: of a function's parameters, properties must be an object and required a list")
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        parts = []
        for place, (key, own) in enumerate(properties.items()):
            value = self._xml_value(own if isinstance(own, Mapping) else {}, shared)
            self.lines.append(f'{rule}_{place}: {self._literal(f"<parameter={_spelled(key)}>")} "\\n" {value} "\\n"')
            parts.append(f"{rule}_{place}" if key in required else f"{rule}_{place}?")
        return " ".join(parts)

    def _xml_value(self, schema: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
        """A value and what closes it."""
        if "string" not in types_of(schema):
            return f'{_json({**schema, **shared}, CALL_STYLE)} "\\n</parameter>"'
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
            return f'({" | ".join(map(json.dumps, choices))}) "\\n</parameter>"'
        if XML_TEXT not in self.lines:
            self.lines.append(XML_TEXT)
        return "xml_text"

    def _literal(self, text: str) -> str:
        """As a literal of lark; special tokens by their id."""
        pieces = re.split(f"({'|'.join(map(re.escape, self._special))})", text) if self._special else [text]
        return " ".join(
            f"<[{self._special[piece]}]>" if piece in self._special else json.dumps(piece) for piece in pieces if piece
        )


def _spelled(name: str) -> str:
    """A name that can stand in a call of every format."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise AmqError(f"tools: the name {name!r} is not one: use up to {MAX_NAME} letters, digits and _ - . : /")
    return name


def _thoughts(thoughts: Thoughts, special: Special) -> tuple[str, list[str]]:
    """What stands before the reply, and the rules for it."""
    if thoughts == "none":
        return "", []
    opens, closes = next((pair for pair in THINKING if special(pair[0]) is not None), THINKING[0])
    first, last = special(opens), special(closes)
    begin = json.dumps(opens) if first is None else f"<[{first}]>"
    rule = f"thoughts[lazy]: {TEXT} {json.dumps(closes)}" if last is None else f"thoughts: {TEXT} <[{last}]>"
    return "thoughts SPACE" if thoughts == "open" else f"({begin} thoughts SPACE)?", [rule, f"SPACE: {SPACE}"]


def _response_schema(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """None for text."""
    kind = (response_format or {}).get("type", "text")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return response_format.get("schema") or {"type": "object"}
    if kind != "json_schema":
        raise AmqError(f"response_format: the type {kind!r} is not known: text, json_object or json_schema")
    asked = response_format.get("json_schema") or {}
    schema = asked.get("schema")
    if not isinstance(schema, Mapping):
        raise AmqError("response_format: json_schema.schema must be an object")
    return schema if asked.get("strict") else {**schema, "x-guidance": {**LENIENT, **(schema.get("x-guidance") or {})}}


def _answer(schema: Mapping[str, Any]) -> str:
    return _json(schema, {"whitespace_pattern": WHITESPACE, **(schema.get("x-guidance") or {})})


def _json(schema: Any, style: Mapping[str, Any]) -> str:
    if not isinstance(schema, Mapping):
        raise AmqError("tools: a function's parameters must be a JSON schema, an object")
    return f"%json {_dumped({**closed(schema), 'x-guidance': style})}"


def _dumped(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except RecursionError as error:
        raise AmqError("the JSON schema is nested too deeply to be read") from error
