"""Builds kernels/cuda/*.cu for a CPU, with the shim of this folder, and lets a Python process load the result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import unchanged

from amq.formats import native_header

BUILD = "AMQ_TEST_CUDA_LIBRARY"
"""Names another build than the plain one, as runs under sanitizers do."""
SHIM = Path(__file__).resolve().parent
KERNELS = SHIM.parents[1] / "kernels" / "cuda"

COMMON = f"-x c++ -std=c++17 -DAMQ_CUDA_SHIM -I{SHIM} -I{KERNELS} -fno-strict-aliasing -ffp-contract=off"
"""The kernels read numbers through pointers of other types, as nvcc lets them: hence no strict aliasing. Results
must be equal to the bit whatever the processor: a compiler may fuse products and sums here and not there, where it has
the instruction."""

INPUTS = ("kernels/cuda/*", "tests/cuda_shim/*.*")
"""Of every build: the kernels and the shim."""

PLAIN = "-O2"
UNCHECKED = "null,object-size,vptr,nonnull-attribute,returns-nonnull-attribute"
ADDRESS = f"-O1 -g1 -fno-var-tracking -fsanitize=address,undefined -fno-sanitize={UNCHECKED}"
ADDRESS += " -fno-sanitize-recover=undefined -fno-sanitize-address-use-after-scope"
ADDRESS += " --param=asan-instrumentation-with-call-threshold=0"
"""As in test_sanitizer.py, which says why; but misaligned accesses fault on a GPU, so they are checked here."""

RACES = "-O1 -g1 -fsanitize=thread"
"""Reports two threads of a block that touch the same memory, one of them writing, without a barrier in between. An mma
or a shuffle is no barrier to it, because on a GPU they order no memory accesses."""


def runtime_library(name: str) -> Path:
    """The path of one of g++'s libraries; skips where there is none."""
    gcc = shutil.which("g++")
    if gcc is None or not sys.platform.startswith("linux"):
        pytest.skip("sanitizers and the CUDA shim need g++ on Linux")
    asked = subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(asked.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"g++ has no {name}")
    return path


def compile_shim(source: Path, output: Path, flags: str) -> Path:
    """Compiles a source file that includes device.cuh, or all of a folder, or copies what was compiled of the same
    inputs before, and returns `output`; skips where that cannot work."""
    runtime_library("libstdc++.so")
    for flag, library in (("=address", "libasan.so"), ("=thread", "libtsan.so")):
        if flag in flags:
            runtime_library(library)

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "amq_formats.h").write_text(native_header())
        options = f"{COMMON} -I{folder} {flags}".split()
        sources = sorted(source.glob("*.cu")) if source.is_dir() else [source]
        objects = [str(folder / f"{each.stem}.o") for each in sources]
        for each, made in zip(sources, objects, strict=True):
            _run(["g++", *options, "-c", str(each), "-o", made])
        _run(["g++", *flags.split(), *objects, "-o", str(folder / output.name), "-ldl"])

    inputs = unchanged.inputs_of(INPUTS, native_header(), source.name, flags, unchanged.compiler())
    kind = "address" if "=address" in flags else "thread" if "=thread" in flags else "plain"
    shutil.copy(unchanged.built(f"shim-{output.stem}-{kind}", inputs, build) / output.name, output)
    return output


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, " ".join(command) + "\n" + result.stderr[-6000:]


def build_shim(folder: Path, sanitize: bool = False, races: bool = False) -> Path:
    """kernels/cuda/*.cu as a shared library in `folder`: as it is, with ADDRESS, or with RACES.

    A process can load the latter two only if it started with `sanitizer_environment`. Unique symbols, of which a
    process has one however many libraries define them, would mix up several builds in one process.
    """
    name, flags = ("races", RACES) if races else ("sanitized", ADDRESS) if sanitize else ("plain", PLAIN)
    return compile_shim(KERNELS, folder / f"amq_cuda_{name}.so", f"{flags} -shared -fPIC -fno-gnu-unique")


def chosen_build(folder: Path) -> Path:
    """The library that tests load: the one that BUILD names, else a plain one in `folder`."""
    return Path(os.environ[BUILD]) if BUILD in os.environ else build_shim(folder)


def sanitizer_environment(races: bool = False) -> dict[str, str]:
    """The environment of a Python process that can load the sanitized build, or with `races` the other one.

    Any finding ends the process with a status other than 0, races too.
    """
    names = ("libtsan.so",) if races else ("libasan.so", "libubsan.so")
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(str(runtime_library(name)) for name in (*names, "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "OMP_NUM_THREADS": "1",  # torch's OpenMP is not instrumented, so its barriers would look like races
    }
