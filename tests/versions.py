"""The tests that touch transformers, with the oldest version that setup.py promises and with the newest there is.

    make test-versions

Each version gets an environment of its own over the one of `make` (.venv), which lends it everything else, torch above
all: only transformers and what it wants otherwise are installed. They lie in .venv/versions and are used again. A
version that is .venv's own has been tested by `make test`, and is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import venv
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    *("torch_engine", "torch_batch", "torch_kept", "torch_sequences", "hf", "models", "experts", "blocks", "linears"),
    *("shape", "runtime", "torch_attention", "torch_captured", "graph_capture", "share"),
)
"""Files of tests/ that load, run or save models in transformers' own classes."""
VARIABLE = "AMQ_TEST_TRANSFORMERS"
"""Names the version that the tests must find (tests/test_versions.py)."""


def promised() -> str:
    """The lower bound of transformers in setup.py."""
    return re.search(r'"transformers>=([\d.]+)', (ROOT / "setup.py").read_text())[1]


def environment_of(folder: Path, specifier: str) -> Path:
    """The Python of an environment in `folder` over this one, with transformers as `specifier` says."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (base,) = Path(sys.prefix).glob("lib/python*/site-packages")
        (own / "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    command = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", f"transformers{specifier}"]
    subprocess.run(command, check=True)
    return python


def installed(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('transformers'))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    failed = []
    for name, specifier in (("oldest", f"=={promised()}"), ("newest", "")):
        start = time.monotonic()
        python = environment_of(Path(sys.prefix) / "versions" / name, specifier)
        found = installed(python)
        if found == version("transformers"):
            print(f"{name}: transformers {found}, which `make test` has tested", flush=True)
            continue
        print(f"{name}: transformers {found}", flush=True)
        files = [str(ROOT / "tests" / f"test_{file}.py") for file in ("versions", *TESTS)]
        command = [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", *files]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, VARIABLE: found}).returncode
        print(f"{name}: transformers {found}: {'failed' if code else 'passed'}, {time.monotonic() - start:.0f} s")
        failed += [found] if code else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
