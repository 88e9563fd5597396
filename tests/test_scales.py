"""Weights whose scales fp16 cannot hold: moved, or refused by name; never silently wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import random_tokens, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.formats import FORMATS
from amq.kernels.cpu import dequantized
from amq.model.inventory import take_inventory
from amq.quantize import quantize
from amq.quantize.bank import BankSettings, open_bank
from amq.quantize.quantizers.grid import LARGEST, TINY, out_of_range

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
SMALL = {"uniform": "int8", "group_size": 32, "windows": 3, "window_length": 48, "perplexity": "none"}
WEIGHT = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))
    monkeypatch.setattr("amq.model.text.BUILTIN", {"pydoc": lambda: text})


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_what_fits(fmt) -> None:  # noqa: ANN001 - BitFormat
    largest = float((WEIGHT.amax() - WEIGHT.amin()) / fmt.max_code)
    for factor, odd in ((1.0, False), (LARGEST / largest, False), (4 * LARGEST / largest, True), (0.1 * TINY, True)):
        assert out_of_range(WEIGHT * factor, fmt, 32) == odd
    assert not out_of_range(torch.zeros(4, 64), fmt, 32)
    few = WEIGHT.clone()
    few[:, :32] *= 1e-12  # a group of next to nothing may be lost
    assert not out_of_range(few, fmt, 32)


def scaled(size: float) -> nn.Module:
    """Block 1 reads its norm `size` times smaller with weights 1/size as large: the same function, to the last bit."""
    model = tiny_llama()
    block = model.model.layers[1]
    with torch.no_grad():
        block.post_attention_layernorm.weight.div_(size)
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            linear.weight.mul_(size)
    return model


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("size", [2.0**-24, 2.0**28])
def test_an_exponent_moves_into_the_norm(
    method: str, size: float, make_folder: Callable[[nn.Module], Path], tmp_path: Path
) -> None:
    model = scaled(size)
    tokens = random_tokens(2, 24)
    assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    folder = make_folder(model)
    log = quantize(str(folder), str(tmp_path / "out"), method=method, dtype="float32", **SMALL).log
    (note,) = (n for n in log.notes if "beyond fp16" in n)
    assert note.startswith("block 1: mlp.gate_proj, mlp.up_proj: ") and note.endswith("post_attention_layernorm")
    assert all(entry.relative_error < 0.02 for entry in log.linears.values())
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(bool(torch.isfinite(dequantized(checkpoint.packed(n))).all()) for n in checkpoint.record.formats)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        assert (loaded(tokens).logits - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("size", [1e-14, 1e14])
def test_what_cannot_move_is_refused_by_name_and_can_be_kept(
    size: float, make_folder: Callable[[nn.Module], Path], tmp_path: Path
) -> None:
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():  # k and v read the same tensor and are as large as ever: no factor helps all three
        attention.q_proj.weight.mul_(size)
    folder = str(make_folder(model))
    message = r"model\.layers\.0\.self_attn\.q_proj: its weights reach .* beyond fp16's range .*: keep it with --pin "
    for method in ("rtn", "gptq"):
        with pytest.raises(AmqError, match=message):
            quantize(folder, str(tmp_path / method), method=method, **SMALL)
    with pytest.raises(AmqError, match=message):
        open_bank(model, take_inventory(model), [FORMATS["int4"]], BankSettings("rtn", 32), cache=tmp_path / "banks")
    quantize(folder, str(tmp_path / "kept"), method="rtn", pin=["0.self_attn.q_proj=16bit"], **SMALL)
    checkpoint = open_checkpoint(tmp_path / "kept")
    assert list(checkpoint.record.kept) == ["model.layers.0.self_attn.q_proj"]
    stored = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").float()
    torch.testing.assert_close(stored, attention.q_proj.weight, rtol=2**-8, atol=0)  # in 16 bits that have its range


def test_a_head_out_of_range_is_refused(make_folder: Callable[[nn.Module], Path], tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-9)
    with pytest.raises(AmqError, match="lm_head: its weights reach .*: use --head none"):
        quantize(str(make_folder(model)), str(tmp_path / "out"), head="int8", **SMALL)


def test_a_large_error_is_named(
    make_folder: Callable[[nn.Module], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    with torch.no_grad():  # one large weight in each group, and all the others round to zero
        weight = model.model.layers[1].mlp.up_proj.weight.fill_(0.035)
        weight[:, ::32] = 0.24
    settings = {**SMALL, "uniform": "int2", "method": "rtn"}
    with caplog.at_level(logging.WARNING):
        log = quantize(str(make_folder(model)), str(tmp_path / "out"), **settings).log
    warned = {r.message.split()[0] for r in caplog.records if "has a relative error of" in r.message}
    assert warned == {name for name, entry in log.linears.items() if entry.relative_error > 0.5}
    assert "model.layers.1.mlp.up_proj" in warned
