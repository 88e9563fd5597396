"""What an export reads from config.json besides sizes: rotary positions and sliding windows, under old and new keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amq.errors import AmqError

ROPE_THETA = 10000.0
"""What transformers takes where a config of the llama kind does not say."""


def with_flat_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `rope_theta` and `rope_scaling` at the top, as before transformers 5, besides `rope_parameters`.

    Raises AmqError where kinds of layers have rotary positions of their own, which those two keys cannot say.
    """
    rope = config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise AmqError(
            f"model type {config.get('model_type')!r} has rotary positions of its own for some layers (rope_parameters "
            f"of {', '.join(rope)}); this export can write one setting for all layers only"
        )
    scaling = config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    theta = config.get("rope_theta") or rope.get("rope_theta") or ROPE_THETA
    return {**config, "rope_theta": theta, "rope_scaling": scaling or None}


def rope_type(config: Mapping[str, Any]) -> str:
    """`default`, `linear`, `llama3`, …; `config` as `with_flat_rope` returns it."""
    scaling = config["rope_scaling"] or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def attention_window(config: Mapping[str, Any]) -> int | None:
    """The positions that a layer looks back on, where that is fewer than all."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    used = config.get("use_sliding_window", True) and (not kinds or "sliding_attention" in kinds)
    return window if used else None
