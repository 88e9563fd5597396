"""What is declared is what is imported; the source distribution builds; the base install runs a checkpoint alone."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import unchanged
from helpers.setup_file import setup_names

from amq.formats import get_format
from amq.util.extras import DISTRIBUTION, EXTRAS, install_hint

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    **{"model": ["models", "datasets"], "runtime": ["models", "serve"], "kernels": ["gpu"], "eval": ["tasks"]},
    **{
        "integrations": ["models"],
        "proxy": ["models"],
        "quantize": ["search"],
        "search": ["search"],
        "report": ["report"],
    },
    **{"export": ["export"], "serve": ["serve"], "split": ["split"], "bench": ["models"]},
}
"""Extras whose packages a folder of amq/ may import; any other folder, and any file of amq/, has the base alone."""
STAGES = {"integrations", "quantize", "search", "report", "export", "serve", "split"}
"""Folders that may import their extra's packages at once. Others do so inside of a function: they are of the base."""
PEER = "a peer to be measured, and what is missing is left out with its line of pip"
FOREIGN = {
    "auto_round": "wants --no-deps beside the CPU build of torch, and its error says so",
    **dict.fromkeys(("llama_cpp", "ik_llama_cpp", "xllamacpp"), PEER),
}
NOT_IMPORTED = {"accelerate": "lm-eval's models import it"}
MODULES = {"scikit-learn": "sklearn", "vl-convert-python": "vl_convert"}
"""Of distributions whose module has another name."""
COPIED = ("amq", "csrc", "kernels", "tests", "CMakeLists.txt", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md")
NATIVE = (
    "csrc/**/*.cpp",
    "csrc/**/*.h",
    "CMakeLists.txt",
    "MANIFEST.in",
    "pyproject.toml",
    "setup.py",
    "amq/formats.py",
)
COMPILE = "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -O0 -o <OBJECT> -c <SOURCE>"


def modules(requirements: list[str]) -> set[str]:
    """The modules that requirements of setup.py install."""
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def third_party(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether importing the file imports it) of a file of amq/; what only a type checker reads is left out."""
    tree = ast.parse(path.read_text())
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for guard in guards for inner in ast.walk(guard)}
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [node.module]
        for name in found if id(node) not in skipped else ():
            module = name.partition(".")[0]
            if module not in sys.stdlib_module_names | {"amq"}:
                yield module, id(node) not in lazy


def test_every_import_is_declared() -> None:
    names = setup_names()
    base, extras = modules(names["INSTALL_REQUIRES"]), names["EXTRAS_REQUIRE"]
    assert tuple(extras) == EXTRAS and names["read_constant"]("util/extras.py", "DISTRIBUTION") == DISTRIBUTION
    imported: set[str] = set()
    for path in sorted((ROOT / "amq").rglob("*.py")):
        folder = path.relative_to(ROOT / "amq").parts[0]
        of_folder = {module for extra in ALLOWED.get(folder, ()) for module in modules(extras[extra])}
        for module, at_once in third_party(path):
            imported.add(module)
            allowed = base if at_once and folder not in STAGES else base | of_folder | FOREIGN.keys()
            assert module in allowed, f"{path.relative_to(ROOT)} imports {module}; expected one of {sorted(allowed)}"
    declared = base | {module for extra in extras if extra != "test" for module in modules(extras[extra])}
    assert declared - imported == NOT_IMPORTED.keys(), "setup.py requires what nothing imports"
    assert FOREIGN.keys() <= imported, "the reason for an import that is gone"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy of this checkout, without what earlier builds left here."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_cuda_failed.txt", "*.egg-info")
    for name in ("setup.py", "pyproject.toml", *COPIED):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    run([sys.executable, "-c", code], cwd=copy)
    (found,) = out.glob("*.tar.gz")
    return found


def without_pythonpath() -> dict[str, str]:
    """The environment, but for what could show a process the checkout instead of what is installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(command: list[str], **options: Any) -> str:
    result = subprocess.run(command, capture_output=True, text=True, **{"env": without_pythonpath(), **options})
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def files_of(*folders: str) -> set[str]:
    """Of this checkout, but for what builds leave in it."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    left = {".so", ".pyc"}
    return {str(p.relative_to(ROOT)) for p in paths if p.suffix not in left and p.name != "_cuda_failed.txt"}


def held_by(source: Path) -> set[str]:
    with tarfile.open(source) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def test_the_source_distribution_holds_what_builds_the_package(source: Path) -> None:
    held = held_by(source)
    assert source.name.startswith(DISTRIBUTION.replace("-", "_"))
    wanted = files_of("amq", "csrc", "kernels") | {
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }
    assert not wanted - held, "files that the source distribution lacks: MANIFEST.in"
    assert not [name for name in held if name.startswith("tests/") or name.endswith((".so", ".pyc"))]


def test_a_wheel_of_the_source_distribution_runs(source: Path, tmp_path: Path, record_property: Callable) -> None:
    """Every file is compiled, but for one format and not made fast: `make install` has done that with the same files.

    Done again only where something that is compiled or packed has changed; of amq's Python files, a name.
    """
    if shutil.which("g++") is None:
        pytest.skip("compiling needs g++")
    facts = (
        *sorted(files_of("amq", "kernels")),
        unchanged.compiler(),
        sys.version,
        unchanged.packages("setuptools", "pybind11"),
    )
    inputs = unchanged.inputs_of((*NATIVE, "tests/test_package.py"), *facts)
    if unchanged.passed_before("wheel", inputs, record_property):
        return
    fmt = get_format("int4")
    record = f"X({fmt.name}, {fmt.levels}, {fmt.unit_codes}, {fmt.unit_bytes})"
    (tmp_path / "amq_formats.h").write_text(f"#pragma once\n#define AMQ_FORMATS(X) {record}\n")
    quick = f"-DAMQ_CUDA=OFF -DAMQ_FORMATS_DIR={tmp_path} '-DCMAKE_CXX_COMPILE_OBJECT={COMPILE}'"
    built, environment = tmp_path / "wheel", {**without_pythonpath(), "CMAKE_ARGS": quick}
    pip = ["-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    wheel = [sys.executable, *pip, "wheel", *offline, "--no-build-isolation", "-w", str(built), str(source)]
    run(wheel, cwd=tmp_path, env=environment)
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    (own,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text("\n".join(site.getsitepackages()))  # torch and the rest; no .pth of theirs
    run([str(python), *pip, "install", *offline, *map(str, built.glob("*.whl"))], cwd=tmp_path)
    code = "import amq; from importlib.metadata import version; print(amq.__file__, amq.__version__, version(%r))"
    file, *versions = run([str(python), "-c", code % DISTRIBUTION], cwd=tmp_path).split()
    assert Path(file).is_relative_to(own) and len(set(versions)) == 1
    installed = {str(path.relative_to(own)) for path in (own / "amq").rglob("*")}
    expected = {name for name in held_by(source) if name.startswith("amq/")}
    assert expected <= installed, "files that a wheel lacks: package_data of setup.py"
    listed = run([str(tmp_path / "fresh" / "bin" / "amq"), "formats"], cwd=tmp_path)
    assert re.search(r"^cpu +portable .* yes .*format .* is not compiled into amq._cpu", listed, re.MULTILINE), listed
    unchanged.passed("wheel", inputs, cases=1)


COMMANDS = {
    "": ("amq.generate", "{checkpoint}", "--prompt", "hello", "--max-new-tokens", "4"),
    "models": ("amq.generate", "{checkpoint}", "--prompt", "hello", "--dtype", "bfloat16"),
    "search": ("amq.search.__main__", "smollm2", "--target-bits", "4", "--output", "{new}"),
    "export": ("amq.export.__main__", "{checkpoint}", "--to", "recipe", "--output", "{new}"),
    "serve": ("amq.serve.__main__", "{checkpoint}"),
    "tasks": ("amq.eval.__main__", "{checkpoint}", "--tasks", "arc_easy"),
}
"""{extra: a command that needs it}"""
BASE_ALONE = """
import contextlib, importlib, io, json, sys
from importlib.machinery import PathFinder

class Base(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Base
from amq.util.settings import run_command
results = {{}}
for extra, (module, *arguments) in {commands!r}.items():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = run_command(importlib.import_module(module).main, arguments)
    results[extra] = code, said.getvalue()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def base_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """{extra: status and stderr of its command} in a process that can import what the base requires, and no extra."""
    from helpers.checkpoints import tiny_checkpoint
    from helpers.tiny_models import tiny_llama

    names, out = setup_names(), tmp_path_factory.mktemp("out")
    extras = {module for extra in names["EXTRAS_REQUIRE"].values() for module in modules(extra)}
    missing = (extras | FOREIGN.keys()) - modules(names["INSTALL_REQUIRES"]) - {"packaging"}  # huggingface_hub's too
    checkpoint = tiny_checkpoint(tiny_llama(), out / "checkpoint")
    commands = {
        extra: [argument.format(checkpoint=checkpoint, new=out / "new") for argument in command]
        for extra, command in COMMANDS.items()
    }
    code = BASE_ALONE.format(missing=missing, commands=commands)
    return json.loads(run([sys.executable, "-c", code], cwd=ROOT, timeout=900).splitlines()[-1])


def test_the_base_runs_a_checkpoint(base_alone: dict[str, tuple[int, str]]) -> None:
    status, said = base_alone[""]
    assert status == 0 and "native engine (llama)" in said, said


@pytest.mark.parametrize("extra", [extra for extra in COMMANDS if extra])
def test_a_missing_extra_is_one_line(extra: str, base_alone: dict[str, tuple[int, str]]) -> None:
    status, said = base_alone[extra]
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert f'needs the extra "{extra}"' in said and said.rstrip().endswith(install_hint(extra))
