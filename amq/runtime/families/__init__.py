"""Families of models, each a function of its config: which steps a decoder of our own takes (amq.runtime.decoder_spec).

A family is a row here and a function in a small file. `read_spec` finds it by `model_type` and where its tensors are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from amq.runtime.decoder_spec import DecoderSpec
from amq.runtime.families.base import Origin, Unsupported
from amq.runtime.families.gemma import gemma, gemma2, gemma3
from amq.runtime.families.gemma4 import gemma4
from amq.runtime.families.granite import granite, granitemoehybrid
from amq.runtime.families.llama import llama, mistral, qwen2, qwen3
from amq.runtime.families.llama_kin import arcee, ministral, ministral3, smollm3
from amq.runtime.families.mixtures import glm4_moe, gpt_oss, mixtral, olmoe, qwen2_moe, qwen3_moe
from amq.runtime.families.olmo import olmo2, olmo3
from amq.runtime.families.phi3 import phi3
from amq.util.records import parse_record

FAMILIES: dict[str, Callable[[Origin], DecoderSpec]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gemma4_text": gemma4,
    "phi3": phi3,
    "smollm3": smollm3,
    "ministral": ministral,
    "ministral3": ministral3,
    "arcee": arcee,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
    "granite": granite,
    "granitemoehybrid": granitemoehybrid,
}
"""By the `model_type` of the text model."""
ROOTS = ("model.", "model.language_model.", "language_model.model.")
"""What may precede the decoder's names in a checkpoint: of a text model, and of text models inside of others."""
UNREAD = (
    "model.visual.", "visual.", "model.vision_tower.", "vision_tower.", "model.multi_modal_projector.",
    "multi_modal_projector.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.", "mtp.",
)  # fmt: skip
"""Beginnings of names that are not part of the text model: encoders, and heads that predict several tokens."""


@dataclass(frozen=True)
class _Kind:
    model_type: str | None = None
    text_config: dict[str, Any] | None = None


def read_spec(config: Mapping[str, Any], source: str, names: Collection[str]) -> DecoderSpec:
    """The spec of the model of config.json, read from the file `source`; names: of the checkpoint's tensors and
    linears.

    Raises Unsupported where we lack a part of it, AmqError for a damaged file. No weight is read.
    """
    kind = parse_record(config, _Kind, source)
    nested = kind.text_config or {}
    raw = {**config, **nested} if nested else dict(config)
    raw["model_type"] = nested.get("model_type", kind.model_type)
    if config.get("tie_word_embeddings") is not None:  # of the model around the text model, which has the head
        raw["tie_word_embeddings"] = config["tie_word_embeddings"]
    family = FAMILIES.get(str(raw["model_type"]))
    if family is None:
        raise Unsupported(f"the native engine runs {', '.join(FAMILIES)}, not {raw['model_type']}")
    root = next((r for r in ROOTS if any(name.startswith(f"{r}layers.") for name in names)), ROOTS[0])
    head = "language_model.lm_head" if root.startswith("language_model.") else "lm_head"
    return family(Origin(raw, source, root, head, frozenset(names), UNREAD))


__all__ = ["FAMILIES", "Unsupported", "read_spec"]
