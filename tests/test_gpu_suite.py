"""The GPU suite runs (at tiny sizes, on a CPU), so that it cannot rot until a GPU is there. It measures nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.processes import python_path

pytest.importorskip("triton", reason="the GPU suite needs Triton, if only its interpreter")
ROOT = Path(__file__).parents[1]
MEASURED = (
    *("us", "us_fastest", "us_slowest", "gbps", "share_of_copy", "torch_fp16_us", "times_torch_fp16"),
    *("us_per_token", "tokens_per_second", "times_fp16"),
    *("prompt_tokens_per_second", "kernels_per_token", "host_launches_per_token"),
    *("own_us_per_token", "us_per_step", "outside_us"),
)
SUITE = str(ROOT / "benchmarks" / "gpu_suite.sh")
PARTS = ROOT / "benchmarks" / "gpu"


def environment(**more: str) -> dict[str, str]:
    """As a user's, but for the processor's instruction set, which a test run may ask for."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith("AMQ_") or k == "AMQ_CPU_ISA"}
    return {**mine, "PYTHON": sys.executable, **python_path(), **more}


def wait_until(there: Callable[[], bool], process: subprocess.Popen) -> None:
    """For a state, however slow the machine; a process that ends before is a failure."""
    while not there():
        assert process.poll() is None, process.returncode
        time.sleep(0.05)


def suite_of(path: Path) -> dict:
    file = path / "suite.json"
    return json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one smoke run."""
    if shutil.which("g++") is None:
        pytest.skip("the CUDA shim needs g++")
    out = tmp_path_factory.mktemp("suite")
    result = subprocess.run([SUITE, str(out), "--smoke"], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    return out


def test_files(folder: Path) -> None:
    """At most six, as few come back from a lent machine."""
    names = {path.name for path in folder.iterdir()}
    assert names == {"suite.json", "correctness.json", "speed.png", "decode.png", "log.txt"}


def test_a_smoke_run_has_no_figures(folder: Path) -> None:
    suite = json.loads((folder / "suite.json").read_text())
    assert suite["smoke"] is True and "nothing was measured" in suite["note"]
    rows = suite["speed"]["rows"] + suite["decode"]["rows"] + suite["engine"]["rows"]
    assert not [row[name] for row in rows for name in MEASURED if row.get(name) is not None]
    assert suite["speed"]["copy_gbps"] is None and suite["decode"]["copy_gbps"] is None
    assert all(counts["met"] == counts["missed"] == 0 for counts in suite["speed"]["targets"].values())


def test_every_part_ran(folder: Path) -> None:
    suite = json.loads((folder / "suite.json").read_text())
    parts = ("build", "machine", "correctness", "engine", "speed", "decode", "families", "search")
    assert suite["parts"] == dict.fromkeys(parts, 0)
    speed, decode = suite["speed"], suite["decode"]
    assert not speed["failed"] and not speed["wrong"] and not speed["left_out"] and not speed["unavailable"]
    kinds = {("cuda", "fp32"), ("cuda", "int8"), ("triton", "fp32")}
    assert {(row["backend"], row["activations"]) for row in speed["rows"]} == kinds
    assert {row["rows"] for row in speed["rows"]} == {1, 8, 256} and all(row["error"] < 0.05 for row in speed["rows"])
    assert all("left_out" in peer for peer in speed["peers"].values())
    assert not decode["failed"] and not decode["left_out"]
    assert {row["backend"] for row in decode["rows"]} == {"torch", "cuda", "triton"}
    assert all(row["linear_launches_per_layer"] <= 4 and not row["wrong"] for row in decode["rows"])


def test_both_engines_run(folder: Path) -> None:
    engine = suite_of(folder)["engine"]
    rows = {kind: [row for row in engine["rows"] if row["row"] == kind] for kind in ("agree", "decode", "batch")}
    assert sum(map(len, rows.values())) == len(engine["rows"]) and engine["copy_gbps"] is None
    assert [row["engine"] for row in rows["agree"]] == ["own", "own", "own", "torch"]
    assert all(row["tokens_equal"] and row.get("by_itself_equal", True) for row in rows["agree"])
    of = [(row["engine"], row["context"], row["cache"], row.get("activations", "fp32")) for row in rows["decode"]]
    short, long = of[0][1], of[1][1]
    own = [("own", short, "float16", "fp32"), ("own", long, "float16", "fp32"), ("own", long, "int8", "fp32")]
    assert of == [*own, ("own", short, "float16", "int8"), *(("torch", c, "float16", "fp32") for c in (short, long))]
    assert all(row["captured"] for row in rows["decode"])
    assert [row["sequences"] for row in rows["batch"]] == [1, 2, 4, 8, 1, 8]
    assert {row["launches"] for row in rows["decode"] if row["engine"] == "own"} == {1 + 5 + 1}
    more = [row["bytes_per_step"] for row in rows["batch"][:4]]
    assert more == sorted(set(more)) and rows["decode"][1]["bytes_per_step"] > rows["decode"][2]["bytes_per_step"]


def test_families_and_search_agree_with_the_cpu(folder: Path) -> None:
    suite = suite_of(folder)
    families, search = suite["families"], suite["search"]
    assert {row["case"] for row in families["rows"]} == {"llama", "lfm2"}
    assert all(0 < row["difference"] < row["allowed"] / 4 for row in families["rows"])
    assert "amq_cuda_short_conv" in families["calls"] and "amq_cuda_delta" in families["never_launched"]
    assert {row["row"] for row in search["rows"]} == {"loss", "sensitivity", "bank", "fisher"}
    assert {row["by"] for row in search["rows"]} == {"torch", "cpu"}
    for part in (suite["engine"], families, search):
        assert not part["failed"] and not part["left_out"] and not any(row["wrong"] for row in part["rows"])
    losses = [row for row in search["rows"] if row["row"] == "loss"]
    assert all(0 < row["allowed"] < row["cpu"] / 100 for row in losses)  # so that another configuration's would fail


def test_rows_can_be_matched_with_the_clocks(folder: Path) -> None:
    suite = suite_of(folder)
    clocks = suite["clocks"]
    assert clocks["columns"][:2] == ["at", "sm_mhz"] and ("left_out" in clocks or clocks["rows"])
    for part in ("speed", "decode", "engine", "families", "search"):
        times = [row["at"] for row in suite[part]["rows"]]
        assert times == sorted(times) and all(0 <= time.time() - at < 86400 for at in times)


def test_correctness_is_recorded_by_case(folder: Path) -> None:
    result = json.loads((folder / "correctness.json").read_text())
    assert result["failed"] == result["not_run"] == 0 and result["passed"] == result["cases"] == len(result["results"])
    checks = {(case["check"], case["backend"]) for case in result["results"]}
    assert checks == {(c, b) for c in ("products", "fused", "graph", "stream", "compiled") for b in ("cuda", "triton")}


def test_wrong_products_are_found_and_recorded(tmp_path: Path) -> None:
    """A kernel that writes too little, too far or the wrong numbers: each is a failure of its case, and no more."""
    script = """
import correctness
from common import Device
from amq.kernels import triton
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
def unguarded(x, weights, bias):
    return right(x, weights, bias).clone()
plants = (lost, "outputs are NaN"), (far, "writes outside"), (wrong, "torch's allows"), (unguarded, "not come from")
for planted, words in plants:
    triton.linear = planted
    result = correctness.run_case(device, case)
    assert result["passed"] is False and words in result["reason"], result
triton.linear = right
dense = dataclasses.replace(case, rows=correctness.MANY)
assert correctness.run_case(device, dense)["passed"]
"""
    run_script("import dataclasses" + script)


def run_script(script: str) -> None:
    command, own = [sys.executable, "-c", script], environment(TRITON_INTERPRET="1", **python_path("benchmarks/gpu"))
    result = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_one_out_of_memory_ends_nothing(tmp_path: Path) -> None:
    """Of the GPU's memory in one row, of the host's in making one weight, of the GPU's in what torch multiplies."""
    run_script(
        f"""
import json, pathlib, torch, speed
from common import Clock, Device, Results
from dataclasses import replace
folder = pathlib.Path({str(tmp_path)!r})
device = Device(smoke=True)
device.unsupported_reason = lambda backend, fmt: "not here" if backend == "cuda" else None
def multiply(backend, x, weights, bias=None, activations="fp32"):
    if len(x) == 8:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
    return x.new_zeros(len(x), sum(w.out_features for w in weights))
device.multiply = multiply
class Bench(speed.Bench):
    def make(self, job):
        if job.formats == ("int5",):
            raise MemoryError("of the host")
        return super().make(job)
    def product(self, job, rows, reference):
        if rows == 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().product(job, rows, reference)
speed.Bench = Bench
content = speed.run_all(device, Clock(600), Results(folder, "speed", True), {{}})
assert json.loads((folder / "suite.json").read_text())["speed"] == json.loads(json.dumps(content))
assert all(reason.startswith("out of memory: ") for reason in content["failed"].values()), content["failed"]
jobs = speed.jobs(True)
for part in ("int5", "M8 triton", "M256"):
    assert any(part in name for name in content["failed"]), (part, content["failed"])
made = [job for job in jobs if job.formats != ("int5",)]
assert len(content["rows"]) == sum(1 in job.rows for job in made), content["rows"]
assert content["peers"] and all("at" in row for row in content["rows"])
"""
    )


def test_other_logits_are_found(tmp_path: Path) -> None:
    """The engine's comparison: rounding passes, a tie may fall either way, another model does not pass."""
    run_script(
        """
import torch, engine
torch.manual_seed(0)
truth, allowed = torch.randn(6, 500), engine.agrees(4, torch.float16)
assert 0.01 < allowed < 0.05
same = engine.compare(truth + 1e-3 * torch.randn(6, 500), truth, allowed)
assert same["tokens_equal"] and not same["wrong"]
assert engine.compare(truth + 2 * allowed * torch.randn(6, 500), truth, allowed)["wrong"]
assert engine.compare(truth.roll(1, 0), truth, allowed)["wrong"]
best = truth.topk(2)
def other_best(by):
    found = truth.clone()
    found[3, best.indices[3, 1]] = best.values[3, 0] + by
    return found
tie = truth.clone()
tie[3, best.indices[3, 1]] = best.values[3, 0] - 1e-3
assert not engine.compare(other_best(1e-3), tie, allowed)["wrong"]
assert not engine.compare(other_best(1e-3), tie, allowed)["tokens_equal"]
assert engine.compare(torch.full_like(truth, torch.nan), truth, allowed)["wrong"]
"""
    )


def test_a_part_that_is_terminated_leaves_what_it_had(tmp_path: Path) -> None:
    """`timeout` kills with SIGTERM; what was measured until then is in suite.json."""
    command = [sys.executable, str(PARTS / "decode.py"), str(tmp_path), "--smoke"]
    missing = environment(TRITON_INTERPRET="1", AMQ_CUDA_LIBRARY=str(tmp_path / "none.so"))
    with subprocess.Popen(command, env=missing, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_until(lambda: bool(suite_of(tmp_path).get("decode", {}).get("rows")), process)
        process.terminate()
        process.stdout.read()
        assert process.wait() == 128 + signal.SIGTERM
    decode = suite_of(tmp_path)["decode"]
    assert decode["rows"][0]["variant"].startswith("fp16") and "triton fp32" not in str(decode["rows"])


def test_a_suite_that_is_terminated_leaves_what_it_had(tmp_path: Path) -> None:
    """SIGTERM to the script reaches the part that runs; log and results are whole, nothing goes on."""
    missing = environment(AMQ_CUDA_LIBRARY=str(tmp_path / "none.so"))
    command = [SUITE, str(tmp_path), "--smoke"]
    with subprocess.Popen(command, env=missing, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_until(lambda: suite_of(tmp_path).get("correctness", {}).get("run", 0) > 0, process)
        process.terminate()
        said = process.stdout.read()
        assert process.wait() == 128 + signal.SIGTERM
    assert "== terminated" in said and "== terminated" in (tmp_path / "log.txt").read_text()
    results = json.loads((tmp_path / "correctness.json").read_text())
    assert results["run"] == len(results["results"]) > 0 and suite_of(tmp_path)["machine"]
    with pytest.raises(ProcessLookupError):  # of the session that the script led; `timeout` leads groups, no sessions
        os.killpg(process.pid, 0)


def test_nothing_starts_when_the_time_is_over(tmp_path: Path) -> None:
    over = environment(AMQ_CUDA_LIBRARY=str(tmp_path / "none.so"), AMQ_SUITE_SECONDS="10")
    result = subprocess.run([SUITE, str(tmp_path), "--smoke"], env=over, capture_output=True, text=True)
    assert result.returncode == 1 and "machine: not started, the suite's 10 s are over" in result.stdout


def test_clocks(tmp_path: Path) -> None:
    """Numbers, masks and what a GPU does not tell; another line is kept as what was said."""
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *-lms\\ 1000*) ;; *) exit 3;; esac\n'
        'echo "1980, 3201, 411.5, 44, 97, 0x0000000000000004"\necho "345, 3201, [N/A], 30, 0, 0x0"\necho "No devices"\n'
    )
    fake.chmod(0o755)
    command = [sys.executable, str(PARTS / "clocks.py"), str(tmp_path)]
    path = f"{fake.parent}:{os.environ['PATH']}"
    subprocess.run(command, env=environment(PATH=path), check=True)
    run_script(
        f"""
import pathlib
import clocks
folder = pathlib.Path({str(tmp_path)!r})
with (folder / clocks.FILE).open("a") as file:
    file.write('{{"at": 1.0, "sm_m')  # killed while it wrote
found = clocks.collect(folder)
assert found["columns"] == ["at", "sm_mhz", "memory_mhz", "watts", "celsius", "busy_percent", "throttled_by"]
assert [row[1:] for row in found["rows"]] == [
    [1980.0, 3201.0, 411.5, 44.0, 97.0, "0x0000000000000004"], [345.0, 3201.0, None, 30.0, 0.0, "0x0"]]
assert found["left_out"] == "nvidia-smi said: No devices" and not (folder / clocks.FILE).exists()
assert clocks.collect(folder) == {{"left_out": "nothing watched the clocks"}}
"""
    )


def test_derived_speeds() -> None:
    """Of the engine on paper, with made-up loops: what bounds a step, and the launches of the real passes."""
    run_script(
        """
import derive_engine as d
def loops(instructions, products=0):
    return [d.Loop(name, "fp16", gpu.architecture, 128, 0, 16, instructions, products, 0, 0)
            for gpu in d.GPUS for name in ("int2", "int3", "int4", "int6")]
gpu = next(gpu for gpu in d.GPUS if gpu.name == "RTX 4090")
def of(found, **wanted):
    row, = (row for row in found if all(row[name] == value for name, value in wanted.items()))
    return row
one = {"model": "Llama-3.1-8B", "formats": "int3", "rows": 1, "positions": 512, "cache": "float16"}
found = d.derive(gpu, loops(256), "fp16")
row, more = of(found, **one), of(found, **{**one, "rows": 8})
assert (row["launches"], row["launches_per_layer"]) == (1 + 5 * 32 + 2, 5), row
assert (more["launches"], more["launches_per_layer"]) == (1 + 7 * 32 + 3, 7), more
weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
assert row["weight_bytes"] == weights * 3.25 / 8 + 128256 * 4096 * 6.25 / 8
assert round(row["ceiling"]) == 311 and all(0 < each["share"] < d.STREAM_SHARE for each in found)
memory = row["weight_bytes"] / 1e3 / (gpu.gigabytes_per_second * d.STREAM_SHARE)
assert memory < row["linears_us"] < 1.05 * memory
assert {round(each["bits"], 2) for each in found if each["formats"] == "mixed"} == {3.0}
assert of(found, **{**one, "positions": 8192})["attention_us"] / row["attention_us"] > 15.9
assert 7.9 < more["attention_us"] / row["attention_us"] < 8.1
issued = of(d.derive(gpu, loops(25600), "fp16"), **one)
assert issued["linears_us"] > weights * 100 / 32 / 4 / (gpu.multiprocessors * gpu.gigahertz * 1e3)
assert of(d.derive(gpu, loops(256, products=2000), "fp16"), **one)["linears_us"] > 2 * row["linears_us"]
text = d.table(found).splitlines()
assert len(text) == 2 + len(d.MODELS) * len(d.FORMAT_SETS) and "| RTX 4090 | Llama-3.1-8B | int3 | 311 |" in text[3]
"""
    )
