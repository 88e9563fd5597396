"""What nvcc makes of rows.cu and rows_dense.cu for every architecture it knows: warnings, spills, registers, and the
loop of dense products, which is to leave memory the bound (kernels/cuda/rows_dense.cuh)."""

from __future__ import annotations

import re
import shutil

import pytest
import roofline
from helpers.cuda_kernels import Kernel, check_resources, compile_kernels

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc on this machine: the CUDA kernels are compiled where there is one", allow_module_level=True)

REGISTERS = {"dense_kernel": 128, "norm_kernel": 40, "finish_kernel": 48, "per_layer_kernel": 40}
REGISTERS |= {"embed_kernel": 40, "activate_kernel": 32, "softcap_kernel": 32, "rotate_kernel": 40}
"""Of a lane: two blocks of dense products fit a multiprocessor, four of 512 threads of the longest of the others."""
SHARED = 35 * 1024
"""Bytes of shared memory at most: two blocks of dense products fit the 100 KB of a multiprocessor of sm_86."""
OUT = 4
"""Output rows of a warp (kOut)."""
INSTRUCTIONS = {("half", 1): 4.0, ("half", 4): 7.25, ("half", 8): 11.5}
INSTRUCTIONS |= {("bfloat16", rows): value for (_, rows), value in INSTRUCTIONS.items()}
INSTRUCTIONS |= {("float", 1): 5.0, ("float", 4): 8.25, ("float", 8): 12.5}
"""Lane instructions per weight of the loop of dense products, by element and rows of x; one per row is the product."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return compile_kernels(("rows.cu", "rows_dense.cu"), tmp_path_factory.mktemp("rows"))


def test_no_spills_and_room_for_blocks(kernels: list[Kernel]) -> None:
    check_resources(kernels, REGISTERS, SHARED)


def test_the_loop_of_dense_products(kernels: list[Kernel]) -> None:
    """One wide load per output row, all on their way before the first product, and few instructions beside products."""
    seen = set()
    for kernel in kernels:
        match = re.search(r"dense_kernelI(?:\d+__(half|nv_bfloat16)|f)Li(\d)ELb1E", kernel.name)
        if not match:
            continue
        element, rows = (match[1] or "float").removeprefix("nv_"), int(match[2])
        loop = min((loop for loop in kernel.loops() if any("FFMA" in text for text in loop)), key=len)
        loop = [text for text in loop if "NOP" not in text]
        weights = OUT * (4 if element == "float" else 8)
        products = [i for i, text in enumerate(loop) if "FFMA" in text]
        wide = [i for i, text in enumerate(loop) if "LDG" in text and ".128" in text]
        assert len(products) == weights * rows and len(wide) == OUT, kernel[:-1]
        assert max(wide) < products[len(products) // 4], kernel[:-1]
        assert rows < len(loop) / weights <= INSTRUCTIONS[element, rows], (kernel[:-1], len(loop) / weights)
        seen.add((element, rows, kernel.architecture))
    assert seen == {(*kind, a) for kind in INSTRUCTIONS for a in roofline.known_architectures()}
