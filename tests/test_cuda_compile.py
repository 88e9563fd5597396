"""What nvcc makes of the CUDA kernels, for every architecture it knows: spills, registers, load widths, instructions.

The budgets are those of docs/gpu.md: what a GPU can issue while memory delivers the weights. A kernel that
grows past its budget fails here, before anyone with a GPU notices.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import roofline
import sass
from helpers.kernel_budgets import budget

from amq.formats import FORMATS

ROOT = Path(__file__).resolve().parents[1]

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc on this machine: the CUDA kernels are compiled where there is one", allow_module_level=True)

REGISTERS = {32: 208, 64: 168, 128: 168}
"""Of a lane, by group size: three blocks of four warps on a multiprocessor of 65,536 registers, or two (kRegisters in
kernels/cuda/gemv.cuh)."""
INSTRUCTIONS = {
    "fp16": {"int2": 1.4, "int3": 1.75, "int4": 1.65, "int5": 2.25, "int6": 2.25, "int8": 1.7},
    "bf16": {"int2": 1.65, "int3": 2.2, "int4": 1.8, "int5": 2.5, "int6": 2.4, "int8": 3.4},
    "int8": {"int2": 1.2, "int3": 1.3, "int4": 1.35, "int5": 1.55, "int6": 1.55, "int8": 1.2},
}
"""Lane instructions per weight, all of the slab loop counted, at group 128 and any of 1 to 8 rows."""


@pytest.fixture(scope="module")
def loops() -> list[roofline.Loop]:
    return roofline.read_loops(roofline.known_architectures())


def test_everything_is_there(loops: list[roofline.Loop]) -> None:
    kinds = {(loop.format, loop.activations, loop.architecture) for loop in loops}
    assert kinds == {(f, a, c) for f in FORMATS for a in INSTRUCTIONS for c in roofline.known_architectures()}


def test_no_spills_and_room_for_the_warps(loops: list[roofline.Loop]) -> None:
    for loop in loops:
        assert loop.stack == 0, loop
        assert loop.registers <= REGISTERS[roofline.GROUP_SIZE], loop


def test_weights_are_read_16_bytes_at_a_time(loops: list[roofline.Loop]) -> None:
    for loop in loops:
        assert loop.wide_loads >= loop.plane_loads, loop


def test_instructions_stay_in_the_budget(loops: list[roofline.Loop]) -> None:
    for loop in loops:
        assert 0.5 < loop.per_weight <= budget(INSTRUCTIONS[loop.activations], loop.format), loop


def test_the_installed_library() -> None:
    """Every architecture is in it, no kernel of it spills at any group size, and later GPUs find PTX."""
    library = ROOT / "amq" / "_cuda.so"
    if not library.exists():
        pytest.skip("amq was installed without its CUDA library")
    usage = sass.run("cuobjdump", "-res-usage", library)
    assert {int(a) for a in re.findall(r"elf code:.*?arch = sm_(\d+)", usage, re.S)} == {
        *roofline.known_architectures()
    }
    assert re.search(r"ptx code:.*?arch = sm_80", usage, re.S)
    functions = re.findall(
        r"Function (\S*(?:linear|quantize)_kernel\S*):\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage
    )
    assert len(functions) == 12 * len(roofline.known_architectures())
    for name, registers, stack, local in functions:
        assert (int(stack), int(local)) == (0, 0), name
        group_size = int(re.search(r"Li(\d+)E", name)[1])
        assert int(registers) <= REGISTERS[group_size], name
