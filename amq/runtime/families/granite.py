"""Granite: a Llama with constant factors of embeddings, scores, outputs of operators and logits; and its mixtures."""

from __future__ import annotations

from dataclasses import dataclass

from amq.runtime.decoder_spec import DecoderSpec, Mixture, Mlp, Step
from amq.runtime.families.base import (
    LARGEST,
    Origin,
    TextConfig,
    Unsupported,
    attention,
    decoder,
    linears,
    mlp,
    norm,
    rope,
)  # fmt: skip
from amq.runtime.families.mixtures import MixtureConfig, softmax_mixture
from amq.util.records import check_range

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
ATTENTION = frozenset({"attention", "full_attention"})
TILE = 16
"""Features of a tile of weights: the halves of one linear begin at a tile each."""


@dataclass(frozen=True)
class _Multipliers:
    embedding_multiplier: float | None = None
    attention_multiplier: float | None = None
    residual_multiplier: float | None = None
    logits_scaling: float | None = None

    def check(self) -> None:
        check_range(self, *MULTIPLIERS, least=-LARGEST, most=LARGEST)
        if self.logits_scaling == 0:
            raise ValueError("expected a logits_scaling other than 0, by which logits are divided")


@dataclass(frozen=True)
class GraniteConfig(TextConfig, _Multipliers):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()


def granite(origin: Origin) -> DecoderSpec:
    config = origin.record(GraniteConfig, "intermediate_size", *MULTIPLIERS)
    bias, wide = bool(config.mlp_bias), config.intermediate_size or 0
    parts = [mlp(f"{origin.block(layer)}.mlp", config.hidden_size, wide, config.activation, bias)
             for layer in range(config.num_hidden_layers)]  # fmt: skip
    return _model(origin, config, parts, rotary=True)


@dataclass(frozen=True)
class GraniteMoeHybridConfig(MixtureConfig, _Multipliers):
    shared_intermediate_size: int | None = None
    position_embedding_type: str | None = None
    layers_block_type: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        check_range(self, "shared_intermediate_size")


def granitemoehybrid(origin: Origin) -> DecoderSpec:
    """Its layers of attention; those of Mamba are Unsupported."""
    config = origin.record(GraniteMoeHybridConfig, "shared_intermediate_size", *MULTIPLIERS)
    kinds = config.layer_types or config.layers_block_type
    if kinds is None:
        raise Unsupported("config.json does not say layer_types")
    if strange := sorted(set(kinds) - ATTENTION):
        raise Unsupported(f"the native engine has no layers of type {', '.join(strange)}")
    parts = [_feed_forward(origin, config, origin.block(layer)) for layer in range(config.num_hidden_layers)]
    return _model(origin, config, parts, rotary=config.position_embedding_type == "rope")


def _feed_forward(origin: Origin, config: GraniteMoeHybridConfig, block: str) -> Mixture | Mlp:
    """Its shared expert, whose gate and up are one linear, and experts where it has some."""
    hidden, wide = config.hidden_size, config.shared_intermediate_size or 0
    if wide % TILE:
        raise Unsupported(f"the native engine wants a multiple of {TILE} for shared_intermediate_size, this is {wide}")
    path = f"{block}.shared_mlp"
    shared = Mlp(
        linears(path, hidden, input_linear=2 * wide), linears(path, wide, output_linear=hidden), config.activation
    )
    if not config.experts:
        return shared
    if config.num_experts_per_tok is None or config.intermediate_size is None:
        raise Unsupported("config.json does not say num_experts_per_tok and intermediate_size")
    routed = softmax_mixture(
        origin, config, block, prefix="block_sparse_moe", top_k=config.num_experts_per_tok, experts=config.experts,
        wide=config.intermediate_size, normalized=True, router="router",
    )  # fmt: skip
    return Mixture(routed.router, routed.experts, shared)


def _model(origin: Origin, config: GraniteConfig | GraniteMoeHybridConfig, parts: list[Mlp] | list[Mixture | Mlp],
           rotary: bool) -> DecoderSpec:  # fmt: skip
    """parts: what each layer has behind its attention. rotary: queries and keys are rotated."""
    hidden, bias, steps = config.hidden_size, bool(config.attention_bias), []
    residual, scale = _said(config.residual_multiplier), _said(config.attention_multiplier)
    for layer, part in enumerate(parts):
        block = origin.block(layer)
        attend = attention(f"{block}.self_attn", config, bias, bias, rope=0 if rotary else None, scale=scale)
        steps += [
            Step(attend, norm(f"{block}.input_layernorm", hidden), scale=residual),
            Step(part, norm(f"{block}.post_attention_layernorm", hidden), scale=residual),
        ]
    return decoder(
        origin, config, steps, [rope(origin, config)] if rotary else [],
        embedding_scale=_said(config.embedding_multiplier), logit_scale=1 / _said(config.logits_scaling),
    )  # fmt: skip


def _said(multiplier: float | None) -> float:
    assert multiplier is not None, "records are asked for MULTIPLIERS"
    return multiplier
