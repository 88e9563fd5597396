"""What the parts of the GPU suite share: the device, its clock, random weights, and the file that results go to.

`Device` is the only place that knows whether there is a GPU. With `smoke` it stands a CPU in for one: CUDA kernels come
from the shim of tests/cuda_shim, Triton's from its interpreter, a graph is a plain call, and no time is taken: every
figure that comes from one is None, so that a smoke run cannot be mistaken for a measurement.

`attempt` runs what may fail: an error, of memory too, is the result of its row and never the end of a part. `Results`
writes a part's section after every row, and `leave_on_termination` lets `timeout` end a part through its `finally`.

The suite runs from a checkout with nothing installed. `amq._triton` has another place there (kernels/triton) than after
an installation; `load_triton_kernels` registers it, always from the checkout. No part but search.py needs `amq._cpu`;
where that is not installed, gpu_suite.sh builds it and `load_cpu_module` registers it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "benchmarks"))  # provenance
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a few small functions: a pool would take longer to start

import torch  # noqa: E402
from provenance import provenance  # noqa: E402
from torch import Tensor  # noqa: E402

from amq.errors import AmqError  # noqa: E402
from amq.formats import BitFormat, n_groups  # noqa: E402
from amq.kernels import cpu as native  # noqa: E402
from amq.kernels import cuda, triton  # noqa: E402
from amq.kernels import gpu_layout as layout  # noqa: E402
from amq.kernels import launch_table as tuning  # noqa: E402
from amq.packing import PackedWeight, PreparedWeight, dequantize  # noqa: E402

COLD = 4
"""Weights rotate over copies that together are this many times as large as the L2 cache."""
ROUNDS = 11
"""Timed replays of one graph."""
UNTIMED = 2
"""Replays before those."""
DENSE_ROWS = 2048
"""Rows dequantized at once: bounds the temporaries."""


def load_triton_kernels() -> None:
    """kernels/triton of this checkout as `amq._triton`."""
    _register("_triton", ROOT / "kernels" / "triton" / "__init__.py", is_package=True)


def load_cpu_module() -> str | None:
    """`amq._cpu` as installed, else the one that gpu_suite.sh built into the folder AMQ_SUITE_CPU; None if it can be
    used, else the reason why not."""
    built = sorted(Path(os.environ.get("AMQ_SUITE_CPU", ROOT / "amq")).rglob("_cpu.*.so"))
    try:
        if importlib.util.find_spec("amq._cpu") is None and built:
            _register("_cpu", built[0])
        native.cpu_module()
    except (AmqError, ImportError) as error:
        return str(error)
    return None


def _register(name: str, path: Path, is_package: bool = False) -> None:
    """The file at `path` as the module `amq.NAME`."""
    folders = [str(path.parent)] if is_package else None
    spec = importlib.util.spec_from_file_location(f"amq.{name}", path, submodule_search_locations=folders)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    setattr(sys.modules["amq"], name, module)


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median of ROUNDS replays, the fastest and the slowest; None in a smoke run."""

    us: float | None
    us_fastest: float | None
    us_slowest: float | None
    launches: int

    def fields(self) -> dict:
        return {"us": self.us, "us_fastest": self.us_fastest, "us_slowest": self.us_slowest, "launches": self.launches}


class Clock:
    """What is left of a part's share of the time. began: time.time() when the share began, None for now: a part's share
    holds the start of Python and torch."""

    def __init__(self, seconds: float, began: float | None = None) -> None:
        self.start = time.monotonic() - (0 if began is None else time.time() - began)
        self.end = self.start + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def spent(self) -> float:
        return round(time.monotonic() - self.start, 1)


class Device:
    """A GPU, or with `smoke` the CPU in its place."""

    def __init__(self, smoke: bool) -> None:
        self.smoke = smoke
        if smoke:
            os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are loaded
            torch.set_num_threads(1)
        elif not torch.cuda.is_available():
            raise SystemExit("torch finds no GPU here; --smoke runs the same code on a CPU and measures nothing")
        self.torch = torch.device("cpu" if smoke else "cuda:0")
        self.properties = None if smoke else torch.cuda.get_device_properties(0)
        self.cold_bytes = 1 if smoke else COLD * self.properties.L2_cache_size
        self._stream = None if smoke else torch.cuda.Stream()
        load_triton_kernels()

    def unsupported_reason(self, backend: str, fmt: BitFormat) -> str | None:
        """None if `backend` can run `fmt`, else the reason."""
        if backend == "cuda" and self.smoke:
            try:
                return None if cuda.library().has_bits(fmt.bits) else "the shim was built without it"
            except AmqError as error:
                return str(error)
        return (cuda if backend == "cuda" else triton).unsupported_reason(fmt)

    def synchronize(self) -> None:
        if not self.smoke:
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        if not self.smoke:
            torch.cuda.empty_cache()

    def multiply(
        self,
        backend: str,
        x: Tensor,
        weights: Sequence[PreparedWeight],
        bias: Tensor | None = None,
        activations: str = "fp32",
    ) -> Tensor:
        """x · Wᵀ (+ bias) through `amq.kernels.cuda` or `amq.kernels.triton`, on the current stream."""
        if backend == "triton":
            return triton.linear(x, weights, bias)
        return cuda.linear(x, weights, bias, activations)

    def capture(self, function: Callable[[], Tensor | None]) -> tuple[Callable[[], object], Tensor | None]:
        """Runs `function` once, then captures it in a CUDA graph. Returns what replays it, and what it returned while
        it was captured, which a replay overwrites."""
        if self.smoke:
            output = function()
            return (lambda: function() if output is None else output.copy_(function())), output
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            try:
                output = function()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, output

    def replay(self, replay: Callable[[], object], calls: int, rounds: int = ROUNDS) -> Timing:
        """Times a captured function of `calls` calls."""
        if self.smoke:
            return Timing(None, None, None, calls)
        self._stream.wait_stream(torch.cuda.current_stream())
        readings = []
        with torch.cuda.stream(self._stream):
            for i in range(UNTIMED + rounds):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replay()
                end.record()
                end.synchronize()
                if i >= UNTIMED:
                    readings.append(start.elapsed_time(end) * 1e3 / calls)
        return Timing(*(round(f(readings), 3) for f in (statistics.median, min, max)), calls)

    def time(self, calls: Sequence[Callable[[], object]], launches: int) -> Timing:
        """Microseconds per call of `calls` in turn, `launches` of them in one graph: nothing is launched from Python
        while the clock runs. What they return is dropped."""

        def run() -> None:
            for i in range(launches):
                calls[i % len(calls)]()

        replay, _ = self.capture(run)
        return self.replay(replay, launches)


def random_packed(
    fmt: BitFormat, out_features: int, in_features: int, group_size: int, where: torch.device
) -> PackedWeight:
    """Random bytes as codes, fractional zero points among them, scales that give weights of about 0.02."""
    shape = (out_features, n_groups(in_features, group_size))
    codes = torch.randint(0, 256, (out_features, fmt.row_bytes(in_features)), dtype=torch.uint8, device=where)
    scale = 0.07 / fmt.levels * (0.5 + torch.rand(shape, device=where))
    zero_point = fmt.max_code * torch.rand(shape, device=where)
    return PackedWeight(fmt, in_features, group_size, codes, scale.half(), zero_point.half())


def prepare(packed: PackedWeight, backend: str) -> PreparedWeight:
    """`packed` in the layout of the GPU backends, wherever it lies."""
    return PreparedWeight.of(packed, backend, layout.prepare(packed))


def copy_of(weight: PreparedWeight) -> PreparedWeight:
    """The same weight elsewhere in memory."""
    return replace(weight, data=weight.data.clone())


def dense(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """W [out_features, in_features] by the reference, on the device of `packed`."""
    starts = range(0, packed.out_features, DENSE_ROWS)
    return torch.cat([dequantize(packed.rows(start, start + DENSE_ROWS), dtype) for start in starts])


def stored_bytes(weights: Sequence[PreparedWeight]) -> int:
    """Codes, scales and zero points as the file holds them; padding of the layout is not counted."""
    return sum(w.format.stored_bytes(w.out_features, w.in_features, w.group_size) for w in weights)


def ratio(a: float | None, b: float | None, digits: int = 3) -> float | None:
    """a / b; None where one of them was not measured."""
    return None if a is None or b is None else round(a / b, digits)


def bandwidths(device: Device) -> dict[str, float | None]:
    """GB/s of torch's copy of a large buffer, bytes read and written, and of its sum of one, bytes read."""
    count = 2**10 if device.smoke else 2**28  # 1 GiB of float32: many times any L2
    source = torch.rand(count, device=device.torch)
    target = torch.empty_like(source)
    copy = device.time([lambda: target.copy_(source)], 4)
    read = device.time([lambda: source.sum()], 4)
    return {"copy": ratio(2 * source.nbytes / 1e3, copy.us, 1), "read": ratio(source.nbytes / 1e3, read.us, 1)}


@dataclass(frozen=True)
class Failure:
    """What became of a call that raised. broken: the process's GPU context is gone, whatever it does next fails too."""

    reason: str
    traceback: str
    broken: bool


Result = TypeVar("Result")


def attempt(device: Device, function: Callable[..., Result], *arguments: object) -> Result | Failure:
    """The result of a call, or why there is none: a failure of any kind is a result of a measurement.

    Memory that the failed call held is free afterwards: nothing of it but text is kept, and the allocator gives back
    what it had cached, so that a row that did not fit takes no later one along.
    """
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever its kind; what ends the process (SystemExit) passes
        kind = "out of memory" if isinstance(error, (torch.OutOfMemoryError, MemoryError)) else type(error).__name__
        reason, trace = f"{kind}: {str(error)[:1500]}", traceback.format_exc()[-3000:]
    # The exception is gone here, and with it the frames that held the call's tensors.
    return Failure(reason, trace, is_broken(device))


def is_broken(device: Device) -> bool:
    """Whether the process's GPU context is gone; gives cached memory back first."""
    gc.collect()  # a failed capture may leave cycles that hold its tensors
    try:
        device.synchronize()
        device.empty_cache()
        torch.zeros(1, device=device.torch).item()
    except torch.OutOfMemoryError:
        return False  # somebody has all the memory, but the context lives
    except RuntimeError:
        return True
    return False


def output_of(*command: str) -> str:
    """The output of a command, or why there is none."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return result.stdout.strip() or f"unknown: {result.stderr.strip()[:200]}"


def sources_digest() -> str:
    """Tells which kernels ran even where there is no git."""
    files = [f for folder in ("kernels/cuda", "kernels/triton", "amq/kernels") for f in (ROOT / folder).glob("*.*")]
    digest = hashlib.sha256()
    for file in sorted(f for f in files if f.suffix in (".py", ".cu", ".cuh")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def machine(device: Device) -> dict:
    """Where and with what this ran."""
    gpu = {}
    if not device.smoke:
        p = device.properties
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        answer = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv")
        gpu = {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "memory_bytes": p.total_memory,
            "nvidia_smi": answer.splitlines(),
        }
    return {
        **gpu,
        **provenance(),
        "sources": sources_digest(),
        "library": str(os.environ.get("AMQ_CUDA_LIBRARY", "amq/_cuda.so")),
        "tuning": tuning_table(device),
        "cuda": torch.version.cuda,
    }


def tuning_table(device: Device) -> str:
    """Whether launch parameters come from measurements made before (`amq.kernels.launch_table`)."""
    path = None if device.smoke else tuning.table_path(device.properties.name)
    return f"launch parameters from {path}" if path and path.exists() else "no table: launch parameters as reasoned"


class Results:
    """One section of DIR/suite.json, and the others as they are.

    `write` is called after every row: what was measured survives a part that is killed. Each row of a section carries
    `at`, seconds since 1970, to be matched with the section "clocks".
    """

    def __init__(self, folder: Path, section: str, smoke: bool) -> None:
        self._path, self._section = folder / "suite.json", section
        self._all = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._all["smoke"] = smoke
        if smoke:
            self._all["note"] = "a smoke run on a CPU: nothing was measured, every figure is null"

    def write(self, content: object) -> None:
        self._all[self._section] = content
        write_json(self._path, self._all)


def record(folder: Path, section: str, content: object, smoke: bool) -> None:
    """Puts one section into suite.json."""
    Results(folder, section, smoke).write(content)


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    """All of it or nothing. Without an indent it takes milliseconds for hundreds of rows, and is done after each."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=indent) + "\n")
    temporary.replace(path)


def now() -> float:
    """`at` of a row."""
    return round(time.time(), 2)


def leave_on_termination() -> None:
    """SIGTERM, which `timeout` sends, leaves through every `finally`; again each second, since an exception is lost
    where it meets a callback of C code or a destructor."""

    def leave(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGALRM, leave)


def say(text: str) -> None:
    """One line of the log, with the time since this process began."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


STARTED = time.monotonic()
BEGAN = time.time()


def arguments(description: str, seconds: float) -> argparse.ArgumentParser:
    """What every part takes; asking for it also makes SIGTERM leave in good order."""
    leave_on_termination()
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU: checks the code, measures nothing")
    parser.add_argument("--seconds", type=float, default=seconds, help="what does not fit into them is left out")
    parser.add_argument("--began", type=float, default=BEGAN, help="when they began, in seconds since 1970")
    parser.add_argument("--part", type=int, help="for workers that this script starts itself")
    parser.add_argument("--of", type=int, default=1, help="likewise")
    return parser
