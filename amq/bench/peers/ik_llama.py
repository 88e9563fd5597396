"""ik_llama.cpp, a fork of llama.cpp with kernels and types of its own, through `ik-llama-cpp-python`.

Its wheel is compiled for AVX2. Its flash attention stops the process with GGML_ASSERT(S > 0) where several sequences
are decoded without AVX-VNNI (version 0.1.5 on a Zen 4 and a Zen 5, 2026-12); the package itself leaves it out there,
and so do we everywhere. Files are made by the program `llama-quantize` of the same wheel.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from amq.bench.peers.base import Package, Peer, Quantizer
from amq.bench.peers.bindings import Bindings, set_up
from amq.errors import AmqError

NAME = "ik_llama.cpp"
PACKAGE = Package("ik-llama-cpp-python", "ik_llama_cpp", "0.1.5", "pip install ik-llama-cpp-python")
KINDS = (
    *("IQ2_KS", "IQ2_K", "IQ3_KS", "IQ3_K", "IQ4_KSS", "IQ4_KS", "Q4_0", "IQ4_K", "Q4_K_S", "Q4_K_M"),
    *("IQ5_KS", "IQ5_K", "Q5_K_S", "IQ6_K", "Q6_0", "Q8_0"),
)


@dataclass(frozen=True)
class Configuration:
    """repacked: rows interleaved in memory as the file is read."""

    repacked: bool

    def __str__(self) -> str:
        return "repacked" if self.repacked else "as stored"


CONFIGURATIONS = [Configuration(repacked) for repacked in (True, False)]


class IkLlama(Bindings):
    name, package = NAME, PACKAGE

    @staticmethod
    def library() -> Any:
        import ik_llama_cpp._ctypes_api as api

        return set_up(api)

    def choose_model(self, parameters: Any, configuration: Configuration) -> None:
        parameters.repack_tensors, parameters.use_mmap = configuration.repacked, not configuration.repacked
        parameters.flash_attn = False

    def choose_context(self, parameters: Any, configuration: Configuration, all_logits: bool) -> None:
        parameters.flash_attn = False

    def clear(self, context: Any) -> None:
        self._api.llama_kv_cache_clear(context)


def quantize_file(source: str, output: str, kind: str, threads: int, matrix: Path | None = None) -> None:
    """A file that is quantized already is quantized again. matrix: a file of importances.

    Raises AmqError where the program refuses.
    """
    _program(*(("--imatrix", str(matrix)) if matrix else ()), source, output, kind, str(threads))


def plan(source: str, kind: str) -> str:
    return _program("--dry-run", source, "planned.gguf", kind)


def _program(*arguments: str) -> str:
    """What `llama-quantize` prints."""
    found = find_spec(PACKAGE.module)
    if found is None or found.origin is None:
        raise AmqError(str(PACKAGE.unsupported_reason()))
    command = [str(Path(found.origin).parent / "bin" / "llama-quantize"), "--allow-requantize", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip() or "nothing was printed").splitlines()
        raise AmqError(f"llama-quantize {' '.join(arguments)} ended with status {result.returncode}: {lines[-1]}")
    return result.stdout + result.stderr


PEER = Peer(
    NAME, PACKAGE, IkLlama, CONFIGURATIONS, f"a decoded token of {NAME} chooses nothing",
    Quantizer(PACKAGE, KINDS, quantize_file, plan),
)  # fmt: skip
