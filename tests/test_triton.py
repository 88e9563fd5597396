"""The Triton kernels in Triton's interpreter: tests/triton_interpreter.py, in the process of its own that it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
from cuda_shim.build import INPUTS as SHIM
from helpers import unchanged
from helpers.nested import run_nested

INPUTS = ("kernels/triton/*.py", *SHIM, "amq/kernels/*.py", "amq/packing.py", "amq/formats.py")
TESTS = ("tests/triton_interpreter.py", "tests/helpers/packed.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_in_the_interpreter(subtests: pytest.Subtests, record_property: Callable) -> None:
    inputs = unchanged.inputs_of((*INPUTS, *TESTS), sys.version, unchanged.packages("triton", "torch", "numpy"))
    if unchanged.passed_before("triton interpreter", inputs, record_property):
        return
    cases, _ = run_nested(subtests, "tests/triton_interpreter.py", environment=os.environ | {"TRITON_INTERPRET": "1"})
    unchanged.passed("triton interpreter", inputs, len(cases))
