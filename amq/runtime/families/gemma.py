"""Gemma 1 to 3: scaled embeddings and norms by 1 + weight; from Gemma 2 on norms behind operators, too, and windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amq.model.shape import FULL, SLIDING
from amq.runtime.decoder_spec import Array, DecoderSpec, Operator, Rope, Step, plus_one
from amq.runtime.families.base import (
    LARGEST,
    Origin,
    TextConfig,
    Unsupported,
    attention,
    decoder,
    known_activation,
    mlp,
    rope,
    windows,
)  # fmt: skip
from amq.util.records import check_range

NEEDED = ("hidden_activation", "query_pre_attn_scalar", "layer_types")
"""From Gemma 2 on."""


@dataclass(frozen=True)
class GemmaConfig(TextConfig):
    hidden_activation: str | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self, "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", least=1e-6, most=LARGEST
        )

    @property
    def activation(self) -> str:
        return known_activation(self.hidden_activation or "")


@dataclass(frozen=True)
class _FirstConfig(GemmaConfig):
    @property
    def activation(self) -> str:
        """Of the first Gemma, whose files say `gelu` and mean this one, as transformers does."""
        return known_activation("gelu_pytorch_tanh" if self.hidden_act == "gelu" else self.hidden_act or "")


def gemma(origin: Origin) -> DecoderSpec:
    config = _record(origin, _FirstConfig, "hidden_act")
    hidden, bias, steps = config.hidden_size, bool(config.attention_bias), []
    for layer in range(config.num_hidden_layers):
        block = origin.block(layer)
        steps += [
            Step(attention(f"{block}.self_attn", config, bias, bias), one_more(f"{block}.input_layernorm", hidden)),
            Step(
                mlp(f"{block}.mlp", hidden, config.intermediate_size or 0, config.activation),
                one_more(f"{block}.post_attention_layernorm", hidden),
            ),
        ]
    return _decoder(origin, config, steps, [rope(origin, config)], softcap=None)


def gemma2(origin: Origin) -> DecoderSpec:
    config = _record(origin, GemmaConfig, *NEEDED)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):  # null is said, too
        if key not in origin.raw:
            raise Unsupported(f"config.json does not say {key}")
    steps = _steps(origin, config, {FULL: 0, SLIDING: 0}, config.attn_logit_softcapping or 0.0, normed=False)
    return _decoder(origin, config, steps, [rope(origin, config)], config.final_logit_softcapping)


def gemma3(origin: Origin) -> DecoderSpec:
    """Its `attn_logit_softcapping` is not used by transformers, and not here."""
    config = _record(origin, GemmaConfig, *NEEDED)
    if config.final_logit_softcapping is not None and origin.inside:
        raise Unsupported("config.json says final_logit_softcapping of a Gemma 3 with images, which does not have it")
    kinds = sorted(set(config.layer_types or ()))
    ropes = [rope(origin, config, layers=kind) for kind in kinds]
    steps = _steps(origin, config, {kind: index for index, kind in enumerate(kinds)}, 0.0, normed=True)
    return _decoder(origin, config, steps, ropes, config.final_logit_softcapping)


def one_more(name: str, count: int) -> Array:
    """Of the norm `name`, which multiplies by 1 + weight."""
    return plus_one(f"{name}.weight", count)


def sandwich(block: str, hidden: int, attention: Operator, feedforward: Operator,
             norm: Callable[[str, int], Array]) -> list[Step]:  # fmt: skip
    """The steps of a layer with norms before and behind its operators, made by `norm` of a name and `hidden`."""
    return [
        Step(attention, norm(f"{block}.input_layernorm", hidden), norm(f"{block}.post_attention_layernorm", hidden)),
        Step(
            feedforward,
            norm(f"{block}.pre_feedforward_layernorm", hidden),
            norm(f"{block}.post_feedforward_layernorm", hidden),
        ),
    ]


def _record(origin: Origin, kind: type[GemmaConfig], *needed: str) -> GemmaConfig:
    config = origin.record(kind, "intermediate_size", "head_dim", *needed)
    if config.use_bidirectional_attention:
        raise Unsupported("config.json says use_bidirectional_attention, which the native engine has not")
    return config


def _steps(origin: Origin, config: GemmaConfig, ropes: Mapping[str, int], softcap: float, normed: bool) -> list[Step]:
    """ropes: {kind of layer: number of its rotary embedding}. normed: queries and keys are, per head."""
    features, bias, steps = config.features, bool(config.attention_bias), []
    for layer, (kind, window) in enumerate(zip(config.layer_types or (), windows(config), strict=True)):
        block = origin.block(layer)
        own = f"{block}.self_attn"
        names = ("q_norm", "k_norm") if normed else ()
        norms: dict[str, Any] = {name: one_more(f"{own}.{name}", features) for name in names}
        op = attention(own, config, bias, bias, ropes[kind], window=window, softcap=softcap,
                       scale=(config.query_pre_attn_scalar or 1) ** -0.5, **norms)  # fmt: skip
        feedforward = mlp(f"{block}.mlp", config.hidden_size, config.intermediate_size or 0, config.activation)
        steps += sandwich(block, config.hidden_size, op, feedforward, one_more)
    return steps


def _decoder(origin: Origin, config: GemmaConfig, steps: Sequence[Step], ropes: Sequence[Rope],
             softcap: float | None) -> DecoderSpec:  # fmt: skip
    """softcap: of logits."""
    return decoder(origin, config, steps, ropes, final_norm=one_more(f"{origin.root}norm", config.hidden_size),
                   embedding_scale=config.hidden_size**0.5,
                   logit_softcap=softcap or 0.0)  # fmt: skip
