"""Phi 3 and 4: queries, keys and values in one linear, gate and up in another, other angles where texts are long."""

from __future__ import annotations

from amq.runtime.decoder_spec import DecoderSpec, Mlp
from amq.runtime.families.base import Origin, TextConfig, attention, decoder, linears, prenorm, rope, windows


def phi3(origin: Origin) -> DecoderSpec:
    config = origin.record(TextConfig, "intermediate_size")
    hidden, wide, steps = config.hidden_size, config.intermediate_size or 0, []
    heads = (config.num_attention_heads + 2 * config.kv_heads) * config.features
    for layer, window in enumerate(windows(config, always=True)):
        block = origin.block(layer)
        own = f"{block}.self_attn"
        qkv = linears(own, hidden, qkv_proj=heads)
        gate_up, down = (
            linears(f"{block}.mlp", hidden, gate_up_proj=2 * wide),
            linears(f"{block}.mlp", wide, down_proj=hidden),
        )
        op = attention(own, config, qkv=qkv, window=window)
        steps += prenorm(block, hidden, op, Mlp(gate_up, down, config.activation))
    return decoder(origin, config, steps, [rope(origin, config, partial=True)])
