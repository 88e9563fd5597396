"""End to end: tokens per second of a decoder with the shapes of Llama-3.1-8B and random weights, batch 1.

    python benchmarks/gpu/decode.py DIR [--smoke]             writes the section "decode" of DIR/suite.json

A step is everything between two tokens: embedding, all blocks with a static key-value cache, head, argmax; embedding
and head are fp16. It is one CUDA graph, replayed token after token. What is not a linear is a few functions that
torch.compile fuses, the same in every variant, so variants differ in their linears alone: q/k/v of mixed formats in one
launch, o, gate/up in one launch, down. fp16 has the same weights, dequantized and fused likewise, through torch; its
logits after one step are what the others' are held against.

`gbps` counts the bytes that a step must read (linears, head, the cache as far as it is allocated), `share_of_copy` is
that over torch's copy bandwidth in this run. `kernels` is torch's profiler on one replay: where the time goes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from common import (
    Clock,
    Device,
    Failure,
    Results,
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
from torch import Tensor
from torch.nn import functional

from amq.formats import FORMATS, get_format
from amq.kernels import cuda

GROUP_SIZE = 128
NARROW = tuple(name for name, fmt in FORMATS.items() if fmt.code_bits <= 4)
STEPS, TIMED = 32, 5
"""Tokens in a reading, and readings."""
AGREES = 0.1
"""Relative difference of logits that rounding may add up to in exact products."""
ROPE_BASE = 500000.0


@dataclass(frozen=True)
class Config:
    """A decoder's sizes. context: of the cache; half of it is full when the clock starts."""

    name: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_features: int
    intermediate: int
    vocabulary: int
    context: int

    @property
    def roles(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Linears that share x → (output features of each, input features)."""
        q, kv = self.heads * self.head_features, self.key_value_heads * self.head_features
        return {
            "qkv": ((q, kv, kv), self.hidden),
            "o": ((self.hidden,), q),
            "gate_up": ((self.intermediate, self.intermediate), self.hidden),
            "down": ((self.hidden,), self.intermediate),
        }


LLAMA = Config("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256, 512)
SMOKE = Config("smoke", 1, 64, 4, 2, 16, 96, 48, 2 * STEPS + 16)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def add_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, norm(total, weight)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)


def rotate_and_store(
    qkv: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> Tensor:
    """qkv [1, all heads · D] → q / √D [key-value heads, heads of each, D]; k and v go to keys and values
    [heads, context, D]."""
    heads, _, size = keys.shape
    q, k, v = qkv[0].split((qkv.shape[1] - 2 * heads * size, heads * size, heads * size))
    keys.index_copy_(1, position, rotate(k.view(heads, 1, size), cosine, sine))
    values.index_copy_(1, position, v.view(heads, 1, size))
    return rotate(q.view(heads, -1, size), cosine, sine) * size**-0.5


def weigh(scores: Tensor, position: Tensor) -> Tensor:
    """softmax over the positions up to this one; scores [heads, queries, context]."""
    later = torch.arange(scores.shape[-1], device=scores.device) > position
    return scores.float().masked_fill(later, -torch.inf).softmax(-1).to(scores.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


PIECES = {f.__name__: f for f in (norm, add_norm, rotate_and_store, weigh, swiglu)}


@dataclass(frozen=True)
class Variant:
    """One model. pattern: formats that linears take in turn, so that a launch mixes them; backend None is fp16."""

    backend: str | None
    activations: str
    pattern: tuple[str, ...]

    def __str__(self) -> str:
        formats = "/".join(self.pattern)
        return f"fp16 of {formats}" if self.backend is None else f"{self.backend} {self.activations} {formats}"

    def formats(self, role: int, layer: int, count: int) -> list[str]:
        return [self.pattern[(role + layer + i) % len(self.pattern)] for i in range(count)]


def variants() -> list[Variant]:
    """Those of the mixed formats first; logits are compared among them."""
    mixed = [Variant(None, "fp32", NARROW), Variant("cuda", "fp32", NARROW), Variant("cuda", "int8", NARROW)]
    uniform = [Variant("cuda", "fp32", (name,)) for name in (NARROW[-1], NARROW[0], *NARROW[1:-1])]
    return [*mixed, *uniform, Variant("triton", "fp32", NARROW)]


class Weights:
    """Random weights, made once for each shape and format; layers get copies of their own."""

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self._made: dict[tuple, tuple] = {}

    def get(self, name: str, n: int, k: int) -> tuple:
        """(prepared, dense fp16)."""
        if (name, n, k) not in self._made:
            packed = random_packed(get_format(name), n, k, GROUP_SIZE, self.where)
            self._made[name, n, k] = prepare(packed, "cuda"), dense(packed, torch.float16)
        return self._made[name, n, k]


class Model:
    """One variant's weights, the cache and the state of a decode."""

    def __init__(
        self, device: Device, config: Config, variant: Variant, weights: Weights, shared: SimpleNamespace
    ) -> None:
        self.device, self.config, self.variant, self.shared = device, config, variant, shared
        self.launches = self.linear_bytes = 0
        self.layers = [self._layer(i, weights) for i in range(config.layers)]

    def _layer(self, index: int, weights: Weights) -> dict[str, Callable[[Tensor], Tensor]]:
        layer = {}
        for at, (role, (sizes, k)) in enumerate(self.config.roles.items()):
            names = self.variant.formats(at, index, len(sizes))
            made = [weights.get(name, n, k) for name, n in zip(names, sizes, strict=True)]
            layer[role] = self._dense(made) if self.variant.backend is None else self._quantized(made)
        return layer

    def _dense(self, made: list[tuple]) -> Callable[[Tensor], Tensor]:
        weight = torch.cat([dense_weight for _, dense_weight in made])
        self.linear_bytes += weight.nbytes

        def multiply(x: Tensor) -> Tensor:
            self.launches += 1
            return functional.linear(x, weight)

        return multiply

    def _quantized(self, made: list[tuple]) -> Callable[[Tensor], Tensor]:
        own = [copy_of(prepared) for prepared, _ in made]
        self.linear_bytes += stored_bytes(own)

        def multiply(x: Tensor) -> Tensor:
            self.launches += -(-len(own) // cuda.MAX_WEIGHTS)
            return self.device.multiply(self.variant.backend, x, own, None, self.variant.activations)

        return multiply

    def step(self) -> Tensor:
        """One token; returns its logits."""
        s, pieces = self.shared, self.shared.pieces
        x = s.embedding[s.token]
        cosine, sine = s.cosines[s.position], s.sines[s.position]
        normed = pieces.norm(x, s.norms[0])
        for i, layer in enumerate(self.layers):
            q = pieces.rotate_and_store(layer["qkv"](normed), cosine, sine, s.keys[i], s.values[i], s.position)
            shares = pieces.weigh(torch.bmm(q, s.keys[i].transpose(1, 2)), s.position)
            attended = torch.bmm(shares, s.values[i]).view(1, -1)
            x, normed = pieces.add_norm(x, layer["o"](attended), s.norms[2 * i + 1])
            inner = pieces.swiglu(layer["gate_up"](normed))
            x, normed = pieces.add_norm(x, layer["down"](inner), s.norms[2 * i + 2])
        logits = functional.linear(normed, s.head)
        s.token.copy_(logits.argmax(-1))
        s.position.add_(1)
        return logits

    def reset(self) -> None:
        """To the same token and position as every other variant."""
        self.shared.token.fill_(7)
        self.shared.position.fill_(self.config.context // 2)

    @property
    def bytes_per_step(self) -> int:
        caches = sum(t.nbytes for t in (*self.shared.keys, *self.shared.values))
        return self.linear_bytes + self.shared.head.nbytes + caches


def shared_state(config: Config, where: torch.device) -> SimpleNamespace:
    """What all variants have in common: embedding, head, norms, angles, caches, token and position."""
    cache = (config.key_value_heads, config.context, config.head_features)
    half = config.head_features // 2
    frequencies = ROPE_BASE ** (-torch.arange(half, device=where) / half)
    angles = torch.arange(config.context, device=where)[:, None] * frequencies

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float16, device=where) * scale

    return SimpleNamespace(
        embedding=random(config.vocabulary, config.hidden, scale=0.02),
        head=random(config.vocabulary, config.hidden, scale=0.02),
        norms=[1 + random(config.hidden, scale=0.1) for _ in range(2 * config.layers + 1)],
        cosines=angles.cos(),
        sines=angles.sin(),
        keys=[random(*cache) for _ in range(config.layers)],
        values=[random(*cache) for _ in range(config.layers)],
        token=torch.zeros(1, dtype=torch.long, device=where),
        position=torch.zeros(1, dtype=torch.long, device=where),
        pieces=SimpleNamespace(**PIECES),
    )


def compile_pieces(device: Device, model: Model) -> str:
    """Puts compiled functions into the shared state, tries them, and says how that went."""
    if device.smoke:
        return "no: a smoke run compiles nothing"
    eager = model.shared.pieces
    compiled = {name: torch.compile(f, fullgraph=True, dynamic=False) for name, f in PIECES.items()}
    model.shared.pieces = SimpleNamespace(**compiled)
    try:
        model.reset()
        model.step()
        device.synchronize()
    except Exception as reason:  # noqa: BLE001 - whatever torch.compile stumbles over here, the decode goes on and says so
        model.shared.pieces = eager
        return f"no: {type(reason).__name__}: {str(reason)[:500]}"
    return "yes"


def profile(device: Device, replay: Callable[[], object]) -> list | str:
    """[kernel, calls, µs] of one replay, the longest first, or why there is none."""
    if device.smoke:
        return "a smoke run has no kernels to time"
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            replay()
            device.synchronize()
        found = [(e.key[:100], e.count, round(e.self_device_time_total, 1)) for e in profiler.key_averages()]
    except Exception as reason:  # noqa: BLE001 - the profiler is a convenience; its failure is recorded
        return f"{type(reason).__name__}: {str(reason)[:300]}"
    return sorted((kernel for kernel in found if kernel[2]), key=lambda kernel: -kernel[2])[:20]


def measure(device: Device, model: Model, reference: Tensor | None, copy: float | None) -> tuple[dict, Tensor]:
    """A row of the result, and the logits of the first step."""
    model.reset()
    model.launches = 0
    logits = model.step().float().clone()
    launches = model.launches
    replay, _ = device.capture(model.step)

    def tokens() -> None:
        model.reset()
        for _ in range(STEPS):
            replay()

    timing = device.replay(tokens, STEPS, TIMED)
    model.reset()
    gbps = ratio(model.bytes_per_step / 1e3, timing.us, 1)
    weights = sum(sum(sizes) * k for sizes, k in model.config.roles.values()) * model.config.layers
    row = {
        "variant": str(model.variant), "backend": model.variant.backend or "torch",
        "activations": model.variant.activations, "formats": model.variant.pattern,
        "bits_per_weight": round(8 * model.linear_bytes / weights, 4), "linear_bytes": model.linear_bytes,
        "bytes_per_step": model.bytes_per_step, "linear_launches_per_layer": launches / model.config.layers,
        "us_per_token": timing.us, "us_fastest": timing.us_fastest, "us_slowest": timing.us_slowest,
        "tokens_per_second": ratio(1e6, timing.us, 1), "gbps": gbps, "share_of_copy": ratio(gbps, copy),
        "logits_finite": bool(logits.isfinite().all()), "logits_difference": None,
        "kernels": profile(device, replay),
    }  # fmt: skip
    if reference is not None and model.variant.pattern == NARROW:
        row["logits_difference"] = round(float((logits - reference).norm() / reference.norm()), 5)
    exact = model.variant.activations == "fp32" and row["logits_difference"] is not None
    row["wrong"] = not row["logits_finite"] or (exact and not row["logits_difference"] <= AGREES)
    return row, logits


class Decode:
    """What the variants share, and what they found; `results` is written after every one of them."""

    def __init__(self, device: Device, config: Config, clock: Clock, results: Results) -> None:
        self.device, self.config, self.clock, self.results = device, config, clock, results
        self.weights = Weights(device.torch)
        self.content = {"model": config.name, "layers": config.layers, "context": config.context, "compiled": None,
                        "copy_gbps": None, "left_out": {}, "failed": {}, "rows": []}  # fmt: skip
        self.reference: Tensor | None = None
        self.base: float | None = None

    def run(self) -> dict:
        """A row per variant, as far as the time goes."""
        copy = attempt(self.device, bandwidths, self.device)
        shared = attempt(self.device, shared_state, self.config, self.device.torch)
        for name, found in (("bandwidths", copy), ("shared state", shared)):
            if isinstance(found, Failure):
                self.content["failed"][name] = found.reason
        try:
            if not self.content["failed"]:
                self.content["copy_gbps"] = copy["copy"]
                for variant in variants():
                    if not self.run_variant(variant, shared):
                        break
        finally:
            self.save()
        return self.content

    def run_variant(self, variant: Variant, shared: SimpleNamespace) -> bool:
        """False where nothing more can run in this process."""
        reasons = [
            self.device.unsupported_reason(variant.backend, get_format(f)) for f in variant.pattern if variant.backend
        ]
        if any(reasons) or self.clock.left() < 0:
            why = next((reason for reason in reasons if reason), "no time left")
            self.content["left_out"][str(variant)] = why
            return True
        row = attempt(self.device, self.measure_variant, variant, shared)
        if isinstance(row, Failure):
            self.content["failed"][str(variant)] = row.reason
            say(f"decode: FAILED {variant}: {row.reason[:300]}")
            self.save()
            return not row.broken
        self.content["rows"].append({**row, "times_fp16": ratio(self.base, row["us_per_token"]), "at": now()})
        self.save()
        figures = ("tokens_per_second", "gbps", "share_of_copy", "times_fp16", "logits_difference")
        say(f"decode: {variant}: " + ", ".join(f"{name} {self.content['rows'][-1][name]}" for name in figures))
        self.device.empty_cache()
        return True

    def measure_variant(self, variant: Variant, shared: SimpleNamespace) -> dict:
        model = Model(self.device, self.config, variant, self.weights, shared)
        if self.content["compiled"] is None:
            self.content["compiled"] = compile_pieces(self.device, model)
            say(f"decode: compiled: {self.content['compiled'].splitlines()[0]}")
        row, logits = measure(self.device, model, self.reference, self.content["copy_gbps"])
        if variant.backend is None:
            self.reference, self.base = logits, row["us_per_token"]
        return row

    def save(self) -> None:
        self.content["seconds"] = self.clock.spent()
        self.results.write(self.content)


def main() -> int:
    options = arguments(__doc__, 100).parse_args()
    clock, device = Clock(options.seconds, options.began), Device(options.smoke)
    config, results = SMOKE if device.smoke else LLAMA, Results(options.folder, "decode", options.smoke)
    torch.manual_seed(0)
    with torch.no_grad():
        content = Decode(device, config, clock, results).run()
    wrong = any(row["wrong"] for row in content["rows"])
    return 1 if wrong or content["failed"] or not content["rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
