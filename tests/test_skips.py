"""The gate of skips: what it lets pass, and that it fails a run, with pytest-xdist too, whatever else passed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import python_path
from helpers.skips import CI, fault_of

CONFTEST = """
from helpers.skips import SkipGate
def pytest_configure(config):
    config.pluginmanager.register(SkipGate(config))
"""
RIGHT = {
    "test_foreseen": "import pytest\ndef test_one():\n    pytest.skip('for the environment of `make`')\n",
    "test_passes": "import pytest\ndef test_one():\n    pass\ndef test_other():\n    pytest.xfail('not yet')\n",
}
WRONG = {
    "test_unknown": "import pytest\ndef test_one():\n    pytest.skip('it is Tuesday')\n",
    "test_there": "import pytest\ndef test_one():\n    pytest.skip('needs fork')\n",
    "test_module": "import pytest\npytest.skip('it is Tuesday', allow_module_level=True)\n",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("wrong", (False, True), ids=("right", "wrong"))
@pytest.mark.parametrize("processes", ("0", "2"))
def test_a_wrong_skip_fails_the_run(processes: str, wrong: bool, tmp_path: Path) -> None:
    files = {"conftest": CONFTEST, **RIGHT, **(WRONG if wrong else {})}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", processes, "-p", "no:cacheprovider", "--rootdir", tmp_path]
    result = subprocess.run(
        [*command, tmp_path], cwd=tmp_path, env=outer | python_path("tests"), capture_output=True, text=True
    )
    assert result.returncode == (1 if wrong else 0), result.stdout + result.stderr
    assert "1 passed" in result.stdout and "1 xfailed" in result.stdout
    for name in (*RIGHT, *WRONG):
        assert (f"WRONG SKIP {name}.py" in result.stdout) == (wrong and name in WRONG), result.stdout


def test_no_browser_is_a_skip_for_developers_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(CI, raising=False)
    assert fault_of("needs a Chromium browser on PATH") == ""
    monkeypatch.setenv(CI, "1")
    assert fault_of("needs a Chromium browser on PATH")
