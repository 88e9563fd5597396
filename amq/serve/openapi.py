"""/openapi.json: the API in OpenAPI's form, made of the types that read requests and write answers."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from amq import __version__
from amq.runtime.settings import Sampling
from amq.serve.parameters import PARAMETERS, Handling
from amq.serve.protocol import OWN_NAMES, OWN_RANGES, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from amq.serve.responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Text,
    Tokens,
)
from amq.util.settings import declared, limits

TITLES: dict[Handling, str] = {
    "ignored": "Accepted, and count for nothing (X-Amq-Ignored names them)",
    "refused": "Refused, unless their value asks for nothing",
}
STREAM = """Events of server-sent events, each `data: ` and an object of this form, the last one `data: [DONE]`. An \
error in mid-stream is an event with the error object, without [DONE]."""
ERRORS = {
    400: "the body is no JSON, a value is wrong (`param` says which), or the prompt is too long",
    401: "the API key is missing or wrong",
    403: "a local server was called by another name",
    404: "the model does not exist",
    408: "the body did not arrive in time",
    413: "the body is too large",
    429: "too many requests wait; Retry-After says when to come back",
    500: "the model failed on this request",
    503: "the server is shutting down, or its engine has failed",
    504: "the request took longer than the server allows",
}


def document() -> dict[str, Any]:
    """Of every route but the chat page and the metrics, whose form is Prometheus's."""
    kinds: list[type[Struct]] = [
        *(ChatRequest, CompletionRequest, ChatCompletion, Completion, ChatChunk, CompletionChunk),
        *(TokenizeRequest, DetokenizeRequest, Tokens, Text, ModelCard, ModelList, Health, ErrorBody),
    ]
    references, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    found = dict(zip(kinds, references, strict=True))
    for kind in (ChatRequest, CompletionRequest):
        _describe(schemas[kind.__name__])
    errors = {str(status): _body(text, found[ErrorBody]) for status, text in ERRORS.items()}

    def get(summary: str, kind: type[Struct], **more: Any) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": _body(summary, found[kind]), **more}}}

    def post(summary: str, asked: type[Struct], whole: type[Struct], chunk: type[Struct] | None) -> dict[str, Any]:
        answer = _body("the answer", found[whole])
        if chunk is not None:
            answer["content"]["text/event-stream"] = {"schema": {**found[chunk], "description": STREAM}}
            answer["headers"] = {"X-Amq-Ignored": {"description": "parameters that counted for nothing", **_TEXT}}
        body = {"required": True, "content": {"application/json": {"schema": found[asked]}}}
        return {"post": {"summary": summary, "requestBody": body, "responses": {"200": answer, **errors}}}

    model = get("What a model is and can", ModelCard, **{"404": errors["404"], "401": errors["401"]})
    model["get"]["parameters"] = [{"name": "model", "in": "path", "required": True, **_TEXT}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "amq", "version": __version__, "description": "OpenAI's API in front of one model."},
        "paths": {
            "/v1/chat/completions": post("Goes on with a conversation", ChatRequest, ChatCompletion, ChatChunk),
            "/v1/completions": post("Goes on with a text", CompletionRequest, Completion, CompletionChunk),
            "/tokenize": post("A text or a conversation as tokens", TokenizeRequest, Tokens, None),
            "/detokenize": post("Tokens as text", DetokenizeRequest, Text, None),
            "/v1/models": get("The model that is served", ModelList, **{"401": errors["401"]}),
            "/v1/models/{model}": model,
            "/health": get("Whether requests are answered", Health, **{"503": _body("they are not", found[Health])}),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


_TEXT = {"schema": {"type": "string"}}


def _body(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _describe(schema: dict[str, Any]) -> None:
    """Adds what parameters do, their ranges, and what becomes of others."""
    names = {own: name for name, own in OWN_NAMES.items()}
    for name, property in schema["properties"].items():
        property["description"] = PARAMETERS[name].why
        own = names.get(name, name)
        own_range = limits(Sampling, own) if own in declared(Sampling) else {}
        own_range |= OWN_RANGES.get(name, {})
        if "minimum" in own_range:
            own_range.pop("exclusiveMinimum", None)
        for kind in property.get("anyOf", [property]):
            if kind.get("type") in ("number", "integer"):
                kind |= own_range
    others = [schema.get("description", "")]
    for handling, title in TITLES.items():
        rows = [f"- `{p.name}`: {p.why}" for p in PARAMETERS.values() if p.handling == handling]
        others.append("\n".join([f"{title}:", *rows]))
    schema["description"] = "\n\n".join(others)
