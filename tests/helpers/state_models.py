"""Operators that carry a state on, each alone in a native decoder with random weights, and the same in
float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amq.kernels.cpu import NO_MEMORY, cpu_module, memory
from amq.runtime.decoder_spec import Array, DecoderSpec, DeltaNet, Heads, Linear, ShortConv, Step, Table
from helpers.random_specs import project

HIDDEN, VOCABULARY, CONTEXT, GROUP_SIZE, EPSILON = 40, 32, 256, 32, 1e-5
STATES = 6


def delta_net(kernel: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, fused: bool) -> DeltaNet:
    """fused: q, k, v and z side by side for each key head, as b and a are."""
    group, keys, values = value_heads // key_heads, key_heads * key_dim, value_heads * value_dim
    width, channels = group * value_dim, 2 * keys + values
    if fused:
        stride, gates = 2 * key_dim + 2 * width, channels + values
        in_ = project(HIDDEN, qkvz=channels + values, ba=2 * value_heads)
        firsts, strides = (0, key_dim, 2 * key_dim, 2 * key_dim + width), (stride,) * 4
        b, a = Heads(gates, 2 * group), Heads(gates + group, 2 * group)
    else:
        in_ = project(HIDDEN, qkv=channels, z=values, b=value_heads, a=value_heads)
        firsts, strides = (0, keys, 2 * keys, channels), (key_dim, key_dim, width, width)
        b, a = Heads(channels + values, group), Heads(channels + values + value_heads, group)
    q, k, v, z = map(Heads, firsts, strides)
    return DeltaNet(
        key_heads, value_heads, key_dim, value_dim, kernel, in_, project(values, out=HIDDEN), q, k, v, z, b, a,
        Array("convolution", (kernel, channels)), Array("rate", (value_heads,)), Array("dt_bias", (value_heads,)),
        Array("gated_norm", (value_dim,)),
    )  # fmt: skip


def short_conv(kernel: int, channels: int, bias: bool) -> ShortConv:
    added = Array("bias", (channels,)) if bias else None
    return ShortConv(
        kernel, project(HIDDEN, bcx=3 * channels), project(channels, out=HIDDEN),
        Array("convolution", (kernel, channels)), added,
    )  # fmt: skip


OPERATORS = {
    "delta": delta_net(4, 2, 4, 32, 48, fused=False),
    "delta-fused": delta_net(3, 2, 6, 16, 16, fused=True),
    "delta-one-head": delta_net(2, 1, 1, 128, 80, fused=True),
    "conv": short_conv(3, 40, bias=False),
    "conv-wide-biased": short_conv(4, 150, bias=True),
}


class Model:
    """A decoder of one operator, random weights in float32, and their names."""

    def __init__(self, op: DeltaNet | ShortConv) -> None:
        self.op, generator = op, torch.Generator().manual_seed(0)
        self.spec = DecoderSpec(
            HIDDEN, VOCABULARY, CONTEXT, EPSILON, Table("embedding", VOCABULARY, HIDDEN),
            Table("head", VOCABULARY, HIDDEN), Array("final_norm", (HIDDEN,)), (Step(op, Array("norm", (HIDDEN,))),),
        )  # fmt: skip
        shapes = {a.key: a.shape for a in self.spec.parts(Array)}
        shapes |= {part.name: (part.out_features, part.in_features) for part in self.spec.parts(Linear)}
        shapes |= {table.name: (table.rows, table.columns) for table in self.spec.parts(Table)}
        self.tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for name, tensor in self.tensors.items():
            if tensor.ndim > 1 and name != "convolution":
                tensor /= tensor.shape[1] ** 0.5
        if isinstance(op, DeltaNet):
            self.tensors["rate"] = self.tensors["rate"].exp()
        held = {name: (str(t.dtype)[6:], memory(t), NO_MEMORY, NO_MEMORY, 0) for name, t in self.tensors.items()}
        self.decoder = cpu_module().Decoder(
            spec=self.spec, weights=held, context=CONTEXT, group_size=GROUP_SIZE, int8=False, cache="float32",
            max_rows=96, threads=4,
        )  # fmt: skip

    def states(self) -> Tensor:
        """Of STATES sequences, and what must not be read or written before and behind them."""
        return torch.full((STATES, self.decoder.state_floats), torch.nan)

    def forward(self, states: Tensor, segments: Sequence[tuple[Any, ...]], threads: int = 1, isa: str = "") -> Tensor:
        """Segments of (tokens, position, state, snapshots); logits of every token."""
        tokens = np.concatenate([segment[0] for segment in segments]).astype(np.int32)
        described = [(len(text), position, NO_MEMORY, False, state, shots) for text, position, state, shots in segments]
        logits = torch.full((len(tokens), VOCABULARY), torch.nan)
        self.decoder.forward(
            (tokens.ctypes.data, tokens.nbytes), described, list(range(len(tokens))), memory(logits), NO_MEMORY,
            memory(states), threads, isa,
        )  # fmt: skip
        return logits

    def inputs(self, tokens: np.ndarray[Any, Any]) -> Tensor:
        """What the first projection gives, float64 [tokens, ..]."""
        t = self._wide()
        h = _norm(t["embedding"][torch.from_numpy(tokens)], t["norm"])
        return torch.cat([h @ t[part.name].T for part in self.op.in_.linears], -1)

    def mixed(self, inputs: Tensor) -> Tensor:
        """What the last projection reads, float64, token by token from the first one of a text on."""
        plain = _plain_delta if isinstance(self.op, DeltaNet) else _plain_conv
        return plain(self.op, inputs.double(), self._wide())

    def plain(self, tokens: np.ndarray[Any, Any]) -> Tensor:
        """Logits in float64, token by token."""
        t = self._wide()
        h = t["embedding"][torch.from_numpy(tokens)] + self.mixed(self.inputs(tokens)) @ t["out"].T
        return _norm(h, t["final_norm"]) @ t["head"].T

    def _wide(self) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in self.tensors.items()}


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPSILON)


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, len(weight) - 1, 0))
    return torch.stack([(padded[i : i + len(weight)] * weight).sum(0) for i in range(len(x))])


def _plain_conv(op: ShortConv, inputs: Tensor, t: dict[str, Tensor]) -> Tensor:
    b, c, x = inputs.chunk(3, -1)
    return c * (_convolved(b * x, t["convolution"]) + (t["bias"] if op.bias else 0))


def _plain_delta(op: DeltaNet, inputs: Tensor, t: dict[str, Tensor]) -> Tensor:
    group, n = op.n_value_heads // op.n_key_heads, len(inputs)

    def part(heads: Heads, width: int) -> Tensor:
        return inputs.unfold(1, width, 1)[:, heads.first :: heads.stride][:, : op.n_key_heads].reshape(n, -1)

    qkv = torch.cat([part(op.q, op.key_dim), part(op.k, op.key_dim), part(op.v, group * op.value_dim)], -1)
    keys = op.n_key_heads * op.key_dim
    q, k, v = F.silu(_convolved(qkv, t["convolution"])).split([keys, keys, qkv.shape[1] - 2 * keys], -1)

    def unit(x: Tensor) -> Tensor:
        x = x.reshape(n, op.n_key_heads, op.key_dim)
        return (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(group, 1)

    q, k, v = unit(q) / op.key_dim**0.5, unit(k), v.reshape(n, op.n_value_heads, op.value_dim)
    decay, beta = (-t["rate"] * F.softplus(part(op.a, group) + t["dt_bias"])).exp(), part(op.b, group).sigmoid()
    state, out = torch.zeros(op.n_value_heads, op.key_dim, op.value_dim).double(), []
    for i in range(n):
        state = decay[i, :, None, None] * state
        change = beta[i, :, None] * (v[i] - torch.einsum("hkv,hk->hv", state, k[i]))
        state = state + k[i, :, :, None] * change[:, None]
        out.append(torch.einsum("hkv,hk->hv", state, q[i]))
    gates = part(op.z, group * op.value_dim).reshape(n, op.n_value_heads, op.value_dim)
    return (_norm(torch.stack(out), t["gated_norm"]) * F.silu(gates)).reshape(n, -1)


@cache
def model(name: str) -> Model:
    return Model(OPERATORS[name])


def text(length: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)
