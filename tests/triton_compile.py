"""Compiles the Triton kernels ahead of time, for GPUs that are not there, and reads the machine code.

A process of its own: Triton decides at import whether it interprets or compiles. The launcher runs as on a GPU, with
its own signature and launch parameters; only the last step, running what was compiled, is left out.

    PYTHONPATH=benchmarks/gpu python tests/triton_compile.py '[{"kernel": "gemv", "formats": ["int4"], "target": "90"}]'

prints one JSON list with the row that `measure` returns for each request; without an argument, for those of REPORT.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget

from amq.formats import FORMATS, n_groups
from amq.kernels import gpu_layout as layout
from amq.kernels import triton as launcher
from amq.packing import PackedWeight, PreparedWeight

KERNELS = launcher._kernels()
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class FakeDriver:
    """What Triton asks a driver for while it compiles."""

    def __init__(self, target: str) -> None:
        self.target = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target), 32)

    def get_current_device(self) -> str:
        return str(self.target)  # the key of Triton's cache of kernels

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Compile:
    """Stands for a kernel: `kernel[grid](…)` compiles it for those arguments and keeps the result."""

    def __init__(self, kernel: triton.JITFunction, compiled: list) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **kwargs: self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))


def compile_one(
    kernel: str,
    formats: list[str],
    target: str,
    rows: int = 1,
    out_features: int = 4096,
    in_features: int = 4096,
    group_size: int = 128,
    dtype: str = "fp16",
    bias: str | None = None,
    launch: dict | None = None,
):
    """(what Triton compiled, the launch parameters) for one call of the launcher on weights of `formats`.

    launch: fields of `Launch` that replace those that the launcher would choose.
    """
    triton.runtime.driver.set_active(FakeDriver(target))
    compiled = []
    names = ("gemv", "gemm", "dequantize", "dequantize_rows")
    stand_ins = {name: Compile(getattr(KERNELS, name), compiled) for name in names}
    launcher._kernels = lambda: SimpleNamespace(**stand_ins, interpreted=True)
    weights = []
    for name in formats:
        size = layout.layout_of(FORMATS[name], out_features, in_features, group_size).nbytes
        data = torch.empty(size, dtype=torch.uint8)
        weights.append(PreparedWeight("triton", FORMATS[name], out_features, in_features, group_size, data))
    if kernel == "dequantize":
        launcher.dequantize(weights[0], DTYPES[dtype])
        return compiled[0], {}
    if kernel == "dequantize_rows":
        fmt, groups = FORMATS[formats[0]], n_groups(in_features, group_size)
        qweight = torch.empty(out_features, fmt.row_bytes(in_features), dtype=torch.uint8)
        grid = [torch.empty(out_features, groups, dtype=torch.float16) for _ in range(2)]
        packed = PackedWeight(fmt, in_features, group_size, qweight, *grid)
        launcher.dequantize_rows(packed, torch.empty(out_features, in_features, dtype=DTYPES[dtype]))
        return compiled[0], {}
    bits = max(FORMATS[name].bits for name in formats)
    chosen = asdict(launcher.choose(rows, in_features, bits)) | (launch or {})
    if (chosen["block_m"] == 0) != (kernel == "gemv"):
        raise SystemExit(f"{rows} rows take the {'gemv' if chosen['block_m'] == 0 else 'gemm'}, not the {kernel}")
    x = torch.empty(rows, in_features, dtype=DTYPES[dtype])
    y = torch.empty(rows, len(formats) * out_features, dtype=DTYPES[dtype])
    added = None if bias is None else torch.empty(y.shape[1], dtype=DTYPES[bias])
    launcher.linear_into(y, x, weights, added, lambda *_: launcher.Launch(**chosen))
    return compiled[0], chosen


def machine_code(cubin: bytes) -> tuple[dict[str, int], list[str], list[str]]:
    """Resources of the kernel, its instructions, and those of its longest loop (all of them if it has none)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = sass.run("cuobjdump", "-res-usage", file.name), sass.run("nvdisasm", "-c", file.name)
    instructions, loop = sass.instructions_and_loop(code)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return resources, instructions, loop or instructions


REPORT = [
    {"kernel": kernel, "formats": [name], "target": target, "rows": rows, "in_features": 14336}
    for kernel, rows in (("gemv", 1), ("gemm", 16))
    for target in ("86", "90")
    for name in FORMATS
]
"""For docs/gpu.md: every format, for 1 and for 16 rows of x; 14336 features are a loop of 7 trips."""


def measure(**request) -> dict:
    """One row for JSON: the request, the launch parameters, and what the machine code says.

    registers, spilled (bytes), shared (bytes); instructions_per_weight, weights_per_thread and loads (width → count) of
    the loop over slabs; exchanges and spills_in_loop: its instructions that pass values between threads, and that use
    local memory; flushes_denormals: whether any float instruction does. A hip target gives binary_bytes alone.
    """
    compiled, launch = compile_one(**request)
    metadata = compiled.metadata
    row = request | {"launch": launch, "hash": compiled.hash, "warps": metadata.num_warps, "shared": metadata.shared}
    if "cubin" not in compiled.asm:
        return row | {"binary_bytes": len(compiled.kernel)}
    resources, instructions, loop = machine_code(compiled.asm["cubin"])
    names = [text.split()[0] for text in loop]
    widths = (re.search(r"\.(U8|S8|U16|S16|64|128)\b", name) for name in names if name.startswith("LDG."))
    slab_rows = launch["block_n"] * launch["slabs_per_step"] if launch else launcher.DEQUANTIZE_ROWS
    block = math.prod(launcher.DEQUANTIZE_BLOCK) if request["kernel"] == "dequantize_rows" else slab_rows * layout.SLAB
    weights = block // (32 * metadata.num_warps)
    return row | {
        "registers": resources["REG"],
        "spilled": resources["STACK"] + resources["LOCAL"],
        "weights_per_thread": weights,
        "instructions_per_weight": round(len(loop) / weights, 2),
        "instructions": dict(Counter(name.split(".")[0] for name in names).most_common()),
        "loads": dict(Counter(width[1] if width else "32" for width in widths)),
        "exchanges": sum(name.startswith(("LDS", "STS", "BAR", "SHFL")) for name in names),
        "spills_in_loop": sum(name.startswith(("LDL", "STL")) for name in names),
        "flushes_denormals": any(re.match(r"F(FMA|MUL|ADD)\S*\.FTZ", text) is not None for text in instructions),
    }


if __name__ == "__main__":
    print(json.dumps([measure(**request) for request in (json.loads(sys.argv[1]) if sys.argv[1:] else REPORT)]))
