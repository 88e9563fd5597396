"""Keys that a GGUF file of a single family needs, made of its config, and checks of what llama.cpp has fixed."""

from __future__ import annotations

from typing import Any

from amq.errors import AmqError
from amq.model.experts import COUNTS, TOP_K
from amq.model.gguf.orders import BLOCK, Config
from amq.model.gguf.rope import THETA
from amq.model.shape import FULL, SLIDING, ModelShape, head_dim, kv_heads, need, said, size

Keys = dict[str, Any]
LINEAR = "linear_attention"


def n_layers(config: Config) -> int:
    return size(config, "num_hidden_layers") or len(ModelShape.of(config).layers)


def experts(config: Config, width: str = "moe_intermediate_size") -> Keys:
    return {
        "expert_count": need(config, *COUNTS),
        "expert_used_count": need(config, *TOP_K),
        "expert_feed_forward_length": need(config, width),
    }


def mixtral(config: Config) -> Keys:
    return experts(config, "intermediate_size") if size(config, *COUNTS) else {}


def all_heads(config: Config) -> None:
    if kv_heads(config) != config["num_attention_heads"]:
        raise AmqError("llama.cpp's olmoe has as many heads of keys as of queries; this model has fewer")


def qwen2_moe(config: Config) -> Keys:
    return experts(config) | {"expert_shared_feed_forward_length": need(config, "shared_expert_intermediate_size")}


def all_sparse(config: Config) -> None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise AmqError(f"llama.cpp has experts in every layer of a {config['model_type']}; this model has not")


def window(config: Config) -> Keys:
    found = ModelShape.of(config).window
    return {"attention.sliding_window": found} if found else {}


def gpt_oss(config: Config) -> Keys:
    return experts(config, "intermediate_size") | window(config)


def kinds_of(config: Config) -> list[str]:
    """Of all layers."""
    return [layer.kind for layer in ModelShape.of(config).layers]


def kv_heads_by_layer(config: Config) -> list[int | None]:
    return [kv_heads(config) if kind == FULL else 0 for kind in kinds_of(config)]


def period_of(config: Config, others: str = SLIDING) -> int:
    """Every so many layers look back on all tokens; 0 where they do not alternate like that with `others`."""
    kinds = kinds_of(config)
    period = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    even = [FULL if (i + 1) % period == 0 else others for i in range(len(kinds))]
    return period if kinds == even else 0


def alternates(config: Config) -> None:
    if period_of(config) != 2:
        raise AmqError(
            f"in llama.cpp every second layer of a {config['model_type']} has a window; not so in this model"
        )


WIDE_GEMMAS = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models whose attention llama.cpp scales by the hidden width per head; else by the head's own."""


def gemma_scale(config: Config) -> None:
    wide = need(config, "num_hidden_layers") == WIDE_GEMMAS[config["model_type"]]
    hidden, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    expected = hidden // heads if wide else head_dim(config)
    if (scalar := config.get("query_pre_attn_scalar")) != expected:
        raise AmqError(f"llama.cpp has query_pre_attn_scalar {expected} for this size of gemma; this model {scalar!r}")


def gemma2_check(config: Config) -> None:
    alternates(config)
    gemma_scale(config)


def gemma2(config: Config) -> Keys:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return window(config) | {name: float(config.get(name) or 0.0) for name in caps}


def gemma3_check(config: Config) -> None:
    gemma_scale(config)
    if not period_of(config):
        raise AmqError("in llama.cpp every so many layers of a gemma3 look back on all tokens; not so in this model")
    sliding = ModelShape.of(config).rotary.get(SLIDING)
    if sliding is not None and sliding.kind != "default":
        raise AmqError(f"llama.cpp cannot scale rotary positions in a window; this model does by {sliding.kind!r}")


def gemma3(config: Config) -> Keys:
    sliding = ModelShape.of(config).rotary.get(SLIDING)
    theta = {"rope.freq_base_swa": float(sliding.theta)} if sliding is not None and sliding.theta else {}
    return window(config) | theta | {"attention.sliding_window_pattern": period_of(config)}


def gemma4_check(config: Config) -> None:
    shape, kinds = ModelShape.of(config), list(config["layer_types"])
    sliding, full = shape.rotary.get(SLIDING), shape.rotary.get(FULL)
    if (
        sliding is None
        or sliding.kind != "default"
        or said(sliding.parameters, "partial_rotary_factor") not in (None, 1)
    ):
        raise AmqError("llama.cpp turns whole heads in a gemma4's windows, unscaled; this model does not")
    if full is not None and said(full.parameters, "factor") not in (None, 1):
        raise AmqError("GGUF cannot hold a gemma4 whose proportional rotary positions have a factor")
    own = len(kinds) - (size(config, "num_kv_shared_layers") or 0)
    if own < len(kinds) and kinds[max(own - 2, 0) : own] != [SLIDING, FULL]:
        raise AmqError(
            "llama.cpp's gemma4 takes shared keys and values from the last two layers that have some, one with a "
            "window and then one without; this model has others there"
        )
    per_layer, vocabulary = size(config, "vocab_size_per_layer_input"), need(config, "vocab_size")
    if size(config, "hidden_size_per_layer_input") and per_layer != vocabulary:
        raise AmqError(
            f"llama.cpp's gemma4 has a per-layer embedding of every token; this model of {per_layer} of {vocabulary}"
        )


def gemma4(config: Config) -> Keys:
    """Without its key, llama.cpp caps logits at `SOFTCAP`."""
    shape, kinds = ModelShape.of(config), list(config["layer_types"])
    shared = size(config, "num_kv_shared_layers") or 0
    layers = {kind: shape.layers[kinds.index(kind)] for kind in set(kinds)}
    window = layers.get(SLIDING, shape.layers[0])
    whole = layers.get(FULL, shape.layers[0])
    found = {
        "attention.key_length": whole.head_dim,
        "attention.value_length": whole.head_dim,
        "attention.key_length_swa": window.head_dim,
        "attention.value_length_swa": window.head_dim,
        "attention.head_count_kv": [layers[kind].kv_heads for kind in kinds],
        "attention.sliding_window": need(config, "sliding_window"),
        "attention.sliding_window_pattern": [kind == SLIDING for kind in kinds],
        "attention.shared_kv_layers": shared,
        "rope.dimension_count": whole.head_dim,
        "rope.dimension_count_swa": window.head_dim,
        "rope.freq_base_swa": float(shape.rotary[SLIDING].theta or THETA),
        "embedding_length_per_layer_input": size(config, "hidden_size_per_layer_input") or 0,
        "final_logit_softcapping": float(config.get("final_logit_softcapping") or 0.0),
    }
    if config.get("use_double_wide_mlp"):
        width, own = need(config, "intermediate_size"), len(kinds) - shared
        found["feed_forward_length"] = [width * (1 if layer < own else 2) for layer in range(len(kinds))]
    return found | (experts(config) if config.get("enable_moe_block") else {})


SOFTCAP = 30.0


def ministral_check(config: Config) -> None:
    rope = ModelShape.of(config).rotary[""].parameters
    if said(rope, "llama_4_scaling_beta") is None or said(rope, "mscale") != 1 or not said(rope, "mscale_all_dim"):
        raise AmqError(
            "llama.cpp's mistral3 needs llama_4_scaling_beta, mscale 1 and mscale_all_dim in rope_parameters"
        )


def ministral(config: Config) -> Keys:
    rope = ModelShape.of(config).rotary[""].parameters
    return {
        "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
        "rope.scaling.yarn_log_multiplier": float(rope["mscale_all_dim"]),
    }


def no_rope(config: Config) -> None:
    turned = list(config.get("no_rope_layers") or ())
    if turned != [int((i + 1) % 4 != 0) for i in range(need(config, "num_hidden_layers"))]:
        raise AmqError("in llama.cpp every fourth layer of a smollm3 is without positions; this model has others")


def granite(config: Config) -> Keys:
    return {
        "attention.scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
    }


def granite_moe(config: Config) -> Keys:
    return granite(config) | experts(config, "intermediate_size")


def shared(config: Config) -> Keys:
    """Of the experts of DeepSeek's kind: dense layers first, shared ones beside, gates by sigmoid."""
    return experts(config) | {
        "leading_dense_block_count": int(config.get("first_k_dense_replace") or 0),
        "expert_shared_count": need(config, "n_shared_experts"),
        "expert_weights_scale": float(config.get("routed_scaling_factor") or 1.0),
        "expert_weights_norm": bool(config.get("norm_topk_prob")),
        "expert_gating_func": SIGMOID,
    }


def ernie_moe(config: Config) -> Keys:
    count = size(config, "moe_num_shared_experts") or 0
    found = experts(config) | {
        "leading_dense_block_count": int(config.get("moe_layer_start_index") or 0),
        "interleave_moe_layer_step": need(config, "moe_layer_interval"),
    }
    if count:
        found |= {"expert_shared_count": count}
        found |= {"expert_shared_feed_forward_length": count * need(config, "moe_intermediate_size")}
    return found


def ernie_moe_check(config: Config) -> None:
    if config.get("moe_layer_end_index") not in (None, -1, n_layers(config) - 1):
        raise AmqError("llama.cpp's ernie4_5-moe has experts up to the last layer; this model has not")


SIGMOID = 2
"""Of llama.cpp's gating functions."""


def lfm2(config: Config) -> Keys:
    return {
        "shortconv.l_cache": need(config, "conv_L_cache"),
        "attention.head_count_kv": kv_heads_by_layer(config),
        "feed_forward_length": lfm2_width(config),
    }


def lfm2_width(config: Config) -> int:
    """As transformers works it out."""
    width = size(config, "block_ff_dim") or need(config, "intermediate_size")
    if config.get("block_auto_adjust_ff_dim"):
        width = int(2 * width / 3)
        if multiplier := config.get("block_ffn_dim_multiplier"):
            width = int(multiplier * width)
        multiple = need(config, "block_multiple_of")
        width = multiple * -(-width // multiple)
    return width


def lfm2_moe(config: Config) -> Keys:
    dense = {"leading_dense_block_count": int(config["num_dense_layers"]), "expert_gating_func": SIGMOID}
    return lfm2(config) | experts(config) | dense


def delta(config: Config) -> Keys:
    """Of Qwen3.5's linear attention."""
    period = period_of_full(config)
    sections = (config.get("rope_parameters") or {}).get("mrope_section") or [11, 11, 10]
    return {
        "ssm.conv_kernel": need(config, "linear_conv_kernel_dim"),
        "ssm.state_size": need(config, "linear_key_head_dim"),
        "ssm.group_count": need(config, "linear_num_key_heads"),
        "ssm.time_step_rank": need(config, "linear_num_value_heads"),
        "ssm.inner_size": need(config, "linear_num_value_heads") * need(config, "linear_value_head_dim"),
        "full_attention_interval": period,
        "rope.dimension_sections": [*map(int, sections), 0],
    }


def delta_moe(config: Config) -> Keys:
    return delta(config) | qwen2_moe(config)


def joint_delta(config: Config) -> Keys:
    """Of Qwen3-Next, whose positions are plain."""
    found = delta(config) | qwen2_moe(config)
    del found["rope.dimension_sections"]
    return found


def joint_delta_check(config: Config) -> None:
    period_of_full(config)
    all_sparse(config)
    key, value = need(config, "linear_key_head_dim"), need(config, "linear_value_head_dim")
    if key != value:
        raise AmqError(
            f"llama.cpp's qwen3next has heads of keys as wide as those of values; this model {key} and {value}"
        )


def period_of_full(config: Config) -> int:
    period = period_of(config, LINEAR)
    if not period:
        raise AmqError("in llama.cpp every so many layers of this model are full attention; not so in this model")
    return period


def delta_check(config: Config) -> None:
    period_of_full(config)
    if need(config, "linear_value_head_dim") % BLOCK:
        width = config["linear_value_head_dim"]
        raise AmqError(f"heads of {width} values, no multiple of {BLOCK}, cannot be put in llama.cpp's order")


def mamba(config: Config) -> Keys:
    """Of Mamba 2 in GraniteMoeHybrid and NemotronH, with the heads of every layer."""
    heads = need(config, "mamba_n_heads", "mamba_num_heads")
    return {
        "ssm.conv_kernel": need(config, "mamba_d_conv", "conv_kernel"),
        "ssm.state_size": need(config, "mamba_d_state", "ssm_state_size"),
        "ssm.group_count": need(config, "mamba_n_groups", "n_groups"),
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * need(config, "mamba_d_head", "mamba_head_dim"),
        "attention.head_count_kv": kv_heads_by_layer(config),
    }


def granite_hybrid(config: Config) -> Keys:
    found = (
        granite(config) | mamba(config) | {"rope.scaling.finetuned": config.get("position_embedding_type") == "rope"}
    )
    if size(config, *COUNTS):
        found |= experts(config, "intermediate_size")
        found |= {"expert_shared_feed_forward_length": need(config, "shared_intermediate_size")}
    else:
        found |= {"feed_forward_length": need(config, "shared_intermediate_size")}
    return found


def granite_check(config: Config) -> None:
    if all(kind == FULL for kind in kinds_of(config)):
        raise AmqError("llama.cpp's granitehybrid needs a layer of Mamba; this model has none")


def deepseek(config: Config) -> Keys:
    """Without the keys of absorbed latent attention, llama.cpp takes kv_b as it is."""
    nope, rope = need(config, "qk_nope_head_dim"), need(config, "qk_rope_head_dim")
    found = {
        "attention.key_length": nope + rope,
        "attention.value_length": need(config, "v_head_dim"),
        "attention.head_count_kv": need(config, "num_attention_heads"),
        "attention.kv_lora_rank": need(config, "kv_lora_rank"),
        "rope.dimension_count": rope,
        "expert_shared_feed_forward_length": need(config, "n_shared_experts") * need(config, "moe_intermediate_size"),
        **shared(config),
    }
    if rank := size(config, "q_lora_rank"):
        found["attention.q_lora_rank"] = rank
    return found


def nemotron(config: Config) -> Keys:
    kinds = _nemotron_kinds(config)
    widths = {"mlp": size(config, "intermediate_size"), "moe": size(config, "moe_intermediate_size")}
    found = mamba(config) | {
        "feed_forward_length": [int(widths.get(kind) or 0) for kind in kinds],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
    }
    if "moe" not in kinds:
        return found
    shared_width = need(config, "moe_shared_expert_intermediate_size")
    return found | shared(config) | {"expert_shared_feed_forward_length": shared_width}


def _nemotron_kinds(config: Config) -> list[str]:
    return list(config.get("layers_block_type") or config.get("layer_types") or ())


def nemotron_check(config: Config) -> None:
    if {"mlp", "moe"} <= set(_nemotron_kinds(config)):
        raise AmqError("llama.cpp has no nemotron_h with experts in some layers and a plain MLP in others")


def nemotron_arch(config: Config) -> str:
    return "nemotron_h_moe" if "moe" in _nemotron_kinds(config) else "nemotron_h"
