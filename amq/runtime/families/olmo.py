"""OLMo 2 and 3: norms behind the operators alone, and of queries and keys over all heads together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from amq.model.shape import FULL
from amq.runtime.decoder_spec import DecoderSpec, Rope, Step
from amq.runtime.families.base import Origin, TextConfig, attention, decoder, mlp, norm, rope, windows


def olmo2(origin: Origin) -> DecoderSpec:
    config = origin.record(TextConfig, "intermediate_size")
    kinds = [FULL] * config.num_hidden_layers
    return _model(origin, config, kinds, [0] * len(kinds), {FULL: rope(origin, config)})


def olmo3(origin: Origin) -> DecoderSpec:
    config = origin.record(TextConfig, "intermediate_size", "layer_types")
    kinds = config.layer_types or []
    ropes = {kind: rope(origin, config, layers=kind) for kind in sorted(set(kinds))}
    return _model(origin, config, kinds, windows(config), ropes)


def _model(origin: Origin, config: TextConfig, kinds: Sequence[str], seen: Sequence[int],
           ropes: Mapping[str, Rope]) -> DecoderSpec:  # fmt: skip
    """kinds, seen: of every layer, its kind and its window. ropes: {kind: rotary embedding}."""
    hidden, bias, steps = config.hidden_size, bool(config.attention_bias), []
    numbers = {kind: number for number, kind in enumerate(ropes)}
    for layer, (kind, window) in enumerate(zip(kinds, seen, strict=True)):
        block = origin.block(layer)
        own = f"{block}.self_attn"
        op = attention(
            own, config, bias, bias, numbers[kind], window=window,
            q_norm_all=norm(f"{own}.q_norm", config.num_attention_heads * config.features),
            k_norm_all=norm(f"{own}.k_norm", config.kv_heads * config.features),
        )  # fmt: skip
        feedforward = mlp(f"{block}.mlp", hidden, config.intermediate_size or 0, config.activation)
        steps += [
            Step(op, post_norm=norm(f"{block}.post_attention_layernorm", hidden)),
            Step(feedforward, post_norm=norm(f"{block}.post_feedforward_layernorm", hidden)),
        ]
    return decoder(origin, config, steps, list(ropes.values()))
