"""Mixtures of experts from a folder to a checkpoint and back, by every method, with head and embeddings packed too."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mixtures import EXPERTS, MIXTURES, mixture
from helpers.paging import PoisonPager, assert_only_held
from helpers.tiny_models import random_tokens, tiny_llama

from amq.checkpoint.store import open_checkpoint
from amq.configuration import Configuration
from amq.formats import FORMATS
from amq.model.inventory import take_inventory
from amq.model.paging import holding
from amq.packing import dequantize
from amq.quantize import quantize
from amq.quantize.bank import BankSettings, open_bank
from amq.quantize.blocks import BlockQuantizer
from amq.quantize.log import QuantizationLog
from amq.quantize.methods import METHODS
from amq.quantize.shown import counts_text
from amq.quantize.sources import BankSource
from amq.util.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
SMALL: dict[str, Any] = {"windows": 3, "window_length": 48, "perplexity": "none", "calibration": "docstrings"}


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))
    monkeypatch.setattr("amq.model.text.BUILTIN", {"docstrings": lambda: text})


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines += text.splitlines()


def plain_of(folder: Path, kind: str) -> torch.nn.Module:
    """Plain torch with the weights that the checkpoint's codes stand for."""
    checkpoint, model = open_checkpoint(folder), mixture(kind)
    model.load_state_dict({n: checkpoint.tensor(n).float() for n in checkpoint.other_names}, strict=False)
    for name in checkpoint.record.formats:
        weight = dequantize(checkpoint.packed(name))
        for module in (name, *(e for e, linear in checkpoint.record.embedding.items() if linear == name)):
            model.get_submodule(module).weight.data = weight
    return model


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq", "bank"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_checkpoint_computes_what_its_weights_say(
    kind: str, method: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    """Experts of one layer in several formats, one of them kept."""
    from transformers import AutoModelForCausalLM

    inventory = take_inventory(mixture(kind))
    formats = {s.name: ("int3", "int4", "int8", "int2")[i % 4] for i, s in enumerate(inventory.linears)}
    kept = "model.layers.1.mlp.experts.up_proj.2"
    formats |= {kept: "16bit"} | {s.name: "int6" for s in inventory.outer}
    Configuration(formats, 32).save(tmp_path / "c.json")
    folder = tmp_path / "out"
    quantize(str(source(kind)), str(folder), configuration=str(tmp_path / "c.json"), method=method, **SMALL)
    assert open_checkpoint(folder).configuration.formats == formats
    assert Configuration.load(folder / "configuration.json").formats == formats
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, plain_of(folder, kind)(tokens).logits, rtol=1e-4, atol=1e-4)
    log = QuantizationLog.read(folder / "quantization.json")
    assert log.linears.keys() == {s.name for s in inventory.linears}
    assert log.linears[kept].relative_error is None and 0 < log.linears[kept.replace("2", "3")].relative_error < 1
    row = log.experts["model.layers.1.mlp.experts.up_proj"]
    errors = [log.linears[f"model.layers.1.mlp.experts.up_proj.{i}"].relative_error for i in (0, 1, 3)]
    assert (row.least_error, row.most_error) == (min(errors), max(errors)) and sum(row.formats.values()) == EXPERTS
    card = (folder / "README.md").read_text()
    assert "`model.layers.1.mlp.experts.up_proj` | 1 16bit, " in card and "and its embedding quantized by" in card


@pytest.fixture(scope="module")
def source(make_folder: Callable[[torch.nn.Module], Path]) -> Callable[[str], Path]:
    """Folders of the mixtures, as transformers saves them."""
    return functools.cache(lambda kind: make_folder(MIXTURES[kind].build(num_hidden_layers=2)))


def test_what_is_said_of_experts(source: Callable[[str], Path], tmp_path: Path) -> None:
    said = Said()
    output = tmp_path / "out"
    settings = {**SMALL, "windows": 1, "window_length": 4, "method": "gptq", "head": "int8"}
    quantize(str(source("qwen3_moe")), str(output), uniform="int4", group_size=32, progress=said, **settings)
    assert "32 linears in 2 blocks by gptq (8 int4, 24 int4 of experts; lm_head int8): " in said.lines[0]
    log = json.loads((output / "quantization.json").read_text())
    assert len(log["notes"]) == 2 and "experts saw fewer than 4 of 4 calibration tokens" in log["notes"][0]
    formats = dict.fromkeys(log["linears"], "int4")
    assert counts_text(take_inventory(mixture("qwen3_moe")).linears, formats) == "8 int4, 24 int4 of experts"


@pytest.mark.parametrize("build", [lambda: mixture("qwen3_moe"), tiny_llama], ids=["qwen3_moe", "llama"])
def test_bank_and_quantizers_hold_the_blocks_that_they_touch(build: Callable[[], Any], tmp_path: Path) -> None:
    """Weights that nobody holds are NaN; results are those of a model that is in memory."""
    windows = random_tokens(2, 24)

    def results(paged: bool) -> list[dict[str, Any]]:
        def make() -> tuple[Any, Any]:
            model = build()
            return model, PoisonPager(model) if paged else None

        model, pager = make()
        inventory = take_inventory(model)
        formats = {s.name: "int4" for s in inventory.linears}
        outer = {s.name: [FORMATS["int8"]] for s in inventory.outer}
        settings, cache = BankSettings("gptq", 32, windows), tmp_path / str(paged)
        bank = open_bank(model, inventory, [FORMATS["int4"]], settings, cache=cache, fingerprint="same", outer=outer)
        found: list[dict[str, Any]] = [bank.weight_errors()]
        source = BankSource(model, inventory, formats, bank)
        if pager is not None:
            made = assert_only_held(pager, lambda: [source.make(block).errors for block in range(2)])
        else:
            made = [source.make(block).errors for block in range(2)]
        found += made
        for method in ("rtn", "gptq", "awq+gptq"):
            model, pager = make()
            quantizer = BlockQuantizer(model, inventory, formats, 32, METHODS[method], windows)
            for block in range(2):
                with holding(model, block):
                    result = quantizer.make(block)
                    quantizer.finish(result)
                found += [result.errors, {n: w.qweight for n, w in result.packed.items()}, result.changed]
            assert pager is None or pager.held == [0, 1]
        return found

    for resident, paged in zip(results(False), results(True), strict=True):
        assert resident.keys() == paged.keys()
        for name, value in resident.items():
            assert torch.equal(value, paged[name]) if isinstance(value, torch.Tensor) else value == paged[name], name
