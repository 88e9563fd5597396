"""Mixtures of experts: the parts that their families are made of, and the families that are a Llama with experts.

A router scores experts by a product with the row; the weights of those it chooses are parts of a softmax over all of
them, or sigmoids. A softmax over the chosen scores alone (gpt-oss, Granite) is the softmax over all, normalized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from amq.errors import AmqError
from amq.runtime.decoder_spec import CLAMPED_SWIGLU, Array, DecoderSpec, Linear, Mixture, Mlp, Router, Step
from amq.runtime.families.base import (
    LARGEST,
    Origin,
    TextConfig,
    Unsupported,
    attention,
    check_experts,
    decoder,
    head_norms,
    mlp,
    norm,
    rope,
    windows,
)  # fmt: skip
from amq.util.records import check_range

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of the number of experts: transformers reads one for another, and writes whichever it is that day."""
SWIGLU_ALPHA = 1.702
"""Of decoder.h's clamped_swiglu."""


@dataclass(frozen=True)
class MixtureConfig(TextConfig):
    """What mixtures say besides.

    moe_intermediate_size: features of one expert, where intermediate_size is that of dense layers.
    """

    num_experts: int | None = None
    num_local_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool | None = None
    decoder_sparse_step: int | None = None
    mlp_only_layers: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, *COUNTS, "num_experts_per_tok", least=0)  # dense models of the same families say 0
        check_range(self, "moe_intermediate_size", "decoder_sparse_step")
        check_experts(self.num_hidden_layers, max(getattr(self, key) or 0 for key in COUNTS))

    @property
    def experts(self) -> int:
        count = next((value for key in COUNTS if (value := getattr(self, key)) is not None), None)
        if count is None:
            raise Unsupported(f"config.json does not say any of {', '.join(COUNTS)}")
        return count

    def routed(self, layer: int) -> bool:
        """Whether the layer has experts (Qwen)."""
        every = self.decoder_sparse_step or 1
        return layer not in (self.mlp_only_layers or ()) and self.experts > 0 and (layer + 1) % every == 0


def softmax_mixture(origin: Origin, config: TextConfig, block: str, *, prefix: str = "mlp", top_k: int, experts: int,
                    wide: int, normalized: bool, shared_wide: int = 0, shared_gate: str = "",
                    shared: str = "shared_expert", router: str = "gate", bias: bool = False,
                    limit: float | None = None) -> Mixture:  # fmt: skip
    """The mixture `block`.`prefix`, whose experts are chosen and weighted by a softmax of their scores.

    wide: features of an expert. normalized: the weights of those chosen are made to sum to 1. shared_wide: features of
    the shared expert `shared`, 0: none; shared_gate: the linear that it is gated by, "": none. router: the linear that
    scores. bias: of router and experts. limit: of gpt-oss' activation, None: the model's own.
    Raises AmqError where the numbers contradict each other.
    """
    linear = _router(origin, config, f"{block}.{prefix}.{router}", experts, bias)
    _check_top_k(origin, top_k, experts)
    return _mixture(
        origin, config, f"{block}.{prefix}", Router(linear, top_k, normalized=normalized), wide, shared_wide, shared,
        shared_gate, bias, limit,
    )  # fmt: skip


def sigmoid_mixture(origin: Origin, config: TextConfig, block: str, *, prefix: str = "mlp", top_k: int, experts: int,
                    wide: int, normalized: bool, correction: str = "", groups: int = 1, top_groups: int = 1,
                    scale: float = 1.0, epsilon: float = 0.0, shared_wide: int = 0, shared_gate: str = "",
                    shared: str = "shared_expert", router: str = "gate") -> Mixture:  # fmt: skip
    """Like `softmax_mixture`, by sigmoids of scores.

    correction: the tensor in `block`.`prefix` that is added to them for the choice alone, "": none. groups, top_groups:
    of neighbouring experts, and how many of these are chosen from. scale: of weights; epsilon: added to their sum
    where they are normalized.
    """
    path = f"{block}.{prefix}"
    linear = _router(origin, config, f"{path}.{router}", experts, False)
    _check_groups(origin, experts, groups, top_groups)
    _check_top_k(origin, top_k, experts // groups * top_groups)
    added = Array(f"{path}.{correction}", (experts,)) if correction else None
    chosen = Router(
        linear, top_k, "sigmoid", normalized, correction=added, epsilon=epsilon, scale=scale, groups=groups,
        top_groups=top_groups,
    )  # fmt: skip
    return _mixture(origin, config, path, chosen, wide, shared_wide, shared, shared_gate)


def _router(origin: Origin, config: TextConfig, name: str, experts: int, bias: bool) -> Linear:
    if experts < 1:
        raise AmqError(f"{origin.file}: the layer of {name} has {experts} experts, expected at least 1")
    return Linear(name, experts, config.hidden_size, bias)


def _check_top_k(origin: Origin, top_k: int, most: int) -> None:
    if not 1 <= top_k <= most:
        raise AmqError(
            f"{origin.file}: a token is routed to {top_k} experts, expected 1 to {most}, which can be chosen; the file "
            "is damaged or was edited"
        )


def _check_groups(origin: Origin, experts: int, groups: int, top_groups: int) -> None:
    # A group is judged by its two best experts.
    if groups < 1 or experts % groups or (groups > 1 and experts // groups < 2) or not 1 <= top_groups <= groups:
        raise AmqError(
            f"{origin.file}: {top_groups} of {groups} groups of {experts} experts cannot be chosen; the file is "
            "damaged or was edited"
        )


def _mixture(origin: Origin, config: TextConfig, path: str, router: Router, wide: int, shared_wide: int, shared: str,
             shared_gate: str, bias: bool = False, limit: float | None = None) -> Mixture:  # fmt: skip
    hidden = config.hidden_size
    activation = config.activation if limit is None else CLAMPED_SWIGLU

    def expert(index: int) -> Mlp:
        names = [f"{role}.{index}" for role in ("gate_proj", "up_proj", "down_proj")]
        made = mlp(f"{path}.experts", hidden, wide, activation, bias, names)
        return made if limit is None else replace(made, limit=limit)

    return Mixture(
        router,
        tuple(expert(index) for index in range(router.weight.out_features)),
        mlp(f"{path}.{shared}", hidden, shared_wide, activation) if shared_wide else None,
        Array(f"{path}.{shared_gate}.weight", (1, hidden)) if shared_gate else None,
    )


def qwen3_moe(origin: Origin) -> DecoderSpec:
    config = origin.record(MixtureConfig, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    spans = windows(config, always=True) if config.use_sliding_window else [0] * config.num_hidden_layers
    bias = bool(config.attention_bias)
    return _qwen(origin, config, spans, bias, bias, normed=True)


@dataclass(frozen=True)
class Qwen2MoeConfig(MixtureConfig):
    shared_expert_intermediate_size: int | None = None
    qkv_bias: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "shared_expert_intermediate_size")


def qwen2_moe(origin: Origin) -> DecoderSpec:
    config = origin.record(
        Qwen2MoeConfig, "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
        "norm_topk_prob", "qkv_bias",
    )  # fmt: skip
    shared: dict[str, Any] = {
        "shared_wide": config.shared_expert_intermediate_size,
        "shared_gate": "shared_expert_gate",
    }
    return _qwen(origin, config, windows(config), bool(config.qkv_bias), False, **shared)


def _qwen(origin: Origin, config: MixtureConfig, spans: list[int], bias: bool, output_bias: bool, normed: bool = False,
          **shared: Any) -> DecoderSpec:  # fmt: skip
    """Some layers may be dense. spans: windows of all layers."""
    top_k, wide, normalized = config.num_experts_per_tok or 0, config.moe_intermediate_size or 0, config.norm_topk_prob

    def feed_forward(layer: int, block: str) -> Mixture | Mlp:
        if not config.routed(layer):
            return _dense(config, block)
        return softmax_mixture(
            origin, config, block, top_k=top_k, experts=config.experts, wide=wide, normalized=bool(normalized), **shared
        )

    def fields(_: int, own: str) -> dict[str, Any]:
        return head_norms(own, config.features) if normed else {}

    return _model(origin, config, spans, feed_forward, fields, bias, output_bias)


def _dense(config: MixtureConfig, block: str) -> Mlp:
    if config.intermediate_size is None:
        raise Unsupported("config.json does not say intermediate_size")
    return mlp(f"{block}.mlp", config.hidden_size, config.intermediate_size, config.activation)


def mixtral(origin: Origin) -> DecoderSpec:
    config = origin.record(MixtureConfig, "num_experts_per_tok", "intermediate_size")

    def feed_forward(_: int, block: str) -> Mixture:
        return softmax_mixture(
            origin, config, block, top_k=config.num_experts_per_tok or 0, experts=config.experts,
            wide=config.intermediate_size or 0, normalized=True,
        )  # fmt: skip

    return _model(origin, config, windows(config, always=True), feed_forward)


@dataclass(frozen=True)
class OlmoeConfig(MixtureConfig):
    clip_qkv: float | None = None


def olmoe(origin: Origin) -> DecoderSpec:
    config = origin.record(OlmoeConfig, "num_experts_per_tok", "intermediate_size", "norm_topk_prob")
    if config.clip_qkv is not None:
        raise Unsupported("the native engine does not clip queries, keys and values (clip_qkv)")
    heads, kv_heads, features = config.num_attention_heads, config.kv_heads, config.features

    def feed_forward(_: int, block: str) -> Mixture:
        return softmax_mixture(
            origin, config, block, top_k=config.num_experts_per_tok or 0, experts=config.experts,
            wide=config.intermediate_size or 0, normalized=bool(config.norm_topk_prob),
        )  # fmt: skip

    def fields(_: int, own: str) -> dict[str, Any]:
        q, k = norm(f"{own}.q_norm", heads * features), norm(f"{own}.k_norm", kv_heads * features)
        return {"q_norm_all": q, "k_norm_all": k}

    bias = bool(config.attention_bias)
    return _model(origin, config, [0] * config.num_hidden_layers, feed_forward, fields, bias, bias)


@dataclass(frozen=True)
class GptOssConfig(MixtureConfig):
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "swiglu_alpha", "swiglu_limit", least=0, most=LARGEST)


def gpt_oss(origin: Origin) -> DecoderSpec:
    config = origin.record(
        GptOssConfig, "num_experts_per_tok", "intermediate_size", "layer_types", "attention_bias", "swiglu_limit"
    )
    if config.swiglu_alpha not in (None, SWIGLU_ALPHA):
        raise Unsupported(f"the native engine has a swiglu_alpha of {SWIGLU_ALPHA}, not {config.swiglu_alpha}")

    def feed_forward(_: int, block: str) -> Mixture:
        return softmax_mixture(
            origin, config, block, top_k=config.num_experts_per_tok or 0, experts=config.experts,
            wide=config.intermediate_size or 0, normalized=True, router="router", bias=True, limit=config.swiglu_limit,
        )  # fmt: skip

    def fields(_: int, own: str) -> dict[str, Any]:
        return {"sinks": Array(f"{own}.sinks", (config.num_attention_heads,))}

    bias = bool(config.attention_bias)
    return _model(origin, config, windows(config), feed_forward, fields, bias, bias)


@dataclass(frozen=True)
class Glm4MoeConfig(MixtureConfig):
    n_shared_experts: int | None = None
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float | None = None
    first_k_dense_replace: int | None = None
    use_qk_norm: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "n_group", "topk_group", "n_shared_experts")
        check_range(self, "first_k_dense_replace", least=0)
        check_range(self, "routed_scaling_factor", least=-LARGEST, most=LARGEST)


def glm4_moe(origin: Origin) -> DecoderSpec:
    config = origin.record(
        Glm4MoeConfig, "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group",
        "routed_scaling_factor", "first_k_dense_replace", "norm_topk_prob",
    )  # fmt: skip
    said = origin.raw.get("rope_parameters")
    if config.partial_rotary_factor is None and not (isinstance(said, Mapping) and "partial_rotary_factor" in said):
        raise Unsupported("config.json does not say partial_rotary_factor")

    def feed_forward(layer: int, block: str) -> Mixture | Mlp:
        if layer < (config.first_k_dense_replace or 0):
            return _dense(config, block)
        wide = config.moe_intermediate_size or 0
        return sigmoid_mixture(
            origin, config, block, top_k=config.num_experts_per_tok or 0, experts=config.experts, wide=wide,
            normalized=bool(config.norm_topk_prob), correction="gate.e_score_correction_bias",
            groups=config.n_group or 1, top_groups=config.topk_group or 1,
            scale=1.0 if config.routed_scaling_factor is None else config.routed_scaling_factor, epsilon=1e-20,
            shared_wide=wide * (config.n_shared_experts or 0), shared="shared_experts",
        )  # fmt: skip

    def fields(_: int, own: str) -> dict[str, Any]:
        return head_norms(own, config.features) if config.use_qk_norm else {}

    return _model(
        origin, config, [0] * config.num_hidden_layers, feed_forward, fields, bool(config.attention_bias), partial=True
    )


def _model(origin: Origin, config: TextConfig, spans: list[int], feed_forward: Callable[[int, str], Mixture | Mlp],
           fields: Callable[[int, str], dict[str, Any]] = lambda *_: {}, bias: bool = False,
           output_bias: bool = False, partial: bool = False) -> DecoderSpec:  # fmt: skip
    """A Llama but for what a layer has in the place of its MLP.

    spans: windows of all layers. feed_forward: of (layer, name of the block). fields: more of Attention, of (layer,
    name of the attention). partial: of `rope`.
    """
    hidden, steps = config.hidden_size, []
    for layer, window in enumerate(spans):
        block = origin.block(layer)
        own = f"{block}.self_attn"
        attend = attention(own, config, bias, output_bias, window=window, **fields(layer, own))
        steps += [
            Step(attend, norm(f"{block}.input_layernorm", hidden)),
            Step(feed_forward(layer, block), norm(f"{block}.post_attention_layernorm", hidden)),
        ]
    return decoder(origin, config, steps, [rope(origin, config, partial=partial)])
