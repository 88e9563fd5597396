"""Tiny models whose linears are rotated, as far as 64 divides their inputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from helpers.engine_cases import CASES
from helpers.engine_cases_mixture import ROUTED, model_of
from helpers.tiny_models import ARCHITECTURES

EXPERTS = {**ROUTED, "moe_intermediate_size": 64}
ROTATED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (lambda: ARCHITECTURES["llama"].build(intermediate_size=128), "."),
    "llama, attention alone": (CASES["llama-biased"], "self_attn"),
    "qwen3_moe": (model_of("Qwen3Moe", **EXPERTS, num_experts=8, norm_topk_prob=True), "."),
    "qwen2_moe, experts alone": (
        model_of("Qwen2Moe", **EXPERTS, num_experts=6, shared_expert_intermediate_size=128), r"\.experts\."
    ),
    "qwen2_moe, not the experts": (CASES["qwen2_moe"], r"self_attn|shared_expert"),
    "gpt_oss": (CASES["gpt_oss"], "."),
    "granitemoehybrid": (CASES["granitemoehybrid"], "."),
    "qwen3_5": (CASES["qwen3_5"], "."),
    "lfm2_moe": (CASES["lfm2_moe"], "."),
    "gemma4": (CASES["gemma4"], "."),
}  # fmt: skip
"""{case: (model, linears that are rotated where 64 divides their inputs)}: every operator of csrc/cpu/decoder.h."""
