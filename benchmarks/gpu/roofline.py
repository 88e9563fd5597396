"""What the CUDA kernels cost, read from compiled code: instructions, registers and bytes per weight, and what that
allows.

    python benchmarks/gpu/roofline.py [--json FILE]

compiles kernels/cuda for each architecture that nvcc knows, one kernel per format and kind of activation so that a
format's loop can be told from another's, disassembles it, and prints the tables of docs/gpu.md. Nothing runs
on a GPU. The gates of tests/test_cuda_compile.py read the same rows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import sass

from amq.formats import FORMATS, native_header
from amq.kernels.gpu_layout import layout_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from provenance import write_results  # noqa: E402

KERNELS = ROOT / "kernels" / "cuda"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
ELEMENTS = {"HalfElement": "fp16", "Bfloat16Element": "bf16", "Int8Element": "int8"}
BY_BITS = {fmt.bits: fmt for fmt in FORMATS.values() if fmt.is_dense}
GROUP_SIZE = 128
SLAB_FEATURES = 512

PROBE = """
#include "linear.cuh"
namespace amq {{
// run_steps of one format, without what is done once per item or block (x into shared memory, epilogues), what one
// thread does in `after`, and sums that several blocks share.
template <int kBits, class Element, int kRows>  // kRows: for the reader of the compiled code
__global__ void AMQ_REGISTERS(kRegisters, kThreads) probe(const __grid_constant__ LinearArguments arguments) {{
    __shared__ Shared shared;
    AMQ_SHARED_OF_LAUNCH(staged, kStageBytes);
    if (find_work(arguments, 0, shared) == 0) return;
    const Block block = {{arguments, shared, reinterpret_cast<char*>(staged)}};
    begin_steps<Element, {group}>(block);
    const StagedSlab slab = find_slab<Element, {group}>(block);
    Registers registers{{}};
    Place place = find_place<{group}>(shared.steps[0]);
    load_slab<kBits, Element, {group}>(registers, place);
    for (int turn = 0; shared.steps[turn % kSteps].item >= 0; ++turn) {{
        __builtin_assume(arguments.splits == 1);
        const Place next = find_place<{group}>(shared.steps[(turn + 1) % kSteps]);
        if (threadIdx.x == 0) shared.steps[(turn + 2) % kSteps].item = --shared.last;
        run_step<Element>(block, turn, kPairs<kBits>, registers, [&] {{
            multiply_slab<kBits, Element, {group}>(registers, slab.at(shared.steps[turn % kSteps].staged), place, next);
        }});
        place = next;
    }}
}}
#define AMQ_PROBE_OF(bits, Element) \\
    template __global__ void probe<bits, Element, kPairRows * pairs_of(bits)>(const __grid_constant__ LinearArguments);
#define AMQ_PROBE(bits) \\
    AMQ_PROBE_OF(bits, HalfElement) AMQ_PROBE_OF(bits, Bfloat16Element) AMQ_PROBE_OF(bits, Int8Element)
{probes}
}}  // namespace amq
"""


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet. tensor: fp16 multiply-adds with fp32 sums per clock and multiprocessor, through mma.sync;
    int8: how many times as many of bytes: 2 on data-centre GPUs, 4 on GeForce, where fp32 sums halve the fp16 rate."""

    name: str
    architecture: int
    gigabytes_per_second: float
    multiprocessors: int
    gigahertz: float
    tensor: int
    int8: int


GPUS = (
    Gpu("RTX 3090", 86, 936, 82, 1.695, 256, 4),
    Gpu("RTX 4090", 89, 1008, 128, 2.52, 256, 4),
    Gpu("RTX 5090", 120, 1792, 170, 2.407, 256, 4),
    Gpu("H200", 90, 4800, 132, 1.755, 1024, 2),
)
"""Data sheets; for H200 mma.sync is taken at half the rate of wgmma."""
ISSUE_SLOTS = 4
"""Warp instructions per clock and multiprocessor."""
SHAPES = ((4096, 4096), (14336, 4096))


@dataclass(frozen=True)
class Loop:
    """One format's loop over slabs. instructions: of one warp for one slab of `rows` output rows. plane_loads: of 16
    bytes, planes, and the scales of a row in one."""

    format: str
    activations: str
    architecture: int
    registers: int
    stack: int
    rows: int
    instructions: int
    products: int
    wide_loads: int
    plane_loads: int

    @property
    def per_weight(self) -> float:
        """Lane instructions per weight: each of the warp's 32 lanes holds its share of the slab's rows."""
        return self.instructions / (self.rows * SLAB_FEATURES / 32)


def known_architectures() -> tuple[int, ...]:
    """Those of ARCHITECTURES that nvcc knows."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(a for a in ARCHITECTURES if f"sm_{a}" in listed)


def read_loops(architectures: tuple[int, ...]) -> list[Loop]:
    """Every format and kind of activation, compiled from one PTX for each of `architectures`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        probes = "\n".join(f"AMQ_PROBE({bits})" for bits in BY_BITS)
        source.write_text(PROBE.format(group=GROUP_SIZE, probes=probes))
        loops = []
        for architecture, cubin in compile_source(source, Path(folder), architectures):
            loops += _read_cubin(cubin, architecture)
        return loops


def compile_source(
    source: Path, folder: Path, architectures: tuple[int, ...], *options: str
) -> Iterator[tuple[int, Path]]:
    """(architecture, cubin) of one PTX of a source that includes kernels/cuda; everything is written into `folder`."""
    (folder / "amq_formats.h").write_text(native_header())
    ptx = folder / f"{source.stem}.ptx"
    flags = ["-O3", "-std=c++17", f"-I{KERNELS}", f"-I{folder}", "-arch=compute_80", "-ptx", *options]
    result = subprocess.run(["nvcc", *flags, str(source), "-o", str(ptx)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"nvcc cannot compile {source.name}: {result.stderr[-3000:]}")
    for architecture in architectures:
        cubin = folder / f"{source.stem}.{architecture}.cubin"
        sass.run("ptxas", "-O3", f"-arch=sm_{architecture}", ptx, "-o", cubin)
        yield architecture, cubin


def sections(cubin: Path) -> dict[str, str]:
    """{name of a kernel, as compiled: what nvdisasm prints of it}."""
    parts = re.split(r"\n\s*\.section\s+\.text\.", sass.run("nvdisasm", "-c", cubin))[1:]
    return {part.split(",")[0].strip(): part for part in parts}


def _read_cubin(cubin: Path, architecture: int) -> list[Loop]:
    usage = sass.run("cuobjdump", "-res-usage", cubin)
    loops = []
    for name, section in sections(cubin).items():
        match = re.search(r"probeILi(\d+)ENS_\d+(\w+?Element)ELi(\d+)E", name)
        if not match:
            continue
        fmt, element, rows = BY_BITS[int(match[1])], match[2], int(match[3])
        registers, stack = re.search(rf"{name}:\s*REG:(\d+) STACK:(\d+)", usage).groups()
        _, loop = sass.instructions_and_loop(section)
        opcodes = [text.split()[0] for text in loop if not text.startswith("NOP")]
        count = Counter(opcodes)
        wide = sum(n for op, n in count.items() if op.startswith("LDG") and ".128" in op)
        products = sum(n for op, n in count.items() if op.startswith(("HMMA", "IMMA")))
        planes = rows // 8 * (fmt.bits + SLAB_FEATURES // GROUP_SIZE * 4 // 16)
        fields = (fmt.name, ELEMENTS[element], architecture, int(registers), int(stack), rows)
        loops.append(Loop(*fields, len(opcodes), products, wide, planes))
    return loops


def expected(gpu: Gpu, loop: Loop, shape: tuple[int, int]) -> dict[str, float]:
    """Microseconds that memory, the issue slots and the tensor cores need at least for one product, each alone."""
    out_features, in_features = shape
    weights = out_features * in_features
    size = layout_of(FORMATS[loop.format], out_features, in_features, GROUP_SIZE).nbytes + 2 * (
        out_features + in_features
    )
    clocks = 1e3 * gpu.multiprocessors * gpu.gigahertz  # per microsecond
    per_product = 16 * 8 * (16 if loop.activations != "int8" else 32)  # multiply-adds
    rate = gpu.tensor * (1 if loop.activations != "int8" else gpu.int8)
    return {
        "memory": size / gpu.gigabytes_per_second / 1e3,
        "issue": weights * loop.per_weight / 32 / (ISSUE_SLOTS * clocks),
        "tensor": weights / (loop.rows * SLAB_FEATURES) * loop.products * per_product / (rate * clocks),
        "fp16": 2 * weights / gpu.gigabytes_per_second / 1e3,
    }


def tables(loops: list[Loop]) -> str:
    """Markdown: what was compiled, and what it allows on each GPU."""
    lines = ["| format | activations | rows per block | " + " | ".join(f"sm_{a}" for a in _architectures(loops)) + " |"]
    lines.append("|---|---|---|" + "---|" * len(_architectures(loops)))
    for fmt in FORMATS:
        for activations in ELEMENTS.values():
            row = [loop for loop in loops if (loop.format, loop.activations) == (fmt, activations)]
            cells = " | ".join(f"{loop.per_weight:.2f} ({loop.registers})" for loop in row)
            lines.append(f"| {fmt} | {activations} | {row[0].rows} | {cells} |")
    lines += [
        "",
        "| GPU | N × K | format | activations | memory µs | issue slots | tensor cores | at most × fp16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        for shape in SHAPES:
            for loop in sorted(loops, key=lambda loop: list(FORMATS).index(loop.format)):
                if loop.architecture != gpu.architecture or loop.activations == "bf16":
                    continue
                if FORMATS[loop.format].bits > FORMATS["int4"].bits:
                    continue
                t = expected(gpu, loop, shape)
                bound = max(t["memory"], t["issue"], t["tensor"])
                lines.append(
                    f"| {gpu.name} | {shape[0]} × {shape[1]} | {loop.format} | {loop.activations} | {t['memory']:.1f} "
                    f"| {100 * t['issue'] / t['memory']:.0f} % | {100 * t['tensor'] / t['memory']:.0f} % "
                    f"| {t['fp16'] / bound:.1f} |"
                )
    return "\n".join(lines)


def _architectures(loops: list[Loop]) -> list[int]:
    return sorted({loop.architecture for loop in loops})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    loops = read_loops(known_architectures())
    print(tables(loops))
    if arguments.json:
        write_results(arguments.json, {"rows": [asdict(loop) | {"per_weight": loop.per_weight} for loop in loops]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
