"""Token windows for calibration and evaluation.

Text comes from a file, from a `datasets` name, or from CPython itself, which is on every machine and needs no network:
`pydoc` is the language reference (`pydoc_data.topics`), `docstrings` is what the standard library's modules say about
themselves, a second text for evaluation that shares nothing with the first. Conversations come from a .jsonl file
(`amq.model.conversations`). A text is tokenized once and cut into slots of one window; a seeded permutation of the
slots is dealt out in order, so that the sets a run asks for (bank, search, confirmation, cost) do not overlap. What a
model writes itself (`amq.model.own_text`) is made window by window, and dealt out in the order in which it was written.

Every window begins with what the tokenizer itself puts before a text, which is BOS for Llama, Mistral and Gemma and
nothing for Qwen and SmolLM2: a model that was trained behind BOS is another, broken one without it. These tokens are
part of the window's length; the rest of it is text. What a model predicts at a position that holds one of them is not
counted anywhere (`Corpus.unscored`): every prediction that counts has a text token as its input, another one as its
target, and the prefix before them.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model.conversations import conversations_text, is_conversations
from amq.util.extras import needs

log = logging.getLogger(__name__)

SELF = "self"
"""--calibration name of the text that a model writes itself, which takes a model: `amq.model.own_text`."""
DOCSTRING_CHARACTERS = 400_000
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": ("allenai/c4", "en", "text"),
}
"""--calibration name → (hub dataset, subset, text column)."""
DATASET_CHARACTERS = 4_000_000
PROBE = "The quick brown fox"
"""What is encoded with and without special tokens, to see what a tokenizer adds."""
PROBE_CHARACTERS = 256
"""As many of the text's own are encoded where a tokenizer has no token for PROBE."""

Encode = Callable[[str, bool], Sequence[int]]
"""(text, whether the tokenizer adds its special tokens) → ids"""


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: `tokens` int64 [n], the name it was asked by, and the SHA-256 of the text.

    prefix: ids that the tokenizer puts before a text, and with which every window begins; often none, mostly BOS.
    prefix_names: the same tokens as the vocabulary spells them, for people and JSON.
    in_order: its windows are dealt out as they stand, whatever the seed; the text is random itself.
    """

    tokens: Tensor
    name: str
    sha256: str
    prefix: tuple[int, ...] = ()
    prefix_names: tuple[str, ...] = ()
    in_order: bool = False

    @property
    def unscored(self) -> int:
        """Leading positions of every window at which predictions do not count: those of the prefix."""
        return len(self.prefix)


def load_corpus(source: str, tokenizer: Any, rows: int) -> Corpus:
    """Tokenizes a text with a tokenizer of transformers; see `tokenize`.

    source: `pydoc` or `docstrings` (built in), `wikitext2` or `c4` (training splits, through `datasets`), or the path
    of a UTF-8 file; one of conversations where it ends in .jsonl.
    """
    encode, spell = encoder(tokenizer), tokenizer.convert_ids_to_tokens
    if is_conversations(source):
        begin = "".join(str(spell(i)) for i in find_prefix(encode, PROBE))
        return tokenize(conversations_text(Path(source).expanduser(), tokenizer, begin), source, encode, spell, rows)
    return tokenize(load_text(source), source, encode, spell, rows)


def encoder(tokenizer: Any) -> Encode:
    """A tokenizer of transformers as a function."""

    def encode(text: str, special: bool) -> Sequence[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    return encode


def tokenize(text: str, name: str, encode: Encode, spell: Callable[[int], str | None], rows: int) -> Corpus:
    """The text as tokens, and what the tokenizer puts before one.

    name: what to call the text. spell: id → its token. rows: of the model's embedding.
    Raises AmqError for a token that has no row there, and for a tokenizer that rewrites a text when it adds tokens.
    """
    tokens, prefix = encode(text, False), find_prefix(encode, text)
    check_rows(tokens, spell, rows, f"the text {name!r} holds", "take it out of the text")
    check_rows(prefix, spell, rows, "the tokenizer begins every text with", "use the tokenizer of this very model")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(
        torch.tensor(tokens, dtype=torch.int64), name, digest, tuple(prefix), tuple(str(spell(i)) for i in prefix)
    )


def find_prefix(encode: Encode, text: str) -> list[int]:
    """What a tokenizer puts before a text, found by encoding one: its configuration does not tell.

    (Tokenizers that were converted from GGUF say `add_bos_token: false` and add it all the same; others add it by a
    post-processor, whatever the flags say.) What it puts behind a text, such as EOS, has no place in a window.
    """
    for probe in (PROBE, text[:PROBE_CHARACTERS], text):
        bare, full = list(encode(probe, False)), list(encode(probe, True))
        for start in range(len(full) - len(bare) + 1 if bare else 0):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        if bare:
            raise AmqError(
                f"the tokenizer splits {probe!r} into {bare} alone and into {full} with its special tokens: expected "
                "the same tokens with others around them, so it is not clear what a window should begin with"
            )
    return []  # no token in the whole text: there will be no window either


def check_rows(ids: Sequence[int], spell: Callable[[int], str | None], rows: int, where: str, instead: str) -> None:
    """Raises AmqError for an id without a row in the model's embedding; where, instead: parts of what it says."""
    if None in ids:
        raise AmqError(f"{where} something that the tokenizer has neither a token nor an unknown token for: {instead}")
    wrong = next((i for i in ids if not 0 <= i < rows), None)
    if wrong is not None:
        raise AmqError(
            f"{where} the token {spell(wrong)!r} with id {wrong}, but the model's embedding has {rows} rows: "
            f"{instead}, or resize the model's embeddings to its tokenizer (resize_token_embeddings) and save it again"
        )


def load_text(source: str) -> str:
    """The text behind a source name or path."""
    if source in BUILTIN:
        return BUILTIN[source]()
    if source in DATASETS:
        return _dataset_text(source)
    if source == SELF:
        raise AmqError(
            f"the text {SELF!r} is what a model writes itself, for --calibration alone: give the path of a text file, "
            f"or one of {', '.join((*BUILTIN, *DATASETS))}"
        )
    path = Path(source).expanduser()
    if not path.is_file():
        names = ", ".join((*BUILTIN, *DATASETS))
        raise AmqError(f"no text {source!r}: expected the path of a text file, or one of {names}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AmqError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise AmqError(f"{path} cannot be read: {error}") from None


def _pydoc_text() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def _docstring_text() -> str:
    """Docstrings of the standard library's modules, in order of file name, read without importing anything."""
    parts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                parts.append(text)
                size += len(text)
        if size >= DOCSTRING_CHARACTERS:
            break
    return "\n\n".join(parts)


BUILTIN = {"pydoc": _pydoc_text, "docstrings": _docstring_text}
"""Texts that need no network."""


def _dataset_text(source: str) -> str:
    repository, subset, column = DATASETS[source]
    with needs("datasets", f"text {source!r}"):
        from datasets import load_dataset
    try:
        rows = load_dataset(repository, subset, split="train", streaming=True)
        parts: list[str] = []
        size = 0
        for row in rows:
            parts.append(row[column])
            size += len(row[column])
            if size >= DATASET_CHARACTERS:
                break
    except Exception as error:  # datasets passes on the exceptions of its HTTP and storage libraries
        raise AmqError(
            f"dataset {source} ({repository}) could not be read: {type(error).__name__}: {error}; "
            "give the path of a text file instead"
        ) from error
    return "\n".join(parts)


class WindowSampler:
    """Deals out windows of one corpus whose text is disjoint, in an order fixed by a seed, or in the corpus's own.

    All windows have `length` tokens, the corpus's prefix included; `take(n)` returns int64 [n, length]. When the corpus
    is used up, the sampler starts again with a warning, so that sets may overlap but nothing fails.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int) -> None:
        check_length(corpus, length, 1)
        slots = len(corpus.tokens) // (length - corpus.unscored)
        if slots < 1:
            raise AmqError(
                f"the text {corpus.name!r} has {len(corpus.tokens)} tokens, {_less_than_one_window(corpus, length)}"
            )
        self.corpus = corpus
        self._windows = _windows(corpus, slots, length)
        self._order = self._deal(
            np.arange(slots) if corpus.in_order else np.random.default_rng(seed).permutation(slots)
        )

    def _deal(self, permutation: np.ndarray) -> Iterator[int]:
        while True:
            yield from permutation
            log.warning(
                "the text %r has only %d windows of %d tokens: some windows are used for more than one purpose",
                self.corpus.name, *self._windows.shape,
            )  # fmt: skip

    def take(self, count: int) -> Tensor:
        return self._windows[torch.tensor([next(self._order) for _ in range(count)], dtype=torch.int64)]


def fixed_windows(corpus: Corpus, length: int, max_tokens: int) -> Tensor:
    """The first `max_tokens` tokens of the text as consecutive windows, int64 [n, length]; for perplexity.

    length: of a window, the corpus's prefix included.
    """
    check_length(corpus, length, 2)
    count = min(len(corpus.tokens), max_tokens) // (length - corpus.unscored)
    if count < 1:
        raise AmqError(
            f"the text {corpus.name!r} has {len(corpus.tokens)} tokens (at most {max_tokens} used), "
            f"{_less_than_one_window(corpus, length)}"
        )
    return _windows(corpus, count, length)


def _windows(corpus: Corpus, count: int, length: int) -> Tensor:
    """The first `count` slots of the text, the prefix before each."""
    slot = length - corpus.unscored
    text = corpus.tokens[: count * slot].view(count, slot)
    if not corpus.prefix:
        return text
    return torch.cat([torch.tensor([corpus.prefix], dtype=torch.int64).expand(count, -1), text], dim=1)


def check_length(corpus: Corpus, length: int, least: int) -> None:
    """Raises AmqError where a window has no room for `least` tokens of text."""
    if length < least + corpus.unscored:
        raise AmqError(
            f"a window length of {length} is too small: expected at least {least + corpus.unscored} (--window-length)"
            + (f", since every window begins with {' '.join(corpus.prefix_names)}" if corpus.prefix else "")
        )


def _less_than_one_window(corpus: Corpus, length: int) -> str:
    begins = f" behind {' '.join(corpus.prefix_names)}" if corpus.prefix else ""
    return (
        f"less than one window of {length - corpus.unscored}{begins}: give a longer text or a smaller --window-length"
    )
