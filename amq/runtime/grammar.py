"""Grammars that a text has to keep to: JSON schemas, regular expressions and Lark's notation, by llguidance.

A grammar says at every token which may come next (a mask of the vocabulary), and which bytes they stand for is all that
it knows of a model. Masks are computed in a thread of their own while the engine computes the next logits.

Whitespace in JSON is bounded: a small model that may write any amount of it between two values does so for ever.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amq.errors import AmqError
from amq.runtime.grammar_check import END, GrammarCheck, limits
from amq.util.extras import needs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from amq.runtime.tokenizer import Tokenizer

WHITESPACE = "[ ]?"
"""What may stand wherever JSON allows whitespace; a schema's own `x-guidance` goes before it."""
TOKEN = re.compile(r"<\[[0-9]+\]>")
"""A special token, by its number, in Lark's notation."""
KEPT = 8
"""Grammars that stay built: an agent sends the same tools with every turn. A copy for a text costs nearly nothing."""
KINDS = {"json_schema": "JSON schema", "lark": "grammar", "gbnf": "grammar", "regex": "regular expression"}
LONGEST_GBNF = 2**16
"""Characters: it is translated in a time that grows with their square, 0.3 s for so many."""


@dataclass(frozen=True)
class Grammar:
    """kind: `json_schema` (text: JSON), `lark` (llguidance's dialect), `gbnf` (llama.cpp's notation), or `regex` (the
    whole text matches it)."""

    kind: str
    text: str


class GrammarConstraint:
    """An `amq.runtime.sampling.Constraint`; for one text."""

    def __init__(self, matcher: LLMatcher, executor: Executor) -> None:
        self._matcher, self._executor = matcher, executor
        self._mask: Future[np.ndarray] = executor.submit(self._compute)

    def allowed(self) -> np.ndarray:
        return self._mask.result()

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise AmqError(f"the text left its grammar: {_words(self._matcher.get_error())}")
        self._mask = self._executor.submit(self._compute)

    def _compute(self) -> np.ndarray:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error():
            raise AmqError(f"the text cannot go on by its grammar: {_words(self._matcher.get_error())}")
        return mask


class GrammarCompiler:
    """Makes constraints for texts of one model. For any thread.

    vocab_size: rows of the model's logits. end_ids: tokens that may come where a grammar is complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> None:
        self._tokenizer, self._end_ids = tokenizer, sorted(end_ids)
        self._rows = max(vocab_size, tokenizer.vocab_size)
        self._lock = threading.RLock()
        self._built: dict[Grammar, LLMatcher] = {}
        self._tokens: LLTokenizer | None = None
        self._check = GrammarCheck()
        self._executor = ThreadPoolExecutor(1, "amq-grammar")

    def prepare(self) -> None:
        """What the first constraint would wait for.

        Takes 0.4 s for a vocabulary of 49,152 tokens and 1.6 s for 151,936, and lets no other thread run meanwhile: for
        a server, before it listens.
        """
        self._vocabulary()
        self._check.start()

    def constraint(self, grammar: Grammar) -> GrammarConstraint:
        """Raises AmqError that names what of the grammar is wrong, not supported, or takes too long."""
        with self._lock:
            matcher = self._built.pop(grammar, None)
            if matcher is None:
                matcher = self._build(grammar)
            self._built[grammar] = matcher  # the latest stands last
            if len(self._built) > KEPT:
                del self._built[next(iter(self._built))]
            return GrammarConstraint(matcher.deep_copy(), self._executor)

    def _build(self, grammar: Grammar) -> LLMatcher:
        vocabulary = self._vocabulary()
        from llguidance import LLMatcher

        try:
            text = _translated(grammar)
        except ValueError as error:  # not JSON, no object, or no GBNF
            raise _refused(grammar, str(error)) from None
        if fault := self._check.fault(TOKEN.sub(f"<[{END}]>", text)):  # it knows no token of the model by number
            raise _refused(grammar, fault)
        matcher = LLMatcher(vocabulary, text, log_level=0, limits=limits())
        first = matcher.deep_copy()
        if not first.is_error():
            first.compute_bitmask()  # here: its error is the grammar's, and not yet that of a text
        if first.is_error():
            raise _refused(grammar, first.get_error())
        return matcher

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)
        self._check.close()

    def _vocabulary(self) -> LLTokenizer:
        with needs("serve", "a text that keeps to a grammar"):
            from llguidance import LLTokenizer
        if not self._end_ids:
            raise AmqError("the model has no end token, so a text that keeps to a grammar would never end")
        with self._lock:
            if self._tokens is None:
                try:
                    self._tokens = LLTokenizer(self._tokenizer.json(), n_vocab=self._rows, eos_token=self._end_ids)
                except ValueError as error:
                    raise AmqError(f"llguidance cannot read the model's tokenizer: {error}") from error
            return self._tokens


def _translated(grammar: Grammar) -> str:
    """In llguidance's own form."""
    from llguidance import LLMatcher

    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": WHITESPACE})
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(_as_lark(grammar.text) if grammar.kind == "gbnf" else grammar.text)


def _as_lark(gbnf: str) -> str:
    """Raises ValueError for what is not GBNF."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if len(gbnf) > LONGEST_GBNF:
        raise ValueError(f"it has {len(gbnf)} characters, of which {LONGEST_GBNF} are allowed")
    try:
        return gbnf_to_lark(gbnf)
    except Exception as error:  # noqa: BLE001 (it raises plain ones, and RecursionError)
        raise ValueError(str(error).partition(" ^ ")[0]) from None


def _refused(grammar: Grammar, why: str) -> AmqError:
    return AmqError(f"the {KINDS[grammar.kind]} cannot be used: {_words(why)}")


def _words(error: str) -> str:
    """An error of llguidance in one line, without the parser's state."""
    return " ".join(error.partition("<non-verbose")[0].split())
