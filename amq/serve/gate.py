"""In front of the routes: who may come in, when they came, what they bring."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amq.serve.errors import ApiError
from amq.serve.uploads import Upload, Uploads
from amq.serve.visits import Visit

if TYPE_CHECKING:
    from amq.serve.app import Service

log = logging.getLogger("amq.serve")

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/")
LOCKED = ("/metrics", "/tokenize", "/detokenize")
"""They want the key, as all of /v1/ does."""
BODY_SECONDS = 60.0
"""How long a client may take to send a request's body."""

UPLOADS = 32
"""Bodies of the largest size that may be on their way at once, all clients together."""

REQUEST_ID = re.compile(rb"[\w.:-]{1,64}")
"""What a client may call its request: nothing that could break a line of a log."""


async def read_body(request: Request, limit: int) -> bytes:
    """Raises ApiError 413 for more than `limit` bytes, 408 for a client that takes too long, 429 for one that sends so
    many at once that they do not fit together."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", "request_too_large")
    if request.headers.get("content-length", "0").isdigit() and int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    uploads: Uploads = request.state.uploads
    upload = Upload(request.state.visit.client)
    try:
        with anyio.fail_after(BODY_SECONDS) as upload.scope:
            async for part in request.stream():
                uploads.add(upload, part)
                if upload.size > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", "timeout") from None
    except ClientDisconnect:
        raise ApiError(499, "the client left") from None
    finally:
        uploads.remove(upload)
    if upload.ended:
        text = "too many bodies are on their way, and most of them are yours: send fewer at once"
        raise ApiError(429, text, "too_many_uploads", None, 1)
    return b"".join(upload.parts)


class Gate:
    """In front of everything: asks for the key, says who came and when, counts.

    It puts the `visit` into scope["state"], and the server's `uploads` for `read_body`; the visit's id is sent back.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._uploads = Uploads(UPLOADS * service.settings.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0
        visit, refusal = self._welcome(scope)
        name = visit.id.encode()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        try:
            if refusal is not None:
                await refusal.response()(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        except asyncio.CancelledError:
            raise
        except BaseException:  # a panic of tokenizers is none of Exception: uvicorn would answer it in plain text
            log.exception("request %s: the server failed on it", visit.id)
            if status:
                raise  # uvicorn closes the connection: the client must not take what it has for the whole answer
            await ApiError(500, "the server failed on this request", "internal_error").response()(
                scope, receive, counted
            )
        finally:
            self._note(scope, visit, status or 499)

    def _note(self, scope: Scope, visit: Visit, status: int) -> None:
        """Counts a request, and logs it where that is wanted: no text of the client's but its request id."""
        path = scope["path"]
        endpoint = next((e for e in ENDPOINTS if path == e or path.startswith(e + "/") and e != "/"), "other")
        self.service.metrics.requests.labels(endpoint, status).inc()
        if self.service.settings.log_requests:
            jobs = visit.jobs
            log.info(
                "request %s of %s: %s %s, %d prompt, %d new, %d cached tokens, %.3f s, %s",
                *(visit.id, visit.client, endpoint, status),
                sum(len(job.prompt) for job in jobs),
                sum(job.request.new_tokens for job in jobs),
                sum(job.request.cached_tokens for job in jobs),
                time.perf_counter() - visit.created,
                ",".join(job.finished or "running" for job in jobs) or "-",
            )
        visit.jobs.clear()

    def _welcome(self, scope: Scope) -> tuple[Visit, ApiError | None]:
        """Who comes, and why not further than here."""
        headers, path, door = scope["headers"], scope["path"], self.service.door
        owner = door.owner(headers)
        address = scope["client"][0] if scope.get("client") else ""
        visit = Visit(_request_id(headers), door.client(owner or "", address), owner or "", time.perf_counter())
        scope.setdefault("state", {}).update(visit=visit, uploads=self._uploads)
        if not door.right_host(headers):
            text = "this server answers to addresses and localhost only; --allow-host NAME or a key opens it"
            return visit, ApiError(403, text, "wrong_host")
        if owner is None and (path.startswith("/v1/") or path in LOCKED):
            text = "the API key is missing or wrong: send Authorization: Bearer KEY"
            return visit, ApiError(401, text, "invalid_api_key")
        return visit, None


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = dict(headers).get(b"x-request-id", b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
