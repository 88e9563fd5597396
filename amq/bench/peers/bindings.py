"""llama.cpp and its fork through plain bindings of their C API, measured as llama-bench measures.

A decoded token is `llama_decode` and waiting for it; as in llama-bench the next token is a random one, so that
choosing a token is not counted. Batches are filled before the clock starts.
"""

from __future__ import annotations

import ctypes
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from amq.bench.cases import Case
from amq.bench.machine import OtherWork, memory
from amq.bench.peers.base import Package
from amq.errors import AmqError

BATCH, MICRO_BATCH = 2048, 512
"""llama-bench's: tokens that one call takes, and that its graph computes at once."""
PAD = 256
"""llama.cpp rounds the context up to this."""
LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@LOG_CALLBACK
def _silence(level: int, text: bytes, data: int) -> None:
    """Instead of lines on stderr. The library calls it as long as the process lives."""


def set_up(api: Any) -> Any:
    """`api`, the module of the bindings, ready and silent."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a crash here is news for the caller, not a debugger session on the terminal
    api._lib.llama_log_set(_silence, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


@contextmanager
def logged(api: Any) -> Iterator[list[str]]:
    """What the library says meanwhile, in pieces."""
    said: list[str] = []
    listen = LOG_CALLBACK(lambda level, text, data: said.append(text.decode(errors="replace")))
    api._lib.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        yield said
    finally:
        api._lib.llama_log_set(_silence, ctypes.c_void_p(0))


class Bindings(ABC):
    """A GGUF file on the CPU; made inside a worker. A subclass says what differs between the two libraries."""

    name: ClassVar[str]
    package: ClassVar[Package]

    def __init__(self, path: str, threads: int, configuration: Any, seed: int) -> None:
        self._api = api = self.library()
        self._threads, self._configuration, self._seed = threads, configuration, seed
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.choose_model(parameters, configuration)
        self._model = api.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            why = "it is damaged, or of a model that this build does not know"
            raise AmqError(f"{self.name} cannot load {path}: {why}")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._key: Any = None
        self._context: Any = None

    @staticmethod
    @abstractmethod
    def library() -> Any:
        """The module of the bindings, set up."""

    @abstractmethod
    def choose_model(self, parameters: Any, configuration: Any) -> None:
        """Sets what the configuration says of llama_model_params."""

    @abstractmethod
    def choose_context(self, parameters: Any, configuration: Any, all_logits: bool) -> None:
        """Sets what the configuration says of llama_context_params; all_logits: after every token, not the last."""

    @abstractmethod
    def clear(self, context: Any) -> None:
        """Empties the cache."""

    def facts(self) -> dict[str, Any]:
        describe = self._api._lib.llama_print_system_info
        describe.restype = ctypes.c_char_p
        found = [part.split("=") for part in describe().decode().replace(":", "|").split("|") if "=" in part]
        switched_on = " ".join(name.strip() for name, value in found if value.strip() == "1")
        return {"version": self.package.version(), "description": switched_on, "vocab_size": self._vocabulary}

    def memory(self) -> dict[str, int]:
        return memory()

    def measure(self, case: Case, repetition: int) -> dict[str, Any]:
        """Seconds of one case, as `OwnEngine.measure`; `first_token_seconds` are missing, nothing is chosen here."""
        import numpy as np

        self._prepare(case.sequences, case.positions)
        random = np.random.default_rng((self._seed, repetition))

        def tokens(*shape: int) -> Any:
            return random.integers(self._vocabulary, size=shape).tolist()

        for sequence in range(case.sequences):
            for batch in self._prompt(sequence, 0, tokens(case.depth)):
                self._run(batch)
        if case.decode:
            batches = self._steps(case, tokens(case.tokens, case.sequences))
        else:
            batches = self._prompt(0, case.depth, tokens(case.tokens))
        others, start = OtherWork(), time.perf_counter()
        for batch in batches:
            self._run(batch)
        return {"seconds": time.perf_counter() - start, "others": others.share()}

    def log_likelihood(self, windows: list[list[int]], unscored: int) -> float:
        """As `OwnEngine.log_likelihood`, of the same token ids; a window is one call."""
        import numpy as np

        logits = self._api._lib.llama_get_logits
        logits.restype, logits.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]
        total = 0.0
        for window in windows:
            self._prepare(1, len(window), all_logits=True)
            batch = Batch(self._api, len(window))
            batch.fill([0] * len(window), 0, window, logits=len(window))
            self._run(batch)
            rows = np.ctypeslib.as_array(logits(self._context), (len(window), self._vocabulary))
            total += score(rows, window, unscored)
        return total

    def _prepare(self, sequences: int, positions: int, all_logits: bool = False) -> None:
        """An empty cache for so many sequences, in a context just large enough, as llama-bench makes it."""
        api, key = self._api, (sequences, positions, all_logits)
        if key != self._key:
            if self._context:
                api.llama_free(self._context)
            parameters = api.llama_context_default_params()
            parameters.n_ctx = sequences * -(-positions // PAD) * PAD
            parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = BATCH, MICRO_BATCH, sequences
            parameters.n_threads = parameters.n_threads_batch = self._threads
            self.choose_context(parameters, self._configuration, all_logits)
            self._context, self._key = api.llama_init_from_model(self._model, parameters), key
            if not self._context:
                raise AmqError(f"{self.name} made no context of {parameters.n_ctx} positions ({self._configuration})")
        self.clear(self._context)

    def _prompt(self, sequence: int, position: int, tokens: list[int]) -> list[Batch]:
        """Consecutive tokens of one sequence; logits are wanted after the last."""
        parts = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
        batches = [Batch(self._api, len(part)) for part in parts]
        for i, (batch, part) in enumerate(zip(batches, parts, strict=True)):
            batch.fill([sequence] * len(part), position + i * BATCH, part, logits=int(i == len(parts) - 1))
        return batches

    def _steps(self, case: Case, steps: list[list[int]]) -> list[Batch]:
        """A token of every sequence at a time."""
        batches = [Batch(self._api, case.sequences) for _ in steps]
        for position, (batch, tokens) in enumerate(zip(batches, steps, strict=True), case.depth):
            batch.fill(list(range(case.sequences)), position, tokens, step=0, logits=case.sequences)
        return batches

    def _run(self, batch: Batch) -> None:
        status = self._api.llama_decode(self._context, batch.raw)
        if status:
            raise AmqError(f"llama_decode returned {status} for {batch.raw.n_tokens} tokens ({self._configuration})")
        self._api._lib.llama_synchronize(ctypes.c_void_p(self._context))


def score(rows: Any, window: Sequence[int], unscored: int) -> float:
    """Sum of the log-probabilities of window[unscored + 1 :].

    rows: float32 [len(window), vocabulary], the logits after each of its tokens.
    """
    import numpy as np

    total = 0.0
    for logits, target in zip(rows[unscored:], window[unscored + 1 :], strict=False):
        largest = logits.max()
        total += float(logits[target] - largest - np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    return total


class Batch:
    """A llama_batch with room for `size` tokens."""

    def __init__(self, api: Any, size: int) -> None:
        self.raw = api.llama_batch_init(size, 0, 1)
        self._free = api.llama_batch_free

    def __del__(self) -> None:
        self._free(self.raw)

    def fill(self, sequences: list[int], position: int, tokens: list[int], step: int = 1, logits: int = 0) -> None:
        """Token i goes to sequences[i] at position + i·step; logits are wanted after the last `logits` of them."""
        batch, count = self.raw, len(sequences)
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i] = tokens[i], position + i * step
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequences[i]
            batch.logits[i] = i >= count - logits
