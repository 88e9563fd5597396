"""The messages of a chat as clients send them, and as chat templates take them.

Clients send back what they were sent, and more: keys that are null count as not given, keys that no template reads are
dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct


class TextPart(Struct, tag_field="type", tag="text", gc=False):
    text: str


class RefusalPart(Struct, tag_field="type", tag="refusal", gc=False):
    refusal: str


Content = str | list[TextPart | RefusalPart]


class FunctionCall(Struct, kw_only=True, gc=False):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Struct, kw_only=True, gc=False):
    function: FunctionCall
    id: str | None = None
    type: str | None = None


class SystemMessage(Struct, kw_only=True, tag_field="role", tag="system", gc=False):
    content: Content
    name: str | None = None


class DeveloperMessage(Struct, kw_only=True, tag_field="role", tag="developer", gc=False):
    """OpenAI's newer name of system, which few templates know."""

    content: Content
    name: str | None = None


class UserMessage(Struct, kw_only=True, tag_field="role", tag="user", gc=False):
    content: Content
    name: str | None = None


class AssistantMessage(Struct, kw_only=True, tag_field="role", tag="assistant", gc=False):
    """reasoning: vLLM's name of reasoning_content."""

    content: Content | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    name: str | None = None


class ToolMessage(Struct, kw_only=True, tag_field="role", tag="tool", gc=False):
    content: Content | None = None
    tool_call_id: str | None = None
    name: str | None = None


class FunctionMessage(Struct, kw_only=True, tag_field="role", tag="function", gc=False):
    """The older form of a tool's answer."""

    name: str
    content: Content | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As dictionaries of OpenAI's form, content as text; the older form of calls becomes the newer."""
    return [_plain(message) for message in messages]


def _plain(message: Message) -> dict[str, Any]:
    if isinstance(message, AssistantMessage):
        return _assistant(message)
    plain: dict[str, Any] = {"role": message.__struct_config__.tag, "content": text_of(message.content)}
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    elif isinstance(message, FunctionMessage):
        plain["role"] = "tool"
    return {**plain, "name": message.name}


def _assistant(message: AssistantMessage) -> dict[str, Any]:
    calls = [_call(call.function, call.id) for call in message.tool_calls or ()]
    if message.function_call is not None:
        calls.append(_call(message.function_call, None))
    return {
        "role": "assistant",
        "content": text_of(message.content) or message.refusal or "",
        "reasoning_content": message.reasoning_content or message.reasoning,
        "tool_calls": calls or None,
        "name": message.name,
    }


def _call(function: FunctionCall, identity: str | None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": function.name, "arguments": function.arguments or "{}"}}
    return call if identity is None else {"id": identity, **call}


def text_of(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


class Function(Struct, kw_only=True, omit_defaults=True):
    """parameters: a JSON schema of the arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True, tag_field="type", tag="function"):
    function: Function


class NamedFunction(Struct, kw_only=True):
    name: str


class NamedTool(Struct, kw_only=True, tag_field="type", tag="function"):
    function: NamedFunction


def tools_of(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As dictionaries of OpenAI's form."""
    return [msgspec.to_builtins(tool) for tool in tools]


def described(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As the model is told of them: `strict` is the server's matter."""
    return [
        {**tool, "function": {key: value for key, value in tool["function"].items() if key != "strict"}}
        for tool in tools
    ]
