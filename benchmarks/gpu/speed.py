"""One linear at a time, weights cold: microseconds, GB/s of weight bytes, share of copy bandwidth, times torch's fp16.

    python benchmarks/gpu/speed.py DIR [--smoke]              writes the section "speed" of DIR/suite.json

Shapes are those of Llama-2-7B, Llama-3.1-8B and Qwen2.5-7B, projections that share x fused as a decoder would run them,
group 128, x and y fp16. One graph holds many launches that rotate over copies of the weight, together at least four
times the L2 cache; a time is the graph's divided by its launches, so it holds what lies between two kernels, as in a
decode step. Bandwidth is that of torch's copy and of
torch's sum of 1 GiB, measured in the same run before, between and after; torch's fp16 products rotate likewise.

A row is one shape, format, number of rows, backend and mode. Every row's product is checked
against torch's with the dequantized weight before its time is taken: `error` is relative, and a wrong one fails the
run. Cases come in the order of their worth, and what the time does not suffice for is listed in `left_out`.

Triton compiles one kernel at a time in each process, so worker processes run every Triton case once beforehand; what
they make is in Triton's cache by the time the clock runs.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import decode
import libraries
import torch
from common import (
    Clock,
    Device,
    Failure,
    Results,
    Timing,
    arguments,
    attempt,
    bandwidths,
    copy_of,
    dense,
    now,
    prepare,
    random_packed,
    ratio,
    say,
    stored_bytes,
)

from amq.formats import FORMATS, get_format
from amq.kernels import cuda, triton
from amq.kernels import gpu_layout as layout
from amq.packing import PreparedWeight

GROUP_SIZE = 128
FIRST = "Llama-3.1-8B"
NARROW = tuple(name for name, fmt in FORMATS.items() if fmt.code_bits <= 4)
WIDE = tuple(name for name in FORMATS if name not in NARROW)
ROWS = (1, 2, 4, 8, 16, 512)
COMPILERS = 14
COMPILE_SHARE = 0.4
"""Of the part's time, at most, for compiling."""
MIN_LAUNCHES = 32
WRONG = {"fp32": 0.01, "int8": 0.05}
"""Relative errors above these are no rounding: fp16 has 0.0005, 8 bits per group about 0.01."""
BANDWIDTH = {"int4": 0.85, "int3": 0.80, "int2": 0.70}
FASTER = {"int4": 3.4, "int3": 4.2, "int2": 5.5}
EIGHT_ROWS, PREFILL = 1.4, 0.8


@dataclass(frozen=True)
class Shape:
    """Weights that share x. uses: the models' names for it."""

    out_features: tuple[int, ...]
    in_features: int
    uses: tuple[str, ...] = field(compare=False)

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.out_features))}x{self.in_features}"


def decoder(name: str, hidden: int, key_value: int, intermediate: int) -> list[Shape]:
    """The linears of one model, fused and plain."""
    sizes = {
        "q/k/v fused": ((hidden, key_value, key_value), hidden),
        "gate/up fused": ((intermediate, intermediate), hidden),
        "down": ((hidden,), intermediate),
        "o": ((hidden,), hidden),
        "gate": ((intermediate,), hidden),
        "k": ((key_value,), hidden),
    }
    return [Shape(*size, (f"{name} {use}",)) for use, size in sizes.items()]


def shapes(smoke: bool) -> list[Shape]:
    """Each once, the models that it occurs in together."""
    if smoke:
        return [Shape((24, 8), 136, (f"{FIRST} fused",)), Shape((16,), 40, (f"{FIRST} plain",))]
    found = decoder(FIRST, 4096, 1024, 14336)
    found += decoder("Llama-2-7B", 4096, 4096, 11008) + decoder("Qwen2.5-7B", 3584, 512, 18944)
    uses: dict[Shape, tuple[str, ...]] = {}
    for shape in found:
        uses[shape] = uses.get(shape, ()) + shape.uses
    return [Shape(s.out_features, s.in_features, u) for s, u in uses.items()]


@dataclass(frozen=True)
class Job:
    """One weight, all rows and backends. formats: one, or one for each part of a fused shape."""

    shape: Shape
    formats: tuple[str, ...]
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        return "+".join(dict.fromkeys(self.formats))

    @property
    def parts(self) -> list[tuple[str, int]]:
        """(format, out_features) of each weight."""
        names = self.formats * (len(self.shape.out_features) if len(self.formats) == 1 else 1)
        return list(zip(names, self.shape.out_features, strict=True))


def jobs(smoke: bool) -> list[Job]:
    """In the order of their worth: all of the first model, then the few rows of the others, then their many rows."""
    every = shapes(smoke)
    few, many = ((1, 8), (triton.DENSE_ROWS,)) if smoke else (ROWS[:4], ROWS[4:])
    formats = NARROW[:1] if smoke else NARROW[::-1]
    first = [shape for shape in every if shape.uses[0].startswith(FIRST)]
    rest = [shape for shape in every if shape not in first]
    fused = [shape for shape in first if len(shape.out_features) > 1]
    plain = next(shape for shape in first if len(shape.out_features) == 1)

    def uniform(some: list[Shape], rows: tuple[int, ...]) -> list[Job]:
        return [Job(shape, (name,), rows) for shape in some for name in formats]

    mixed = [Job(shape, NARROW[::-1][: len(shape.out_features)], few) for shape in fused]
    wide = [Job(plain, (name,), few) for name in (WIDE[:1] if smoke else WIDE)]
    return uniform(first, few) + mixed + wide + uniform(first, many) + uniform(rest, few) + uniform(rest, many)


def decode_jobs(smoke: bool) -> list[Job]:
    """The launches of decode.py's Triton variant, which has no workers of its own."""
    (variant,) = (v for v in decode.variants() if v.backend == "triton")
    roles = (decode.SMOKE if smoke else decode.LLAMA).roles.values()
    return [
        Job(Shape(sizes, k, ()), tuple(variant.formats(at, layer, len(sizes))), (1,))
        for at, (sizes, k) in enumerate(roles)
        for layer in range(len(variant.pattern))
    ]


def compile_part(device: Device, part: int, of: int, clock: Clock) -> None:
    """Runs every `of`-th Triton case once, on weights of zeros."""
    todo = {
        (job.name, job.shape.in_features, len(job.parts), rows): (job, rows)
        for job in jobs(device.smoke) + decode_jobs(device.smoke)
        for rows in job.rows
    }
    mine = list(todo.values())[part::of]
    for job, rows in mine[:1] if device.smoke else mine:  # the interpreter compiles nothing
        if clock.left() < 0:
            return
        failure = attempt(device, run_once, device, job, rows)
        if isinstance(failure, Failure):  # the measurement meets it again, and records it
            say(f"speed: {job.shape} {job.name} M{rows} failed to compile or run: {failure.reason[:300]}")
            if failure.broken:
                raise SystemExit(1)


def run_once(device: Device, job: Job, rows: int) -> None:
    """One Triton product of zeros."""
    k, weights = job.shape.in_features, []
    for name, n in job.parts:
        size = layout.layout_of(get_format(name), n, k, GROUP_SIZE).nbytes
        data = torch.zeros(size, dtype=torch.uint8, device=device.torch)
        weights.append(PreparedWeight("triton", get_format(name), n, k, GROUP_SIZE, data))
    device.multiply("triton", torch.zeros(rows, k, dtype=torch.float16, device=device.torch), weights)
    device.synchronize()


def compile_all(options, device: Device, seconds: float) -> dict:
    """All Triton kernels at once, as far as `seconds` go; the rest compiles when it is first called."""
    clock = Clock(seconds)
    of = max(1, min(COMPILERS, (os.cpu_count() or 2) - 2))
    command = [sys.executable, __file__, str(options.folder), "--seconds", str(seconds), "--of", str(of)]
    command += ["--smoke"] * device.smoke
    command += ["--began", str(time.time())]
    workers = [subprocess.Popen([*command, "--part", str(part)]) for part in range(1 if device.smoke else of)]
    try:
        while any([w.poll() is None for w in workers]) and clock.left() > 0:
            time.sleep(0.1)
        unfinished = sum(w.poll() is None for w in workers)
    finally:
        for w in workers:
            if w.poll() is None:
                w.kill()
            w.wait()
    failed = sum(w.returncode != 0 for w in workers) - unfinished
    return {"processes": of, "seconds": clock.spent(), "cut_short": unfinished, "failed": failed}


class Bench:
    """What the jobs share: the device, bandwidths, torch's times, and the rows so far. save: called after every row."""

    def __init__(self, device: Device, clock: Clock, save: Callable[[Bench], object]) -> None:
        self.device, self.clock, self._save = device, clock, save
        self.bandwidths: list[dict[str, float | None]] = []
        self.torch_fp16: dict[tuple[Shape, int], Timing] = {}
        self.rows: list[dict] = []
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}
        self.unavailable: dict[str, str] = {}
        self.measure_bandwidths()

    def measure_bandwidths(self) -> None:
        """Now; one that cannot be had is a failure like that of a row."""
        found = attempt(self.device, bandwidths, self.device)
        if isinstance(found, Failure):
            self.fail(f"bandwidths {len(self.bandwidths)}", found)
        self.bandwidths.append({"copy": None, "read": None} if isinstance(found, Failure) else found)

    def fail(self, name: str, failure: Failure) -> None:
        """Records it; raises SystemExit where nothing more can be measured in this process."""
        self.failed[name] = failure.reason
        say(f"speed: FAILED {name}: {failure.reason.splitlines()[0]}")
        self._save(self)
        if failure.broken:
            say("speed: the GPU context is lost")
            raise SystemExit(1)

    @property
    def copy(self) -> float | None:
        readings = [b["copy"] for b in self.bandwidths if b["copy"]]
        return statistics.median(readings) if readings else None

    def copies(self, nbytes: int) -> int:
        """How many of a weight are cold in turn."""
        return math.ceil(self.device.cold_bytes / nbytes) + (not self.device.smoke)

    def launches(self, copies: int, rows: int) -> int:
        least = MIN_LAUNCHES if rows <= 16 and not self.device.smoke else 1
        return copies * math.ceil(least / copies)

    def time_torch(self, shape: Shape, rows: int) -> Timing:
        """torch.nn.functional.linear on rotating fp16 weights."""
        key = (shape, rows)
        if key not in self.torch_fp16:
            n, k = sum(shape.out_features), shape.in_features
            count = self.copies(2 * n * k)
            weights = [torch.randn(n, k, device=self.device.torch).half() for _ in range(count)]
            x = torch.randn(rows, k, device=self.device.torch).half()
            calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
            self.torch_fp16[key] = self.device.time(calls, self.launches(count, rows))
        return self.torch_fp16[key]

    def run(self, job: Job) -> None:
        """Every backend, mode and number of rows of one weight."""
        made = attempt(self.device, self.make, job)
        if isinstance(made, Failure):
            self.fail(f"{job.shape} {job.name}", made)
            return
        for rows in job.rows:
            product = attempt(self.device, self.product, job, rows, made[0])
            if isinstance(product, Failure):
                self.fail(f"{job.shape} {job.name} M{rows}", product)
                continue
            for backend, mode in self.modes(job, rows):
                self.run_mode(job, backend, mode, *product, made[1])

    def make(self, job: Job) -> tuple[torch.Tensor, list[list[PreparedWeight]]]:
        """The dense fp16 weight, and copies of the prepared ones that are cold in turn."""
        k, where = job.shape.in_features, self.device.torch
        packed = [random_packed(get_format(name), n, k, GROUP_SIZE, where) for name, n in job.parts]
        first = [prepare(p, "cuda") for p in packed]
        reference = torch.cat([dense(p, torch.float16) for p in packed])
        count = self.copies(stored_bytes(first))
        return reference, [first, *([copy_of(w) for w in first] for _ in range(count - 1))]

    def product(self, job: Job, rows: int, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x, and what torch makes of it."""
        x = torch.randn(rows, job.shape.in_features, device=self.device.torch).half()
        return x, torch.nn.functional.linear(x, reference).float()

    def run_mode(
        self, job: Job, backend: str, mode: str, x: torch.Tensor, expected: torch.Tensor, copies: list
    ) -> None:
        """One row of the result, or the reason why there is none."""
        name = f"{job.shape} {job.name} M{len(x)} {backend} {mode}"
        if self.clock.left() < 0:
            self.left_out.append(name)
            return
        case = {
            **{"shape": str(job.shape), "uses": job.shape.uses, "format": job.name, "rows": len(x)},
            **{"backend": backend, "activations": mode, "copies": len(copies), "weight_bytes": stored_bytes(copies[0])},
        }
        row = attempt(self.device, self.measure, case, x, copies, expected, job.shape)
        if isinstance(row, Failure):
            self.fail(name, row)
        else:
            self.rows.append({**row, "at": now()})
            self._save(self)

    def measure(self, case: dict, x: torch.Tensor, copies: list, expected: torch.Tensor, shape: Shape) -> dict:
        """A row of the result: checks the product, then takes its time."""
        backend, mode = case["backend"], case["activations"]
        y = self.device.multiply(backend, x, copies[0], None, mode).float()
        error = round(float((y - expected).norm() / expected.norm()), 5)
        checked = {**case, "error": error, "wrong": not error <= WRONG[mode]}
        base = self.time_torch(shape, len(x))
        return self.row(checked, self.product_time(backend, mode, x, copies), base, shape)

    def modes(self, job: Job, rows: int) -> Iterator[tuple[str, str]]:
        """(backend, activations) that can run; why another cannot is noted."""
        for backend, mode in (("cuda", "fp32"), ("cuda", "int8"), ("triton", "fp32")):
            reasons = [r for name in job.formats if (r := self.device.unsupported_reason(backend, get_format(name)))]
            if reasons:
                self.unavailable[f"{backend} {job.name}"] = reasons[0]
            elif backend == "triton" or rows <= cuda.library().max_rows:
                yield backend, mode

    def product_time(self, backend: str, mode: str, x: torch.Tensor, copies: list) -> Timing:
        calls = [lambda w=w: self.device.multiply(backend, x, w, None, mode) for w in copies]
        return self.device.time(calls, self.launches(len(copies), len(x)))

    def row(self, case: dict, best: Timing, base: Timing, shape: Shape) -> dict:
        """`case` with its time, and what that means."""
        weights = sum(shape.out_features) * shape.in_features
        gbps = ratio(case["weight_bytes"] / 1e3, best.us, 1)
        return {
            **case,
            "bits_per_weight": round(8 * case["weight_bytes"] / weights, 4),
            **best.fields(),
            "gbps": gbps,
            "share_of_copy": None,
            "torch_fp16_us": base.us,
            "times_torch_fp16": ratio(base.us, best.us),
        }


def add_targets(rows: list[dict], copy: float | None) -> dict[str, dict]:
    """Writes `share_of_copy`, and `targets` where there are any, into every row; returns how many were met by which."""
    single = {(r["shape"], r["format"], r["backend"], r["activations"]): r["us"] for r in rows if r["rows"] == 1}
    summary: dict[str, dict] = {}
    for r in rows:
        r["share_of_copy"] = ratio(r["gbps"], copy)
        one = single.get((r["shape"], r["format"], r["backend"], r["activations"]))
        wanted = []
        if r["rows"] == 1 and r["format"] in BANDWIDTH:
            wanted.append(("share_of_copy at least", BANDWIDTH[r["format"]], r["share_of_copy"], 1))
            wanted.append(("times_torch_fp16 at least", FASTER[r["format"]], r["times_torch_fp16"], 1))
        if r["rows"] == 8:
            wanted.append(("time of 8 rows over 1 at most", EIGHT_ROWS, ratio(r["us"], one), -1))
        if r["rows"] == 512:
            wanted.append(("times_torch_fp16 at least", PREFILL, r["times_torch_fp16"], 1))
        r["targets"] = [
            {"target": f"{name} {bar}", "got": got, "met": None if got is None else sign * got >= sign * bar}
            for name, bar, got, sign in wanted
        ]
        for t in r["targets"]:
            key = f"{r['backend']} {r['activations']} {r['format']} M{r['rows']}: {t['target']}"
            counts = summary.setdefault(key, {"met": 0, "missed": 0, "not_measured": 0})
            counts["not_measured" if t["met"] is None else "met" if t["met"] else "missed"] += 1
    return summary


def show(rows: list[dict]) -> None:
    """The table of the log."""
    print(f"{'shape':22} {'format':15} {'M':>3} {'backend':12} {'us':>9} {'GB/s':>7} of copy x torch")
    for r in rows:
        figures = ("us", "gbps", "share_of_copy", "times_torch_fp16")
        cells = " ".join(f"{'-' if r[f] is None else r[f]:>{w}}" for f, w in zip(figures, (9, 7, 7, 7), strict=True))
        missed = " ".join(f"MISSED {t['target']}" for t in r["targets"] if t["met"] is False)
        where = f"{r['backend']} {r['activations']}"
        wrong = f"WRONG: error {r['error']}" if r["wrong"] else ""
        case = f"{r['shape']:22} {r['format']:15} {r['rows']:>3} {where:12}"
        print(case, cells, missed, wrong)


def save(results: Results, bench: Bench, compiling: dict, rivals: dict | None = None) -> dict:
    """Writes what there is so far."""
    targets = add_targets(bench.rows, bench.copy)
    names = ("shape", "format", "rows", "backend", "activations", "error")
    content = {
        "bandwidths_gbps": bench.bandwidths,
        "copy_gbps": bench.copy,
        "compiling": compiling,
        "targets": targets,
        "wrong": [" ".join(str(r[name]) for name in names) for r in bench.rows if r["wrong"]],
        "failed": bench.failed,
        "unavailable": bench.unavailable,
        "left_out": bench.left_out,
        "peers": rivals,
        "seconds": bench.clock.spent(),
        "rows": bench.rows,
    }
    results.write(content)
    return content


def run_all(device: Device, clock: Clock, results: Results, compiling: dict) -> dict:
    """Every job, the bandwidths in between, then the peers; what there is is written after every row."""
    todo, rivals, content = jobs(device.smoke), None, {}
    bench = Bench(device, clock, lambda bench: save(results, bench, compiling))
    say(f"speed: GB/s {bench.bandwidths[0]}")
    try:
        for done, job in enumerate(todo):
            bench.run(job)
            if done in (len(todo) // 3, 2 * len(todo) // 3):
                bench.measure_bandwidths()
                say(f"speed: {done + 1} of {len(todo)} weights, GB/s {bench.bandwidths[-1]}")
            device.empty_cache()
        bench.measure_bandwidths()
        rivals = libraries.measure(bench, shapes(device.smoke), GROUP_SIZE)
    finally:
        content = save(results, bench, compiling, rivals)
        show(bench.rows)
        for key, counts in content["targets"].items():
            print(key, *(f"{count} {name}" for name, count in counts.items() if count))
        counts = f"{len(bench.rows)} rows, {len(bench.failed)} failed, {len(bench.left_out)} left out for want of time"
        say(f"speed: {counts}")
    return content


def main() -> int:
    options = arguments(__doc__, 170).parse_args()
    clock, device = Clock(options.seconds, options.began), Device(options.smoke)
    if options.part is not None:
        compile_part(device, options.part, options.of, clock)
        return 0
    results = Results(options.folder, "speed", options.smoke)
    compiling = compile_all(options, device, COMPILE_SHARE * clock.left())
    say(f"speed: Triton compiled: {compiling}")
    content = run_all(device, clock, results, compiling)
    return 1 if content["wrong"] or content["failed"] or not content["rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
