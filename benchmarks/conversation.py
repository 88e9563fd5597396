"""A conversation of ten turns: which tokens are read in each of them, and how long its first token takes.
`python benchmarks/conversation.py DIR --json FILE`

Every turn's prompt is the one before, the answer to it and a new message, as a chat client sends it. Once as one
client, who goes on from what was computed for earlier turns, and once as another client for every turn, who reads all
of it; the answers, chosen greedily, must be the same. The model is a random hybrid (random_models.py) in DIR, which is
removed at the end, or what --model names. --smoke takes a tiny one: it checks the benchmark and measures nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from provenance import write_results
from random_models import SHAPES, Formats, small_tokenizer, write_random

from amq.bench.machine import OtherWork
from amq.errors import AmqError
from amq.model.open import resolve
from amq.runtime import Runtime, load
from amq.runtime.scheduler import Piece, Request, Scheduler
from amq.runtime.settings import Sampling
from amq.util.settings import run_command

SCHEMA = "amq/conversation/1"
SHAPE, SMOKE = "qwen3.5-0.8B", "tiny-hybrid"
SYSTEM = 600
"""Tokens before the first message: instructions and tools."""
MESSAGE = (80, 300)
"""Tokens of a message, from and to."""


@dataclass(frozen=True)
class Turn:
    """prompt, read: tokens, and how many of them were computed. seconds: until the first new token. others: the share
    of all cores' time that other processes had meanwhile."""

    prompt: int
    read: int
    seconds: float
    others: float | None


def talk(runtime: Runtime, turns: int, new: int, scale: float, one_client: bool) -> tuple[list[Turn], list[list[int]]]:
    """The turns, and the answers. scale: of the lengths of messages. one_client: or one for each turn."""
    random, scheduler = np.random.default_rng(0), Scheduler(runtime.engine, runtime.tokenizer)
    text = _message(random, runtime, round(SYSTEM * scale))
    found, answers = [], []
    for number in range(turns):
        text += _message(random, runtime, round(random.integers(*MESSAGE) * scale))
        first: list[float] = []
        answer: list[int] = []

        def listen(piece: Piece, first: list[float] = first, answer: list[int] = answer) -> None:
            first.append(time.perf_counter())
            answer += [choice.token for choice in piece.choices]

        owner = "client" if one_client else f"client {number}"
        request = Request(list(text), Sampling(max_new_tokens=new, ignore_end=True), listen, owner)
        others, start = OtherWork(), time.perf_counter()
        scheduler.submit(request)
        while scheduler.step():
            pass
        if request.error or len(answer) != new:
            raise AmqError(
                f"turn {number + 1} ended after {len(answer)} of {new} tokens: {request.error or 'too early'}"
            )
        read = len(request.prompt) - request.cached_tokens
        found.append(Turn(len(request.prompt), read, first[0] - start, others.share()))
        answers.append(answer)
        text += answer
    return found, answers


def _message(random: np.random.Generator, runtime: Runtime, tokens: int) -> list[int]:
    return random.integers(runtime.engine.vocab_size, size=tokens).tolist()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    turns, new, scale = (3, 4, 0.25) if args.smoke else (args.turns, args.new, 1.0)
    longest = round((SYSTEM + turns * MESSAGE[1]) * scale) + turns * new + 1
    made = args.folder / "model"
    if not args.model:
        shape, formats = SHAPES[SMOKE if args.smoke else SHAPE], Formats(group_size=32) if args.smoke else Formats()
        tokenizer = small_tokenizer(args.folder / "tokenizer") if args.smoke else resolve(args.tokenizer)
        write_random(made, shape.model(shape.layers), formats, tokenizer)
    try:
        runtime = load(args.model or made, threads=args.threads, context=longest)
        again, answers = talk(runtime, turns, new, scale, one_client=True)
        anew, others = talk(runtime, turns, new, scale, one_client=False)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return {
        "schema": SCHEMA, "model": args.model or SHAPE, "banner": runtime.engine.banner, "new": new,
        "one_client": [asdict(turn) for turn in again], "anew": [asdict(turn) for turn in anew],
        "same": [one == other for one, other in zip(answers, others, strict=True)],
    }  # fmt: skip


def table(content: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield content["banner"]
    yield ""
    yield "| turn | tokens of its prompt | read | s to the first new one | reading all: s | same answer |"
    yield "|---|---|---|---|---|---|"
    parts = zip(content["one_client"], content["anew"], content["same"], strict=True)
    for number, (one, other, same) in enumerate(parts, 1):
        seconds = f"{one['seconds']:.2f} | {other['seconds']:.2f}"
        yield f"| {number} | {one['prompt']} | {one['read']} | {seconds} | {'yes' if same else 'no'} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="for the model")
    parser.add_argument("--model", default="", metavar="MODEL", help="a checkpoint, instead of a random hybrid")
    parser.add_argument("--turns", type=int, default=10, metavar="N")
    parser.add_argument("--new", type=int, default=64, metavar="N", help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=None, metavar="N")
    parser.add_argument("--tokenizer", default="smollm2", metavar="MODEL", help="whose tokenizer to copy")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: checks the benchmark, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    content = measure(args)
    if args.json:
        write_results(args.json, content)
    print("\n".join(table(content)))
    return 0 if all(content["same"]) else 1


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main()))
