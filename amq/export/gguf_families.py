"""What llama.cpp makes of each family of models, as data: its name there, its fixed choices, names, changed tensors.

llama.cpp builds a model from its architecture's name and a few keys; everything else is fixed in its code. So a family
is listed with what is `fixed` there: a model whose config says otherwise would be computed as another model, silently,
and is refused. tests/test_export_gguf_families.py exports each; all of them ran in llama.cpp beside transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from amq.errors import AmqError
from amq.export.gguf_rope import rope_of
from amq.model.experts import COUNTS, TOP_K
from amq.model.shape import ModelShape, head_dim, kv_heads, need, said, size

Config = Mapping[str, Any]
Keys = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Change:
    """A tensor that llama.cpp has in another form.

    name: a regular expression, searched for in its name. make: of what the checkpoint has; None keeps the tensor.
    rename: (what, by what) in the name before it is looked up, "" for none.
    """

    name: str
    make: Callable[[Tensor], Tensor] | None = None
    rename: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    arch: llama.cpp's name. turned: whether it wants the rows of q and k in its own order.
    activation: the one in its code. fixed: {key of config.json: values that its code computes; None where unsaid}.
    keys: those below the architecture's name that it needs besides the common ones.
    check: raises AmqError for what `fixed` cannot say. windows: whether it knows sliding windows; else the context ends
    with them. ropes: kinds of rotary scaling that were compared.
    """

    arch: str
    turned: bool = False
    activation: str = "silu"
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    keys: Callable[[Config], Keys] = lambda config: {}
    check: Callable[[Config], None] = lambda config: None
    changes: tuple[Change, ...] = ()
    windows: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "yarn")


def find_family(config: Config) -> Family:
    """Of a model that llama.cpp computes as transformers does; raises AmqError for any other."""
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        reason = f": {REFUSED[str(kind)]}" if str(kind) in REFUSED else ""
        raise AmqError(f"the gguf export knows the model types {', '.join(FAMILIES)}; this model is {kind!r}{reason}")
    if (rope := rope_of(config).kind) not in family.ropes:
        raise AmqError(f"the gguf export cannot write rotary positions of type {rope!r} for {kind}")
    if (activation := said(config, *ACTIVATIONS) or family.activation) != family.activation:
        raise AmqError(f"llama.cpp computes {kind} with the activation {family.activation}; this model has {activation!r}")
    for key, values in family.fixed.items():
        if (value := config.get(key)) not in values:
            expected = " or ".join(map(repr, values))
            raise AmqError(f"llama.cpp computes {kind} with {key} {expected}; this model has {value!r}")
    family.check(config)
    return family


ACTIVATIONS = ("hidden_act", "hidden_activation", "mlp_hidden_act")


def experts(config: Config, width: str = "moe_intermediate_size") -> Keys:
    return {
        "expert_count": need(config, *COUNTS),
        "expert_used_count": need(config, *TOP_K),
        "expert_feed_forward_length": need(config, width),
    }


def _mixtral(config: Config) -> Keys:
    return experts(config, "intermediate_size") if size(config, *COUNTS) else {}


def _all_heads(config: Config) -> None:
    if kv_heads(config) != config["num_attention_heads"]:
        raise AmqError("llama.cpp's olmoe has as many heads of keys as of queries; this model has fewer")


def _qwen2_moe(config: Config) -> Keys:
    return experts(config) | {"expert_shared_feed_forward_length": need(config, "shared_expert_intermediate_size")}


def _all_sparse(config: Config) -> None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise AmqError(f"llama.cpp has experts in every layer of a {config['model_type']}; this model has not")


def _window(config: Config) -> Keys:
    found = ModelShape.of(config).window
    return {"attention.sliding_window": found} if found else {}


def _gpt_oss(config: Config) -> Keys:
    return experts(config, "intermediate_size") | _window(config)


def period_of(config: Config) -> int:
    """Every so many layers look back on all tokens; 0 where layers do not alternate like that."""
    kinds = [layer.kind for layer in ModelShape.of(config).layers]
    period = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    even = [FULL if (i + 1) % period == 0 else SLIDING for i in range(len(kinds))]
    return period if kinds == even else 0


def _alternates(config: Config) -> None:
    if period_of(config) != 2:
        raise AmqError(f"in llama.cpp every second layer of a {config['model_type']} has a window; not so in this model")


WIDE_GEMMAS = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models whose attention llama.cpp scales by the hidden width per head; else by the head's own."""


def _gemma_scale(config: Config) -> None:
    wide = need(config, "num_hidden_layers") == WIDE_GEMMAS[config["model_type"]]
    hidden, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    expected = hidden // heads if wide else head_dim(config)
    if (scalar := config.get("query_pre_attn_scalar")) != expected:
        raise AmqError(f"llama.cpp has query_pre_attn_scalar {expected} for this size of gemma; this model {scalar!r}")


def _gemma2_check(config: Config) -> None:
    _alternates(config)
    _gemma_scale(config)


def _gemma2(config: Config) -> Keys:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return _window(config) | {name: float(config.get(name) or 0.0) for name in caps}


def _gemma3_check(config: Config) -> None:
    _gemma_scale(config)
    if not period_of(config):
        raise AmqError("in llama.cpp every so many layers of a gemma3 look back on all tokens; not so in this model")
    sliding = ModelShape.of(config).rotary.get(SLIDING)
    if sliding is not None and sliding.kind != "default":
        raise AmqError(f"llama.cpp cannot scale rotary positions in a window; this model does by {sliding.kind!r}")


def _gemma3(config: Config) -> Keys:
    sliding = ModelShape.of(config).rotary.get(SLIDING)
    theta = {"rope.freq_base_swa": float(sliding.theta)} if sliding is not None and sliding.theta else {}
    return _window(config) | theta | {"attention.sliding_window_pattern": period_of(config)}


def _no_rope(config: Config) -> None:
    turned = list(config.get("no_rope_layers") or ())
    if turned != [int((i + 1) % 4 != 0) for i in range(need(config, "num_hidden_layers"))]:
        raise AmqError("in llama.cpp every fourth layer of a smollm3 is without positions; this model has others")


def _granite(config: Config) -> Keys:
    return {
        "attention.scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
    }


def _granite_moe(config: Config) -> Keys:
    return _granite(config) | experts(config, "intermediate_size")


def _shared(config: Config) -> Keys:
    """Of the experts of DeepSeek's kind: dense layers first, shared ones beside, gates by sigmoid."""
    return experts(config) | {
        "leading_dense_block_count": int(config.get("first_k_dense_replace") or 0),
        "expert_shared_count": need(config, "n_shared_experts"),
        "expert_weights_scale": float(config.get("routed_scaling_factor") or 1.0),
        "expert_weights_norm": bool(config.get("norm_topk_prob")),
        "expert_gating_func": SIGMOID,
    }


SIGMOID = 2
"""Of llama.cpp's gating functions."""


def _lfm2(config: Config) -> Keys:
    kinds = [layer.kind for layer in ModelShape.of(config).layers]
    heads = kv_heads(config)
    return {
        "shortconv.l_cache": need(config, "conv_L_cache"),
        "attention.head_count_kv": [heads if kind == FULL else 0 for kind in kinds],
        "feed_forward_length": _lfm2_width(config),
    }


def _lfm2_width(config: Config) -> int:
    """As transformers works it out."""
    width = size(config, "block_ff_dim") or need(config, "intermediate_size")
    if config.get("block_auto_adjust_ff_dim"):
        width = int(2 * width / 3)
        if multiplier := config.get("block_ffn_dim_multiplier"):
            width = int(multiplier * width)
        multiple = need(config, "block_multiple_of")
        width = multiple * -(-width // multiple)
    return width


def _plus_one(weight: Tensor) -> Tensor:
    return weight.float() + 1


def _flat_kernel(weight: Tensor) -> Tensor:
    """A depthwise convolution's [channels, 1, width]."""
    return weight.squeeze(1)


def _vector(weight: Tensor) -> Tensor:
    return weight.reshape(-1)


MOE_NAMES = Change(r"\.block_sparse_moe\.", rename=("block_sparse_moe", "mlp"))
ROUTER = Change(r"\.mlp\.router\.weight|\.block_sparse_moe\.router\.weight", rename=("router", "gate"))
SCORES = Change(r"e_score_correction_bias$", rename=("e_score_correction_bias", "e_score_correction.bias"))
SINKS = Change(r"\.sinks$", rename=("sinks", "sinks.weight"))
SHARED_GATE = Change(r"\.shared_expert_gate\.weight$", _vector)
GEMMA_NORMS = Change(r"norm\.weight$", _plus_one)
LLAMA = Family("llama", turned=True, ropes=("default", "linear", "llama3", "yarn"), keys=_mixtral)
ONE_GROUP = {"n_group": (1, None), "topk_group": (1, None)}
GELU = "gelu_pytorch_tanh"

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2_moe": Family("qwen2moe", fixed={"norm_topk_prob": (False,)}, keys=_qwen2_moe, check=_all_sparse,
                        changes=(SHARED_GATE,)),
    "qwen3_moe": Family("qwen3moe", fixed={"norm_topk_prob": (True,)}, keys=experts, check=_all_sparse),
    "olmoe": Family("olmoe", fixed={"norm_topk_prob": (False,), "clip_qkv": (None,)},
                    keys=_mixtral, check=_all_heads),
    "gpt_oss": Family("gpt-oss", keys=_gpt_oss, check=_alternates, windows=True, changes=(SINKS,)),
    "gemma2": Family("gemma2", activation=GELU, keys=_gemma2, check=_gemma2_check, changes=(GEMMA_NORMS,),
                     windows=True, ropes=("default", "linear")),
    "gemma3_text": Family("gemma3", activation=GELU, keys=_gemma3, check=_gemma3_check, changes=(GEMMA_NORMS,),
                          fixed={"final_logit_softcapping": (None,), "attn_logit_softcapping": (None,)},
                          windows=True, ropes=("default", "linear")),
    "phi3": Family("phi3", ropes=("default", "longrope")),
    "smollm3": Family("smollm3", turned=True, check=_no_rope),
    "olmo2": Family("olmo2"),
    "granite": Family("granite", turned=True, keys=_granite),
    "granitemoe": Family("granitemoe", turned=True, keys=_granite_moe, changes=(ROUTER, MOE_NAMES)),
    "glm4_moe": Family("glm4moe", keys=_shared, fixed=ONE_GROUP, changes=(SCORES,)),
    "lfm2": Family("lfm2", keys=_lfm2, changes=(Change(r"\.conv\.conv\.weight$", _flat_kernel),)),
}  # fmt: skip
"""{model_type: family}."""

REFUSED: dict[str, str] = {
    "gemma3": "with its vision tower; the text model alone, gemma3_text, can be exported",
    "qwen3_5_text": "llama.cpp wants the heads of its linear attention in another order, columns included",
}
"""{model_type: why it is not in `FAMILIES`}."""
