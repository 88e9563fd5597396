"""Crash injection: a search killed between any two writes resumes to the very archive of an uninterrupted one."""

from __future__ import annotations

import os
import sys

import pytest
from helpers.analytic import lines, settings, solve

from amq.search import archive as archive_module


def crash_after(writes: int, path, options, torn: bool) -> int:
    """Runs a search in a child process that dies (no cleanup, like kill -9) at the given fsync; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal count
        if count == writes:
            if torn:  # the machine lost power in the middle of the line
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - 10)
            os._exit(9)
        count += 1
        real(descriptor)

    archive_module.os.fsync = fsync
    solve(path, options, budget=3.5)
    os._exit(0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("solver", ["additive", "paper"])
def test_kill_between_any_two_writes(tmp_path, solver, torn):
    options = settings(solver=solver, refine=2, iterations=1, initial=5)
    whole = tmp_path / "whole.jsonl"
    solve(whole, options, budget=3.5)
    expected = lines(whole)
    for writes in range(len(expected)):
        path = tmp_path / f"crash-{writes}.jsonl"
        assert crash_after(writes, path, options, torn) == 9
        survived = path.read_bytes().count(b"\n")
        assert survived >= writes  # at most the evaluation in flight is lost
        solve(path, options, budget=3.5)
        assert lines(path) == expected
