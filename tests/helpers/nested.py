"""Runs of pytest inside a test, for what needs a process of its own. Each of their cases is a subtest of that test."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_nested(subtests: pytest.Subtests, *arguments: str, environment: Mapping[str, str]) -> tuple[list[str], str]:
    """Runs pytest with `arguments` from the root of the checkout; returns the names of the cases, and what stderr said.

    Fails where the run does, or where it has no case.
    """
    with tempfile.TemporaryDirectory(prefix="amq-nested-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    names = [f"{case.get('classname')}::{case.get('name')}" for case in cases]
    for name, case in zip(names, cases, strict=True):
        with subtests.test(msg=name):
            _repeat(case)
    output = result.stdout[-6000:] + result.stderr[-6000:]
    assert result.returncode == 0, f"pytest ended with {result.returncode}\n{output}"
    assert names, f"no case ran\n{output}"
    return names, result.stderr


def _repeat(case: ElementTree.Element) -> None:
    """Ends as the case did."""
    for outcome in case:
        if outcome.tag == "skipped":
            pytest.skip(outcome.get("message", ""))
        if outcome.tag in ("failure", "error"):
            pytest.fail(f"{outcome.get('message', '')}\n{outcome.text or ''}"[-6000:], pytrace=False)
