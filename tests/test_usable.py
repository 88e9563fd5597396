"""Linears that cannot be quantized are found by a trial, stay in 16 bits with the reason, and the rest works."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import random_tokens, randomized, tiny_llama
from torch import nn

from amq.checkpoint.store import open_checkpoint
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.model.experts import unfuse
from amq.model.inventory import take_inventory
from amq.model.usable import find_usable
from amq.packing import dequantize
from amq.quantize import quantize

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
ATTENTION = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
HYBRID = {**SIZES, **ATTENTION, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
          "attention_head_dim": 32, "attention_hidden_size": 128, "mamba_d_state": 8}  # fmt: skip
USED, ALSO = "the model uses its weight other than by calling it", "its weight is also "
MODELS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    # family: options of its config, and {last part of a linear's name: how the reason begins}
    "Mamba": ({**SIZES, "state_size": 8}, {"dt_proj": USED}),
    "RecurrentGemma": ({**SIZES, **ATTENTION, "num_hidden_layers": 3, "lru_width": 64}, {}),
    "Rwkv": ({**SIZES, "num_hidden_layers": 4, "rescale_every": 2}, {"output": USED, "value": USED}),
    "Zamba": ({**HYBRID, "n_mamba_heads": 2}, {"q_proj": ALSO, "down_proj": ALSO}),
    "Zamba2": (
        {**HYBRID, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]},
        {"q_proj": ALSO, "down_proj": ALSO},
    ),
    "Mixtral": ({**SIZES, **ATTENTION, "num_local_experts": 4}, {}),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**MODELS[family][0])
    return randomized(getattr(transformers, f"{family}ForCausalLM")(config).float(), 0)


@pytest.mark.parametrize("family", MODELS)
def test_a_checkpoint_computes_what_its_weights_say(
    family: str, make_folder: Callable[[nn.Module], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, output = make_folder(build(family)), tmp_path / "out"
    quantize(str(source), str(output), uniform="int8", method="rtn", group_size=32, perplexity="none", windows=1,
             window_length=32)  # fmt: skip
    log = json.loads((output / "quantization.json").read_text())
    reasons, expected = log["not_quantized"], MODELS[family][1]
    assert bool(reasons) == bool(expected)
    for part, reason in expected.items():
        found = {name: text for name, text in reasons.items() if name.endswith(part)}
        assert found and all(text.startswith(reason) for text in found.values())
        assert all(f"{name} stays in 16 bits: {text}" in caplog.text for name, text in found.items())
    assert bool(reasons) == ("stay in 16 bits" in (output / "README.md").read_text())
    checkpoint = open_checkpoint(output)
    assert checkpoint.record.formats and not checkpoint.record.formats.keys() & reasons.keys()

    plain = build(family)
    unfuse(plain)
    dtype = checkpoint.tensor(checkpoint.other_names[0]).dtype
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(dtype).float()
        if name.removesuffix(".weight") in checkpoint.record.formats:
            parameter.data = dequantize(checkpoint.packed(name.removesuffix(".weight")))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=1e-3)
        how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert loaded.generate(tokens, **how).shape == (1, 16)


def test_all_of_an_ordinary_model_is_usable_and_the_trial_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    weights = {name: (p, p.clone()) for name, p in model.named_parameters()}
    with caplog.at_level(logging.INFO):
        usable = find_usable(model)
    assert usable.inventory == take_inventory(model) and not usable.reasons and not usable.loaded and not caplog.records
    assert modules == {name: (id(module), type(module)) for name, module in model.named_modules()}
    assert all(p is weights[name][0] and torch.equal(p, weights[name][1]) for name, p in model.named_parameters())


def test_weights_that_a_model_changes_are_kept_as_loaded() -> None:
    model, before = build("Rwkv"), build("Rwkv").state_dict()
    loaded = find_usable(model).loaded
    assert loaded and all(torch.equal(weight, before[name]) for name, weight in loaded.items())
    assert not any(torch.equal(weight, model.get_parameter(name)) for name, weight in loaded.items())


class Squared(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square()


class Asking(nn.Module):
    """Wants the module itself to be an nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.linear, nn.Linear):
            raise TypeError("not an nn.Linear")
        return self.linear(x)


def test_odd_modules() -> None:
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.up_proj.__class__ = Squared
    usable = find_usable(model)
    assert usable.reasons == {"model.layers.0.mlp.up_proj": "a Squared multiplies in a way of its own"}
    assert {s.name for s in usable.inventory.linears} | {"model.layers.0.mlp.up_proj"} == {
        s.name for s in take_inventory(model).linears
    }
    assert usable.inventory.numel == take_inventory(model).numel
    mlp.up_proj = Asking(nn.Linear(64, 96, bias=False))
    with pytest.raises(AmqError, match=r"not with other modules in place of its linears \(TypeError: not an nn.Linear"):
        find_usable(model)


def test_a_configuration_that_names_one_is_refused(make_folder: Callable[[nn.Module], Path], tmp_path: Path) -> None:
    model = build("Mamba")
    path = tmp_path / "configuration.json"
    Configuration({s.name: "int4" for s in take_inventory(model).linears}, 32).save(path)
    with pytest.raises(AmqError, match=r"names backbone.layers.0.mixer.dt_proj, which stays in 16 bits in any case"):
        quantize(str(make_folder(model)), str(tmp_path / "out"), configuration=str(path), perplexity="none")
