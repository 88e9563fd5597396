"""Conversations of three turns with two tools, as agents have them: `python benchmarks/serve_clients.py DIR`.

Through OpenAI's own client, streamed and not, whose messages go back as it made them; and through pydantic-ai's agent
loop. Prints the transcripts. What is checked is the protocol: calls that name a tool and fit its schema where one is
required, results that are taken, an answer in the end. What a small model makes of it is only shown.

Wants `pip install openai pydantic-ai-slim jsonschema`. --smoke takes an engine that repeats prompts instead of a model.
"""

from __future__ import annotations

import argparse
import json
import operator
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
from provenance import write_results
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ToolReturnPart, UsageLimits
from pydantic_ai.exceptions import UnexpectedModelBehavior, UsageLimitExceeded
from pydantic_ai.messages import ModelMessage, ToolCallPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from serving import Launch, Served, launched

from amq.errors import AmqError
from amq.util.settings import run_command

SCHEMA = "amq/serve_clients/1"
PACKAGES = ("openai", "pydantic-ai-slim", "jsonschema")
CITIES = ("Paris", "Rome", "Oslo")
OPERATIONS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
SHOWN = 300
"""Characters of a text that are printed; the JSON has all."""

ROUNDS = 4
"""Of calls in one turn; then the answer is asked for without tools."""

QUESTIONS = (
    ("What is the weather in Paris? Use the tool.", "required"),
    ("Now compute 17 times 23 with the tool.", {"type": "function", "function": {"name": "calculate"}}),
    ("Thank you. Sum up what you found out in one sentence.", "auto"),
)
"""What is asked, and the tool_choice of the first request of that turn; later ones of the turn are `auto`."""


def weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """The weather in a city now."""
    return f"{city}: 21 degrees, light rain"


def calculate(a: int, operation: Literal["plus", "minus", "times"], b: int) -> str:
    """Adds, subtracts or multiplies two whole numbers."""
    return str(OPERATIONS[operation](a, b))


NUMBER = {"type": "integer", "minimum": 0, "maximum": 9999}
PARAMETERS: dict[str, dict[str, Any]] = {
    "weather": {"city": {"type": "string", "enum": list(CITIES)}},
    "calculate": {"a": NUMBER, "operation": {"type": "string", "enum": list(OPERATIONS)}, "b": NUMBER},
}
FUNCTIONS = {"weather": weather, "calculate": calculate}


def schema(name: str) -> dict[str, Any]:
    properties = PARAMETERS[name]
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": made.__doc__, "parameters": schema(name), "strict": True},
    }
    for name, made in FUNCTIONS.items()
]


@dataclass
class Talk:
    """A conversation. transcript: (who, what). checks: (what, whether it held, what came)."""

    through: str
    transcript: list[tuple[str, str]] = field(default_factory=list)
    checks: list[tuple[str, bool, str]] = field(default_factory=list)

    def says(self, who: str, what: str) -> None:
        self.transcript.append((who, what))
        line = what.replace("\n", "⏎")
        print(f"  {who}: {line[:SHOWN]}{'…' * (len(line) > SHOWN)}", flush=True)

    def check(self, what: str, good: bool, came: str = "") -> None:
        self.checks.append((what, good, came))
        if not good:
            print(f"  NOT SO: {what}: {came}", flush=True)

    @property
    def good(self) -> bool:
        return all(good for _, good, _ in self.checks)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="the checkpoint to serve")
    add("--server-args", default="--context 4096", metavar="ARGS", help="default: %(default)s")
    add("--max-tokens", type=int, default=200, metavar="N", help="of an answer (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write transcripts and checks")
    add("--smoke", action="store_true", help="no model: an engine that repeats prompts")
    args = parser.parse_args(argv)
    if bool(args.folder) == args.smoke:
        raise AmqError("give a folder that amq quantized, or --smoke")
    talks = []
    with launched(args.folder, shlex.split(args.server_args), Launch()) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        for stream in (False, True):
            print(f"openai {openai.__version__}, {'streamed' if stream else 'whole answers'}")
            talks.append(with_openai(client, server.model, stream, args.max_tokens))
        print(f"pydantic-ai {version('pydantic-ai-slim')}")
        talks.append(with_agent(server, args.max_tokens))
    print(table(talks))
    if args.json:
        written = [vars(talk) for talk in talks]
        clients = {name: version(name) for name in PACKAGES}
        write_results(args.json, {"schema": SCHEMA, "model": server.model, "clients": clients, "talks": written})
    return 0 if all(talk.good for talk in talks) else 1


def table(talks: Sequence[Talk]) -> str:
    lines = ["| client | calls | checks that held | those that did not |", "|---|---|---|---|"]
    for talk in talks:
        calls = sum(who == "call" for who, _ in talk.transcript)
        wrong = "; ".join(f"{what} ({came})" for what, good, came in talk.checks if not good)
        held = sum(good for _, good, _ in talk.checks)
        lines.append(f"| {talk.through} | {calls} | {held} of {len(talk.checks)} | {wrong or 'none'} |")
    return "\n".join(lines)


# OpenAI's own client


def with_openai(client: openai.OpenAI, model: str, stream: bool, max_tokens: int) -> Talk:
    talk = Talk(f"openai, {'streamed' if stream else 'whole answers'}")
    messages: list[Any] = [{"role": "system", "content": "You are a helpful assistant. Use the tools."}]
    for question, choice in QUESTIONS:
        talk.says("user", question)
        messages.append({"role": "user", "content": question})
        for turn in range(ROUNDS + 1):
            wanted = choice if turn == 0 else "auto" if turn < ROUNDS else "none"
            options = {"messages": messages, "tools": TOOLS, "tool_choice": wanted}
            options |= {"max_completion_tokens": max_tokens, "temperature": 0, "parallel_tool_calls": False}
            finish, message = (streamed if stream else whole)(client, model, options)
            messages.append(message)  # as the client made it, with all that it holds
            calls = message.get("tool_calls") or []
            if turn == 0 and choice != "auto":
                talk.check("a required call comes", bool(calls) and finish == "tool_calls", f"{finish}, {message}")
            if not calls:
                text = message.get("content") or ""
                talk.says("assistant", text)
                talk.check("an answer comes", bool(text) and finish in ("stop", "length"), f"{finish}, {text!r}")
                break
            if isinstance(wanted, dict):
                named = {call["function"]["name"] for call in calls}
                talk.check("the tool that was named is called", named == {wanted["function"]["name"]}, str(named))
            messages += [result(talk, call) for call in calls]
    return talk


def whole(client: openai.OpenAI, model: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    choice = client.chat.completions.create(model=model, **options).choices[0]
    return choice.finish_reason, choice.message.model_dump()


def streamed(client: openai.OpenAI, model: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Put together by the client's own helper, which is strict about what deltas may hold."""
    with client.chat.completions.stream(model=model, **options) as events:
        try:
            for _ in events:
                pass
            choice = events.get_final_completion().choices[0]
        except openai.LengthFinishReasonError as error:  # cut, where the client was to check strict tools
            choice = error.completion.choices[0]
    return choice.finish_reason, choice.message.model_dump()


def result(talk: Talk, call: dict[str, Any]) -> dict[str, Any]:
    """Does what the call wants; the message that says so."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    talk.says("call", f"{name}({arguments}) as {call['id']}")
    talk.check("a call has an id and a known tool", bool(call["id"]) and name in FUNCTIONS, str(call))
    try:
        given = json.loads(arguments)
        jsonschema.validate(given, schema(name))
    except (ValueError, KeyError, jsonschema.ValidationError) as error:
        talk.check("its arguments fit the schema", False, f"{arguments}: {str(error).splitlines()[0]}")
        text = "error: wrong arguments"
    else:
        talk.check("its arguments fit the schema", True)
        text = FUNCTIONS[name](**given)
    talk.says("tool", text)
    return {"role": "tool", "tool_call_id": call["id"], "content": text}


# pydantic-ai


class Report(BaseModel):
    """What was found out."""

    city: Literal["Paris", "Rome", "Oslo"]
    degrees: int = Field(ge=-50, le=60)
    product: int = Field(ge=0, le=999_999)


def with_agent(server: Served, max_tokens: int) -> Talk:
    """Two turns that end in text, and one that must end in a Report, which the agent asks for as a required call."""
    talk = Talk("pydantic-ai")
    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    model = OpenAIChatModel(server.model, provider=provider)
    agent = Agent(model, tools=[weather, calculate], instructions="You are a helpful assistant. Use the tools.")
    settings = ModelSettings(temperature=0.0, max_tokens=max_tokens)
    history: list[ModelMessage] = []
    for (question, _), kind in zip(QUESTIONS, (str, str, Report), strict=True):
        talk.says("user", question)
        limits = UsageLimits(request_limit=2 * ROUNDS)
        try:
            run = agent.run_sync(
                question, output_type=kind, message_history=history, model_settings=settings, usage_limits=limits
            )
        except (UsageLimitExceeded, UnexpectedModelBehavior) as error:
            # the model went round in circles or was cut: its own doing, where every request was answered
            talk.says("agent", f"gave up: {error}")
            talk.check("the report comes", kind is not Report, str(error))
            continue
        for part in (part for message in run.new_messages() for part in message.parts):
            if isinstance(part, ToolCallPart):
                talk.says("call", f"{part.tool_name}({part.args_as_json_str()})")
                talk.check("a call has an id", bool(part.tool_call_id), str(part))
            elif isinstance(part, ToolReturnPart):
                talk.says("tool", part.model_response_str())
        talk.says("assistant", str(run.output))
        talk.check(f"the answer is a {kind.__name__}", isinstance(run.output, kind) and bool(run.output), str(run))
        history = run.all_messages()
    return talk


if __name__ == "__main__":
    sys.exit(run_command(main))
