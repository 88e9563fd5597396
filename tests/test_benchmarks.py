"""The benchmarks run (at tiny sizes), so that they cannot rot. Their figures are measured elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import compare_solvers
import pytest
import quality
from helpers.tiny_models import byte_tokenizer, tiny_llama
from provenance import checkout

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
"""For commands that run pytest: pytest-benchmark measures nothing in what looks like a worker of pytest-xdist."""


def test_benchmarks_smoke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--smoke", "-p", "no:cacheprovider"]
    environment = {**ENVIRONMENT, "AMQ_CACHE": str(tmp_path), "AMQ_BENCH_PEERS": "none"}  # peers: see below
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_compare_solvers_runs_from_its_own_table(tmp_path: Path) -> None:
    """The comparison script on a tiny model: every method, one seed."""
    from helpers.tiny_models import byte_tokenizer, tiny_llama

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
    assert json.loads((tmp_path / "c.json").read_text())["provenance"]["commit"] == checkout(ROOT)[0]


def test_gemv_smoke_against_the_peers_that_are_installed_and_its_picture(tmp_path: Path) -> None:
    """Each peer computes the right product or says why it cannot run; what the picture needs is in the JSON."""
    results, picture = tmp_path / "gemv.json", tmp_path / "gemv.png"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_gemv.py", "--smoke", "-p", "no:cacheprovider",
               "-k", "M1-int8 and 64x512 and cold]", f"--benchmark-json={results}"]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ": failed: " not in result.stdout, result.stdout
    written = json.loads(results.read_text())
    assert written["provenance"]["commit"] == checkout(ROOT)[0] and written["provenance"]["versions"]["torch"]
    cases = [b["extra_info"] for b in written["benchmarks"]]
    assert {case["format"] for case in cases} >= {"int2", "int3", "int4"}
    for case in cases:
        assert case["versus"]["torch-float32"] > 0 and case["bandwidth_share"] > 0 and case["bytes"] > 0
        rivals = set(case["versus"]) - {"torch-float32", "torch-bfloat16"}
        assert case.get("best_peer") in (rivals or {None})
    command = [sys.executable, "benchmarks/plot_gemv.py", str(results), str(picture), "--shapes", "64x512"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert picture.stat().st_size > 10_000


def test_quality_table_goes_on_with_what_is_missing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two methods on a tiny model; a second call measures nothing that is there and adds the third."""
    folder, results = tmp_path / "model", tmp_path / "quality.json"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(15_000)))

    def run(methods: str) -> str:
        arguments = f"quality --model {folder} --uniform int3 --group-size 32 --method {methods} --text {text} "
        arguments += f"--calibration {text} --windows 2 --max-tokens 1024 --json {results}"
        monkeypatch.setattr(sys, "argv", arguments.split())
        quality.main()
        return capsys.readouterr().out

    run("rtn,awq")
    first = json.loads(results.read_text())["rows"]
    assert [row["method"] for row in first] == ["full", "rtn", "awq"]
    shown = run("rtn,awq,bank")
    rows = json.loads(results.read_text())["rows"]
    assert rows[:3] == first and rows[3]["method"] == "bank" and {"commit", "dirty", "date"} <= rows[3].keys()
    assert "| 32 | 4.000 | uniform int3 |" in shown
