"""What users get: `amq.runtime.torch_engine.TorchEngine` over a Llama of transformers with the shapes of Llama-3.1-8B.

    python benchmarks/gpu/engine.py DIR [--smoke]             writes the section "engine" of DIR/suite.json

The model comes from its config: linears of mixed formats are random from the start (`StoredLinear`), the rest is random
fp16; no dense linear exists, on no device. Two kinds of rows:

- `greedy`: a model of few layers reads a prompt in parts of many and of few rows, then steps; its logits are compared
  with those of the same model on backend `reference`, which is fed the same tokens. `tokens_equal` is whether the
  likeliest token of each step is the same.
- `decode`: all layers, one row for each context: microseconds per token as a caller of `Engine.forward` sees them, with
  most of the context full, the banner (it must say that steps are captured), the longest kernels of one step, how many
  kernels a token takes, and how many calls of the host started them.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Clock, Device, Failure, Results, arguments, attempt, load_cpu_module, now, random_packed, ratio, say
from decode import LLAMA, NARROW, SMOKE, Config
from torch import Tensor, nn

from amq.formats import get_format
from amq.kernels.modules import Execution, StoredLinear
from amq.runtime.engine import Segment
from amq.runtime.torch_engine import TorchEngine

GROUP_SIZE = 128
FEW_LAYERS, CONTEXTS = 4, (512, 8192)
SMOKE_CONTEXTS = (96, 160)
STEPS = 32
TOP = 20
ROUNDINGS = 16
"""Of 16-bit results in a layer, one behind another."""
TIE = 3 * math.sqrt(2)
"""Two logits, each off by a standard deviation, change places where they are closer than this many, or seldom else."""


def agrees(layers: int, dtype: torch.dtype) -> float:
    """Relative difference of logits that two right ways to compute may have: eight times what independent roundings
    add up to, for what softmax and norms make of them."""
    return 8 * torch.finfo(dtype).eps / 2 * math.sqrt(ROUNDINGS * layers)


def transformers_config(sizes: Config, layers: int, context: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads,
        head_dim=sizes.head_features,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )


class Models:
    """Models of equal weights, whatever their backend: the packed weights are made once for each format and shape."""

    def __init__(self, device: Device, sizes: Config) -> None:
        self.device, self.sizes = device, sizes
        self.dtype = torch.float32 if device.smoke else torch.float16
        self._packed: dict[tuple, Any] = {}

    def build(self, layers: int, context: int, backend: str) -> nn.Module:
        from transformers import AutoModelForCausalLM

        where = self.device.torch
        config = transformers_config(self.sizes, layers, context)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval().requires_grad_(False)
        self._quantize(model, Execution("fp32", backend, NARROW))
        generator = torch.Generator(where).manual_seed(0)
        for name, parameter in list(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, device=where, dtype=self.dtype)
            values = 0.02 * noise if parameter.ndim > 1 else 1 + 0.1 * noise
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))
        with where:
            model.model.rotary_emb = type(model.model.rotary_emb)(config)  # the only buffers
        return model

    def _quantize(self, model: nn.Module, execution: Execution) -> None:
        """Puts StoredLinears into the blocks, formats in turn."""
        for index, block in enumerate(model.model.layers):
            for at, (role, linear) in enumerate([(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]):
                shape = (linear.out_features, linear.in_features)
                fmt = get_format(NARROW[(at + index) % len(NARROW)])
                stored = StoredLinear(fmt, shape, GROUP_SIZE, execution, None, f"model.layers.{index}.{role}")
                stored.store(self._weight(fmt.name, *shape))
                owner, _, attribute = role.rpartition(".")
                setattr(block.get_submodule(owner), attribute, stored)

    def _weight(self, name: str, n: int, k: int) -> Any:
        if (name, n, k) not in self._packed:
            self._packed[name, n, k] = random_packed(get_format(name), n, k, GROUP_SIZE, self.device.torch)
        return self._packed[name, n, k]


def plain(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In place of a capture: static caches, steps run as they are."""
    return step


def random_tokens(sizes: Config, count: int) -> list[int]:
    return torch.randint(sizes.vocabulary, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def read_prompt(engine: TorchEngine, slot: Any, prompt: Sequence[int]) -> Tensor:
    """The logits after the prompt, which goes in parts of at most `max_rows`."""
    starts = range(0, len(prompt), engine.max_rows)
    for start in starts:
        part = prompt[start : start + engine.max_rows]
        logits = engine.forward([Segment(slot, part, start == starts[-1])])
    return logits[0]


def follow(engine: TorchEngine, prompt: Sequence[int], steps: int, tokens: Sequence[int] | None = None) -> Tensor:
    """float32 [steps, vocabulary]: the logits before each of `tokens`, or of the likeliest ones where they are None."""
    slot = engine.open(prompt, steps)
    rows = [read_prompt(engine, slot, prompt).clone()]
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


def greedy(device: Device, models: Models, backend: str) -> dict:
    """A row of the result."""
    prompt_tokens, steps, layers = (40, 8, 2) if device.smoke else (520, STEPS, FEW_LAYERS)
    context, prompt = prompt_tokens + steps, random_tokens(models.sizes, prompt_tokens)
    rows = max(1, prompt_tokens - 8)  # the second part of the prompt has 8
    reference = TorchEngine(models.build(layers, context, "reference"), context, max_rows=rows, capture=plain)
    truth = follow(reference, prompt, steps)
    del reference
    device.empty_cache()
    capture = plain if device.smoke else None
    engine = TorchEngine(models.build(layers, context, backend), context, max_rows=rows, capture=capture)
    found = follow(engine, prompt, steps, truth.argmax(-1).tolist())
    return {"row": "greedy", "layers": layers, "backend": backend, "banner": engine.banner} | compare(
        found, truth, agrees(layers, models.dtype)
    )


def profile(device: Device, step: Callable[[], object]) -> dict:
    """The longest kernels of one step, [name, calls, µs], how many there are, and the host's calls that start them."""
    empty = {"kernels": None, "kernels_per_token": None, "host_launches_per_token": None}
    if device.smoke:
        return {**empty, "profiler": "a smoke run has no kernels to time"}
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
        "host_launches_per_token": sum(e.count for e in events if e.key.startswith("cu") and "Launch" in e.key),
        "profiler": "one step",
    }


def decode(device: Device, model: nn.Module, sizes: Config, context: int) -> dict:
    """A row of the result."""
    device.empty_cache()
    if not device.smoke:
        torch.cuda.reset_peak_memory_stats()
    engine = TorchEngine(model, context, capture=plain if device.smoke else None)
    prompt = random_tokens(sizes, (context - 3 * STEPS // 2) // 256 * 256 or context // 2)
    slot = engine.open(prompt, context - len(prompt))
    read_prompt(engine, slot, prompt)  # compiles what is compiled when first used
    engine.close(slot)
    slot = engine.open(prompt, context - len(prompt), reuse=False)
    start = time.perf_counter()
    logits = read_prompt(engine, slot, prompt)
    prompt_seconds = time.perf_counter() - start
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        logits = engine.forward([Segment(slot, [int(logits.argmax(-1))])])
        times.append(time.perf_counter() - start)
    seen = attempt(device, profile, device, lambda: engine.forward([Segment(slot, [int(logits.argmax(-1))])]))
    engine.close(slot)
    us = None if device.smoke else round(1e6 * statistics.median(times), 1)
    captured, finite = "captured" in engine.banner, bool(logits.isfinite().all())
    return {
        "row": "decode", "context": context, "prompt_tokens": len(prompt), "banner": engine.banner,
        "captured": captured, "logits_finite": finite, "wrong": not (captured and finite),
        "prompt_tokens_per_second": None if device.smoke else round(len(prompt) / prompt_seconds, 1),
        "us_per_token": us, "tokens_per_second": ratio(1e6, us, 1), "weight_bytes": engine.weight_bytes,
        "gbps": ratio(engine.weight_bytes / 1e3, us, 1),
        "peak_bytes": None if device.smoke else torch.cuda.max_memory_allocated(),
        **({"profiler": seen.reason} if isinstance(seen, Failure) else seen),
    }  # fmt: skip


class Stage:
    """The rows so far; written after each."""

    def __init__(self, device: Device, clock: Clock, results: Results) -> None:
        self.device, self.clock, self.results = device, clock, results
        self.content = {"model": "", "rows": [], "failed": {}, "left_out": {}}

    def add(self, name: str, function: Callable[..., dict], *values: object) -> None:
        """A row, or why there is none; ends the process where the GPU context is lost."""
        if self.clock.left() < 0:
            self.content["left_out"][name] = "no time left"
            self.save()
            return
        row = attempt(self.device, function, self.device, *values)
        if isinstance(row, Failure):
            self.content["failed"][name] = row.reason
            say(f"engine: FAILED {name}: {row.reason}")
        else:
            self.content["rows"].append({**row, "at": now()})
            shown = {k: v for k, v in row.items() if k not in ("kernels", "row")}
            say(f"engine: {name}: {shown}")
        self.save()
        if isinstance(row, Failure) and row.broken:
            raise SystemExit(1)

    def save(self) -> None:
        self.results.write({**self.content, "seconds": self.clock.spent()})


def main() -> int:
    options = arguments(__doc__, 55).parse_args()
    clock, device = Clock(options.seconds, options.began), Device(options.smoke)
    stage = Stage(device, clock, Results(options.folder, "engine", options.smoke))
    sizes = SMOKE if device.smoke else LLAMA
    stage.content["model"] = sizes.name
    backends = ("cuda", "triton")
    if device.smoke:  # amq refuses GPU backends on a CPU
        backends = ("reference",) if load_cpu_module() else ("cpu",)
    models = Models(device, sizes)
    for backend in backends:
        stage.add(f"greedy {backend}", greedy, models, backend)
    contexts = SMOKE_CONTEXTS if device.smoke else CONTEXTS
    model = attempt(device, models.build, sizes.layers, max(contexts), backends[0])
    if isinstance(model, Failure):
        stage.content["failed"]["model"] = model.reason
    else:
        for context in contexts:
            stage.add(f"context {context}", decode, model, sizes, context)
    stage.save()
    content = stage.content
    return 1 if content["failed"] or not content["rows"] or any(row["wrong"] for row in content["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
