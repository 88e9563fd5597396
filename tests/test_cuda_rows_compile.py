"""What nvcc makes of rows.cu and rows_dense.cu for every architecture it knows: warnings, spills, registers, and the
loop of dense products, which is to leave memory the bound (kernels/cuda/rows_dense.cuh)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import roofline
import sass

from amq.formats import native_header

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc on this machine: the CUDA kernels are compiled where there is one", allow_module_level=True)

REGISTERS = {"dense_kernel": 128, "norm_kernel": 40, "finish_kernel": 48, "per_layer_kernel": 40}
REGISTERS |= {"embed_kernel": 40, "activate_kernel": 32, "softcap_kernel": 32}
"""Of a lane: two blocks of dense products fit a multiprocessor, four of 512 threads of the longest of the others."""
SHARED = 35 * 1024
"""Bytes of shared memory at most: two blocks of dense products fit the 100 KB of a multiprocessor of sm_86."""
OUT = 4
"""Output rows of a warp (kOut)."""
INSTRUCTIONS = {("half", 1): 4.0, ("half", 4): 7.25, ("half", 8): 11.5}
INSTRUCTIONS |= {("bfloat16", rows): value for (_, rows), value in INSTRUCTIONS.items()}
INSTRUCTIONS |= {("float", 1): 5.0, ("float", 4): 8.25, ("float", 8): 12.5}
"""Lane instructions per weight of the loop of dense products, by element and rows of x; one per row is the product."""


class Kernel(NamedTuple):
    name: str
    architecture: int
    registers: int
    stack: int
    local: int
    shared: int
    loops: list[list[str]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "amq_formats.h").write_text(native_header())
    found = []
    for source in ("rows.cu", "rows_dense.cu"):
        ptx = folder / f"{source}.ptx"
        command = ["nvcc", "-O3", "-std=c++17", f"-I{folder}", "-arch=compute_80", "-ptx", "-o", str(ptx)]
        command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Werror", str(roofline.KERNELS / source)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        for architecture in roofline.known_architectures():
            cubin = folder / f"{source}.{architecture}.cubin"
            sass.run("ptxas", "-O3", f"-arch=sm_{architecture}", ptx, "-o", cubin)
            found += read(cubin, architecture)
    return found


def read(cubin: Path, architecture: int) -> list[Kernel]:
    usage = sass.run("cuobjdump", "-res-usage", cubin)
    sections = re.split(r"\n\s*\.section\s+\.text\.", sass.run("nvdisasm", "-c", cubin))[1:]
    code = {section.split(",")[0].strip(): section for section in sections}
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        Kernel(name, architecture, int(registers), int(stack), int(local), int(shared), loops(code[name]))
        for name, registers, stack, shared, local in re.findall(pattern, usage)
    ]


def loops(code: str) -> list[list[str]]:
    """The instructions of each loop, predicates included."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for label, text in re.findall(r"^(?:(\.L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;)", code, re.MULTILINE):
        if label:
            labels[label] = len(instructions)
            continue
        instructions.append(text)
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if jump and len(instructions) - labels.get(jump[1], len(instructions)) > 1:
            found.append(instructions[labels[jump[1]] :])
    return found


def test_no_spills_and_room_for_blocks(kernels: list[Kernel]) -> None:
    names = {name: [k for k in kernels if f"{len(name)}{name}" in k.name] for name in REGISTERS}
    assert sorted(k for part in names.values() for k in part) == sorted(kernels)
    for name, part in names.items():
        assert {k.architecture for k in part} == {*roofline.known_architectures()}
        for kernel in part:
            assert (kernel.stack, kernel.local) == (0, 0), kernel
            assert kernel.registers <= REGISTERS[name] and kernel.shared <= SHARED, kernel


def test_the_loop_of_dense_products(kernels: list[Kernel]) -> None:
    """One wide load per output row, all on their way before the first product, and few instructions beside products."""
    seen = set()
    for kernel in kernels:
        match = re.search(r"dense_kernelI(?:\d+__(half|nv_bfloat16)|f)Li(\d)ELb1E", kernel.name)
        if not match:
            continue
        element, rows = (match[1] or "float").removeprefix("nv_"), int(match[2])
        loop = min((loop for loop in kernel.loops if any("FFMA" in text for text in loop)), key=len)
        loop = [text for text in loop if "NOP" not in text]
        weights = OUT * (4 if element == "float" else 8)
        products = [i for i, text in enumerate(loop) if "FFMA" in text]
        wide = [i for i, text in enumerate(loop) if "LDG" in text and ".128" in text]
        assert len(products) == weights * rows and len(wide) == OUT, kernel
        assert max(wide) < products[len(products) // 4], kernel
        assert rows < len(loop) / weights <= INSTRUCTIONS[element, rows], (kernel, len(loop) / weights)
        seen.add((element, rows, kernel.architecture))
    assert seen == {(*kind, a) for kind in INSTRUCTIONS for a in roofline.known_architectures()}
