"""`create_app`: the routes, who may use them, and how errors look."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from amq.errors import AmqError
from amq.model.conversations import THINKING
from amq.runtime.chat import ChatOptions, Messages
from amq.runtime.grammar import Grammar, GrammarCompiler
from amq.runtime.sampling import Constraint
from amq.runtime.templates import BoundedRenderer
from amq.runtime.tokenizer import ChatPrompt, TooLong
from amq.serve import generation, tokens
from amq.serve.answers import while_connected
from amq.serve.door import Door
from amq.serve.errors import ApiError
from amq.serve.gate import Gate, read_body
from amq.serve.metrics import Metrics
from amq.serve.openapi import document
from amq.serve.prompts import PromptThread
from amq.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    parse,
)
from amq.serve.replies.formats import format_of
from amq.serve.responses import Capabilities, Health, ModelCard, ModelList, TypedResponse
from amq.serve.settings import ServeSettings
from amq.serve.worker import EngineThread

if TYPE_CHECKING:
    from amq.runtime.loading import Runtime

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cache-Control": "no-cache"}
SMALL_BODY = 2**14
"""Bytes that are parsed on the event loop: larger ones take milliseconds, and hundreds may come at once."""
SHORT = ("/chat/completions", "/completions", "/models")
MOST_NAMES = 1000
"""Parameters that are logged once each; a client may think of any number."""

R = TypeVar("R", bound="GenerationRequest | TokenizeRequest | DetokenizeRequest")
T = TypeVar("T")
log = logging.getLogger("amq.serve")


class Service:
    """What the routes share."""

    def __init__(self, runtime: Runtime, settings: ServeSettings) -> None:
        self.runtime, self.settings = runtime, settings
        self.model = settings.model_name or _short(runtime.name)
        self.created = int(time.time())
        self.metrics = Metrics(self.model)
        self.worker = EngineThread(runtime, settings, self.metrics)
        self.prompts = PromptThread(settings.queue + settings.max_sequences, self.worker.full)
        self.render = BoundedRenderer()
        self.door = Door(settings)
        tokenizer, engine = runtime.tokenizer, runtime.engine
        self.grammars = GrammarCompiler(tokenizer, engine.vocab_size, tokenizer.end_ids)
        self.tool_format = format_of(tokenizer.template)
        self.thinking = settings.reasoning == "auto" and any(
            opens in (tokenizer.template or "") for opens, _ in THINKING
        )  # whether the model thinks, and that is parted from its answer
        self.vocabulary, context = runtime.engine.vocab_size, runtime.engine.context
        self.prompt_limit = min(settings.max_prompt_tokens or context - 1, context - 1)
        self._ignored: set[str] = set()  # names that the log has had

    def prepare(self) -> None:
        """Before the server listens: what the first grammar would hold everybody up for, up to seconds."""
        try:
            self.grammars.prepare()
        except AmqError as error:
            log.warning("answers cannot be held to a form: %s", error)

    async def read(self, request: Request, kind: type[R]) -> tuple[R, list[str]]:
        """The request's body, and what in it counts for nothing. Raises ApiError."""
        self.worker.admit()
        declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if declared != "application/json":  # else any web page could make a browser send requests here
            raise ApiError(400, "Content-Type must be application/json", "invalid_content_type")
        data = await read_body(request, self.settings.max_body_bytes)
        if len(data) <= SMALL_BODY:
            body, ignored = parse(kind, data, self.prompt_limit)
        else:
            body, ignored = await self.make(request, lambda: parse(kind, data, self.prompt_limit))
        if body.model is not None:
            self.check_model(body.model)
        for name in ignored:
            if name not in self._ignored and len(self._ignored) < MOST_NAMES:
                self._ignored.add(name)
                log.info("the parameter %.64r is ignored", name)
        return body, ignored

    def check_model(self, name: str) -> None:
        if name != self.model:
            message = f"the model {name!r} does not exist; this server has {self.model!r}"
            raise ApiError(404, message, "model_not_found", "model")

    async def make(self, request: Request, function: Callable[[], T]) -> T:
        """What `function` makes in the thread of prompts. Raises ApiError."""
        left = self.settings.timeout - (time.perf_counter() - request.state.visit.created)
        work = self.prompts.make(request.state.visit.client, function)
        return await while_connected(request.receive, work, max(left, 0.0))

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids of the parameter `prompt`. Raises ApiError."""
        with self.checked("prompt"):
            encoded = self.runtime.tokenizer.encode(text, special, self.prompt_limit)
        self.check_length("prompt", len(encoded))
        return encoded

    def encode_chat(self, messages: Messages, options: ChatOptions) -> ChatPrompt:
        """Raises ApiError."""
        with self.checked("messages"):
            prompt = self.runtime.tokenizer.encode_chat(messages, options, self.prompt_limit, self.render)
        self.check_length("messages", len(prompt.tokens))
        return prompt

    @contextmanager
    def checked(self, param: str) -> Iterator[None]:
        """Errors become those of the parameter `param`."""
        try:
            yield
        except TooLong as error:
            raise self.too_long(param, str(error)) from None
        except AmqError as error:
            raise ApiError(400, f"{param}: {error}", "invalid_value", param) from None

    def check_length(self, param: str, tokens: int) -> None:
        """Raises ApiError where a prompt is empty or too long."""
        if not tokens:
            raise ApiError(400, f"{param} is empty: give some text", "invalid_value", param)
        if tokens > self.prompt_limit:
            raise self.too_long(param, f"{tokens} tokens")

    def too_long(self, param: str, why: str) -> ApiError:
        message = f"{param} is too long ({why}); this server takes at most {self.prompt_limit} tokens"
        return ApiError(400, message, "context_length_exceeded", param)

    def constraints(self, grammar: Grammar | None, count: int, param: str) -> list[Constraint | None]:
        """For each of `count` choices what it has to keep to. Raises ApiError for a grammar that is not supported."""
        with self.checked(param):
            return [None if grammar is None else self.grammars.constraint(grammar) for _ in range(count)]


def _short(name: str) -> str:
    """A folder's own name; a hub id as it is."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


class WithoutPrefix:
    """/chat/completions, /completions and /models are those of /v1, as at llama-server: whose base URL lacks it is
    answered too. In front of the gate, which asks for the key by path."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in SHORT:
            scope = {**scope, "path": f"/v1{scope['path']}"}
        await self.app(scope, receive, send)


def create_app(runtime: Runtime, settings: ServeSettings) -> Starlette:
    """The ASGI app that serves `runtime`; its `state.service` holds worker and metrics.

    The threads of engine and prompts start and end with the app's lifespan.
    """
    service = Service(runtime, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        service.prompts.start()
        yield
        service.prompts.stop()
        await service.worker.stop()
        service.render.close()
        service.grammars.close()

    middleware = [Middleware(WithoutPrefix), Middleware(Gate, service=service)]
    if settings.cors:
        cors: dict[str, Any] = {"allow_origins": settings.cors, "allow_methods": ["*"], "allow_headers": ["*"]}
        middleware.insert(0, Middleware(CORSMiddleware, **cors))
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _defect}
    routes = [*_generation(service), *_information(service)]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)
    app.state.service = service
    return app


def _generation(service: Service) -> list[Route]:
    async def completions(request: Request) -> Response:
        body, ignored = await service.read(request, CompletionRequest)
        return await generation.complete(service, request, body, ignored)

    async def chat(request: Request) -> Response:
        body, ignored = await service.read(request, ChatRequest)
        return await generation.chat(service, request, body, ignored)

    async def tokenize(request: Request) -> Response:
        body, _ = await service.read(request, TokenizeRequest)
        return TypedResponse(await tokens.tokenize(service, request, body))

    async def detokenize(request: Request) -> Response:
        body, _ = await service.read(request, DetokenizeRequest)
        return TypedResponse(await tokens.detokenize(service, request, body))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


def _information(service: Service) -> list[Route]:
    card = _card(service)

    async def models(request: Request) -> Response:
        return TypedResponse(ModelList(data=[card]))

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return TypedResponse(card)

    async def health(request: Request) -> Response:
        worker = service.worker
        if worker.failed:
            return TypedResponse(Health("failed", worker.failed), 503)
        return TypedResponse(Health("draining"), 503) if worker.draining else TypedResponse(Health("ok"))

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(request: Request) -> Response:
        return TypedResponse(document())

    async def page(request: Request) -> Response:
        return FileResponse(PAGE, media_type="text/html", headers=PAGE_HEADERS)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/", page),
    ]


def _card(service: Service) -> ModelCard:
    runtime, tokenizer, record = service.runtime, service.runtime.tokenizer, service.runtime.record
    tools = None if service.tool_format is None else service.tool_format.name
    formats = Counter(() if record is None else record.formats.values())
    return ModelCard(
        id=service.model,
        created=service.created,
        max_model_len=runtime.engine.context,
        engine=runtime.engine.banner,
        formats=dict(sorted(formats.items())),
        bits_per_weight=None if record is None else round(record.bits_per_weight, 3),
        weight_bytes=runtime.weight_bytes,
        capabilities=Capabilities(tokenizer.template is not None, tools, service.thinking, bool(tokenizer.end_ids)),
    )


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    answer = ApiError(error.status_code, message, code).response()
    answer.headers.update(error.headers or {})
    return answer


async def _defect(request: Request, error: Exception) -> Response:
    """uvicorn logs the traceback; the client learns nothing of it."""
    return ApiError(500, "the server failed on this request", "internal_error").response()
