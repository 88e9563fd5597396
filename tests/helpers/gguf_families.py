"""Tiny models of every family that GGUF has, their quantized checkpoints and exported files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amq.checkpoint.store import Checkpoint, open_checkpoint
from amq.export import gguf as gguf_export
from amq.export.gguf_plans import make_plans, text_config
from amq.model.experts import unfuse
from amq.model.gguf.families import DENSE, find_family
from amq.model.inventory import get_weight, take_inventory
from amq.packing import dequantize
from helpers.checkpoints import tiny_checkpoint
from helpers.families import DEEPSEEK, EXPERTS, FAMILIES, GEMMA, MAMBA, SLIDING, Family
from helpers.small_tokenizers import with_merges
from helpers.tiny_models import WINDOWED

VOCABULARY = 288
"""More than the tokenizer has, whose class adds some of its own for a few families."""
HEADS32 = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
           "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                               "mrope_section": [2, 1, 1], "mrope_interleaved": True}}  # fmt: skip
NEMOTRON = {k: v for k, v in FAMILIES["nemotron_h"].options.items() if k != "layers_block_type"}
GEMMA4 = {"tie_word_embeddings": True, "head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 4,
          "layer_types": SLIDING * 2, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32,
          "vocab_size_per_layer_input": VOCABULARY, "use_double_wide_mlp": True, "final_logit_softcapping": 3.0,
          **WINDOWED}  # fmt: skip
GEMMA4_EXPERTS = {"head_dim": 16, "global_head_dim": 32, "layer_types": SLIDING, "hidden_size_per_layer_input": 0,
                  "attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True,
                  "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, **WINDOWED}  # fmt: skip
MINISTRAL = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
             "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
             "llama_4_scaling_beta": 0.1}  # fmt: skip
SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}


def family(name: str, text: str = "", **options: Any) -> Family:
    return Family(f"{name}{text}Config", f"{name}ForCausalLM", {"tie_word_embeddings": False} | options)


MODELS: dict[str, Family] = {
    "llama": family("Llama"),
    "mistral": family("Mistral", **WINDOWED),
    "mixtral": family("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": family("Qwen2"),
    "qwen3": family("Qwen3"),
    "qwen2_moe": family("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": family("Qwen3Moe", **EXPERTS, norm_topk_prob=True),
    "olmoe": family("Olmoe", num_experts=4, num_experts_per_tok=2, num_key_value_heads=4),
    "gpt_oss": family("GptOss", num_local_experts=4, num_experts_per_tok=2, layer_types=SLIDING, **WINDOWED),
    "gemma2": family("Gemma2", **GEMMA | {"tie_word_embeddings": True}),
    "gemma3_text": family("Gemma3", "Text", **GEMMA),
    "phi3": family("Phi3"),
    "smollm3": family("SmolLM3", num_hidden_layers=4),
    "olmo2": family("Olmo2"),
    "granite": family("Granite", **SCALES),
    "granitemoe": family("GraniteMoe", num_local_experts=4, num_experts_per_tok=2, **SCALES),
    "glm4_moe": family("Glm4Moe", **DEEPSEEK, n_shared_experts=1),
    "qwen3_5_text": family("Qwen3_5", "Text", **HEADS32),
    "qwen3_5_moe_text": family("Qwen3_5Moe", "Text", **HEADS32, **EXPERTS, shared_expert_intermediate_size=32),
    "deepseek_v3": replace(FAMILIES["deepseek_v3"]),
    f"granitemoehybrid{DENSE}": family("GraniteMoeHybrid", **MAMBA, num_local_experts=0, num_experts_per_tok=0,
                                       shared_intermediate_size=32, layer_types=["mamba", "attention"]),
    "granitemoehybrid": FAMILIES["granitemoehybrid"],
    "nemotron_h": family("NemotronH", **NEMOTRON, layers_block_type=["mamba", "moe", "attention"]),
    "ernie4_5": family("Ernie4_5"),
    "ernie4_5_moe": family("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=32,
                           moe_num_shared_experts=2, moe_layer_start_index=1),
    "lfm2_moe": family("Lfm2Moe", **EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention"],
                       tie_word_embeddings=True),
    "qwen3_next": family("Qwen3Next", **HEADS32, **EXPERTS, shared_expert_intermediate_size=32),
    "ministral3": family("Ministral3", rope_parameters=MINISTRAL),
    "gemma4_text": family("Gemma4", "Text", **GEMMA4),
    "gemma4_text with experts": family("Gemma4", "Text", **GEMMA4_EXPERTS),
    "lfm2": family("Lfm2", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
}  # fmt: skip


def checkpoint_of(
    folder: Path,
    model: nn.Module,
    fmt: str = "int4",
    formats: Mapping[str, str] | None = None,
    zero_points: str = "fractional",
) -> Checkpoint:
    """`model`, whose experts become linears, in one format, head and embeddings in others."""
    unfuse(model)
    formats = dict.fromkeys((s.name for s in take_inventory(model).linears), fmt) | dict(formats or {})
    tiny_checkpoint(model, folder, head="int8", embeddings="int5", formats=formats, zero_points=zero_points)
    with_merges().save_pretrained(folder)
    return open_checkpoint(folder)


def built(name: str, **options: Any) -> nn.Module:
    """Buffers that a checkpoint has are random, too: scales of layers, biases of scores."""
    found = MODELS[name]
    model = replace(found, options={"vocab_size": VOCABULARY, **found.options, **options}).build()
    generator, kept = torch.Generator().manual_seed(1), model.state_dict()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name in kept:
            buffer += 0.05 * torch.randn(buffer.shape, generator=generator)
    return model


def whole_window(name: str) -> dict[str, Any]:
    """Options without a window that llama.cpp has not, in which a text would have to end."""
    return {"sliding_window": None} if name == "mistral" else {}


def with_checkpoints_weights(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """`model`, its linears as they are in `checkpoint`, its other matrices as fp16 has them where the file does."""
    config = text_config(gguf_export.plain_config(checkpoint))
    halves = [p.source for p in make_plans(checkpoint, config, find_family(config)) if p.type == "F16" and not p.packed]
    with torch.no_grad():
        for linear in checkpoint.record.formats:
            get_weight(model, linear).copy_(dequantize(checkpoint.packed(linear)))
        for name in halves:
            model.get_parameter(name).copy_(model.get_parameter(name).half())
    return model


def exported(checkpoint: Checkpoint, folder: Path) -> Path:
    folder.mkdir()
    gguf_export.write(checkpoint, folder)
    return folder / gguf_export.FILE
