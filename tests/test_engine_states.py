"""Operators that carry a state on, each alone in a native decoder: against plain recurrences in float64, and to the bit
however a text is cut into passes, whatever lies beside it, and from wherever a snapshot was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.engine_cases_delta import DELTA
from helpers.random_specs import project
from torch import Tensor

from amq.errors import AmqError
from amq.kernels.cpu import NO_MEMORY, cpu_module, memory
from amq.runtime.decoder_spec import (
    Array,
    DecoderSpec,
    DeltaNet,
    Heads,
    Linear,
    ShortConv,
    Step,
    Table,
)
from amq.runtime.families import Unsupported, read_spec

HIDDEN, VOCABULARY, CONTEXT, GROUP_SIZE, EPSILON = 40, 32, 256, 32, 1e-5
ISAS = cpu_module().isas()
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
        held = {name: (str(t.dtype)[6:], memory(t), NO_MEMORY, NO_MEMORY) for name, t in self.tensors.items()}
        self.decoder = cpu_module().Decoder(
            spec=self.spec, weights=held, context=CONTEXT, group_size=GROUP_SIZE, int8=False, half_cache=False,
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

    def plain(self, tokens: np.ndarray[Any, Any]) -> Tensor:
        """Logits in float64, token by token."""
        t = {name: tensor.double() for name, tensor in self.tensors.items()}
        h = t["embedding"][torch.from_numpy(tokens)]
        inputs = torch.cat([_norm(h, t["norm"]) @ t[part.name].T for part in self.op.in_.linears], -1)
        mixed = _plain_delta(self.op, inputs, t) if isinstance(self.op, DeltaNet) else _plain_conv(self.op, inputs, t)
        return _norm(h + mixed @ t["out"].T, t["final_norm"]) @ t["head"].T


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


each_operator = pytest.mark.parametrize("name", OPERATORS)
each_isa = pytest.mark.parametrize("isa", ISAS)


@each_isa
@each_operator
def test_as_plain_recurrence(name: str, isa: str) -> None:
    tokens = text(70)
    logits = model(name).forward(model(name).states(), [(tokens, 0, 0, [])], isa=isa)
    expected = model(name).plain(tokens)
    # A rounding of float32 in each of the sums' some hundred additions, in another order: far below their worst case.
    assert (logits - expected).abs().max() <= 100 * torch.finfo(torch.float32).eps * expected.abs().max()


@each_isa
@each_operator
def test_cuts_neighbours_and_threads_change_no_bit(name: str, isa: str) -> None:
    """Three texts by turns in parts of random length, in passes of one to three of them."""
    rng, made = np.random.default_rng(1), model(name)
    texts = [text(60, seed) for seed in range(3)]
    alone = [made.forward(made.states(), [(tokens, 0, 0, [])], isa=isa) for tokens in texts]
    states, done = made.states(), [0, 0, 0]
    while any(place < 60 for place in done):
        chosen = [i for i in rng.permutation(3)[: rng.integers(1, 4)] if done[i] < 60]
        if not chosen:
            continue
        lengths = [int(min(60 - done[i], rng.choice([1, 1, 2, 5, 23]))) for i in chosen]
        segments = [
            (texts[i][done[i] : done[i] + n], done[i], int(i) + 1, []) for i, n in zip(chosen, lengths, strict=True)
        ]
        logits = made.forward(states, segments, int(rng.integers(1, 5)), isa)
        for i, n, part in zip(chosen, lengths, logits.split(lengths), strict=True):
            assert torch.equal(part, alone[i][done[i] : done[i] + n])
            done[i] += n
    assert states[[0, 4, 5]].isnan().all()


@each_isa
@each_operator
def test_snapshot_is_the_state_of_a_text_that_ends_there(name: str, isa: str) -> None:
    rng, made, tokens = np.random.default_rng(2), model(name), text(40)
    expected = made.forward(made.states(), [(tokens, 0, 0, [])], isa=isa)
    for start in (0, 1, 17):
        places = sorted(rng.choice(np.arange(1, 41 - start), 3, replace=False).tolist())
        states = made.states()
        if start:
            made.forward(states, [(tokens[:start], 0, 0, [])], isa=isa)
        shots = [(rows, state + 2) for state, rows in enumerate(places)]
        made.forward(states, [(tokens[start:], start, 0, shots)], 2, isa)
        assert states[[1, 5]].isnan().all()
        for rows, state in shots:
            end, ended = start + rows, made.states()
            made.forward(ended, [(tokens[:end], 0, 1, [])], isa=isa)
            assert torch.equal(states[state], ended[1])
            if end < len(tokens):
                assert torch.equal(made.forward(states, [(tokens[end:], end, state, [])], isa=isa), expected[end:])


@each_operator
def test_text_begins_with_no_state(name: str) -> None:
    """What a number's last sequence left is not read, be it not even a number."""
    made, states = model(name), model(name).states()
    first = made.forward(states, [(text(9), 0, 3, [])])
    made.forward(states, [(text(30, 1), 9, 3, [])])
    assert torch.equal(made.forward(states, [(text(9), 0, 3, [])]), first)


@pytest.mark.parametrize("shots", ([(0, 1)], [(3, 1), (3, 2)], [(6, 1)], [(2, 0)], [(2, STATES)]))
def test_snapshots_out_of_place_are_refused(shots: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="snapshot"):
        model("conv").forward(model("conv").states(), [(text(5), 0, 0, shots)])


def test_state_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="state"):
        model("conv").forward(model("conv").states(), [(text(5), 0, STATES, [])])


def test_heads_beyond_their_row_are_refused() -> None:
    op = OPERATORS["delta"]
    with pytest.raises(ValueError, match="heads within"):
        Model(replace(op, a=Heads(op.a.first + 1, op.a.stride)))


CONFIG = {**DELTA, "model_type": "qwen3_5_text", "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
          "rope_parameters": {"rope_theta": 1e4}}  # fmt: skip


def test_sizes_of_delta_nets_that_contradict_are_refused() -> None:
    with pytest.raises(AmqError, match=r"config\.json.*expected linear_num_key_heads to divide .* 4, got 3"):
        read_spec({**CONFIG, "linear_num_key_heads": 3}, "config.json", ())
    with pytest.raises(AmqError, match=r"config\.json.*linear_conv_kernel_dim"):
        read_spec({**CONFIG, "linear_conv_kernel_dim": 0}, "config.json", ())


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    (
        ("linear_value_head_dim", 24, "delta nets with multiples of 16 features a head up to 512, not 24"),
        ("hidden_act", "gelu_new", "delta nets with silu alone, not gelu_new"),
        ("layer_types", ["linear_attention", "mamba"] * 2, "no layers of type mamba"),
        ("linear_key_head_dim", None, "does not say linear_key_head_dim"),
    ),
)
def test_what_is_beyond_the_engine_is_told(key: str, value: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        read_spec({**CONFIG, key: value}, "config.json", ())


def test_layers_by_interval_as_by_their_types() -> None:
    """Qwen3-Next's file says how often attention comes."""
    by_types = read_spec({**CONFIG, "num_hidden_layers": 4}, "config.json", ())
    by_interval = read_spec({**CONFIG, "layer_types": None, "full_attention_interval": 4}, "config.json", ())
    assert [type(step.op) for step in by_types.steps] == [type(step.op) for step in by_interval.steps]
