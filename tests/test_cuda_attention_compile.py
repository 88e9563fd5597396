"""What nvcc makes of attention, for every architecture it knows: no warnings, spills, registers, load widths and
instructions, within what docs/gpu.md says of them."""

from __future__ import annotations

import shutil

import pytest
from attention_cost import CACHES, Kernel, known_architectures, read_kernels

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc on this machine: the CUDA kernels are compiled where there is one", allow_module_level=True)

REGISTERS = {64: 168, 128: 240}
"""Of a lane, by the features of a warp: three blocks of four warps on a multiprocessor of 65,536 registers, or two."""
INSTRUCTIONS = {"fp16": {64: 555, 128: 690, 256: 805, 512: 710}, "int8": {64: 550, 128: 695, 256: 745, 512: 660}}
"""Of a warp for a tile of 16 positions, by the largest head."""


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return read_kernels(known_architectures())


def test_everything_is_there(kernels: list[Kernel]) -> None:
    found = {(kernel.cache, kernel.head_dim, kernel.architecture) for kernel in kernels}
    assert found == {
        (cache, dims, a) for cache in CACHES.values() for dims in INSTRUCTIONS[cache] for a in known_architectures()
    }


def test_no_spills_and_room_for_the_warps(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.registers <= REGISTERS[kernel.features], kernel


def test_the_cache_is_read_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    """A loop has the keys of its first tile, those of the next, and values: three halves of a tile's bytes."""
    for kernel in kernels:
        loads = kernel.features * (2 if kernel.cache == "fp16" else 1) * 16 // (16 * 32)
        assert kernel.wide_loads >= 3 * loads, kernel


def test_instructions_stay_in_the_budget(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.products == kernel.features // 4, kernel
        assert kernel.instructions <= INSTRUCTIONS[kernel.cache][kernel.head_dim], kernel
