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

REGISTERS = 255
"""Of a lane: two blocks of four warps on a multiprocessor of 65,536 registers (kRegisters in kernels/cuda/gemv.cuh)."""
INSTRUCTIONS = {
    "fp16": {"int2": 1.4, "int3": 1.72, "int4": 1.6, "int5": 2.27, "int6": 2.25, "int8": 1.7},
    "bf16": {"int2": 1.72, "int3": 2.0, "int4": 1.82, "int5": 2.5, "int6": 2.42, "int8": 2.9},
    "int8": {"int2": 1.22, "int3": 1.33, "int4": 1.32, "int5": 1.55, "int6": 1.53, "int8": 1.23},
}
"""Lane instructions per weight, all of the loop over slabs counted, at group 128 and any of 1 to 8 rows."""


@pytest.fixture(scope="module")
def loops() -> list[roofline.Loop]:
    return roofline.read_loops(roofline.known_architectures())


def test_everything_is_there(loops: list[roofline.Loop]) -> None:
    kinds = {(loop.format, loop.activations, loop.architecture) for loop in loops}
    assert kinds == {(f, a, c) for f in FORMATS for a in INSTRUCTIONS for c in roofline.known_architectures()}


def test_no_spills_and_room_for_the_warps(loops: list[roofline.Loop]) -> None:
    for loop in loops:
        assert loop.stack == 0, loop
        assert loop.registers <= REGISTERS, loop


def test_weights_are_read_16_bytes_at_a_time(loops: list[roofline.Loop]) -> None:
    for loop in loops:
        assert loop.wide_loads >= loop.plane_loads, loop


def test_instructions_stay_in_the_budget(loops: list[roofline.Loop]) -> None:
    for loop in loops:
        assert 0.5 < loop.per_weight <= budget(INSTRUCTIONS[loop.activations], loop.format), loop


def test_the_tensor_cores_multiply_codes_and_nothing_else(loops: list[roofline.Loop]) -> None:
    """16 rows × 16 features are one product of 16-bit numbers, half a one of bytes; bf16 takes 8 bits in two."""
    for loop in loops:
        each = loop.rows // 16 * roofline.SLAB_FEATURES // (32 if loop.activations == "int8" else 16)
        parts = 2 if (loop.activations, loop.format) == ("bf16", "int8") else 1
        assert loop.products == each * parts, loop


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
    functions = re.findall(r"Function (\S*linear_kernel\S*):\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert len(functions) == 9 * len(roofline.known_architectures())
    for name, registers, stack, local in functions:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= REGISTERS, name
