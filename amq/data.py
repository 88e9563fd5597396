"""Token windows for calibration and evaluation.

Text comes from a file, from a `datasets` name, or from CPython itself, which is on every machine and needs no network:
`pydoc` is the language reference (`pydoc_data.topics`), `docstrings` is what the standard library's modules say about
themselves, a second text for evaluation that shares nothing with the first. A text is tokenized once and cut into
slots of one window; a seeded permutation of the slots is dealt out in order, so that the sets a run asks for (bank,
search, confirmation, cost) do not overlap.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amq.errors import AmqError

log = logging.getLogger(__name__)

DOCSTRING_CHARACTERS = 400_000
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": ("allenai/c4", "en", "text"),
}
"""--calibration name → (hub dataset, subset, text column)."""
DATASET_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: `tokens` int64 [n], the name it was asked by, and the SHA-256 of the text."""

    tokens: Tensor
    name: str
    sha256: str


def load_corpus(source: str, tokenizer: Any) -> Corpus:
    """Tokenizes a text.

    source: `pydoc` or `docstrings` (built in), `wikitext2` or `c4` (training splits, through `datasets`), or the path
    of a UTF-8 file.
    """
    text = load_text(source)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Corpus(torch.tensor(tokens, dtype=torch.int64), source, hashlib.sha256(text.encode()).hexdigest())


def load_text(source: str) -> str:
    """The text behind a source name or path."""
    if source in BUILTIN:
        return BUILTIN[source]()
    if source in DATASETS:
        return _dataset_text(source)
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
    try:
        from datasets import load_dataset
    except ImportError:
        raise AmqError(f"text {source!r} needs the datasets package: run `pip install datasets`") from None
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
    """Deals out disjoint token windows of one corpus, in an order fixed by a seed.

    All windows have `length` tokens; `take(n)` returns int64 [n, length]. When the corpus is used up, the deal starts
    again with a warning, so that sets may overlap but nothing fails.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int) -> None:
        _check_length(length, 1)
        slots = len(corpus.tokens) // length
        if slots < 1:
            raise AmqError(
                f"the text {corpus.name!r} has {len(corpus.tokens)} tokens, less than one window of {length}: "
                "give a longer text or a smaller --window-length"
            )
        self._windows = corpus.tokens[: slots * length].view(slots, length)
        self._name = corpus.name
        self._order = self._deal(np.random.default_rng(seed).permutation(slots))

    def _deal(self, permutation: np.ndarray) -> Iterator[int]:
        while True:
            yield from permutation
            log.warning(
                "the text %r has only %d windows of %d tokens: some windows are used for more than one purpose",
                self._name, *self._windows.shape,
            )  # fmt: skip

    def take(self, count: int) -> Tensor:
        return self._windows[torch.tensor([next(self._order) for _ in range(count)], dtype=torch.int64)]


def fixed_windows(corpus: Corpus, length: int, max_tokens: int) -> Tensor:
    """The first `max_tokens` tokens as consecutive windows, int64 [n, length]; for perplexity."""
    _check_length(length, 2)
    count = min(len(corpus.tokens), max_tokens) // length
    if count < 1:
        raise AmqError(
            f"the text {corpus.name!r} has {len(corpus.tokens)} tokens (at most {max_tokens} used), "
            f"less than one window of {length}: give a longer text or a smaller --window-length"
        )
    return corpus.tokens[: count * length].view(count, length)


def _check_length(length: int, least: int) -> None:
    if length < least:
        raise AmqError(f"a window length of {length} is too small: expected at least {least} (--window-length)")
