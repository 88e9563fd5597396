"""Every file of figures says which commit, machine and versions made it, and says it in one way."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import provenance
import pytest

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
