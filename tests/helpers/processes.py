"""Children of a test: where their Python looks for modules."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_path(*folders: str) -> dict[str, str]:
    """The environment variable PYTHONPATH: this checkout, and `folders` below it, such as `tests`."""
    return {"PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("", *folders))}
