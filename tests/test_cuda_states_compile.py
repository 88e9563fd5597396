"""What nvcc makes of states.cu and mixture.cu for every architecture it knows: warnings, spills, registers, and how the
delta rule reads and writes its state."""

from __future__ import annotations

import re
import shutil
from collections import Counter

import pytest
import roofline
from helpers.cuda_kernels import Kernel, check_resources, compile_kernels

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc on this machine: the CUDA kernels are compiled where there is one", allow_module_level=True)

REGISTERS = {"delta_kernel": 128, "delta_mix_kernel": 80, "short_conv_kernel": 48}
REGISTERS |= {"choose_kernel": 64, "combine_kernel": 48}
"""Of a lane: two blocks of 256 threads of the delta rule fit a multiprocessor of 65,536, three of the others."""
SHARED = 48 * 1024
"""Bytes that a kernel has without asking; two blocks of the delta rule need half of the 100 KB of sm_86."""
STATE = 64
"""Floats of S that a lane has in registers: 128 rows of 16 columns over 32 lanes."""
TOKEN = 400
"""Instructions of a warp for a token: 4 · STATE are its products, 6 · 12 its sums over lanes, half of them shuffles."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return compile_kernels(("states.cu", "mixture.cu"), tmp_path_factory.mktemp("states"))


def test_no_spills_and_room_for_blocks(kernels: list[Kernel]) -> None:
    check_resources(kernels, REGISTERS, SHARED)


def test_the_state_comes_and_goes_once(kernels: list[Kernel]) -> None:
    """In 16-byte accesses outside of the loop over tokens, which reads shared memory and writes one output."""
    chosen = [k for k in kernels if "delta_kernelILi4E" in k.name]
    assert {k.architecture for k in chosen} == {*roofline.known_architectures()}
    for kernel in chosen:
        loops = [Counter(text.split()[0] for text in loop) for loop in kernel.loops()]
        token = min((loop for loop in loops if loop["FFMA"] >= 3 * STATE), key=Counter.total)
        assert token["FFMA"] + token["FMUL"] >= 4 * STATE and token.total() <= TOKEN, (kernel[:-1], token)
        kinds = {op: n for op, n in token.items() if op.startswith(("LDG", "STG", "LDL", "STL"))}
        assert kinds == {"STG.E.128": 1}, (kernel[:-1], kinds)
        whole = Counter(re.findall(r"(?:LDG|STG)\.E\.128", kernel.code))
        assert whole["LDG.E.128"] >= STATE // 4 and whole["STG.E.128"] >= STATE // 4 + 1, (kernel[:-1], whole)
