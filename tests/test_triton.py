"""The Triton kernels in Triton's interpreter: tests/triton_interpreter.py, in the process of its own that it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import unchanged

INPUTS = ("kernels/triton/*.py", "amq/kernels/*.py", "amq/packing.py", "amq/formats.py", "amq/kernels/backends.py")
TESTS = ("tests/triton_interpreter.py", "tests/test_native.py", "tests/helpers/reference.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_in_the_interpreter(record_property: Callable) -> None:
    inputs = unchanged.inputs_of((*INPUTS, *TESTS), sys.version, unchanged.packages("triton", "torch", "numpy"))
    if unchanged.passed_before("triton interpreter", inputs, record_property):
        return
    tests = Path(__file__).with_name("triton_interpreter.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests.parents[1])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout.splitlines()[-1], result.stdout[-500:]
    unchanged.passed("triton interpreter", inputs)
