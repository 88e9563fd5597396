"""The CPU kernels' tests once more, with the module built under the address and undefined-behaviour sanitizers.

The build is the one of CMakeLists.txt with AMQ_SANITIZE, in a temporary folder, with flags that make it quick enough to
be run every time. Accesses are checked by calls, not in line, and leaving a scope poisons nothing; each access is still
checked. Of undefined behaviour, null and misaligned pointers and the sizes of objects are left to the address sanitizer
and the processor: the kernels read bytes through memcpy and unaligned loads. GCC 12 takes 30 instead of 140 s of
processor time for one instruction set that way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_shim.build import runtime_library
from helpers import unchanged
from helpers.nested import run_nested

from amq.formats import FORMATS
from amq.kernels import cpu as native

ROOT = Path(__file__).resolve().parents[1]
CASES = ("qwen3_next", "lfm2_moe", "gemma4", "gemma4 experts", "gpt_oss", "granitemoehybrid")
"""Every operator of csrc/cpu/decoder.h; mixtures with norms of their own, and with gate and up in one linear."""
TESTS = (
    *("test_linear.py", "test_linear_faults.py", "test_linear_rotated.py", "test_native.py", "test_split_coder.py"),
    *("test_grouped.py", "test_quantize_gptq.py", "test_symmetric.py"),
    "test_engine.py::test_a_sequence_does_not_depend_on_what_shares_its_passes",
    *("test_decoder_spec.py", "test_decoder_random.py"),
    *(f"test_engine_families.py::test_a_sequence_does_not_depend_on_what_shares_its_passes[{case}]" for case in CASES),
)
LEFT_OUT = "environment or gil or non_finite or nan_and_infinity or huge_activations or tiny_activations"
LEFT_OUT += " or damaged_scales"
"""Tests of the above that start processes of their own, or run the shapes of others with other values: no value chooses
an address. They take two fifths of the time."""
SOURCES = ("csrc/**/*", "CMakeLists.txt", "amq/formats.py", "tests/test_sanitizer.py")
"""Of the module; what runs it, beside TESTS:"""
RUN = (
    "amq/kernels/cpu.py",
    "amq/kernels/modules.py",
    "amq/kernels/ops.py",
    "amq/packing.py",
    "amq/rotation.py",
    "amq/kernels/backends.py",
    "amq/runtime/cache_kinds.py",
    "amq/runtime/native_engine.py",
    "amq/runtime/decoder_spec.py",
    "amq/runtime/families/*.py",
    "amq/runtime/pages.py",
    "amq/runtime/state_pool.py",
    "amq/runtime/native_weights.py",
    "amq/runtime/paged_engine.py",
    "amq/runtime/weights.py",
    "amq/model/shape.py",
    "amq/split/coder.py",
    "amq/kernels/rounding.py",
    "amq/quantize/quantizers/*.py",
    "amq/util/native.py",
    "amq/util/symmetric.py",
    "tests/*.py",
    "tests/helpers/*.py",
)
UNCHECKED = "null,alignment,object-size,vptr,nonnull-attribute,returns-nonnull-attribute"
QUICK = f"-O1 -g1 -fno-var-tracking -fno-sanitize={UNCHECKED} -fno-sanitize-address-use-after-scope"
QUICK += " --param=asan-instrumentation-with-call-threshold=0"
"""Flags after CMake's own."""

PLUGIN = """
import importlib.util, sys
import torch  # first, as in amq/kernels/cpu.py
import amq
spec = importlib.util.spec_from_file_location("amq._cpu", {path!r})
amq._cpu = sys.modules["amq._cpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(amq._cpu)
"""


def facts() -> list[str]:
    """Of the tools that build and run, beside the files."""
    return [unchanged.compiler(), sys.version, " ".join(native.cpu_module().isas())]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Builds, and returns the environment in which `-p sanitized` or `import sanitized` puts that module in place."""
    libraries = [runtime_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    pytest.importorskip("pybind11", reason="the sanitizer build needs pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("the sanitizer build needs CMake")
    inputs = unchanged.inputs_of(SOURCES, *facts(), unchanged.packages("pybind11"))
    folder = unchanged.built("sanitized", inputs, build)
    module = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    (folder / "sanitized.py").write_text(PLUGIN.format(path=str(module)))
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "OMP_NUM_THREADS": "2",
    }


def build(folder: Path) -> None:
    """The module alone, in `folder`."""
    import pybind11

    work = folder.with_name("work")
    work.mkdir()
    entries = " ".join(f"X({f.name}, {f.levels}, {f.unit_codes}, {f.unit_bytes})" for f in FORMATS.values())
    (work / "amq_formats.h").write_text(f"#pragma once\n#define AMQ_FORMATS(X) {entries}\n")
    cmake = shutil.which("cmake")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(work), "-DAMQ_SANITIZE=ON", "-DAMQ_CUDA=OFF", "-DCMAKE_CXX_COMPILER=g++"),
        f"-DAMQ_FORMATS_DIR={work}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        f"-DCMAKE_CXX_COMPILE_OBJECT=<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> {QUICK} -o <OBJECT> -c <SOURCE>",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (configure, [cmake, "--build", str(work), "--parallel", str(os.cpu_count())]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def run_python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600
    )


def test_the_sanitizer_bites(environment: dict[str, str]) -> None:
    """x holds one feature less than it should: without this, the test below could pass on a plain module."""
    code = """
import sanitized, torch
from amq._cpu import linear, prepared_bytes
size = prepared_bytes("int3", 16, 100, 32)
data, y = torch.zeros(size, dtype=torch.uint8), torch.zeros(16)
for missing in (0, 1):
    x = torch.zeros(100 - missing)
    memory = (x.data_ptr(), 400), (0, 0), (y.data_ptr(), 64)  # lengths that lie, where one is missing
    linear([("int3", data.data_ptr(), size, 16)], *memory, 1, 100, 32, 100, 16, False, 1)
    print("survived", missing, flush=True)
"""
    result = run_python(environment, "-c", code)
    assert result.stdout.split() == ["survived", "0"], result.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr


def test_kernels_under_the_sanitizers(
    environment: dict[str, str], subtests: pytest.Subtests, record_property: Callable
) -> None:
    inputs = unchanged.inputs_of((*SOURCES, *RUN), *facts(), unchanged.packages("torch", "hypothesis"))
    if unchanged.passed_before("sanitizers", inputs, record_property):
        return
    arguments = ("-x", "-p", "sanitized", "-k", f"not ({LEFT_OUT})", *(f"tests/{name}" for name in TESTS))
    cases, errors = run_nested(subtests, *arguments, environment=environment)
    assert "Sanitizer" not in errors and "runtime error" not in errors, errors[-6000:]
    unchanged.passed("sanitizers", inputs, len(cases))
