"""Hundreds of damaged and edited checkpoints: each loads and runs, or is an AmqError with a reason; nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import tiny_checkpoint
from helpers.damaged_files import GROUPS
from helpers.tiny_models import tiny_llama

CASES = 60
SEED = 20261128
MOST_OK = 0.85
"""Of a group's cases: many values of a tokenizer's files may be anything. Above it, the damage would be none."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], str]]:
    """(what was done, what came of it) of all cases, from one process that a crash would end early."""
    folder = tiny_checkpoint(tiny_llama(0, num_hidden_layers=1), tmp_path_factory.mktemp("damaged") / "whole")
    program = Path(__file__).with_name("helpers") / "damaged_files.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, program, folder, str(SEED), str(CASES)],
        env=environment, capture_output=True, text=True, errors="replace", timeout=600,
    )  # fmt: skip
    lines = [line.partition("\t") for line in result.stdout.splitlines() if line.startswith('{"group"')]
    assert lines, result.stderr
    assert result.returncode == 0, f"status {result.returncode} after {lines[-1]}: {result.stderr[-2000:]}"
    return [(json.loads(case), json.loads(came)) for case, _, came in lines]


@pytest.mark.parametrize("group", GROUPS)
def test_damage_is_harmless_or_named(outcomes: list[tuple[dict[str, Any], str]], group: str) -> None:
    cases = [(case, came) for case, came in outcomes if case["group"] == group]
    assert len(cases) == CASES
    for case, came in cases:
        assert came.startswith(("ok ", "named ")), f"{case}\n{came}"
        assert "\n" not in came, f"{case}: more than one line: {came}"
    harmless = sum(came.startswith("ok ") for _, came in cases)
    assert harmless <= MOST_OK * CASES, f"{harmless} of {CASES} cases ran: is anything damaged?"
