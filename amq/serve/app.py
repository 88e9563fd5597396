"""`create_app`: the routes, who may use them, and how errors look."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from amq.errors import AmqError
from amq.serve.answers import Answer, ChatShape, CompletionShape, Shape
from amq.serve.door import Door
from amq.serve.errors import ApiError
from amq.serve.gate import Gate, read_body
from amq.serve.metrics import Metrics
from amq.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, parse
from amq.serve.settings import ServeSettings
from amq.serve.worker import EngineThread, Job

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cache-Control": "no-cache"}
SHORT_TEXT = 2**13
"""Characters that are tokenized on the event loop: a few milliseconds, during which the engine goes on."""

if TYPE_CHECKING:
    from amq.runtime.loading import Runtime

R = TypeVar("R", bound=GenerationRequest)


class Service:
    """What the routes share."""

    def __init__(self, runtime: Runtime, settings: ServeSettings) -> None:
        self.runtime, self.settings = runtime, settings
        self.model = settings.model_name or _short(runtime.name)
        self.created = int(time.time())
        self.metrics = Metrics()
        self.worker = EngineThread(runtime, settings, self.metrics)
        self.encoder = ThreadPoolExecutor(1, "amq-encode")  # long texts take one core at most, however many come
        self.encoding = 0
        self.door = Door(settings)
        context = runtime.engine.context
        self.prompt_limit = min(settings.max_prompt_tokens or context - 1, context - 1)

    async def read(self, request: Request, kind: type[R]) -> R:
        """The request's body. Raises ApiError."""
        self.worker.admit()
        declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if declared != "application/json":  # else any web page could make a browser send requests here
            raise ApiError(400, "Content-Type must be application/json", "invalid_content_type")
        body = parse(kind, await read_body(request, self.settings.max_body_bytes))
        self.check_model(body.model)
        return body

    def check_model(self, name: str) -> None:
        if name != self.model:
            message = f"the model {name!r} does not exist; this server has {self.model!r}"
            raise ApiError(404, message, "model_not_found", "model")

    async def encode(self, param: str, size: int, make: Callable[[], list[int]]) -> list[int]:
        """Token ids of a prompt of `size` characters. Raises ApiError where it is empty or too long."""
        try:
            tokens = make() if size <= SHORT_TEXT else await self._encode_long(make)
        except AmqError as error:
            raise ApiError(400, str(error), "invalid_value", param) from None
        if not tokens:
            raise ApiError(400, f"{param} is empty: give some text", "invalid_value", param)
        if len(tokens) > self.prompt_limit:
            message = f"{param} has {len(tokens)} tokens; this server takes at most {self.prompt_limit}"
            raise ApiError(400, message, "context_length_exceeded", param)
        return tokens

    async def _encode_long(self, make: Callable[[], list[int]]) -> list[int]:
        """In a thread, so that nobody else's tokens wait for it."""
        if self.encoding > self.settings.queue:
            raise self.worker.full()
        self.encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.encoder, make)
        finally:
            self.encoding -= 1

    def answer(self, request: Request, body: GenerationRequest, tokens: list[int], shape: Shape) -> Answer:
        """Queues the request. Raises ApiError."""
        job = Job(tokens, body.sampling(self.settings.max_new_tokens), request.state.client, request.state.created)
        self.worker.submit(job)
        return Answer(self.worker, job, shape, body.stream)


def _short(name: str) -> str:
    """A folder's own name; a hub id as it is."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


def create_app(runtime: Runtime, settings: ServeSettings) -> FastAPI:
    """The ASGI app that serves `runtime`; its `state.service` holds worker and metrics.

    The worker's thread starts and ends with the app's lifespan.
    """
    service = Service(runtime, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()
        service.encoder.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="amq", lifespan=lifespan, openapi_url=None)  # its documentation pages load from the internet
    app.state.service = service
    _add_generation(app, service)
    _add_information(app, service)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _defect)
    app.add_middleware(Gate, service=service)
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    tokenizer, vocabulary = service.runtime.tokenizer, service.runtime.engine.vocab_size

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        body = await service.read(request, CompletionRequest)
        prompt = body.prompt
        if isinstance(prompt, str):
            tokens = await service.encode("prompt", len(prompt), partial(tokenizer.encode, prompt))
        elif all(0 <= token < vocabulary for token in prompt):
            tokens = await service.encode("prompt", 0, lambda: prompt)
        else:
            raise ApiError(400, f"prompt: token ids must be from 0 to {vocabulary - 1}", "invalid_value", "prompt")
        echo = ""
        if body.echo:
            echo = prompt if isinstance(prompt, str) else tokenizer.decode(tokens)
        shape = CompletionShape(service.model, tokenizer, body.logprobs is not None, body.with_usage, echo)
        return service.answer(request, body, tokens, shape)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        body = await service.read(request, ChatRequest)
        size = sum(len(message.content) for message in body.messages)
        tokens = await service.encode("messages", size, lambda: tokenizer.encode_chat(body.conversation()))
        shape = ChatShape(service.model, tokenizer, body.logprobs, body.with_usage)
        return service.answer(request, body, tokens, shape)


def _add_information(app: FastAPI, service: Service) -> None:
    card = {"id": service.model, "object": "model", "created": service.created, "owned_by": "amq"}
    card["max_model_len"] = service.runtime.engine.context  # as vLLM calls it

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card

    @app.get("/health")
    async def health() -> JSONResponse:
        worker = service.worker
        status = "draining" if worker.draining else "failed" if worker.failed else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html", headers=PAGE_HEADERS)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
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


async def _defect(request: Request, error: Exception) -> JSONResponse:
    """uvicorn logs the traceback; the client learns nothing of it."""
    return ApiError(500, "the server failed on this request", "internal_error").response()
