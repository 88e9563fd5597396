"""What the full-precision model answers, greedily, to prompts that it wrote itself; and how far another form agrees.

A prompt is a beginning of `amq.model.own_text`, a question in the model's own chat template or, without one, a word,
and `DRAWN` tokens that the model draws to go on with it, so that there are as many prompts as are wanted, and they
differ. The answer is greedy: at each position the token of the largest logit, of equal ones the one with the lowest id
(`torch.argmax`), until an end token, which is part of it, or a bound.

Another form of the model (quantized, say) answers greedily with the very same tokens up to the first position at which
its own largest logit, given the prompt and the answer so far, is another token's. So one pass over prompt and answer
tells how many tokens it would write until the first difference, without writing one (`agreement`). What it writes from
there on takes writing it (`Writer`).

Search and evaluation ask different questions (`half`). Answers are kept in rounds of `ROWS`, as own text is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model.blocks import TOKENS, BlockRunner
from amq.model.conversations import THINKING
from amq.model.inventory import embedding_weight
from amq.model.open import LoadedModel
from amq.model.own_text import Beginnings, check_cache, draw, in_memory, next_cache
from amq.util.files import cache_dir, make_folder
from amq.util.progress import Progress, Step
from amq.util.records import JsonFile
from amq.util.temporary import remove_stale_below
from amq.util.tensors import hashes_metadata, save_tensors, verify_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
"""Part of the cache key: raised whenever the same settings give other prompts or answers."""
ROWS = 16
"""Prompts of a round, which are written at once."""
DRAWN = 4
"""Tokens that the model draws to go on with a beginning."""
PIECE = 8
"""Tokens of prompts that go through the model at once before an answer: their logits exist, and nobody reads them."""
SEARCHED, HELD_OUT = 0, 1
"""Halves of the beginnings: what a search measures on, and what an evaluation does."""
INDEX = "answers.json"
WHAT = "answers"
"""Of --answers and --objective, in errors."""


@dataclass(frozen=True)
class Answer:
    """Tokens of a prompt, and the full-precision model's greedy answer to it; begun: leading tokens of the prompt that
    are a beginning, the rest of it being drawn. ended: the answer ends with an end token, not at the bound."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    begun: int
    ended: bool


@dataclass(frozen=True)
class Answers:
    """Of one model. kind: of the beginnings, `chat` or `plain`. ends: tokens that end an answer. limit: tokens that an
    answer may have. sha256: of all prompts and answers."""

    items: tuple[Answer, ...]
    beginnings: Beginnings
    kind: str
    limit: int
    sha256: str

    @property
    def ends(self) -> tuple[int, ...]:
        return self.beginnings.ends

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [item.prompt for item in self.items]


@dataclass(frozen=True, kw_only=True)
class AnswersIndex(JsonFile):
    """answers.json, for people: what a folder of rounds is of. Programs find it by its key. model: the class."""

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/answers/1",)

    schema: str = SCHEMAS[0]
    model: str
    kind: str
    limit: int
    seed: int
    half: int


def open_answers(
    loaded: LoadedModel, count: int, limit: int, seed: int, fingerprint: str, half: int,
    progress: Progress | None = None,
) -> Answers:  # fmt: skip
    """`count` answers of at most `limit` tokens each; from the cache, and what is missing there is written first.

    loaded: in full precision. fingerprint: `model_fingerprint` of it. half: SEARCHED or HELD_OUT. More answers of the
    same settings begin with the same ones. Raises AmqError where the model cannot write, memory does not suffice, or a
    file of the cache is damaged.
    """
    beginnings = find_beginnings(loaded)
    (kind,) = beginnings.openings
    identity = [VERSION, ROWS, DRAWN, fingerprint, limit, seed, half, asdict(beginnings)]
    key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    folder = cache_dir() / "answers" / key
    remove_stale_below(folder)
    files = [folder / f"round-{number:03d}.safetensors" for number in range(-(-count // ROWS))]
    missing = [number for number, path in enumerate(files) if not path.is_file()]
    if missing:
        make_folder(folder, "point AMQ_CACHE at a folder that can be written")
        of = type(loaded.model).__name__
        AnswersIndex(model=of, kind=kind, limit=limit, seed=seed, half=half).write(folder / INDEX)
        with (progress or Progress()).stage("answers", len(missing)) as step:
            for number in missing:
                _save(files[number], write_round(loaded, beginnings, limit, seed, half, number))
                step()
    items = tuple(item for path in files for item in _load(path, beginnings.ends))[:count]
    digest = hashlib.sha256(repr([(item.prompt, item.tokens) for item in items]).encode()).hexdigest()
    return Answers(items, beginnings, kind, limit, digest)


def find_beginnings(loaded: LoadedModel) -> Beginnings:
    """Of conversations where the model has a chat template, else of plain text; see `Beginnings.of`."""
    return Beginnings.of(loaded, ("chat" if getattr(loaded.tokenizer, "chat_template", None) else "plain",), WHAT)


def write_round(
    loaded: LoadedModel, beginnings: Beginnings, limit: int, seed: int, half: int, number: int
) -> list[Answer]:
    """The answers `number` · ROWS and on."""
    (openings,) = (some[half::2] for some in beginnings.openings.values())
    if not openings:
        raise AmqError(f"{WHAT}: there are too few beginnings for a half of them")
    first = number * ROWS
    chosen = [_permuted(len(openings), seed, turn)[i] for turn, i in _turns(first, ROWS, len(openings))]
    begun = [beginnings.prefix + openings[i] for i in chosen]
    writer = Writer(loaded.model, WHAT)
    generator = torch.Generator(writer.device).manual_seed(seed * 1_000_003 + 2 * number + half)
    never = torch.tensor(sorted({*beginnings.never, *beginnings.ends}), dtype=torch.int64, device=writer.device)
    drawn = writer.write(begun, DRAWN, (), lambda logits: draw(logits, never, generator, WHAT))
    prompts = [b + d for b, d in zip(begun, drawn, strict=True)]
    answers = writer.write(prompts, limit, beginnings.ends)
    found = zip(prompts, answers, begun, strict=True)
    return [Answer(p, a, len(b), a[-1] in beginnings.ends) for p, a, b in found]


def _turns(first: int, count: int, size: int) -> list[tuple[int, int]]:
    """(turn, place in it) of `count` prompts, where each turn asks every one of `size` questions once."""
    return [divmod(index, size) for index in range(first, first + count)]


def _permuted(size: int, seed: int, turn: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, turn]).permutation(size).tolist()
    return order


class Writer:
    """A model that goes on with prompts, many at a time, token by token with its cache.

    what: asked for it, in errors. Raises AmqError for a model that is not in memory as a whole, and when it turns out
    that it has no cache.
    """

    def __init__(self, model: PreTrainedModel, what: str = WHAT) -> None:
        if not in_memory(model):
            raise AmqError(
                f"{what}: the model is not in memory as a whole, and would read its weights from disk for every token "
                "it writes: use --load memory"
            )
        self._model, self._what = model, what
        self.device = embedding_weight(model).device

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        ends: Sequence[int],
        choose: Callable[[Tensor], list[int]] | None = None,
        step: Step = lambda note="": None,
    ) -> list[tuple[int, ...]]:
        """What the model writes behind each prompt: up to and with a token of `ends`, at most `count` tokens.

        choose: of logits float32 [rows, vocabulary] the next token of each row; None: greedily. Every prompt begins at
        position 0, and a shorter one is gone on with before a longer one has been read: nothing is padded, so that each
        is written as it would be alone. step: called once per position.
        """
        return [
            answer
            for first in range(0, len(prompts), ROWS)
            for answer in self._write(prompts[first : first + ROWS], count, ends, choose or largest, step)
        ]

    @torch.no_grad()
    def _write(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        ends: Sequence[int],
        choose: Callable[[Tensor], list[int]],
        step: Step,
    ) -> list[tuple[int, ...]]:
        lengths = [len(prompt) for prompt in prompts]
        check_cache(self._model, max(lengths) + count, len(prompts), f"texts of {self._what}")
        tokens = torch.zeros(len(prompts), max(lengths) + count, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        answers: list[list[int]] = [[] for _ in prompts]
        left = set(range(len(prompts)))
        position = 0
        for logits, position in self._logits(tokens, min(lengths)):
            chosen = choose(logits)
            for row in [row for row in left if position >= lengths[row]]:
                answers[row].append(chosen[row])
                tokens[row, position] = chosen[row]
                if chosen[row] in ends or len(answers[row]) == count:
                    left.remove(row)
            step()
            if not left:
                break
        return [tuple(answer) for answer in answers]

    def _logits(self, tokens: Tensor, given: int) -> Iterator[tuple[Tensor, int]]:
        """(logits float32 [rows, vocabulary] of what stands at a position, that position) for `given` and on; `tokens`
        [rows, length] is read as far as the position whenever it is asked for the next."""
        start, cache = 0, dict[str, Any]()
        for stop in (*range(PIECE, given, PIECE), *range(given, tokens.shape[1])):
            output = self._model(input_ids=tokens[:, start:stop].to(self.device), use_cache=True, **cache)
            cache, start = next_cache(output, self._model, self._what), stop
            if stop >= given:
                yield output["logits"][:, -1].float(), stop


def largest(logits: Tensor) -> list[int]:
    """The greedy choice: of equal logits the lowest id. logits: float32 [rows, vocabulary]."""
    found: list[int] = logits.argmax(-1).tolist()
    return found


@torch.no_grad()
def agreement(model: PreTrainedModel, answers: Answers) -> list[int]:
    """Of each answer the number of tokens that the model writes too, greedily, until the first that it does not.

    One pass over prompts and answers; what it gives is what comparing with the model's own greedy answer gives, but
    for logits so near to each other that a pass over many tokens rounds them into another order than one over a token.
    """
    runner = BlockRunner(model)
    device = embedding_weight(model).device
    batches = [torch.tensor([[*item.prompt, *item.tokens[:-1]]], device=device) for item in answers.items]
    found = []
    for item, hidden in zip(answers.items, runner.final(batches), strict=True):
        states = hidden[0, len(item.prompt) - 1 :]
        chosen = [token for some in states.split(TOKENS) for token in _largest_or_none(runner.logits(some).float())]
        found.append(until_difference(item.tokens, chosen))
    return found


def _largest_or_none(logits: Tensor) -> list[int]:
    """`largest`, and −1 where a model that overflows says nothing."""
    broken = logits.amax(-1).isnan().tolist()
    return [-1 if nothing else token for nothing, token in zip(broken, largest(logits), strict=True)]


def until_difference(wanted: Sequence[int], found: Sequence[int]) -> int:
    """Leading tokens that are the same; a text that ends earlier differs behind its end."""
    pairs = zip(wanted, found, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(found)))


def thoughts_end(prompt: str, answer: str) -> bool | None:
    """Whether the thoughts of an answer have an end in it; None for an answer without any.

    prompt, answer: with special tokens; a template may open the thoughts itself, or open and close them.
    """
    for opens, closes in THINKING:
        if opens in answer or prompt.rfind(opens) > prompt.rfind(closes):
            return closes in answer.rpartition(opens)[2]
    return None


def _save(path: Path, answers: Sequence[Answer]) -> None:
    if path.is_file():  # another process may have been faster: its answers may be in use already
        return
    parts = {"prompts": [a.prompt for a in answers], "answers": [a.tokens for a in answers]}
    content = {
        name: torch.tensor([t for some in rows for t in some], dtype=torch.int32) for name, rows in parts.items()
    }
    lengths = [[len(a.prompt), len(a.tokens), a.begun] for a in answers]
    content["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    save_tensors(path, content, hashes_metadata(content))


def _load(path: Path, ends: Sequence[int]) -> Iterator[Answer]:
    remedy = "delete it and run the same command again"
    try:
        file = verify_file(path, whole=True)
    except AmqError as error:
        raise AmqError(f"{path} is damaged ({error}): {remedy}") from error
    if {"prompts", "answers", "lengths"} != set(file.keys()) or file.get_tensor("lengths").shape != (ROWS, 3):
        raise AmqError(f"{path} does not hold prompts, answers and lengths [{ROWS}, 3]: {remedy}")
    prompts, answers = (iter(file.get_tensor(name).tolist()) for name in ("prompts", "answers"))
    for given, written, begun in file.get_tensor("lengths").tolist():
        prompt, tokens = (tuple(next(some) for _ in range(n)) for some, n in ((prompts, given), (answers, written)))
        yield Answer(prompt, tokens, begun, tokens[-1] in ends)
