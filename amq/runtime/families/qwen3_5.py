"""Qwen3.5 and Qwen3-Next: three of four layers are gated delta nets, the others attention whose output is gated.

Norms multiply by 1 + weight, but the one of a delta net's output by its weight. An image-text model
has three positions for each token, which are the same in text: then its rotary embedding is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from amq.model import shape
from amq.runtime.decoder_spec import (
    SILU,
    Array,
    Attention,
    DecoderSpec,
    DeltaNet,
    Heads,
    Mixture,
    Mlp,
    Step,
    plus_one,
)
from amq.runtime.families.base import (
    MOST_HEAD,
    Origin,
    Unsupported,
    attention,
    decoder,
    linears,
    mlp,
    norm,
    rope,
)
from amq.runtime.families.mixtures import MixtureConfig, softmax_mixture
from amq.util.records import check_range

LINEAR = "linear_attention"
DELTA_SIZES = (
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
    "linear_num_value_heads",
)  # fmt: skip
EXPERT_SIZES = ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


@dataclass(frozen=True)
class DeltaConfig(MixtureConfig):
    linear_conv_kernel_dim: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    full_attention_interval: int = 4
    shared_expert_intermediate_size: int | None = None
    partial_rotary_factor: float | None = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, *DELTA_SIZES, "full_attention_interval", "shared_expert_intermediate_size")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"expected linear_num_key_heads to divide linear_num_value_heads {self.linear_num_value_heads}, "
                f"got {self.linear_num_key_heads}"
            )

    @property
    def kinds(self) -> list[str]:
        """Of each layer."""
        layers = range(1, self.num_hidden_layers + 1)
        return self.layer_types or [LINEAR if n % self.full_attention_interval else shape.FULL for n in layers]

    @property
    def values(self) -> int:
        """Features of all value heads."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def channels(self) -> int:
        """Of a delta net's convolution."""
        return 2 * self.linear_num_key_heads * self.linear_key_head_dim + self.values


def qwen3_5(origin: Origin) -> DecoderSpec:
    config = _config(origin, "intermediate_size")
    return _model(origin, config, _apart, lambda block, _: _dense(config, block))


def qwen3_5_moe(origin: Origin) -> DecoderSpec:
    config = _config(origin, *EXPERT_SIZES)
    return _model(origin, config, _apart, lambda block, _: _mixture(origin, config, block, normalized=True))


def qwen3_next(origin: Origin) -> DecoderSpec:
    config = _config(origin, *EXPERT_SIZES, "norm_topk_prob")

    def feed_forward(block: str, layer: int) -> Mlp | Mixture:
        if not config.routed(layer):
            return _dense(config, block)
        return _mixture(origin, config, block, normalized=bool(config.norm_topk_prob))

    return _model(origin, config, _fused, feed_forward)


def _config(origin: Origin, *needed: str) -> DeltaConfig:
    config = origin.record(DeltaConfig, *DELTA_SIZES, *needed)
    for features in (config.linear_key_head_dim, config.linear_value_head_dim):
        if features % 16 or features > MOST_HEAD:
            raise Unsupported(
                f"the native engine has delta nets with multiples of 16 features a head up to {MOST_HEAD}, "
                f"not {features}"
            )
    if config.linear_conv_kernel_dim < 2:
        raise Unsupported("the native engine has convolutions over two positions or more (linear_conv_kernel_dim)")
    if config.activation != SILU:
        raise Unsupported(f"the native engine has delta nets with silu alone, not {config.hidden_act}")
    return config


def _model(origin: Origin, config: DeltaConfig, delta: Callable[[DeltaConfig, str], dict[str, Any]],
           feed_forward: Callable[[str, int], Mlp | Mixture]) -> DecoderSpec:  # fmt: skip
    """delta: the projection of the delta net at a prefix, and where its parts lie. feed_forward: of a block and its
    number."""
    hidden, steps = config.hidden_size, []
    for layer, kind in enumerate(config.kinds):
        block = origin.block(layer)
        if kind not in (LINEAR, shape.FULL):
            raise Unsupported(f"the native engine has no layers of type {kind}")
        mixer = _delta_net(config, f"{block}.linear_attn", delta) if kind == LINEAR else _attention(config, block)
        steps += [
            Step(mixer, plus_one(f"{block}.input_layernorm.weight", hidden)),
            Step(feed_forward(block, layer), plus_one(f"{block}.post_attention_layernorm.weight", hidden)),
        ]
    final_norm = plus_one(f"{origin.root}norm.weight", hidden)
    return decoder(origin, config, steps, [rope(origin, config, partial=True)], final_norm=final_norm)


def _dense(config: DeltaConfig, block: str) -> Mlp:
    if not config.intermediate_size:
        raise Unsupported("config.json does not say intermediate_size")
    return mlp(f"{block}.mlp", config.hidden_size, config.intermediate_size, config.activation)


def _mixture(origin: Origin, config: DeltaConfig, block: str, normalized: bool) -> Mixture:
    return softmax_mixture(
        origin, config, block, top_k=config.num_experts_per_tok or 0, experts=config.experts,
        wide=config.moe_intermediate_size or 0, normalized=normalized,
        shared_wide=config.shared_expert_intermediate_size or 0, shared_gate="shared_expert_gate",
    )  # fmt: skip


def _attention(config: DeltaConfig, block: str) -> Attention:
    prefix, bias = f"{block}.self_attn", bool(config.attention_bias)
    q_norm, k_norm = (plus_one(f"{prefix}.{name}.weight", config.features) for name in ("q_norm", "k_norm"))
    return attention(prefix, config, bias, bias, gated=True, q_norm=q_norm, k_norm=k_norm)


def _delta_net(config: DeltaConfig, prefix: str, projection: Callable[[DeltaConfig, str], dict[str, Any]]) -> DeltaNet:
    kernel, heads, value_dim = (
        config.linear_conv_kernel_dim,
        config.linear_num_value_heads,
        config.linear_value_head_dim,
    )
    return DeltaNet(
        config.linear_num_key_heads, heads, config.linear_key_head_dim, value_dim, kernel,
        out=linears(prefix, config.values, out_proj=config.hidden_size),
        convolution=transposed(f"{prefix}.conv1d", config.channels, kernel),
        rate=Array(f"{prefix}.A_log", (heads,), Tensor.exp),
        dt_bias=Array(f"{prefix}.dt_bias", (heads,)),
        norm=norm(f"{prefix}.norm", config.linear_value_head_dim),
        **projection(config, prefix),
    )  # fmt: skip


def transposed(name: str, channels: int, kernel: int) -> Array:
    """The weight of the depthwise convolution `name`."""
    return Array(f"{name}.weight", (channels, 1, kernel), lambda weight: weight.squeeze(1).t().contiguous())


def _apart(config: DeltaConfig, prefix: str) -> dict[str, Any]:
    """Each part in rows of its own: q, k and v of one linear, then z, b and a."""
    keys, key_dim, values = config.linear_num_key_heads, config.linear_key_head_dim, config.linear_num_value_heads
    group, z = values // keys, config.channels
    width, b = group * config.linear_value_head_dim, z + config.values
    return {
        "in_": linears(prefix, config.hidden_size, in_proj_qkv=config.channels, in_proj_z=config.values,
                       in_proj_b=values, in_proj_a=values),
        "q": Heads(0, key_dim), "k": Heads(keys * key_dim, key_dim), "v": Heads(2 * keys * key_dim, width),
        "z": Heads(z, width), "b": Heads(b, group), "a": Heads(b + values, group),
    }  # fmt: skip


def _fused(config: DeltaConfig, prefix: str) -> dict[str, Any]:
    """Parts side by side in the rows of each key head: q, k, v and z of one linear, b and a of another."""
    keys, key_dim = config.linear_num_key_heads, config.linear_key_head_dim
    group = config.linear_num_value_heads // keys
    width = group * config.linear_value_head_dim
    stride, gates = 2 * key_dim + 2 * width, 2 * group
    ba = keys * stride
    return {
        "in_": linears(prefix, config.hidden_size, in_proj_qkvz=ba, in_proj_ba=keys * gates),
        "q": Heads(0, stride), "k": Heads(key_dim, stride), "v": Heads(2 * key_dim, stride),
        "z": Heads(2 * key_dim + width, stride), "b": Heads(ba, gates), "a": Heads(ba + group, gates),
    }  # fmt: skip
