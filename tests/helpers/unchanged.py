"""Builds and long sweeps whose inputs have not changed since they last passed: used again, and not run again.

What a compiler makes of the same files with the same flags is the same, and so is what a sanitizer finds in it. Both
are kept by a hash of their inputs in the checkout's `.pytest_cache`; a fresh clone has none and runs everything, and so
does `AMQ_SWEEPS=all`. conftest.py says at the end of a run what was not run again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".pytest_cache" / "amq"
PROPERTY = "unchanged"
"""Of a test's report: what it has not run again."""


def inputs_of(patterns: Iterable[str], *facts: str) -> str:
    """A hash of the files of `patterns` (globs from the root; at least one file each) and of `facts` about tools."""
    digest = hashlib.blake2b("\0".join(facts).encode(), digest_size=16)
    for pattern in patterns:
        paths = sorted(path for path in ROOT.glob(pattern) if path.is_file())
        assert paths, f"no file is {pattern}"
        for path in paths:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT)} {len(content)} ".encode() + content)
    return digest.hexdigest()


@cache
def compiler() -> str:
    """Version and target of g++, or nothing."""
    gcc = shutil.which("g++")
    return "" if gcc is None else subprocess.run([gcc, "-v"], capture_output=True, text=True, check=True).stderr


def packages(*names: str) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def built(name: str, inputs: str, build: Callable[[Path], None]) -> Path:
    """The folder that `build` has filled for these inputs, now or before; older ones of the same name go."""
    folder = FOLDER / f"{name}-{inputs}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f".{name}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes that test at once would both build
        if folder.is_dir() and not _everything():
            return folder
        build(Path(temporary) / "new")
        for old in FOLDER.glob(f"{name}-*"):
            shutil.rmtree(old, ignore_errors=True)
        (Path(temporary) / "new").rename(folder)
    return folder


def passed_before(name: str, inputs: str, record_property: Callable[[str, object], None]) -> bool:
    """Whether the sweep has passed with these inputs; if so, its report says so."""
    path = FOLDER / f"{name}.json"
    if _everything() or not path.is_file():
        return False
    stamp = json.loads(path.read_text())
    if stamp.get("inputs") != inputs or "cases" not in stamp:
        return False
    record_property(PROPERTY, f"{name}: {stamp['cases']} cases passed {stamp['date']} with these very inputs")
    return True


def passed(name: str, inputs: str, cases: int) -> None:
    """Notes that the sweep has passed, all its cases."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    with tempfile.NamedTemporaryFile("w", dir=FOLDER, delete=False) as file:
        file.write(json.dumps({"inputs": inputs, "date": now, "cases": cases}))
    Path(file.name).rename(FOLDER / f"{name}.json")


def _everything() -> bool:
    return os.environ.get("AMQ_SWEEPS") == "all"
