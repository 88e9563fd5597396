"""Tiny models with experts for the native engine's tests, every family with the options that change its sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from amq.model.experts import unfuse
from helpers.tiny_models import Architecture

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 128}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "tie_word_embeddings": False}
GLM = {**ROUTED, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
       "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}  # fmt: skip
MULTIPLIERS = {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3,
               "logits_scaling": 2.5}  # fmt: skip
HYBRID = {**MULTIPLIERS, "layer_types": ["full_attention"] * 3, "shared_intermediate_size": 48,
          "num_experts_per_tok": 2, "mamba_n_heads": 8, "mamba_d_head": 16}  # fmt: skip


def model_of(family: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Architecture(family, (), options).build()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
        unfuse(model)
        return model

    return build


CASES: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": model_of("Qwen3Moe", **ROUTED, num_experts=8, norm_topk_prob=True),
    "qwen3_moe-dense-layers": model_of(
        "Qwen3Moe", **ROUTED, num_experts=4, norm_topk_prob=False, decoder_sparse_step=2, attention_bias=True
    ),
    "qwen3_moe-all-experts": model_of(
        "Qwen3Moe", **{**ROUTED, "num_experts_per_tok": 4}, num_experts=4, norm_topk_prob=True, mlp_only_layers=[0],
        use_sliding_window=True, sliding_window=24,
    ),
    "mixtral": model_of("Mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True),
    "mixtral-window": model_of("Mixtral", num_local_experts=5, num_experts_per_tok=1, sliding_window=24),
    "qwen2_moe": model_of("Qwen2Moe", **ROUTED, num_experts=6, shared_expert_intermediate_size=80),
    "qwen2_moe-no-bias": model_of(
        "Qwen2Moe", **ROUTED, num_experts=4, shared_expert_intermediate_size=40, qkv_bias=False, norm_topk_prob=True,
        mlp_only_layers=[1], use_sliding_window=True, sliding_window=24, layer_types=SLIDING,
    ),
    "olmoe": model_of("Olmoe", num_experts=8, num_experts_per_tok=3, num_key_value_heads=4),
    "olmoe-bias": model_of("Olmoe", num_experts=4, num_experts_per_tok=2, attention_bias=True, norm_topk_prob=True),
    "gpt_oss": model_of(
        "GptOss", num_local_experts=8, num_experts_per_tok=4, head_dim=16, sliding_window=24, layer_types=SLIDING,
        rope_parameters=YARN,
    ),
    "gpt_oss-limit": model_of(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=32, sliding_window=70, layer_types=SLIDING,
        swiglu_limit=0.5, attention_bias=False, rope_parameters=YARN,
    ),
    "glm4_moe": model_of("Glm4Moe", **GLM, use_qk_norm=True),
    "glm4_moe-one-group": model_of(
        "Glm4Moe", **{**GLM, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "norm_topk_prob": False},
        attention_bias=True,
    ),
    "granite": model_of("Granite", **MULTIPLIERS, tie_word_embeddings=True),
    "granite-bias": model_of("Granite", **MULTIPLIERS, attention_bias=True, mlp_bias=True),
    "granitemoehybrid": model_of("GraniteMoeHybrid", **HYBRID, num_local_experts=6, position_embedding_type="rope"),
    "granitemoehybrid-dense": model_of("GraniteMoeHybrid", **HYBRID, num_local_experts=0, attention_bias=True),
}  # fmt: skip
