"""An install goes on without CUDA kernels where nvcc fails on them, and old compilers' needs are met."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.setup_file import setup_names

from amq.formats import native_header
from amq.kernels import cuda

ROOT = Path(__file__).parents[1]
OUTPUT = """[ 50%] Building CUDA object CMakeFiles/_cuda.dir/kernels/cuda/launch.cu.o
/src/kernels/cuda/gemv.cuh(288): error: this declaration has no storage class or type specifier
1 error detected in the compilation of "launch.cu".
gmake[3]: *** [_cuda.dir/launch.cu.o] Error 2
"""


@pytest.fixture
def setup_py() -> dict[str, Any]:
    """What setup.py defines."""
    return setup_names()


def test_a_failing_nvcc_leaves_its_first_error(setup_py: dict, tmp_path: Path, capsys) -> None:
    assert setup_py["FAILURE"] == cuda.FAILURE
    (tmp_path / "_cuda.so").write_bytes(b"of an earlier build")
    setup_py["note_failure"](tmp_path, OUTPUT)
    said = (tmp_path / cuda.FAILURE).read_text()
    assert said == "/src/kernels/cuda/gemv.cuh(288): error: this declaration has no storage class or type specifier\n"
    assert not (tmp_path / "_cuda.so").exists() and "installed without its CUDA kernels" in capsys.readouterr().err
    setup_py["note_failure"](tmp_path, None)
    assert not (tmp_path / cuda.FAILURE).exists()
    setup_py["note_failure"](tmp_path, "")
    assert (tmp_path / cuda.FAILURE).read_text() == "it said nothing\n"


def test_warnings_are_errors_for_developers_only() -> None:
    """Every -Werror of CMakeLists.txt stands behind AMQ_WERROR, which is off but in a sanitizer build."""
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    assert re.search(r"option\(AMQ_WERROR .* \$\{AMQ_SANITIZE\}\)", text)
    guarded = re.findall(r"if\(AMQ_WERROR\)(.*?)endif\(\)", text, re.DOTALL)
    assert len(guarded) == 2 and sum(part.count("-Werror") for part in guarded) == text.count("-Werror") > 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_kernels_compile_for_an_nvcc_without_maxnreg(tmp_path: Path) -> None:
    """CUDA before 12.4, stood in for by the macro that device.cuh sets from its version; device code, no warning."""
    source = tmp_path / "one.cu"
    source.write_text(
        '#include "linear.cuh"\nnamespace amq {\n'
        "template __global__ void linear_kernel<Int8Element, 128>(const __grid_constant__ LinearArguments);\n}\n"
    )
    (tmp_path / "amq_formats.h").write_text(native_header())
    kernels = ROOT / "kernels" / "cuda"
    ptx = {}
    for has in (0, 1):
        out = tmp_path / f"{has}.ptx"
        command = [
            *(
                "nvcc",
                "-std=c++17",
                "-arch=compute_80",
                "-ptx",
                f"-DAMQ_HAS_MAXNREG={has}",
                f"-I{kernels}",
                f"-I{tmp_path}",
            ),
            *("-Werror=all-warnings", "-Xcompiler=-Wall,-Werror", str(source), "-o", str(out)),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        ptx[has] = out.read_text()
    assert ".maxnreg" in ptx[1] and ".maxnreg" not in ptx[0] and ".maxntid 128" in ptx[0]
