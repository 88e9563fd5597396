"""What clients send, checked: OpenAI's names and those of other servers, OpenAI's error shape.

amq.serve.parameters says what becomes of each parameter. One given as null counts as not given, at every level. Ranges
are `Sampling`'s own. msgspec reads a body and stops at the first thing that is wrong, so that a body of wrong ones
costs no more than a right one.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from amq.errors import AmqError
from amq.runtime.settings import Sampling
from amq.serve.errors import ApiError
from amq.serve.messages import Function, Message, NamedFunction, NamedTool, Tool
from amq.serve.parameters import PARAMETERS

MAX_STOPS = 64
MAX_TEMPERATURE = 2
"""OpenAI's; `Sampling` has none."""
MAX_BIAS = 100
LONGEST_REASON = 300
"""Characters of an error; a body may spell a megabyte where a role belongs."""
MOST_PARAMETERS = 256
MOST_NESTED = 50_000
"""Lists and objects of a body: a megabyte of empty ones takes 50 in memory, and the time to make them."""
MOST_LOOKED_INTO = 1000
"""Messages whose unknown keys are named; of 34,000 it would take 0.1 s of every stream."""
LEAST_TOP_P = sys.float_info.min
STRING = re.compile(rb'"(?:[^"\\]+|\\.)*"?', re.DOTALL)
"""Of JSON; one without an end goes on to the end, so that the time is linear."""

OWN_NAMES = {"max_new_tokens": "max_tokens", "ignore_end": "ignore_eos"}
"""What parameters are called that `Sampling` calls otherwise."""
OWN_RANGES: dict[str, dict[str, float]] = {
    **{"temperature": {"maximum": MAX_TEMPERATURE}, "top_p": {"minimum": 0}, "top_k": {"minimum": -1}},
    **{"max_tokens": {"minimum": -1}, "max_completion_tokens": {"minimum": -1}},
}
"""Where they are not those of `Sampling`, in JSON schema's words."""


StopText = Annotated[str, Meta(min_length=1)]


class StreamOptions(Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: the usage so far in every event
    include_obfuscation: bool | None = None  # padding against traffic analysis: never added


class StructuredOutputs(Struct, kw_only=True):
    """vLLM's; one of them."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GenerationRequest(Struct, kw_only=True):
    """What both endpoints share."""

    token_limits: ClassVar[tuple[str, ...]] = ("max_tokens",)
    least_tokens: ClassVar[int] = 1

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    ebnf: str | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def with_every_usage(self) -> bool:
        """Whether each event of a stream has the usage so far."""
        return self.with_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_logprobs(self) -> int | None:
        """As Sampling.logprobs."""
        raise NotImplementedError

    def new_tokens(self, limit: int) -> int:
        """Most tokens of an answer; `limit`: the server's. Raises ApiError."""
        given = [(name, getattr(self, name)) for name in self.token_limits if getattr(self, name) is not None]
        if not given or given[-1][1] == -1:
            return limit
        name, tokens = given[-1]
        if tokens < self.least_tokens:
            raise bad(name, f"expected at least {self.least_tokens}, or -1 for the server's limit, got {tokens}")
        return min(tokens, limit)

    def sampling(self, limit: int, vocabulary: int, special: frozenset[int] = frozenset()) -> Sampling:
        """Raises ApiError.

        limit: most new tokens that the server allows. vocabulary: token ids are below it. special: tokens that are
        shown where they are not to be skipped.
        """
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options", "it is for stream: true")
        if self.temperature is not None and self.temperature > MAX_TEMPERATURE:
            raise bad("temperature", f"expected from 0 to {MAX_TEMPERATURE}, got {self.temperature:g}")
        bias = tuple((self.logit_bias or {}).items())
        check_ids("logit_bias", [token for token, _ in bias], vocabulary)
        check_ids("stop_token_ids", self.stop_token_ids or [], vocabulary)
        tokens = self.new_tokens(limit)
        wanted: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": LEAST_TOP_P if self.top_p == 0 else self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": bias,
            "seed": None if self.seed == -1 else self.seed,
            "max_new_tokens": tokens,
            "min_tokens": None if self.min_tokens is None else min(self.min_tokens, tokens),
            "stop": self.stops,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logprobs": self.wanted_logprobs,
            "prompt_logprobs": self.wanted_prompt_logprobs,
            "ignore_end": self.ignore_eos,
            "shown_special": tuple(sorted(special)) if self.skip_special_tokens is False else None,
        }
        try:
            return Sampling(**{name: value for name, value in wanted.items() if value is not None})
        except AmqError as error:
            name, _, reason = str(error).partition(" ")
            raise bad(self.named(name), reason) from None

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """As Sampling.prompt_logprobs."""
        return None

    def named(self, name: str) -> str:
        """The parameter that is `name` in Sampling."""
        return OWN_NAMES.get(name, name)


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    least_tokens: ClassVar[int] = 0

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Raises ApiError for a list of different things."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        kinds = {type(item) for item in given}
        if len(kinds) > 1:
            raise bad("prompt", "expected a text, a list of texts, a list of token ids, or a list of such lists")
        return [given] if kinds <= {int} else given  # type: ignore[list-item, return-value]


class TextFormat(Struct, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Struct, kw_only=True, tag_field="type", tag="json_object"):
    schema: dict[str, Any] | None = None  # llama.cpp's


class NamedSchema(Struct, kw_only=True):
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, kw_only=True, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    token_limits: ClassVar[tuple[str, ...]] = ("max_tokens", "max_completion_tokens")

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise bad("top_logprobs", "it needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def named(self, name: str) -> str:
        return "top_logprobs" if name == "logprobs" else super().named(name)

    @property
    def offered(self) -> list[Tool]:
        """The tools, in whichever form they came; none where the choice is that none is called."""
        if self.choice == "none":
            return []
        return self.tools or [Tool(function=function) for function in self.functions or ()]

    @property
    def choice(self) -> str:
        """`none`, `auto`, `required`, or the name of a function. Raises ApiError where that is not among the tools."""
        given = self.function_call if self.tool_choice is None else self.tool_choice
        if given == "required" and not self.tools:
            raise bad("tool_choice", "it needs tools")
        if given is None or isinstance(given, str):
            return given or "auto"
        name = given.function.name if isinstance(given, NamedTool) else given.name
        known = [tool.function.name for tool in self.tools or ()] + [f.name for f in self.functions or ()]
        if name not in known:
            raise bad("tool_choice", f"{name!r} is not among the tools")
        return name


class TokenizeRequest(Struct, kw_only=True):
    """POST /tokenize, as vLLM (prompt or messages) and llama-server (content) have it."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None  # llama-server's, false by default there
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


R = TypeVar("R", bound=Struct)


def parse(kind: type[R], body: bytes, most: int) -> tuple[R, list[str]]:
    """The request, and the parameters that it has and that count for nothing.

    most: messages that it may have.
    Raises ApiError 400 for what is not JSON, not UTF-8, or not what `kind` expects; its `param` names the field.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON in UTF-8: {error.reason}", "invalid_json") from None
    if _nested(body) > MOST_NESTED:
        raise ApiError(400, f"the body has more than {MOST_NESTED} lists and objects", "invalid_value")
    given = _decode(body, dict[str, Raw])
    if len(given) > MOST_PARAMETERS:
        raise ApiError(
            400, f"the body has {len(given)} parameters: at most {MOST_PARAMETERS} are read", "invalid_value"
        )
    dropped = [name for name, value in given.items() if not _taken(kind, name, value)]
    request = _decode(body, kind)
    if isinstance(request, ChatRequest) and len(request.messages) > most:  # a template may make megabytes of them
        text = f"messages: there are {len(request.messages)}, of a token or more each; this server takes {most} tokens"
        raise ApiError(400, text, "context_length_exceeded", "messages")
    return request, dropped + _dropped_inside(request, given)


def _nested(body: bytes) -> int:
    """Lists and objects at most; without the brackets of texts where there are many."""
    count = body.count(b"[") + body.count(b"{")
    if count <= MOST_NESTED:
        return count
    without = STRING.sub(b"", body)
    return without.count(b"[") + without.count(b"{")


def _taken(kind: type[Struct], name: str, value: Raw) -> bool:
    """Whether a parameter is one of `kind`, or asks for nothing. Raises ApiError for one that is refused."""
    if name in kind.__struct_fields__ or bytes(value) == b"null":
        return True
    known = PARAMETERS.get(name)
    if known is None or known.handling != "refused":
        return False
    asked = _decode(bytes(value), Any)
    if not any(asked == nothing and type(asked) is type(nothing) for nothing in known.nothing):
        message = f"{name}: this value is not supported ({known.why}); leave it out"
        raise ApiError(400, message, "unsupported_parameter", name)
    return True


_OF_MESSAGES = frozenset(name for kind in Message.__args__ for name in kind.__struct_fields__) | {"role"}
_OF_OPTIONS = frozenset(StreamOptions.__struct_fields__)


def _dropped_inside(request: Struct, given: dict[str, Raw]) -> list[str]:
    """Unknown keys, with a value, of messages and options: `messages.id`."""
    found: dict[str, None] = {}
    if isinstance(request, ChatRequest) and len(request.messages) <= MOST_LOOKED_INTO:
        for message in msgspec.json.decode(given["messages"], type=list[dict[str, Raw]]):
            found |= dict.fromkeys(f"messages.{key}" for key in _unknown(message, _OF_MESSAGES))
    if isinstance(request, GenerationRequest) and request.stream_options is not None:
        options = msgspec.json.decode(given["stream_options"], type=dict[str, Raw])
        found |= dict.fromkeys(f"stream_options.{key}" for key in _unknown(options, _OF_OPTIONS))
    return list(found)


def _unknown(inside: dict[str, Raw], known: frozenset[str]) -> list[str]:
    return [key for key, value in inside.items() if key not in known and bytes(value) not in (b"null", b"[]")]


def _decode(body: bytes, kind: Any) -> Any:
    """Raises ApiError 400, whose `param` is the place of the first thing that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at ")
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON in UTF-8: {error}", "invalid_json") from None
    names = re.findall(r"\w+", place.rpartition("$")[2])
    if missing := re.search(r"missing required field `(\w+)`", reason):
        names, reason = [*names, missing[1]], "this parameter is required"
    if len(names) > 2 and names[-1] == "type" and names[-3] == "content":
        names, reason = names[:-1], f"only text is taken ({reason})"
    raise bad(".".join(names), reason[:1].lower() + reason[1:])


def bad(param: str, reason: str) -> ApiError:
    """400 for a parameter's value."""
    short = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}…"
    named = short if short.startswith(f"{param}: ") or not param else f"{param}: {short}"
    return ApiError(400, named, "invalid_value", param or None)


def check_ids(param: str, tokens: list[int], vocabulary: int) -> None:
    """Raises ApiError for a token id outside the vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise bad(param, f"token ids must be from 0 to {vocabulary - 1}")
