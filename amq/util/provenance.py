"""What made a result, and what a file of it is called: the one place that says so, for everything that keeps figures.

    {"commit", "dirty", "date", "machine": {"processor", "cores", "platform", "threads"},
     "versions": {package: version}}

`commit` is the checkout's, 40 hex digits, or what AMQ_COMMIT says where there is no git (a copy on another machine; it
may end in `-dirty`), else None: an installed package has no checkout. `dirty` is whether files that git tracks differ
from it, None where that is unknown. Nothing is refused: whoever publishes a figure takes it from a file that says
`"dirty": false`.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from amq.util.machine import cpu_name, installed_versions

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "transformers", "peft", "tokenizers", "safetensors", "numpy", "scipy", "hqq", "pymoo"),
    *("gguf", "llama-cpp-python", "xllamacpp", "ik-llama-cpp-python", "onnxruntime", "auto-round-lib"),
    "pytest-benchmark",
)
"""Those whose version may change a figure; what is not installed is left out."""


def provenance() -> dict[str, Any]:
    """What the head of this file describes, for JSON; the commit is that of `started_from`."""
    commit, dirty = started_from()
    return {
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {
            "processor": cpu_name(),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        },
        "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
    }


@functools.cache
def started_from() -> tuple[str | None, bool | None]:
    """`checkout` of this file's, when it was first asked for: a commit made while a long benchmark runs is not what
    runs."""
    return checkout(ROOT)


def result_name(*parts: str) -> str:
    """What a file of figures is called: `bench-smollm2-4bit-amd-epyc-family-26-model-2-2026-12-01.json`.

    parts: what was measured, and last the processor or GPU.
    """
    words = re.sub(r"\((r|tm)\)|@ *[\d.]+ghz|\b(cpu|processor)\b", " ", "-".join(parts).lower())
    return f"{re.sub(r'[^a-z0-9.]+', '-', words).strip('-')}-{datetime.now(timezone.utc):%Y-%m-%d}.json"


def checkout(root: Path) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout whose top folder is `root`; see the head of this file."""
    if told := os.environ.get("AMQ_COMMIT"):
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # a copy that lies inside another project's checkout
        return None, None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return _git(root, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where there is no git, or it fails."""
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
