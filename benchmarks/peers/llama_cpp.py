"""llama.cpp, measured as its llama-bench does: through llama-cpp-python's plain bindings, in a process of its own.

llama.cpp can lay out and multiply the same file in several ways, and which is fastest differs between prompt and
decode and from machine to machine; some crash on some machines. `CONFIGURATIONS` lists them, and a short trial of each
finds the strongest for either (benchmarks/beside_llama_cpp.py).

A known crash: `own choice` dies with SIGSEGV on CPUs with AMX where the library was compiled by GCC 12, whose header
says that `ldtilecfg` reads 8 bytes, so that the rest of llama.cpp's tile configuration is stored after it was loaded.
With `__asm__ volatile("" ::: "memory");` before `_tile_loadconfig` in ggml/src/ggml-cpu/amx/mmq.cpp, or another
compiler, it runs, and is then the fastest by far: on such a machine compare with such a build (on PYTHONPATH).

A decoded token is `llama_decode` and waiting for it; as in llama-bench the next token is a random one, so that
choosing a token is not counted.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.bench.cases import Case
from amq.bench.machine import OtherWork, memory
from amq.errors import AmqError

from .base import missing_module
from .ggml import ggml_libraries

NAME = "llama.cpp"
PROJECT = "llama-cpp-python"
BATCH, MICRO_BATCH = 2048, 512
"""llama-bench's: tokens that one call takes, and that its graph computes at once."""
PAD = 256
"""llama.cpp rounds the context up to this."""
LINEARS = rb"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(up|gate|down))\.weight"


@dataclass(frozen=True)
class Configuration:
    """layout: of the linears in memory: `own choice` (AMX where the CPU has it, else repacked), `repacked` (interleaved
    rows, also where AMX is there), `as stored`. flash: flash attention. mapped: the file is mapped instead of read.
    """

    layout: str
    flash: bool
    mapped: bool = True

    def __str__(self) -> str:
        return f"{self.layout}, flash attention {'on' if self.flash else 'off'}" + ("" if self.mapped else ", read")


CONFIGURATIONS = [
    *(Configuration(layout, flash) for layout in ("own choice", "repacked") for flash in (True, False)),
    *(Configuration("as stored", flash, mapped) for flash in (True, False) for mapped in (True, False)),
]


def unsupported_reason() -> str | None:
    """Why llama.cpp cannot run here; None where it can."""
    return f"{PROJECT} is not installed: pip install {PROJECT}" if missing_module("llama_cpp") else None


class LlamaCpp:
    """A GGUF file in llama.cpp on the CPU; made inside a worker."""

    def __init__(self, path: str, threads: int, configuration: Configuration, seed: int) -> None:
        self._api = api = _library()
        self._threads, self._configuration, self._seed = threads, configuration, seed
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = configuration.layout == "own choice"
        parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP if configuration.mapped else api.LLAMA_LOAD_MODE_NONE
        if configuration.layout == "repacked":
            self._overrides = _repacked_buffers()  # the library keeps the pointer
            parameters.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        self._model = api.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise AmqError(f"llama.cpp cannot load {path}: it is damaged, or of a model that this build does not know")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._key: Any = None
        self._context: Any = None

    def facts(self) -> dict[str, Any]:
        import llama_cpp

        system = " ".join(self._api.llama_print_system_info().decode().replace(" = 1", "").replace("|", "").split())
        facts = {"version": llama_cpp.__version__, "library": str(Path(llama_cpp.__file__).parent)}
        return {**facts, "description": system, "vocab_size": self._vocabulary}

    def memory(self) -> dict[str, int]:
        return memory()

    def measure(self, case: Case, repetition: int) -> dict[str, Any]:
        """Seconds of one case, as `OwnEngine.measure`; `first_token_seconds` are missing, nothing is chosen here."""
        import numpy as np

        self._prepare(case.sequences, case.positions, all_logits=False)
        random = np.random.default_rng((self._seed, repetition))
        for sequence in range(case.sequences):
            for batch in prompt_batches(
                self._api, sequence, 0, random.integers(self._vocabulary, size=case.depth).tolist()
            ):
                self._run(batch.raw)
        if case.decode:
            return self._decode(case, random.integers(self._vocabulary, size=(case.tokens, case.sequences)).tolist())
        batches = prompt_batches(self._api, 0, case.depth, random.integers(self._vocabulary, size=case.tokens).tolist())
        others, start = OtherWork(), time.perf_counter()
        for batch in batches:
            self._run(batch.raw)
        return {"seconds": time.perf_counter() - start, "others": others.share()}

    def _decode(self, case: Case, steps: list[list[int]]) -> dict[str, Any]:
        batch, sequences = Batch(self._api, case.sequences), list(range(case.sequences))
        others, start = OtherWork(), time.perf_counter()
        for position, tokens in enumerate(steps, case.depth):
            batch.fill(sequences, position, tokens, step=0, logits=case.sequences)
            self._run(batch.raw)
        return {"seconds": time.perf_counter() - start, "others": others.share()}

    def log_likelihood(self, windows: list[list[int]], unscored: int) -> float:
        """As `OwnEngine.log_likelihood`, of the same token ids; a window is one call."""
        import numpy as np

        total = 0.0
        for window in windows:
            self._prepare(1, len(window), all_logits=True)
            batch = Batch(self._api, len(window))
            batch.fill([0] * len(window), 0, window, logits=len(window))
            self._run(batch.raw)
            address = self._api.llama_get_logits(self._context)
            rows = np.ctypeslib.as_array(address, (len(window), self._vocabulary))
            total += score(rows, window, unscored)
        return total

    def _prepare(self, sequences: int, positions: int, all_logits: bool) -> None:
        """An empty cache for so many sequences, in a context just large enough, as llama-bench makes it."""
        api, key = self._api, (sequences, positions, all_logits)
        if key != self._key:
            if self._context:
                api.llama_free(self._context)
            parameters = api.llama_context_default_params()
            parameters.n_ctx = sequences * -(-positions // PAD) * PAD
            parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = BATCH, MICRO_BATCH, sequences
            parameters.n_threads = parameters.n_threads_batch = self._threads
            parameters.flash_attn_type = (
                api.LLAMA_FLASH_ATTN_TYPE_ENABLED if self._configuration.flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
            if all_logits:
                parameters.n_outputs_max = parameters.n_outputs_max_per_seq = positions
            self._context, self._key = api.llama_init_from_model(self._model, parameters), key
            if not self._context:
                raise AmqError(f"llama.cpp made no context of {parameters.n_ctx} positions ({self._configuration})")
        api.llama_memory_clear(api.llama_get_memory(self._context), True)

    def _run(self, batch: Any) -> None:
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise AmqError(f"llama_decode returned {status} for {batch.n_tokens} tokens ({self._configuration})")
        self._api.llama_synchronize(self._context)


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


def prompt_batches(api: Any, sequence: int, position: int, tokens: list[int]) -> list[Batch]:
    """Consecutive tokens of one sequence; logits are wanted after the last."""
    parts = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
    batches = [Batch(api, len(part)) for part in parts]
    for i, (batch, part) in enumerate(zip(batches, parts, strict=True)):
        batch.fill([sequence] * len(part), position + i * BATCH, part, logits=int(i == len(parts) - 1))
    return batches


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override: tensors whose names match go to a buffer type. An empty one ends an array."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def _repacked_buffers() -> Any:
    """Overrides that repack the blocks' linears, which the library itself does only where it finds no AMX.

    The buffer type has no C name, so this asks for its C++ one.
    """
    symbol = "_Z35ggml_backend_cpu_repack_buffer_typev"
    found = [library for library in map(ctypes.CDLL, map(str, ggml_libraries())) if hasattr(library, symbol)]
    if not found:
        raise AmqError("this build of llama.cpp does not let its repacked layout be asked for")
    make = getattr(found[0], symbol)
    make.restype = ctypes.c_void_p
    return (_Override * 2)(_Override(LINEARS, make()))


def quantize_file(
    source: str, output: str, kind: str, threads: int, importance: Mapping[str, Any] | None = None
) -> None:
    """llama.cpp's own quantizer; a file that is quantized already is quantized again.

    kind: `Q4_0`, `Q4_K_M`, … as llama.cpp names them. importance: {tensor: float32 [in_features]}, `peers.imatrix`.
    """
    api = _library()
    code = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}", None)
    if code is None:
        known = sorted(n.removeprefix("LLAMA_FTYPE_MOSTLY_") for n in vars(api) if n.startswith("LLAMA_FTYPE_MOSTLY_"))
        raise AmqError(f"--gguf {kind}: neither a .gguf file nor a type of llama.cpp, which knows {', '.join(known)}")
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = code, threads, True
    entries = (api.llama_model_imatrix_data * (len(importance or ()) + 1))()  # an empty one ends it
    for entry, (name, values) in zip(entries, (importance or {}).items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        parameters.imatrix = entries
    if api.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(parameters)):
        raise AmqError(f"llama.cpp could not quantize {source} to {kind}")


class Quantizer:
    """`quantize_file` for a worker."""

    def __init__(self) -> None:
        _library()

    def quantize(self, source: str, output: str, kind: str, threads: int) -> None:
        quantize_file(source, output, kind, threads)


def _library() -> Any:
    """The bindings, set up and silent."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a crash here is news for the caller, not a debugger session on the terminal
    import llama_cpp.llama_cpp as api

    global _silence
    _silence = api.llama_log_callback(lambda *_: None)  # kept: the library calls it as long as the process lives
    api.llama_log_set(_silence, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


_silence: Any = None
