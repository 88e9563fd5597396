"""The import order of design.md, and no bit-width outside amq/formats.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    *(
        "errors",
        "formats",
        "rotation",
        "packing",
        "util",
        "model",
        "configuration",
        "checkpoint",
        "kernels",
        "integrations",
    ),
    *("runtime", "quantize", "proxy", "search", "report", "eval", "export", "split", "bench", "serve", "generate"),
    "cli",
)
"""From the top of the house down: a folder or file of amq/ imports only what stands before it."""
ENTRIES = {"__init__", "__main__"}
"""Files of a stage that may import any other: what users call, `python -m amq.search` and `amq.search(...)`."""
NATIVE = {"_cpu", "_triton"}
SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".py"}
WEIGHT_FREE = {"run", "settings"}  # the files of amq/search that may know models and quantizers


def sources() -> list[Path]:
    return sorted((ROOT / "amq").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module if node.module != "amq" else f"amq.{node.names[0].name}")
    return {m for m in found if m == "amq" or m.startswith("amq.")}


def test_every_folder_is_a_layer():
    found = {path.relative_to(ROOT / "amq").parts[0].removesuffix(".py") for path in sources()} - {"__init__"}
    assert found == set(LAYERS)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_down_only(path):
    me = path.relative_to(ROOT / "amq").with_suffix("").parts[0]
    if path.stem in ENTRIES:
        return
    for name in imports(path):
        other = name.partition(".")[2].partition(".")[0]
        if other and other not in NATIVE and name != "amq.__version__":
            assert LAYERS.index(other) <= LAYERS.index(me), f"{path} (layer {me}) imports {name}, which stands below it"


@pytest.mark.parametrize("path", sorted((ROOT / "amq" / "search").rglob("*.py")), ids=lambda p: p.name)
def test_search_never_sees_a_weight(path):
    if path.stem in WEIGHT_FREE:
        return
    touching = ("amq.model.open", "amq.quantize", "amq.proxy", "amq.packing", "amq.kernels")
    assert not [name for name in imports(path) if name.startswith(touching)]
    assert not re.search(r"^import torch|^from torch", path.read_text(), re.M)


def test_no_bit_width_outside_the_records() -> None:
    literal = re.compile(r"\bn?bits\s*==\s*\d|\[\s*2\s*,\s*3\s*,\s*4\s*\]|levels\s*==\s*\d+\b(?!\s*<<)")
    native = [p for folder in ("csrc", "kernels") for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES]
    for path in [*sources(), *native]:
        found = literal.search(path.read_text())
        assert not found, f"{path.relative_to(ROOT)} spells a bit-width: {found[0]}"


def test_importing_amq_loads_no_heavy_package():
    import subprocess
    import sys

    code = (
        "import sys, amq, amq.kernels.ops, amq.quantize.bank, amq.runtime; "  # with what a GPU machine has
        "heavy = {'hqq', 'pymoo', 'sklearn', 'altair', 'vl_convert', 'datasets', 'rich', 'msgspec', 'gguf'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_files_and_functions_fit_their_limits():
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path} is over 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{path}: {node.name} is {lines} lines long"


def test_tests_share_helpers_and_not_each_other() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) test_", text, re.M), f"{path} imports another file of tests"
        assert "sys.path" + "." not in text, f"{path}: pytest.ini's pythonpath, or helpers.processes.python_path"


def test_slow_files_exist() -> None:
    from helpers.slow import SLOW

    assert not SLOW - {path.stem for path in (ROOT / "tests").glob("test_*.py")}
