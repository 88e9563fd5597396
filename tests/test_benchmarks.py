"""The benchmarks run (at tiny sizes), so that they cannot rot. Their figures are measured elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_benchmarks_smoke(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--smoke", "-p", "no:cacheprovider"]
    environment = {**os.environ, "AMQ_CACHE": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_compare_solvers_runs_from_its_own_table(tmp_path):
    """The comparison script on a tiny model: every method, one seed."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import compare_solvers
    from tiny_models import byte_tokenizer, tiny_llama

    assert {m["solver"] for m in compare_solvers.METHODS.values()} == {"additive", "paper", "random"}
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    command = [sys.executable, "benchmarks/compare_solvers.py", "--model", str(folder), "--seeds", "0",
               "--methods", '"additive, Fisher","random","paper, scaled to 20"', "--json",
               str(tmp_path / "c.json")]  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "AMQ_CACHE": str(tmp_path)}
    )
    assert result.returncode == 0, result.stderr
    assert "| additive, Fisher | 10 |" in result.stdout
