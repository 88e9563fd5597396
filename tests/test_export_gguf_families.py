"""Every family of the gguf export: names, shapes, types and numbers of a tiny model's file; round trips; refusals.

llama.cpp itself computed the same as transformers from each of these files in 32 bits (docs/exports.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import small_tokenizers
from helpers.by_llama_cpp import last_position
from helpers.families import SLIDING
from helpers.gguf_families import (
    MINISTRAL,
    MODELS,
    VOCABULARY,
    built,
    checkpoint_of,
    exported,
    whole_window,
    with_checkpoints_weights,
)
from helpers.gguf_files import in_float32
from helpers.tiny_models import random_tokens
from safetensors.torch import load_file
from torch import nn

from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.export import export
from amq.export import gguf as gguf_export
from amq.export import mlx as mlx_export
from amq.export import recipe as recipe_export
from amq.export.common import DenseOuter
from amq.export.gguf_plans import make_plans, text_name
from amq.export.gguf_tokenizer import leading_space, sentencepiece_scores
from amq.model.experts import Experts
from amq.model.gguf.families import FAMILIES as TABLE
from amq.model.gguf.families import find_family
from amq.model.gguf.orders import neox_order, value_order
from amq.packing import dequantize

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
pytest.importorskip("gguf")


def test_every_family_of_the_table_is_here() -> None:
    assert {name.partition(" with ")[0] for name in MODELS} == TABLE.keys()


OWN_STEMS = {"gemma4": {"blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps"}}
"""Tensors that llama.cpp reads and gguf's table lacks."""


@pytest.mark.parametrize("name", MODELS)
def test_a_file_has_every_tensor_in_its_shape_type_and_numbers(name: str, tmp_path: Path) -> None:
    import gguf

    checkpoint = checkpoint_of(tmp_path / "in", built(name))
    reader = gguf.GGUFReader(exported(checkpoint, tmp_path / "out"))
    tensors = {t.name: t for t in reader.tensors}
    found = find_family(gguf_export.plain_config(checkpoint))
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == found.arch)
    stems = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[arch]} | OWN_STEMS.get(found.arch, set())
    plans = make_plans(checkpoint, gguf_export.plain_config(checkpoint), found)
    taken = [source for plan in plans for source in plan.sources]
    assert set(taken) == {*checkpoint.record.formats, *checkpoint.other_names}
    assert reader.fields["general.architecture"].contents() == found.arch
    for plan in plans:
        tensor = tensors[plan.name]
        stem = plan.name.removesuffix(".weight").removesuffix(".bias").removesuffix(".scale")
        block = stem.split(".")[1] if stem.startswith("blk.") else ""
        assert stem.replace(f"blk.{block}.", "blk.{bid}.") in stems
        weights = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).view(plan.shape)
        exact = torch.stack([_exact(checkpoint, plan, source) for source in plan.sources]).view(plan.shape)
        bound = 0.01 if plan.packed and plan.kind is None else 1e-3
        assert (weights - exact).norm() <= bound * exact.norm(), plan.name
        assert tensor.tensor_type.name == plan.type and (plan.type == "F32" or len(plan.shape) > 1)
    _check_experts(checkpoint, tensors)


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "gemma2"])
def test_a_file_is_the_same_made_row_by_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large head is encoded a few rows at a time."""
    checkpoint = checkpoint_of(tmp_path / "in", built(name))
    files, said = [], []
    for folder, numbers in ((tmp_path / "whole", 1 << 30), (tmp_path / "rows", 1), (tmp_path / "odd", 1000)):
        monkeypatch.setattr(gguf_export, "NUMBERS_AT_ONCE", numbers)
        folder.mkdir()
        said.append(gguf_export.write(checkpoint, folder))
        files.append((folder / gguf_export.FILE).read_bytes())
    assert files[0] == files[1] == files[2] and said[0] == said[1] == said[2]


def _exact(checkpoint: Checkpoint, plan: Any, source: str) -> torch.Tensor:
    weight = dequantize(checkpoint.packed(source)) if plan.packed else checkpoint.tensor(source)
    weight = weight if plan.order is None else weight[plan.order]
    if plan.blocks is not None:
        weight = weight.view(len(weight), len(plan.blocks), -1)[:, plan.blocks].reshape(weight.shape)
    return plan.make(weight).float() if plan.make else weight.float()


def _check_experts(checkpoint: Checkpoint, tensors: Mapping[str, Any]) -> None:
    """A stack per layer and role, of all experts in their order."""
    import gguf

    for linear in checkpoint.record.formats:
        if ".experts." not in linear:
            continue
        block, (role, expert) = linear.split(".")[2], linear.split(".")[-2:]
        stack = tensors[f"blk.{block}.ffn_{role.removesuffix('_proj')}_exps.weight"]
        found = gguf.dequantize(stack.data, stack.tensor_type)[int(expert)]
        weight = dequantize(checkpoint.packed(linear)).numpy()
        assert np.abs(found - weight).max() <= 1e-3 * np.abs(weight).max()


BOUNDS = {"gpt_oss": 2e-2}
"""Of a log-probability: llama.cpp has yarn with whole bounds."""


class GeluOfLlamaCpp(nn.Module):
    """It looks GELU up in a table from 16 bits to 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def with_its_gelu(model: nn.Module) -> None:
    fused = [module._fused for module in model.modules() if isinstance(module, Experts)]
    for module in (*model.modules(), *fused):
        if type(getattr(module, "act_fn", None)).__name__ == "GELUTanh":
            module.act_fn = GeluOfLlamaCpp()


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    """All logits of the last position, from the exported weights in 32 bits."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is the peer that this compares with")
    model = built(name, **whole_window(name))
    checkpoint = checkpoint_of(tmp_path / "in", model, zero_points="symmetric")
    in_float32(exported(checkpoint, tmp_path / "out"), tmp_path / "f32.gguf")
    with_checkpoints_weights(model, checkpoint)
    with_its_gelu(model)
    tokens = random_tokens(1, 40)
    expected = model(tokens).logits[0, -1].log_softmax(-1)
    found = last_position(tmp_path / "f32.gguf", tokens[0].tolist(), VOCABULARY)
    assert found.keys() == set(range(VOCABULARY))
    assert max(abs(found[i] - float(expected[i])) for i in found) <= BOUNDS.get(name, 1e-4)


def test_experts_with_several_formats_are_refused(tmp_path: Path) -> None:
    model = built("qwen3_moe")
    odd = "model.layers.0.mlp.experts.up_proj.2"
    checkpoint = checkpoint_of(tmp_path / "in", model, formats={odd: "int3"})
    assert checkpoint.record.formats[odd] == "int3"
    for to in ("gguf", "mlx"):
        with pytest.raises(AmqError, match=r"experts\.up_proj.*--tie experts"):
            export(tmp_path / "in", to, tmp_path / to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize("to", ["gptq", "auto-round", "recipe"])
def test_other_exports_say_why_they_hold_no_experts(to: str, tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "in", built("mixtral"))
    with pytest.raises(AmqError, match=f"the {to} export holds no experts.*--to mlx or gguf"):
        export(tmp_path / "in", to, tmp_path / "out")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob True; this model has False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "experts in every layer"),
        ("olmoe", {"num_key_value_heads": 2}, "as many heads of keys"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar 16"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "every second layer"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "every fourth layer"),
        ("glm4_moe", {"n_group": 2, "topk_group": 1}, "n_group 1"),
        ("qwen3_next", {"linear_key_head_dim": 16}, "as wide as those of values; this model 16 and 32"),
        ("ministral3", {"rope_parameters": {**MINISTRAL, "mscale": 0.5}}, "mscale 1"),
        ("gemma4_text", {"layer_types": [*SLIDING, SLIDING[0], SLIDING[1]][::-1]}, "the last two layers"),
        ("gemma4_text", {"vocab_size_per_layer_input": 256}, "of 256 of 288"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention None or 'vision'"),
        ("qwen3_5_text", {"linear_value_head_dim": 16}, "no multiple of 32"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    config = built(name, **options).config.to_dict()
    with pytest.raises(AmqError, match=message):
        find_family(config)


@pytest.mark.parametrize(
    ("name", "nested", "expected"),
    [
        ("model.layers.1.mlp.up_proj.weight", False, "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.2.mlp.up_proj.weight", False, None),
        ("mtp.layers.0.mlp.up_proj.weight", False, None),
        ("model.language_model.layers.1.input_layernorm.weight", True, "model.layers.1.input_layernorm.weight"),
        ("model.language_model.embed_tokens.weight", True, "model.embed_tokens.weight"),
        ("model.visual.merger.norm.weight", True, None),
        ("lm_head.weight", True, "lm_head.weight"),
    ],
)
def test_names_in_the_text_model_of_two_layers(name: str, nested: bool, expected: str | None) -> None:
    assert text_name(name, 2, nested) == expected


def test_orders() -> None:
    assert neox_order(1, 4).tolist() == [0, 2, 1, 3]
    config = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    assert value_order(config, 1).tolist() == [0, 2, 1, 3]
    assert value_order(config, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_mlx_has_stacks_of_experts(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "in", built(name))
    mlx_export.write(checkpoint, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    options = json.loads((tmp_path / "config.json").read_text())
    place = {"mixtral": "block_sparse_moe.switch_mlp", "gpt_oss": "mlp.experts"}.get(name, "mlp.switch_mlp")
    for role, (rows, columns) in {"gate_proj": (32, 64), "down_proj": (64, 32)}.items():
        rows, columns = (rows * 3, columns) if name != "qwen3_moe" and role == "gate_proj" else (rows, columns)
        columns = columns * 3 if name != "qwen3_moe" and role == "down_proj" else columns
        module = f"model.layers.1.{place}.{role}"
        assert options["quantization"][module] == {"group_size": 32, "bits": 4}
        words, scales, biases = (tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        assert words.shape == (4, rows, columns // 8) and scales.shape == (4, rows, columns // 32)
        packed = checkpoint.packed(f"model.layers.1.mlp.experts.{role}.3")
        codes = words[3].view(torch.int32).unsqueeze(-1) >> torch.arange(0, 32, 4) & 15
        weight = codes.reshape(rows, -1, 32) * scales[3].unsqueeze(-1) + biases[3].unsqueeze(-1)
        assert torch.equal(weight.flatten(1), dequantize(packed))
    assert options["num_experts"] == 4
    assert (f"model.layers.1.{place}.gate_proj.bias" in tensors) == (name == "gpt_oss")
    if name == "mixtral":
        assert "model.layers.0.block_sparse_moe.gate.weight" in tensors


def test_mlx_refuses_experts_whose_names_were_not_compared(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "in", built("granitemoe"))
    with pytest.raises(AmqError, match="'granitemoe'.*--to gguf"):
        mlx_export.write(checkpoint, tmp_path)


def test_a_packed_embedding_stays_packed_or_becomes_plain(tmp_path: Path) -> None:
    import gguf

    checkpoint = checkpoint_of(tmp_path / "in", built("llama"))
    embedding = dequantize(checkpoint.packed("model.embed_tokens"))
    export(tmp_path / "in", "gguf", tmp_path / "gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "gguf" / gguf_export.FILE).tensors}
    found = tensors["token_embd.weight"]
    assert found.tensor_type.name == "Q5_1" and "output.weight" in tensors
    assert np.abs(gguf.dequantize(found.data, found.tensor_type) - embedding.numpy()).max() < 1e-3
    plain = DenseOuter(checkpoint)
    assert set(plain.outer) == {"lm_head", "model.embed_tokens"} and not plain.record.embedding
    assert torch.equal(plain.tensor("model.embed_tokens.weight"), embedding.to(plain.dtype))
    mlx_export.write(checkpoint, tmp_path)
    assert "model.embed_tokens.scales" in load_file(tmp_path / "model.safetensors")
    (tmp_path / "recipe").mkdir()
    recipe_export.write(checkpoint, tmp_path / "recipe")
    assert "--token-embedding-type q5_0 " in (tmp_path / "recipe" / "llama-quantize.sh").read_text()


def sentencepiece(merges: list[tuple[str, str]], prefix: bool = True) -> dict[str, Any]:
    """tokenizer.json of one with the given merges."""
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if prefix:
        steps = [{"type": "Prepend", "prepend": "▁"}, *steps]
    pieces = ["<unk>", "<0x0A>", "▁", "a", "b", "ab", "▁a", "▁ab"]
    model = {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges, "unk_token": "<unk>"}
    unknown = {"content": "<unk>", "id": 0, "special": True}
    normalizer = {"type": "Sequence", "normalizers": steps}
    return {"model": model, "added_tokens": [unknown], "normalizer": normalizer, "pre_tokenizer": None}


def test_scores_of_sentencepiece(tmp_path: Path) -> None:
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁a", "b")]
    assert sentencepiece_scores(sentencepiece(merges), 9, tmp_path) == [0, 0, 0, 0, 0, 0, -1, -2, 0]
    with pytest.raises(AmqError, match="does not merge '▁a' and 'b'"):
        sentencepiece_scores(sentencepiece(merges[:-1]), 8, tmp_path)
    assert leading_space(sentencepiece(merges), tmp_path) and not leading_space(sentencepiece(merges, False), tmp_path)
    lower = sentencepiece(merges) | {"pre_tokenizer": {"type": "Digits"}}
    with pytest.raises(AmqError, match="Digits"):
        leading_space(lower, tmp_path)


def test_a_sentencepiece_tokenizer_in_the_file(tmp_path: Path) -> None:
    import gguf

    checkpoint = checkpoint_of(tmp_path / "in", built("llama", vocab_size=320))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizers.gemma(), **small_tokenizers.NAMES
    ).save_pretrained(checkpoint.folder)
    export(tmp_path / "in", "gguf", tmp_path / "out")
    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "out" / gguf_export.FILE).fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in fields
    assert fields["tokenizer.ggml.scores"][:2] == [0, 0] and len(fields["tokenizer.ggml.scores"]) == 320
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[0] == gguf.TokenType.UNKNOWN and kinds[1] == gguf.TokenType.CONTROL and kinds[3] == gguf.TokenType.BYTE
