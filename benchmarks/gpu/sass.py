"""Machine code of GPU kernels, read with the tools of CUDA: resources, instructions, and the loop that matters."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path


@lru_cache
def tool(name: str) -> str:
    """The path of a CUDA tool: on PATH, or the one inside Triton's wheel."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        raise FileNotFoundError(f"{name} is neither on PATH nor in a triton package") from None
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run(name: str, *arguments: str | Path) -> str:
    """What a CUDA tool prints."""
    return subprocess.run([tool(name), *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def instructions_and_loop(code: str) -> tuple[list[str], list[str]]:
    """The instructions of one kernel that `nvdisasm -c` printed, predicates left out, and those of its longest loop:
    between a backward branch and its target. A jump to itself, which ends every kernel, is none."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loop: list[str] = []
    for label, text in re.findall(r"^(?:(\.L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;)", code, re.MULTILINE):
        if label:
            labels[label] = len(instructions)
            continue
        instructions.append(re.sub(r"^@\S+ ", "", text).strip())
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        body = instructions[labels[jump[1]] :] if jump and jump[1] in labels else []
        loop = max(loop, body if len(body) > 1 else [], key=len)
    return instructions, loop
