"""From a request that was read to the jobs that answer it: what is sampled, the prompts, the grammars."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request

from amq.errors import AmqError
from amq.runtime.chat import ChatOptions
from amq.runtime.grammar import Grammar
from amq.runtime.sampling import Constraint
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import ChatPrompt
from amq.serve.answers import Answer
from amq.serve.errors import ApiError
from amq.serve.messages import Message, conversation, described, tools_of
from amq.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, TokenizeRequest, bad, check_ids
from amq.serve.replies import ReplyParser, thinking_shown, thinks_open
from amq.serve.replies.describe import describe_tools
from amq.serve.replies.grammars import Thoughts, response_grammar, tools_grammar
from amq.serve.shapes import Candidate, ChatShape, CompletionShape, Shape
from amq.serve.worker import Job
from amq.util.settings import limits

if TYPE_CHECKING:
    from amq.serve.app import Service

IGNORED_HEADER = "X-Amq-Ignored"
MOST_NAMED = 32
MOST_SEED = int(limits(Sampling, "seed")["maximum"])
GBNF = re.compile(r"^[ \t]*root[ \t]*::=", re.MULTILINE)


@dataclass
class Prompt:
    """text: as the chat template wrote it. echo: what the answer begins with. constraints: of its choices, one each."""

    tokens: Sequence[int]
    text: str = ""
    echo: str = ""
    constraints: Sequence[Constraint | None] = field(default_factory=list)


async def complete(service: Service, request: Request, body: CompletionRequest, ignored: list[str]) -> Answer:
    """Raises ApiError."""
    tokenizer, sampling = service.runtime.tokenizer, _sampling(service, body)
    given = body.prompts
    count = _choices(service, body, len(given))
    for prompt in given:
        if not isinstance(prompt, str):
            service.check_length("prompt", len(prompt))
            check_ids("prompt", prompt, service.vocabulary)
        elif not prompt:
            raise bad("prompt", "it is empty: give some text")
    grammar = _guided(body)
    special = body.add_special_tokens is not False

    def make(prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            tokens, text = service.encode(prompt, special), prompt
        else:
            tokens, text = prompt, tokenizer.decode(prompt) if body.echo else ""
        constraints = service.constraints(grammar, count, "structured_outputs")
        return Prompt(tokens, echo=text if body.echo else "", constraints=constraints)

    made = await service.make(request, lambda: [make(prompt) for prompt in given])
    shape = CompletionShape(**_shape(service, request, body))
    return _submit(service, request, body, sampling, made, shape, ignored, lambda prompt: None)


async def chat(service: Service, request: Request, body: ChatRequest, ignored: list[str]) -> Answer:
    """Raises ApiError."""
    tokenizer, sampling, count = service.runtime.tokenizer, _sampling(service, body), _choices(service, body, 1)
    tools, form = tools_of(body.offered), service.tool_format
    shown = set(sampling.shown_special)
    if service.thinking:
        shown |= set(thinking_shown(tokenizer))
    if tools and form is not None:
        shown |= set(form.shown(tokenizer))
    sampling = replace(sampling, shown_special=tuple(sorted(shown)))

    def make() -> list[Prompt]:
        prompt = chat_prompt(service, body, body.messages, tools)
        grammar = _grammar(service, body, tools, prompt.text)
        constraints = service.constraints(grammar, count, "response_format" if not tools else "tools")
        return [Prompt(prompt.tokens, prompt.text, constraints=constraints)]

    made = await service.make(request, make)
    shape = ChatShape(**_shape(service, request, body), legacy=body.tools is None and bool(body.functions))

    def parser(prompt: Prompt) -> ReplyParser | None:
        if not service.thinking and not tools:
            return None
        thoughts = service.thinking and thinks_open(prompt.text)
        return ReplyParser(form if tools else None, service.thinking, thoughts, tools=tools)

    return _submit(service, request, body, sampling, made, shape, ignored, parser)


def chat_prompt(
    service: Service, body: ChatRequest | TokenizeRequest, given: Sequence[Message], tools: Sequence[Any]
) -> ChatPrompt:
    """A conversation as the model reads it. tools: those that it may call. Raises ApiError."""
    form = service.tool_format
    options = _options(service, body, [] if form is None or form.described else described(tools))
    messages = conversation(given)
    if form is not None:
        with service.checked("messages"):
            messages = describe_tools(form, messages, described(tools))
    return service.encode_chat(messages, options)


def _sampling(service: Service, body: GenerationRequest) -> Sampling:
    tokenizer = service.runtime.tokenizer
    special = frozenset(tokenizer.special_ids - tokenizer.end_ids)
    return body.sampling(service.settings.max_new_tokens, service.vocabulary, special)


def _choices(service: Service, body: GenerationRequest, prompts: int) -> int:
    count, most = body.n or 1, service.settings.max_choices
    if count * prompts > most:
        name = "n" if count > 1 else "prompt"
        raise bad(name, f"{count * prompts} answers are asked for; this server gives at most {most} to a request")
    return count


def _options(service: Service, body: ChatRequest | TokenizeRequest, tools: Sequence[Any]) -> ChatOptions:
    """How the template is called. Raises ApiError."""
    own = ("enable_thinking", "reasoning_effort", "documents")
    names = {name: getattr(body, name) for name in own if getattr(body, name, None) is not None}
    going_on = bool(body.continue_final_message)
    begins = not going_on if body.add_generation_prompt is None else body.add_generation_prompt
    names = {**(body.chat_template_kwargs or {}), **names}
    try:
        return ChatOptions(tools or None, begins, going_on, names, service.settings.parse_special)
    except AmqError as error:
        raise bad("continue_final_message" if going_on and begins else "chat_template_kwargs", str(error)) from None


def _grammar(service: Service, body: ChatRequest, tools: Sequence[Any], prompt: str) -> Grammar | None:
    """What the answer has to keep to. prompt: as text; it may end inside the model's thoughts. Raises ApiError."""
    guided = _guided(body)
    asked = None if body.response_format is None else msgspec.to_builtins(body.response_format)
    if guided is not None:
        if tools and body.choice != "auto" or asked is not None and asked["type"] != "text":
            raise bad("structured_outputs", "one form of the answer at a time")
        return guided
    thoughts: Thoughts = "none"
    if service.thinking:
        thoughts = "open" if thinks_open(prompt) else "allowed"
    special = service.runtime.tokenizer.added_named
    try:
        if not tools:
            return None if asked is None else response_grammar(asked, thoughts, special)
        return tools_grammar(
            service.tool_format,
            tools,
            body.choice,
            body.parallel_tool_calls is not False,
            response_format=asked,
            thoughts=thoughts,
            special=special,
        )
    except AmqError as error:
        raise bad("tools" if tools else "response_format", str(error)) from None


def _guided(body: GenerationRequest) -> Grammar | None:
    """As vLLM, llama.cpp and SGLang spell it. Raises ApiError for several at once."""
    other = body.structured_outputs
    schemas = [s for s in (body.guided_json, body.json_schema, other and other.json) if s is not None]
    patterns = [body.guided_regex, body.regex, other and other.regex]
    choices = [body.guided_choice, other and other.choice]
    found = [Grammar("json_schema", s if isinstance(s, str) else msgspec.json.encode(s).decode()) for s in schemas]
    found += [Grammar("regex", pattern) for pattern in patterns if pattern]
    found += [Grammar("regex", "|".join(map(re.escape, texts))) for texts in choices if texts]
    grammars = [body.guided_grammar, body.grammar, body.ebnf, other and other.grammar]
    found += [Grammar("gbnf" if GBNF.search(text) else "lark", text) for text in grammars if text]
    if len(found) > 1:
        raise bad("structured_outputs", "one form of the answer at a time")
    return found[0] if found else None


def _shape(service: Service, request: Request, body: GenerationRequest) -> dict[str, Any]:
    return {
        "identity": request.state.visit.id,
        "model": service.model,
        "tokenizer": service.runtime.tokenizer,
        "logprobs": body.wanted_logprobs is not None,
        "usage": body.with_usage,
        "every_usage": body.with_every_usage,
    }


def _submit(
    service: Service,
    request: Request,
    body: GenerationRequest,
    sampling: Sampling,
    prompts: Sequence[Prompt],
    shape: Shape,
    ignored: Sequence[str],
    parser: Callable[[Prompt], ReplyParser | None],
) -> Answer:
    """Queues a job for each choice of each prompt. Raises ApiError, and queues none then."""
    candidates = list[Candidate]()
    for prompt in prompts:
        for number, constraint in enumerate(prompt.constraints):
            how = sampling if sampling.seed is None else replace(sampling, seed=_seed(sampling.seed, len(candidates)))
            job = Job(prompt.tokens, how, request.state.visit, constraint)
            candidates.append(Candidate(len(candidates), job, number > 0, prompt.echo, parser(prompt)))
    submitted = []
    try:
        for candidate in candidates:
            service.worker.submit(candidate.job)
            submitted.append(candidate.job)
    except ApiError:
        for job in submitted:
            service.worker.cancel(job, "client")
        raise
    headers = {IGNORED_HEADER: _named(ignored)} if ignored else {}
    return Answer(service.worker, candidates, shape, bool(body.stream), headers)


def _named(names: Sequence[str]) -> str:
    """Names that a client may have thought of, as a header can have them."""
    plain = [re.sub(r"[^!-+\--~]", "?", name[:64]) or "?" for name in names[:MOST_NAMED]]
    return ", ".join(plain if len(names) <= MOST_NAMED else [*plain, f"and {len(names) - MOST_NAMED} more"])


def _seed(seed: int, number: int) -> int:
    """Of the choice `number`; the range of seeds is a circle."""
    return (seed + number + MOST_SEED + 1) % (2 * (MOST_SEED + 1)) - MOST_SEED - 1
