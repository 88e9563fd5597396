"""The mlx and gguf exports: bytes read back by readers of a few lines, the gguf package and, where installed, mlx."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_tokenizers import with_merges
from helpers.tiny_models import ARCHITECTURES
from safetensors.torch import load_file
from torch import Tensor

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import Checkpoint, open_checkpoint, write_checkpoint
from amq.errors import AmqError
from amq.export import gguf as gguf_export
from amq.export import mlx as mlx_export
from amq.export.gguf_plans import make_plans
from amq.export.gguf_tokenizer import pre_tokenizer_rule
from amq.export.gguf_types import TYPES, decode, encode, find_type
from amq.formats import FORMATS, get_format
from amq.model.gguf.families import find_family
from amq.model.gguf.orders import key_rows
from amq.model.gguf.rope_keys import rope_frequencies
from amq.model.inventory import take_inventory
from amq.packing import PackedWeight, dequantize, pack_codes
from amq.quantize.quantizers import rtn

ALL = tuple(FORMATS)


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    group_size: int = 32,
    dtype: torch.dtype = torch.float32,
    head: str = "",
    **options,
) -> Checkpoint:
    """A tiny model, its linears rounded to all formats in turn, its head to the format `head`."""
    model = ARCHITECTURES[family].build(**{"num_hidden_layers": 2, **options})
    linears = take_inventory(model).linears
    formats = {s.name: ALL[i % len(ALL)] for i, s in enumerate(linears)}
    state = model.state_dict()
    packed = {
        name: rtn.quantize([state[f"{name}.weight"]], [get_format(fmt)], group_size)[0][fmt]
        for name, fmt in formats.items()
    }
    shapes = {s.name: (s.out_features, s.in_features) for s in linears}
    embedding = {"model.embed_tokens": "lm_head"} if head and model.config.tie_word_embeddings else {}
    if head:
        packed["lm_head"] = rtn.quantize([model.lm_head.weight], [get_format(head)], group_size)[0][head]
        formats["lm_head"], shapes["lm_head"] = head, tuple(model.lm_head.weight.shape)
    stored = packed.keys() | embedding.keys()
    others = {n: p.detach().to(dtype) for n, p in model.named_parameters() if n.removesuffix(".weight") not in stored}
    record = QuantizationRecord(formats, shapes, group_size, head="lm_head" if head else "", embedding=embedding)
    write_checkpoint(folder, model.config.to_dict(), record, packed, others, extras=with_merges().save_pretrained)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A llama with groups of 64, of which down_proj's 96 input features leave a ragged one."""
    return make_checkpoint(tmp_path_factory.mktemp("export") / "llama", group_size=64)


def random_packed(fmt: str, zero_points: Callable[[Tensor], Tensor], group_size: int = 64) -> PackedWeight:
    """12 rows of 96 codes, which end with half a group of 64."""
    generator = torch.Generator().manual_seed(0)
    record = get_format(fmt)
    codes = torch.randint(record.levels, (12, 96), generator=generator, dtype=torch.uint8)
    groups = (12, -(-96 // group_size))
    scale = (torch.rand(groups, generator=generator) * 0.02 + 0.001).half()
    zero_point = zero_points(torch.rand(groups, generator=generator) * record.max_code).half()
    return PackedWeight(record, 96, group_size, pack_codes(codes, record), scale, zero_point)


def read_words(words: np.ndarray, bits: int, count: int) -> list[int]:
    """MLX's uint32 words of one row: code k is the bits from k·bits on."""
    stream = sum(int(word) << 32 * i for i, word in enumerate(words))
    return [stream >> bits * k & (1 << bits) - 1 for k in range(count)]


@pytest.mark.parametrize("fmt", ALL)
@pytest.mark.parametrize("group_size", [32, 64])
def test_mlx_words_scales_and_biases_give_our_weights_bit_for_bit(fmt, group_size):
    packed = random_packed(fmt, lambda z: z, group_size)
    size = mlx_export.group_size("x", 96, group_size)
    parts = {name: tensor.numpy() for name, tensor in mlx_export.mlx_weight(packed, size).items()}
    bits = int(packed.format.code_bits)
    codes = np.array([read_words(row, bits, 96) for row in parts["weight"]], dtype=np.float32)
    scales, biases = (np.repeat(parts[name], size, axis=1) for name in ("scales", "biases"))
    assert parts["weight"].dtype == np.uint32 and parts["scales"].dtype == parts["biases"].dtype == np.float32
    assert np.array_equal(codes * scales + biases, dequantize(packed).numpy())


def test_mlx_folder(checkpoint, tmp_path):
    facts = mlx_export.write(checkpoint, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and "auto_map" not in config
    assert config["rope_theta"] == 10000.0  # mlx-lm does not read rope_parameters
    for linear, fmt in checkpoint.record.formats.items():
        size = 32 if "down_proj" in linear else 64  # 96 = 64 + 32
        assert config["quantization"][linear] == {"group_size": size, "bits": get_format(fmt).code_bits}
        assert tensors[f"{linear}.scales"].shape[1] == checkpoint.record.shapes[linear][1] // size
    assert {n for n in tensors if not n.endswith((".scales", ".biases"))} == {
        *(f"{linear}.weight" for linear in checkpoint.record.formats),
        *checkpoint.other_names,
    }
    assert "down_proj" in facts["ragged groups"]


def test_mlx_computes_in_float32_where_the_checkpoint_has_16_bits(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    mlx_export.write(checkpoint, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.float32


def test_mlx_itself_dequantizes_to_our_weights(checkpoint, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="needs the packages mlx and mlx-cpu")
    mlx_export.write(checkpoint, tmp_path)
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    options = json.loads((tmp_path / "config.json").read_text())["quantization"]
    for linear in checkpoint.record.formats:
        parts = (tensors[f"{linear}.{part}"] for part in ("weight", "scales", "biases"))
        weight = np.array(mx.dequantize(*parts, **options[linear]))
        assert np.array_equal(weight, dequantize(checkpoint.packed(linear)).numpy()), linear


def test_mlx_refuses_rows_that_no_group_fits():
    with pytest.raises(AmqError, match="model.x: its 80 input features"):
        mlx_export.group_size("model.x", 80, 64)


@pytest.mark.parametrize("fmt", ALL)
@pytest.mark.parametrize("group_size", [32, 64])
def test_gguf_types_with_a_minimum_hold_codes_up_to_the_rounding_of_the_minimum(fmt, group_size):
    packed = random_packed(fmt, lambda z: z, group_size)
    kind = find_type([packed])
    if packed.format.levels > max(t.levels for t in TYPES if t.offset is None):
        assert kind is None
        step = dequantize(packed).abs().amax() / 127
        data = encode(packed, kind)
        assert np.abs(decode(data, "Q8_0") - dequantize(packed).numpy()).max() <= 0.51 * float(step)
        return
    assert kind.offset is None and kind.levels >= packed.format.levels
    minimum = (-packed.zero_point.float() * packed.scale.float()).half().float()
    rounded = dequantize(replace(packed, zero_point=torch.zeros_like(packed.zero_point)))
    expected = rounded + minimum.repeat_interleave(group_size, dim=1)[:, :96]
    assert np.array_equal(decode(encode(packed, kind), kind.name), expected.numpy())


@pytest.mark.parametrize(
    "fmt, zero_point, name",
    [("int2", 2, "Q4_0"), ("int3", 4, "Q4_0"), ("int4", 8, "Q4_0"), ("int4", 3, "Q4_1"), ("int5", 16, "Q5_0")]
    + [("int6", 32, "Q8_0"), ("int6", 5, "Q8_0"), ("int8", 128, "Q8_0")],
)
def test_gguf_holds_whole_zero_points_exactly_where_a_type_has_the_levels(fmt, zero_point, name):
    packed = random_packed(fmt, lambda z: torch.full_like(z, zero_point))
    kind = find_type([packed])
    assert kind.name == name
    if kind.offset is not None:
        assert np.array_equal(decode(encode(packed, kind), name), dequantize(packed).numpy())


def test_gguf_int8_with_another_whole_zero_point_is_quantized_again():
    assert find_type([random_packed("int8", lambda z: torch.full_like(z, 100))]) is None


def rotated(weight: Tensor, x: Tensor, angle: float, heads: int, neighbours: bool) -> Tensor:
    """Heads of weight · x, every pair of rows turned by `angle`·(its number + 1)."""
    y = (weight @ x).view(heads, -1)
    half = y.shape[1] // 2
    a, b = (y[:, 0::2], y[:, 1::2]) if neighbours else (y[:, :half], y[:, half:])
    turn = angle * (torch.arange(half) + 1)
    return torch.stack([a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()])


def test_gguf_row_order_turns_halves_into_neighbours():
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    weight, x = torch.randn(32, 8), torch.randn(8)
    order = key_rows(config, 32)
    theirs, ours = rotated(weight[order], x, 0.3, 2, True), rotated(weight, x, 0.3, 2, False)
    assert torch.allclose(theirs, ours)


def test_gguf_file(checkpoint, tmp_path):
    gguf = pytest.importorskip("gguf")
    facts = gguf_export.write(checkpoint, tmp_path)
    reader = gguf.GGUFReader(tmp_path / gguf_export.FILE)
    tensors = {t.name: t for t in reader.tensors}
    values = {name: field.contents() for name, field in reader.fields.items()}
    plans = make_plans(checkpoint, checkpoint.config, find_family(checkpoint.config))
    assert {p.name for p in plans} == set(tensors) and len(plans) == len(tensors)
    for plan in plans:
        tensor = tensors[plan.name]
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).view(plan.shape)
        linear = plan.source in checkpoint.record.formats
        exact = dequantize(checkpoint.packed(plan.source)) if linear else checkpoint.tensor(plan.source)
        exact = exact if plan.order is None else exact[plan.order]
        bound = 0.01 if linear and plan.kind is None else 1e-3 if linear else 5e-4
        assert tensor.tensor_type.name == plan.type
        assert (weight - exact).norm() <= bound * exact.norm(), plan
    assert values["general.architecture"] == "llama" and values["llama.attention.head_count_kv"] == 2
    assert values["tokenizer.ggml.pre"] == "gpt-2" and values["tokenizer.ggml.merges"] == ["h e", "he l"]
    assert values["tokenizer.ggml.add_bos_token"] and not values["tokenizer.ggml.add_eos_token"]
    assert values["tokenizer.ggml.token_type"][253:] == [1, 1, 3] and values["tokenizer.ggml.bos_token_id"] == 255
    assert "exact" not in facts["int3 → Q4_1"] and "5.000 bits per weight (" in facts["int3 → Q4_1"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_stays_packed(tied, tmp_path):
    """Tied, under the embedding's name, from which both tools take the head too."""
    gguf = pytest.importorskip("gguf")
    checkpoint = make_checkpoint(tmp_path / "m", head="int8", tie_word_embeddings=tied)
    head = dequantize(checkpoint.packed("lm_head"))
    facts = gguf_export.write(checkpoint, tmp_path)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / gguf_export.FILE).tensors}
    found = tensors["token_embd.weight" if tied else "output.weight"]
    assert found.tensor_type.name == "Q8_0" and ("output.weight" in tensors) != tied
    weight = torch.tensor(gguf.dequantize(found.data, found.tensor_type))
    assert 0 < (weight - head).norm() < 0.01 * head.norm() and "quantized again" in str(facts)
    mlx_export.write(checkpoint, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    name = "model.embed_tokens" if tied else "lm_head"
    groups = 64 // 32
    codes = saved[f"{name}.weight"].view(torch.uint8).view(256, groups, 32).float()
    restored = codes * saved[f"{name}.scales"].unsqueeze(-1) + saved[f"{name}.biases"].unsqueeze(-1)
    assert torch.equal(restored.flatten(1), head)
    assert any(n.startswith("lm_head") for n in saved) != tied
    options = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert options[name] == {"group_size": 32, "bits": 8}


@pytest.mark.parametrize("family, moved", [("mistral", 4), ("qwen2", 0), ("qwen3", 0)])
def test_gguf_families_map_every_tensor(family, moved, tmp_path):
    pytest.importorskip("gguf")
    checkpoint = make_checkpoint(tmp_path / "m", family)
    config = checkpoint.config
    plans = make_plans(checkpoint, config, find_family(config))
    assert sum(p.order is not None for p in plans) == moved
    assert ("output.weight" in {p.name for p in plans}) == (not config["tie_word_embeddings"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "opt"}, "this model is 'opt'"),
        ({"hidden_act": "gelu"}, "this model has 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ],
)
def test_gguf_refuses_before_it_writes(checkpoint, tmp_path, change, message):
    other = open_checkpoint(checkpoint.folder)
    other.config = {**checkpoint.config, **change}
    with pytest.raises(AmqError, match=message):
        gguf_export.write(other, tmp_path)
    assert not list(tmp_path.iterdir())


def test_gguf_refuses_a_missing_tokenizer_and_an_unknown_rule(tmp_path):
    pytest.importorskip("gguf")
    checkpoint = make_checkpoint(tmp_path / "m")
    (checkpoint.folder / "tokenizer.json").unlink()
    with pytest.raises(AmqError, match="no tokenizer"):
        gguf_export.write(checkpoint, tmp_path)
    with pytest.raises(AmqError, match="x+"):
        split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated"}
        pre_tokenizer_rule({"pre_tokenizer": split, "normalizer": None}, tmp_path)


def test_gguf_rope_frequencies_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=8, rope_parameters=rope, max_position_embeddings=4096)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = rope_frequencies(config.to_dict())
    plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
    assert factors.dtype == np.float32 and len(set(factors.tolist())) > 3
    np.testing.assert_allclose(plain / factors, expected.numpy(), rtol=1e-5)
