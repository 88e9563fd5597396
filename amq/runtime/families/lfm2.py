"""LFM2: short convolutions between layers of attention, and a mixture of experts behind the first layers of some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from amq.model import shape
from amq.runtime.decoder_spec import SILU, Array, Attention, DecoderSpec, Mixture, Mlp, ShortConv, Step
from amq.runtime.families.base import (
    LARGEST,
    Origin,
    Unsupported,
    attention,
    decoder,
    head_norms,
    linears,
    mlp,
    norm,
    rope,
)
from amq.runtime.families.mixtures import MixtureConfig, sigmoid_mixture
from amq.runtime.families.qwen3_5 import transposed
from amq.util.records import check_range

CONV = "conv"
MLP = ("w1", "w3", "w2")


@dataclass(frozen=True)
class Lfm2Config(MixtureConfig):
    """Names of older files are `block_ff_dim` and `tie_embedding`, which win."""

    NORM: ClassVar[str] = "norm_eps"

    norm_eps: float | None = None
    conv_L_cache: int = 0
    conv_bias: bool = False
    full_attn_idxs: list[int] | None = None
    tie_word_embeddings: bool | None = True
    tie_embedding: bool | None = None
    block_ff_dim: int | None = None
    block_auto_adjust_ff_dim: bool = True
    block_ffn_dim_multiplier: float | None = 1.0
    block_multiple_of: int = 256
    num_dense_layers: int = 2
    norm_topk_prob: bool | None = True
    use_expert_bias: bool = True
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "conv_L_cache", "block_ff_dim", "block_multiple_of")
        check_range(self, "num_dense_layers", least=0)
        check_range(self, "block_ffn_dim_multiplier", least=0, most=LARGEST)
        check_range(self, "routed_scaling_factor", least=-LARGEST, most=LARGEST)

    @property
    def activation(self) -> str:
        """Of MLPs and experts, whatever hidden_act says."""
        return SILU

    @property
    def kinds(self) -> list[str]:
        """Of each layer."""
        layers = range(self.num_hidden_layers)
        full = layers if self.full_attn_idxs is None else self.full_attn_idxs
        return self.layer_types or [shape.FULL if n in full else CONV for n in layers]

    @property
    def adjusted(self) -> int:
        """Features of a dense model's MLP, as transformers makes them of what the file says."""
        wide = self.intermediate_size or 0
        if not self.block_auto_adjust_ff_dim:
            return wide
        wide = int(2 * wide / 3)
        if self.block_ffn_dim_multiplier is None:
            return wide
        return -(-int(self.block_ffn_dim_multiplier * wide) // self.block_multiple_of) * self.block_multiple_of


def lfm2(origin: Origin) -> DecoderSpec:
    config = _config(origin)
    return _model(origin, config, lambda block, _: _dense(config, block, config.adjusted))


def lfm2_moe(origin: Origin) -> DecoderSpec:
    config = _config(origin, "num_experts_per_tok", "moe_intermediate_size")

    def feed_forward(block: str, layer: int) -> Mlp | Mixture:
        if layer < config.num_dense_layers:
            return _dense(config, block, config.intermediate_size or 0)
        return sigmoid_mixture(
            origin, config, block, prefix="feed_forward", top_k=config.num_experts_per_tok or 0,
            experts=config.experts, wide=config.moe_intermediate_size or 0, normalized=bool(config.norm_topk_prob),
            correction="expert_bias" if config.use_expert_bias else "", scale=config.routed_scaling_factor,
            epsilon=1e-6,
        )  # fmt: skip

    return _model(origin, config, feed_forward)


def _config(origin: Origin, *needed: str) -> Lfm2Config:
    config = origin.record(Lfm2Config, "conv_L_cache", *needed)
    if config.block_ff_dim is not None:
        config = replace(config, intermediate_size=config.block_ff_dim)
    if config.tie_embedding is not None:
        config = replace(config, tie_word_embeddings=config.tie_embedding)
    if config.intermediate_size is None:
        raise Unsupported("config.json does not say intermediate_size")
    if config.conv_L_cache < 2:
        raise Unsupported("the native engine has convolutions over two positions or more (conv_L_cache)")
    return config


def _dense(config: Lfm2Config, block: str, wide: int) -> Mlp:
    return mlp(f"{block}.feed_forward", config.hidden_size, wide, config.activation, names=MLP)


def _model(origin: Origin, config: Lfm2Config, feed_forward: Callable[[str, int], Mlp | Mixture]) -> DecoderSpec:
    hidden, steps = config.hidden_size, []
    for layer, kind in enumerate(config.kinds):
        block = origin.block(layer)
        if kind not in (CONV, shape.FULL):
            raise Unsupported(f"the native engine has no layers of type {kind}")
        mixer = _convolution(config, f"{block}.conv") if kind == CONV else _attention(config, f"{block}.self_attn")
        steps += [
            Step(mixer, norm(f"{block}.operator_norm", hidden)),
            Step(feed_forward(block, layer), norm(f"{block}.ffn_norm", hidden)),
        ]
    final_norm = norm(f"{origin.root}embedding_norm", hidden)
    return decoder(origin, config, steps, [rope(origin, config)], final_norm=final_norm)


def _attention(config: Lfm2Config, prefix: str) -> Attention:
    norms: dict[str, Any] = head_norms(prefix, config.features, "q_layernorm", "k_layernorm")
    return attention(prefix, config, output="out_proj", **norms)


def _convolution(config: Lfm2Config, prefix: str) -> ShortConv:
    hidden, kernel = config.hidden_size, config.conv_L_cache
    return ShortConv(
        kernel,
        linears(prefix, hidden, config.conv_bias, in_proj=3 * hidden),
        linears(prefix, hidden, config.conv_bias, out_proj=hidden),
        transposed(f"{prefix}.conv", hidden, kernel),
        Array(f"{prefix}.conv.bias", (hidden,)) if config.conv_bias else None,
    )
