"""setup.py, read without being run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


def setup_names() -> dict[str, Any]:
    """The names of setup.py, without its call of setup()."""
    source = SETUP.read_text().partition("\nPACKAGES, PACKAGE_DIR")[0]
    names: dict[str, Any] = {"__file__": str(SETUP), "__name__": "setup_py"}
    modules = dict(sys.modules)
    exec(compile(source, str(SETUP), "exec"), names)
    assert modules["amq"] is sys.modules["amq"]
    return names
