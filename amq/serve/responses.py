"""What clients get: OpenAI's objects, typed, and their form as JSON and as server-sent events."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response

DONE = b"data: [DONE]\n\n"


class PromptDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Struct):
    """Speeds of reading the prompt and of the tokens after the first; null where nothing was measured.

    first_token_seconds: since the request came, waiting included.
    """

    prompt_tokens_per_second: float | None
    tokens_per_second: float | None
    first_token_seconds: float | None


class TokenLogprob(Struct):
    token: str
    logprob: float | None
    bytes: list[int]


class ChosenLogprob(Struct):
    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct):
    content: list[ChosenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    """One entry per token, those of an echoed prompt included; null for its first, which nothing came before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Call(Struct):
    name: str
    arguments: str


class MadeCall(Struct, kw_only=True):
    id: str
    function: Call
    type: Literal["function"] = "function"


class ChatMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[MadeCall] | UnsetType = UNSET
    function_call: Call | UnsetType = UNSET


class CallDelta(Struct, kw_only=True, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Struct, kw_only=True, omit_defaults=True):
    index: int
    id: str | None = None
    type: str | None = None
    function: CallDelta


class Delta(Struct, kw_only=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: CallDelta | None = None


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class CompletionChoice(Struct):
    """finish_reason: null in all but the last event of a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None
    timings: Timings


class Completion(Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: None = None
    timings: Timings


class ChatChunk(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: None = None
    usage: Usage | None | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class CompletionChunk(Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: None = None
    usage: Usage | None | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class Capabilities(Struct):
    """chat: there is a chat template. tools: the name of the format in which the model calls them. thinking: the model
    thinks, and that is a field of its own. json: answers can be held to a grammar."""

    chat: bool
    tools: str | None
    thinking: bool
    json: bool


class ModelCard(Struct, kw_only=True):
    """max_model_len: vLLM's name of the context, in tokens. formats: how many linears have each; none of a model that
    is not quantized. weight_bytes: that one decoded token reads."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "amq"
    max_model_len: int
    engine: str
    formats: dict[str, int]
    bits_per_weight: float | None
    weight_bytes: int
    capabilities: Capabilities


class ModelList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(Struct):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(Struct):
    """content: llama-server's name of it."""

    prompt: str
    content: str


class Health(Struct, omit_defaults=True):
    """status: ok, draining or failed. reason: of a failure."""

    status: str
    reason: str | None = None


class ErrorDetails(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct):
    error: ErrorDetails


_encode = msgspec.json.Encoder().encode


def to_json(value: Any) -> bytes:
    """UTF-8, but for the characters that some readers of events take for the end of a line."""
    data = _encode(value)
    if not data.isascii():
        for character in ("\x85", "\u2028", "\u2029"):  # inside texts alone: JSON has no others
            data = data.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return data


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class TypedResponse(Response):
    """A Struct as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)
