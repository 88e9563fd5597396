"""The way back of `amq.model.gguf.keys`: what a family's config says besides the common sizes, from keys and shapes.

Only what a config depends on is taken here. `amq.model.gguf.config` then makes the keys of the config that came out,
and compares them with the file's: a key that is fixed for a family, or that contradicts another, is found there.
"""

from __future__ import annotations

import re

from amq.model.gguf.file_keys import FileKeys, Read
from amq.model.gguf.keys import LINEAR, SOFTCAP, WIDE_GEMMAS
from amq.model.gguf.orders import Config
from amq.model.shape import FULL, SLIDING, need, size

SHARED_KEYS = re.compile(r"blk\.(\d+)\.attn_(k|v|k_norm)\.weight")


def llama(keys: FileKeys, read: Read) -> None:
    read.values |= {"attention_bias": read.some("attn_q.bias"), "mlp_bias": read.some("ffn_up.bias")}


def attention_bias(keys: FileKeys, read: Read) -> None:
    read.values["attention_bias"] = read.some("attn_q.bias")


def ernie(keys: FileKeys, read: Read) -> None:
    read.values["use_bias"] = read.some("attn_q.bias")


def ernie_moe(keys: FileKeys, read: Read) -> None:
    ernie(keys, read)
    _experts(keys, read)
    values = read.values
    width, shared = values["moe_intermediate_size"], keys.take("expert_shared_feed_forward_length", 0, int)
    if shared % width:
        raise keys.error("expert_shared_feed_forward_length", f"a multiple of the experts' width {width}", shared)
    values |= {
        "moe_num_experts": values.pop("num_experts"),
        "moe_k": values.pop("num_experts_per_tok"),
        "moe_num_shared_experts": shared // width,
        "moe_layer_start_index": keys.take("leading_dense_block_count", 0, int),
        "moe_layer_end_index": read.layers - 1,
        "moe_layer_interval": keys.size("interleave_moe_layer_step"),
    }


def _experts(keys: FileKeys, read: Read, count: str = "num_experts", width: str = "moe_intermediate_size") -> None:
    up, down = read.first("ffn_up_exps.weight"), read.first("ffn_down_exps.weight")
    found = up[-2] if len(up) > 1 else down[-1] if down else 1
    read.values |= {
        count: keys.size("expert_count"),
        "num_experts_per_tok": keys.size("expert_used_count"),
        width: keys.size("expert_feed_forward_length", found),
    }


def mixtral(keys: FileKeys, read: Read) -> None:
    count = "num_local_experts" if keys.architecture == "llama" else "num_experts"
    _experts(keys, read, count, "intermediate_size")


def qwen3_moe(keys: FileKeys, read: Read) -> None:
    _experts(keys, read)
    _softmax(keys, read)
    read.values["attention_bias"] = read.some("attn_q.bias")


def qwen2_moe(keys: FileKeys, read: Read) -> None:
    _experts(keys, read)
    _softmax(keys, read)
    _shared_width(keys, read)


def _softmax(keys: FileKeys, read: Read) -> None:
    """Keys of how experts are weighted, which older files leave out."""
    read.values["norm_topk_prob"] = keys.take("expert_weights_norm", keys.architecture != "qwen2moe", bool)
    if (scale := keys.number("expert_weights_scale", 1.0)) not in (0.0, 1.0):
        raise keys.error("expert_weights_scale", "1: another has no equal in transformers", scale)
    if (gating := keys.take("expert_gating_func", 1, int)) != 1:
        raise keys.error("expert_gating_func", "1 (softmax): another has no equal in transformers", gating)


def _shared_width(keys: FileKeys, read: Read) -> None:
    shared = read.first("ffn_up_shexp.weight")
    width = keys.size("expert_shared_feed_forward_length", shared[0] if shared else 1)
    read.values["shared_expert_intermediate_size"] = width


def gpt_oss(keys: FileKeys, read: Read) -> None:
    """Published models have yarn with broken bounds, of which no key speaks."""
    _experts(keys, read, "num_local_experts", "intermediate_size")
    read.values["sliding_window"] = keys.size("attention.sliding_window")
    _layer_types(keys, read, 2)
    if read.values["rope_parameters"]["rope_type"] == "yarn":
        read.values["rope_parameters"]["truncate"] = False


def mistral(keys: FileKeys, read: Read) -> None:
    read.values["sliding_window"] = None


def ministral(keys: FileKeys, read: Read) -> None:
    read.values["sliding_window"] = None
    read.values["rope_parameters"]["llama_4_scaling_beta"] = keys.number("attention.temperature_scale")


def phi3(keys: FileKeys, read: Read) -> None:
    read.values["sliding_window"] = keys.take("attention.sliding_window", 0, int) or None
    rotary = read.values["rope_parameters"]
    if "original_max_position_embeddings" in rotary:
        read.values["original_max_position_embeddings"] = rotary["original_max_position_embeddings"]


def gemma2(keys: FileKeys, read: Read) -> None:
    """llama.cpp scales attention by the head's width, in the largest model by the hidden width per head."""
    values = read.values
    wide = read.layers == WIDE_GEMMAS["gemma2" if keys.architecture == "gemma2" else "gemma3_text"]
    scalar = values["hidden_size"] // values["num_attention_heads"] if wide else values["head_dim"]
    given = keys.number("attention.scale", 0.0)
    values["query_pre_attn_scalar"] = round(given**-2) if given > 0 else scalar
    values["sliding_window"] = keys.size("attention.sliding_window")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        softcap = keys.number(key, 0.0)
        if softcap or keys.architecture == "gemma3":
            values[key] = softcap or None
    _layer_types(keys, read, 2 if keys.architecture == "gemma2" else 6)


def gemma3(keys: FileKeys, read: Read) -> None:
    gemma2(keys, read)
    _rope_by_kind(keys, read)


def gemma4(keys: FileKeys, read: Read) -> None:
    values, layers = read.values, read.layers
    shared = keys.take("attention.shared_kv_layers", 0, int)
    per_layer = keys.take("embedding_length_per_layer_input", 0, int)
    widths = keys.by_layer("feed_forward_length", layers)
    values |= {
        "sliding_window": keys.size("attention.sliding_window"),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": per_layer,
        "vocab_size_per_layer_input": values["vocab_size"],
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "global_head_dim": values["head_dim"],
        "head_dim": keys.size("attention.key_length_swa", values["head_dim"]),
        "final_logit_softcapping": keys.number("final_logit_softcapping", SOFTCAP) or None,
        "enable_moe_block": read.some("ffn_gate_inp.weight"),
    }
    _layer_types(keys, read, 6)
    kinds, heads = values["layer_types"], keys.by_layer("attention.head_count_kv", layers)
    by_kind = dict(zip(reversed(kinds), reversed(heads), strict=True))
    values["num_key_value_heads"] = by_kind.get(SLIDING, heads[0])
    own = [i for i, kind in enumerate(kinds[: layers - shared]) if kind == FULL]
    values["attention_k_eq_v"] = bool(own) and f"blk.{own[0]}.attn_v.weight" not in read.shapes
    if values["attention_k_eq_v"]:
        values["num_global_key_value_heads"] = by_kind[FULL]
    _rope_by_kind(keys, read)
    if values["enable_moe_block"]:
        _experts(keys, read)
        values["top_k_experts"] = values.pop("num_experts_per_tok")


def gemma4_unused(config: Config, name: str) -> bool:
    """Published models have keys and values in layers that take those of others."""
    found = SHARED_KEYS.match(name)
    own = need(config, "num_hidden_layers") - (size(config, "num_kv_shared_layers") or 0)
    return found is not None and int(found[1]) >= own


def _rope_by_kind(keys: FileKeys, read: Read) -> None:
    local = keys.number("rope.freq_base_swa", 10000.0)
    read.values["rope_parameters"] = {
        FULL: read.values["rope_parameters"],
        SLIDING: {"rope_type": "default", "rope_theta": local},
    }


def _layer_types(keys: FileKeys, read: Read, period: int) -> None:
    """Every `period`th block sees all positions, unless the file says which do."""
    key = "attention.sliding_window_pattern"
    if isinstance(keys.file.keys.get(f"{keys.architecture}.{key}"), int) or not keys.has(key):
        period = keys.size(key, period)
        slides = [(i + 1) % period != 0 for i in range(read.layers)]
    else:
        slides = keys.by_layer(key, read.layers, bool)
    read.values["layer_types"] = [SLIDING if slide else FULL for slide in slides]


def granite(keys: FileKeys, read: Read) -> None:
    llama(keys, read)
    _granite_scales(keys, read)


def _granite_scales(keys: FileKeys, read: Read) -> None:
    head_dim = read.values["head_dim"] if "head_dim" in read.values else 1
    read.values |= {
        "attention_multiplier": keys.number("attention.scale", head_dim**-0.5),
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "logits_scaling": keys.number("logit_scale", 1.0),
    }


def granite_moe(keys: FileKeys, read: Read) -> None:
    attention_bias(keys, read)
    _granite_scales(keys, read)
    _experts(keys, read, "num_local_experts", "intermediate_size")


def granite_hybrid(keys: FileKeys, read: Read) -> None:
    _granite_scales(keys, read)
    attention_bias(keys, read)
    values = read.values
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    if inner % values["hidden_size"] or inner % heads:
        whole = f"a multiple of embedding_length {values['hidden_size']} and of ssm.time_step_rank {heads}"
        raise keys.error("ssm.inner_size", whole, inner)
    values |= {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // values["hidden_size"],
        "mamba_d_conv": keys.size("ssm.conv_kernel"),
        "mamba_d_state": keys.size("ssm.state_size"),
        "mamba_n_groups": keys.size("ssm.group_count"),
        "mamba_conv_bias": read.some("ssm_conv1d.bias"),
        "mamba_proj_bias": read.some("ssm_in.bias"),
        "layer_types": _kinds_by_heads(keys, read, "mamba", "attention"),
    }
    turned = keys.take("rope.scaling.finetuned", False, bool)
    values["position_embedding_type"] = "rope" if turned else "nope"
    if not turned:
        del values["rope_parameters"]
    if not read.some("ffn_gate_inp.weight"):
        values |= {"num_local_experts": 0, "num_experts_per_tok": 0}
        values["shared_intermediate_size"] = values["intermediate_size"]
        return
    _experts(keys, read, "num_local_experts", "intermediate_size")
    _shared_width(keys, read)
    values["shared_intermediate_size"] = values.pop("shared_expert_intermediate_size")


def _kinds_by_heads(keys: FileKeys, read: Read, state: str, attention: str) -> list[str]:
    """`attention` where a layer has heads of keys, whose number becomes the config's, and `state` elsewhere."""
    heads = keys.by_layer("attention.head_count_kv", read.layers)
    read.values["num_key_value_heads"] = max(heads) or read.values["num_attention_heads"]
    return [attention if count else state for count in heads]


def nemotron_h(keys: FileKeys, read: Read) -> None:
    values = read.values
    kinds = _kinds_by_heads(keys, read, "mamba", "attention")
    widths = keys.by_layer("feed_forward_length", read.layers)
    for i, width in enumerate(widths):
        if width:
            kinds[i] = "moe" if f"blk.{i}.ffn_gate_inp.weight" in read.shapes else "mlp"
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    dense = [width for width, kind in zip(widths, kinds, strict=True) if kind == "mlp"]
    values |= {
        "layers_block_type": kinds,
        "intermediate_size": dense[0] if dense else values["hidden_size"],
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "conv_kernel": keys.size("ssm.conv_kernel"),
        "ssm_state_size": keys.size("ssm.state_size"),
        "n_groups": keys.size("ssm.group_count"),
        "use_conv_bias": read.some("ssm_conv1d.bias"),
        "mamba_proj_bias": read.some("ssm_in.bias"),
        "attention_bias": read.some("attn_q.bias"),
        "mlp_bias": read.some("ffn_up.bias"),
    }
    del values["rope_parameters"], values["num_hidden_layers"]
    if "moe" in kinds:
        _routed(keys, read)
        _shared_width(keys, read)
        values["moe_shared_expert_intermediate_size"] = values.pop("shared_expert_intermediate_size")
        values.pop("first_k_dense_replace")


def _routed(keys: FileKeys, read: Read) -> None:
    """Experts of DeepSeek's kind."""
    _experts(keys, read, "n_routed_experts")
    read.values |= {
        "first_k_dense_replace": keys.take("leading_dense_block_count", 0, int),
        "n_shared_experts": keys.size("expert_shared_count"),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.take("expert_weights_norm", False, bool),
        "n_group": 1,
        "topk_group": 1,
    }


def glm4_moe(keys: FileKeys, read: Read) -> None:
    _routed(keys, read)
    attention_bias(keys, read)
    read.values |= {"use_qk_norm": read.some("attn_q_norm.weight"), "num_mtp_layers": 0}


def deepseek(keys: FileKeys, read: Read) -> None:
    values = read.values
    _routed(keys, read)
    attention_bias(keys, read)
    turned, width = keys.size("rope.dimension_count"), values.pop("head_dim")
    values |= {
        "kv_lora_rank": keys.size("attention.kv_lora_rank"),
        "q_lora_rank": keys.take("attention.q_lora_rank", 0, int) or None,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": width - turned,
        "v_head_dim": keys.size("attention.value_length"),
        "num_mtp_layers": 0,
    }
    values["rope_parameters"].pop("partial_rotary_factor", None)


def delta(keys: FileKeys, read: Read) -> None:
    _joint_layers(keys, read)
    attention_bias(keys, read)
    sections = keys.by_layer("rope.dimension_sections", 4)
    read.values["rope_parameters"] |= {"mrope_section": sections[:3], "mrope_interleaved": True}


def _joint_layers(keys: FileKeys, read: Read) -> None:
    """Of Qwen3-Next and Qwen3.5."""
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    period = keys.size("full_attention_interval", 4)
    read.values |= {
        "linear_conv_kernel_dim": keys.size("ssm.conv_kernel"),
        "linear_key_head_dim": keys.size("ssm.state_size"),
        "linear_num_key_heads": keys.size("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
        "layer_types": [LINEAR if (i + 1) % period else FULL for i in range(read.layers)],
    }


def delta_moe(keys: FileKeys, read: Read) -> None:
    delta(keys, read)
    _experts(keys, read)
    _shared_width(keys, read)


def joint_delta(keys: FileKeys, read: Read) -> None:
    _joint_layers(keys, read)
    attention_bias(keys, read)
    qwen2_moe(keys, read)


def lfm2(keys: FileKeys, read: Read) -> None:
    read.values |= {
        "layer_types": _kinds_by_heads(keys, read, "conv", FULL),
        "conv_L_cache": keys.size("shortconv.l_cache"),
        "conv_bias": read.some("shortconv.conv.bias"),
        "block_auto_adjust_ff_dim": False,
    }


def lfm2_moe(keys: FileKeys, read: Read) -> None:
    lfm2(keys, read)
    _experts(keys, read)
    read.values |= {
        "num_dense_layers": keys.take("leading_dense_block_count", 0, int),
        "use_expert_bias": read.some("exp_probs_b.bias"),
        "norm_topk_prob": True,
    }


def stablelm(keys: FileKeys, read: Read) -> None:
    parallel = not any(".ffn_norm." in name for name in read.shapes)
    if keys.take("use_parallel_residual", parallel, bool) != parallel:
        raise keys.error("use_parallel_residual", f"{parallel}, as the tensors ffn_norm say", not parallel)
    read.values |= {"use_qkv_bias": read.some("attn_q.bias"), "use_parallel_residual": parallel}


def starcoder2(keys: FileKeys, read: Read) -> None:
    read.values["use_bias"] = read.some("attn_q.bias")
    read.values["sliding_window"] = keys.take("attention.sliding_window", 0, int) or None
