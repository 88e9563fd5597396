"""Rotary positions in a GGUF file: keys, and for Llama 3 and Phi 3 tensors of factors that divide the frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from amq.errors import AmqError
from amq.model.gguf.rope import ENDLESS, FREQUENCIES, LONG, SHORT, THETA, llama3_factors
from amq.model.shape import FULL, SLIDING, ModelShape, Rotary, head_dim, said

BY_KIND = ("gemma3_text", "gemma4_text")
"""Model types whose layers with a window have positions of their own in llama.cpp, too."""


def rope_of(config: Mapping[str, Any]) -> Rotary:
    """Of all layers, or of those that look back on all tokens in a model of `BY_KIND`; raises AmqError where layers of
    another differ."""
    found = ModelShape.of(config).rotary
    if found.keys() == {FULL, SLIDING} and config.get("model_type") in BY_KIND:
        return found[FULL]
    if "" not in found:
        raise AmqError(
            f"model type {config.get('model_type')!r} has rotary positions of its own for some layers (rope_parameters "
            f"of {', '.join(found)}); GGUF has one setting for all layers"
        )
    return found[""]


def theta_of(config: Mapping[str, Any]) -> float:
    return float(rope_of(config).theta or THETA)


def dims_of(config: Mapping[str, Any]) -> int:
    """Of a head that turn."""
    dim = head_dim(config)
    if dim is None:
        raise AmqError(
            "config.json gives neither head_dim nor hidden_size and heads, by which rotary positions are scaled"
        )
    share = said(rope_of(config).parameters, "partial_rotary_factor")
    share = said(config, "partial_rotary_factor") if share is None else share
    return int(dim * (1.0 if share is None else share))


def rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """{key below the architecture's name: value}. Raises AmqError for a yarn that llama.cpp computes otherwise."""
    rope = rope_of(config)
    keys: dict[str, Any] = {"rope.dimension_count": dims_of(config), "rope.freq_base": theta_of(config)}
    if rope.kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.parameters["factor"])}
    if rope.kind == "yarn":
        return keys | _yarn(rope, config)
    if rope.kind == "longrope":
        return keys | _longrope(rope, config)
    return keys


def _original(rope: Rotary, config: Mapping[str, Any]) -> int:
    found = said(rope.parameters, "original_max_position_embeddings")
    found = said(config, "original_max_position_embeddings") if found is None else found
    return int(config["max_position_embeddings"] if found is None else found)


def _yarn(rope: Rotary, config: Mapping[str, Any]) -> dict[str, Any]:
    given, factor = rope.parameters, float(rope.parameters["factor"])
    usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    attention = said(given, "attention_factor")
    own = said(given, "mscale", "mscale_all_dim") is not None and config.get("model_type") != "ministral3"
    if own or (attention is not None and not math.isclose(attention, usual, rel_tol=1e-6)):
        raise AmqError("GGUF cannot hold yarn with an attention factor of its own (mscale)")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": _original(rope, config),
        "rope.scaling.yarn_beta_fast": float(said(given, "beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(said(given, "beta_slow") or 1.0),
    }


def _longrope(rope: Rotary, config: Mapping[str, Any]) -> dict[str, Any]:
    original = _original(rope, config)
    attention = said(rope.parameters, "attention_factor")
    if attention is None:
        scale = said(rope.parameters, "factor") or config["max_position_embeddings"] / original
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(attention),
    }


def rope_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{name in the file: float32 [dims / 2]}."""
    rope = rope_of(config)
    if rope.kind == "longrope":
        factors = {SHORT: rope.parameters["short_factor"], LONG: rope.parameters["long_factor"]}
        return {name: np.asarray(values, dtype=np.float32) for name, values in factors.items()}
    if rope.kind == "proportional":
        return {FREQUENCIES: proportional_factors(rope, ModelShape.of(config))}
    frequencies = rope_frequencies(config)
    return {} if frequencies is None else {FREQUENCIES: frequencies}


def proportional_factors(rope: Rotary, shape: ModelShape) -> np.ndarray:
    """float32 [head's features / 2]: 1 for what turns; for the rest so much that its frequency is nothing."""
    dim = next((layer.head_dim for layer in shape.layers if layer.kind == FULL), None) or 0
    share = said(rope.parameters, "partial_rotary_factor")
    factors = np.full(dim // 2, ENDLESS, dtype=np.float32)
    factors[: int((1.0 if share is None else share) * dim // 2)] = 1
    return factors


def rope_frequencies(config: Mapping[str, Any]) -> np.ndarray | None:
    """float32 [dims / 2]: what llama.cpp divides the rotary frequencies by, for Llama 3; None for other types."""
    rope = rope_of(config)
    if rope.kind != "llama3":
        return None
    dim, scaling = dims_of(config), rope.parameters
    plain = 1 / theta_of(config) ** (np.arange(0, dim, 2) / dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = llama3_factors(plain, scaling["factor"], low, high, scaling["original_max_position_embeddings"])
    return factors.astype(np.float32)
