"""Random JSON schemas, each answered by a model at temperature 1: `python benchmarks/serve_schemas.py DIR`.

Every answer that ended by itself must be valid by the package jsonschema; one that max_tokens cut is counted as that.
The schemas are drawn from a seed: objects of texts (bounded, of a pattern, dates), numbers with limits, enums, lists,
nested objects, alternatives, references. Half of the answers are streamed. The exit status says whether all were right.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
from provenance import write_results
from serving import Client, Launch, launched

from amq.errors import AmqError
from amq.util.settings import run_command

SCHEMA = "amq/serve_schemas/1"
NAMES = ("name", "size", "kind", "parts", "owner", "born", "code", "note", "weight", "ready", "größe", "a b")
WORDS = ("red", "green", "blue", "small", "large", "déjà vu", 'a "quoted" word', "two\nlines")
DEEPEST = 3


def schema(draw: random.Random) -> dict[str, Any]:
    """An object; bounded, so that nearly every answer ends."""
    made = object_schema(draw, 0)
    if draw.random() < 0.2:
        definition = object_schema(draw, DEEPEST)
        made["$defs"] = {"thing": definition}
        made["properties"]["thing"] = {"$ref": "#/$defs/thing"}
        made["required"] = [*made["required"], "thing"]
    return made


def object_schema(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: value_schema(draw, depth + 1) for name in names},
        "required": [name for name in names if draw.random() < 0.7],
        "additionalProperties": False,
    }


def value_schema(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randint(-100, 100)
    most = draw.randint(1, 3)
    simple: list[dict[str, Any]] = [
        {"type": "string", "maxLength": draw.randint(1, 12)},
        {"type": "string", "minLength": 2, "maxLength": 6},
        {"type": "string", "pattern": r"^[A-Z]{2}-[0-9]{1,3}$"},
        {"type": "string", "format": "date"},
        {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 1000)},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + draw.randint(2, 50)},
        {"type": "number", "minimum": low, "maximum": low + draw.randint(1, 10)},
        {"type": "boolean"},
        {"type": ["boolean", "null"]},
        {"enum": draw.sample(WORDS, 3)},
        {"enum": [1, "two", None, 4.5]},
        {"const": draw.choice(WORDS)},
    ]
    if depth >= DEEPEST or draw.random() < 0.6:
        return draw.choice(simple)
    nested = draw.choice(("array", "object", "anyOf"))
    if nested == "object":
        return object_schema(draw, depth)
    if nested == "anyOf":
        return {"anyOf": [value_schema(draw, depth + 1) for _ in range(2)]}
    return {
        "type": "array", "items": value_schema(draw, depth + 1), "minItems": draw.randint(0, most), "maxItems": most,
    }  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """end: `valid`, `invalid`, `cut`, or what else came; why: of an invalid one."""

    schema: dict[str, Any]
    text: str
    end: str
    why: str
    seconds: float
    tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="the checkpoint to serve")
    add("--server-args", default="--context 4096", metavar="ARGS", help="default: %(default)s")
    add("--count", type=int, default=None, metavar="N", help="schemas (default: 200)")
    add("--max-tokens", type=int, default=400, metavar="N", help="of an answer (default: %(default)s)")
    add("--at-once", type=int, default=4, metavar="N", help="requests (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write every schema and answer")
    add("--smoke", action="store_true", help="few schemas and no model: an engine that knows nothing")
    args = parser.parse_args(argv)
    if bool(args.folder) == args.smoke:
        raise AmqError("give a folder that amq quantized, or --smoke")
    count = args.count or (8 if args.smoke else 200)
    draw = random.Random(args.seed)
    schemas = [schema(draw) for _ in range(count)]
    for made in schemas:
        jsonschema.Draft202012Validator.check_schema(made)
    with (
        launched(args.folder, shlex.split(args.server_args), Launch()) as server,
        ThreadPoolExecutor(args.at_once) as pool,
    ):
        client = server.client()
        calls = [pool.submit(ask, client, server.model, made, n, args.max_tokens) for n, made in enumerate(schemas)]
        answers = [call.result() for call in calls]
    print(table(answers))
    if args.json:
        ends = Counter(answer.end for answer in answers)
        settings = {"count": count, "seed": args.seed, "max_tokens": args.max_tokens}
        rows = [vars(answer) for answer in answers]
        write_results(args.json, {"schema": SCHEMA, "model": server.model, **settings, "ends": ends, "answers": rows})
    return 0 if {answer.end for answer in answers} <= {"valid", "cut"} else 1


def ask(client: Client, model: str, made: dict[str, Any], number: int, max_tokens: int) -> Answered:
    question = f"Give an example of a JSON object that fits this schema: {json.dumps(made, ensure_ascii=False)}"
    body = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens,
        "temperature": 1.0, "seed": number, "stream": number % 2 == 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": made, "strict": True}},
    }  # fmt: skip
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    answer = client.call("POST", "/v1/chat/completions", body, timeout=600)
    if answer.status != 200:
        return Answered(made, answer.body.decode(errors="replace"), str(answer.status), "", answer.seconds, 0)
    text, finish, tokens = read_stream(answer.body) if body["stream"] else read(answer.json)
    if finish == "length":
        return Answered(made, text, "cut", "", answer.seconds, tokens)
    if finish != "stop":
        return Answered(made, text, f"finish_reason {finish}", "", answer.seconds, tokens)
    why = fault(text, made)
    return Answered(made, text, "invalid" if why else "valid", why, answer.seconds, tokens)


def read(answer: dict[str, Any]) -> tuple[str, str, int]:
    """(text, finish_reason, new tokens)."""
    choice = answer["choices"][0]
    return choice["message"]["content"] or "", choice["finish_reason"], answer["usage"]["completion_tokens"]


def read_stream(body: bytes) -> tuple[str, str, int]:
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    choices = [choice for event in events for choice in event.get("choices", ())]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    finish = next((choice["finish_reason"] for choice in reversed(choices) if choice["finish_reason"]), "none")
    tokens = next((event["usage"]["completion_tokens"] for event in reversed(events) if event.get("usage")), 0)
    return text, finish, tokens


FORMATS = jsonschema.FormatChecker(formats=())


@FORMATS.checks("date", raises=ValueError)
def is_date(value: object) -> bool:
    """As RFC 3339 has it, with the year 0000, which jsonschema's own check, Python's datetime, does not know."""
    return not isinstance(value, str) or bool(date.fromisoformat(re.sub("^0000", "2000", value)))


def fault(text: str, made: dict[str, Any]) -> str:
    """What is wrong with an answer; "" where nothing is."""
    try:
        value = json.loads(text)
        jsonschema.validate(value, made, jsonschema.Draft202012Validator, format_checker=FORMATS)
    except ValueError as error:
        return f"not JSON: {error}"
    except jsonschema.ValidationError as error:
        return error.message
    return ""


def table(answers: Sequence[Answered]) -> str:
    ends = Counter(answer.end for answer in answers)
    ended = ends["valid"] + ends["invalid"]
    lines = [
        "| schemas | ended | valid | invalid | cut by max_tokens | refused or failed | median tokens | median s |",
        "|---|---|---|---|---|---|---|---|",
        f"| {len(answers)} | {ended} | {ends['valid']} | {ends['invalid']} | {ends['cut']} "
        f"| {len(answers) - ended - ends['cut']} | {statistics.median(a.tokens for a in answers):.0f} "
        f"| {statistics.median(a.seconds for a in answers):.2f} |",
    ]
    for answer in answers:
        if answer.end not in ("valid", "cut"):
            lines.append(f"\n{answer.end}: {answer.why}\n  {json.dumps(answer.schema)}\n  {answer.text[:300]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
