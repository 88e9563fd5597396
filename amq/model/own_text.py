"""`--calibration self`: text that the model writes itself, which is what it will read when it is used; and mixtures.

Windows are written in rounds of `ROWS`, all windows of a round at once, token by token with a cache of keys and values.
Every window begins as all windows do (`Corpus.prefix`); what follows is drawn from the model at temperature 1. Every
other window holds plain text, and the rest conversations in the model's own chat template, if it has one, each until
the model ends it: the question is one of `QUESTIONS`, the answer the model's. Plain text begins where the model begins
it, behind its start token; where it has none, with one of `WORDS`. So a window is what the model would have written
into it, nothing is padded, and its special tokens are tokens.

Each round has a seed of its own and is a file in the cache, under a hash of the model's weights and of everything else
that decides its content: more windows are more rounds, and those before them stay. A round is not the same on another
processor, where products are summed in another order: whoever needs the very same windows copies the folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model.conversations import render
from amq.model.inventory import embedding_weight
from amq.model.open import LoadedModel
from amq.model.paging import pager_of
from amq.model.settings import AUTO
from amq.model.shape import CACHE_BYTES, ModelShape, said, text_config
from amq.model.text import SELF, Corpus, WindowSampler, check_length, check_rows, encoder, find_prefix, load_corpus
from amq.util.files import cache_dir, make_folder
from amq.util.limits import check_memory
from amq.util.progress import Progress, Step
from amq.util.records import JsonFile
from amq.util.temporary import remove_stale_below
from amq.util.tensors import hashes_metadata, save_tensors, verify_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
"""Part of the cache key: raised whenever the same settings give other windows."""
ROWS = 24
"""Windows of a round: as many as a bank takes by default. A search takes two rounds, and `amq.quantize` three."""
BUILT_IN = "pydoc"
MIXTURE = f"{BUILT_IN}+{SELF}"
"""What `auto` is: on text of no kind that calibrates, `self` is better than `pydoc`, and this has most of its gain; on
text about code it loses a third of what `self` loses (docs/quality.md)."""
INDEX, TENSOR = "text.json", "tokens"
KINDS = ("plain", "chat")
"""Windows take turns between them."""
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls a cache of keys and values, the newest name first: it answers to older ones too."""

WORDS = (
    *("The", "A", "In", "During", "It", "When", "There", "For", "We", "One", "After", "This", "Many", "If", "On", "To"),
    *("As", "How", "At", "With", "I", "What", "My", "Most"),
)
"""How plain text begins where no start token begins it."""
QUESTIONS = (
    "Hello! What can you help me with?",
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between weather and climate?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me a recipe for a simple vegetable soup.",
    "A train travels 120 km in 1.5 hours. What is its average speed? Show your steps.",
    "Translate into French: The library opens at nine in the morning.",
    "Who was Marie Curie?",
    "Write a polite email that asks for a meeting next week.",
    "List the planets of the solar system with one fact about each.",
    "What should I look at when I buy a used car?",
    "Explain recursion to someone who is new to programming.",
    "Write a poem about autumn.",
    "What are the advantages and disadvantages of working from home?",
    "How do I undo the last commit in git?",
    "Summarize the causes of the First World War in one paragraph.",
    "Find the mistake in this sentence: He don't like apples.",
    "Give me three ideas for a birthday present for a friend who likes to cook.",
    "How does a vaccine work?",
    "Write a SQL query that counts the orders of each customer.",
    "What can I see in Kyoto in two days?",
    "Solve the equation 3x + 7 = 22.",
    "¿Cómo se prepara una buena tortilla de patatas?",
    "Describe the water cycle for a child of eight years.",
    "Return a JSON object with the name, the age and the city of a person you make up.",
    "What does this mean: a bird in the hand is worth two in the bush?",
    "Erkläre kurz, wie ein Kühlschrank funktioniert.",
    "Compare two ways to learn a language.",
    "How many legs do three spiders and two ants have together? Think step by step.",
    "Write a bash command that finds the ten largest files in a folder.",
    "I cannot sleep well. What could help?",
)
"""How conversations begin."""


@dataclass(frozen=True)
class Beginnings:
    """How documents begin and end, in tokens: all that a text depends on of a tokenizer.

    prefix: of every window, see `Corpus`. openings: {kind: what a document of it may begin with}; a kind that a model
    cannot write is left out. ends: tokens that end a document. never: tokens that are not drawn.
    """

    prefix: tuple[int, ...]
    prefix_names: tuple[str, ...]
    openings: dict[str, tuple[tuple[int, ...], ...]]
    ends: tuple[int, ...]
    never: tuple[int, ...]

    @staticmethod
    def of(loaded: LoadedModel, kinds: Sequence[str] = KINDS, what: str = f"--calibration {SELF}") -> Beginnings:
        """Raises AmqError where a beginning has no tokens, or one without a row in the model's embedding.

        what: wants them, in errors.
        """
        tokenizer, rows = loaded.tokenizer, loaded.embedding_rows
        encode, spell = encoder(tokenizer), tokenizer.convert_ids_to_tokens
        prefix = tuple(find_prefix(encode, " ".join(WORDS)))
        texts = {"plain": list(WORDS)}
        if getattr(tokenizer, "chat_template", None):
            asked = ([{"role": "user", "content": question}] for question in QUESTIONS)
            texts["chat"] = [render(tokenizer, messages, what, answer=True) for messages in asked]
        openings = {}
        for kind in (kind for kind in kinds if kind in texts):
            tokens = [tuple(encode(text, False)) for text in texts[kind]]
            check_rows([*prefix, *sum(tokens, ())], spell, rows, "a document begins with", f"do without {what}")
            openings[kind] = tuple(t[len(prefix) :] if prefix and t[: len(prefix)] == prefix else t for t in tokens)
            if not all(openings[kind]):
                raise AmqError(f"the tokenizer has no token for the {kind} openings of {what}")
        if not openings:
            raise AmqError(f"{loaded.name} has no chat template, so that it writes no conversations")
        never = {*prefix, *range(len(tokenizer), rows), *_placeholders(loaded.config)}
        ends = tuple(sorted(_ends(loaded) - never))
        return Beginnings(prefix, tuple(str(spell(i)) for i in prefix), openings, ends, tuple(sorted(never)))


def _ends(loaded: LoadedModel) -> set[int]:
    """Every token that the model or its tokenizer says a text ends with."""
    model, tokenizer = loaded.model, loaded.tokenizer
    stops = getattr(model.generation_config, "eos_token_id", None), said(text_config(loaded.config), "eos_token_id")
    found = [tokenizer.eos_token_id, *(i for one in stops for i in (one if isinstance(one, list) else [one]))]
    return {i for i in found if i is not None}


def _placeholders(config: Any) -> set[int]:
    """Tokens that stand for pictures or sounds, which nobody puts in."""
    media = ("image", "video", "audio", "vision", "boi", "eoi", "boa", "eoa")
    said = {name: value for name, value in config.to_dict().items() if name.endswith(("_token_id", "_token_index"))}
    return {value for name, value in said.items() if name.startswith(media) and isinstance(value, int)}


@dataclass(frozen=True, kw_only=True)
class OwnTextIndex(JsonFile):
    """text.json, for people: what a folder of rounds is of. Programs find it by its key.

    model: the class. length: tokens of a window. kinds: of documents.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/own_text/1",)

    schema: str = SCHEMAS[0]
    model: str
    length: int
    seed: int
    kinds: tuple[str, ...]


def open_sampler(
    loaded: LoadedModel, source: str, length: int, seed: int, count: int, fingerprint: str,
    progress: Progress | None = None,
) -> WindowSampler:  # fmt: skip
    """Deals out the windows of a calibration text in the model's tokens: one of `load_corpus`, `self`, several of them
    with a + between, whose windows take turns, or `auto`. The corpus's name says what `auto` has become.

    loaded: in full precision, where the model writes. length: of a window. count: how many windows will be taken: those
    before stay the same when it grows. fingerprint: `model_fingerprint` of the model.
    Raises AmqError where there is no such text.
    """
    names = parts_of(_chosen(loaded, progress) if source == AUTO else source)
    if len(names) > 1:
        share = -(-count // len(names))
        parts = [open_sampler(loaded, name, length, seed, share, fingerprint, progress) for name in names]
        return WindowSampler(mixed(parts, share), length, seed)
    (source,) = names
    if source != SELF:
        return WindowSampler(load_corpus(source, loaded.tokenizer, loaded.embedding_rows), length, seed)
    return WindowSampler(own_corpus(loaded, length, seed, count, fingerprint, progress), length, seed)


def _chosen(loaded: LoadedModel, progress: Progress | None) -> str:
    """What `auto` is for a model; says so where the model does not write."""
    if in_memory(loaded.model):
        return MIXTURE
    (progress or Progress()).say(
        f"calibration: {BUILT_IN} alone, because {loaded.name} is read from disk block by block and would be for every "
        "token that it wrote"
    )
    return BUILT_IN


def parts_of(source: str) -> list[str]:
    """The texts of a mixture, such as `pydoc+self`; a file whose path holds a + is one text."""
    return [source] if Path(source).expanduser().is_file() else source.split("+")


def mixed(parts: Sequence[WindowSampler], share: int) -> Corpus:
    """`share` windows of each of `parts`, of one length, which take turns, as a text to be dealt out in this order."""
    first = parts[0].corpus
    windows = torch.stack([part.take(share) for part in parts], dim=1).flatten(0, 1)
    text = windows[:, first.unscored :].reshape(-1)
    name = "+".join(part.corpus.name for part in parts)
    return replace(first, tokens=text, name=name, sha256=_sha256(text), in_order=True)


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def own_corpus(
    loaded: LoadedModel, length: int, seed: int, count: int, fingerprint: str, progress: Progress | None = None,
    kinds: Sequence[str] = KINDS, cache: Path | None = None,
) -> Corpus:  # fmt: skip
    """`count` windows of what the model writes; from the cache, and what is missing there is written first.

    Arguments as for `open_sampler`. kinds: of documents. cache: the folder for such texts.
    Raises AmqError where the model cannot write, memory does not suffice, or a file of the cache is damaged.
    """
    progress = progress or Progress()
    beginnings = Beginnings.of(loaded, kinds)
    corpus = Corpus(
        torch.empty(0, dtype=torch.int64), SELF, "", beginnings.prefix, beginnings.prefix_names, in_order=True
    )
    check_length(corpus, length, 2)
    identity = [VERSION, ROWS, fingerprint, length, seed, asdict(beginnings)]
    key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    folder = (cache or cache_dir() / "own_text") / key
    remove_stale_below(folder)
    files = [folder / f"round-{number:03d}.safetensors" for number in range(-(-max(count, 1) // ROWS))]
    missing = [number for number, path in enumerate(files) if not path.is_file()]
    if missing:
        _check_model(loaded, length)
        make_folder(folder, "point AMQ_CACHE at a folder that can be written")
        of = type(loaded.model).__name__
        OwnTextIndex(model=of, length=length, seed=seed, kinds=tuple(beginnings.openings)).write(folder / INDEX)
        _write(loaded.model, beginnings, length, seed, {n: files[n] for n in missing}, progress)
    windows = torch.cat([_read(path, length) for path in files])[: max(count, 1)]
    text = windows[:, corpus.unscored :].reshape(-1)
    return replace(corpus, tokens=text, sha256=_sha256(text))


def _check_model(loaded: LoadedModel, length: int) -> None:
    if not in_memory(loaded.model):
        raise AmqError(
            f"--calibration {SELF}: {loaded.name} is not in memory as a whole, and would read its weights from disk "
            "for every token it writes: give another text, or a file of texts that the model wrote elsewhere"
        )
    check_cache(loaded.model, length, ROWS, f"windows of --calibration {SELF}")


def in_memory(model: PreTrainedModel) -> bool:
    """Whether all of it is: one that is read from disk would be for every token that it writes."""
    return pager_of(model) is None and not any(parameter.is_meta for parameter in model.parameters())


def check_cache(model: PreTrainedModel, length: int, rows: int, what: str) -> None:
    """Raises AmqError where no memory is free for the cache of `rows` texts of `length` tokens; what: they are."""
    try:
        caches = ModelShape.of(model.config).caches
    except AmqError:  # a cache that cannot be sized is not compared with the memory that is free
        return
    embedding = embedding_weight(model)
    needed = rows * sum(cache.bytes(length) for cache in caches) * embedding.dtype.itemsize // CACHE_BYTES
    check_memory(needed, f"the keys and values of {rows} {what}", str(embedding.device))


def _write(
    model: PreTrainedModel, beginnings: Beginnings, length: int, seed: int, files: dict[int, Path], progress: Progress
) -> None:
    start = time.monotonic()
    with progress.stage("own text", len(files) * length) as step:
        for number, path in files.items():
            tokens = write_round(model, beginnings, length, seed, number, step)
            if not path.is_file():  # another process may have been faster: its windows may be in use already
                content = {TENSOR: tokens.to(torch.int32)}
                save_tensors(path, content, hashes_metadata(content))
    seconds, windows = time.monotonic() - start, len(files) * ROWS
    progress.say(f"own text: the model wrote {windows} windows of {length} tokens in {seconds:.0f} s; they are kept")


def _read(path: Path, length: int) -> Tensor:
    """int64 [ROWS, length]"""
    remedy = "delete it and run the same command again"
    try:
        file = verify_file(path, whole=True)
    except AmqError as error:
        raise AmqError(f"{path} is damaged ({error}): {remedy}") from error
    tokens = file.get_tensor(TENSOR) if TENSOR in file.keys() else torch.empty(0)
    if tokens.shape != (ROWS, length) or tokens.dtype != torch.int32:
        raise AmqError(f"{path} holds no int32 {TENSOR} [{ROWS}, {length}]: {remedy}")
    return tokens.long()


class _Row:
    """One window as it is written: what comes next is drawn, but for the beginnings of documents.

    Behind the end of a conversation another one begins; plain text goes on as the model does, which has seen texts one
    behind the other (forced to go on with a word of ours, small models end the document again after two).
    """

    def __init__(self, beginnings: Beginnings, kind: str, generator: np.random.Generator) -> None:
        self._openings, self._generator = beginnings.openings[kind], generator
        self._ends = () if kind == "plain" else beginnings.ends
        self._given = deque(beginnings.prefix)
        if kind != "plain" or not beginnings.prefix:
            self._open()

    def _open(self) -> None:
        self._given.extend(self._openings[self._generator.integers(len(self._openings))])

    def next(self, drawn: int) -> int:
        """The next token; drawn: what the model says it is."""
        if self._given:
            return self._given.popleft()
        if drawn in self._ends:
            self._open()
        return drawn


@torch.no_grad()
def write_round(
    model: PreTrainedModel, beginnings: Beginnings, length: int, seed: int, number: int, step: Step
) -> Tensor:
    """Windows `number` · ROWS and on: int64 [ROWS, length] on the CPU; `step` is called once per position."""
    device = embedding_weight(model).device
    kinds = tuple(beginnings.openings)
    rows = [_Row(beginnings, kinds[i % len(kinds)], np.random.default_rng([seed, number, i])) for i in range(ROWS)]
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
    never = torch.tensor(beginnings.never, dtype=torch.int64, device=device)
    tokens = torch.empty(ROWS, length, dtype=torch.int64)
    drawn, cache = [-1] * ROWS, dict[str, Any]()
    for position in range(length):
        tokens[:, position] = torch.tensor([row.next(d) for row, d in zip(rows, drawn, strict=True)])
        if position + 1 < length:
            output = model(input_ids=tokens[:, position : position + 1].to(device), use_cache=True, **cache)
            cache = next_cache(output, model, f"--calibration {SELF}")
            drawn = draw(output["logits"][:, -1].float(), never, generator, f"--calibration {SELF}")
        step()
    return tokens


def next_cache(output: Any, model: PreTrainedModel, what: str) -> dict[str, Any]:
    """What a model's next call gets of this one's output; raises AmqError, which `what` begins, for one without any."""
    name = next((name for name in CACHE_NAMES if output.get(name) is not None), None)
    if name is None:
        raise AmqError(f"{what}: {type(model).__name__} writes without a cache: do without, or use another model")
    return {name: output[name]}


def draw(logits: Tensor, never: Tensor, generator: torch.Generator, what: str) -> list[int]:
    """One token of each row at temperature 1. logits: float32 [rows, vocabulary], changed. what: begins errors."""
    logits[:, never[never < logits.shape[1]]] = -torch.inf
    probabilities = logits.softmax(-1)
    if not bool(probabilities.isfinite().all()):
        raise AmqError(f"{what}: the model's logits are not finite: load it in a wider --dtype")
    drawn: list[int] = torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()
    return drawn
