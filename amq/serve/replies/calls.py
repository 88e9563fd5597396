"""Reads the calls behind a marker. The spellings are told apart by how they begin.

{"name": "f", "arguments": {…}}      Hermes, Qwen, Llama ("parameters"); keys in any order
[{"name": "f", "arguments": {…}}, …] Mistral, SmolLM2
f[ARGS]{…}, f{…}                     Mistral's newer models, maybe with [CALL_ID]… between
<function=f><parameter=a>…           Qwen3-Coder
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from amq.serve.replies.formats import ARGUMENTS, CALL_ID, Marker
from amq.serve.replies.parts import CallArguments, CallStart, Part
from amq.serve.replies.reading import Broken, Emit, Reading, Waiting, read_text, read_value

NAME_KEYS, ARGUMENT_KEYS = ("name", "function"), ("arguments", "parameters")
OTHER_KEYS = ("type", "id")
"""Beside these in a call behind a strict marker; any other behind those that are not."""
PYTHON = {"True": "true", "False": "false", "None": "null"}
NAME = re.compile(r"[\w.:/-]+")
MAX_NAME = 256

Types = Mapping[str, Mapping[str, Any]]
"""By tool and argument, the JSON schema of the argument."""


class Calls:
    """Hands out the parts of the calls that are read.

    started: some of the call being read has been handed out.
    """

    def __init__(self, out: Callable[[Part], None], new_id: Callable[[], str]) -> None:
        self._out, self._new_id = out, new_id
        self.count, self.started = 0, False

    def arguments(self, name: str, text: str) -> None:
        """More of the arguments of the call being read, which starts with this if it has not."""
        if not self.started:
            self._out(CallStart(self.count, self._new_id(), name))
            self.count, self.started = self.count + 1, True
        self.more(text)

    def more(self, text: str) -> None:
        if text:
            self._out(CallArguments(self.count - 1, text))


def read_calls(reading: Reading, calls: Calls, marker: Marker, types: Types) -> Waiting[None]:
    """One call or more, without what closes them. Raises Broken where the text is none.

    types: of the tools that the client gave; behind a strict marker, a call of any other tool is none.
    """
    character = yield from _after_space(reading)
    if character == "[":
        yield from _read_list(reading, calls, marker.strict, types)
    elif character == "{":
        yield from _read_object(reading, calls, marker.strict, types)
        while marker.closes and (yield from _after_space(reading)) == "{":
            yield from _read_object(reading, calls, marker.strict, types)
    elif character == "<" or marker.opens == "<function=":
        yield from _read_xml(reading, calls, "" if marker.opens == "<function=" else "<function=", types)
    elif marker.strict:
        raise Broken
    else:
        yield from _read_named(reading, calls)


def _done(reading: Reading, calls: Calls) -> None:
    """A call has been read in full: if what follows is broken, it stays a call."""
    calls.started = False
    reading.keep()


def _after_space(reading: Reading) -> Waiting[str]:
    yield from reading.space()
    return (yield from reading.peek())


def _read_list(reading: Reading, calls: Calls, strict: bool, types: Types) -> Waiting[None]:
    yield from reading.expect("[")
    if (yield from _after_space(reading)) == "]":
        reading.take()
        return
    while True:
        yield from _read_object(reading, calls, strict, types)
        if (yield from _after_space(reading)) == "]":
            reading.take()
            return
        yield from reading.expect(",")
        yield from reading.space()


def _read_object(reading: Reading, calls: Calls, strict: bool, types: Types) -> Waiting[None]:
    """{"name": …, "arguments": {…}}. Arguments that come after the name are handed out as they come."""
    yield from reading.expect("{")
    name, held, complete = "", "", False
    while True:
        yield from reading.space()
        key = yield from read_text(reading)
        yield from reading.space()
        yield from reading.expect(":")
        yield from reading.space()
        if key in NAME_KEYS and not name and (yield from reading.peek()) == '"':
            name = _name((yield from read_text(reading)))
            if strict and types and name not in types:
                raise Broken
        elif key in ARGUMENT_KEYS and not complete:
            pieces: list[str] = []
            yield from _read_arguments(reading, partial(calls.arguments, name) if name else pieces.append)
            held, complete = "".join(pieces), True
        elif strict and key not in OTHER_KEYS:
            raise Broken
        else:
            yield from read_value(reading, len)
        if (yield from _after_space(reading)) == "}":
            break
        yield from reading.expect(",")
    if not name or (strict and not complete):
        raise Broken
    reading.take()
    if not calls.started:
        calls.arguments(name, held or "{}")
    _done(reading, calls)


def _name(text: str) -> str:
    if not text or not text.isprintable() or len(text) > MAX_NAME:  # a lone surrogate is not printable
        raise Broken
    return text


def _read_arguments(reading: Reading, emit: Emit) -> Waiting[None]:
    """An object; or a string that holds one, as OpenAI's own calls do; or null."""
    character = yield from reading.peek()
    if character == "{":
        yield from read_value(reading, emit)
    elif character == '"':
        text = _as_json((yield from read_text(reading)).strip())
        if text is None or not text.startswith("{"):
            raise Broken
        emit(text)
    else:
        yield from reading.expect("null")
        emit("{}")


def _as_json(text: str) -> str | None:
    """The text, if it is one value of JSON."""
    reading, pieces = Reading(), list[str]()
    reading.push(text)
    reading.ended = True
    try:
        for _ in read_value(reading, pieces.append):
            raise AssertionError("a reading that has ended does not pause")
    except Broken:
        return None
    return "".join(pieces) if reading.used_up else None


def _read_named(reading: Reading, calls: Calls) -> Waiting[None]:
    name = _name((yield from reading.run(NAME)))
    if (yield from reading.begins(CALL_ID)):
        reading.take(len(CALL_ID))
        yield from reading.run(NAME)
    if (yield from reading.begins(ARGUMENTS)):
        reading.take(len(ARGUMENTS))
    if (yield from _after_space(reading)) != "{":
        raise Broken
    yield from read_value(reading, lambda text: calls.arguments(name, text))
    _done(reading, calls)


def _read_xml(reading: Reading, calls: Calls, opens: str, types: Types) -> Waiting[None]:
    """Handed out when it is complete: only then are the arguments JSON."""
    yield from reading.expect(opens)
    name = _name((yield from reading.run(NAME)))
    yield from reading.expect(">")
    values: dict[str, str] = {}
    while True:
        yield from reading.space()
        if (yield from reading.begins("</function>")):
            break
        yield from reading.expect("<parameter=")
        key = yield from reading.run(NAME)
        yield from reading.expect(">")
        pieces: list[str] = []
        if not (yield from reading.until(("</parameter>",), pieces.append)):
            raise Broken
        reading.take(len("</parameter>"))
        text = "".join(pieces).removeprefix("\n").removesuffix("\n")
        values[key] = _xml_value(text, types.get(name, {}).get(key))
    reading.take(len("</function>"))
    pairs = ", ".join(f"{json.dumps(key)}: {value}" for key, value in values.items())
    calls.arguments(name, f"{{{pairs}}}")
    _done(reading, calls)


def _xml_value(text: str, schema: Any) -> str:
    """An XML argument as JSON: what it spells, if that is JSON; a string where its schema says so or there is none.

    One that may be a string or null is null where it spells null.
    """
    types = types_of(schema)
    if types and not ("string" in types and text != "null"):
        value = _as_json(PYTHON.get(text.strip(), text.strip()))
        if value is not None and ("string" not in types or "null" in types):
            return value
    return json.dumps(text, ensure_ascii=False)


def types_of(schema: Any) -> set[str]:
    """The types that a schema names: in `type`, in the choices of `anyOf`, by an `enum` of texts; else {"any"}."""
    if not isinstance(schema, Mapping):
        return set()
    choices = schema.get("anyOf")
    found = _named_types(schema).union(*map(_named_types, choices if isinstance(choices, list) else ()))
    return found or {"any"}


def _named_types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    named, values = schema.get("type"), schema.get("enum")
    if named is None and isinstance(values, list) and all(isinstance(value, str) for value in values):
        return {"string"}
    return {one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str)}
