"""The HTTP server: OpenAI's API in front of amq.runtime, with a chat page and metrics.

    python -m amq.serve DIR

`create_app(runtime, settings)` makes the ASGI app, `Server` runs it. Both need the extra `serve` (Starlette, uvicorn,
prometheus-client), which is imported when they are first asked for; nothing else in amq imports those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amq.serve.settings import ServeSettings
from amq.util.extras import needs
from amq.util.lazy import lazy

if TYPE_CHECKING:
    from amq.serve.app import create_app
    from amq.serve.server import Server, bind

__all__ = ["ServeSettings", "Server", "bind", "create_app"]
_find = lazy(__name__, {"create_app": "amq.serve.app", "Server": "amq.serve.server", "bind": "amq.serve.server"})


def __getattr__(name: str) -> Any:
    with needs("serve", "amq serve"):
        return _find(name)
