"""Twenty families of models as tiny random ones, and what a search must be able to place of each.

A family's default config, of which `benchmarks/families.py` makes its table, is transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from helpers.tiny_models import COMMON, WINDOWED, randomized

BLOCKS = 2
SIZES = {**COMMON, "num_hidden_layers": BLOCKS, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1, "num_mtp_layers": 0}  # fmt: skip
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
          "head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
DELTA = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 32}
SLIDING = ["sliding_attention", "full_attention"]
GEMMA = {"num_attention_heads": 4, "query_pre_attn_scalar": 16, **WINDOWED, "layer_types": SLIDING}
GEMMA4 = {**GEMMA, "global_head_dim": 16, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
           "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A tiny model of `causal_lm`, from `config` with `options` over `SIZES`.

    placed: the least share of its weights that a search can give a format.
    text: the config's own key for the decoder's config, where it nests that.
    shape: options over transformers' default config, where that is not of the kind that the family stands for.
    """

    config: str
    causal_lm: str
    options: dict[str, Any] = field(default_factory=dict)
    placed: float = 0.98
    text: str = ""
    shape: dict[str, Any] = field(default_factory=dict)

    def tiny(self) -> Any:
        return getattr(transformers, self.config)(**self._nested({**SIZES, **self.options}))

    def _nested(self, sizes: dict[str, Any]) -> dict[str, Any]:
        if not self.text:
            return sizes
        outer = {name: sizes.pop(name) for name in ("vision_config", "image_token_index", "spatial_merge_size")}
        tied = sizes.pop("tie_word_embeddings", False)
        return {**outer, self.text: sizes, "tie_word_embeddings": tied}

    def build(self, seed: int = 0) -> nn.Module:
        """In float32 and evaluation mode; every parameter is random."""
        torch.manual_seed(seed)
        return randomized(getattr(transformers, self.causal_lm)(self.tiny()).float(), seed)

    def default(self) -> nn.Module:
        """A model of transformers' default config, with `shape`, without weights."""
        with torch.device("meta"):
            return getattr(transformers, self.causal_lm)(getattr(transformers, self.config)(**self.shape))


def _family(name: str, text: str = "", placed: float = 0.98, shape: dict[str, Any] | None = None,
            **options: Any) -> Family:  # fmt: skip
    return Family(f"{name}{text}Config", f"{name}ForCausalLM", options, placed, shape=shape or {})


FAMILIES: dict[str, Family] = {
    "llama": _family("Llama", tie_word_embeddings=True),
    "mistral": _family("Mistral", **WINDOWED),
    "mistral3": Family(
        "Mistral3Config", "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", "vision_config": PIXTRAL, "image_token_index": 3, "spatial_merge_size": 2},
        placed=0.71, text="text_config",
    ),
    "qwen2": _family("Qwen2", tie_word_embeddings=True),
    "qwen3": _family("Qwen3"),
    "qwen3_moe": _family("Qwen3Moe", **EXPERTS),
    "qwen3_5": _family("Qwen3_5", "Text", **DELTA),
    "qwen3_5_moe": _family("Qwen3_5Moe", "Text", **DELTA, **EXPERTS, shared_expert_intermediate_size=32),
    "gpt_oss": _family("GptOss", num_local_experts=4, num_experts_per_tok=2, layer_types=SLIDING, **WINDOWED),
    "gemma3": _family("Gemma3", "Text", **GEMMA),
    "gemma4": _family("Gemma4", "Text", **{**GEMMA4, "num_hidden_layers": 4, "layer_types": SLIDING * 2},
                      num_kv_shared_layers=2, placed=0.94, shape={"num_kv_shared_layers": 20}),
    "gemma4_experts": _family("Gemma4", "Text", **{**GEMMA4, "hidden_size_per_layer_input": 0}, num_experts=4,
                              enable_moe_block=True, top_k_experts=2, moe_intermediate_size=32,
                              shape={"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
                                     "moe_intermediate_size": 704, "hidden_size_per_layer_input": 0}),
    "phi3": _family("Phi3"),
    "smollm3": _family("SmolLM3", tie_word_embeddings=True),
    "lfm2": _family("Lfm2", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
    "granitemoehybrid": _family("GraniteMoeHybrid", **MAMBA, num_local_experts=4, num_experts_per_tok=2,
                                shared_intermediate_size=32, layer_types=["mamba", "attention"]),
    "nemotron_h": _family("NemotronH", layers_block_type=["mamba", "moe", "attention", "mlp"], ssm_state_size=16,
                          mamba_num_heads=8, mamba_head_dim=16, n_groups=2, chunk_size=32, n_routed_experts=4,
                          num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32),
    "mixtral": _family("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _family("DeepseekV3", **DEEPSEEK, **LATENT, n_shared_experts=1),
    "glm4_moe": _family("Glm4Moe", **DEEPSEEK, n_shared_experts=1),
    "olmo2": _family("Olmo2"),
}  # fmt: skip
