"""GGUF files: every family computes what its original computes; what a file says is translated or refused by name."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gguf_files import keys_of, weights_of, write_gguf
from helpers.tiny_models import COMMON, random_tokens, randomized
from safetensors import safe_open
from torch import nn

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.model.experts import unfuse
from amq.model.gguf import convert as gguf_convert
from amq.model.gguf.convert import check_conversion, dequantized, gguf_folder
from amq.model.gguf.file import read_gguf
from amq.model.gguf.rope import FREQUENCIES, LONG, SHORT
from amq.model.gguf.rope_keys import rope_frequencies
from amq.model.open import load_model
from amq.util.tensors import tensor_hash

pytestmark = pytest.mark.usefixtures("cache", "one_thread")
gguf = pytest.importorskip("gguf", reason="GGUF files need the gguf package")

THETA = {"rope_theta": 10000.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-bias": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama-wide": ("Llama", {"head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen2moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 48}),
    "qwen3moe": ("Qwen3Moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "phi3": ("Phi3", {"sliding_window": 24}),
    "phi3-partial": ("Phi3", {"rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.5}}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 7}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True}),
    "starcoder2": ("Starcoder2", {"tie_word_embeddings": True}),
    "nemotron": ("Nemotron", {}),
}


def build(family: str, **options: Any) -> nn.Module:
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, "num_hidden_layers": 2, **own, **options})
    torch.manual_seed(0)
    return randomized(getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).float(), 0)


def write(folder: Path, model: nn.Module, architecture: str = "llama", kind: str = "F32", **changes: Any) -> Path:
    """changes: keys (those of None are left out), weights, and a name for the file."""
    keys = {k: v for k, v in (keys_of(model, architecture) | changes.get("keys", {})).items() if v is not None}
    weights = weights_of(model, architecture) | changes.get("weights", {})
    return write_gguf(folder / changes.get("name", "tiny.gguf"), architecture, keys, weights, kind=kind)


def assert_same(path: Path, model: nn.Module, length: int = 60) -> nn.Module:
    found = load_model(str(path), attn_implementation="eager").model  # other kinds leave softcaps out
    tokens = random_tokens(1, length)
    torch.testing.assert_close(found(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    """Windows of 16 and 24 positions and 60 tokens: masks, softcaps, rotation and experts all matter."""
    model = build(family)
    path = write(tmp_path, model, family.partition("-")[0])
    found = assert_same(path, model)
    unfuse(model)
    for (name, ours), (expected_name, expected) in zip(found.named_parameters(), model.named_parameters(), strict=True):
        assert name == expected_name
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6, msg=name)  # norms: ± 1 in float32


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_bit_equal_to_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write(tmp_path, build("llama"), kind=kind)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    with safe_open(gguf_folder(path) / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected)
        assert {n: tensor_hash(file.get_tensor(n)) for n in expected} == {n: tensor_hash(expected[n]) for n in expected}


def test_config_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """But for what it drops: fingerprints of models that were searched before stay as they were."""
    from transformers import AutoConfig

    ids = {f".tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("bos", "eos", "padding", "unknown"))}
    path = write(tmp_path, build("llama"), keys={".general.name": "tiny", **ids})
    expected = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    found = load_model(str(path)).config.to_dict()
    for name in ("_name_or_path", "dtype", "architectures", "transformers_version"):
        expected.pop(name, None), found.pop(name, None)
    assert found == expected


# rotary scaling

LLAMA3 = {**THETA, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAR = {"max_position_embeddings": 512, "head_dim": 64}


def changed(model: nn.Module, plain: nn.Module, length: int) -> float:
    tokens = random_tokens(1, length)
    return float((model(tokens).logits - plain(tokens).logits).norm() / plain(tokens).logits.norm())


@pytest.mark.parametrize("original", [64, 100, 512])
def test_llama3_factors(original: int, tmp_path: Path) -> None:
    model = build("llama", **FAR, rope_parameters={**LLAMA3, "original_max_position_embeddings": original})
    assert changed(model, build("llama", **FAR), 200) > 0.01
    factors = rope_frequencies(model.config.to_dict())
    found = assert_same(write(tmp_path, model, weights={FREQUENCIES: factors}), model, 200)
    assert found.config.rope_parameters["rope_type"] == "llama3"


def test_published_llama3_factors_come_back_as_published(tmp_path: Path) -> None:
    rope = {**LLAMA3, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
    model = build("llama", head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    factors = rope_frequencies(model.config.to_dict())
    found = load_model(str(write(tmp_path, model, weights={FREQUENCIES: factors}))).config.rope_parameters
    assert {n: found[n] for n in rope} == rope


def test_factors_of_no_known_kind(tmp_path: Path) -> None:
    factors = np.linspace(1, 3, 8).astype(np.float32) ** 2
    model = build("llama")
    table = model.model.rotary_emb
    table.inv_freq /= torch.from_numpy(factors)
    assert_same(write(tmp_path, model, weights={FREQUENCIES: factors}), model, 100)


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        (
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.finetuned": True,
            },
        ),
    ],
    ids=["linear", "old-linear", "yarn"],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaling_keys(family: str, rope: dict[str, Any], keys: dict[str, Any], tmp_path: Path) -> None:
    model = build(family, rope_parameters={**THETA, **rope})
    assert changed(model, build(family), 100) > 0.01
    assert_same(write(tmp_path, model, family, keys=keys), model, 100)


def test_scaling_of_gemma3_is_for_full_attention(tmp_path: Path) -> None:
    both = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    model = build("gemma3", rope_parameters=both)
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    assert_same(write(tmp_path, model, "gemma3", keys=keys), model)


@pytest.mark.parametrize("length", [40, 100])
def test_longrope(length: int, tmp_path: Path) -> None:
    """Below and above the original 64 positions."""
    short, long = np.linspace(1, 2, 8).astype(np.float32), np.linspace(2, 9, 8).astype(np.float32)
    rope = {**THETA, "rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}
    model = build("phi3", rope_parameters={**rope, "original_max_position_embeddings": 64},
                  original_max_position_embeddings=64)  # fmt: skip
    keys = {"rope.scaling.original_context_length": 64}
    assert_same(write(tmp_path, model, "phi3", keys=keys, weights={SHORT: short, LONG: long}), model, length)


# what nobody takes


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"keys": {"attention.temperature_length": 3}}, "nothing translates the key llama.attention.temp"),
        ("llama", {"keys": {"logit_scale": 0.5}}, r"key llama.logit_scale \(0.5\)"),
        ("llama", {"keys": {"expert_count": 8}}, "llama.expert_count"),
        ("llama", {"keys": {"attention.scale": 0.5}}, "llama.attention.scale"),
        ("llama", {"keys": {"rope.dimension_count": 8}}, "other rotary frequencies than the file says"),
        ("llama", {"keys": {"rope.scaling.type": "spiral"}}, "'spiral' is not known"),
        ("llama", {"keys": {"attention.head_count": [4, 2]}}, "head_count differs from block to block"),
        ("llama", {"keys": {"context_length": None}}, "lacks the key llama.context_length"),
        ("llama", {"keys": {"block_count": 2**32 - 1}}, "block_count is 4294967295"),
        ("llama", {"keys": {"block_count": 10**6}}, "block_count is 1000000, more than its 21 tensors"),
        ("llama", {"keys": {"attention.head_count": 0}}, "head_count is 0, expected 1 to"),
        ("llama", {"keys": {"embedding_length": "64"}}, "must be a int, got '64'"),
        ("llama", {"keys": {"embedding_length": 128}}, "as its keys say"),
        ("llama", {"keys": {"rope.freq_base": float("nan")}}, "expected a finite number"),
        ("llama", {"weights": {"blk.0.attn_q_norm.weight": np.ones(16)}}, "nothing takes the tensor blk.0.attn_q_norm"),
        ("llama", {"weights": {FREQUENCIES: np.ones(7)}}, "rope_freqs.weight must hold 8 positive numbers"),
        ("llama", {"weights": {FREQUENCIES: -np.ones(8)}}, "rope_freqs.weight must hold 8 positive numbers"),
        ("llama", {"keys": {".general.type": "mmproj"}}, "is no model: its general.type is 'mmproj'"),
        ("qwen3moe", {"keys": {"expert_gating_func": 2}}, "expert_gating_func is 2, expected 1"),
        (
            "phi3",
            {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}},
            "type 'yarn' of a phi3 have no equal",
        ),
    ],
)
def test_refused(family: str, changes: dict[str, Any], message: str, tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, build(family), family, **changes)
    with pytest.raises(AmqError, match=message):
        load_model(str(path))
    assert not list(cache.glob("models/*"))


def test_neutral_keys_are_no_obstacle(tmp_path: Path) -> None:
    model = build("llama")
    keys = {"expert_count": 0, "attention.causal": True, "attention.scale": 0.25, "rope.scaling.type": "none",
            "rope.scaling.factor": 1.0, "attention.sliding_window": 0, ".split.count": 1}  # fmt: skip
    assert_same(write(tmp_path, model, keys=keys), model)


def test_other_architectures_go_through_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=256)
    model = randomized(GPT2LMHeadModel(config), 0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    weights = {}
    for name, parameter in model.named_parameters():
        turn = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        weights[target] = (parameter.T if turn else parameter).contiguous().numpy()
    weights["output.weight"] = weights["token_embd.weight"]
    keys = {"block_count": 2, "context_length": 1024, "embedding_length": 64, "feed_forward_length": 256,
            "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5}  # fmt: skip
    path = write_gguf(tmp_path / "gpt2.gguf", "gpt2", keys, weights)
    with caplog.at_level(logging.WARNING, "amq"):
        assert_same(path, model)
    assert "gpt2 is not translated by amq" in caplog.text
    scaled = write_gguf(tmp_path / "scaled.gguf", "gpt2", {**keys, "rope.scaling.factor": 2.0}, weights)
    with pytest.raises(AmqError, match=r"would drop the key gpt2.rope.scaling.factor"):
        load_model(str(scaled))


# parts


@pytest.fixture
def parts(tmp_path: Path) -> tuple[nn.Module, list[Path]]:
    """A model in three parts, the first without tensors, as llama.cpp can write them."""
    model = build("llama", tie_word_embeddings=True)
    keys, weights = keys_of(model, "llama"), weights_of(model, "llama")
    names = list(weights)
    paths = [tmp_path / f"m-0000{i + 1}-of-00003.gguf" for i in range(3)]
    split = {".split.count": 3, ".split.tensors.count": len(names)}
    write_gguf(paths[0], "llama", {**keys, **split, ".split.no": 0}, {})
    for i, chosen in ((1, names[:7]), (2, names[7:])):
        own = {n: weights[n] for n in chosen}
        write_gguf(paths[i], "llama", {**split, ".split.no": i}, own, tokenizer=False)
    return model, paths


def test_any_part_gives_the_whole_model(parts: tuple[nn.Module, list[Path]], cache: Path) -> None:
    model, paths = parts
    for path in paths:
        assert_same(path, model)
    (folder,) = (cache / "models").iterdir()
    assert folder.name.startswith("m-v")


def test_missing_and_renamed_parts(parts: tuple[nn.Module, list[Path]]) -> None:
    _, paths = parts
    one = paths[1].rename(paths[1].with_name("x.gguf"))
    with pytest.raises(AmqError, match=r"one of 3 parts .* 1 are missing .* m-00002-of-00003.gguf: put all parts"):
        load_model(str(paths[2]))
    with pytest.raises(AmqError, match=r"in 3 parts \(split.count\), found 1"):
        load_model(str(one))
    shutil.copy(paths[2], paths[1])
    with pytest.raises(AmqError, match="says that it is part 3: it was renamed"):
        load_model(str(paths[0]))


# bad files


def header(*, tensors: int = 0, keys: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def array(kind: int, count: int) -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, count)


def tensor(*shape: int, kind: int = 0, at: int = 0, name: str = "t") -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)


BAD = {
    "empty": b"",
    "other magic": b"GGML" + header()[4:],
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 1": header(version=1),
    "tensors 2^60": header(tensors=2**60),
    "keys 2^60": header(keys=2**60),
    "keys 2^20": header(keys=2**20),
    "key length 2^62": header(keys=1, body=struct.pack("<Q", 2**62)),
    "key no UTF-8": header(keys=1, body=struct.pack("<Q", 2) + b"\xff\xff" + b"\0" * 20),
    "array of 2^62 bytes": header(keys=1, body=array(0, 2**62)),
    "array of 2^40 numbers": header(keys=1, body=array(4, 2**40)),
    "array of 2^62 texts": header(keys=1, body=array(8, 2**62)),
    "array of arrays": header(keys=1, body=array(9, 2**62)),
    "array of no type": header(keys=1, body=array(77, 1)),
    "text length 2^62": header(keys=1, body=text("a") + struct.pack("<IQ", 8, 2**62)),
    "value of no type": header(keys=1, body=text("a") + struct.pack("<I", 99)),
    "key twice": header(keys=2, body=2 * (text("a") + struct.pack("<IB", 0, 1)) + b"\0" * 32),
    "alignment 0": header(keys=1, body=text("general.alignment") + struct.pack("<II", 4, 0)),
    "alignment 3": header(keys=1, body=text("general.alignment") + struct.pack("<II", 4, 3)),
    "alignment text": header(keys=1, body=text("general.alignment") + struct.pack("<I", 8) + text("x")),
    "dimensions 2^32": header(tensors=1, body=text("t") + struct.pack("<I", 2**32 - 1) + b"\0" * 64),
    "no dimensions": header(tensors=1, body=tensor() + b"\0" * 32),
    "dimensions that wrap": header(tensors=1, body=tensor(2**32, 2**32) + b"\0" * 64),
    "dimension 2^63": header(tensors=1, body=tensor(2**63) + b"\0" * 64),
    "dimension 0": header(tensors=1, body=tensor(0, 4) + b"\0" * 64),
    "type 999": header(tensors=1, body=tensor(4, kind=999) + b"\0" * 64),
    "block size": header(tensors=1, body=tensor(33, kind=2) + b"\0" * 64),
    "offset 2^62": header(tensors=1, body=tensor(4, at=2**62) + b"\0" * 64),
    "offset odd": header(tensors=1, body=tensor(4, at=1) + b"\0" * 64),
    "tensor twice": header(tensors=2, body=2 * tensor(4) + b"\0" * 128),
    "nameless": header(tensors=1, body=tensor(4, name="") + b"\0" * 64),
    "nothing": header(body=b"\0" * 32),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_at_once(name: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[name])
    began = time.process_time()
    with pytest.raises(AmqError, match="bad.gguf"):
        gguf_folder(path)
    assert time.process_time() - began < 5 and not list(cache.glob("models/*"))


def test_every_cut_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, build("llama"))
    content = path.read_bytes()
    cuts = sorted({*range(0, 2000, 37), *range(0, len(content), len(content) // 50), len(content) - 1})
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(AmqError, match="tiny.gguf is not a readable GGUF file"):
            read_gguf(path)


# the cache


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, Path]:
    path = write(tmp_path, build("llama"))
    return path, gguf_folder(path)


def flip(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", [flip, Path.unlink], ids=["flipped", "gone"])
def test_damaged_conversion_is_made_again(
    name: str, how: Callable[[Path], None], converted: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path, folder = converted
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    how(folder / name)
    with caplog.at_level(logging.WARNING, "amq"):
        assert gguf_folder(path) == folder
    assert "is damaged and is made again" in caplog.text and name in caplog.text
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
    check_conversion(folder)


def test_conversion_of_an_older_amq_is_not_taken(converted: tuple[Path, Path]) -> None:
    path, folder = converted
    (folder / "conversion.json").unlink()
    before = (folder / "config.json").stat().st_ino
    assert gguf_folder(path) == folder and (folder / "config.json").stat().st_ino != before


def test_another_process_that_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder may be in use: it stays as it is."""
    path = write(tmp_path, build("llama"))
    save, made = gguf_convert._save_tokenizer, []

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(gguf_convert, "_save_tokenizer", save)
        made.append(gguf_folder(path))
        made.append((made[0] / "config.json").stat().st_ino)
        save(*arguments)

    monkeypatch.setattr(gguf_convert, "_save_tokenizer", overtaken)
    folder = gguf_folder(path)
    assert [folder, (folder / "config.json").stat().st_ino] == made
    check_conversion(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_two_conversions_give_equal_bytes(tmp_path: Path, converted: tuple[Path, Path]) -> None:
    path, folder = converted
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.rmtree(folder)
    assert {p.name: p.read_bytes() for p in gguf_folder(path).iterdir()} == first


def test_leftovers_of_killed_processes_go(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path, build("llama"))
    models = cache / "models"
    dead, living = models / ".other-v2-0.amq-aaaaaaaa.tmp", models / ".other-v2-0.amq-bbbbbbbb.tmp"
    old, fresh = models / f".x-{'0' * 32}.abcdefgh", models / f".y-{'0' * 32}.abcdefgh"
    for folder in (dead, living, old, fresh):
        (folder / "whole").mkdir(parents=True)
    os.utime(old, (0, 0))
    held = os.open(living, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    folder = gguf_folder(path)
    os.close(held)
    assert set(models.iterdir()) == {folder, living, fresh}


def test_conversion_holds_one_tensor_at_a_time(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `dequantized` gave before is gone when it gives the next."""
    import weakref

    model = build("llama", num_hidden_layers=4)
    path = write(tmp_path, model)
    alive: list[Any] = []
    most = 0

    def watched(tensor: Any) -> np.ndarray:
        nonlocal most
        values = dequantized(tensor)
        alive.append(weakref.ref(values))
        most = max(most, sum(ref().nbytes for ref in alive if ref() is not None))
        return values

    monkeypatch.setattr(gguf_convert, "dequantized", watched)
    gguf_folder(path)
    largest = max(p.numel() for p in model.parameters()) * 4
    assert len(alive) == len(list(model.parameters())) and most <= 2 * largest


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, build("llama"))
    monkeypatch.setenv("AMQ_CACHE", str(path))  # a file
    with pytest.raises(AmqError, match="tiny.gguf/models cannot be made: .*; set AMQ_CACHE"):
        gguf_folder(path)


def test_quantized_gguf_keeps_its_rotary_scaling(tmp_path: Path) -> None:
    from amq.quantize.run import run_quantize
    from amq.quantize.settings import QuantizeSettings

    model = build("llama", head_dim=64, rope_parameters={**LLAMA3, "original_max_position_embeddings": 64})
    factors = rope_frequencies(model.config.to_dict())
    path = write(tmp_path, model, weights={FREQUENCIES: factors})
    output = tmp_path / "out"
    given = {"uniform": "int8", "group_size": 32, "method": "rtn", "perplexity": "none", "windows": 1}
    run_quantize(QuantizeSettings(str(path), str(output), window_length=32, **given))
    assert open_checkpoint(output).config["rope_parameters"]["rope_type"] == "llama3"
