"""Llama and those that differ from it in biases, norms of heads, and windows."""

from __future__ import annotations

from typing import Any

from amq.runtime.decoder_spec import DecoderSpec, Step
from amq.runtime.families.base import (
    Origin,
    TextConfig,
    Unsupported,
    attention,
    decoder,
    head_norms,
    mlp,
    norm,
    rope,
    windows,
)  # fmt: skip


def llama(origin: Origin) -> DecoderSpec:
    return _model(origin, mlp_bias=True)


def mistral(origin: Origin) -> DecoderSpec:
    return _model(origin, bias=False, always_windows=True)


def qwen2(origin: Origin) -> DecoderSpec:
    return _model(origin, bias=True, output_bias=False)


def qwen3(origin: Origin) -> DecoderSpec:
    return _model(origin, normed=True)


def _model(origin: Origin, bias: bool | None = None, output_bias: bool | None = None, mlp_bias: bool = False,
           normed: bool = False, always_windows: bool = False) -> DecoderSpec:  # fmt: skip
    """bias, output_bias: of attention, None where config.json says it. mlp_bias: config.json may say one."""
    config = origin.record(TextConfig, "intermediate_size")
    if config.use_sliding_window and not config.layer_types:
        raise Unsupported("config.json does not say which layers have a sliding window (layer_types)")
    said = bool(config.attention_bias)
    bias, output_bias = (
        said if bias is None else bias,
        (said if bias is None else bias) if output_bias is None else output_bias,
    )
    hidden, steps = config.hidden_size, []
    for layer, window in enumerate(windows(config, always_windows)):
        block = origin.block(layer)
        own = f"{block}.self_attn"
        norms: dict[str, Any] = head_norms(own, config.features) if normed else {}
        steps += [
            Step(
                attention(own, config, bias, output_bias, window=window, **norms),
                norm(f"{block}.input_layernorm", hidden),
            ),
            Step(
                mlp(f"{block}.mlp", hidden, config.intermediate_size or 0, config.activation,
                    mlp_bias and bool(config.mlp_bias)),
                norm(f"{block}.post_attention_layernorm", hidden),
            ),
        ]  # fmt: skip
    return decoder(origin, config, steps, [rope(origin, config, partial=False)])
