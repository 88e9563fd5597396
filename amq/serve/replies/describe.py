"""Conversations with tools as chat templates take them.

Clients send a call's arguments as text; templates want the object. Templates that know no tools get them in the system
message, and the calls and results of earlier turns as text: the calls as the model writes them, the results as users'
messages in <tool_response>.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from amq.errors import AmqError
from amq.runtime.chat import with_object
from amq.serve.replies.formats import ToolFormat

Message = Mapping[str, Any]


def describe_tools(
    format: ToolFormat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The messages for the model's chat template.

    messages: as of OpenAI's chat completions, `content` text or parts of type text.
    tools: those that the model may call now, [{"type": "function", "function": {…}}], or none. Where
    `format.described`, they go into the messages, and the template must not get them too.
    """
    try:
        known = [_with_objects(message) for message in messages]
        if not format.described:
            return known if format.several else list(_one_call_each(known))
        told = list(_as_text(format, known))
        return _with_description(format, told, tools) if tools else told
    except RecursionError as error:
        raise AmqError("tools and the arguments of tool_calls: they are nested too deeply to be read") from error


def _with_description(
    format: ToolFormat, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = format.described.replace("{list}", json.dumps(list(tools), ensure_ascii=False)).replace("{tools}", lines)
    if messages and messages[0].get("role") in ("system", "developer"):
        first = {**messages[0], "content": f"{_text(messages[0].get('content'))}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def write_calls(format: ToolFormat, calls: Iterable[tuple[str, Any]]) -> str:
    """Calls (name, arguments) as a model of this format writes them. arguments: an object, or text where it is none."""
    before, middle, behind = format.call
    written = (f"{before}{_name(format, name)}{middle}{_arguments(format, given)}{behind}" for name, given in calls)
    return format.opens + format.between.join(written) + format.closes


def _name(format: ToolFormat, name: str) -> str:
    return json.dumps(name, ensure_ascii=False)[1:-1] if format.call[0].endswith('"') else name


def _arguments(format: ToolFormat, arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    if not format.xml:
        return json.dumps(arguments, ensure_ascii=False)
    texts = {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in arguments.items()}
    return "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())


def _with_objects(message: Message) -> dict[str, Any]:
    """With the arguments of its calls as objects; those that are no JSON object stay as they are."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [with_object(call) for call in calls]}


def _one_call_each(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An answer of several calls as several answers, each before its result: Llama's templates refuse the former."""
    left = deque(messages)
    while left:
        message = left.popleft()
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            yield message
            continue
        results = {}
        while left and left[0].get("role") == "tool":
            result = left.popleft()
            results[result.get("tool_call_id")] = result
        for place, call in enumerate(calls):
            yield {**message, "content": message.get("content") if not place else None, "tool_calls": [call]}
            if found := results.pop(call.get("id"), None):
                yield found
        yield from results.values()  # of no call here: for the template to judge


def _as_text(format: ToolFormat, messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    results: list[str] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>")
            continue
        if results:
            yield {"role": "user", "content": "\n".join(results)}
            results = []
        if calls := message.get("tool_calls"):
            written = write_calls(format, ((c["function"]["name"], c["function"].get("arguments")) for c in calls))
            text = _text(message.get("content"))
            yield {"role": message["role"], "content": f"{text}\n{written}" if text else written}
        else:
            yield message
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)
