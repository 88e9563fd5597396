"""Every file of figures says which commit, machine and versions made it, and says it in one way."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import provenance
import pytest
from helpers.processes import python_path

from amq.util import machine
from amq.util.machine import cpu_name
from amq.util.provenance import result_name

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ITS_OWN = {
    "provenance.py": "the writer itself",
    "conftest.py": "pytest-benchmark writes; the hook adds the provenance",
    "gpu/common.py": "suite.json has a section for the whole suite",
    "gpu/plot.py": "writes suite.json again, for people",
    "gpu/correctness.py": "has the section of suite.json in its file",
    "gpu/roofline.py": "a source file for nvcc",
    "attacks/bench.py": "a chat template of a copy of the checkpoint",
    "serve_lm_eval.py": "the task that lm-eval reads",
    "export_matrix.py": "the tokens that its loaders read",
    "random_llama.py": "makes a model",
    "large.py": "makes a model",
    "split.py": "what a run was asked for, beside it",
}
"""Files that may write by other means than `write_results`, and why."""
WRITERS = {"write_json", "dump", "write_text"}


def calls(path: Path) -> set[str]:
    """Names of the functions and methods that a file calls."""
    functions = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {getattr(f, "attr", getattr(f, "id", "")) for f in functions}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("AMQ_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_checkout_knows_its_commit_and_whether_files_differ(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "results.json").write_text("a new file is no change of what ran")
    assert provenance.checkout(repository) == (commit, False)
    (repository / "file").write_text("2")
    assert provenance.checkout(repository) == (commit, True)


def test_a_copy_without_git_is_told_or_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = repository / "copy"
    inside.mkdir()
    assert provenance.checkout(inside) == (None, None)  # and not the commit of what it lies in
    monkeypatch.setenv("AMQ_COMMIT", "abc-dirty")
    assert provenance.checkout(inside) == ("abc", True)
    monkeypatch.setenv("AMQ_COMMIT", "abc")
    assert provenance.checkout(repository) == ("abc", False)


@pytest.mark.parametrize(
    "processor, called",
    [
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "gemv-intel-xeon-platinum-8481c"),
        ("AMD EPYC (family 26, model 2)", "gemv-amd-epyc-family-26-model-2"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "gemv-amd-ryzen-9-7950x-16-core"),
        ("NVIDIA H200", "gemv-nvidia-h200"),
    ],
)
def test_kept_files_are_named_by_their_processor(processor: str, called: str) -> None:
    name = result_name("gemv", processor)
    assert name.startswith(f"{called}-20") and name.endswith(".json") and len(name) == len(called) + 16


def test_a_benchmark_can_ask_for_the_name(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "provenance.py"), "gemv"]
    shown = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **python_path()}
    ).stdout.strip()
    assert Path(shown).parent == BENCHMARKS / "results" and Path(shown).name == result_name("gemv", cpu_name())


@pytest.mark.parametrize(
    "lines, name",
    [
        ("model\t: 2\nmodel name\t: AMD EPYC\ncpu family\t: 26\n", "AMD EPYC (family 26, model 2)"),
        ("cpu family\t: 6\nmodel\t: 1\nmodel name\t: Xeon 8481C\n", "Xeon 8481C"),
        ("cpu family\t: 6\nmodel\t: 143\nmodel name\t: Xeon CPU @ 2.7GHz\n", "Xeon CPU @ 2.7GHz (family 6, model 143)"),
    ],
)
def test_a_processor_without_a_number_has_family_and_model(
    lines: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(lines)
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_name() == name


def test_results_carry_it(tmp_path: Path) -> None:
    provenance.write_results(tmp_path / "r.json", {"rows": [1]})
    content = json.loads((tmp_path / "r.json").read_text())
    assert content.pop("rows") == [1] and set(content) == {"provenance"}
    made = content["provenance"]
    assert set(made) == {"commit", "dirty", "date", "machine", "versions"}
    assert made["versions"]["torch"] and made["versions"]["python"] and "not-installed" not in made["versions"]
    assert made["machine"]["processor"] and made["machine"]["cores"] >= 1
    assert made["date"].endswith("Z") and len(made["date"]) == 20


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda p: str(p.relative_to(BENCHMARKS)))
def test_figures_are_written_by_write_results_alone(path: Path) -> None:
    if str(path.relative_to(BENCHMARKS)) not in ITS_OWN:
        assert not calls(path) & WRITERS, f"{path} writes past provenance.write_results"


@pytest.mark.parametrize("name", ITS_OWN)
def test_the_exceptions_are_still_there(name: str) -> None:
    assert (BENCHMARKS / name).is_file()
