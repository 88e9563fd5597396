"""ARM without an ARM machine: the kernels cross-compiled through CMakeLists.txt, and run under QEMU's user emulation.

tests/arm/compare.cpp runs every instruction set that the emulated processor has beside portable code. Figures of speed
this gives none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import unchanged

from amq.formats import get_format

ROOT = Path(__file__).resolve().parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
QUICK = "-O2"
"""Behind CMake's own flags. (GCC 12 takes several times as long for portable code in -O1.)"""
TESTED = ("int3", "int5", "int8")
"""Formats: codes of them have parts of 1, 2, 4 and 8 bits (csrc/cpu/tiles.h), which is all that kernels know of one."""
SOURCES = ("csrc/**/*", "CMakeLists.txt", "tests/arm/*")
LACKS = {
    "max": {},
    "neoverse-n1": {"i8mm": "the processor has no I8MM"},  # Graviton 2; as Apple's M1
    "cortex-a72": {"dotprod": "the processor has no DotProd", "i8mm": "the processor has no DotProd"},
}
"""{QEMU's name of a processor: what it lacks}; `max` has all that QEMU knows."""

pytestmark = pytest.mark.slow
if missing := [tool for tool in (COMPILER, EMULATOR, "cmake") if shutil.which(tool) is None]:
    pytest.skip(f"ARM's kernels are compiled and run with {missing[0]}", allow_module_level=True)


def build(folder: Path) -> None:
    """The program `compare`, in `folder`."""
    import pybind11

    work = folder.with_name("work-arm")
    work.mkdir()
    entries = " ".join(f"X({f.name}, {f.levels}, {f.unit_codes}, {f.unit_bytes})" for f in map(get_format, TESTED))
    (work / "amq_formats.h").write_text(f"#pragma once\n#define AMQ_FORMATS(X) {entries}\n")
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(work), "-DAMQ_CUDA=OFF", f"-DAMQ_FORMATS_DIR={work}"),
        *(
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            "-G",
            "Unix Makefiles",
            f"-DCMAKE_CXX_COMPILER={COMPILER}",
        ),
        f"-DCMAKE_CXX_COMPILE_OBJECT=<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> {QUICK} -o <OBJECT> -c <SOURCE>",
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DPython_INCLUDE_DIR={sysconfig.get_paths()['include']}"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    program = [
        *(COMPILER, "-std=c++17", "-O1", "-fopenmp", "-static", f"-I{ROOT / 'csrc'}", f"-I{work}"),
        *(str(ROOT / "tests" / "arm" / "compare.cpp"), "-o", str(folder / "compare")),
    ]
    run(configure)
    make = ["cmake", "--build", str(work), "--parallel", str(os.cpu_count()), "--target"]
    run([*make, *re.findall(r"^\.\.\. (csrc/cpu/\w+\.o)$", run([*make, "help"]), re.MULTILINE)])
    folder.mkdir()
    objects = (work / "CMakeFiles" / "_cpu.dir" / "csrc" / "cpu").glob("*.o")
    run([*program, *sorted(map(str, objects))])
    shutil.rmtree(work)


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def program() -> Path:
    version = subprocess.run([COMPILER, "-v"], capture_output=True, text=True, check=True).stderr
    return unchanged.built("arm", unchanged.inputs_of(SOURCES, version, " ".join(TESTED)), build) / "compare"


@pytest.mark.parametrize("processor", LACKS)
def test_every_instruction_set_computes_what_portable_code_does(program: Path, processor: str) -> None:
    result = subprocess.run([EMULATOR, "-cpu", processor, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert set(said) == {"portable", "neon", "dotprod", "i8mm"}
    assert {isa: what for isa, what in said.items() if what.startswith("the processor")} == LACKS[processor]
    counts = {what for isa, what in said.items() if isa not in LACKS[processor]}
    assert len(counts) == 1 and re.fullmatch(r"\d{6,} numbers", counts.pop())
