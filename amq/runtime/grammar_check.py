"""A grammar is built in a process of its own first, which dies of what would harm the one that asks.

llguidance bounds what most grammars cost, not all. Strings that have to match 24 patterns at once take it minutes, and
`multipleOf` with a large number as long: a thread cannot be stopped, and would keep a processor busy for ever. A chain
of 1,000 references overflows the stack, which ends the process. The process here has less time and a smaller stack than
the one that asks. It knows bytes instead of a model's tokens: that is built at once, and the cost of a grammar is
nearly the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amq.errors import AmqError
from amq.util.limited_process import LimitedProcess

if TYPE_CHECKING:
    from llguidance import LLParserLimits

SECONDS = 0.4
"""Of a processor, so that it is the same on a busy machine. What agents send takes 0.01."""
MEMORY = 2**30
"""Bytes of addresses that the process may have."""
STACK = 2**20
"""Bytes of stack; threads have 8 MiB on Linux, or 2 where there is no limit."""
END = 256
"""The process's only special token."""


def limits() -> LLParserLimits:
    """What a grammar may cost, and each of its masks. The worst mask found (2,000 optional properties) took 60 ms of a
    processor of 2.4 GHz (AMD EPYC), and 200 ms (5,000 of them) with the library's own limits."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=300_000,
        max_grammar_size=100_000,
        max_lexer_states=30_000,
        step_lexer_fuel=100_000,
        step_max_items=10_000,
        verbose_errors=False,  # they would show the parser's state
    )


class GrammarCheck(LimitedProcess):
    def __init__(self) -> None:
        super().__init__(builder, "building it", SECONDS, MEMORY, STACK)

    def fault(self, grammar: str) -> str:
        """What is wrong with a grammar in llguidance's form; "" where nothing is."""
        try:
            return str(self.ask(grammar))
        except AmqError as error:
            return str(error)


class _Bytes:
    """A tokenizer for llguidance: a token for each byte, and one for the end."""

    eos_token_id, bos_token_id, special_token_ids = END, None, (END,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def builder() -> Callable[[str], str]:
    """What the process does: a grammar → what is wrong with it."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])

    def fault(grammar: str) -> str:
        matcher: Any = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.compute_bitmask()
        return str(matcher.get_error())

    return fault
