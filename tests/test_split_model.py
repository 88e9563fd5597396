"""A model cut in two: both halves together are the whole, in loss and gradients; adapters start alike at both."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, HIDDEN, random_tokens, tiny_llama
from torch import Tensor, nn

from amq.errors import AmqError
from amq.split.adapter import half_of, most_bytes, read_half
from amq.split.model import PREFIX, Part, default_cut, parts_of, take_part, targets_of
from amq.split.wire import WireError

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = random_tokens(2, 20)
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "opt")


def stirred(part: Part) -> Part:
    """With adapters that do something: B is zero at first."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in part.parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return part


def through(first: Part, second: Part, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient at the cut) of the two halves, after their backward passes."""
    hidden = first.embedded(TOKENS)
    came = hidden.detach().requires_grad_()
    loss = second.loss(second.continued(came), targets, int((targets >= 0).sum()))
    loss.backward()
    assert came.grad is not None
    hidden.backward(came.grad)
    return loss.detach(), came.grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [1, 2])
def test_two_halves_are_the_whole(family: str, cut: int) -> None:
    """Of two models, one for each party, against transformers' own loss of one model with the same adapters."""
    model = ARCHITECTURES[family].build()
    halves = [stirred(take_part(copy.deepcopy(model), cut, 4, 8.0, 3, client=client)) for client in (True, False)]
    whole = take_part(model, cut, 4, 8.0, 3, client=None)
    with torch.no_grad():
        for name, parameter in whole.trainable.items():
            parameter.copy_(next(half.trainable[name] for half in halves if name in half.trainable))
    loss, _ = through(*halves, targets_of(TOKENS, 0))
    expected = model(input_ids=TOKENS, labels=TOKENS).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    for half in halves:
        for name, parameter in half.trainable.items():
            grad, other = parameter.grad, whole.trainable[name].grad
            assert grad is not None and other is not None
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-9)


def test_adapters_start_alike_and_each_party_has_its_own_alone() -> None:
    model = tiny_llama(num_hidden_layers=3)
    client, server = (take_part(copy.deepcopy(model), 1, 4, 8.0, 7, client=client) for client in (True, False))
    whole = take_part(model, 1, 4, 8.0, 7, client=None)
    assert client.trainable.keys() | server.trainable.keys() == whole.trainable.keys() == whole.shapes.keys()
    assert not client.trainable.keys() & server.trainable.keys()
    assert len(client.trainable) == 2 * 7 and len(server.trainable) == 2 * 2 * 7
    for half in (client, server):
        for name, parameter in half.trainable.items():
            assert torch.equal(parameter, whole.trainable[name]) and parameter.dtype == torch.float32
            assert name.startswith(PREFIX) and ("lora_B" in name) == (not parameter.any())
    held = [{p.device.type for p in block.parameters()} for block in client.runner.blocks]
    assert held == [{"cpu"}, {"meta"}, {"meta"}]
    other = take_part(tiny_llama(num_hidden_layers=3), 1, 4, 8.0, 8, client=True)
    assert any(not torch.equal(p, other.trainable[n]) for n, p in client.trainable.items()), "another seed"


def test_the_process_keeps_its_random_numbers() -> None:
    model = tiny_llama()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    take_part(model, 1, 4, 8.0, 7, client=True)
    assert torch.equal(torch.rand(3), expected)


def test_adapters_are_float32_beside_a_model_of_16_bits() -> None:
    part = take_part(tiny_llama().bfloat16(), 1, 4, 8.0, 0, client=False)
    assert {p.dtype for p in part.parameters} == {torch.float32}
    hidden = torch.randn(2, 20, HIDDEN, dtype=torch.bfloat16).requires_grad_()
    loss = part.loss(part.continued(hidden), targets_of(TOKENS, 0), 38)
    loss.backward()
    assert torch.isfinite(loss) and hidden.grad is not None and part.parameters[0].grad is not None


def test_a_model_that_looks_at_the_tokens_again_is_refused() -> None:
    model = tiny_llama(num_hidden_layers=3)

    def peek(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        model.model.layers[2].bias = kwargs["input_ids"].unsqueeze(-1) / 100

    def add(module: nn.Module, args: object, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden + model.model.layers[2].bias  # type: ignore[operator]

    model.register_forward_pre_hook(peek, with_kwargs=True)
    model.model.layers[2].register_forward_hook(add)
    with pytest.raises(AmqError, match="LlamaForCausalLM looks at the tokens again behind block 0, so the server"):
        take_part(model, 1, 4, 8.0, 0, client=True)


@pytest.mark.parametrize("cut", [0, 2, -1])
def test_a_cut_that_leaves_a_party_nothing_is_refused(cut: int) -> None:
    with pytest.raises(AmqError, match=f"--cut {cut} leaves a party without blocks: the model has 2, expected 1 to 1"):
        take_part(tiny_llama(), cut, 4, 8.0, 0, client=True)


def test_the_default_cut_is_a_third() -> None:
    assert [default_cut(blocks) for blocks in (2, 3, 30, 32)] == [1, 1, 10, 10]


def test_targets_are_the_next_tokens() -> None:
    assert targets_of(torch.tensor([[5, 6, 7, 8]]), 0).tolist() == [[6, 7, 8, -100]]
    assert targets_of(torch.tensor([[1, 6, 7, 8]]), 1).tolist() == [[-100, 7, 8, -100]]


def test_the_servers_half_is_looked_at() -> None:
    from safetensors.torch import load, save

    client, server = parts_of(tiny_llama(num_hidden_layers=3), 1, 4, 8.0, 7)
    data = half_of(server)
    assert len(data) <= most_bytes(server)
    assert read_half(data, client).keys() == server.trainable.keys()
    half = load(data)
    name = min(half)
    for changed, message in (
        ({n: t for n, t in half.items() if n != name}, "is missing"),
        ({**half, "more": torch.zeros(1)}, "more is not of it"),
        ({**half, name: half[name].half()}, r"must be finite float32 \[4, 96\], got torch.float16"),
        ({**half, name: half[name][:1].clone()}, r"got torch.float32 \[1, 96\]"),
        ({**half, name: half[name] * float("nan")}, "must be finite"),
    ):
        with pytest.raises(WireError, match=f"the server's half of the adapter: .*{message}"):
            read_half(save(changed), client)
    for damaged in (b"", data[:-5], b"\xff" * 40):
        with pytest.raises(WireError, match="the server's half of the adapter is no safetensors file"):
            read_half(damaged, client)
