"""In front of the routes: who may come in, when they came, what they bring."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amq.serve.errors import ApiError

if TYPE_CHECKING:
    from amq.serve.app import Service

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/")
BODY_SECONDS = 60.0
"""How long a client may take to send a request's body."""


async def read_body(request: Request, limit: int) -> bytes:
    """Raises ApiError 413 for more than `limit` bytes, 408 for a client that takes too long."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", "request_too_large")
    if request.headers.get("content-length", "0").isdigit() and int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    parts, size = [], 0
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", "timeout") from None
    except ClientDisconnect:
        raise ApiError(499, "the client left") from None
    return b"".join(parts)


class Gate:
    """In front of everything: asks for the key, notes when a request came, counts it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, path = 499, scope["path"]
        scope.setdefault("state", {})["created"] = time.perf_counter()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if not self.service.local(scope["headers"]):
                error = ApiError(
                    403, "this server answers to localhost only; --api-key or --host opens it", "wrong_host"
                )
                await error.response()(scope, receive, counted)
            elif (path.startswith("/v1/") or path == "/metrics") and not self.service.allowed(scope["headers"]):
                error = ApiError(
                    401, "the API key is missing or wrong: send Authorization: Bearer KEY", "invalid_api_key"
                )
                await error.response()(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        finally:
            endpoint = next((e for e in ENDPOINTS if path == e or path.startswith(e + "/") and e != "/"), "other")
            self.service.metrics.requests.labels(endpoint, status).inc()
