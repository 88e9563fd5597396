"""ik_llama.cpp, a fork of llama.cpp with kernels of its own, through the plain bindings of `ik-llama-cpp-python`.

Its wheel is compiled for AVX2. Its flash attention stops the process with GGML_ASSERT(S > 0) where several sequences
are decoded without AVX-VNNI (version 0.1.5 on a Zen 4, 2026-11); the package itself leaves it out there, and so do we
everywhere. A decoded token is `llama_decode` and waiting for it, as in `peers.llama_cpp`.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from amq.bench.cases import Case
from amq.bench.machine import OtherWork, memory
from amq.errors import AmqError

from .base import missing_module
from .llama_cpp import BATCH, MICRO_BATCH, PAD, Batch, prompt_batches, score

NAME = "ik_llama.cpp"
PROJECT = "ik-llama-cpp-python"
COUNTED = "a decoded token of ik_llama.cpp chooses nothing"


@dataclass(frozen=True)
class Configuration:
    """repacked: rows interleaved in memory as the file is read."""

    repacked: bool

    def __str__(self) -> str:
        return "repacked" if self.repacked else "as stored"


CONFIGURATIONS = [Configuration(repacked) for repacked in (True, False)]


def unsupported_reason() -> str | None:
    """Why it cannot run here; None where it can."""
    return f"{PROJECT} is not installed: pip install {PROJECT}" if missing_module("ik_llama_cpp") else None


class IkLlama:
    """A GGUF file in ik_llama.cpp on the CPU; made inside a worker."""

    def __init__(self, path: str, threads: int, configuration: Configuration, seed: int) -> None:
        self._api = api = _library()
        self._threads, self._configuration, self._seed = threads, configuration, seed
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.repack_tensors, parameters.use_mmap = configuration.repacked, not configuration.repacked
        parameters.flash_attn = False
        self._model = api.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise AmqError(f"ik_llama.cpp cannot load {path}: it is damaged, or of a model that it does not know")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._key: Any = None
        self._context: Any = None

    def facts(self) -> dict[str, Any]:
        import ik_llama_cpp

        describe = self._api._lib.llama_print_system_info
        describe.restype = ctypes.c_char_p
        found = [part.split("=") for part in describe().decode().split("|") if "=" in part]
        return {
            "version": version(PROJECT), "library": str(Path(ik_llama_cpp.__file__).parent),
            "description": " ".join(name.strip() for name, value in found if value.strip() == "1"),
            "vocab_size": self._vocabulary,
        }  # fmt: skip

    def memory(self) -> dict[str, int]:
        return memory()

    def measure(self, case: Case, repetition: int) -> dict[str, Any]:
        """Seconds of one case, as `LlamaCpp.measure`."""
        import numpy as np

        self._prepare(case.sequences, case.positions)
        random = np.random.default_rng((self._seed, repetition))
        for sequence in range(case.sequences):
            for batch in prompt_batches(
                self._api, sequence, 0, random.integers(self._vocabulary, size=case.depth).tolist()
            ):
                self._run(batch)
        if case.decode:
            steps = random.integers(self._vocabulary, size=(case.tokens, case.sequences)).tolist()
            batches = [Batch(self._api, case.sequences) for _ in steps]
            for position, (batch, tokens) in enumerate(zip(batches, steps, strict=True), case.depth):
                batch.fill(list(range(case.sequences)), position, tokens, step=0, logits=case.sequences)
        else:
            batches = prompt_batches(
                self._api, 0, case.depth, random.integers(self._vocabulary, size=case.tokens).tolist()
            )
        others, start = OtherWork(), time.perf_counter()
        for batch in batches:
            self._run(batch)
        return {"seconds": time.perf_counter() - start, "others": others.share()}

    def log_likelihood(self, windows: list[list[int]], unscored: int) -> float:
        """As `LlamaCpp.log_likelihood`."""
        import numpy as np

        logits = self._api._lib.llama_get_logits
        logits.restype, logits.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]
        total = 0.0
        for window in windows:
            self._prepare(1, len(window))
            batch = Batch(self._api, len(window))
            batch.fill([0] * len(window), 0, window, logits=len(window))
            self._run(batch)
            rows = np.ctypeslib.as_array(logits(self._context), (len(window), self._vocabulary))
            total += score(rows, window, unscored)
        return total

    def _prepare(self, sequences: int, positions: int) -> None:
        """An empty cache for so many sequences, in a context just large enough."""
        api, key = self._api, (sequences, positions)
        if key != self._key:
            if self._context:
                api.llama_free(self._context)
            parameters = api.llama_context_default_params()
            parameters.n_ctx = sequences * -(-positions // PAD) * PAD
            parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = BATCH, MICRO_BATCH, sequences
            parameters.n_threads = parameters.n_threads_batch = self._threads
            parameters.flash_attn = False
            self._context, self._key = api.llama_init_from_model(self._model, parameters), key
            if not self._context:
                raise AmqError(f"ik_llama.cpp made no context of {parameters.n_ctx} positions ({self._configuration})")
        api.llama_kv_cache_clear(self._context)

    def _run(self, batch: Batch) -> None:
        status = self._api.llama_decode(self._context, batch.raw)
        if status:
            raise AmqError(f"llama_decode returned {status} for {batch.raw.n_tokens} tokens ({self._configuration})")
        self._api._lib.llama_synchronize(ctypes.c_void_p(self._context))


def _library() -> Any:
    """The bindings, set up and silent."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # see peers.llama_cpp
    import ik_llama_cpp._ctypes_api as api

    global _silence
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    _silence = kind(lambda *_: None)  # kept: the library calls it as long as the process lives
    api._lib.llama_log_set(_silence, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


_silence: Any = None
