"""The archive: durable, exact on resume, honest about damage."""

from __future__ import annotations

import errno
import json
import logging
import math
import os

import pytest
from helpers.analytic import lines, settings, solve

from amq.errors import AmqError
from amq.search.archive import Archive, read_archive

RECORD = dict(solver="s", phase="p", windows="search", seed=0)


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
    from helpers.analytic import AnalyticLosses, space

    losses = AnalyticLosses(space(), nan_when="layers.0.attn.q_proj")
    problem = solve(tmp_path / "a.jsonl", settings(solver="paper"), losses)
    infeasible = [r for r in problem.archive.records if r.loss is None]
    assert infeasible and all(r.configuration["layers.0.attn.q_proj"] == "int2" for r in infeasible)
    assert all(math.isfinite(r.loss) for r in problem.archive.evaluated())
    assert len(list(read_archive(tmp_path / "a.jsonl"))) == len(problem.archive.records)


WRONG = {
    "no object": ("5", "expected `object`, got `int`"),
    "nested": ("[" * 100_000, "recursion"),
    "digits": ('{"index": ' + "9" * 5000 + "}", "digits"),
    "no UTF-8": (b'{"index": "\xff"}', "can't decode"),
    "configuration null": ({"configuration": None}, r"\$\.configuration: expected `object`, got `null`"),
    "configuration list": ({"configuration": [1, 2]}, r"\$\.configuration: expected `object`, got `array`"),
    "other linears": ({"configuration": {"a": "int4"}}, "the configuration"),
    "unknown format": ({"configuration": {"layers.0.attn.q_proj": "int99"}}, "q_proj in 'int99': expected one"),
    "loss text": ({"loss": "x"}, r"\$\.loss: expected `float \| null`, got `str`"),
    "loss below zero": ({"loss": -5.0}, "expected loss from -0.0001 to [0-9]+, got -5.0"),
    "loss NaN": ({"loss": math.nan}, "expected loss .* got nan"),
    "loss infinite": ({"loss": math.inf}, "expected loss .* got inf"),
    "bits text": ({"bits_per_weight": "x"}, r"\$\.bits_per_weight"),
    "bits of another configuration": ({"bits_per_weight": 0.1}, r"expected [0-9.]+ bits per weight, got 0\.1"),
    "seconds text": ({"seconds": "x"}, r"\$\.seconds"),
    "windows number": ({"windows": 5}, r"\$\.windows: expected `str`, got `int`"),
    "index true": ({"index": True}, r"\$\.index: expected `int`, got `bool`"),
    "index of another line": ({"index": 1}, "expected record 2, got 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_line_is_named_by_reader_and_search(tmp_path, case):
    from helpers.analytic import space

    change, message = WRONG[case]
    path = tmp_path / "archive.jsonl"
    solve(path, settings())
    rows = path.read_bytes().splitlines()
    record = json.loads(rows[2])
    if isinstance(change, dict):
        if case == "unknown format":
            change = {"configuration": record["configuration"] | change["configuration"]}
        change = json.dumps(record | change)
    rows[2] = change if isinstance(change, bytes) else change.encode()
    path.write_bytes(b"\n".join(rows) + b"\n")
    for read in (lambda: list(read_archive(path, space())), lambda: Archive(path, space())):
        with pytest.raises(AmqError, match=f"line 3 is damaged .*{message}") as raised:
            read()
        assert str(path) in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_a_loss_a_rounding_below_zero_is_read_as_it_was_written(tmp_path):
    archive = Archive(tmp_path / "a.jsonl")
    archive.append({"a": "int8"}, -3e-8, 8.25, 0.1, **RECORD)
    archive.close()
    assert [r.loss for r in read_archive(tmp_path / "a.jsonl")] == [-3e-8]


def test_a_reader_of_a_running_search_changes_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    archive = Archive(path)
    archive.append({"a": "int2"}, 0.5, 2.25, 0.1, **RECORD)
    with open(path, "ab") as file:  # the search is in the middle of its next line
        file.write(b'{"index":1,"solv')
    before = path.read_bytes()
    assert len(list(read_archive(path))) == 1
    assert path.read_bytes() == before
    archive.close()


def test_a_second_search_in_the_folder_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    first = Archive(path)
    first.append({"a": "int2"}, 0.5, 2.25, 0.1, **RECORD)
    with pytest.raises(AmqError, match=r"a\.jsonl is being written by another search"):
        Archive(path)
    first.close()
    second = Archive(path)
    assert len(second.records) == 1
    second.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failed_append_is_named_hidden_by_nothing_and_may_be_tried_again(tmp_path, monkeypatch, error):
    path = tmp_path / "a.jsonl"
    archive = Archive(path)
    archive.append({"a": "int2"}, 0.5, 2.25, 0.1, **RECORD)
    write = os.write

    def half(descriptor, data):
        if len(data) < 100:
            raise OSError(error, os.strerror(error))
        return write(descriptor, data[:40])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        for _ in range(2):
            with pytest.raises(AmqError, match="disk is full" if error == errno.ENOSPC else "Input/output error"):
                archive.append({"a": "int3"}, 0.4, 3.25, 0.1, **RECORD)
    assert len(archive.records) == 1 and len(list(read_archive(path))) == 1
    archive.append({"a": "int3"}, 0.4, 3.25, 0.1, **RECORD)
    archive.close()
    archive.close()
    assert [r.loss for r in read_archive(path)] == [0.5, 0.4]
