"""What clients send, checked, and the errors that they get: OpenAI's names, OpenAI's error shape.

A parameter that would change the answer and is not supported is refused by name; those that only concern OpenAI's
accounts (`user`, `metadata`, …) are ignored. A parameter given as null counts as not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from amq.errors import AmqError
from amq.runtime.settings import Sampling
from amq.serve.errors import ApiError
from amq.util.settings import limits

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier")
)
NO_CHANGE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}
"""Unsupported parameters, each with the values that ask for nothing."""

MAX_STOPS = 4
MAX_TEMPERATURE = 2
"""OpenAI's; `Sampling` has none."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def _sampled(name: str, default: float | None, **more: float) -> Any:
    """A field with the range that `Sampling` declares of its field `name`."""
    ranged: dict[str, Any] = {**limits(Sampling, name), **more}
    return Field(default, **ranged)


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: accepted, never added


class GenerationRequest(_Model):
    """What both endpoints share."""

    token_limits: ClassVar[tuple[str, ...]] = ("max_tokens",)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = _sampled("max_new_tokens", None)
    temperature: float = _sampled("temperature", 1.0, le=MAX_TEMPERATURE)
    top_p: float = _sampled("top_p", 1.0)
    top_k: int = _sampled("top_k", 0)
    min_p: float = _sampled("min_p", 0.0)
    repetition_penalty: float = _sampled("repetition_penalty", 1.0)
    presence_penalty: float = _sampled("presence_penalty", 0.0)
    frequency_penalty: float = _sampled("frequency_penalty", 0.0)
    seed: int | None = _sampled("seed", None)
    stop: list[str] = Field([], max_length=MAX_STOPS)
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for name in NO_CHANGE.keys() & data.keys():
            value = data[name]
            if value is not None and not any(value == v and type(value) is type(v) for v in NO_CHANGE[name]):
                raise ApiError(400, f"{name}: this value is not supported; leave it out", "unsupported_parameter", name)
        return {k: v for k, v in data.items() if v is not None and k not in IGNORED and k not in NO_CHANGE}

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list) and "" in stops:
            raise ValueError("a stop text must not be empty")
        return stops

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The parameter that limits the answer, and its value."""
        given = [(name, getattr(self, name)) for name in self.token_limits if getattr(self, name) is not None]
        return given[-1] if given else (self.token_limits[-1], None)

    @property
    def wanted_logprobs(self) -> int | None:
        """As Sampling.logprobs."""
        raise NotImplementedError

    def sampling(self, limit: int) -> Sampling:
        """`limit`: most new tokens that the server allows. Raises ApiError."""
        name, tokens = self.wanted_tokens
        if tokens is not None and tokens > limit:
            raise ApiError(400, f"{name} is {tokens}; this server allows at most {limit}", "invalid_value", name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for stream: true", "invalid_value", "stream_options")
        try:
            return Sampling(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                seed=self.seed,
                max_new_tokens=tokens or limit,
                stop=tuple(self.stop),
                logprobs=self.wanted_logprobs,
                ignore_end=self.ignore_eos,
            )
        except AmqError as error:
            raise ApiError(400, str(error), "invalid_value") from None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[int]
    echo: bool = False
    logprobs: int | None = _sampled("logprobs", None)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], (str, list)):
            if len(value) > 1:
                raise ValueError("one prompt per request is supported: send a request for each")
            value = value[0]
        if not isinstance(value, str) and not (isinstance(value, list) and all(type(v) is int for v in value)):
            raise ValueError("expected a text, a list with one text, or a list of token ids")
        return value

    @model_validator(mode="after")
    def _echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not supported: leave one out", "unsupported_parameter", "echo")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class Message(_Model):
    """Content as text; a list of text parts is joined."""

    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError('only text is supported: each part must be {"type": "text", "text": "…"}')
        return "".join(part["text"] for part in value)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    token_limits: ClassVar[tuple[str, ...]] = ("max_tokens", "max_completion_tokens")

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = _sampled("max_new_tokens", None)
    logprobs: bool = False
    top_logprobs: int | None = _sampled("logprobs", None)

    @model_validator(mode="after")
    def _top(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[dict[str, str]]:
        return [message.model_dump(exclude_none=True) for message in self.messages]


R = TypeVar("R", bound=GenerationRequest)


def parse(kind: type[R], body: bytes) -> R:
    """Raises ApiError 400 for what is not JSON, not UTF-8, or not what `kind` expects; its `param` names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not valid JSON in UTF-8: {first['msg']}", "invalid_json")
    param = _param(first["loc"])
    message = {
        "extra_forbidden": "this parameter is unknown: leave it out",
        "missing": "this parameter is required",
    }.get(first["type"], first["msg"].removeprefix("Value error, "))
    raise ApiError(400, f"{param}: {message}" if param else message, "invalid_value", param)


def _param(location: Sequence[str | int]) -> str | None:
    """`messages.0.content`; members of a union, which pydantic writes as types, are left out."""
    names = [str(part) for part in location if isinstance(part, int) or str(part).isidentifier()]
    return ".".join(name for name in names if name not in ("str", "int")) or None
