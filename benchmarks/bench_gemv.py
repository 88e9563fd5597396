"""The CPU linear against the memory and against other libraries: y = x · Wᵀ, weights cold.

    python -m pytest benchmarks/bench_gemv.py --benchmark-json=$(python benchmarks/provenance.py gemv)
    python -m pytest benchmarks/bench_gemv.py -k "int3 and 4096x4096 and threads2"
    AMQ_BENCH_PEERS=none python -m pytest benchmarks/bench_gemv.py         # or a comma-separated list of names
    python benchmarks/plot_gemv.py benchmarks/results/FILE.json gemv.png

An id reads backend, format, shape N×K, rows of x, activations, threads, cold or hot, and a forced instruction set:
`cpu-int3-4096x4096-M1-int8-threads2-cold`. One round multiplies the same x by each of R distinct linears that together
exceed twice the last-level cache, in one native call per linear and no Python in between, as the peers' graphs do; a
time is a round's divided by R. `us_through_op` is the same through the public op in a Python loop. The read bandwidth
is measured right before and after every case, ours and each peer's, since machines are shared; `bandwidth_share` is
GB/s over that. `others` is the share of the cores' time that went to other processes meanwhile: beside them two threads
can take many times as long, by how much differs from library to library, so such cases are marked and not to be quoted.

Peers (benchmarks/peers) run in processes of their own, once per shape, rows and threads, right before the first case of
ours that needs them; those that are not installed are listed with the reason. `versus` in a case's extra_info is peer's
time over ours, above 1 where we are faster, `versus_best` the smallest of those in our format's class: peers of as many
bits or, where none ran, of the next more.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from peers import PEERS
from peers.base import Product
from peers.worker import TOLERANCE, measure

from amq.bench.machine import OtherWork, last_level_cache
from amq.formats import FORMATS, BitFormat, n_groups
from amq.kernels import cpu as native
from amq.kernels.backends import BACKENDS, prepare
from amq.kernels.ops import linear
from amq.packing import PackedWeight, PreparedWeight

pytestmark = pytest.mark.usefixtures("threads")
GROUP_SIZE = 128


@dataclass(frozen=True)
class Shape:
    """out_features × in_features, and which model's config has it."""

    out_features: int
    in_features: int
    source: str
    peers: bool = False

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"


SHAPES = (
    Shape(4096, 4096, "Llama-3.1-8B q_proj, o_proj", peers=True),
    Shape(14336, 4096, "Llama-3.1-8B gate_proj, up_proj", peers=True),
    Shape(4096, 14336, "Llama-3.1-8B down_proj", peers=True),
    Shape(1024, 4096, "Llama-3.1-8B k_proj, v_proj", peers=True),
    Shape(576, 576, "SmolLM2-135M q_proj, o_proj"),
    Shape(192, 576, "SmolLM2-135M k_proj, v_proj"),
    Shape(1536, 576, "SmolLM2-135M gate_proj, up_proj"),
    Shape(576, 1536, "SmolLM2-135M down_proj"),
    Shape(49152, 576, "SmolLM2-135M lm_head"),
)
SMOKE_SHAPES = (Shape(64, 512, "smoke", peers=True), Shape(40, 192, "smoke"))
DENSE = [peer.name for peer in PEERS.values() if not peer.rival]
NARROW = [name for name, fmt in FORMATS.items() if fmt.code_bits <= 4]
BUSY = 0.05
"""A case during which other processes had more of the cores' time than this is marked."""
EXACT = 1e-5
"""Relative error allowed to a product of float32 activations; those rounded to 8 bits may have a peer's TOLERANCE."""


@dataclass(frozen=True)
class Case:
    """One timing. isa: a forced instruction set, or empty for the one that amq picks."""

    format: BitFormat
    shape: Shape
    threads: int
    tokens: int = 1
    activations: str = "int8"
    isa: str = ""
    cold: bool = True

    def __str__(self) -> str:
        parts = ("cpu", self.format.name, self.shape, f"M{self.tokens}", self.activations, f"threads{self.threads}")
        return "-".join(map(str, (*parts, "cold" if self.cold else "hot", *([self.isa] if self.isa else []))))

    @property
    def group(self) -> str:
        return f"{self.shape} M{self.tokens} threads{self.threads}"


def grid(smoke: bool) -> list[Case]:
    """One row of x and int8 activations everywhere; the rest at the first shape. Sorted to build weights once."""
    shapes, threads = (SMOKE_SHAPES, (2,)) if smoke else (SHAPES, (1, 2))
    cases = [Case(FORMATS[name], shape, t) for shape in shapes for name in NARROW for t in threads]
    first, formats, isas = shapes[0], FORMATS.values(), native.cpu_module().isas()
    cases += [Case(fmt, first, t) for fmt in formats if fmt.name not in NARROW for t in threads]
    cases += [Case(fmt, first, threads[-1], activations="fp32") for fmt in formats]
    for name in NARROW:
        fmt = FORMATS[name]
        cases += [Case(fmt, first, threads[0], isa=isa) for isa in isas if isa != "portable"]
        cases += [Case(fmt, first, threads[-1], tokens) for tokens in (4, 16)]
        cases += [Case(fmt, first, threads[-1], 512, mode, cold=False) for mode in ("int8", "fp32")]
    widest = FORMATS[NARROW[-1]]
    cases += [Case(widest, first, threads[-1], 16, "fp32"), Case(widest, first, threads[0], isa="portable")]
    cases += [Case(widest, first, threads[-1], 512, isa=isa, cold=False) for isa in isas if isa != "portable"]
    order = list(FORMATS)
    return sorted(cases, key=lambda c: (shapes.index(c.shape), order.index(c.format.name), c.tokens, c.threads))


def cache_bytes() -> int:
    found = last_level_cache()
    if found is None:
        pytest.fail("the size of the last-level cache is not in /sys, so cold weights cannot be told from warm ones")
    return found


class Stage:
    """What cases share: the buffer that the read bandwidth is measured on, the last weights, the peers' times."""

    def __init__(self, smoke: bool) -> None:
        self.cold_bytes = 2**16 if smoke else 2 * cache_bytes()
        self.reads, self.seconds = (1, 0.0) if smoke else (4, 3.0)
        self._buffer = native.empty_bytes(self.cold_bytes).random_()  # on large pages, as weights are
        self._key, self._weights = None, None
        self._peers: dict[tuple, dict | str] = {}
        self.rows: list[tuple[Case, dict]] = []
        wanted = os.environ.get("AMQ_BENCH_PEERS", ",".join(PEERS)).split(",")
        self.left_out = {
            name: peer.unsupported_reason() if name in wanted else "not in AMQ_BENCH_PEERS"
            for name, peer in PEERS.items()
            if name not in wanted or peer.unsupported_reason() is not None
        }

    def bandwidth(self) -> list[float]:
        """Bytes per second, several readings with torch's current threads."""
        return [self._buffer.nbytes / native.read_seconds(self._buffer) for _ in range(self.reads)]

    def weights(self, fmt: BitFormat, shape: Shape) -> tuple[PackedWeight, list[PreparedWeight]]:
        """The first linear as it was packed, and all R of them prepared."""
        if self._key != (fmt, shape):
            self._key = self._weights = None
            gc.collect()
            self._weights, self._key = build_weights(fmt, shape, self.cold_bytes), (fmt, shape)
        return self._weights

    def peers(self, case: Case) -> dict[str, dict]:
        """Results of the peers that `case` is compared with; measured now unless an earlier case needed them too."""
        wanted = DENSE + (self.rivals(case.format) if case.tokens == 1 else []) if case.shape.peers else []
        results = {}
        for name in wanted:
            key = (name, case.shape, case.tokens, case.threads, case.cold)
            if name not in self.left_out and key not in self._peers:
                self._peers[key] = self._measure(name, case)
            if name not in self.left_out:
                results[name] = self._peers[key]
        return {name: result for name, result in results.items() if result}

    def rivals(self, fmt: BitFormat) -> list[str]:
        """Peers of this format's class, or of the next wider one that has any."""
        here = [peer for peer in PEERS.values() if peer.rival and peer.name not in self.left_out]
        enough = {FORMATS[peer.rival].code_bits for peer in here if FORMATS[peer.rival].code_bits >= fmt.code_bits}
        return [peer.name for peer in here if FORMATS[peer.rival].code_bits == min(enough, default=0)]

    def _measure(self, name: str, case: Case) -> dict:
        n, k = case.shape.out_features, case.shape.in_features
        count = math.ceil(self.cold_bytes / PEERS[name].matrix_bytes(n, k)) if case.cold else 1
        readings, others = self.bandwidth(), OtherWork()
        try:
            result = measure(name, Product(n, k, case.tokens, count, case.threads))
        except RuntimeError as error:
            self.left_out[name] = f"failed: {error}"
            return {}
        result["others"] = round(others.share(), 3)
        gbps = (result["bytes"] + 4 * case.tokens * (n + k)) / result["seconds"] / 1e9
        bandwidth = statistics.median(readings + self.bandwidth()) / 1e9
        result.update(us=round(result.pop("seconds") * 1e6, 2), us_fastest=round(result.pop("fastest") * 1e6, 2))
        result.update(gbps=significant(gbps), error=round(result["error"], 5))
        result.update(bits_per_weight=round(8 * result["bytes"] / (n * k), 4), matrices=count)
        return {
            **result,
            "bandwidth_gbps": significant(bandwidth),
            "bandwidth_share": significant(gbps / bandwidth),
        }


def build_weights(fmt: BitFormat, shape: Shape, cold_bytes: int) -> tuple[PackedWeight, list[PreparedWeight]]:
    """Distinct random linears that together exceed `cold_bytes`."""
    n, k, random = shape.out_features, shape.in_features, np.random.Generator(np.random.SFC64(0))
    count = math.ceil(cold_bytes / fmt.stored_bytes(n, k, GROUP_SIZE))
    at_once = max(1, 2**26 // fmt.stored_bytes(n, k, GROUP_SIZE))
    first, prepared = None, []
    while len(prepared) < count:
        rows, groups = n * min(at_once, count - len(prepared)), n_groups(k, GROUP_SIZE)
        codes = np.frombuffer(bytearray(random.bytes(rows * fmt.row_bytes(k))), np.uint8).reshape(rows, -1)
        scale = (random.random((rows, groups), dtype=np.float32) + np.float32(0.5)) * np.float32(0.01)
        zero_point = random.random((rows, groups), dtype=np.float32) * np.float32(fmt.max_code)
        fields = (torch.from_numpy(codes), torch.from_numpy(scale).half(), torch.from_numpy(zero_point).half())
        block = PackedWeight(fmt, k, GROUP_SIZE, *fields)
        first = first or block.rows(0, n)
        prepared += [prepare(block.rows(start, start + n)) for start in range(0, rows, n)]
    return first, prepared


class Summary:
    """A pytest plugin: the tables at the end of a run."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        terminalreporter.section("gemv: microseconds per product, GB/s, share of the read bandwidth, best peer")
        write(f"{'case':58} {'us':>10} {'GB/s':>7} {'share':>6}   {'x best':>7}  best peer")
        for case, info in self.stage.rows:
            best = info.get("best_peer")
            versus = f"{info['versus_best']:7.2f}  {best} ({info['peers'][best]['us']:.1f} us)" if best else ""
            write(f"{case!s:58} {self._figures(info)} {versus}")
        peers = {(name, case.group): r for case, info in self.stage.rows for name, r in info["peers"].items()}
        for (name, group), result in peers.items():
            write(f"{name + ' ' + group:58} {self._figures(result)} {result['detail']}")
        for reason in sorted(set(self.stage.left_out.values())):
            names = [name for name, why in self.stage.left_out.items() if why == reason]
            write(f"peers left out: {', '.join(names)}: {reason}")
        if any(result["others"] > BUSY for result in [*(info for _, info in self.stage.rows), *peers.values()]):
            write(f"! other processes had over {BUSY:.0%} of the cores' time: not a figure to quote")

    @staticmethod
    def _figures(result: dict) -> str:
        busy = "!" if result["others"] > BUSY else " "
        return f"{result['us']:10.1f} {result['gbps']:7.2f} {result['bandwidth_share']:6.1%} {busy}"


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, smoke: bool) -> Stage:
    stage = Stage(smoke)
    request.config.pluginmanager.register(Summary(stage), "amq-gemv-summary")
    return stage


def seconds_through_op(case: Case, x: torch.Tensor, weights: list[PreparedWeight]) -> float:
    """Seconds per product through `amq.kernels.ops.linear` in a Python loop, whose cost small linears feel."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for weight in weights:
            linear(x, [weight], activations=case.activations)
        rounds.append((time.perf_counter() - start) / len(weights))
    return statistics.median(rounds)


def dequantize_then_linear(packed: PackedWeight, x: torch.Tensor) -> float:
    """Seconds of what kernels must beat on many rows: the weight written out as float32, then torch's product."""
    weight, seconds = torch.empty(packed.out_features, packed.in_features), []
    for _ in range(6):
        start = time.perf_counter()
        native.dequantize_into(packed, weight)
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def check(case: Case, y: torch.Tensor, packed: PackedWeight, x: torch.Tensor) -> float:
    """The relative error of y, after making sure that it is small."""
    weight = torch.empty(packed.out_features, packed.in_features)
    native.dequantize_into(packed, weight)
    expected = torch.nn.functional.linear(x, weight)
    error = float((y - expected).norm() / expected.norm())
    assert error <= (EXACT if case.activations == "fp32" else TOLERANCE), f"{case}: off by {error:.3g} of the norm"
    return error


@torch.inference_mode()
def significant(figure: float) -> float:
    """To four digits, wherever they are: what is small on some processor or beside other work is not 0."""
    return float(f"{figure:.4g}")


def test_gemv(case: Case, stage: Stage, benchmark) -> None:
    if reason := BACKENDS["cpu"].unsupported_reason(case.format):
        pytest.skip(reason)
    peers = stage.peers(case)
    packed, weights = stage.weights(case.format, case.shape)
    weights = weights if case.cold else weights[:1]
    x = torch.randn(case.tokens, case.shape.in_features, generator=torch.Generator().manual_seed(0))

    def run() -> torch.Tensor:
        return native.linear_each(x, weights, case.activations, case.isa)

    error = check(case, native.linear_each(x, weights[:1], case.activations, case.isa), packed, x)

    start = time.perf_counter()
    run()
    rounds = min(20, max(10, math.ceil(stage.seconds / (time.perf_counter() - start))))
    readings, others = stage.bandwidth(), OtherWork()
    benchmark.group = case.group
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
    others = round(others.share(), 3)
    bandwidth = statistics.median(readings + stage.bandwidth())
    seconds = benchmark.stats.stats.median / len(weights)
    moved = weights[0].nbytes + 4 * case.tokens * (case.shape.out_features + case.shape.in_features)
    versus = {name: result["us"] / 1e6 / seconds for name, result in peers.items()}
    if not case.cold:
        versus["dequantize-then-linear"] = dequantize_then_linear(packed, x) / seconds
    info = {
        **{"format": case.format.name, "shape": str(case.shape), "tokens": case.tokens, "threads": case.threads},
        **{"activations": case.activations, "isa": case.isa, "cold": case.cold, "source": case.shape.source},
        **{"matrices": len(weights), "bytes": moved, "error": round(error, 7), "us": round(seconds * 1e6, 2)},
        "bits_per_weight": round(8 * weights[0].nbytes / (case.shape.out_features * case.shape.in_features), 4),
        "us_through_op": round(seconds_through_op(case, x, weights) * 1e6, 2),
        "us_fastest": round(benchmark.stats.stats.min / len(weights) * 1e6, 2),
        "gbps": significant(moved / seconds / 1e9),
        "bandwidth_gbps": significant(bandwidth / 1e9),
        "bandwidth_share": significant(moved / seconds / bandwidth),
        "others": others,
        "versus": {name: significant(ratio) for name, ratio in versus.items()},
        "peers": peers,
    }
    rivals = {name: versus[name] for name in stage.rivals(case.format) if name in versus}
    if rivals:
        info["best_peer"] = min(rivals, key=rivals.get)
        info["versus_best"] = significant(rivals[info["best_peer"]])
    benchmark.extra_info.update(info)
    stage.rows.append((case, info))
