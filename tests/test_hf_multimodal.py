"""Checkpoints of models that read images beside the text: their text model is packed, the rest stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import tiny_checkpoint
from helpers.in_transformers import distance
from helpers.tiny_models import COMMON, random_tokens, randomized
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.integrations.opening import open_checkpoint_once
from amq.kernels.embedding import StoredEmbedding
from amq.model.experts import unfuse
from amq.model.inventory import get_weight
from amq.packing import dequantize

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = random_tokens(2, 12).clamp(max=200)  # those above are images, sound, and their like
TEXT = {key: value for key, value in COMMON.items() if key != "attn_implementation"} | {"head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
GEMMA = {
    "global_head_dim": 16, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 256, "pad_token_id": 3,
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
}  # fmt: skip
QWEN = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
OTHERS = {"image": 250, "video": 251, "audio": 252, "boi": 253, "eoi": 254}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3": ("Mistral3", {
        "text_config": {**TEXT, "model_type": "mistral"}, "image_token_index": 250, "tie_word_embeddings": False,
        "vision_config": {**VISION, **LAYERS, "model_type": "pixtral", "image_size": 28, "patch_size": 14},
    }),
    "gemma4": ("Gemma4", {
        "text_config": {**TEXT, **GEMMA}, "audio_config": None,
        "vision_config": {**VISION, **LAYERS, "num_key_value_heads": 2, "head_dim": 16},
        **{f"{name}_token_id": number for name, number in OTHERS.items()},
    }),
    "qwen3_5_moe": ("Qwen3_5Moe", {
        "text_config": {**TEXT, **QWEN},
        "vision_config": {
            **VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14, "num_position_embeddings": 16
        },
        **{f"{name}_token_id": OTHERS[name] for name in ("image", "video")},
    }),
}  # fmt: skip


def build(kind: str) -> nn.Module:
    family, options = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    unfuse(randomized(model.float(), 0))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(kind: str) -> Path:
        there = (root / kind).exists()
        return root / kind if there else tiny_checkpoint(build(kind), root / kind, head="int8", embeddings="int4")

    return folder


def load(folder: Path, kind: Any) -> nn.Module:
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_load_run_save_reload(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The whole model, and without its head; logits are those of the plain model with the same rounded weights."""
    open_checkpoint_once(folders(kind))
    checkpoint, plain = open_checkpoint(folders(kind)), build(kind)
    assert any(".language_model." in name for name in checkpoint.record.formats)
    assert not any("vision" in name or "visual" in name for name in checkpoint.record.formats)
    model = load(folders(kind), AutoModelForImageTextToText)
    with torch.no_grad():
        for name in checkpoint.record.formats:
            get_weight(plain, name).copy_(dequantize(checkpoint.packed(name)))
        logits = model(TOKENS).logits
        assert distance(logits, plain(TOKENS).logits) < 1e-5
        states = model.model(TOKENS).last_hidden_state
        assert torch.equal(load(folders(kind), AutoModel)(TOKENS).last_hidden_state, states)
        model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
        again = load(tmp_path / "again", AutoModelForImageTextToText)
        assert torch.equal(again(TOKENS).logits, logits)
        assert open_checkpoint(tmp_path / "again").record == checkpoint.record
        assert distance(model.dequantize()(TOKENS).logits, logits) < 1e-5


def test_the_text_model_alone(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """A class whose modules have no `language_model.` in their names; it is saved by its own names."""
    with torch.no_grad():
        logits = load(folders("qwen3_5_moe"), AutoModelForImageTextToText)(TOKENS).logits
        text = load(folders("qwen3_5_moe"), AutoModelForCausalLM)
        assert type(text).__name__ == "Qwen3_5MoeForCausalLM" and not any(p.requires_grad for p in text.parameters())
        assert torch.equal(text(TOKENS).logits, logits)
        text.save_pretrained(tmp_path / "text")
        assert torch.equal(load(tmp_path / "text", AutoModelForCausalLM)(TOKENS).logits, logits)
    assert "model.layers.0.mlp.experts.gate_proj.3" in open_checkpoint(tmp_path / "text").record.formats


def test_rows_of_a_packed_weight_can_be_read_by_number(folders: Callable[[str], Path]) -> None:
    """As Gemma 4 reads the padding's, for which there may be no other way."""
    embedding = load(folders("gemma4"), AutoModel).get_input_embeddings()
    assert isinstance(embedding, StoredEmbedding)
    rows = dequantize(embedding.source())
    assert torch.equal(embedding.weight[3], rows[3]) and torch.equal(embedding.weight[-1, :], rows[-1])
    assert torch.equal(embedding.weight[3, 5:7], rows[3, 5:7])
    assert torch.equal(embedding(TOKENS), rows[TOKENS] * embedding.embed_scale)
    assert embedding.weight.dtype == torch.float32 and type(embedding.weight + 1) is torch.Tensor
    with pytest.raises(AmqError, match="its weight has rows by number, got slice"):
        embedding.weight[:3]
