"""Keys of a GGUF file that single families need, checks of what llama.cpp fixes in its code, and changed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.export.gguf_types import BLOCK
from amq.model.experts import COUNTS, TOP_K
from amq.model.shape import FULL, SLIDING, ModelShape, head_dim, kv_heads, need, size

Config = Mapping[str, Any]
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


def plus_one(weight: Tensor, config: Config) -> Tensor:
    return weight.float() + 1


def flat_kernel(weight: Tensor, config: Config) -> Tensor:
    """A depthwise convolution's [channels, 1, width]."""
    return weight.squeeze(1)


def vector(weight: Tensor, config: Config) -> Tensor:
    return weight.reshape(-1)


def neox_order(heads: int, rows: int) -> Tensor:
    """Within each head, row i of the first half and row i of the second half become neighbours."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def query_rows(config: Config, rows: int) -> Tensor:
    return neox_order(need(config, "num_attention_heads"), rows)


def key_rows(config: Config, rows: int) -> Tensor:
    return neox_order(kv_heads(config) or 1, rows)


def minus_exp(weight: Tensor, config: Config) -> Tensor:
    return -torch.exp(weight.float())


def column_of_minus_exp(weight: Tensor, config: Config) -> Tensor:
    return minus_exp(weight, config).unsqueeze(-1)


def column(weight: Tensor, config: Config) -> Tensor:
    return weight.float().unsqueeze(-1)


def value_order(config: Config, features: int) -> Tensor:
    """Heads of values of linear attention: those of one key are together in transformers, far apart in llama.cpp.

    features: of a head. Returns int64 [heads · features].
    """
    heads, keys = need(config, "linear_num_value_heads"), need(config, "linear_num_key_heads")
    return torch.arange(heads * features).view(keys, heads // keys, features).transpose(0, 1).reshape(-1)


def value_rows(config: Config, rows: int) -> Tensor:
    """Of a tensor whose rows are those heads."""
    return value_order(config, rows // need(config, "linear_num_value_heads"))


def query_key_value_rows(config: Config, rows: int) -> Tensor:
    """Of a tensor with the rows of queries and keys before them."""
    before = 2 * need(config, "linear_num_key_heads") * need(config, "linear_key_head_dim")
    values = before + value_order(config, need(config, "linear_value_head_dim"))
    return torch.cat([torch.arange(before), values])


def value_blocks(config: Config) -> Tensor:
    return value_order(config, need(config, "linear_value_head_dim") // BLOCK)


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


def grouped_norm(weight: Tensor, config: Config) -> Tensor:
    return weight.float().view(need(config, "mamba_n_groups", "n_groups"), -1)


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
