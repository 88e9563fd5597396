"""`DecoderSpec`: a decoder-only model as data, which engines of our own compute: csrc/cpu/decoder.h, field by field.

A model is a list of steps on the residual stream h, each of one operator:

    h = (h + scale · post_norm(op(norm(h)))) · after

Here tensors have names and shapes, and no weight has been read: `amq.runtime.families` makes a spec of config.json, an
engine reads what it names (`amq.runtime.weights`), and csrc/decoder_spec.cpp puts addresses in the place of names.
What a field leaves out (None, 0) is left out of the computation. decoder.h has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Array:
    """A float32 array that is no linear's weight: `make` of the tensor `name`, which has `shape` in the checkpoint.

    name: "" where it is made of nothing, by `make` of an empty tensor.
    key: what it is known by beside the other arrays, linears and tables of a spec.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = _itself
    own_key: str = ""

    @property
    def key(self) -> str:
        return self.own_key or self.name


def ones(count: int) -> Array:
    """Of a norm without weights."""
    return Array("", (0,), lambda _: torch.ones(count), f"ones {count}")


def plus_one(name: str, count: int) -> Array:
    """Of a norm that multiplies by 1 + weight."""
    return Array(name, (count,), lambda weight: 1 + weight)


@dataclass(frozen=True)
class Linear:
    """The linear `name`, in a format or kept; its weight has the shape [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False


@dataclass(frozen=True)
class Projection:
    """Linears that share x; their outputs lie one after another."""

    linears: tuple[Linear, ...]

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features

    @property
    def out_features(self) -> int:
        return sum(linear.out_features for linear in self.linears)


@dataclass(frozen=True)
class Rope:
    """frequencies: float32 [rotary / 2], the angle per position of each pair; factor: of cos and sin.

    long_frequencies, long_factor, border: what texts of more than `border` positions have instead, as a whole.
    """

    rotary: int
    frequencies: Tensor
    factor: float = 1.0
    long_frequencies: Tensor | None = None
    long_factor: float = 1.0
    border: int = 0


@dataclass(frozen=True)
class Attention:
    n_heads: int
    n_kv_heads: int
    head_dim: int
    qkv: Projection
    o: Projection
    scale: float
    gated: bool = False
    keys_are_values: bool = False
    cache_of: int | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None
    v_norm: Array | None = None
    q_norm_all: Array | None = None
    k_norm_all: Array | None = None
    sinks: Array | None = None
    position_scale: Callable[[Tensor], Tensor] | None = None
    """Of float32 positions [context]."""
    softcap: float = 0.0
    rope: int | None = None
    window: int = 0


@dataclass(frozen=True)
class Heads:
    first: int
    stride: int


@dataclass(frozen=True)
class DeltaNet:
    n_key_heads: int
    n_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    in_: Projection
    out: Projection
    q: Heads
    k: Heads
    v: Heads
    z: Heads
    b: Heads
    a: Heads
    convolution: Array
    """`make` transposes it to [kernel, channels]."""
    rate: Array
    dt_bias: Array
    norm: Array


@dataclass(frozen=True)
class ShortConv:
    kernel: int
    in_: Projection
    out: Projection
    convolution: Array
    """`make` transposes it to [kernel, channels]."""
    bias: Array | None = None


SILU, GELU_TANH, CLAMPED_SWIGLU, RELU2 = "silu", "gelu_tanh", "clamped_swiglu", "relu2"
ACTIVATIONS = {
    "silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH, "gelu_new": GELU_TANH, "relu2": RELU2,
}  # fmt: skip
"""{name in config.json: name in decoder.h}."""


@dataclass(frozen=True)
class Mlp:
    in_: Projection
    down: Projection
    activation: str = SILU
    limit: float = 0.0


@dataclass(frozen=True)
class Router:
    """weight: not quantized; score: `softmax` or `sigmoid`."""

    weight: Linear
    top_k: int
    score: str = "softmax"
    normalized: bool = False
    norm: Array | None = None
    correction: Array | None = None
    expert_scale: Array | None = None
    epsilon: float = 0.0
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True)
class Mixture:
    router: Router
    experts: tuple[Mlp, ...]
    shared: Mlp | None = None
    shared_gate: Array | None = None
    routed_norm: Array | None = None
    shared_post_norm: Array | None = None
    routed_post_norm: Array | None = None


@dataclass(frozen=True)
class PerLayerInput:
    in_: Projection
    out: Projection
    index: int
    activation: str = GELU_TANH


Operator = Attention | DeltaNet | ShortConv | Mlp | Mixture | PerLayerInput


@dataclass(frozen=True)
class Step:
    """after: one float."""

    op: Operator
    norm: Array | None = None
    post_norm: Array | None = None
    scale: float = 1.0
    after: Array | None = None


@dataclass(frozen=True)
class Table:
    """The embedding or head `name`: rows [rows, columns], packed or not."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class PerLayerEmbedding:
    table: Table
    projection: Projection
    norm: Array
    width: int
    table_scale: float
    projection_scale: float
    sum_scale: float


@dataclass(frozen=True)
class DecoderSpec:
    """head: of the same name as the embedding where the two are tied.

    unread: beginnings of names of tensors and linears that are not part of the text model.
    """

    hidden: int
    vocabulary: int
    longest: int
    """Positions that the model was made for."""
    epsilon: float
    embedding: Table
    head: Table
    final_norm: Array
    steps: tuple[Step, ...]
    ropes: tuple[Rope, ...] = ()
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    per_layer: PerLayerEmbedding | None = None
    unread: tuple[str, ...] = field(default=())

    @property
    def recurrent(self) -> bool:
        """Whether a sequence has a state beside its keys and values."""
        return any(isinstance(step.op, DeltaNet | ShortConv) for step in self.steps)

    @property
    def own_caches(self) -> int:
        """How many attentions have keys and values of their own."""
        return sum(op.cache_of is None for op in self.parts(Attention))

    def parts(self, kind: type) -> list[Any]:
        """Everything of that class in the spec, in the order in which a pass reads it."""
        return self._by_kind.get(kind, [])

    @cached_property
    def _by_kind(self) -> dict[type, list[Any]]:
        """One walk for all classes: a mixture of many experts has a hundred thousand parts."""
        found: dict[type, list[Any]] = {}
        _collect(self, found)
        return found


def _collect(record: Any, found: dict[type, list[Any]]) -> None:
    if isinstance(record, tuple):
        for item in record:
            _collect(item, found)
    elif is_dataclass(record):
        found.setdefault(type(record), []).append(record)
        for value in list(vars(record).values()):
            _collect(value, found)
