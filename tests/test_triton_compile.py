"""The Triton kernels compile for every GPU, and to the machine code that they were written for.

tests/triton_compile.py compiles in a process of its own (here Triton may be interpreting) and reads registers, loads
and instructions. Budgets are what Triton 3.6 gave plus two per cent: a compiler or a change that does worse should be
noticed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import unchanged
from helpers.kernel_budgets import budget
from helpers.nested import run_nested
from helpers.processes import python_path

from amq.formats import FORMATS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")

INPUTS = ("kernels/triton/*.py", "amq/kernels/*.py", "amq/packing.py", "amq/formats.py", "benchmarks/gpu/sass.py")
COMPILE, WARMING = "tests/triton_compile.py", "tests/triton_warming.py"
"""What the machine code depends on, beside Triton's version and tests/triton_compile.py."""
ALL = ("80", "86", "89", "90", "120", "gfx942")
FEATURES = 14336  # 28 slabs: a loop of 7 trips, both in the gemv and in the gemm
GEMV_BUDGET = {"int2": 3.4, "int3": 3.75, "int4": 3.57, "int5": 5.1, "int6": 5.05, "int8": 4.42}
"""Instructions per weight of the gemv at one row of x and group 128: 4 rows of W to a thread up to 4 bits, 2 above."""
GEMM_BUDGET = {"int2": 5.0, "int3": 5.38, "int4": 5.15, "int5": 5.7, "int6": 5.66, "int8": 5.02}
"""The same of the gemm, for up to 16 rows of x."""
GEMV_REGISTERS = 144
"""14 programs of one warp on an SM."""
GEMM_REGISTERS = 184
"""Of four warps and 32 rows: 2 programs on an SM with 16 to 32 KiB of int2 to int8 under way."""
ROWS_BUDGET = 35.0
"""The same of the kernel that makes packed rows dense. Memory takes 2.4 bytes for each: an RTX 3090 issues 46 in that
time, an RTX 4090 98."""


@pytest.fixture(scope="module")
def compiled() -> Callable[[str], list[dict]]:
    """The rows of tests/triton_compile.py for the requests of a test, all compiled at once; with inputs that have not
    changed they are those of an earlier run."""
    requests = [request for group in REQUESTS.values() for request in group]

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "rows.json").write_text(json.dumps(compile_all(requests)))

    inputs = (*INPUTS, COMPILE, "tests/test_triton_compile.py")
    key = unchanged.inputs_of(inputs, sys.version, unchanged.packages("triton"))
    rows = iter(json.loads((unchanged.built("triton", key, build) / "rows.json").read_text()))
    found = {name: [next(rows) for _ in group] for name, group in REQUESTS.items()}
    return found.__getitem__


def compile_all(requests: list[dict]) -> list[dict]:
    """In as many processes as there are cores."""
    environment = compiling()
    script, workers = Path(__file__).with_name("triton_compile.py"), min(os.cpu_count(), len(requests))
    shares = [requests[worker::workers] for worker in range(workers)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, json.dumps(share)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in shares
    ]
    rows: list[dict] = [{}] * len(requests)
    for worker, process in enumerate(processes):
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        rows[worker::workers] = json.loads(output)
    return rows


def compiling() -> dict[str, str]:
    """The environment of a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | python_path("benchmarks/gpu")


def each(formats: list[list[str]], targets: tuple[str, ...], **more) -> list[dict]:
    """A request for each entry of `formats` and each target."""
    return [{"formats": f, "target": target} | more for target in targets for f in formats]


def check(row: dict, registers: int) -> None:
    """What holds for every kernel whose machine code can be read."""
    assert row["spills_in_loop"] == 0 and row["spilled"] <= 8, row
    assert row["registers"] <= registers, row
    assert set(row["loads"]) == {"128"}, row
    assert not row["flushes_denormals"], row


SINGLE = [[name] for name in FORMATS]
ODD = {"formats": ["int6"], "target": "89", "out_features": 1, "in_features": 577, "group_size": 32}
REQUESTS = {
    "gemv": each(SINGLE, ("86", "90"), kernel="gemv", in_features=FEATURES),
    "gemm": each([["int2"]], ("86",), kernel="gemm", in_features=FEATURES, rows=4)
    + each(SINGLE, ("86", "90"), kernel="gemm", in_features=FEATURES, rows=16),
    "every gpu": each([["int3", "int2", "int3"]], ALL, kernel="gemv", dtype="bf16", in_features=FEATURES)
    + each([["int4"]], ALL, kernel="gemm", dtype="bf16", rows=5, bias="fp32"),
    "others": [
        *each([["int4"]], ("86", "90"), kernel="gemm", rows=512),
        *each([["int2", "int3", "int4"]], ("89",), kernel="gemm", rows=32),
        *(ODD | {"kernel": "gemv"}, ODD | {"kernel": "gemm", "rows": 3}),
        *each(SINGLE, ("90",), kernel="dequantize"),
        *each(SINGLE, ("89",), kernel="dequantize_rows", dtype="bf16"),
    ],
}


def test_gemv_of_every_format(compiled: Callable[[str], list[dict]]) -> None:
    for row in compiled("gemv"):
        check(row, GEMV_REGISTERS)
        assert row["exchanges"] == 0 and row["spilled"] == 0, row
        assert row["instructions_per_weight"] <= budget(GEMV_BUDGET, row["formats"][0]), row


def test_gemm_of_every_format(compiled: Callable[[str], list[dict]]) -> None:
    """Sixteen rows of x; four rows take the very same kernel."""
    first, *rows = compiled("gemm")
    assert first["hash"] == rows[0]["hash"]
    for row in rows:
        check(row, GEMM_REGISTERS)
        assert row["exchanges"] == 0 and row["instructions"]["HMMA"], row
        assert row["instructions_per_weight"] <= budget(GEMM_BUDGET, row["formats"][0]), row


def test_every_gpu(compiled: Callable[[str], list[dict]]) -> None:
    """A fused gemv, where two weights of one format share its code, and a gemm."""
    for row in compiled("every gpu"):
        if row["target"] == "gfx942":
            assert row["binary_bytes"] > 0
        elif row["kernel"] == "gemm":
            check(row, GEMM_REGISTERS)
        else:
            check(row, 160)
            assert row["exchanges"] == 0 and row["instructions_per_weight"] <= 1.05 * GEMV_BUDGET["int3"], row


def test_large_gemm_dequantize_and_odd_shapes(compiled: Callable[[str], list[dict]]) -> None:
    """In the large gemm warps share x through shared memory. The odd shapes: one output row, on which Triton would
    specialise, and a ragged and odd number of features."""
    for row in compiled("others"):
        if "in_features" in row:
            assert row["spilled"] == 0, row
            continue
        if row["kernel"] == "dequantize_rows":  # memory, not instructions, bounds it: docs/gpu.md
            assert row["spilled"] == 0 and row["registers"] <= 48, row
            assert row["instructions_per_weight"] <= ROWS_BUDGET, row
            continue
        check(row, 80 if row["kernel"] == "dequantize" else 200)
        if row["kernel"] == "gemm":
            assert row["instructions"]["HGMMA" if row["target"] == "90" else "HMMA"], row
            assert row["shared"] <= 48 * 1024, row


def test_warming(subtests: pytest.Subtests, record_property: Callable) -> None:
    """What is compiled at load is what a model asks for; how many kernels that is."""
    inputs = unchanged.inputs_of((*INPUTS, COMPILE, WARMING), sys.version, unchanged.packages("triton", "torch"))
    if unchanged.passed_before("triton warming", inputs, record_property):
        return
    cases, _ = run_nested(subtests, WARMING, environment=compiling())
    unchanged.passed("triton warming", inputs, len(cases))
