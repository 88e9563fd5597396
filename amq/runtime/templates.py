"""`BoundedRenderer`: chat templates in a process of their own, which may take so much time and memory and no more.

A template comes with a model, and is a program: two loops can keep a thread busy for a year, one expression take all
memory. Neither can be stopped in a thread. The process has jinja2 and nothing else, and starts in a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from amq.errors import AmqError
from amq.runtime.chat import PLAIN, ChatOptions, Messages, render_chat
from amq.util.limited_process import LimitedProcess

SECONDS = 2.0
"""Of a processor, for a conversation, compiling the template included."""
MEMORY = 512 * 2**20
TEXT = 64 * 2**20
"""Characters that a rendered conversation may have."""


class BoundedRenderer(LimitedProcess):
    """`render_chat`, but with limits; `LimitedProcess` says how. Its errors are AmqError."""

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        super().__init__(renderer, "rendering this conversation with the model's chat template", seconds, memory)

    def __call__(
        self, template: str, messages: Messages, names: Mapping[str, Any], options: ChatOptions = PLAIN
    ) -> str:
        """As `render_chat`."""
        given = {n: getattr(options, n) for n in ("tools", "add_generation_prompt", "continue_final_message", "names")}
        return str(self.ask([template, messages, names, given]))


def renderer() -> Callable[[list[Any]], str]:
    """What the process does."""
    render_chat("", [], {})  # imports jinja2
    return _rendered


def _rendered(request: list[Any]) -> str:
    template, messages, names, options = request
    text = render_chat(template, messages, names, ChatOptions(**options))
    if len(text) > TEXT:
        raise AmqError(f"the model's chat template makes {len(text)} characters of this conversation, at most {TEXT}")
    return text
