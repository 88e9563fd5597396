"""Random decoders of every operator and option of csrc/cpu/decoder.h, of odd sizes, in the formats of all widths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from amq.formats import FORMATS
from amq.kernels.cpu import NO_MEMORY, cpu_module
from amq.rotation import WIDTH, divides
from amq.runtime.decoder_spec import (
    ACTIVATIONS,
    CLAMPED_SWIGLU,
    GELU_TANH,
    RELU2,
    Array,
    Attention,
    DecoderSpec,
    DeltaNet,
    Heads,
    Linear,
    Mixture,
    Mlp,
    Operator,
    PerLayerEmbedding,
    PerLayerInput,
    Projection,
    Rope,
    Router,
    ShortConv,
    Step,
    Table,
)
from amq.runtime.native_weights import Held

PAGE = cpu_module().PAGE


def project(in_features: int, **linears: int) -> Projection:
    """Linears {name: out_features} that share x."""
    return Projection(tuple(Linear(name, out, in_features) for name, out in linears.items()))


def memory(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    return array.ctypes.data, array.nbytes


class RandomDecoder:
    """spec, decoder: of random sizes, made from `seed`. random: what made them, for more of the kind. cache: what keys
    and values are kept as; None: anything, each step as it likes."""

    def __init__(self, seed: int, context: int, threads: int, cache: str | None = None) -> None:
        self.random, self._context, self._count = np.random.default_rng(seed), context, 0
        self._keep: list[Any] = []
        self._held: dict[str, Held] = {}
        self._group = self.pick(32, 64, 128)
        self._hidden = self.pick(16, 24, 40, 72, 100)
        self.spec = self._spec()
        self.max_rows = self.pick(1, 2, 5, 17, 64, 512)
        self.decoder = cpu_module().Decoder(
            spec=self.spec, weights=self._held, context=context, group_size=self._group, int8=self.coin(),
            cache=cache or self._caches(), max_rows=self.max_rows, threads=threads,
        )  # fmt: skip

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def coin(self, chance: float = 0.5) -> bool:
        return bool(self.random.random() < chance)

    def _caches(self) -> list[str]:
        return [self.pick(*cpu_module().CACHES) for _ in range(self.spec.own_caches)]

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def _hold(self, name: str, kind: str, *arrays: np.ndarray[Any, Any]) -> str:
        self._keep += arrays
        places = [memory(array) for array in arrays] + [NO_MEMORY] * (3 - len(arrays))
        self._held[name] = (kind, places[0], places[1], places[2], 0)
        return name

    def _array(self, *shape: int, mean: float = 0.0, spread: float = 0.3) -> Array:
        values = mean + spread * self.random.standard_normal(shape)
        return Array(self._hold(self._name("array"), "float32", values.astype(np.float32)), shape)

    def _norm(self, count: int) -> Array:
        return self._array(count, mean=1.0)

    def _maybe(self, count: int) -> Array | None:
        return self._array(count, mean=1.0) if self.coin(0.4) else None

    def _elements(self, name: str, rows: int, columns: int) -> None:
        weight = (self.random.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)
        kind = self.pick("float32", "float16", "bfloat16")
        if kind == "float16":
            weight = weight.astype(np.float16)
        self._hold(name, kind, (weight.view(np.uint32) >> 16).astype(np.uint16) if kind == "bfloat16" else weight)

    def _packed(self, rows: int, columns: int) -> tuple[str, np.ndarray[Any, Any], Any, Any]:
        """Format, codes, scales, zero points."""
        fmt = self.pick(*(f for f in FORMATS.values() if f.bits == int(f.bits)))
        codes = self.random.integers(0, 256, (rows, -(-columns * int(fmt.bits) // 8)), np.uint8)
        groups = -(-columns // self._group)
        scales = (self.random.random((rows, groups)) + 0.5) * 3 / fmt.levels / columns**0.5
        zero_points = np.full((rows, groups), (fmt.levels - 1) / 2)
        return fmt.name, codes, scales.astype(np.float16), zero_points.astype(np.float16)

    def _tiles(self, name: str, rows: int, columns: int) -> None:
        fmt, codes, scales, zero_points = self._packed(rows, columns)
        out = np.empty(cpu_module().prepared_bytes(fmt, rows, columns, self._group), np.uint8)
        cpu_module().prepare(
            format=fmt, qweight=memory(codes), scale=memory(scales), zero_point=memory(zero_points), out=memory(out),
            qweight_stride=codes.shape[1], group_stride=scales.shape[1], rows=rows, in_features=columns,
            group_size=self._group, threads=1,
        )  # fmt: skip
        self._hold(name, fmt, out)

    def _linear(self, out_features: int, in_features: int, kept: bool = False) -> Linear:
        name, bias = self._name("linear"), self.coin(0.3)
        (self._elements if kept or self.coin(0.3) else self._tiles)(name, out_features, in_features)
        if bias:
            values = self.random.standard_normal(out_features).astype(np.float32) / 10
            self._hold(f"{name}.bias", "float32", values)
        return Linear(name, out_features, in_features, bias)

    def _project(self, in_features: int, *out_features: int) -> Projection:
        linears = tuple(self._linear(count, in_features) for count in out_features)
        if divides(in_features) and self._count % 2:
            for linear in linears:
                self._held[linear.name] = (*self._held[linear.name][:-1], WIDTH)
        return Projection(linears)

    def _table(self, rows: int, columns: int, multiplied: bool = False) -> Table:
        name, kind = self._name("table"), self.random.random()
        if kind < 0.4:
            self._elements(name, rows, columns)
        elif kind < 0.7 or multiplied:
            self._tiles(name, rows, columns)
        else:
            self._hold(name, *self._packed(rows, columns))
        return Table(name, rows, columns)

    def _ropes(self) -> tuple[Rope, ...]:
        made = []
        for index in range(2):
            rotary, long = self.pick(2, 8, 16, 32), self.coin()
            for which in ("", ".long")[: 1 + long]:
                angles = 6 * self.random.random((self._context, rotary // 2))
                for name, of in (("cos", np.cos), ("sin", np.sin)):
                    self._hold(f"rope.{index}{which}.{name}", "float32", of(angles).astype(np.float32))
            made.append(Rope(rotary, None, long_frequencies=1 if long else None))  # type: ignore[arg-type]
        return tuple(made)

    def _attention(self, steps: list[Step], ropes: tuple[Rope, ...]) -> Attention:
        with_cache = [i for i, s in enumerate(steps) if isinstance(s.op, Attention) and s.op.cache_of is None]
        cache_of = self.pick(*with_cache) if with_cache and self.coin(0.3) else None
        keys, width = self.pick(1, 2, 3), self.pick(16, 32, 48)
        if cache_of is not None:
            keys, width = steps[cache_of].op.n_kv_heads, steps[cache_of].op.head_dim
        heads, gated, same = keys * self.pick(1, 2, 3, 4, 9), self.coin(0.3), self.coin(0.3)
        parts = [heads * width * (1 + gated), *[keys * width] * (0 if cache_of is not None else 2 - same)]
        qkv = self._project(self._hidden, sum(parts)) if self.coin() else self._project(self._hidden, *parts)
        whole = cache_of is None and not gated and self.coin(0.3)
        rope = self.pick(*(i for i, rope in enumerate(ropes) if rope.rotary <= width), None)
        return Attention(
            heads, keys, width, qkv, self._project(heads * width, self._hidden), width**-0.5, gated, same, cache_of,
            self._maybe(width), self._maybe(width), self._maybe(width),
            self._norm(heads * width) if whole else None, self._norm(keys * width) if whole else None,
            self._maybe(heads), softcap=self.pick(0.0, 20.0), rope=rope, window=self.pick(0, 0, 1, 5, 24, 64, 130),
        )  # fmt: skip

    def _delta_net(self) -> DeltaNet:
        keys, share, key_dim, value_dim = self.pick(1, 2), self.pick(1, 2, 3), self.pick(16, 32), self.pick(16, 48, 64)
        values, kernel = keys * share, self.pick(2, 3, 4)
        widths = (key_dim, key_dim, share * value_dim, share * value_dim, share, share)
        firsts = np.cumsum((0, *widths)).tolist()
        if self.coin():  # all parts of a key head side by side
            in_ = self._project(self._hidden, keys * sum(widths))
            q, k, v, z, b, a = (Heads(first, sum(widths)) for first in firsts[:-1])
        else:
            in_ = self._project(self._hidden, *(keys * width for width in widths))
            q, k, v, z, b, a = (Heads(keys * first, width) for first, width in zip(firsts[:-1], widths, strict=True))
        return DeltaNet(
            keys, values, key_dim, value_dim, kernel, in_, self._project(values * value_dim, self._hidden), q, k, v, z,
            b, a,
            self._array(kernel, 2 * keys * key_dim + values * value_dim), self._array(values, mean=1.0),
            self._array(values), self._norm(value_dim),
        )  # fmt: skip

    def _short_conv(self) -> ShortConv:
        channels, kernel = self.pick(16, 40, 130, 200), self.pick(2, 3, 4)
        in_ = self._project(self._hidden, *self.pick((3 * channels,), (channels,) * 3))
        return ShortConv(
            kernel, in_, self._project(channels, self._hidden), self._array(kernel, channels), self._maybe(channels)
        )

    def _mlp(self, wide: int, activation: str, fused: bool) -> Mlp:
        parts = (wide,) if activation == RELU2 else (2 * wide,) if fused else (wide, wide)
        return Mlp(self._project(self._hidden, *parts), self._project(wide, self._hidden), activation, limit=2.0)

    def _activation(self) -> str:
        return str(self.pick(*sorted({*ACTIVATIONS.values(), CLAMPED_SWIGLU})))

    def _experts(self, count: int) -> tuple[Mlp, ...]:
        fused, activation = self.coin(), self._activation()
        wide = self.pick(16, 96, 112) if fused else self.pick(8, 24, 40, 72, 100)
        return tuple(self._mlp(wide, activation, fused) for _ in range(count))

    def _mixture(self) -> Mixture:
        count, hidden = self.pick(1, 2, 3, 8, 8, 40), self._hidden
        groups = self.pick(*(n for n in (1, 2, 4) if n == 1 or count % n == 0 and count >= 2 * n))
        top_groups = self.pick(*range(1, groups + 1))
        most = count // groups * top_groups
        router = Router(
            self._linear(count, hidden, kept=True), self.pick(1, most, -(-most // 2)), self.pick("softmax", "sigmoid"),
            self.coin(), self._maybe(hidden), self._maybe(count), self._maybe(count), 1e-20, 1.5, groups, top_groups,
        )  # fmt: skip
        shared = self._experts(1)[0] if self.coin() else None
        gate, shared_norm = (self._maybe(hidden), self._maybe(hidden)) if shared else (None, None)
        return Mixture(
            router, self._experts(count), shared, gate, self._maybe(hidden), shared_norm, self._maybe(hidden)
        )

    def _operator(self, steps: list[Step], ropes: tuple[Rope, ...], each: PerLayerEmbedding) -> Operator:
        kind = self.pick("attention", "attention", "delta", "conv", "mlp", "mixture", "mixture", "each")
        if kind == "attention":
            return self._attention(steps, ropes)
        if kind == "mlp":
            return self._mlp(self.pick(8, 24, 40, 72, 100), self._activation(), self.coin())
        if kind == "each":
            in_, out = self._project(self._hidden, each.width), self._project(each.width, self._hidden)
            return PerLayerInput(in_, out, self.pick(0, 1, 2), GELU_TANH)
        if kind == "delta":
            return self._delta_net()
        return self._short_conv() if kind == "conv" else self._mixture()

    def _spec(self) -> DecoderSpec:
        hidden, vocabulary, ropes = self._hidden, self.pick(17, 33, 70), self._ropes()
        width = self.pick(8, 16, 24)
        each = PerLayerEmbedding(
            self._table(vocabulary, 3 * width),
            self._project(hidden, 3 * width),
            self._norm(width),
            width,
            2.0,
            0.5,
            0.7,
        )
        steps: list[Step] = []
        for _ in range(self.pick(1, 3, 5)):
            step = Step(
                self._operator(steps, ropes, each), self._norm(hidden), self._maybe(hidden), self.pick(1.0, 0.5)
            )
            steps.append(replace(step, after=self._array(1, mean=1.0)) if self.coin(0.2) else step)
        return DecoderSpec(
            hidden, vocabulary, self._context, 1e-6, self._table(vocabulary, hidden),
            self._table(vocabulary, hidden, multiplied=True), self._norm(hidden), tuple(steps), ropes,
            self.pick(1.0, 3.0), self.pick(1.0, 0.3), self.pick(0.0, 5.0), each,
        )  # fmt: skip
