"""The HTTP server: OpenAI's API in front of amq.runtime, with a chat page and metrics.

    python -m amq.serve DIR

`create_app(runtime, settings)` makes the ASGI app, `Server` runs it. Needs the extra `serve` (FastAPI, uvicorn,
prometheus-client); nothing else in amq imports those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amq.util.lazy import lazy

if TYPE_CHECKING:
    from amq.serve.app import create_app
    from amq.serve.server import Server, bind
    from amq.serve.settings import ServeSettings

__all__ = ["ServeSettings", "Server", "bind", "create_app"]
__getattr__ = lazy(
    __name__,
    {
        "create_app": "amq.serve.app",
        "Server": "amq.serve.server",
        "bind": "amq.serve.server",
        "ServeSettings": "amq.serve.settings",
    },
)
