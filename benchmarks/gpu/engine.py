"""What users get: the engines of `amq generate` and `amq serve` on a GPU, over checkpoints in the shapes of a Llama.

    python benchmarks/gpu/engine.py DIR [--smoke]             writes the section "engine" of DIR/suite.json

`own` is `amq.runtime.cuda_engine.CudaEngine`, `torch` is `TorchEngine` over transformers' forward. Both open
checkpoints of random weights that are written here (random_checkpoint.py), the head in 6 bits. Three kinds of rows:

- `agree`: a model of few layers in mixed formats reads a prompt in parts of many and of few rows, then steps; logits
  are compared with those of backend `reference`, which is fed the same tokens. `tokens_equal` is whether the likeliest
  token of each step is the same; of `own` also whether the GPU by itself writes what the host would have chosen.
- `decode`: all layers of Llama-3.1-8B in int3, one sequence, most of the context full: microseconds per token as a
  caller of `Engine.forward` sees them who chooses the tokens, and of `own` where the GPU does (`begin`, `step`); the
  launches of a token as the engine counts them and as the profiler does; what kernels that are no linears take
  (`outside_us`).
- `batch`: of `own`, 1 to 8 sequences that decode by themselves: tokens per second of all together.

What serves must be captured: a banner that does not say so is wrong.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    Clock,
    Device,
    Failure,
    Results,
    arguments,
    attempt,
    bandwidths,
    load_cpu_module,
    now,
    ratio,
    say,
)
from decode import LLAMA, NARROW, SMOKE, Config
from random_checkpoint import write_random
from torch import Tensor

from amq.checkpoint.store import open_checkpoint
from amq.runtime.cuda_engine import CudaEngine, open_cuda
from amq.runtime.cuda_graphs import cuda_graph
from amq.runtime.cuda_weights import CudaWeights
from amq.runtime.engine import Engine, Segment
from amq.runtime.families import read_spec
from amq.runtime.settings import Sampling
from amq.runtime.torch_engine import TorchEngine

FEW_LAYERS, SMOKE_LAYERS, CONTEXTS, SEQUENCES = 4, 2, (512, 8192), (1, 2, 4, 8)
SMOKE_CONTEXTS = (24, 72)
FORMAT = "int3"
"""Of all layers in `decode` and `batch`: the format of the goal in docs/gpu.md."""
STEPS, SMOKE_STEPS = 32, 3
WARM = 2
"""Steps before the clock starts."""
TOP = 20
ROUNDINGS = 16
"""Of 16-bit results in a layer, one behind another."""
TIE = 3 * math.sqrt(2)
"""Two logits, each off by a standard deviation, change places where they are closer than this many, or seldom else."""


def agrees(layers: int, dtype: torch.dtype) -> float:
    """Relative difference of logits that two right ways to compute may have: eight times what independent roundings
    add up to, for what softmax and norms make of them."""
    return 8 * torch.finfo(dtype).eps / 2 * math.sqrt(ROUNDINGS * layers)


def plain(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In place of a capture: static caches, steps run as they are."""
    return step


def random_tokens(sizes: Config, count: int, seed: int = 1) -> list[int]:
    return torch.randint(sizes.vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def read_prompt(engine: Engine, slot: Any, prompt: Sequence[int], most: int) -> Tensor:
    """The logits after the prompt, which goes in parts of at most `most` tokens."""
    starts = range(0, len(prompt), most)
    for start in starts:
        part = prompt[start : start + most]
        logits = engine.forward([Segment(slot, part, start == starts[-1])])
    return logits[0]


def follow(engine: Engine, prompt: Sequence[int], most: int, steps: int, tokens: Sequence[int] | None = None) -> Tensor:
    """float32 [steps, vocabulary]: the logits before each of `tokens`, or of the likeliest ones where they are None."""
    slot = engine.open(prompt, steps, reuse=False)
    rows = [read_prompt(engine, slot, prompt, most).clone()]
    for at in range(steps - 1):
        token = int(rows[-1].argmax()) if tokens is None else tokens[at]
        rows.append(engine.forward([Segment(slot, [token])])[0].clone())
    engine.close(slot)
    return torch.stack(rows)


def compare(found: Tensor, truth: Tensor, allowed: float) -> dict:
    """Logits [steps, vocabulary] against the reference's for the same tokens."""
    difference = float(((found - truth).norm(dim=-1) / truth.norm(dim=-1)).max())
    differ = (found.argmax(-1) != truth.argmax(-1)).nonzero().flatten().tolist()
    best = truth.topk(2).values
    margins = ((best[:, 0] - best[:, 1]) / truth.square().mean(-1).sqrt()).tolist()
    no_tie = [step for step in differ if margins[step] > TIE * allowed]
    return {
        "tokens": len(truth),
        "tokens_equal": not differ,
        "differ_at": [{"step": step, "margin": round(margins[step], 5)} for step in differ],
        "logits_difference": round(difference, 6),
        "allowed": round(allowed, 6),
        "wrong": not difference <= allowed or bool(no_tie),
    }


def torch_engine(device: Device, folder: Path, backend: str, context: int) -> TorchEngine:
    """As `amq.runtime.load` makes it, but for a tokenizer."""
    from transformers import AutoModelForCausalLM

    from amq.integrations.transformers import AmqConfig

    dtype = torch.float32 if device.smoke else torch.float16
    how = AmqConfig(activations="fp32", backend=backend, verify=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=how, use_safetensors=True)
    model.to(device.torch).eval().requires_grad_(False)
    return TorchEngine(model, context, capture=plain if device.smoke or backend == "reference" else None)


@dataclass(frozen=True)
class Prompt:
    """What `agree` reads and then follows. layers: of the model. most: tokens of a part; the second has 8."""

    tokens: list[int]
    steps: int
    layers: int

    @property
    def most(self) -> int:
        return len(self.tokens) - 8

    @property
    def context(self) -> int:
        return len(self.tokens) + self.steps


def reference(device: Device, folder: Path, prompt: Prompt) -> Tensor:
    engine = torch_engine(device, folder, "reference", prompt.context)
    return follow(engine, prompt.tokens, prompt.most, prompt.steps)


def agree_torch(device: Device, folder: Path, backend: str, prompt: Prompt, truth: Tensor) -> dict:
    """A row of the result."""
    engine = torch_engine(device, folder, backend, prompt.context)
    found = follow(engine, prompt.tokens, prompt.most, prompt.steps, truth.argmax(-1).tolist())
    return {"row": "agree", "engine": "torch", "backend": backend, "banner": engine.banner} | compare(
        found, truth, agrees(prompt.layers, torch.float16)
    )


def agree_own(device: Device, folder: Path, cache: str, activations: str, prompt: Prompt, truth: Tensor) -> dict:
    """A row of the result. What is rounded to 8 bits is as coarse as bfloat16."""
    checkpoint = open_checkpoint(folder, verify=False)
    engine = open_cuda(checkpoint, str(device.torch), activations, "float16", prompt.context, 2, cache)
    found = follow(engine, prompt.tokens, prompt.most, prompt.steps, truth.argmax(-1).tolist())
    written = by_itself(engine, prompt)
    host = follow(engine, prompt.tokens, prompt.most, prompt.steps).argmax(-1).tolist()
    rounded = cache == "int8" or activations == "int8"
    row = compare(found, truth, agrees(prompt.layers, torch.bfloat16 if rounded else torch.float16))
    return {
        "row": "agree", "engine": "own", "cache": cache, "activations": activations, "banner": engine.banner, **row,
        "by_itself_equal": written == host, "wrong": row["wrong"] or written != host,
    }  # fmt: skip


def by_itself(engine: CudaEngine, prompt: Prompt) -> list[int]:
    """The tokens behind the prompt: the first by the host, the others by the GPU."""
    slot = engine.open(prompt.tokens, prompt.steps, reuse=False)
    tokens = [int(read_prompt(engine, slot, prompt.tokens, prompt.most).argmax())]
    engine.begin(slot, tokens[0], Sampling(), 0, prompt.steps - 1)
    while len(tokens) < prompt.steps:
        tokens += engine.step().values()
    engine.end(slot)
    engine.close(slot)
    return tokens


def profile(device: Device, step: Callable[[], object]) -> dict:
    """The longest kernels of one step, [name, calls, µs], how many there are, what those take that are no linears, and
    the host's calls that start them."""
    names = ("kernels", "kernels_per_token", "outside_us", "host_launches_per_token")
    if device.smoke:
        return {**dict.fromkeys(names), "profiler": "a smoke run has no kernels to time"}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        device.synchronize()
    events = profiler.key_averages()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.key.startswith("Mem")]
    longest = sorted(kernels, key=lambda e: -e.self_device_time_total)[:TOP]
    return {
        "kernels": [[e.key[:100], e.count, round(e.self_device_time_total, 1)] for e in longest],
        "kernels_per_token": sum(e.count for e in kernels),
        "outside_us": round(sum(e.self_device_time_total for e in kernels if "linear_kernel" not in e.key), 1),
        "host_launches_per_token": sum(e.count for e in events if e.key.startswith("cu") and "Launch" in e.key),
        "profiler": "one step",
    }


def seconds_of(step: Callable[[], object], steps: int) -> float:
    """Seconds of one of `steps`, which follow one another."""
    for _ in range(WARM):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


class Speeds:
    """Rows of models with all layers. copy: GB/s of torch's copy."""

    def __init__(self, device: Device, sizes: Config, copy: float | None) -> None:
        self.device, self.sizes, self.copy = device, sizes, copy
        self.steps = SMOKE_STEPS if device.smoke else STEPS

    def us(self, seconds: float) -> float | None:
        return None if self.device.smoke else round(1e6 * seconds, 1)

    def prompt(self, context: int, seed: int = 1) -> list[int]:
        """Of so many tokens that every part is multiplied densely, where nothing is to be compiled for it."""
        room = context - 3 * self.steps - 8
        return random_tokens(self.sizes, room // 256 * 256 or context // 2, seed)

    def cache_bytes(self, positions: int, cache: str) -> int:
        of_head = 2 * self.sizes.head_features if cache == "float16" else self.sizes.head_features + 4
        return 2 * self.sizes.layers * self.sizes.key_value_heads * of_head * positions

    def row(self, engine: Any, positions: int, us: float | None, cache: str, rows: int = 1) -> dict:
        """What every row says of a step of `rows` sequences. us: of the fastest way to choose tokens."""
        size = engine.weight_bytes + rows * self.cache_bytes(positions, cache)
        gbps = ratio(size / 1e3, us, 1)
        return {
            "banner": engine.banner, "positions": positions, "cache": cache, "weight_bytes": engine.weight_bytes,
            "bytes_per_step": size, "gbps": gbps, "share_of_copy": ratio(gbps, self.copy),
            "tokens_per_second": ratio(rows * 1e6, us, 1),
        }  # fmt: skip

    def decode_torch(self, engine: TorchEngine, context: int) -> dict:
        found = self._chosen_by_host(engine, context)
        captured = "captured" in engine.banner
        return {
            "row": "decode", "engine": "torch", "context": context, "captured": captured, **found,
            **self.row(engine, found["prompt_tokens"], found["us_per_token"], "float16"),
            "wrong": not (captured and found["logits_finite"]),
        }  # fmt: skip

    def decode_own(self, engine: CudaEngine, context: int, cache: str, activations: str) -> dict:
        found = self._chosen_by_host(engine, context)
        prompt = self.prompt(context)
        chosen = self._by_itself(engine, [prompt], context)
        us = chosen.pop("us_per_step")
        captured = "no CUDA graphs" not in engine.banner
        return {
            "row": "decode", "engine": "own", "context": context, "activations": activations, "captured": captured,
            **found, "own_us_per_token": us, "launches": sum(engine.launches[1]), **chosen,
            **self.row(engine, len(prompt), us, cache),
            "wrong": not (captured and found["logits_finite"] and chosen["tokens_valid"]),
        }  # fmt: skip

    def batch_own(self, engine: CudaEngine, context: int, cache: str, activations: str, sequences: int) -> dict:
        prompts = [self.prompt(context, seed) for seed in range(1, sequences + 1)]
        found = self._by_itself(engine, prompts, context)
        return {
            "row": "batch", "engine": "own", "sequences": sequences, "activations": activations, **found,
            **self.row(engine, len(prompts[0]), found["us_per_step"], cache, sequences),
            "wrong": not found["tokens_valid"],
        }  # fmt: skip

    def _chosen_by_host(self, engine: Any, context: int) -> dict:
        """Of the second of two texts: the first compiles what is compiled when it is first used."""
        prompt = self.prompt(context)
        slot = engine.open(prompt, context - len(prompt), reuse=False)
        read_prompt(engine, slot, prompt, engine.max_rows)
        engine.close(slot)
        slot = engine.open(prompt, context - len(prompt), reuse=False)
        start = time.perf_counter()
        logits = read_prompt(engine, slot, prompt, engine.max_rows)
        prompt_seconds = time.perf_counter() - start

        def step() -> None:
            nonlocal logits
            logits = engine.forward([Segment(slot, [int(logits.argmax(-1))])])

        times = []
        for _ in range(self.steps):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        seen = attempt(self.device, profile, self.device, step)
        engine.close(slot)
        return {
            "prompt_tokens": len(prompt), "logits_finite": bool(logits.isfinite().all()),
            "prompt_tokens_per_second": None if self.device.smoke else round(len(prompt) / prompt_seconds, 1),
            "us_per_token": self.us(statistics.median(times)),
            **({"profiler": seen.reason} if isinstance(seen, Failure) else seen),
        }  # fmt: skip

    def _by_itself(self, engine: CudaEngine, prompts: Sequence[list[int]], context: int) -> dict:
        """Sequences that the GPU goes on with; what a step of them takes."""
        slots = []
        for prompt in prompts:
            slots.append(engine.open(prompt, context - len(prompt), reuse=False))
            first = int(read_prompt(engine, slots[-1], prompt, engine.max_rows).argmax())
            engine.begin(slots[-1], first, Sampling(), 0, context - len(prompt))
        valid = True

        def step() -> None:
            nonlocal valid
            valid &= all(token >= 0 for token in engine.step().values())

        seconds = seconds_of(step, self.steps)
        for slot in slots:
            engine.end(slot)
            engine.close(slot)
        return {"us_per_step": self.us(seconds), "tokens_valid": valid}


class Stage:
    """The rows so far; written after each."""

    def __init__(self, device: Device, clock: Clock, results: Results) -> None:
        self.device, self.clock, self.results = device, clock, results
        self.content: dict[str, Any] = {"model": "", "copy_gbps": None, "rows": [], "failed": {}, "left_out": {}}

    def make(self, name: str, function: Callable[..., Any], *values: object) -> Any:
        """What rows are made of, or None with the reason written down; ends the process where the GPU context is
        lost."""
        if self.clock.left() < 0:
            self.content["left_out"][name] = "no time left"
            self.save()
            return None
        made = attempt(self.device, function, *values)
        if not isinstance(made, Failure):
            return made
        self.content["failed"][name] = made.reason
        say(f"engine: FAILED {name}: {made.reason}")
        self.save()
        if made.broken:
            raise SystemExit(1)
        return None

    def add(self, name: str, function: Callable[..., dict], *values: object) -> None:
        row = self.make(name, function, *values)
        if row is not None:
            self.content["rows"].append({**row, "at": now()})
            say(f"engine: {name}: { ({k: v for k, v in row.items() if k not in ('kernels', 'row')}) }")
            self.save()

    def save(self) -> None:
        self.results.write({**self.content, "seconds": self.clock.spent()})


def agreement(stage: Stage, sizes: Config, folder: Path) -> tuple[Prompt, Tensor] | None:
    """Rows `agree` of our own engine; what the other is to be compared with."""
    device = stage.device
    tokens, steps, layers = (12, SMOKE_STEPS, SMOKE_LAYERS) if device.smoke else (520, STEPS, FEW_LAYERS)
    prompt = Prompt(random_tokens(sizes, tokens), steps, layers)
    if stage.make("few layers", write_random, folder, sizes, layers, prompt.context, NARROW, device.torch) is None:
        return None
    truth = stage.make("reference", reference, device, folder, prompt)
    if truth is None:
        return None
    for cache, activations in (("float16", "fp32"), ("int8", "fp32"), ("float16", "int8")):
        stage.add(f"agree own {cache} {activations}", agree_own, device, folder, cache, activations, prompt, truth)
    return prompt, truth


def torch_backends(device: Device) -> tuple[str, ...]:
    if not device.smoke:
        return "cuda", "triton"
    return ("reference",) if load_cpu_module() else ("cpu",)  # amq refuses GPU backends on a CPU


def own_weights(device: Device, folder: Path, context: int) -> CudaWeights:
    checkpoint = open_checkpoint(folder, verify=False)
    names = {*checkpoint.other_names, *checkpoint.record.formats}
    return CudaWeights(checkpoint, read_spec(checkpoint.config, "config.json", names), context, device.torch)


def own_engine(
    device: Device, weights: CudaWeights, context: int, sequences: int, cache: str, int8: bool
) -> CudaEngine:
    """As `open_cuda` makes it, over weights that are there already."""
    from amq.runtime import cuda_engine

    on_gpu = not device.smoke
    capture = cuda_graph(device.torch) if on_gpu else None
    many = cuda_engine._many(int8) if on_gpu else None
    kinds = [cache] * weights.spec.own_caches
    return CudaEngine(weights, context, sequences, torch.float16, int8, kinds, "CUDA engine", capture, many)


def speeds(stage: Stage, sizes: Config, folder: Path) -> None:
    """Rows `decode` and `batch`, what decides most first."""
    device, contexts = stage.device, SMOKE_CONTEXTS if stage.device.smoke else CONTEXTS
    copy = stage.make("bandwidths", bandwidths, device)
    stage.content["copy_gbps"] = None if copy is None else copy["copy"]
    of = Speeds(device, sizes, stage.content["copy_gbps"])
    if stage.make("model", write_random, folder, sizes, sizes.layers, max(contexts), (FORMAT,), device.torch) is None:
        return
    weights = stage.make("weights", own_weights, device, folder, max(contexts))
    for context, cache, int8, counts in (
        (contexts[0], "float16", False, SEQUENCES), (contexts[1], "float16", False, ()),
        (contexts[1], "int8", False, ()), (contexts[0], "float16", True, SEQUENCES[::3]),
    ):  # fmt: skip
        if weights is not None:
            own_rows(stage, of, weights, context, cache, int8, counts)
    del weights
    device.empty_cache()
    backend = torch_backends(device)[0]
    for context in contexts:
        engine = stage.make(f"torch engine {context}", torch_engine, device, folder, backend, context)
        if engine is not None:
            stage.add(f"torch {context}", of.decode_torch, engine, context)
        del engine
        device.empty_cache()


def own_rows(
    stage: Stage, of: Speeds, weights: CudaWeights, context: int, cache: str, int8: bool, counts: Sequence[int]
) -> None:
    """counts: of sequences, of the rows `batch`."""
    device, activations = stage.device, "int8" if int8 else "fp32"
    name = f"own {context} {cache} cache {activations}"
    engine = stage.make(name, own_engine, device, weights, context, max(counts, default=1), cache, int8)
    if engine is None:
        return
    stage.add(f"{name}, decode", of.decode_own, engine, context, cache, activations)
    for count in counts:
        stage.add(f"{name}, {count} sequences", of.batch_own, engine, context, cache, activations, count)


def main() -> int:
    options = arguments(__doc__, 90).parse_args()
    clock, device = Clock(options.seconds, options.began), Device(options.smoke)
    stage = Stage(device, clock, Results(options.folder, "engine", options.smoke))
    sizes = SMOKE if device.smoke else LLAMA
    stage.content["model"] = sizes.name
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="amq-engine-") as folder:
        few = Path(folder, "few")
        found = agreement(stage, sizes, few)
        speeds(stage, sizes, Path(folder, "all"))
        for backend in torch_backends(device) if found else ():
            stage.add(f"agree torch {backend}", agree_torch, device, few, backend, *found)
    stage.save()
    content = stage.content
    return 1 if content["failed"] or not content["rows"] or any(row["wrong"] for row in content["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
