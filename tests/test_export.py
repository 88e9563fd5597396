"""The export frame, and gptq, auto-round and recipe: integers read back by a reader of a few lines, rules by `re`."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import byte_tokenizer, tiny_llama
from safetensors.torch import load_file

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import Checkpoint, open_checkpoint, write_checkpoint, write_tensors
from amq.errors import AmqError
from amq.export import EXPORTS, export
from amq.export.__main__ import main
from amq.export.gptq import dynamic_rules
from amq.formats import FORMATS, get_format
from amq.model.inventory import take_inventory
from amq.packing import dequantize, unpack_codes
from amq.quantize.quantizers import rtn

GPTQ_FORMATS = ("int2", "int3", "int4", "int8")


def make(
    folder: Path, formats=GPTQ_FORMATS, zero_points: str = "integer", group_size: int = 32, head: str = "", **options
) -> Checkpoint:
    """A tiny Llama whose linears have `formats` in turn, and zero points of a kind; its head is packed as `head`."""
    model = tiny_llama(**options)
    linears = take_inventory(model).linears
    chosen = {s.name: formats[i % len(formats)] for i, s in enumerate(linears)}
    packed = {
        s.name: rtn.quantize(
            [model.get_submodule(s.name).weight], [get_format(chosen[s.name])], group_size, None, zero_points
        )[0][chosen[s.name]]
        for s in linears
    }
    shared = [tuple(s.name for s in linears if s.block == b and s.role[-6:-5] in "qkv") for b in range(2)]
    shapes = {s.name: (s.out_features, s.in_features) for s in linears}
    embedding = {"model.embed_tokens": "lm_head"} if head and model.config.tie_word_embeddings else {}
    if head:
        weight = model.lm_head.weight
        packed["lm_head"] = rtn.quantize([weight], [get_format(head)], group_size)[0][head]
        chosen["lm_head"], shapes["lm_head"] = head, tuple(weight.shape)
    record = QuantizationRecord(chosen, shapes, group_size, "rtn", tuple(shared), "lm_head" if head else "", embedding)
    others = {
        n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in packed.keys() | embedding.keys()
    }
    config = {**model.config.to_dict(), "auto_map": {"AutoConfig": "modeling_amq.Config"}}
    write_checkpoint(folder, config, record, packed, others, lambda path: byte_tokenizer().save_pretrained(path))
    return open_checkpoint(folder)


def read_stream(words: list[int], bits: int, count: int) -> list[int]:
    """`count` unsigned integers of `bits` bits from 32-bit words, lowest bit first."""
    stream = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return [stream >> bits * i & (1 << bits) - 1 for i in range(count)]


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("to", ["gptq", "auto-round"])
@pytest.mark.parametrize(("zero_points", "less"), [("integer", 0), ("symmetric", 1)])
def test_an_independent_reader_finds_our_codes_and_zero_points(tmp_path, to, zero_points, less):
    checkpoint = make(tmp_path / "in", zero_points=zero_points)
    export(tmp_path / "in", to, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for linear, name in checkpoint.record.formats.items():
        packed, bits = checkpoint.packed(linear), int(name.removeprefix("int"))
        codes = unpack_codes(packed.qweight, packed.format, packed.in_features)
        qweight, qzeros = saved[f"{linear}.qweight"], saved[f"{linear}.qzeros"]
        assert qweight.dtype == qzeros.dtype == torch.int32
        assert qweight.shape == (packed.in_features * bits // 32, packed.out_features)
        for row in (0, packed.out_features - 1):
            assert read_stream(qweight[:, row].tolist(), bits, packed.in_features) == codes[row].tolist(), linear
        for group in range(packed.scale.shape[1]):
            stored = read_stream(qzeros[group].tolist(), bits, packed.out_features)
            assert [z + less for z in stored] == packed.zero_point[:, group].int().tolist(), linear
        assert torch.equal(saved[f"{linear}.scales"], packed.scale.T)
        if to == "gptq":
            assert saved[f"{linear}.g_idx"].tolist() == [k // 32 for k in range(packed.in_features)]
    for name in checkpoint.other_names:
        assert torch.equal(saved[name], checkpoint.tensor(name))
    assert settings_of(tmp_path / "out")["sym"] is bool(less)


def test_dynamic_rules_give_each_linear_its_bits_and_stay_few(tmp_path):
    checkpoint = make(tmp_path / "in")
    export(tmp_path / "in", "gptq", tmp_path / "out")
    settings = settings_of(tmp_path / "out")
    assert settings["checkpoint_format"] == "gptq_v2" and settings["group_size"] == 32
    for linear, name in checkpoint.record.formats.items():
        found = [r["bits"] for rule, r in settings["dynamic"].items() if re.match(rule.removeprefix("+:"), linear)]
        assert (found or [settings["bits"]]) == [int(name.removeprefix("int"))], linear
    assert not any(re.match(rule.removeprefix("+:"), "lm_head") for rule in settings["dynamic"])
    by_role = {f"model.layers.{i}.{r}": "int2" if r == "a" else "int4" for i in range(24) for r in "abc"}
    assert len(dynamic_rules(by_role, "int4")) == 1  # 24 linears, one rule


def test_auto_round_names_each_linear_and_what_stands_against_vllm(tmp_path):
    checkpoint = make(tmp_path / "in", zero_points="symmetric")
    facts = export(tmp_path / "in", "auto-round", tmp_path / "out")
    settings = settings_of(tmp_path / "out")
    assert settings["packing_format"] == "auto_round:auto_gptq" and settings["block_name_to_quantize"] == "model.layers"
    for linear, name in checkpoint.record.formats.items():
        assert settings["extra_config"].get(linear, settings)["bits"] == int(name.removeprefix("int"))
    assert "--tie qkv,gate_up" in facts["vLLM"] and "layers.0.self_attn.q_proj int2" in facts["vLLM"]
    make(tmp_path / "uniform", ("int4",), "symmetric")
    assert "nothing" in export(tmp_path / "uniform", "auto-round", tmp_path / "uniform-out")["vLLM"]
    make(tmp_path / "asymmetric", ("int4",))
    facts = export(tmp_path / "asymmetric", "auto-round", tmp_path / "asymmetric-out")
    assert settings_of(tmp_path / "asymmetric-out")["packing_format"] == "auto_round" and "symmetric" in facts["vLLM"]


@pytest.mark.parametrize("to", ["gptq", "auto-round"])
def test_what_cannot_be_expressed_is_refused_with_the_reason(tmp_path, to):
    cases = {
        r"q_proj has .* --zero-points integer": {"zero_points": "fractional"},
        r"cannot hold .*down_proj: its 96 input features .* group size 64": {"group_size": 64},
        r"cannot hold .*k_proj: its 16 output features are not a multiple of 32": {"num_key_value_heads": 1},
    }
    if to == "gptq":
        cases[r"GPTQ has no int5, which .*q_proj.* --formats int2,int3,int4,int8"] = {"formats": ("int5",)}
    for i, (reason, options) in enumerate(cases.items()):
        make(tmp_path / f"in{i}", **options)
        with pytest.raises(AmqError, match=reason):
            export(tmp_path / f"in{i}", to, tmp_path / f"out{i}")
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"in{j}" for j in range(i + 1)]  # nothing half-written


@pytest.mark.parametrize("to", ["gptq", "auto-round"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_is_written_as_a_plain_tensor(tmp_path, to, tied):
    checkpoint = make(tmp_path / "in", ("int4",), head="int6", tie_word_embeddings=tied)
    facts = export(tmp_path / "in", to, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    head = dequantize(checkpoint.packed("lm_head"))
    assert torch.equal(saved["model.embed_tokens.weight" if tied else "lm_head.weight"], head)
    assert {"lm_head.weight", "model.embed_tokens.weight"} & saved.keys() == (
        {"model.embed_tokens.weight"} if tied else {"lm_head.weight", "model.embed_tokens.weight"}
    )
    assert not any(name.startswith("lm_head.q") for name in saved)
    assert facts["lm_head"] == "int6 in the checkpoint, dequantized to float32 here"
    assert facts["lm_head"] in (tmp_path / "out" / "README.md").read_text()
    assert "14 linears int4, lm_head int6" in (tmp_path / "out" / "README.md").read_text()


def test_the_folder_is_whole_and_the_source_untouched(tmp_path, capsys):
    make(tmp_path / "in")
    before = digest(tmp_path / "in")
    assert main([str(tmp_path / "in"), "--to", "gptq", "--output", str(tmp_path / "out")]) == 0
    assert "zero points: asymmetric" in capsys.readouterr().out
    assert digest(tmp_path / "in") == before
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    readme = (tmp_path / "out" / "README.md").read_text()
    assert 'GPTQModel.load("out"' in readme and "{folder}" not in readme
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_bad_calls_are_refused(tmp_path):
    make(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    with pytest.raises(AmqError, match="not empty"):
        export(tmp_path / "in", "gptq", tmp_path / "full")
    with pytest.raises(AmqError, match="--to must be one of gptq, .*, got 'awq'"):
        export(tmp_path / "in", "awq", tmp_path / "out")
    weights = tmp_path / "in" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(AmqError, match="hash differs"):
        export(tmp_path / "in", "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "kept").read_text() == "mine"


def test_every_export_has_a_module_with_its_two_names():
    import importlib

    for name, entry in EXPORTS.items():
        module = importlib.import_module(f"amq.export.{name.replace('-', '_')}")
        assert callable(module.write) and module.LOADING.strip() and entry.help


def test_weight_files_are_split_and_indexed(tmp_path):
    tensors = {f"t{i}": torch.full((10,), i, dtype=torch.int32) for i in range(5)}
    write_tensors(tmp_path, tensors.items(), shard_size=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200 and len(set(index["weight_map"].values())) == 3
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    assert len(list(tmp_path.iterdir())) == 4


def test_no_two_large_tensors_are_held_for_a_file(tmp_path):
    """Each of two is written before the next is made; what is small shares a file, and none is empty."""
    files = []

    def made():
        for i, size in enumerate((1, 12, 12, 1, 1)):
            files.append(len(list(tmp_path.iterdir())))
            yield f"t{i}", torch.full((size,), i, dtype=torch.int32)

    write_tensors(tmp_path, made(), shard_size=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert [index["weight_map"][f"t{i}"][6:11] for i in range(5)] == ["00001", "00001", "00002", "00003", "00003"]
    assert files == [0, 0, 1, 2, 2]


def test_recipe_names_gguf_tensors_and_gives_each_tool_its_settings(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the recipe takes names from it")
    checkpoint = make(tmp_path / "in", tuple(FORMATS), "fractional", hidden_size=256, head_dim=64)
    facts = export(tmp_path / "in", "recipe", tmp_path / "out")
    make(tmp_path / "head", hidden_size=256, head_dim=64, head="int6")
    assert "q6_k in llama.cpp" in export(tmp_path / "head", "recipe", tmp_path / "out-head")["lm_head"]
    assert "--output-tensor-type q6_k model-f16.gguf" in (tmp_path / "out-head" / "llama-quantize.sh").read_text()
    assert "lm_head" not in (tmp_path / "out-head" / "autoround-layer-config.json").read_text()
    assert not (tmp_path / "out" / "config.json").exists() and facts["int2 in llama.cpp"] == "q2_k"
    lines = dict(line.split("=") for line in (tmp_path / "out" / "llama-tensor-types.txt").read_text().split())
    assert len(lines) == len(checkpoint.record.formats)
    assert lines["blk.0.attn_q"] == "q2_k" and lines["blk.0.attn_k"] == "q3_k" and lines["blk.0.attn_v"] == "q4_k"
    assert lines["blk.0.ffn_down"] == "q4_0"  # 96 input features: not a super-block, so not a k-quant
    assert all(type_.upper() in {t.name.upper() for t in gguf.GGMLQuantizationType} for type_ in lines.values())
    settings = json.loads((tmp_path / "out" / "autoround-layer-config.json").read_text())
    dynamic = json.loads((tmp_path / "out" / "gptqmodel-dynamic.json").read_text())
    for linear, name in checkpoint.record.formats.items():
        bits = int(name.removeprefix("int"))
        assert settings["layer_config"][linear] == {"bits": bits, "group_size": 32}
        rules = [r["bits"] for rule, r in dynamic["dynamic"].items() if re.match(rule.removeprefix("+:"), linear)]
        assert (rules or [dynamic["bits"]]) == [bits]
