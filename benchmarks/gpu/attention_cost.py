"""What attention on a GPU costs, read from compiled code: instructions and registers per tile, and what that allows.

    python benchmarks/gpu/attention_cost.py

compiles kernels/cuda/attention.cu for each architecture that nvcc knows, disassembles it, and prints the tables of
docs/gpu.md. Nothing runs on a GPU. The gates of tests/test_cuda_attention_compile.py read the same rows.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import sass
from roofline import GPUS, ISSUE_SLOTS, KERNELS, Gpu, compile_source, known_architectures, sections

TILE = 16
"""Positions of a tile (kTile of attention.cuh)."""
CACHES = {"HalfCache": "fp16", "Int8Cache": "int8"}
PER_PRODUCT = 16 * 8 * 16
"""Multiply-adds of one tensor-core product."""
LLAMA = (8, 128)
"""KV heads and features of a head of Llama-3.1-8B, whose heads share keys in groups of 4."""
POSITIONS = (1024, 8192)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. instructions, products, wide_loads: of the longest path through the loop over tiles, for one
    warp, which has `features` of the head's."""

    cache: str
    features: int
    slices: int
    architecture: int
    registers: int
    stack: int
    instructions: int
    products: int
    wide_loads: int

    @property
    def head_dim(self) -> int:
        """Of the largest head that it takes."""
        return self.features * self.slices

    @property
    def tile_bytes(self) -> int:
        """Keys and values of a warp's tile."""
        return position_bytes(self.cache, self.features) * TILE

    @property
    def per_byte(self) -> float:
        """Lane instructions per byte of the cache."""
        return self.instructions * 32 / self.tile_bytes


def position_bytes(cache: str, features: int) -> int:
    """Of a position's key and value."""
    return 2 * (2 * features if cache == "fp16" else features + 4)


def read_kernels(architectures: tuple[int, ...]) -> list[Kernel]:
    """Every kernel of attention, compiled from one PTX for each of `architectures`."""
    with tempfile.TemporaryDirectory() as folder:
        made = compile_source(KERNELS / "attention.cu", Path(folder), architectures, "-Werror=all-warnings")
        return [kernel for architecture, cubin in made for kernel in _read_cubin(cubin, architecture)]


def _read_cubin(cubin: Path, architecture: int) -> list[Kernel]:
    usage = sass.run("cuobjdump", "-res-usage", cubin)
    kernels = []
    for name, section in sections(cubin).items():
        match = re.search(r"attention_kernelINS_\d+(\w+?Cache)ELi(\d+)ELi(\d+)E", name)
        if not match:
            continue
        registers, stack = re.search(rf"{name}:\s*REG:(\d+) STACK:(\d+)", usage).groups()
        opcodes = _tile_loop(section)
        count = Counter(opcodes)
        wide = sum(n for op, n in count.items() if op.startswith("LDG") and ".128" in op)
        products = sum(n for op, n in count.items() if op.startswith("HMMA"))
        fields = (CACHES[match[1]], int(match[2]), int(match[3]), architecture, int(registers), int(stack))
        kernels.append(Kernel(*fields, len(opcodes), products, wide))
    return kernels


def _tile_loop(code: str) -> list[str]:
    """The opcodes of the shortest loop that holds all products: what is only jumped over (the tanh of a softcap, values
    that are hidden at an edge) counts as well."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for label, text in re.findall(r"^(?:(\.L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;)", code, re.MULTILINE):
        if label:
            labels[label] = len(opcodes)
            continue
        opcodes.append(re.sub(r"^@\S+ ", "", text).split()[0])
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if jump and jump[1] in labels:
            loops.append(opcodes[labels[jump[1]] :])
    products = sum(op.startswith("HMMA") for op in opcodes)
    return min((loop for loop in loops if sum(op.startswith("HMMA") for op in loop) == products), key=len)


def expected(gpu: Gpu, kernel: Kernel, positions: int) -> dict[str, float]:
    """Microseconds that memory, issue slots and tensor cores need at least for one row of one layer of Llama-3.1-8B."""
    kv_heads, head_dim = LLAMA
    size = positions * kv_heads * position_bytes(kernel.cache, head_dim)
    tiles = positions * kv_heads / TILE * head_dim / kernel.features
    clocks = 1e3 * gpu.multiprocessors * gpu.gigahertz  # per microsecond
    return {
        "memory": size / gpu.gigabytes_per_second / 1e3,
        "issue": tiles * kernel.instructions / (ISSUE_SLOTS * clocks),
        "tensor": tiles * kernel.products * PER_PRODUCT / (gpu.tensor * clocks),
    }


def tables(kernels: list[Kernel]) -> str:
    """Markdown: what was compiled, and what it allows on each GPU."""
    architectures = sorted({kernel.architecture for kernel in kernels})
    lines = ["| cache | head_dim up to | " + " | ".join(f"sm_{a}" for a in architectures) + " |"]
    lines.append("|---|---|" + "---|" * len(architectures))
    for cache, head_dim in sorted({(kernel.cache, kernel.head_dim) for kernel in kernels}):
        row = [kernel for kernel in kernels if (kernel.cache, kernel.head_dim) == (cache, head_dim)]
        cells = " | ".join(f"{k.instructions}, {k.per_byte:.1f} ({k.registers})" for k in row)
        lines.append(f"| {cache} | {head_dim} | {cells} |")
    lines += ["", "| GPU | cache | positions | memory µs | issue slots | tensor cores |", "|---|---|---|---|---|---|"]
    for gpu in GPUS:
        for kernel in kernels:
            if (kernel.architecture, kernel.head_dim) != (gpu.architecture, LLAMA[1]):
                continue
            for positions in POSITIONS:
                t = expected(gpu, kernel, positions)
                lines.append(
                    f"| {gpu.name} | {kernel.cache} | {positions} | {t['memory']:.1f} "
                    f"| {100 * t['issue'] / t['memory']:.0f} % | {100 * t['tensor'] / t['memory']:.0f} % |"
                )
    return "\n".join(lines)


def main() -> int:
    print(tables(read_kernels(known_architectures())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
