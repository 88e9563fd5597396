"""Runs of pytest inside a test: their cases are reported one by one, and a failure or a crash among them is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import python_path

OUTER = """
import os
from helpers.nested import run_nested
def test_outer(subtests):
    run_nested(subtests, {inner!r}, environment=os.environ)
"""
INNER = {
    "fails": ("def test_one():\n    assert 1 == 2, 'one is not two'\n", "one is not two"),
    "dies": ("import os\n\ndef test_one():\n    os._exit(3)\n", "pytest ended with 3"),
    "is empty": ("", "pytest ended with 5"),
    "passes": ("def test_one():\n    pass\n", "1 passed, 2 subtests passed"),
}


@pytest.mark.parametrize("kind", INNER)
def test_a_failure_inside_is_one_outside(kind: str, tmp_path: Path) -> None:
    (tmp_path / "test_outer.py").write_text(OUTER.format(inner=str(tmp_path / "inner.py")))
    text, said = INNER[kind]
    (tmp_path / "inner.py").write_text(text + ("\ndef test_other():\n    pass\n" if text else ""))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= python_path("tests")
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == (0 if kind == "passes" else 1), result.stdout + result.stderr
    assert said in result.stdout
    if kind == "fails":
        assert "inner::test_one" in result.stdout and "1 subtests passed" in result.stdout
