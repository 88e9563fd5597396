"""What nvcc makes of sources in kernels/cuda: each kernel's resources and machine code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import roofline
import sass


class Kernel(NamedTuple):
    """name: as compiled. registers: of a lane. stack, shared, local: bytes. code: what nvdisasm prints."""

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    local: int
    code: str

    def loops(self) -> list[list[str]]:
        """The instructions of each loop, predicates left out."""
        instructions: list[str] = []
        labels: dict[str, int] = {}
        found = []
        lines = re.findall(r"^(?:(\.L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;)", self.code, re.MULTILINE)
        for label, text in lines:
            if label:
                labels[label] = len(instructions)
                continue
            instructions.append(re.sub(r"^@\S+ ", "", text))
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
            if jump and len(instructions) - labels.get(jump[1], len(instructions)) > 1:
                found.append(instructions[labels[jump[1]] :])
        return found


def compile_kernels(sources: tuple[str, ...], folder: Path) -> list[Kernel]:
    """For every architecture that this nvcc knows; a warning is an error."""
    found = []
    for source in sources:
        path, warnings = roofline.KERNELS / source, ("-Werror=all-warnings", "-Xcompiler=-Wall,-Werror")
        for architecture, cubin in roofline.compile_source(path, folder, roofline.known_architectures(), *warnings):
            found += _read(cubin, architecture)
    return found


def _read(cubin: Path, architecture: int) -> list[Kernel]:
    usage = sass.run("cuobjdump", "-res-usage", cubin)
    code = roofline.sections(cubin)
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [Kernel(name, architecture, *map(int, numbers), code[name]) for name, *numbers in re.findall(pattern, usage)]


def check_resources(kernels: list[Kernel], registers: dict[str, int], shared: int) -> None:
    """No kernel spills or has a stack, all stay within `registers` by name and `shared` bytes, none is unnamed, and
    each is there for every architecture."""
    names = {name: [k for k in kernels if f"{len(name)}{name}" in k.name] for name in registers}
    assert sum(map(len, names.values())) == len(kernels)
    for name, part in names.items():
        assert {k.architecture for k in part} == {*roofline.known_architectures()}
        for kernel in part:
            assert (kernel.stack, kernel.local) == (0, 0), kernel[:-1]
            assert kernel.registers <= registers[name] and kernel.shared <= shared, kernel[:-1]
