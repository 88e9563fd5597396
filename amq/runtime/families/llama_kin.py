"""What differs from Llama in one more thing: layers without rotary embedding, scaled queries, an MLP without gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from amq.model import shape
from amq.runtime.decoder_spec import RELU2, DecoderSpec, Mlp
from amq.runtime.families.base import (
    LARGEST,
    Origin,
    TextConfig,
    Unsupported,
    attention,
    decoder,
    linears,
    mlp,
    prenorm,
    rope,
    windows,
)  # fmt: skip
from amq.util.records import check_range, parse_record

ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class _SmolLM3Config(TextConfig):
    """no_rope_layers: 0 for layers without rotary embedding, 1 for those that have it."""

    no_rope_layers: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.no_rope_layers or ()) < self.num_hidden_layers:
            raise ValueError(
                f"expected no_rope_layers of all {self.num_hidden_layers} layers, got {len(self.no_rope_layers or ())}"
            )


def smollm3(origin: Origin) -> DecoderSpec:
    config = origin.record(_SmolLM3Config, "intermediate_size", "no_rope_layers", "layer_types")
    hidden, steps = config.hidden_size, []
    bias, mlp_bias = bool(config.attention_bias), bool(config.mlp_bias)
    for layer, window in enumerate(windows(config)):
        block, rotary = origin.block(layer), 0 if (config.no_rope_layers or ())[layer] else None
        feedforward = mlp(f"{block}.mlp", hidden, config.intermediate_size or 0, config.activation, mlp_bias)
        op = attention(f"{block}.self_attn", config, bias, bias, rotary, window=window)
        steps += prenorm(block, hidden, op, feedforward)
    return decoder(origin, config, steps, [rope(origin, config)])


def ministral(origin: Origin) -> DecoderSpec:
    config = origin.record(TextConfig, "intermediate_size", "layer_types")
    return _without_biases(origin, config, windows(config))


@dataclass(frozen=True)
class _QueryScale:
    """Of `rope_parameters`: queries at position p are multiplied by 1 + beta · log(1 + ⌊p / original⌋)."""

    llama_4_scaling_beta: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_range(self, "llama_4_scaling_beta", least=-LARGEST, most=LARGEST)
        check_range(self, "original_max_position_embeddings")

    def __call__(self, positions: Tensor) -> Tensor:
        steps = torch.floor(positions / self.original_max_position_embeddings)
        return 1 + self.llama_4_scaling_beta * torch.log(1 + steps)


def ministral3(origin: Origin) -> DecoderSpec:
    config = origin.record(TextConfig, "intermediate_size")
    rotary = shape.ModelShape.of(origin.raw).rotary.get("")
    said = dict(rotary.parameters) if rotary else {}
    if rotary and rotary.kind in ("llama3", "yarn", "longrope") and ORIGINAL in origin.raw:  # transformers prefers it
        said[ORIGINAL] = origin.raw[ORIGINAL]
    for key in ("llama_4_scaling_beta", ORIGINAL):
        if said.get(key) is None:
            raise Unsupported(f"config.json does not say {key} in rope_parameters")
    scale = parse_record(said, _QueryScale, origin.file)
    return _without_biases(origin, config, windows(config, always=True), scale)


def _without_biases(origin: Origin, config: TextConfig, seen: list[int],
                    position_scale: Callable[[Tensor], Tensor] | None = None) -> DecoderSpec:  # fmt: skip
    """seen: the window of every layer."""
    hidden, steps = config.hidden_size, []
    for layer, window in enumerate(seen):
        block = origin.block(layer)
        op = attention(f"{block}.self_attn", config, window=window, position_scale=position_scale)
        feedforward = mlp(f"{block}.mlp", hidden, config.intermediate_size or 0, config.activation)
        steps += prenorm(block, hidden, op, feedforward)
    return decoder(origin, config, steps, [rope(origin, config)])


def arcee(origin: Origin) -> DecoderSpec:
    config = origin.record(TextConfig, "intermediate_size", "hidden_act")
    if config.activation != RELU2:
        raise Unsupported(f"the native engine has no activation {config.hidden_act} without a gate")
    hidden, wide, steps = config.hidden_size, config.intermediate_size or 0, []
    bias, mlp_bias = bool(config.attention_bias), bool(config.mlp_bias)
    for layer in range(config.num_hidden_layers):
        block = origin.block(layer)
        up, down = (
            linears(f"{block}.mlp", count, mlp_bias, **{name: out})
            for name, count, out in (("up_proj", hidden, wide), ("down_proj", wide, hidden))
        )
        steps += prenorm(block, hidden, attention(f"{block}.self_attn", config, bias, bias), Mlp(up, down, RELU2))
    return decoder(origin, config, steps, [rope(origin, config)])
