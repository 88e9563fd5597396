"""amq's own engine, measured through the Engine protocol alone: no scheduler, no sampling, no text.

A decoded token is one pass and the choice of the likeliest token; a prompt is the passes over its tokens with the
logits after the last one. Tokens are random, drawn from a seed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amq.bench.cases import Case
from amq.bench.machine import OtherWork, memory
from amq.errors import AmqError
from amq.model.weight_files import weight_files

if TYPE_CHECKING:
    from amq.runtime.engine import Engine, Slot

ATTEMPTS = 20


class OwnEngine:
    """A loaded model; made inside a worker.

    options: keyword arguments of `amq.runtime.load`.
    """

    def __init__(self, model: str, seed: int, options: dict[str, Any]) -> None:
        from amq.runtime import load

        start = time.perf_counter()
        self._runtime = load(model, **options)
        self._load_seconds = time.perf_counter() - start
        self._engine: Engine = self._runtime.engine
        self._model, self._seed = model, seed

    def facts(self) -> dict[str, Any]:
        import torch

        from amq import __version__

        files = weight_files(Path(self._model)) if Path(self._model).is_dir() else []
        return {
            "version": f"{__version__}, torch {torch.__version__}",
            "description": self._engine.banner,
            "file_bytes": sum(path.stat().st_size for path in files) or None,
            "weight_bytes": self._runtime.weight_bytes,
            "vocab_size": self._engine.vocab_size,
            "load_seconds": self._load_seconds,
        }

    def memory(self) -> dict[str, int]:
        """The process's memory; that of a GPU where the model is on one."""
        import torch

        figures = memory()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            figures |= {"gpu_memory_bytes": torch.cuda.max_memory_allocated()}
        return figures

    def measure(self, case: Case, repetition: int) -> dict[str, Any]:
        """Seconds of one case; `first_token_seconds`, of a prompt, until the token after it was chosen.

        The tokens in the cache before are the same in every repetition, those measured are not: an engine that
        remembers the beginnings of earlier sequences fills the cache faster, and computes what is measured.
        """
        started: list[tuple[Slot, list[int]]] = []
        try:
            for sequence in range(case.sequences):
                started.append(self._start(case, repetition, sequence))
            return self._decode(case, started) if case.decode else self._prompt(*started[0])
        finally:
            for slot, _ in started:
                self._engine.close(slot)

    def _tokens(self, count: int, *key: int) -> list[int]:
        import numpy as np

        return np.random.default_rng((self._seed, *key)).integers(self._engine.vocab_size, size=count).tolist()

    def _start(self, case: Case, repetition: int, sequence: int) -> tuple[Slot, list[int]]:
        """An open slot with `depth` tokens computed, and the tokens that follow."""
        before = self._tokens(case.depth, 0, sequence)
        for attempt in range(ATTEMPTS):
            after = self._tokens(1 if case.decode else case.tokens, 1, sequence, repetition, attempt)
            slot = self._engine.open([*before, *after], case.tokens if case.decode else 1)
            if slot is None:
                raise AmqError(
                    f"{case.name}: the engine has no room for sequence {sequence + 1} of {case.sequences}: "
                    "give a smaller --batch, or less to generate"
                )
            if slot.length <= case.depth:
                self._pass_over(slot, before[slot.length :], logits=False)
                return slot, after
            self._engine.close(slot)
        raise AmqError(f"{case.name}: the engine had seen {ATTEMPTS} random prompts before; give another --seed")

    def _room(self, window: Sequence[int]) -> Slot:
        slot = self._engine.open(window[:1], len(window))
        if slot is None:
            raise AmqError(f"the engine has no room for a window of {len(window)} tokens: give a smaller --batch")
        return slot

    def _pass_over(self, slot: Slot, tokens: Sequence[int], logits: bool) -> Any:
        from amq.runtime.engine import Segment

        rows, result = self._engine.max_rows, None
        for start in range(0, len(tokens), rows):
            last = start + rows >= len(tokens)
            result = self._engine.forward([Segment(slot, tokens[start : start + rows], logits and last)])
        return result

    def _prompt(self, slot: Slot, tokens: Sequence[int]) -> dict[str, Any]:
        others, start = OtherWork(), time.perf_counter()
        logits = self._pass_over(slot, tokens, logits=True)
        seconds = time.perf_counter() - start
        int(logits.argmax())
        first = time.perf_counter() - start
        return {"seconds": seconds, "first_token_seconds": first, "others": others.share()}

    def _decode(self, case: Case, started: list[tuple[Slot, list[int]]]) -> dict[str, Any]:
        from amq.runtime.engine import Segment

        forward, slots, tokens = self._engine.forward, [slot for slot, _ in started], [after[0] for _, after in started]
        others, start = OtherWork(), time.perf_counter()
        for _ in range(case.tokens):
            logits = forward([Segment(slot, [token]) for slot, token in zip(slots, tokens, strict=True)])
            tokens = logits.argmax(-1).tolist()
        return {"seconds": time.perf_counter() - start, "others": others.share()}

    def windows(self, text: str, length: int, max_tokens: int) -> tuple[list[list[int]], tuple[str, ...]]:
        """The first tokens of a text file, or of a text that amq.model.text knows, in consecutive windows.

        Also the tokens that every window begins with, because the tokenizer puts them before a text.
        """
        from amq.model.text import fixed_windows, load_text, tokenize

        tokenizer = self._runtime.tokenizer
        corpus = tokenize(load_text(text), text, tokenizer.encode, tokenizer.token_text, self._engine.vocab_size)
        return fixed_windows(corpus, length, max_tokens).tolist(), corpus.prefix_names

    def log_likelihood(self, windows: list[list[int]], unscored: int) -> float:
        """Sum of the log-probabilities of each window's tokens from `unscored` + 1 on, as `amq.model.perplexity`
        counts them.

        Through the passes that decoding makes, unscored: leading positions whose predictions do not count.
        Windows of one length run beside each other, as many as the engine has slots.
        """
        import torch

        from amq.runtime.engine import Segment

        total = 0.0
        for first in range(0, len(windows), self._engine.max_sequences):
            group = windows[first : first + self._engine.max_sequences]
            slots = [self._room(window) for window in group]
            for i in range(len(group[0]) - 1):
                logits = self._engine.forward(
                    [Segment(slot, [window[i]]) for slot, window in zip(slots, group, strict=True)]
                )
                if i < unscored:
                    continue
                targets = torch.tensor([window[i + 1] for window in group])
                total -= float(torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))
            for slot in slots:
                self._engine.close(slot)
        return total
