"""GGUF files of every family: what an export wrote is read back, and what contradicts itself is refused by its key."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.families import PIXTRAL
from helpers.gguf_families import (
    MODELS,
    VOCABULARY,
    built,
    checkpoint_of,
    exported,
    whole_window,
    with_checkpoints_weights,
)
from helpers.gguf_files import in_float32
from helpers.tiny_models import random_tokens, randomized
from torch import nn

from amq.errors import AmqError
from amq.export import gguf as gguf_export
from amq.model.experts import unfuse
from amq.model.gguf import convert as gguf_convert
from amq.model.gguf.convert import gguf_folder
from amq.model.open import load_model

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
pytest.importorskip("gguf")


Written = Callable[[str], tuple[Path, nn.Module]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """(the exported file of the tiny model of that name, the model), made once."""

    @cache
    def write(name: str) -> tuple[Path, nn.Module]:
        folder, model = tmp_path_factory.mktemp("gguf"), built(name, **whole_window(name))
        checkpoint = checkpoint_of(folder / "in", model, zero_points="symmetric")
        return exported(checkpoint, folder / "out"), with_checkpoints_weights(model, checkpoint)

    return write


def test_a_mixture_without_experts_is_named(written: Written, tmp_path: Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if "_exps" in key or "ffn_gate_inp" in key]:
            del tensors[key]

    path = in_float32(written("qwen3_moe")[0], tmp_path / "changed.gguf", change=drop)
    with pytest.raises(AmqError, match="changed.gguf has no tensors of experts, unlike a qwen3moe"):
        load_model(str(path))


@pytest.mark.parametrize("name", MODELS)
def test_the_file_read_by_amq_is_the_same_model(name: str, tmp_path: Path) -> None:
    """Codes of symmetric weights stay as they are, so that what is read is what was written, but for the rounding of
    norms that are one larger there, and of A_log, the logarithm of an exponential in float32."""
    model = built(name, **whole_window(name))
    checkpoint = checkpoint_of(tmp_path / "in", model, zero_points="symmetric")
    with_checkpoints_weights(model, checkpoint)
    path = exported(checkpoint, tmp_path / "out")
    found = load_model(str(path), attn_implementation="eager").model  # other kinds leave softcaps out
    unfuse(found)
    expected, weights = model.state_dict(), found.state_dict()
    assert weights.keys() == expected.keys()
    for key, ours in weights.items():
        torch.testing.assert_close(ours, expected[key], rtol=0, atol=0 if ours.ndim > 1 else 1e-6, msg=key)
    model.load_state_dict(weights)
    tokens = random_tokens(1, 40)
    torch.testing.assert_close(found(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


SIGLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
               "patch_size": 14, "num_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize("name", ["ministral3", "gemma3_text", "gemma4_text", "qwen3_5_text", "qwen3_5_moe_text"])
def test_the_text_model_of_one_that_reads_images(name: str, tmp_path: Path) -> None:
    family, outer = {
        "ministral3": ("Mistral3", {"vision_config": PIXTRAL, "image_token_index": 3, "spatial_merge_size": 2}),
        "gemma3_text": ("Gemma3", {"vision_config": SIGLIP, "mm_tokens_per_image": 4}),
        "gemma4_text": ("Gemma4", {"vision_config": VISION, "audio_config": None}),
        "qwen3_5_text": ("Qwen3_5", {"vision_config": QWEN_VISION}),
        "qwen3_5_moe_text": ("Qwen3_5Moe", {"vision_config": QWEN_VISION}),
    }[name]
    text = MODELS[name].build().config.to_dict() | {"vocab_size": VOCABULARY, "pad_token_id": 0}
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    config = getattr(transformers, f"{family}Config")(text_config=text, **outer, **tied)
    torch.manual_seed(0)
    model = randomized(getattr(transformers, f"{family}ForConditionalGeneration")(config).float(), 0)
    checkpoint = checkpoint_of(tmp_path / "in", model, zero_points="symmetric")
    (tmp_path / "out").mkdir()
    facts = gguf_export.write(checkpoint, tmp_path / "out")
    assert "tensors that are not of the text model" in facts["left out"]
    with_checkpoints_weights(model, checkpoint)
    same_logits(tmp_path / "out" / gguf_export.FILE, model)


def same_logits(path: Path, model: nn.Module) -> None:
    tokens = random_tokens(1, 40)
    found = load_model(str(path), attn_implementation="eager").model
    torch.testing.assert_close(found(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma4_text with experts", "qwen3_5_moe_text", "qwen3_next"])
def test_gate_and_up_of_experts_in_one_tensor(name: str, written: Written, tmp_path: Path) -> None:
    """As llama.cpp's converter writes them of files that have them in one."""

    def join(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if "ffn_gate_exps" in key]:
            up = tensors.pop(key.replace("gate", "up"))
            tensors[key.replace("gate", "gate_up")] = np.concatenate([tensors.pop(key), up], axis=1)

    source, model = written(name)
    same_logits(in_float32(source, tmp_path / "changed.gguf", change=join), model)


def test_blocks_that_predict_further_tokens_are_left_out(written: Written, tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.2.attn_q.weight"] = np.ones((64, 64), np.float32)
        tensors["blk.2.nextn.eh_proj.weight"] = np.ones((64, 128), np.float32)

    source, model = written("glm4_moe")
    keys = {"block_count": 3, "nextn_predict_layers": 1, "expert_group_count": 1, "expert_group_used_count": 1}
    same_logits(in_float32(source, tmp_path / "changed.gguf", keys, add), model)


def test_keys_of_layers_that_take_others_are_left_out(written: Written, tmp_path: Path) -> None:
    """Published files of Gemma 4 have them."""

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.3.attn_k.weight"] = np.ones((64, 64), np.float32)
        tensors["blk.3.attn_k_norm.weight"] = np.ones(32, np.float32)

    source, model = written("gemma4_text")
    same_logits(in_float32(source, tmp_path / "changed.gguf", change=add), model)


def test_tokens_without_an_embedding_are_not_added(written: Written) -> None:
    """The class of transformers that reads such tokenizers has a token of its own by default."""
    folder = gguf_folder(written("glm4_moe")[0])
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in added] == ["<s>"]


def test_positions_that_turn_nothing(written: Written, tmp_path: Path) -> None:
    source, model = written("nemotron_h")
    keys = {"rope.freq_base": 1e6, "rope.dimension_count": 8}
    same_logits(in_float32(source, tmp_path / "changed.gguf", keys), model)


def test_windows_said_layer_by_layer(written: Written, tmp_path: Path) -> None:
    keys = {"attention.sliding_window_pattern": [True, False]}
    source, model = written("gemma3_text")
    same_logits(in_float32(source, tmp_path / "changed.gguf", keys), model)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "lfm2_moe"])
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("expert_count", 8, r"expert_count is 8, expected 4, the experts in the tensor blk.*\[4, "),
        ("expert_count", 0, r"expert_count is 0, expected 4, the experts in the tensor blk.*\[4, "),
        ("expert_used_count", 5, "expert_used_count is 5, expected 1 to 4"),
        ("expert_used_count", 0, "expert_used_count is 0, expected 1 to 4"),
        ("expert_feed_forward_length", 31, r"expert_feed_forward_length is 31, expected \d+, as the tensor blk"),
    ],
)
def test_keys_of_experts_that_the_tensors_contradict(
    name: str, key: str, value: int, expected: str, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = in_float32(written(name)[0], tmp_path / "changed.gguf", {key: value})
    monkeypatch.setattr(gguf_convert, "dequantized", pytest.fail)
    with pytest.raises(AmqError, match=f"changed.gguf: .*{expected}"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("qwen3_5_text", {"ssm.inner_size": 64}, "heads of 16 values, no multiple of 32"),
        ("glm4_moe", {"expert_gating_func": 1}, "glm4moe.expert_gating_func is 1, expected 2"),
        ("granitemoehybrid", {"attention.head_count_kv": [2, 0]}, "nothing takes the tensor blk.0.ssm_in"),
        ("granitemoehybrid", {"attention.head_count_kv": [0, 2, 2]}, "3 values, expected one for each of 2 blocks"),
        ("gemma4_text", {"attention.shared_kv_layers": 1}, "last two layers"),
        ("smollm3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_log_multiplier": 1.0},
         "attention factor of its own"),
        ("gpt_oss", {"attention.sliding_window_pattern": [True, True]}, "every second layer"),
        ("llama", {"nextn_predict_layers": 9}, "nextn_predict_layers is 9, expected fewer than the 2 blocks"),
    ],
)  # fmt: skip
def test_other_contradictions(name: str, keys: dict[str, Any], expected: str, written: Written, tmp_path: Path) -> None:
    path = in_float32(written(name)[0], tmp_path / "changed.gguf", keys)
    with pytest.raises(AmqError, match=expected) as caught:
        load_model(str(path))
    assert "changed.gguf" in str(caught.value)
