"""What a search of Llama-3.1-8B takes on a GPU, derived: seconds and memory of each stage from shapes, counts and data
sheets.

    python benchmarks/gpu/derive_search.py

Nothing runs on a GPU. Every assumption is a constant here; operations, bytes and launches are counted from the code of
amq/quantize, amq/proxy and amq/search as it stands, with the settings that `amq search` has by default.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from amq.formats import FORMATS
from amq.quantize.quantizers.gptq import (
    BLOCK,
    REFIT_BYTES,
    ROUND_BYTES,
    ROUND_BYTES_PER_CODE,
)
from amq.quantize.quantizers.grid import REFITS, SHRINKS
from amq.search.settings import SearchSettings

GIB = 2.0**30


@dataclass(frozen=True)
class Gpu:
    """A data sheet. fp32, fp64, tensor: TFLOP/s, the last fp16 and bf16 with fp32 sums, dense; memory: GiB."""

    name: str
    gigabytes_per_second: float
    fp32: float
    fp64: float
    tensor: float
    memory: float


GPUS = (
    Gpu("RTX 3090", 936, 35.6, 0.556, 71, 24),
    Gpu("RTX 4090", 1008, 82.6, 1.29, 165, 24),
    Gpu("RTX 5090", 1792, 104.8, 1.64, 209, 32),
)

# The model: Llama-3.1-8B in bfloat16.
BLOCKS, HIDDEN, VOCABULARY, HALF, FLOAT, DOUBLE = 32, 4096, 128_256, 2, 4, 8
LINEARS = ((6144, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
"""(out_features, in_features) of what a quantizer is given at once: q, k and v; o; gate; up; down. `STACK` parts gate
and up."""
INPUTS = (4096, 4096, 4096, 14336)
"""Features of the distinct inputs of a block's linears."""

# The search: the defaults of `amq search`.
HOW = SearchSettings(model="meta-llama/Llama-3.1-8B", output="run")
CODES = [fmt.code_bits for fmt in HOW.bit_formats]
GROUP = HOW.group_size
OUTER_FORMATS = len({*HOW.formats.split(","), "int6", "int8"})
"""Formats of head and embeddings in the bank."""
EVALUATIONS = len(CODES) + HOW.points + 1
"""Uniform points, points of the front, and the budget."""
CONFIRMATIONS = len(CODES) + HOW.points + 1

# What a machine reaches of its data sheet.
TENSOR_SHARE, FP32_SHARE, FP64_SHARE, MEMORY_SHARE = 0.6, 0.6, 0.25, 0.8
LAUNCH = 6e-6
"""Seconds of a small operation that is launched from Python."""
BUS = 20e9
"""Bytes a second between pinned memory and the GPU: PCIe 4.0 × 16 less its overhead."""
DISK_READ, DISK_WRITE = 3e9, 2e9
HASH_THREADS, HASH = 8, 0.8e9
"""BLAKE2b: bytes a second of one thread."""
RESIDENT = 1.5 * GIB
"""Bytes of the bank on the GPU."""

# Counted in the code, for each weight and format unless it says otherwise.
GRID_BYTES = len(SHRINKS) * ((REFITS + 1) * 96 + REFITS * 80)
"""fitted_grid: an encode, a decode and an error are twelve passes of float32, a refit ten."""
ROUND_LAUNCHES = 11
"""_round: operations for each input feature of all rows of a chunk."""
ROUND_BYTES_MOVED = 80 + BLOCK // 2 * 8
"""_round: ten passes of float32, and the rest of the block read and written."""
PACK_BYTES = 64
"""pack_codes: int64 of every code, thrice."""
ERROR_BYTES = 24
"""square_error: dequantized, subtracted, squared, summed."""
LOSS_PASSES = 28
"""Two log-softmaxes and the divergence: passes of float32 over the vocabulary."""


@dataclass
class Work:
    """What a stage does; `seconds` of it on a GPU, one after the other."""

    name: str
    tensor: float = 0.0
    fp32: float = 0.0
    fp64: float = 0.0
    moved: float = 0.0
    launches: float = 0.0
    other: dict[str, float] = field(default_factory=dict)
    """{what: seconds} that are not the GPU's."""

    def seconds(self, gpu: Gpu) -> float:
        computed = self.tensor / (gpu.tensor * TENSOR_SHARE * 1e12) + self.fp32 / (gpu.fp32 * FP32_SHARE * 1e12)
        computed += self.fp64 / (gpu.fp64 * FP64_SHARE * 1e12)
        computed += self.moved / (gpu.gigabytes_per_second * MEMORY_SHARE * 1e9)
        return computed + self.launches * LAUNCH + sum(self.other.values())


def weights() -> int:
    return BLOCKS * sum(rows * features for rows, features in LINEARS)


def model_bytes() -> int:
    return HALF * (weights() + 2 * HIDDEN * VOCABULARY)


def packed_bytes(count: float, bits: float) -> float:
    return count * (bits + 32 / GROUP) / 8


def bank_bytes() -> float:
    return sum(packed_bytes(weights(), bits) for bits in CODES)


def loading() -> Work:
    size = model_bytes()
    hashed = size / (HASH * HASH_THREADS)
    return Work("load, fingerprint", other={"disk": size / DISK_READ, "bus": size / BUS, "hash": hashed})


def second_moments() -> Work:
    tokens = HOW.bank_windows * HOW.window_length
    forward = 2.0 * weights() * tokens
    products = 2.0 * tokens * BLOCKS * sum(n**2 for n in INPUTS)
    factors = BLOCKS * sum(n**3 / 3 for _, n in LINEARS)
    moved = BLOCKS * sum(HOW.bank_windows * 2 * FLOAT * n**2 for n in INPUTS) + BLOCKS * sum(
        12 * FLOAT * n**2 for _, n in LINEARS
    )
    return Work("bank: inputs, second moments, Cholesky", forward, products + factors, moved=moved)


def grids() -> Work:
    count = weights() * len(CODES) + 2 * HIDDEN * VOCABULARY * OUTER_FORMATS
    return Work("bank: grids", moved=count * GRID_BYTES)


def rounding() -> Work:
    formats, fp32, moved, launches = len(CODES), 0.0, 0.0, 0.0
    for rows, features in LINEARS:
        count = rows * features * formats
        fp32 += count * features  # half of all pairs of features, a multiply-add each
        moved += count * (ROUND_BYTES_MOVED + features / 2 * FLOAT / BLOCK)
        chunks = -(-rows // max(512, ROUND_BYTES // (ROUND_BYTES_PER_CODE * features * formats)))
        launches += chunks * features * ROUND_LAUNCHES
    return Work(
        "bank: error-compensated rounding", fp32=BLOCKS * fp32, moved=BLOCKS * moved, launches=BLOCKS * launches
    )


def refits() -> Work:
    fp32, fp64, moved = 0.0, 0.0, 0.0
    for rows, features in LINEARS:
        groups, count = features // GROUP, rows * features * len(CODES)
        fp32 += count * features * 2 * 4  # the matrix, the error's, and two comparisons
        fp64 += rows * len(CODES) * (2 * groups) ** 3 / 3
        moved += count * groups * 20 + rows * len(CODES) * (2 * groups) ** 2 * 6 * DOUBLE
    return Work("bank: scales and zero points solved", fp32=BLOCKS * fp32, fp64=BLOCKS * fp64, moved=BLOCKS * moved)


def storing() -> Work:
    size = bank_bytes()
    other = {"bus": size / BUS, "hash": 2 * size / (HASH * HASH_THREADS), "disk": size / DISK_WRITE}
    return Work(
        "bank: pack, errors, hash, write, open", moved=weights() * len(CODES) * (PACK_BYTES + ERROR_BYTES), other=other
    )


def fisher() -> Work:
    tokens, formats = HOW.cost_passes * HOW.window_length, len(CODES)
    head = HIDDEN * VOCABULARY
    turns = HOW.cost_passes / 3  # passes whose activations of a block fit --cache-memory
    tensor = 3 * 2.0 * (weights() + head) * tokens
    fp32 = 2.0 * tokens * (weights() * formats + head * OUTER_FORMATS)
    moved = weights() * formats * turns * (2 * FLOAT + 2 * FLOAT + HALF + 0.5)
    moved += head * OUTER_FORMATS * HOW.cost_passes * HOW.window_length / 128 * 2 * FLOAT
    bus = max(0.0, bank_bytes() - RESIDENT) * turns / BUS
    return Work("cost table: Fisher", tensor, fp32, moved=moved, other={"bus": bus})


def evaluations() -> Work:
    tokens = HOW.windows * HOW.window_length
    count = EVALUATIONS + CONFIRMATIONS
    average = sum(CODES) / len(CODES)
    tensor = 2.0 * (weights() + 2 * HIDDEN * VOCABULARY) * tokens  # the head for the reference too
    moved = weights() * (HALF + (average + 32 / GROUP) / 8) + LOSS_PASSES * FLOAT * VOCABULARY * tokens
    share = max(0.0, 1 - RESIDENT / bank_bytes())
    bus = packed_bytes(weights(), average) * share / BUS
    return Work(f"{count} evaluations", count * tensor, moved=count * moved, other={"bus": count * bus})


def peaks() -> dict[str, float]:
    """GiB at once on the GPU."""
    model = model_bytes() / GIB
    down = FLOAT * max(INPUTS) ** 2 / GIB
    states = HOW.bank_windows * HOW.window_length * HIDDEN * HALF / GIB
    block = HALF * sum(rows * features for rows, features in LINEARS) / GIB
    caches = 3 * 256 / 1024
    head = HIDDEN * VOCABULARY / GIB
    return {
        "the model": model,
        "bank, factor of the second moments of down": model + states + 4 * down + 0.19,
        "bank, rounding and solving down": model + states + 3 * down + (ROUND_BYTES + REFIT_BYTES) / GIB + 0.19,
        "cost table, one error of the head": model + RESIDENT / GIB + caches + FLOAT * head,
        "evaluation (one block's copies, head and embedding, logits)": (
            model + RESIDENT / GIB + caches + block + 2 * HALF * head + 1.0
        ),
    }


def main() -> int:
    stages = [loading(), second_moments(), grids(), rounding(), refits(), storing(), fisher(), evaluations()]
    print(f"| stage | {' | '.join(gpu.name for gpu in GPUS)} |\n|---|{'---|' * len(GPUS)}")
    for stage in stages:
        print(f"| {stage.name} | {' | '.join(f'{stage.seconds(gpu):.0f} s' for gpu in GPUS)} |")
    totals = [sum(stage.seconds(gpu) for stage in stages) for gpu in GPUS]
    print(f"| together | {' | '.join(f'{total / 60:.1f} min' for total in totals)} |")
    print(f"\nThe bank: {bank_bytes() / GIB:.1f} GiB in {', '.join(fmt.name for fmt in HOW.bit_formats)}")
    print("\n| at once on the GPU | GiB |\n|---|---|")
    for name, size in peaks().items():
        print(f"| {name} | {size:.1f} |")
    return 0


if __name__ == "__main__":
    assert set(HOW.formats.split(",")) <= set(FORMATS)
    sys.exit(main())
