"""Every kernel on real hardware against float64: formats, dtypes, modes, group sizes, ragged shapes, numbers of rows.

    python benchmarks/gpu/correctness.py DIR [--smoke]        writes DIR/correctness.json; status 1 if anything failed

A case is one weight with all its numbers of rows. Outputs start as NaN inside guards, activations and weights lie
between NaN, and the bar is derived: the root mean square error relative to √Σ (x·W)² may be twice that of torch's
product in the same dtype (for int8 activations, of what `amq.kernels.backends.quantize_activations` makes of x).
Products of few outputs may have one rounding more, as twice a small sample's error is no bar. One-hot rows must
return columns of the weight. Further cases: fused against separate, CUDA graphs, another stream, torch.compile.

Cases run in worker processes, because Triton compiles one kernel at a time in each, and because a kernel that faults
takes its process's GPU context along: such a case is recorded and the next ones get a new process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import (
    Clock,
    Device,
    Failure,
    Results,
    arguments,
    attempt,
    dense,
    machine,
    now,
    prepare,
    random_packed,
    say,
    write_json,
)
from torch import Tensor

from amq.formats import FORMATS, GROUP_SIZES, get_format
from amq.kernels import triton
from amq.kernels.backends import quantize_activations
from amq.packing import PackedWeight, PreparedWeight

WORKERS = 13
"""Shares no divisor with the number of formats, so that each gets some of all."""
GUARD = 64
"""Elements before and after an output, bytes times four around a weight: keeps every address a multiple of 16."""
CUDA_ROWS = 8
"""Of x that one launch of the CUDA kernel takes."""
FEW = 64
"""Outputs below which one rounding is added to the bar."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MANY = (triton.DENSE_ROWS, -(-triton.DENSE_ROWS // 3) * 3)
"""Rows of x from which Triton dequantizes and torch multiplies; the second number divides by 3, so it has a bias."""
BROKEN = 3
"""Exit status of a worker whose GPU context is lost."""
RESTARTS = 5
SAVE_SECONDS = 1.0
"""Between two writings of correctness.json while cases run: they may end a hundred times a second."""
SHAPES = ((133, 1543), (72, 520), (7, 40), (256, 1536), (1, 1))
LARGE = ((4096, 4096), (1024, 14336))


@dataclass(frozen=True)
class Case:
    """One check of one backend. formats: of the weights; rows: every number of rows of x that is tried."""

    check: str
    backend: str
    formats: tuple[str, ...]
    dtype: str = "fp16"
    activations: str = "fp32"
    group_size: int = 64
    shape: tuple[int, int] = (133, 1543)
    rows: tuple[int, ...] = (1, 5)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        names = "+".join(self.formats)
        return f"{self.check}-{self.backend}-{names}-{self.dtype}-{self.activations}-g{self.group_size}-{shape}"


def cases(smoke: bool) -> list[Case]:
    """What is tried, the special checks first. Triton compiles anew for every format, dtype, group size, K, some
    numbers of rows, and with and without a bias: there, all numbers of rows are tried with one of the combinations."""
    every = tuple(FORMATS)
    if smoke:
        some = zip(every, ("fp16", "bf16") * 3, ("fp32", "int8", "int8") * 2, GROUP_SIZES * 2, strict=True)
        grid = [Case("products", "cuda", (f,), d, a, g, (19, 88), (1, 3, 8)) for f, d, a, g in some]
        grid.append(Case("products", "triton", ("int3",), shape=(19, 88), rows=(1, 5, *MANY)))
        return special((24, 88), every[:2]) + grid
    ms = tuple(range(1, CUDA_ROWS + 1))
    grid = [
        Case("products", "cuda", (f,), d, a, g, shape, ms)
        for shape in SHAPES for g in GROUP_SIZES for d in DTYPES for a in ("fp32", "int8") for f in every
    ]  # fmt: skip
    compiled = [Case("products", "triton", (f,), rows=(*range(1, 17), 33, *MANY, 2 * MANY[0])) for f in every]
    compiled += [
        Case("products", "triton", (f,), d, "fp32", g, rows=(1, 4, 9, 33))
        for g in reversed(GROUP_SIZES) for d in DTYPES for f in every
    ]  # fmt: skip
    compiled += [Case("products", "triton", (f,), shape=s, rows=(1, 16)) for s in SHAPES[1:] for f in every]
    modes = (("cuda", "fp16", "fp32"), ("cuda", "fp16", "int8"), ("cuda", "bf16", "fp32"), ("triton", "fp16", "fp32"))
    large = [Case("products", b, (f,), d, a, 128, shape, (1, 8)) for shape in LARGE for f in every for b, d, a in modes]
    return special((133, 1543), every) + large + grid + compiled


def special(shape: tuple[int, int], formats: tuple[str, ...]) -> list[Case]:
    modes = (("cuda", "fp32"), ("cuda", "int8"), ("triton", "fp32"))
    checks = ("compiled", "graph", "stream", "fused")
    return [Case(check, b, formats, activations=a, shape=shape) for check in checks for b, a in modes]


def guarded(tensor: Tensor, around: float) -> Tensor:
    """A copy between guards that are full of `around`; a view, contiguous."""
    count = GUARD * 4 if tensor.dtype == torch.uint8 else GUARD
    whole = tensor.new_full((tensor.numel() + 2 * count,), around)
    inside = whole[count : count + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def guards_of(inside: Tensor) -> Tensor:
    """What lies around a tensor that `guarded` made."""
    whole = inside._base
    return torch.cat([whole[: inside.storage_offset()], whole[inside.storage_offset() + inside.numel() :]])


@contextmanager
def poisoned_memory() -> Iterator[list[Tensor]]:
    """What `new_empty` returns inside is full of NaN (bytes: of 255) and lies between guards; yields all of it."""
    made: list[Tensor] = []

    def new_empty(self: Tensor, *size: int, dtype: torch.dtype | None = None, **others: object) -> Tensor:
        if others:  # Triton's interpreter, for itself
            return original(self, *size, dtype=dtype, **others)
        around = 255 if dtype == torch.uint8 else torch.nan
        made.append(guarded(self.new_full(size, around, dtype=dtype or self.dtype), around))
        return made[-1]

    original = Tensor.new_empty
    Tensor.new_empty = new_empty
    try:
        yield made
    finally:
        Tensor.new_empty = original


def error(y: Tensor, truth: Tensor, size: Tensor) -> float:
    """Root mean square of (y − truth) / size; infinite where y is NaN, or not 0 where every term is."""
    difference = (y.double() - truth).abs()
    relative = torch.where(size > 0, difference / size, torch.where(difference > 0, torch.inf, 0.0))
    return float(relative.square().mean().sqrt().nan_to_num(nan=torch.inf))


def random_x(rows: int, in_features: int, dtype: torch.dtype, where: torch.device) -> Tensor:
    """Rows differ by up to three orders of magnitude."""
    magnitude = 10.0 ** (torch.randint(0, 4, (rows, 1), device=where) - 2)
    return (torch.randn(rows, in_features, device=where) * magnitude).to(dtype)


def without_ties(x: Tensor, group_size: int) -> Tensor:
    """x with 0 where int8 could round either way, after the last bit of a division: a code more or less would be right,
    but is many times what the bar allows."""
    groups = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % group_size)).unflatten(1, (-1, group_size))
    codes = 127 * groups / groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    tie = ((codes.abs() % 1 - 0.5).abs() < 1e-3).flatten(1)[:, : x.shape[1]]
    return x.masked_fill(tie, 0)


def weights_of(device: Device, case: Case) -> tuple[list[PackedWeight], list[PreparedWeight]]:
    """One weight per format, of a few rows fewer each, between bytes that are NaN as scales."""
    n, k = case.shape
    sizes = [max(1, n - 11 * i) for i in range(len(case.formats))]
    packed = [
        random_packed(get_format(f), rows, k, case.group_size, device.torch)
        for f, rows in zip(case.formats, sizes, strict=True)
    ]
    made = [prepare(p, case.backend) for p in packed]
    return packed, [
        PreparedWeight(w.backend, w.format, w.out_features, k, w.group_size, guarded(w.data, 255)) for w in made
    ]


def products(device: Device, case: Case) -> dict:
    """Every number of rows, each third with a bias; then one-hot rows."""
    packed, weights = weights_of(device, case)
    wide, narrow = dense(packed[0], torch.float32).double(), dense(packed[0], DTYPES[case.dtype])
    worst, (n, k) = 0.0, case.shape
    for rows in case.rows:
        x = random_x(rows, k, narrow.dtype, device.torch)
        bias = random_x(1, n, narrow.dtype, device.torch)[0] if rows % 3 == 0 else None
        if case.activations == "int8":
            x = without_ties(x, case.group_size)
        y = run_poisoned(device, case, x, weights, bias)
        seen = quantize_activations(x.float(), case.group_size) if case.activations == "int8" else x.float()
        truth = seen.double() @ wide.T
        size = (seen.double().square() @ wide.square().T).sqrt()
        base = torch.nn.functional.linear(seen.to(narrow.dtype), narrow, bias)
        if bias is not None:
            truth, size = truth + bias.double(), (size.square() + bias.double().square()).sqrt()
        found, allowed = error(y, truth, size), 2 * error(base, truth, size)
        if y.numel() < FEW:
            allowed += torch.finfo(narrow.dtype).eps / 2
        worst = max(worst, found / allowed) if allowed else max(worst, float(found > 0))
        assert found <= allowed, f"{rows} rows: error {found:.3g}, torch's allows {allowed:.3g}"
    one_hot(device, case, weights, wide)
    return {"worst_of_allowed": round(worst, 3)}


def run_poisoned(device: Device, case: Case, x: Tensor, weights: list[PreparedWeight], bias: Tensor | None) -> Tensor:
    """y from memory that was NaN before, between NaN that must still be there; x and the bias between NaN too."""
    inner_bias = None if bias is None else guarded(bias, torch.nan)
    with poisoned_memory() as made:
        y = device.multiply(case.backend, guarded(x, torch.nan), weights, inner_bias, case.activations)
    device.synchronize()
    assert any(y is one for one in made), "y does not come from new_empty: its guards were not checked"
    for one in made:
        guards = guards_of(one)
        intact = guards == 255 if one.dtype == torch.uint8 else guards.isnan()
        assert intact.all(), f"{len(x)} rows: writes outside of {list(one.shape)} {one.dtype}"
    left = int(y.isnan().sum())
    assert left == 0, f"{len(x)} rows: {left} of {y.numel()} outputs are NaN: not written, or from what is not x or W"
    return y


def one_hot(device: Device, case: Case, weights: list[PreparedWeight], wide: Tensor) -> None:
    """x = e_k returns column k, up to one rounding and what the zero point loses in float32."""
    k = case.shape[1]
    for rows in (1, min(8, max(case.rows))):
        columns = torch.randperm(k, device=device.torch)[:rows]
        x = torch.zeros(len(columns), k, dtype=DTYPES[case.dtype], device=device.torch)
        x[torch.arange(len(columns), device=device.torch), columns] = 1
        y = run_poisoned(device, case, x, weights, None).double()
        column = wide[:, columns].T
        allowed = column.abs() * torch.finfo(x.dtype).eps * 0.51 + 2.0**-15 * wide.abs().amax()
        wrong = ((y - column).abs() > allowed).nonzero().tolist()
        first = f"the first at k={int(columns[wrong[0][0]])}, n={wrong[0][1]}" if wrong else ""
        assert not wrong, f"x = e_k: {len(wrong)} wrong outputs, {first}"


def fused(device: Device, case: Case) -> dict:
    """All formats in one call, more than one launch holds, equal the separate calls to the last bit."""
    _, weights = weights_of(device, case)
    for rows in (1, 5, MANY[0]) if device.smoke else (1, 3, 8, 16, MANY[0]):
        if case.backend == "cuda" and rows > CUDA_ROWS:
            continue
        x = random_x(rows, case.shape[1], DTYPES[case.dtype], device.torch)
        bias = random_x(1, sum(w.out_features for w in weights), x.dtype, device.torch)[0]
        together = device.multiply(case.backend, x, weights, bias, case.activations)
        at, parts = 0, []
        for w in weights:
            part = bias[at : at + w.out_features].clone()
            parts.append(device.multiply(case.backend, x, [w], part, case.activations))
            at += w.out_features
        differ = int((together != torch.cat(parts, 1)).sum())
        assert differ == 0, f"{rows} rows: {differ} of {together.numel()} outputs differ from those of separate calls"
    return {}


def graph(device: Device, case: Case) -> dict:
    """A captured call computes with what its input holds at replay."""
    _, weights = weights_of(device, case)
    for rows in case.rows:
        x = random_x(rows, case.shape[1], DTYPES[case.dtype], device.torch)
        replay, y = device.capture(lambda x=x: device.multiply(case.backend, x, weights, None, case.activations))
        for _ in range(1 if device.smoke else 3):
            x.copy_(random_x(rows, case.shape[1], x.dtype, device.torch))
            y.fill_(torch.nan)
            replay()
            device.synchronize()
            eager = device.multiply(case.backend, x, weights, None, case.activations)
            assert torch.equal(y, eager), f"{rows} rows: a replay differs from an eager call"
    return {}


def stream(device: Device, case: Case) -> dict:
    """On another stream, behind work that x waits for."""
    _, weights = weights_of(device, case)
    real = random_x(3, case.shape[1], DTYPES[case.dtype], device.torch)
    expected = device.multiply(case.backend, real, weights, None, case.activations)
    if device.smoke:
        return {"left_out": "a CPU has no streams"}
    x, other = torch.zeros_like(real), torch.cuda.Stream()
    device.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        x.copy_(real)
        y = device.multiply(case.backend, x, weights, None, case.activations)
    other.synchronize()
    assert torch.equal(y, expected), "the product ran ahead of its stream"
    return {}


def compiled(device: Device, case: Case) -> dict:
    """A module of two QuantizedLinear under torch.compile(fullgraph=True) computes what it does without."""
    from torch import nn

    from amq.kernels.modules import QuantizedLinear

    backend = "reference" if device.smoke else case.backend  # amq refuses GPU backends on a CPU
    n, k = 64, 128
    packed = [
        random_packed(get_format(f), *size, 64, device.torch)
        for f, size in zip(case.formats[:2], ((n, k), (k, n)), strict=True)
    ]
    bias = torch.randn(n, device=device.torch).half()
    first = QuantizedLinear.from_packed(packed[0], bias, backend, case.activations)
    module = nn.Sequential(first, nn.ReLU(), QuantizedLinear.from_packed(packed[1], None, backend, case.activations))
    fast = torch.compile(module, fullgraph=True, backend="eager" if device.smoke else "inductor")
    with torch.no_grad():
        for rows in (1, 4):
            x = torch.randn(rows, k, device=device.torch).half()
            assert torch.equal(fast(x), module(x)), f"{rows} rows: compiled and eager differ"
    return {"prepared_for": backend}


CHECKS: dict[str, Callable[[Device, Case], dict]] = {f.__name__: f for f in (products, fused, graph, stream, compiled)}


def run_case(device: Device, case: Case) -> dict:
    """A line of the result."""
    result, start = {"case": str(case), **asdict(case)}, time.monotonic()
    if case.backend == "triton" and device.smoke and case.dtype == "bf16":
        return {**result, "passed": None, "reason": "Triton's interpreter gets bfloat16 wrong"}
    for name in case.formats:
        if reason := device.unsupported_reason(case.backend, get_format(name)):
            return {**result, "passed": False, "reason": f"{case.backend} cannot run {name}: {reason}"}
    torch.manual_seed(0)
    found = attempt(device, check, device, case)
    if isinstance(found, Failure):
        result.update(passed=False, reason=found.reason, broken=found.broken)
        if not found.reason.startswith("AssertionError"):
            result["traceback"] = found.traceback
    else:
        result.update(passed=True, **found)
    return {**result, "at": now(), "seconds": round(time.monotonic() - start, 2)}


def check(device: Device, case: Case) -> dict:
    """What the case's check found, once the device has done all of it."""
    found = CHECKS[case.check](device, case)
    device.synchronize()
    return found


def work(options) -> int:
    """A worker: every `of`-th case from `first` on, one line of JSON each."""
    device, clock = Device(options.smoke), Clock(options.seconds, options.began)
    todo = cases(options.smoke)
    with options.out.open("a") as out:
        for index in range(options.part, len(todo), options.of):
            if index < options.first:
                continue
            if clock.left() < 0:
                return 0
            result = run_case(device, todo[index])
            print(json.dumps({"index": index, **result}), file=out, flush=True)
            if result["passed"] is False:
                say(f"FAILED {result['case']}: {result['reason'].splitlines()[0]}")
            if result.get("broken"):
                return BROKEN
    return 0


class CheckProcess:
    """A process that runs every `of`-th case, and is started again behind a case that took it down."""

    def __init__(self, options, part: int, of: int, folder: Path, clock: Clock) -> None:
        self.options, self.part, self.of, self.clock = options, part, of, clock
        self.out = folder / f"{part}.jsonl"
        self.out.touch()
        self.died: list[dict] = []
        self.restarts = 0
        self._start(part)

    def _start(self, first: int) -> None:
        command = [sys.executable, __file__, str(self.options.folder), "--part", str(self.part), "--of", str(self.of)]
        command += ["--first", str(first), "--out", str(self.out), "--seconds", str(self.clock.left())]
        command += ["--began", str(time.time())]
        self.process = subprocess.Popen(command + ["--smoke"] * self.options.smoke)

    def results(self) -> list[dict]:
        lines = [json.loads(line) for line in self.out.read_text().splitlines() if line.endswith("}")]
        return lines + self.died

    def running(self) -> bool:
        """False once nothing is left for it to do."""
        status = self.process.poll()
        if status is None or status == 0:
            return status is None
        last = max((result["index"] for result in self.results()), default=self.part - self.of)
        if status != BROKEN:  # it died at the next case
            last += self.of
            todo = cases(self.options.smoke)
            if last >= len(todo):
                return False
            case, reason = todo[last], f"the process ended with status {status}"
            self.died.append({"index": last, "case": str(case), **asdict(case), "passed": False, "reason": reason})
            say(f"FAILED {case}: {reason}")
        self.restarts += 1
        if self.restarts > RESTARTS or self.clock.left() < 0:
            return False
        self._start(last + self.of)
        return True


def supervise(options, clock: Clock, save: Callable[[list[dict]], None]) -> list[dict]:
    """All cases, in several processes, as far as the time goes; `save` gets the results so far, again and again."""
    of = 1 if options.smoke else max(1, min(WORKERS, (os.cpu_count() or 2) - 2))
    saved = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="amq-correctness-") as folder:
        workers = [CheckProcess(options, part, of, Path(folder), clock) for part in range(of)]
        try:
            while any([w.running() for w in workers]) and clock.left() > -2:  # a case of its last moment may end
                time.sleep(0.2)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save(results_of(workers))
                    saved = time.monotonic()
        finally:
            for w in workers:
                if w.process.poll() is None:
                    w.process.kill()
                    w.process.wait()
            save(results_of(workers))
        return results_of(workers)


def results_of(workers: list[CheckProcess]) -> list[dict]:
    return sorted((r for w in workers for r in w.results()), key=lambda r: r["index"])


class Report:
    """correctness.json, and its summary in suite.json."""

    def __init__(self, options, device: Device, clock: Clock) -> None:
        self._file, self._smoke, self._clock = options.folder / "correctness.json", options.smoke, clock
        self._section = Results(options.folder, "correctness", options.smoke)
        self._machine, self._total = machine(device), len(cases(options.smoke))

    def save(self, results: list[dict]) -> dict:
        """Writes both, and returns the summary."""
        failed = [r for r in results if r["passed"] is False]
        left_out = {r[key] for r in results for key in ("reason", "left_out") if key in r and r["passed"] is not False}
        summary = {
            "smoke": self._smoke,
            "cases": self._total,
            "run": len(results),
            "passed": sum(r["passed"] is True for r in results),
            "failed": len(failed),
            "left_out": sorted(left_out),
            "not_run": self._total - len(results),
            "seconds": self._clock.spent(),
        }
        write_json(self._file, {**summary, "machine": self._machine, "results": results})
        self._section.write({**summary, "failures": [[r["case"], r["reason"]] for r in failed]})
        return summary


def main() -> int:
    parser = arguments(__doc__, 130)
    parser.add_argument("--first", type=int, default=0, help="for workers: the case to go on from")
    parser.add_argument("--out", type=Path, help="for workers: where their lines go")
    options = parser.parse_args()
    if options.part is not None:
        return work(options)
    clock, device = Clock(options.seconds, options.began), Device(options.smoke)
    report = Report(options, device, clock)
    results = supervise(options, clock, report.save)
    summary = report.save(results)
    say("correctness: " + ", ".join(f"{key} {value}" for key, value in summary.items() if not isinstance(value, list)))
    return 1 if summary["failed"] or not results else 0


if __name__ == "__main__":
    sys.exit(main())
