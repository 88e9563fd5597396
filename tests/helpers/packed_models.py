"""Tiny models with experts, and with embeddings that can be packed, and what of each is quantized in which test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from amq.model.experts import unfuse
from helpers.checkpoints import tiny_checkpoint
from helpers.tiny_models import COMMON, randomized

MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "tie_word_embeddings": False}
GEMMA = {
    "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 256,
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


def build(kind: str) -> nn.Module:
    """A tiny random model whose experts are linears."""
    import transformers

    name, options = FAMILIES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    unfuse(randomized(model.float(), 0))
    return model


def checkpoint_in(root: Path, case: str) -> Path:
    """The checkpoint of a case, in a folder of `root` where it is made once."""
    kind, how = CASES[case]
    return root / case if (root / case).exists() else tiny_checkpoint(build(kind), root / case, **how)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", MOE),
    "gpt_oss": ("GptOss", {**MOE, "num_local_experts": 6, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True}),
    "gemma4_text": ("Gemma4Text", GEMMA),
    "gemma3_text": ("Gemma3Text", {"head_dim": 16, "tie_word_embeddings": True}),
}
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "experts": ("qwen3_moe", {}),
    "experts with biases, transposed and interleaved": ("gpt_oss", {}),
    "experts, some kept": ("qwen3_moe", {"kept": r"layers\.1\..*gate_proj\.[02]$"}),
    "experts, all of a layer kept": ("mixtral", {"kept": r"layers\.1\..*experts"}),
    "experts, head and embedding": ("qwen3_moe", {"head": "int6", "embeddings": "int4"}),
    "embedding alone": ("qwen3_moe", {"embeddings": "int3"}),
    "tied head and embedding": ("mixtral", {"head": "int8"}),
    "tied head, embedding that scales": ("gemma3_text", {"head": "int8"}),
    "embeddings per layer": ("gemma4_text", {"embeddings": "int4"}),
    "embeddings per layer, tied head": ("gemma4_text", {"head": "int5", "embeddings": "int4"}),
}
"""{case: (family, how `helpers.checkpoints.tiny_checkpoint` writes it)}"""
