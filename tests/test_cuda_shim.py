"""The CUDA shim itself: its mma, barriers and shuffles are right, and it catches what it is there to catch.

tests/cuda_shim/selftest.cpp has the cases. Each bug is planted in a kernel of its own and must end its process.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_shim.build import ADDRESS, RACES, SHIM, compile_shim

ORDERS = ("forward", "reverse", "random:7")
RIGHT = "mma_f16 mma_bf16 mma_u8_s8 conversions reduction shuffles votes undefined_shared".split()

# What each planted bug must be reported as; the threads of a block are not all at the same place in the first five.
BUGS = {
    "divergent_barrier": r"thread 0 to 39: waits at synchronize \(.*\)\n  thread 40 to 63: returned",
    "two_barriers": r"threads of one group wait at two places:\n.*\n  thread 40: waits at synchronize",
    "extra_round": r"thread 3: waits at shuffle_xor \(.*\)\n  thread 4 to 63: waits at synchronize",
    "early_return": r"thread 37: returned\n  thread 38 to 63: waits at mma f16",
    "partial_warp": r"thread 32 to 47: waits at shuffle_xor",
    "write_past_end": r"AddressSanitizer: heap-buffer-overflow(.*\n)*WRITE of size 4",
    "read_past_end": r"AddressSanitizer: heap-buffer-overflow",
    "shared_past_end": r"AddressSanitizer: global-buffer-overflow",
    "stack_past_end": r"AddressSanitizer: stack-buffer-overflow",
    "misaligned_once": r"misaligned load_once of 16 bytes at 0x.*, block 0, thread 0",
    "misaligned_by_many": r"misaligned load_shared_by_many of 16 bytes",
    "misaligned_pair": r"runtime error: member access within misaligned address .* requires 8 byte alignment",
    "shift_too_far": r"runtime error: shift exponent 64 is too large",
}


@pytest.fixture(scope="module")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(SHIM / "selftest.cpp", tmp_path_factory.mktemp("shim") / "selftest", ADDRESS)


@pytest.fixture(scope="module")
def racing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with ThreadSanitizer."""
    return compile_shim(SHIM / "selftest.cpp", tmp_path_factory.mktemp("races") / "selftest", RACES)


def run(program: Path, *cases: str, order: str = "forward") -> subprocess.CompletedProcess:
    environment = {**os.environ, "AMQ_SHIM_ORDER": order, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, *cases], env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("order", ORDERS)
def test_right_kernels(selftest: Path, order: str) -> None:
    for case in RIGHT:
        result = run(selftest, case, order=order)
        assert result.returncode == 0 and not result.stderr, f"{case}: {result.stderr}"


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs(selftest: Path, bug: str) -> None:
    result = run(selftest, bug)
    assert result.returncode != 0, result.stdout
    assert re.search(BUGS[bug], result.stderr), result.stderr


@pytest.mark.parametrize("bug", ["missing_barrier", "missing_second_barrier", "blocks_share_output"])
def test_order_shows_races(selftest: Path, bug: str) -> None:
    results = [run(selftest, bug, order=order) for order in ORDERS]
    assert all(result.returncode == 0 for result in results), results
    assert len({result.stdout for result in results}) == len(ORDERS)


def test_order_is_checked(selftest: Path) -> None:
    for order in ("backward", "random:", "random:1x"):
        result = run(selftest, "shuffles", order=order)
        assert f"AMQ_SHIM_ORDER: expected forward, reverse or random:SEED, got '{order}'" in result.stderr
        assert result.returncode != 0


@pytest.mark.parametrize("bug", ["missing_barrier", "missing_second_barrier", "harmless_race"])
def test_thread_sanitizer_shows_races(racing: Path, bug: str) -> None:
    result = run(racing, bug)
    assert result.returncode != 0, result.stdout
    assert re.search(rf"WARNING: ThreadSanitizer: data race(.*\n)*.*global '{bug}\(Data\)::value", result.stderr)


def test_thread_sanitizer_accepts_right_kernels(racing: Path) -> None:
    for order in ORDERS:
        result = run(racing, *RIGHT, order=order)
        assert result.returncode == 0 and not result.stderr, result.stderr


def test_switch_of_other_processors(tmp_path: Path) -> None:
    """The one through ucontext, for want of assembly."""
    program = compile_shim(SHIM / "selftest.cpp", tmp_path / "selftest", "-O1 -DCUDA_SHIM_UCONTEXT")
    result = run(program, *RIGHT)
    assert result.returncode == 0, result.stderr
