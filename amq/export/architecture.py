"""Rotary positions for exports: one setting for all layers, under the keys that readers knew before transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amq.errors import AmqError
from amq.model.shape import ModelShape, Rotary

ROPE_THETA = 10000.0
"""What transformers takes where a config of the llama kind does not say."""


def with_flat_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `rope_theta` and `rope_scaling` at the top, as before transformers 5, besides `rope_parameters`.

    Raises AmqError where kinds of layers have rotary positions of their own, which those two keys cannot say.
    """
    rope = rotary(config)
    scaling = None if rope.kind == "default" else dict(rope.parameters)
    return {**config, "rope_theta": rope.theta or ROPE_THETA, "rope_scaling": scaling}


def rotary(config: Mapping[str, Any]) -> Rotary:
    """The rotary positions of all layers; raises AmqError where layers differ."""
    found = ModelShape.of(config).rotary
    if "" not in found:
        raise AmqError(
            f"model type {config.get('model_type')!r} has rotary positions of its own for some layers (rope_parameters "
            f"of {', '.join(found)}); this export can write one setting for all layers only"
        )
    return found[""]
