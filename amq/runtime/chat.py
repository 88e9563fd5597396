"""Chat templates: a conversation → the text that a model was trained on, as transformers renders it but without it.

Templates come with models, so they run in jinja2's sandbox; `amq.runtime.templates` bounds their time and memory too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from amq.errors import AmqError

Messages = Sequence[Mapping[str, Any]]
"""[{"role": "user", "content": …}, …]"""

TAKEN = frozenset({"messages", "tools", "add_generation_prompt"})
"""Variables of templates that have fields of `ChatOptions` of their own."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which clients send a model's reasoning back; templates read the first, some the second."""
END = "\U000ff8fe "
"""Marks where the last message ends, in the text of a template; its space tells whether the template trims."""


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation becomes a prompt.

    tools: functions that the model may call, as in OpenAI's API: [{"type": "function", "function": {…}}, …].
    add_generation_prompt: end with the beginning of the model's answer.
    continue_final_message: end inside the last message, so that the model goes on with it; excludes the former.
    names: further variables of the template, such as `enable_thinking`.
    special: special tokens that a message spells are taken as such; else they are ordinary text.
    Raises AmqError for options that exclude each other, and names that the template gets otherwise.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    names: Mapping[str, Any] = field(default_factory=dict)
    special: bool = False

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise AmqError("continue_final_message and add_generation_prompt exclude each other: set one to false")
        if taken := sorted(TAKEN & set(self.names)):
            raise AmqError(f"a chat template's variable {taken[0]} is not given by name")


PLAIN = ChatOptions()


def prepared(template: str, messages: Messages) -> list[dict[str, Any]]:
    """Messages as OpenAI's clients send them → as templates expect them.

    Keys that are None are left out; an assistant without content has an empty one; arguments of tool calls that are a
    JSON object's text become that object; reasoning has the names that templates know; the role `developer` is
    `system` where the template does not know it.
    """
    return [_prepared(template, message) for message in messages]


def _prepared(template: str, message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if value is not None}
    if plain.get("role") == "developer" and "developer" not in template:
        plain["role"] = "system"
    if plain.get("role") == "assistant":
        plain.setdefault("content", "")
    calls = plain.get("tool_calls")
    if isinstance(calls, Sequence) and not isinstance(calls, str):
        plain["tool_calls"] = [_readable(call) for call in calls]
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _readable(call: Any) -> Any:
    try:
        return with_object(call)
    except RecursionError:  # nested too deeply: the template gets the text
        return call


def with_object(call: Any) -> Any:
    """A tool call whose arguments are an object if they are one's JSON text. Raises RecursionError for deep nesting."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:  # the model broke it, and is shown what it wrote
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def render_chat(template: str, messages: Messages, names: Mapping[str, Any], options: ChatOptions = PLAIN) -> str:
    """`messages`, which are `prepared`, as text.

    names: variables of the template that the tokenizer gives, such as bos_token.
    Raises AmqError where the template is damaged or refuses the conversation.
    """
    if taken := sorted(set(names) & set(options.names)):
        raise AmqError(f"a chat template's variable {taken[0]} is the tokenizer's: it cannot be given")
    if options.continue_final_message:
        messages = _with_end(messages)
    given = {"documents": None, **options.names, **names}
    try:
        text = _compiled(template).render(
            messages=messages,
            tools=options.tools or None,
            add_generation_prompt=options.add_generation_prompt,
            **given,
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is code: it may raise anything, of jinja2 or of Python
        raise AmqError(
            f"the model's chat template does not take this conversation ({str(error)[:500]}): expected messages with "
            "`role` and `content` as text, in an order that the model knows"
        ) from error
    return _up_to_end(str(text), messages) if options.continue_final_message else str(text)


def _with_end(messages: Messages) -> Messages:
    last = messages[-1] if messages else {}
    if not isinstance(last.get("content"), str):
        raise AmqError("continue_final_message: the last message has no text to go on with")
    return [*messages[:-1], {**last, "content": last["content"] + END}]


def _up_to_end(text: str, messages: Messages) -> str:
    """As in transformers; the last message may have lost the space around it."""
    content = messages[-1]["content"].removesuffix(END)
    mark = END.strip()
    at = text.rfind(mark)
    if at < 0 or content.strip() not in text:
        raise AmqError("continue_final_message: the model's chat template changes the last message")
    return text[:at] if text.startswith(END, at) else text[:at].rstrip()


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}…{% endgeneration %} marks the answers in training data; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own filter, it leaves HTML's characters as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
