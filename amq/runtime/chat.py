"""Chat templates: a conversation → the text that a model was trained on, as transformers renders it but without it.

Templates come with models, so they run in jinja2's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from amq.errors import AmqError


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, Any]) -> str:
    """`messages` with the beginning of the model's answer, as text.

    messages: [{"role": "user", "content": …}, …]; keys that are None are left out, as transformers does.
    names: further variables of the template, such as bos_token.
    Raises AmqError where the template is damaged or refuses the conversation.
    """
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compiled(template).render(
            messages=plain, tools=None, documents=None, add_generation_prompt=True, **names
        )
    except Exception as error:  # a template is code: it may raise anything, of jinja2 or of Python
        raise AmqError(
            f"the model's chat template does not take this conversation ({error}): expected messages with `role` and "
            "`content` as text, in an order that the model knows"
        ) from error


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
