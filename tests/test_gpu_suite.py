"""The GPU suite runs (at tiny sizes, on a CPU), so that it cannot rot until a GPU is there. It measures nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU suite needs Triton, if only its interpreter")
ROOT = Path(__file__).parents[1]
MEASURED = (
    *("us", "us_fastest", "us_slowest", "gbps", "share_of_copy", "torch_fp16_us", "times_torch_fp16"),
    *("us_per_token", "tokens_per_second", "times_fp16"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one smoke run."""
    if shutil.which("g++") is None:
        pytest.skip("the CUDA shim needs g++")
    out = tmp_path_factory.mktemp("suite")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AMQ_")}
    command = [str(ROOT / "benchmarks" / "gpu_suite.sh"), str(out), "--smoke"]
    result = subprocess.run(command, env={**environment, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    return out


def test_files(folder: Path) -> None:
    """At most six, as few come back from a lent machine."""
    names = {path.name for path in folder.iterdir()}
    assert names == {"suite.json", "correctness.json", "speed.png", "decode.png", "log.txt"}


def test_a_smoke_run_has_no_figures(folder: Path) -> None:
    suite = json.loads((folder / "suite.json").read_text())
    assert suite["smoke"] is True and "nothing was measured" in suite["note"]
    rows = suite["speed"]["rows"] + suite["decode"]["rows"]
    assert not [row[name] for row in rows for name in MEASURED if row.get(name) is not None]
    assert suite["speed"]["copy_gbps"] is None and suite["decode"]["copy_gbps"] is None
    assert not [time for row in rows for time in row.get("warps_tried", {}).values() if time is not None]
    assert all(counts["met"] == counts["missed"] == 0 for counts in suite["speed"]["targets"].values())


def test_every_part_ran(folder: Path) -> None:
    suite = json.loads((folder / "suite.json").read_text())
    assert suite["parts"] == dict.fromkeys(("build", "machine", "correctness", "speed", "decode"), 0)
    speed, decode = suite["speed"], suite["decode"]
    assert not speed["failed"] and not speed["wrong"] and not speed["left_out"] and not speed["unavailable"]
    kinds = {("cuda", "fp32"), ("cuda", "int8"), ("triton", "fp32")}
    assert {(row["backend"], row["activations"]) for row in speed["rows"]} == kinds
    assert {row["rows"] for row in speed["rows"]} == {1, 8, 16} and all(row["error"] < 0.05 for row in speed["rows"])
    assert all("left_out" in peer for peer in speed["peers"].values())
    assert not decode["failed"] and not decode["left_out"]
    assert {row["backend"] for row in decode["rows"]} == {"torch", "cuda", "triton"}
    assert all(row["linear_launches_per_layer"] <= 4 and not row["wrong"] for row in decode["rows"])


def test_correctness_is_recorded_by_case(folder: Path) -> None:
    result = json.loads((folder / "correctness.json").read_text())
    assert result["failed"] == result["not_run"] == 0 and result["passed"] == result["cases"] == len(result["results"])
    checks = {(case["check"], case["backend"]) for case in result["results"]}
    assert checks == {(c, b) for c in ("products", "fused", "graph", "stream", "compiled") for b in ("cuda", "triton")}


def test_wrong_products_are_found_and_recorded(tmp_path: Path) -> None:
    """A kernel that writes too little, too far or the wrong numbers: each is a failure of its case, and no more."""
    script = """
import sys
sys.path.insert(0, "benchmarks/gpu")
import correctness
from common import Device
from amq.gpu import triton
device = Device(smoke=True)
case = next(c for c in correctness.cases(smoke=True) if c.check == "products" and c.backend == "triton")
right = triton.linear
def lost(x, weights, bias):
    y = right(x, weights, bias)
    y[-1, -1] = float("nan")
    return y
def far(x, weights, bias):
    y = right(x, weights, bias)
    y._base[y.storage_offset() + y.numel()] = 0
    return y
def wrong(x, weights, bias):
    return right(x, weights, bias).mul_(1.01)
for planted, words in ((lost, "outputs are NaN"), (far, "writes outside"), (wrong, "torch's allows")):
    triton.linear = planted
    result = correctness.run_case(device, case)
    assert result["passed"] is False and words in result["reason"], result
triton.linear = right
assert correctness.run_case(device, case)["passed"]
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
