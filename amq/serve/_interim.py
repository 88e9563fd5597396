"""Stand-in until amq.runtime.templates is there."""

from __future__ import annotations

from typing import Any

from amq.runtime.chat import render_chat


class BoundedRenderer:
    def __call__(self, *arguments: Any) -> str:
        return render_chat(*arguments)

    def close(self) -> None:
        pass
