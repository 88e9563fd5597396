"""How many threads a parallel region gets beside other work (csrc/cpu/threads.h), on a machine that is played."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import shared_machine
from helpers.checkpoints import tiny_checkpoint
from helpers.tiny_models import ARCHITECTURES

from amq.kernels.cpu import cpu_module

SLICE = 3_000_000
"""What the scheduler gives another process at a time, ns."""


@dataclass
class Machine:
    """`cores` of them, `busy` of which other processes hold half of the time.

    work: what a region computes, in ns of one thread.
    """

    cores: int
    work: int
    busy: int = 0
    now: int = 1
    regions: object = field(default_factory=lambda: cpu_module().Regions())

    def region(self, asked: int | None = None) -> int:
        """One region that asks for as many threads as there are cores; returns how many it got."""
        asked = asked or self.cores
        threads = self.regions.granted(asked, self.now)
        assert 1 <= threads <= asked
        wall, queued = self.work // threads, 0
        if threads > self.cores - self.busy:  # one of them shares its core
            queued = max(wall, SLICE)
            wall += queued
        self.now += wall
        if threads > 1:
            self.regions.note(asked, threads, wall, queued, self.now)
        return threads

    def run(self, seconds: float, asked: int | None = None) -> float:
        """Work done per time; a thread of its own core does 1."""
        start, regions = self.now, 0
        while self.now < start + seconds * 1e9:
            self.region(asked)
            regions += 1
        return regions * self.work / (self.now - start)


@pytest.mark.parametrize("cores", [2, 8])
@pytest.mark.parametrize("milliseconds", [0.1, 3, 200])
def test_alone_a_region_gets_all_threads(cores: int, milliseconds: float) -> None:
    machine = Machine(cores, int(milliseconds * 1e6 * cores))
    assert machine.run(1) == pytest.approx(cores, rel=1e-3)


@pytest.mark.parametrize(("cores", "busy"), [(2, 1), (8, 1), (8, 5), (8, 7)])
@pytest.mark.parametrize("milliseconds", [0.1, 3, 200])
def test_beside_other_work_it_gets_the_threads_that_are_free(cores: int, busy: int, milliseconds: float) -> None:
    machine = Machine(cores, int(milliseconds * 1e6 * cores), busy)
    machine.run(max(1, 100 * milliseconds / 1e3))
    assert machine.run(max(5, 200 * milliseconds / 1e3)) >= 0.85 * (cores - busy)


@pytest.mark.parametrize(("cores", "busy"), [(2, 1), (8, 5)])
def test_when_the_other_work_is_over_all_threads_come_back(cores: int, busy: int) -> None:
    machine = Machine(cores, 3_000_000 * cores, busy)
    machine.run(4)
    machine.busy = 0
    machine.run(2.5)
    assert machine.run(1) == pytest.approx(cores, rel=1e-3)


def test_one_slice_lost_once_changes_nothing() -> None:
    machine = Machine(2, 6_000_000)
    for _ in range(20):
        machine.busy = 1
        machine.region()
        machine.busy = 0
        assert all(machine.region() == 2 for _ in range(20))


def test_threads_come_back_to_regions_that_ask_for_few() -> None:
    """A region of two threads never has the one more than before that one of eight would be tried with."""
    machine = Machine(8, 8_000_000, busy=6)
    machine.run(2)
    assert machine.region(2) == 1
    machine.busy = 0
    machine.run(3, asked=2)
    assert machine.run(0.1, asked=2) == pytest.approx(2, rel=1e-3)


def test_the_benchmark_of_a_shared_machine_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoint(ARCHITECTURES["llama"].build(), tmp_path / "model")
    small = ["--beside", "0,1", "--prompt", "20", "--features", "64", "--turns", "1"]
    shared_machine.main([str(folder), *small, "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["beside"] for row in rows} == {0, 1} and all(row["token_ms"] > 0 for row in rows)
    assert "| 1 | 1 |" in capsys.readouterr().out
