"""Rotary positions of a GGUF file → `rope_parameters` of transformers.

llama.cpp has the rotary scaling of Llama 3 as a tensor of factors, that of Phi 3 as two, and the other kinds as keys.
transformers' own loader drops all of them, and the model then runs with other angles. Here each becomes the parameters
that give the same frequencies, which `check_frequencies` verifies; what has no equal is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from amq.errors import AmqError

FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = (FREQUENCIES, SHORT, LONG)
THETA = 10000.0
"""llama.cpp's base frequency where the file has none."""
TOLERANCE = 1e-5
"""Of a frequency, relative; the factors are float32."""
LLAMA3 = (8192.0, 1.0, 4.0)
"""(original positions, low, high frequency factor) of all models that Meta published."""
BETA_FAST, BETA_SLOW = 32.0, 1.0
ENDLESS = 1e30
"""The factor of a frequency that turns nothing, as in Gemma 4's files."""


@dataclass(frozen=True)
class Rope:
    """What a file says. dims: of a head that turn. factors: {tensor name: float64 [dims / 2]} that divide frequencies.

    kind: none, linear, yarn or longrope. original: positions that the model was trained with, 0 where unknown.
    log_multiplier: of yarn's attention factor in Mistral 3, 0 for none.
    """

    theta: float
    head_dim: int
    dims: int
    kind: str
    factor: float
    original: int
    context: int
    attention: float | None
    betas: tuple[float, float]
    factors: Mapping[str, np.ndarray]
    log_multiplier: float = 0.0

    @property
    def plain(self) -> np.ndarray:
        """float64 [dims / 2]: frequencies without scaling."""
        return self.theta ** (-np.arange(0, self.dims, 2) / self.dims)


def read_rope(take: Callable[..., Any], head_dim: int, context: int, factors: Mapping[str, np.ndarray]) -> Rope:
    """take(key, default): a number or text of the file, below its architecture; raises AmqError for another type."""
    kind = take("rope.scaling.type", "", str)
    factor = take("rope.scaling.factor", 0.0) or take("rope.scale_linear", 0.0) or 1.0
    if SHORT in factors or LONG in factors:
        kind = "longrope"
    elif not kind or kind == "none":
        kind = "linear" if factor != 1 and not kind else "none"
    elif kind == "linear" and factor == 1:
        kind = "none"
    dims = take("rope.dimension_count", head_dim, int)
    if not 2 <= dims <= head_dim or dims % 2:
        raise AmqError(f"rope.dimension_count is {dims}, expected an even number up to the head's {head_dim}")
    attention = take("rope.scaling.attn_factor", 0.0) or take("rope.scaling.yarn_attn_factor", 0.0) or None
    betas = take("rope.scaling.yarn_beta_fast", BETA_FAST), take("rope.scaling.yarn_beta_slow", BETA_SLOW)
    if take("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise AmqError("rope.scaling.yarn_ext_factor is set, which transformers cannot compute")
    return Rope(
        take("rope.freq_base", THETA), head_dim, dims, kind, factor,
        take("rope.scaling.original_context_length", 0, int), context, attention, betas, factors,
        take("rope.scaling.yarn_log_multiplier", 0.0),
    )  # fmt: skip


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """For transformers. Raises AmqError naming what it cannot compute."""
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.dims != rope.head_dim:
        base["partial_rotary_factor"] = rope.dims / rope.head_dim
    for name, factors in rope.factors.items():
        if factors.shape != (rope.dims // 2,) or not (np.isfinite(factors).all() and (factors > 0).all()):
            raise AmqError(f"tensor {name} must hold {rope.dims // 2} positive numbers, one per rotary frequency")
    if FREQUENCIES in rope.factors:
        if rope.kind != "none":
            raise AmqError(f"tensor {FREQUENCIES} and rope.scaling.type {rope.kind} together have no equal here")
        return base | _from_factors(rope, rope.factors[FREQUENCIES])
    if rope.kind == "none":
        return base
    if rope.kind == "linear":
        return base | {"rope_type": "linear", "factor": rope.factor}
    if rope.kind == "yarn":
        return base | _yarn(rope)
    if rope.kind == "longrope":
        return base | _longrope(rope)
    raise AmqError(f"rope.scaling.type {rope.kind!r} is not known: expected none, linear, yarn or longrope")


def _yarn(rope: Rope) -> dict[str, Any]:
    values = {
        "rope_type": "yarn",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original or rope.context,
        "beta_fast": rope.betas[0],
        "beta_slow": rope.betas[1],
    }
    if rope.log_multiplier:
        if rope.attention not in (None, 1.0):
            raise AmqError("rope.scaling.yarn_log_multiplier and an attention factor together have no equal here")
        return values | {"mscale": 1.0, "mscale_all_dim": rope.log_multiplier}
    if rope.attention is not None:  # llama.cpp multiplies its own by it
        values["attention_factor"] = rope.attention * (1 + 0.1 * math.log(rope.factor) if rope.factor > 1 else 1)
    return values


def _longrope(rope: Rope) -> dict[str, Any]:
    if not (SHORT in rope.factors and LONG in rope.factors):
        raise AmqError(f"rotary scaling of the kind longrope needs the tensors {SHORT} and {LONG}")
    original = rope.original or rope.context
    scale = rope.context / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return {
        "rope_type": "longrope",
        "short_factor": _numbers(rope.factors[SHORT]),
        "long_factor": _numbers(rope.factors[LONG]),
        "original_max_position_embeddings": original,
        "attention_factor": usual if rope.attention is None else rope.attention,
    }


def _numbers(factors: np.ndarray) -> list[float]:
    """Without the digits that float32 does not have."""
    return [float(str(np.float32(f))) for f in factors]


def _from_factors(rope: Rope, factors: np.ndarray) -> dict[str, Any]:
    """llama3 where the factors are of that kind, else longrope, which takes any factors."""
    if np.allclose(factors, 1, rtol=TOLERANCE):
        return {}
    turned = int((factors == 1).sum())
    if (factors[:turned] == 1).all() and (factors[turned:] >= ENDLESS / 2).all():
        return {"rope_type": "proportional", "partial_rotary_factor": turned / len(factors)}
    if np.allclose(factors, factors[0], rtol=TOLERANCE):
        return {"rope_type": "linear", "factor": float(factors[0])}
    scaling = float(str(np.float32(factors.max())))
    for original, low, high in (LLAMA3, *_fitted(rope, factors, scaling)):
        if np.allclose(llama3_factors(rope.plain, scaling, low, high, original), factors, rtol=TOLERANCE / 4):
            return {
                "rope_type": "llama3", "factor": scaling, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            }  # fmt: skip
    every = _numbers(factors)
    return {
        "rope_type": "longrope", "short_factor": every, "long_factor": every, "attention_factor": 1.0,
        "original_max_position_embeddings": rope.original or rope.context,
    }  # fmt: skip


def llama3_factors(plain: np.ndarray, scaling: float, low: float, high: float, original: float) -> np.ndarray:
    """float64: what Llama 3 divides the frequencies `plain` by."""
    turns = original * plain / (2 * np.pi)
    kept = ((turns - low) / (high - low)).clip(0, 1)
    return 1 / ((1 - kept) / scaling + kept)


def _fitted(rope: Rope, factors: np.ndarray, scaling: float) -> list[tuple[float, float, float]]:
    """Candidates for (original, low, high). Between both ends 1 / factor grows linearly with the frequency; the line
    has two parameters, so that one of the three is free: low is 1, as it is in every published model."""
    kept = (1 / factors - 1 / scaling) / (1 - 1 / scaling)
    between = (kept > 1e-4) & (kept < 1 - 1e-4)
    if between.sum() < 2 or scaling <= 1:
        return []
    slope, offset = np.polyfit(rope.plain[between] / (2 * np.pi), kept[between], 1)
    if slope <= 0 or offset >= 0:
        return []
    original, high = -slope / offset, 1 - 1 / offset
    return [(float(round(original)), 1.0, float(round(high, 3))), (float(round(original)), 1.0, float(high))]


def expected_frequencies(rope: Rope) -> np.ndarray | None:
    """float64 [dims / 2]: frequencies of a short text as the file says them, by its own numbers; None for yarn."""
    if rope.kind == "yarn":
        return None
    factors = rope.factors.get(FREQUENCIES, rope.factors.get(SHORT, np.ones(rope.dims // 2)))
    frequencies = np.where(factors >= ENDLESS / 2, 0.0, rope.plain / factors)
    return frequencies / (rope.factor if rope.kind == "linear" else 1.0)


def check_frequencies(found: np.ndarray, rope: Rope, where: str) -> None:
    """Raises AmqError unless the model's own table `found` is what the file says."""
    expected = expected_frequencies(rope)
    if expected is None:
        return
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=TOLERANCE, atol=0):
        raise AmqError(f"{where}: transformers computes other rotary frequencies than the file says")
