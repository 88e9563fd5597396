"""llama.cpp through llama-cpp-python, compiled for this machine.

llama.cpp can lay out and multiply the same file in several ways, and which is fastest differs between prompt and
decode and from machine to machine; some crash on some machines. `CONFIGURATIONS` lists them, and a short trial of each
finds the strongest for either (amq/bench/peers/strongest.py).

A known crash: `own choice` dies with SIGSEGV on CPUs with AMX where the library was compiled by GCC 12, whose header
says that `ldtilecfg` reads 8 bytes, so that the rest of llama.cpp's tile configuration is stored after it was loaded.
With `__asm__ volatile("" ::: "memory");` before `_tile_loadconfig` in ggml/src/ggml-cpu/amx/mmq.cpp, or another
compiler, it runs, and is then the fastest by far: on such a machine compare with such a build (on PYTHONPATH).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from amq.bench.peers.base import Package, Peer, Quantizer
from amq.bench.peers.bindings import Bindings, logged, set_up
from amq.errors import AmqError

NAME = "llama.cpp"
INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install --no-binary llama-cpp-python llama-cpp-python'
PACKAGE = Package("llama-cpp-python", "llama_cpp", "0.3.36", INSTALL)
KINDS = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q4_1"),
    *("Q5_0", "Q5_K_S", "Q5_K_M", "Q5_1", "Q6_K", "Q8_0"),
)
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


class LlamaCpp(Bindings):
    name, package = NAME, PACKAGE

    @staticmethod
    def library() -> Any:
        import llama_cpp.llama_cpp as api

        return set_up(api)

    def choose_model(self, parameters: Any, configuration: Configuration) -> None:
        api = self._api
        parameters.use_extra_bufts = configuration.layout == "own choice"
        parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP if configuration.mapped else api.LLAMA_LOAD_MODE_NONE
        if configuration.layout == "repacked":
            self._overrides = _repacked_buffers()  # the library keeps the pointer
            parameters.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)

    def choose_context(self, parameters: Any, configuration: Configuration, all_logits: bool) -> None:
        api = self._api
        parameters.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED if configuration.flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        if all_logits:
            parameters.n_outputs_max = parameters.n_outputs_max_per_seq = parameters.n_ctx

    def clear(self, context: Any) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(context), True)


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


def ggml_libraries() -> list[Path]:
    """Base first: the others need it. Found without importing llama_cpp, whose dependencies are not wanted."""
    package = find_spec(PACKAGE.module)
    if package is None or not package.submodule_search_locations:
        return []
    folder = Path(package.submodule_search_locations[0]) / "lib"
    return [folder / f"libggml{part}.so" for part in ("-base", "-cpu")] if (folder / "libggml-cpu.so").exists() else []


def quantize_file(
    source: str, output: str, kind: str, threads: int, importance: Mapping[str, Any] | None = None
) -> None:
    """llama.cpp's own quantizer; a file that is quantized already is quantized again.

    kind: `Q4_0`, `Q4_K_M`, … as llama.cpp names them. importance: {tensor: float32 [in_features], mean of x²}.
    """
    _quantize(source, output, kind, threads, importance or {}, dry_run=False)


def plan(source: str, kind: str) -> str:
    return _quantize(source, "planned.gguf", kind, 1, {}, dry_run=True)


def _quantize(source: str, output: str, kind: str, threads: int, importance: Mapping[str, Any], dry_run: bool) -> str:
    """Returns the log."""
    api = LlamaCpp.library()
    code = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}", None)
    if code is None:
        known = sorted(n.removeprefix("LLAMA_FTYPE_MOSTLY_") for n in vars(api) if n.startswith("LLAMA_FTYPE_MOSTLY_"))
        raise AmqError(f"{kind} is no type of llama.cpp, which knows {', '.join(known)}")
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = code, threads, True
    parameters.dry_run = dry_run
    entries = (api.llama_model_imatrix_data * (len(importance) + 1))()  # an empty one ends it
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        parameters.imatrix = entries
    with logged(api) as said:
        status = api.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(parameters))
    if status:
        raise AmqError(f"llama.cpp could not quantize {Path(source).name} to {kind}: {''.join(said[-1:]).strip()}")
    return "".join(said)


PEER = Peer(
    NAME, PACKAGE, LlamaCpp, CONFIGURATIONS, f"a decoded token of {NAME} (as of llama-bench) chooses nothing",
    Quantizer(PACKAGE, KINDS, quantize_file, plan),
)  # fmt: skip
