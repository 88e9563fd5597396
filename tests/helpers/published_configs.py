"""What config.json of published models says, with fewer layers: their keys, and values that only these files have.

Written down without the files at hand: a size may be another one. Tokens and what is for training are left out.
"""

from __future__ import annotations

from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size":
        2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 4,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936
    },
    "Qwen2.5-0.5B": {
        "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936, "use_mrope": False
    },
    "Qwen1.5-MoE-A2.7B": {
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
        "max_window_layers": 21, "model_type": "qwen2_moe", "num_attention_heads": 16, "num_hidden_layers": 4,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936, "decoder_sparse_step":
        1, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
        "num_experts": 60, "norm_topk_prob": False
    },
    "Qwen3.5-9B": {
        "model_type": "qwen3_5", "text_config": {"attention_bias": False, "attn_output_gate": True,
        "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 12288, "layer_types": ["linear_attention", "linear_attention", "linear_attention",
        "full_attention"], "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
        "mlp_only_layers": [], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False, "num_attention_heads": 16, "num_hidden_layers": 4,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "vocab_size": 248320,
        "mamba_ssm_dtype": "float32", "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11,
        10], "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}},
        "tie_word_embeddings": False, "vision_config": {"deepstack_visual_indexes": [], "depth": 2,
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152, "in_channels": 3, "intermediate_size": 4304,
        "model_type": "qwen3_5", "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 4096,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    },
    "gpt-oss-20b": {
        "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size":
        2880, "initial_context_length": 4096, "intermediate_size": 2880, "layer_types": ["sliding_attention",
        "full_attention", "sliding_attention", "full_attention"], "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 4,
        "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast":
        32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False}, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088
    },
    "gemma-3-4b-it": {
        "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": {"hidden_size": 2560,
        "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 4, "rope_scaling":
        {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}, "vision_config": {"hidden_size": 1152,
        "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 2, "patch_size": 14, "vision_use_head": False}
    },
    "gemma-3-1b-it": {
        "attention_bias": False, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type":
        "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling":
        None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144
    },
    "gemma-2b": {
        "hidden_act": "gelu", "hidden_activation": None, "head_dim": 256, "hidden_size": 2048,
        "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
        "num_attention_heads": 8, "num_hidden_layers": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000
    },
    "gemma-2-2b": {
        "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers":
        4, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 256000
    },
    "gemma-4-E2B": {
        "audio_config": {"model_type": "gemma4_audio", "num_hidden_layers": 1}, "model_type": "gemma4",
        "text_config": {"attention_bias": False, "attention_k_eq_v": False, "enable_moe_block": False,
        "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256, "hidden_activation":
        "gelu_pytorch_tanh", "hidden_size": 1536, "hidden_size_per_layer_input": 256, "intermediate_size": 6144,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention",
        "sliding_attention", "full_attention"], "max_position_embeddings": 131072, "model_type": "gemma4_text",
        "moe_intermediate_size": None, "num_attention_heads": 8, "num_experts": None,
        "num_global_key_value_heads": None, "num_hidden_layers": 6, "num_key_value_heads": 1,
        "num_kv_shared_layers": 2, "rms_norm_eps": 1e-06, "rope_parameters": {"full_attention":
        {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}, "sliding_window": 512,
        "tie_word_embeddings": True, "top_k_experts": None, "use_bidirectional_attention": None,
        "use_double_wide_mlp": True, "vocab_size": 262144, "vocab_size_per_layer_input": 262144},
        "tie_word_embeddings": True, "vision_config": {"model_type": "gemma4_vision", "num_hidden_layers": 1}
    },
    "GLM-4.5-Air": {
        "attention_bias": True, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "partial_rotary_factor": 0.5, "intermediate_size": 10944, "max_position_embeddings": 131072,
        "model_type": "glm4_moe", "moe_intermediate_size": 1408, "norm_topk_prob": True, "num_attention_heads":
        96, "n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
        "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "num_hidden_layers":
        4, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 1000000, "tie_word_embeddings": False, "use_qk_norm": False, "vocab_size": 151552
    },
    "LFM2-1.2B": {
        "block_auto_adjust_ff_dim": True, "block_dim": 2048, "block_ff_dim": 12288, "block_ffn_dim_multiplier":
        1.0, "block_mlp_init_scale": 1.0, "block_multiple_of": 256, "block_norm_eps": 1e-05,
        "block_out_init_scale": 1.0, "block_use_swiglu": True, "block_use_xavier_init": True, "conv_L_cache": 3,
        "conv_bias": False, "conv_dim": 2048, "conv_dim_out": 2048, "conv_use_xavier_init": True,
        "full_attn_idxs": [2], "hidden_size": 2048, "max_position_embeddings": 128000, "model_type": "lfm2",
        "norm_eps": 1e-05, "num_attention_heads": 32, "num_heads": 32, "num_hidden_layers": 4,
        "num_key_value_heads": 8, "rope_theta": 1000000.0, "theta": 1000000.0, "tie_embedding": True,
        "use_pos_enc": True, "vocab_size": 65536
    },
    "LFM2-8B-A1B": {
        "conv_L_cache": 3, "conv_bias": False, "hidden_size": 2048, "intermediate_size": 7168, "layer_types":
        ["conv", "conv", "full_attention", "conv"], "max_position_embeddings": 128000, "model_type": "lfm2_moe",
        "moe_intermediate_size": 1792, "norm_eps": 1e-05, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 4,
        "num_key_value_heads": 8, "rope_theta": 1000000.0, "routed_scaling_factor": 1.0, "use_expert_bias":
        True, "vocab_size": 65536
    },
    "Phi-4-mini": {
        "attention_bias": False, "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size":
        3072, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24,
        "num_hidden_layers": 4, "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling":
        {"long_factor": [1.0 + pair for pair in range(48)], "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064
    },
    "SmolLM3-3B": {
        "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
        "layer_types": ["full_attention", "full_attention", "full_attention", "full_attention"],
        "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0], "num_attention_heads": 16,
        "num_hidden_layers": 4, "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 128256
    },
    "granite-4.0-micro": {
        "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12, "hidden_act":
        "silu", "hidden_size": 2560, "intermediate_size": 8192, "layer_types": ["attention", "attention",
        "attention", "attention"], "logits_scaling": 10, "mamba_chunk_size": 256, "mamba_conv_bias": True,
        "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
        "mamba_n_heads": 80, "mamba_proj_bias": False, "max_position_embeddings": 131072, "model_type":
        "granitemoehybrid", "normalization_function": "rmsnorm", "num_attention_heads": 40,
        "num_experts_per_tok": 0, "num_hidden_layers": 4, "num_key_value_heads": 8, "num_local_experts": 0,
        "position_embedding_type": "rope", "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling":
        None, "rope_theta": 10000000, "shared_intermediate_size": 8192, "tie_word_embeddings": True,
        "vocab_size": 100352
    },
    "Ministral-3-3B": {
        "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
        "spatial_merge_size": 2, "text_config": {"head_dim": 128, "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 9216, "max_position_embeddings": 262144, "model_type": "ministral3",
        "num_attention_heads": 32, "num_hidden_layers": 4, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta":
        1000000.0, "rope_type": "yarn", "type": "yarn"}, "sliding_window": None, "tie_word_embeddings": True,
        "vocab_size": 131072}, "vision_config": {"head_dim": 64, "hidden_act": "silu", "hidden_size": 1024,
        "image_size": 1540, "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16,
        "num_channels": 3, "num_hidden_layers": 1, "patch_size": 14, "rope_parameters": {"rope_theta": 10000.0,
        "rope_type": "default"}}, "vision_feature_layer": -1
    },
    "OLMo-2-7B": {
        "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers":
        4, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
        "tie_word_embeddings": False, "vocab_size": 100352
    },
    "Olmo-3-7B": {
        "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": 65536, "model_type": "olmo3", "num_attention_heads": 32, "num_hidden_layers":
        4, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": {"attention_factor":
        1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0, "original_max_position_embeddings":
        8192, "rope_type": "yarn"}, "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 100278
    },
    "Mistral-7B-v0.1": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 4, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 32000
    },
    "Llama-3.2-1B": {
        "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size":
        8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 4, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "vocab_size": 128256
    },
    "AFM-4.5B": {
        "attention_bias": False, "head_dim": 128, "hidden_act": "relu2", "hidden_size": 2560,
        "intermediate_size": 18432, "max_position_embeddings": 65536, "mlp_bias": False, "model_type": "arcee",
        "num_attention_heads": 20, "num_hidden_layers": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "type": "yarn"}, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "vocab_size": 128004
    },
    "OLMoE-1B-7B": {
        "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob":
        False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 4,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "vocab_size": 50304
    },
    "granite-3.3-2b": {
        "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act":
        "silu", "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite", "num_attention_heads":
        32, "num_hidden_layers": 4, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps":
        1e-05, "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True, "vocab_size": 49159
    },
}  # fmt: skip
