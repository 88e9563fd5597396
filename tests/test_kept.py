"""Linears that stay in 16 bits by choice: pinned or written so in a configuration, counted, and kept by every stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import byte_tokenizer, random_tokens, tiny_llama
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import amq
from amq.checkpoint.store import open_checkpoint
from amq.configuration import Configuration, memory_items, parse_pins
from amq.errors import AmqError
from amq.eval import evaluate
from amq.export import export
from amq.formats import FORMATS, KEPT
from amq.kernels.cpu import dequantized
from amq.model.inventory import take_inventory
from amq.quantize import quantize
from amq.runtime.native_engine import open_native
from amq.search.select import select_from_run

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
SMALL = {"windows": 3, "window_length": 48, "perplexity": "none"}
PINS = ["down_proj=16bit", r"layers\.1\.self_attn\.q_proj=16bit"]
TOKENS = random_tokens(2, 24)


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(6000))
    monkeypatch.setattr("amq.model.text.BUILTIN", {"pydoc": lambda: text, "docstrings": lambda: text})


def kept_names(model: nn.Module) -> list[str]:
    return list(parse_pins(PINS, take_inventory(model).linears))


def dequantized_model(folder: Path) -> nn.Module:
    """Plain torch with what the checkpoint holds."""
    checkpoint, plain = open_checkpoint(folder), tiny_llama()
    plain.load_state_dict({n: checkpoint.tensor(n).float() for n in checkpoint.other_names}, strict=False)
    plain.tie_weights()
    for name in checkpoint.record.formats:
        plain.get_submodule(name).weight.data = dequantized(checkpoint.packed(name))
    return plain


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_a_configuration_keeps_is_counted(
    tied: bool, make_folder: Callable[[nn.Module], Path], tmp_path: Path
) -> None:
    """As a search finds it: the checkpoint says the bits per weight that the configuration has."""
    model = tiny_llama(tie_word_embeddings=tied)
    weights = take_inventory(model).weights
    formats = {s.name: KEPT.name if s.kind in ("head", "embedding") else "int3" for s in weights}
    Configuration(formats, 32).save(tmp_path / "found.json")
    found, out = str(tmp_path / "found.json"), tmp_path / "out"
    log = quantize(str(make_folder(model)), str(out), configuration=found, method="rtn", **SMALL).log
    record = open_checkpoint(tmp_path / "out").record
    assert record.kept.keys() == ({"model.embed_tokens"} if tied else {"lm_head", "model.embed_tokens"})
    assert round(record.bits_per_weight, 4) == log.bits_per_weight > 3.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").record.kept == record.kept


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq", "bank"])
def test_quantize(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Kept linears are stored as they were, up to scales that AWQ folds into what they share an input with."""
    output = tmp_path / "out"
    log = quantize(str(tiny_folder), str(output), uniform="int4", group_size=32, method=method, pin=PINS, **SMALL).log
    model, checkpoint = tiny_llama(), open_checkpoint(output)
    kept = kept_names(model)
    assert len(kept) == 3 and list(checkpoint.record.kept) == sorted(kept, key=list(checkpoint.record.kept).index)
    assert set(checkpoint.record.kept) == set(kept) and not checkpoint.record.formats.keys() & set(kept)
    assert not any(name in group for group in checkpoint.record.shared_inputs for name in kept)
    for name in kept:
        stored = checkpoint.tensor(f"{name}.weight")
        assert stored.dtype == torch.float16 and log.linears[name].format == KEPT.name
        if method != "awq+gptq":
            torch.testing.assert_close(stored.float(), model.get_submodule(name).weight, rtol=2**-10, atol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(TOKENS).logits
        torch.testing.assert_close(logits, dequantized_model(output)(TOKENS).logits, rtol=1e-4, atol=1e-4)
        original = model(TOKENS).logits
        assert (logits - original).norm() < 0.5 * original.norm()
    for text, expected in zip(TOKENS.tolist(), logits, strict=True):
        found = open_native(output, "fp32").all_logits(text)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    linears = take_inventory(model).linears
    bits = sum(s.numel * (16 if s.name in kept else 5) for s in linears) / sum(s.numel for s in linears)
    assert log.bits_per_weight == pytest.approx(bits, abs=1e-4)
    assert checkpoint.record.bits_per_weight == pytest.approx(bits)
    assert f"| 16bit | {len(kept)} |" in (output / "README.md").read_text()
    # and what was written can be asked for again
    assert Configuration.load(output / "configuration.json").formats == {
        s.name: KEPT.name if s.name in kept else "int4" for s in linears
    }
    loaded.save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").record == checkpoint.record


def test_awq_folds_scales_into_an_input_that_a_kept_linear_shares(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {"uniform": "int3", "group_size": 32, "method": "awq", **SMALL}
    log = quantize(str(tiny_folder), str(tmp_path / "out"), pin=["k_proj=16bit"], **settings).log
    assert not any("self_attn.q_proj" in note for note in log.notes)
    checkpoint, model = open_checkpoint(tmp_path / "out"), tiny_llama()
    name = "model.layers.0.self_attn.k_proj.weight"
    factors = checkpoint.tensor("model.layers.0.input_layernorm.weight").float()
    factors /= model.model.layers[0].input_layernorm.weight
    assert factors.max() > 1.05 * factors.min()
    product = checkpoint.tensor(name).float() * factors
    torch.testing.assert_close(product, model.get_parameter(name), rtol=2**-8, atol=1e-6)


def test_configurations(tiny_folder: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    parts, kept = take_inventory(model), kept_names(model)
    configuration = Configuration({s.name: KEPT.name if s.name in kept else "int3" for s in parts.linears}, 32)
    configuration.save(tmp_path / "configuration.json")
    assert Configuration.load(tmp_path / "configuration.json").formats == configuration.formats
    (item,) = (item for item in memory_items(parts, configuration) if item.name == "linears: kept")
    assert item.bytes == 2 * sum(s.numel for s in parts.linears if s.name in kept)
    whole = sum(i.bytes for i in memory_items(parts, configuration) if i.name.startswith("linears"))
    assert whole == configuration.bytes(parts.linears)
    quantize(str(tiny_folder), str(tmp_path / "out"), configuration=str(tmp_path / "configuration.json"), method="rtn",
             pin=["k_proj=int8"], **SMALL)  # fmt: skip
    record = open_checkpoint(tmp_path / "out").record
    assert set(record.kept) == set(kept) and record.formats["model.layers.1.self_attn.k_proj"] == "int8"
    data = json.loads((tmp_path / "configuration.json").read_text())
    unknown = r"down_proj: unknown format .* or 16bit for a linear that is to stay"
    for wrong in ("float16", "bf16", "none", None, 16, ["int4"]):
        data["formats"]["model.layers.0.mlp.down_proj"] = wrong
        (tmp_path / "configuration.json").write_text(json.dumps(data))
        with pytest.raises(AmqError, match=unknown if isinstance(wrong, str) else r"formats\[.*expected `str`"):
            Configuration.load(tmp_path / "configuration.json")
    with pytest.raises(AmqError, match="nothing is left to quantize"):
        quantize(str(tiny_folder), str(tmp_path / "none"), uniform="int4", pin=[".=16bit"], **SMALL)
    with pytest.raises(AmqError, match="--pin 'q_proj=int9': expected REGEX=FORMAT with a format of .*int8, 16bit"):
        quantize(str(tiny_folder), str(tmp_path / "none"), uniform="int4", pin=["q_proj=int9"], **SMALL)


RANDOM = {"solver": "random", "initial": 4, "iterations": 0, "prune": 50.0}


@pytest.mark.parametrize("options", [{}, {"cost": "sensitivity", "backend": "cpu"}, RANDOM], ids=str)
def test_a_search_neither_builds_nor_changes_them(options: dict, tiny_folder: Path, tmp_path: Path) -> None:
    quick = {"window_length": 32, "windows": 2, "confirm_windows": 2, "bank_windows": 4, "cost_passes": 2, "points": 3}
    run = tmp_path / "run"
    result = amq.search(str(tiny_folder), output=str(run), group_size=64, target_bits=7.0, pin=PINS, **quick, **options)
    model = tiny_llama()
    kept = kept_names(model)
    records = [json.loads(line)["configuration"] for line in (run / "archive.jsonl").read_text().splitlines()]
    for formats in (result.configuration.formats, *records):
        assert {name for name, fmt in formats.items() if fmt == KEPT.name} - {"lm_head"} == set(kept)
    assert result.configuration.bits_per_weight(take_inventory(model).weights) <= 7.0 + 1e-6
    said = json.loads((run / "run.json").read_text())
    assert {n for n, f in said["pinned"].items() if f == KEPT.name} == set(kept)
    for path in Path(said["bank"]).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert not {name.rpartition(".")[0] for name in file.keys()} & set(kept)  # noqa: SIM118 - not a dict
    chosen = select_from_run(run, target_bits=6.5)
    assert {name for name, fmt in chosen.formats.items() if fmt == KEPT.name} == set(kept)
    assert "16bit" in (run / "report.html").read_text()


def test_eval_measures_kept_linears_at_full_precision(tiny_folder: Path, tmp_path: Path) -> None:
    names = [s.name for s in take_inventory(tiny_llama()).linears]
    one = Configuration({**dict.fromkeys(names, KEPT.name), names[0]: "int8"}, 32)
    other = Configuration({**dict.fromkeys(names, "int2"), names[0]: KEPT.name}, 32)
    for name, configuration in (("one", one), ("other", other)):
        configuration.save(tmp_path / f"{name}.json")
    how = {"max_tokens": 256, "window_length": 32, "proxy": "rtn", "group_size": 32, "bank_windows": 2}
    files = [tmp_path / "one.json", tmp_path / "other.json", tmp_path / "one.json"]
    rows = evaluate(str(tiny_folder), configurations=files[:2], uniform="int2", **how).rows
    by_name = {row.name: row for row in rows}
    assert by_name["one"].perplexity == pytest.approx(by_name["full"].perplexity, rel=1e-2)
    assert by_name["other"].perplexity != pytest.approx(by_name["int2"].perplexity, rel=1e-6)
    assert by_name["one"].bits_per_weight > 15


@pytest.fixture
def symmetric(make_folder: Callable[[nn.Module], Path], tmp_path: Path) -> Path:
    folder = make_folder(tiny_llama(num_attention_heads=4, num_key_value_heads=2))
    quantize(str(folder), str(tmp_path / "q"), uniform="int4", group_size=32, method="rtn", zero_points="symmetric",
             pin=[*PINS, "k_proj=int8"], **SMALL)  # fmt: skip
    byte_tokenizer()
    return tmp_path / "q"


def test_exports_leave_them_alone(symmetric: Path, tmp_path: Path) -> None:
    down = "model.layers.0.mlp.down_proj"
    weight = open_checkpoint(symmetric).tensor(f"{down}.weight")
    for to in ("gptq", "auto-round", "mlx"):
        export(symmetric, to, tmp_path / to)
        with safe_open(tmp_path / to / "model.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor(f"{down}.weight"), weight)
            assert not {f"{down}.qweight", f"{down}.scales"} & set(file.keys())
        assert "3 linears 16bit" in (tmp_path / to / "README.md").read_text()

    def settings(to: str) -> dict:
        return json.loads((tmp_path / to / "config.json").read_text())

    rules = settings("gptq")["quantization_config"]["dynamic"]
    assert {key: value for key, value in rules.items() if key.startswith("-")} == {
        r"-:^model\.layers\.(?:0|1)\.mlp\.down_proj$": {}, r"-:^model\.layers\.1\.self_attn\.q_proj$": {},
    }  # fmt: skip
    assert settings("auto-round")["quantization_config"]["extra_config"][down] == {"bits": 16, "data_type": "float"}
    assert down not in settings("mlx")["quantization"]


def test_a_recipe_and_a_gguf_name_16_bits(symmetric: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="both take names from it")
    export(symmetric, "recipe", tmp_path / "recipe")
    lines = (tmp_path / "recipe" / "llama-tensor-types.txt").read_text().splitlines()
    assert "blk.0.ffn_down=f16" in lines and "blk.1.attn_q=f16" in lines and "blk.0.attn_q=f16" not in lines
    layers = json.loads((tmp_path / "recipe" / "autoround-layer-config.json").read_text())["layer_config"]
    assert layers["model.layers.0.mlp.down_proj"] == {"bits": 16, "data_type": "float"}


def test_a_record_that_contradicts_itself_is_refused(symmetric: Path) -> None:
    config = json.loads((symmetric / "config.json").read_text())
    name = next(iter(config["quantization_config"]["formats"]))
    config["quantization_config"]["kept"][name] = config["quantization_config"]["shapes"][name]
    (symmetric / "config.json").write_text(json.dumps(config))
    with pytest.raises(AmqError, match=f"{name!r} has a format and is kept as well"):
        open_checkpoint(symmetric)


def test_16bit_is_no_format() -> None:
    assert KEPT.name not in FORMATS and KEPT.bits_per_weight(32) == 16 and KEPT.stored_bytes(3, 5, 32) == 30
