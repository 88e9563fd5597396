"""What nvcc makes of states.cu and mixture.cu for every architecture it knows: warnings, spills, registers, and how the
delta rule reads and writes its state."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import roofline
import sass

from amq.formats import native_header

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


class Kernel(NamedTuple):
    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    local: int
    code: str

    def loops(self) -> list[Counter[str]]:
        """Opcodes of each loop, memory accesses with their widths."""
        opcodes: list[str] = []
        labels: dict[str, int] = {}
        found = []
        lines = re.findall(r"^(?:(\.L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;)", self.code, re.MULTILINE)
        for label, text in lines:
            if label:
                labels[label] = len(opcodes)
                continue
            opcodes.append(re.sub(r"^@\S+ ", "", text).split()[0])
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
            if jump and len(opcodes) - labels.get(jump[1], len(opcodes)) > 1:
                found.append(Counter(opcodes[labels[jump[1]] :]))
        return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    folder = tmp_path_factory.mktemp("states")
    (folder / "amq_formats.h").write_text(native_header())
    found = []
    for source in ("states.cu", "mixture.cu"):
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
    return [Kernel(name, architecture, *map(int, numbers), code[name]) for name, *numbers in re.findall(pattern, usage)]


def test_no_spills_and_room_for_blocks(kernels: list[Kernel]) -> None:
    names = {name: [k for k in kernels if f"{len(name)}{name}" in k.name] for name in REGISTERS}
    assert sum(map(len, names.values())) == len(kernels)
    for name, part in names.items():
        assert {k.architecture for k in part} == {*roofline.known_architectures()}
        for kernel in part:
            assert (kernel.stack, kernel.local) == (0, 0), kernel[:-1]
            assert kernel.registers <= REGISTERS[name] and kernel.shared <= SHARED, kernel[:-1]


def test_the_state_comes_and_goes_once(kernels: list[Kernel]) -> None:
    """In 16-byte accesses outside of the loop over tokens, which reads shared memory and writes one output."""
    chosen = [k for k in kernels if "delta_kernelILi4E" in k.name]
    assert {k.architecture for k in chosen} == {*roofline.known_architectures()}
    for kernel in chosen:
        token = min((loop for loop in kernel.loops() if loop["FFMA"] >= 3 * STATE), key=Counter.total)
        assert token["FFMA"] + token["FMUL"] >= 4 * STATE and token.total() <= TOKEN, (kernel[:-1], token)
        kinds = {op: n for op, n in token.items() if op.startswith(("LDG", "STG", "LDL", "STL"))}
        assert kinds == {"STG.E.128": 1}, (kernel[:-1], kinds)
        whole = Counter(re.findall(r"(?:LDG|STG)\.E\.128", kernel.code))
        assert whole["LDG.E.128"] >= STATE // 4 and whole["STG.E.128"] >= STATE // 4 + 1, (kernel[:-1], whole)
