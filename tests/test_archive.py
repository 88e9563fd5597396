"""The archive: durable, exact on resume, honest about damage."""

from __future__ import annotations

import json
import logging
import math

import pytest
from analytic import settings, solve

from amq.errors import AmqError
from amq.search.archive import Archive


def lines(path):
    """Records without what depends on the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("solver", ["additive", "paper", "random"])
@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_resume_equals_an_uninterrupted_run(tmp_path, solver, cut):
    options = settings(solver=solver, refine=3)
    whole = tmp_path / "whole.jsonl"
    solve(whole, options, budget=3.5)
    kept = whole.read_text().splitlines(keepends=True)[:cut]
    part = tmp_path / "part.jsonl"
    part.write_text("".join(kept))
    resumed = solve(part, options, budget=3.5)
    assert lines(part) == lines(whole)
    assert resumed.losses.calls == len(lines(whole)) - len(kept)  # nothing is evaluated twice


def test_a_truncated_last_line_is_dropped_with_a_warning(tmp_path, caplog):
    options = settings()
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    solve(whole, options)
    part.write_bytes(whole.read_bytes()[:-25])
    with caplog.at_level(logging.WARNING):
        solve(part, options)
    assert "truncated" in caplog.text
    assert lines(part) == lines(whole)


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "archive.jsonl"
    solve(path, settings())
    text = path.read_text().splitlines(keepends=True)
    for number, broken in [(1, "{}\n"), (2, "nonsense\n"), (2, text[0])]:
        path.write_text("".join([*text[: number - 1], broken, *text[number:]]))
        with pytest.raises(AmqError, match=f"line {number} is damaged"):
            Archive(path)


def test_an_infeasible_loss_is_recorded_as_null_and_the_search_goes_on(tmp_path):
    from analytic import AnalyticLosses, space

    losses = AnalyticLosses(space(), nan_when="layers.0.attn.q_proj")
    problem = solve(tmp_path / "a.jsonl", settings(solver="paper"), losses)
    infeasible = [r for r in problem.archive.records if r["loss"] is None]
    assert infeasible and all(r["configuration"]["layers.0.attn.q_proj"] == "int2" for r in infeasible)
    assert all(math.isfinite(r["loss"]) for r in problem.archive.evaluated())
    assert len(Archive(tmp_path / "a.jsonl").records) == len(problem.archive.records)


def test_disk_full_names_the_file_and_keeps_what_was_written(tmp_path):
    import errno

    archive = Archive(tmp_path / "a.jsonl")
    record = dict(solver="s", phase="p", windows="search", seed=0)
    archive.append({"a": "int2"}, 0.5, 2.25, 0.1, **record)

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    archive._file = Full()
    with pytest.raises(AmqError, match=r"disk is full.*a\.jsonl"):
        archive.append({"a": "int3"}, 0.4, 3.25, 0.1, **record)
    assert len(archive.records) == 1 and len(Archive(tmp_path / "a.jsonl").records) == 1
