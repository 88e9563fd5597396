"""The import order of design.md, and no bit-width outside the format files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANKS = {
    "amq.errors": 0, "amq.formats": 0,
    "amq.files": 1, "amq.folders": 1, "amq.model_files": 1, "amq.records": 1, "amq.tensors": 1, "amq.temporary": 1,
    "amq.progress": 1, "amq.threads": 1, "amq.settings": 1, "amq.losses": 1, "amq.machine": 1,
    "amq.linears": 1, "amq.packing": 1, "amq.data": 1, "amq.blocks": 1, "amq.configuration": 1,
    "amq.limits": 1, "amq.weight_files": 1, "amq.tensor_stream": 1,
    "amq.gguf_file": 1, "amq.gguf_rope": 1, "amq.gguf_config": 1,
    "amq.checkpoint": 2, "amq.gguf_convert": 2, "amq.models": 2,
    "amq.native": 2, "amq.quantizers": 2, "amq.calibration": 2, "amq.perplexity": 2, "amq.gpu": 2, "amq.backends": 2,
    "amq.usable": 2,
    "amq.bank": 3, "amq.ops": 3, "amq.quantized_linear": 3,
    "amq.quantized_embedding": 3,
    "amq.swap": 4, "amq.evaluator": 4, "amq.fisher": 4, "amq.hf": 4,
    "amq.search": 5, "amq.opening": 5,
    "amq.quantize": 6, "amq.eval": 7, "amq.export": 6,
    "amq.runtime": 7, "amq.generate": 8, "amq.serve": 8, "amq.bench": 8,
    "amq.cli": 9,
}  # fmt: skip
SAME_RANK = {  # within a rank: who may import whom
    "amq.files": {"amq.temporary"}, "amq.records": {"amq.files"}, "amq.tensors": {"amq.files"},
    "amq.settings": {"amq.files"}, "amq.linears": {"amq.records"}, "amq.blocks": {"amq.linears"},
    "amq.folders": {"amq.files", "amq.temporary"}, "amq.model_files": {"amq.files"},
    "amq.models": {"amq.files", "amq.records", "amq.gguf_convert"}, "amq.gguf_convert": {"amq.checkpoint"},
    "amq.weight_files": {"amq.records"}, "amq.tensor_stream": {"amq.files"}, "amq.gguf_file": {"amq.records"},
    "amq.gguf_config": {"amq.gguf_file", "amq.gguf_rope", "amq.records"},
    "amq.configuration": {"amq.linears", "amq.files", "amq.records"},
    "amq.backends": {"amq.native", "amq.gpu"}, "amq.evaluator": {"amq.swap"}, "amq.bank": {"amq.checkpoint"},
    "amq.quantized_linear": {"amq.ops", "amq.checkpoint"}, "amq.quantized_embedding": {"amq.quantized_linear"},
    "amq.formats": {"amq.errors"}, "amq.quantizers": set(), "amq.data": set(),
}  # fmt: skip
SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".py"}
WEIGHT_FREE = {"run", "settings"}  # the files of amq/search that may know models and quantizers


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


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


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_lower_ranks_only(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    me = package_of(module)
    if me == "amq":
        return  # the package root exposes stages lazily
    assert me in RANKS, f"{me} has no rank: add it to RANKS, and say in docs/decisions.md why it is there"
    for name in imports(path):
        other = package_of(name)
        if other in ("amq", me, "amq._cpu", "amq._triton") or name == "amq.__version__":
            continue
        allowed = RANKS[other] < RANKS[me] or other in SAME_RANK.get(me, set())
        assert allowed, f"{module} (rank {RANKS[me]}) imports {name} (rank {RANKS[other]})"


@pytest.mark.parametrize("path", sorted((ROOT / "amq" / "search").rglob("*.py")), ids=lambda p: p.name)
def test_search_never_sees_a_weight(path):
    if path.stem in WEIGHT_FREE:
        return
    touching = {"amq.models", "amq.bank", "amq.evaluator", "amq.fisher", "amq.quantizers", "amq.packing", "amq.native"}
    assert not imports(path) & touching
    assert not re.search(r"^import torch|^from torch", path.read_text(), re.M)


def test_no_bit_width_outside_the_format_files():
    literal = re.compile(r"\bn?bits\s*==\s*\d|\[\s*2\s*,\s*3\s*,\s*4\s*\]|levels\s*==\s*\d+\b(?!\s*<<)")
    formats = re.compile(r"int\d+\.(cuh|py)")
    native = [p for folder in ("csrc", "kernels") for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES]
    for path in [*sources(), *(p for p in native if not formats.fullmatch(p.name))]:
        found = literal.search(path.read_text())
        assert not found, f"{path.relative_to(ROOT)} spells a bit-width: {found[0]}"


def test_importing_amq_loads_no_heavy_package():
    import subprocess
    import sys

    code = (
        "import sys, amq, amq.packing, amq.native, amq.ops, amq.bank, amq.runtime; "  # with what a GPU machine has
        "heavy = {'hqq', 'pymoo', 'sklearn', 'matplotlib', 'plotly', 'datasets', 'rich', 'msgspec', 'gguf'}; "
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
