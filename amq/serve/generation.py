"""From a request that was read to the jobs that answer it: what is sampled, the prompts, the grammars."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request

from amq.runtime.sampling import Constraint
from amq.runtime.settings import Sampling
from amq.serve._interim import ChatOptions, Grammar
from amq.serve.answers import Answer
from amq.serve.errors import ApiError
from amq.serve.messages import conversation, tools_of
from amq.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, bad, check_ids
from amq.serve.replies import ReplyParser, ToolFormat, format_of, response_grammar, tools_grammar
from amq.serve.shapes import Candidate, ChatShape, CompletionShape, Shape
from amq.serve.worker import Job

if TYPE_CHECKING:
    from amq.serve.app import Service

IGNORED_HEADER = "X-Amq-Ignored"
MOST_SEED = 2**63 - 1
OURS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
"""Names that chat_template_kwargs may not give: they are parameters of their own."""


@dataclass
class Prompt:
    """text: as the chat template wrote it. echo: what the answer begins with. constraints: of its choices, one each."""

    tokens: Sequence[int]
    text: str = ""
    echo: str = ""
    constraints: Sequence[Constraint | None] = field(default_factory=list)


async def complete(service: Service, request: Request, body: CompletionRequest, ignored: list[str]) -> Answer:
    """Raises ApiError."""
    sampling = _sampling(service, body)
    prompts = body.prompts
    count = _choices(service, body, len(prompts))
    if not prompts:
        raise bad("prompt", "it is empty: give some text")
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_ids("prompt", prompt, service.vocabulary)
            service.check_length("prompt", len(prompt))
    grammar = _guided(body)
    special = body.add_special_tokens is not False

    def make() -> list[Prompt]:
        return [
            _prompt(service, prompt, special, bool(body.echo), _constraints(service, grammar, count))
            for prompt in prompts
        ]

    made = await service.make(request, "prompt", make)
    shape = CompletionShape(**_shape(service, request, body))
    return _submit(service, request, body, sampling, made, shape, ignored, lambda prompt: None)


def _prompt(
    service: Service, prompt: str | list[int], special: bool, echo: bool, constraints: list[Constraint | None]
) -> Prompt:
    if isinstance(prompt, str):
        tokens = service.runtime.tokenizer.encode(prompt, special, service.prompt_limit)
        return Prompt(tokens, echo=prompt if echo else "", constraints=constraints)
    return Prompt(prompt, echo=service.runtime.tokenizer.decode(prompt) if echo else "", constraints=constraints)


async def chat(service: Service, request: Request, body: ChatRequest, ignored: list[str]) -> Answer:
    """Raises ApiError."""
    template = service.runtime.tokenizer.template or ""
    sampling = _sampling(service, body)
    count = _choices(service, body, 1)
    if len(body.messages) > service.prompt_limit:
        raise service.too_long("messages", f"there are {len(body.messages)} of them, each of a token or more")
    tools = tools_of(body.offered)
    form = format_of(template) if tools else None
    if tools and form is None:
        if body.choice != "auto":
            raise bad("tool_choice", "this model's chat template has no tools")
        ignored, tools = [*ignored, "tools"], []
    options = _options(service, body, tools)
    if form is not None:
        shown = {*sampling.shown_special, *form.shown(service.runtime.tokenizer)}
        sampling = replace(sampling, shown_special=tuple(sorted(shown)))
    grammar, param = _grammar(body, form, tools)

    def make() -> list[Prompt]:
        plain = conversation(body.messages, template)
        made = service.runtime.tokenizer.encode_chat(plain, options, service.prompt_limit, service.render)
        return [Prompt(made.tokens, made.text, constraints=_constraints(service, grammar, count, param))]

    made = await service.make(request, "messages", make)
    shape = ChatShape(**_shape(service, request, body), legacy=body.tools is None and body.functions is not None)
    thinking = service.settings.reasoning == "auto" and "<think>" in template

    def parser(prompt: Prompt) -> ReplyParser | None:
        open_thought = thinking and prompt.text.rstrip().endswith("<think>")
        return ReplyParser(form, thinking, open_thought) if thinking or form is not None else None

    return _submit(service, request, body, sampling, made, shape, ignored, parser)


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


def _options(service: Service, body: ChatRequest, tools: Sequence[Any]) -> ChatOptions:
    names = dict(body.chat_template_kwargs or {})
    if taken := [name for name in OURS if name in names]:
        raise bad("chat_template_kwargs", f"{taken[0]} is no name to give here")
    own = ("enable_thinking", "reasoning_effort", "documents")
    names |= {name: getattr(body, name) for name in own if getattr(body, name) is not None}
    going_on = bool(body.continue_final_message)
    if going_on and body.add_generation_prompt:
        raise bad(
            "continue_final_message", "the last message goes on, or a new one begins: add_generation_prompt is true"
        )
    return ChatOptions(
        tools=tools or None,
        add_generation_prompt=not going_on if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=going_on,
        names=names,
        special=service.settings.parse_special,
    )


def _grammar(body: ChatRequest, form: ToolFormat | None, tools: Sequence[Any]) -> tuple[Grammar | None, str]:
    """What the answer has to keep to, and the parameter that says so. A call that is required goes first."""
    called = tools_grammar(form, tools, body.choice, body.parallel_tool_calls is not False) if tools else None
    if called is not None and body.choice != "auto":
        return called, "tools"
    asked = None if body.response_format is None else response_grammar(msgspec.to_builtins(body.response_format))
    if asked is not None:
        return asked, "response_format"
    guided = _guided(body)
    return (called, "tools") if guided is None else (guided, "guided_json")


def _guided(body: GenerationRequest) -> Grammar | None:
    """As vLLM, llama.cpp and SGLang spell it. Raises ApiError for several at once."""
    other = body.structured_outputs
    schemas = [body.guided_json, body.json_schema, other and other.json]
    patterns = [body.guided_regex, body.regex, other and other.regex]
    choices = [body.guided_choice, other and other.choice]
    found = [Grammar("json_schema", s if isinstance(s, str) else msgspec.json.encode(s).decode()) for s in schemas if s]
    found += [Grammar("regex", pattern) for pattern in patterns if pattern]
    found += [Grammar("regex", "|".join(map(re.escape, texts))) for texts in choices if texts]
    found += [Grammar("lark", text) for text in (body.guided_grammar, other and other.grammar) if text]
    if len(found) > 1:
        raise bad("structured_outputs", "one form of the answer at a time")
    return found[0] if found else None


def _constraints(service: Service, grammar: Grammar | None, count: int, param: str = "") -> list[Constraint | None]:
    """One for each choice. Raises ApiError for a grammar that is not supported."""
    return [None if grammar is None else service.constraint(grammar, param or "guided_json") for _ in range(count)]


def _shape(service: Service, request: Request, body: GenerationRequest) -> dict[str, Any]:
    return {
        "identity": request.state.request_id,
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
    state, candidates = request.state, []
    for prompt in prompts:
        for number, constraint in enumerate(prompt.constraints):
            how = sampling if sampling.seed is None else replace(sampling, seed=_seed(sampling.seed, len(candidates)))
            job = Job(prompt.tokens, how, state.client, state.created, state.owner, constraint)
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
    headers = {IGNORED_HEADER: ", ".join(ignored)} if ignored else {}
    return Answer(service.worker, candidates, shape, bool(body.stream), headers)


def _seed(seed: int, number: int) -> int:
    """Of the choice `number`; the range of seeds is a circle."""
    return (seed + number + MOST_SEED + 1) % (2 * (MOST_SEED + 1)) - MOST_SEED - 1
