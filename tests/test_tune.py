"""benchmarks/gpu/tune.py: what it measures is what the launchers use from then on. Nothing is timed here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite needs Triton, if only its interpreter")
from common import Timing
from tune import DENSE_ROWS, Tuner, tune

from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat
from amq.kernels import launch_table as tuning
from amq.kernels import triton

ROOT = Path(__file__).parents[1]
GPU = "Test GPU/2"


class StoppedClock:
    """In place of a GPU: each call of `time` takes what it is told next, in µs, and 5 afterwards; 0 does not fit."""

    smoke, torch, cold_bytes = False, torch.device("cpu"), 1 << 16

    def __init__(self, *times: float) -> None:
        self._times: Iterator[float] = iter(times)

    def time(self, calls: Sequence[Callable[[], object]], launches: int) -> Timing:
        us = next(self._times, 5.0)
        if not us:
            raise AmqError("out of resource: shared memory")
        return Timing(us, us, us, launches)

    def unsupported_reason(self, backend: str, fmt: BitFormat) -> None:
        return None

    def synchronize(self) -> None: ...

    def empty_cache(self) -> None: ...


def test_the_fastest_is_what_the_launchers_use(
    monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of Triton's candidates the third; the second does not fit, and is named."""
    monkeypatch.setattr(tuning, "current_gpu", lambda: GPU)
    entries = tune(Tuner(StoppedClock(3.0, 0.0, 1.0), 16, 128), [1024], [1], [FORMATS["int3"]])
    assert len(entries) == 2
    tuning.save(GPU, entries, {"torch": "0"})
    paper, best = triton.choose(1, 1024, 3), triton.measured(1, 1024, 3)
    assert best != paper and (best.slabs_per_step, best.num_warps) == (paper.slabs_per_step, paper.num_warps)
    assert triton.measured(1, 2048, 3) == triton.choose(1, 2048, 3)
    assert triton.dense_rows() == 2 * DENSE_ROWS[-1]  # equally fast: the gemm keeps everything
    assert "is left out: AmqError: out of resource: shared memory" in capsys.readouterr().out
    tuning._entries.cache_clear()


def test_a_smoke_run_writes_no_table(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu/tune.py", "--smoke", "--in-features", "512", "--rows", "1,16"]
    environment = {"PYTHONPATH": str(ROOT), "AMQ_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([*command, "--formats", "int3"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing was measured" in result.stdout and "triton rows" not in result.stdout
    assert not list(tmp_path.rglob("*.json"))
