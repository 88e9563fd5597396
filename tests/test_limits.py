"""A container's limits, from a control group tree that the test makes: version 1, version 2, both, none, nonsense."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amq.errors import AmqError
from amq.util import limits
from amq.util.limits import check_memory, fit_threads, free_memory, processors, total_memory

MIB = 1 << 20


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(proc, cgroups) of a machine with 1 GiB, 900 MiB of it free, and 8 processors."""
    import psutil

    memory = SimpleNamespace(total=1024 * MIB, available=900 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: set(range(8)))
    return tmp_path / "proc", tmp_path / "cgroup"


def write(path: Path, **files: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(f"{text}\n")


def belongs(proc: Path, *lines: str) -> None:
    write(proc / "self", cgroup="\n".join(lines))


def test_without_groups_the_machine_counts(trees: tuple[Path, Path]) -> None:
    assert free_memory(*trees) == 900 * MIB and total_memory(*trees) == 1024 * MIB and processors(*trees) == 8


def test_version_2(trees: tuple[Path, Path]) -> None:
    proc, groups = trees
    belongs(proc, "0::/a/b")
    write(groups / "a" / "b", memory__max="max", memory__current=300 * MIB, cpu__max="250000 100000")
    assert free_memory(proc, groups) == 900 * MIB and processors(proc, groups) == 3
    write(groups / "a", memory__max=512 * MIB, memory__current=300 * MIB, cpu__max="max 100000")  # the group above
    assert free_memory(proc, groups) == 212 * MIB and total_memory(proc, groups) == 512 * MIB
    write(groups / "a", memory__stat=f"anon 1\ninactive_file {100 * MIB}")  # pages that the kernel would give up
    assert free_memory(proc, groups) == 312 * MIB
    write(groups / "a", memory__high=400 * MIB)
    assert free_memory(proc, groups) == 200 * MIB
    write(groups / "a" / "b", cpu__max="5000 100000")
    assert processors(proc, groups) == 1


def test_version_1(trees: tuple[Path, Path]) -> None:
    proc, groups = trees
    belongs(proc, "9:memory:/docker/x", "4:cpu,cpuacct:/docker/x", "0::/")
    mine = {"memory__limit_in_bytes": 512 * MIB, "memory__usage_in_bytes": 500 * MIB}
    write(groups / "memory" / "docker" / "x", **mine, memory__stat=f"total_inactive_file {50 * MIB}")
    write(groups / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=700 * MIB)
    write(groups / "cpu,cpuacct" / "docker" / "x", cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    write(groups / "cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert free_memory(proc, groups) == 62 * MIB and total_memory(proc, groups) == 512 * MIB
    assert processors(proc, groups) == 2


@pytest.mark.parametrize("line", ["0::/docker/of/the/host", "0::/../../elsewhere"])
def test_inside_a_container_the_root_is_its_own_group(line: str, trees: tuple[Path, Path]) -> None:
    proc, groups = trees
    belongs(proc, line)
    write(groups, memory__max=512 * MIB, memory__current=12 * MIB, cpu__max="100000 100000")
    assert free_memory(proc, groups) == 500 * MIB and processors(proc, groups) == 1


def test_nonsense_is_no_limit(trees: tuple[Path, Path]) -> None:
    proc, groups = trees
    belongs(proc, "0::/", "nothing", "3:memory")
    write(groups, memory__max="much", memory__current="", cpu__max="0 0", memory__stat="inactive_file\n\n")
    assert free_memory(proc, groups) == 900 * MIB and processors(proc, groups) == 8


def test_more_than_the_limit_is_refused(trees: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code with the trees in place of the system's."""
    proc, groups = trees
    belongs(proc, "0::/")
    write(groups, memory__max=512 * MIB, memory__current=12 * MIB)
    monkeypatch.setattr(limits.free_memory, "__defaults__", (proc, groups))
    check_memory(500 * MIB, "it")
    with pytest.raises(AmqError, match="not enough memory for it: 0.49 GiB needed, 0.49 GiB free on cpu"):
        check_memory(500 * MIB + 1, "it")


def test_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr(limits, "processors", lambda: 3)
        assert fit_threads() == 3 == torch.get_num_threads()
        monkeypatch.setattr(limits, "processors", lambda: 16)  # never more than torch had
        assert fit_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        monkeypatch.setattr(limits, "processors", lambda: 1)
        assert fit_threads() == 3
    finally:
        torch.set_num_threads(before)
