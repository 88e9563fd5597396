"""Llama and those that differ from it in biases, norms of heads, and windows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from amq.runtime.decoder_spec import DecoderSpec, Step
from amq.runtime.families.base import (
    Origin,
    TextConfig,
    attention,
    decoder,
    head_norms,
    mlp,
    norm,
    rope,
    windows,
)  # fmt: skip


def llama(origin: Origin) -> DecoderSpec:
    return _model(origin, no_windows, mlp_bias=True)


def mistral(origin: Origin) -> DecoderSpec:
    return _model(origin, partial(windows, always=True), bias=False)


def qwen2(origin: Origin) -> DecoderSpec:
    return _model(origin, windows, bias=True, output_bias=False)


def qwen3(origin: Origin) -> DecoderSpec:
    return _model(origin, windows, normed=True)


def no_windows(config: TextConfig) -> list[int]:
    """Of families that transformers gives none, whatever layer_types says."""
    return [0] * config.num_hidden_layers


def _model(origin: Origin, spans: Callable[[TextConfig], list[int]], bias: bool | None = None,
           output_bias: bool | None = None, mlp_bias: bool = False, normed: bool = False) -> DecoderSpec:  # fmt: skip
    """spans: windows of all layers. bias, output_bias: of attention, None where config.json says it. mlp_bias:
    config.json may say one. normed: queries and keys are, per head."""
    config = origin.record(TextConfig, "intermediate_size")
    said = bool(config.attention_bias)
    bias, output_bias = (
        said if bias is None else bias,
        (said if bias is None else bias) if output_bias is None else output_bias,
    )
    hidden, steps = config.hidden_size, []
    for layer, window in enumerate(spans(config)):
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
    return decoder(origin, config, steps, [rope(origin, config)])
