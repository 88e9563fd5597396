"""A grammar is built in a process of its own first, which dies of what would harm the one that asks.

llguidance bounds what most grammars cost, not all. Strings that have to match 24 patterns at once take it minutes, and
`multipleOf` with a large number as long: a thread cannot be stopped, and would keep a processor busy for ever. A chain
of 1,000 references overflows the stack, which ends the process. The process here has less time and a smaller stack than
the one that asks. It knows bytes instead of a model's tokens: that is built at once, and the cost of a grammar is
nearly the same.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

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
READY = "ready"


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


class GrammarCheck:
    """Starts the process when it is first needed, and again after a grammar ended it. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def fault(self, grammar: str) -> str:
        """What is wrong with a grammar in llguidance's form; "" where nothing is."""
        with self._lock:
            self._start()
            answer = self._ask(json.dumps(grammar))
            if answer is not None:
                return answer
            self._stop()
        return (
            f"it takes more than {SECONDS:g} s or {MEMORY >> 20} MiB to build, or refers to too many parts in a chain"
        )

    def start(self) -> None:
        """So that the first grammar does not wait for it."""
        with self._lock:
            self._start()

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        path = os.pathsep.join(place for place in sys.path if place)  # what this process finds, it finds too
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        if self._answer() != READY:
            self._stop()
            raise RuntimeError("the process that checks grammars did not start; what it wrote is above")

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        with suppress(BrokenPipeError), process:  # closes the pipes, and waits
            pass

    def _ask(self, line: str) -> str | None:
        """The answer; None where the process ended instead."""
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._answer()

    def _answer(self) -> str | None:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        return str(json.loads(line)) if line.endswith(b"\n") else None


class _Bytes:
    """A tokenizer for llguidance: a token for each byte, and one for the end."""

    eos_token_id, bos_token_id, special_token_ids = END, None, (END,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _serve() -> None:
    """Lines of JSON: a grammar each in, what is wrong with it out."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])
    _say(READY)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, in the middle of what it does
        matcher: Any = LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.compute_bitmask()
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(matcher.get_error())


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the process that asks, whose end is ours
    threading.stack_size(STACK)
    serving = threading.Thread(target=_serve)
    serving.start()
    serving.join()


def _say(answer: str) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main()
