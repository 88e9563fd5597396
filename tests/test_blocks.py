"""Models cut at block boundaries: exactly the uncut model's numbers, always put back together, or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES
from helpers.tiny_models import ARCHITECTURES, Architecture, random_tokens, randomized
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.blocks import BlockRunner

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 40  # longer than the sliding windows of 16

by_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


@by_architecture
def test_cut_anywhere_is_the_uncut_model(architecture: Architecture) -> None:
    model = architecture.build()
    runner, tokens = BlockRunner(model), random_tokens(2, LENGTH)
    blocks = list(runner.blocks)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        final = runner.hidden(tokens, runner.n_blocks)
        states = runner.boundaries(tokens)
        assert len(states) == runner.n_blocks
        for boundary, state in enumerate(states, start=1):
            assert torch.equal(state, runner.hidden(tokens, boundary))
            assert torch.equal(final, runner.hidden(tokens, runner.n_blocks, boundary, state))
        for window in range(2):
            # The head's matrix product has another shape than in the uncut forward and may round differently.
            torch.testing.assert_close(runner.logits(final[window]), whole[window], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(runner.logits(final[1][5:9]), whole[1][5:9], rtol=1e-5, atol=1e-5)
        runner.check(tokens[:1])
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, whole)
    assert all(a is b for a, b in zip(runner.blocks, blocks, strict=True))
    assert not any(b._forward_hooks for b in blocks)


def test_logit_scaling_is_part_of_the_cut() -> None:
    """Gemma 2 squashes its logits to ±3; a head alone would not."""
    model = ARCHITECTURES["gemma2"].build(final_logit_softcapping=0.5)
    runner, tokens = BlockRunner(model), random_tokens(1, LENGTH)
    with torch.no_grad():
        logits = runner.logits(runner.hidden(tokens, runner.n_blocks)[0])
        bare = model.lm_head(model.model.norm(runner.hidden(tokens, runner.n_blocks)[0]))
    assert logits.abs().max() <= 0.5 < bare.abs().max()


def test_gradients_flow_through_a_cut() -> None:
    """Fisher passes differentiate one block and the head at a time; together that is the whole model's gradient."""
    model = ARCHITECTURES["gemma3"].build()
    runner, tokens = BlockRunner(model), random_tokens(1, LENGTH)
    with torch.no_grad():
        entry = runner.hidden(tokens, 1)
    whole = entry.clone().requires_grad_()
    runner.logits(runner.hidden(tokens, 3, 1, whole)[0]).square().sum().backward()
    middle = runner.hidden(tokens, 2, 1, entry).detach().requires_grad_()
    runner.logits(runner.hidden(tokens, 3, 2, middle)[0]).square().sum().backward()
    first = entry.clone().requires_grad_()
    runner.hidden(tokens, 2, 1, first).backward(middle.grad)
    torch.testing.assert_close(first.grad, whole.grad, rtol=1e-4, atol=1e-6 * float(whole.grad.abs().max()))
    assert float(whole.grad.abs().max()) > 0


@pytest.mark.parametrize("what", ["hidden", "boundaries", "logits", "check"])
def test_model_is_whole_after_an_exception(tiny_llama: nn.Module, what: str) -> None:
    runner, tokens = BlockRunner(tiny_llama), random_tokens(1, 8)
    blocks = list(runner.blocks)
    state = runner.hidden(tokens, 1)
    culprit = tiny_llama.model.norm if what in ("logits", "check") else blocks[1].mlp

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = culprit.register_forward_hook(fail)
    calls = {
        "hidden": lambda: runner.hidden(tokens, 2, 1, state),
        "boundaries": lambda: runner.boundaries(tokens),
        "logits": lambda: runner.logits(state[0]),
        "check": lambda: runner.check(tokens),
    }
    with pytest.raises(KeyboardInterrupt):
        calls[what]()
    handle.remove()
    assert all(a is b for a, b in zip(tiny_llama.model.layers, blocks, strict=True))
    assert not any(m._forward_hooks for m in tiny_llama.modules())
    runner.check(tokens)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mlp = nn.Linear(16, 16)

    def forward(self, hidden: Tensor, carried: Tensor | None = None) -> Any:
        out = hidden + torch.tanh(self.mlp(hidden if carried is None else hidden + carried))
        return {"tensor": out, "tuple": (out,), "pair": (out, torch.sin(out)), "state": out}[self.kind]


class Toy(nn.Module):
    """A causal LM in transformers' manner whose blocks hand on a tensor, a 1-tuple, a pair, or hide a second tensor."""

    def __init__(self, kind: str, blocks: int = 3) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(blocks))
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden, carried = self.embed(input_ids), None
        for block in self.blocks:
            out = block(hidden, carried)
            if self.kind == "pair":
                hidden, carried = out
            elif self.kind == "state":  # a side channel: each block's input reaches the next block but one
                hidden, carried = out, hidden.detach() * 3
            else:
                hidden = out[0] if self.kind == "tuple" else out
        return SimpleNamespace(logits=self.head(hidden))


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_plain_blocks_pass_the_check(kind: str, blocks: int) -> None:
    model = randomized(Toy(kind, blocks), 0, std=0.5)
    runner, tokens = BlockRunner(model), random_tokens(1, 8) % 32
    runner.check(tokens)
    assert torch.equal(runner.logits(runner.hidden(tokens, blocks)[0]), model(tokens).logits[0])


@pytest.mark.parametrize("kind", ["pair", "state"])
def test_blocks_that_pass_on_more_are_refused(kind: str) -> None:
    model = randomized(Toy(kind), 0, std=0.5)
    runner, tokens = BlockRunner(model), random_tokens(1, 8) % 32
    whole = model(tokens).logits
    with pytest.raises(AmqError, match="Toy cannot be run block by block: its blocks at blocks pass on more than one"):
        runner.check(tokens)
    assert torch.equal(model(tokens).logits, whole)


def test_overflowing_model_is_not_blamed_on_its_blocks(tiny_llama: nn.Module) -> None:
    tiny_llama.model.norm.weight.fill_(float("inf"))
    with pytest.raises(AmqError, match="the logits of LlamaForCausalLM are not finite"):
        BlockRunner(tiny_llama).check(random_tokens(1, 8))


def test_block_that_never_runs_is_named(tiny_llama: nn.Module) -> None:
    runner = BlockRunner(tiny_llama)
    tiny_llama.forward = lambda **kwargs: None
    with pytest.raises(AmqError, match="never ran block 1 at model.layers.1"):
        runner.hidden(random_tokens(1, 4), 2)


def test_keys_and_values_that_later_blocks_read_are_carried() -> None:
    """Gemma 4: the last two of four blocks have none of their own."""
    model = FAMILIES["gemma4"].build()
    runner, tokens = BlockRunner(model), random_tokens(2, LENGTH)
    runner.check(tokens[:1])
    with torch.no_grad():
        states = runner.boundaries(tokens)
        width = states[-1].shape[-1]
        assert [state.shape[-1] > width for state in states] == [True, True, True, False]
        final = runner.hidden(tokens, 4)
        for boundary, state in enumerate(states[:-1], start=1):
            assert torch.equal(final, runner.hidden(tokens, 4, boundary, state))
            halves = [runner.hidden(t, 4, boundary, s) for t, s in zip(tokens.split(1), state.split(1), strict=True)]
            torch.testing.assert_close(torch.cat(halves), final, rtol=1e-5, atol=1e-5)
        first = runner.hidden(tokens[:, :9], 4, 2, states[1][:, :9])  # what a token reads lies before it
        torch.testing.assert_close(first, final[:, :9], rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_what_is_carried() -> None:
    model = FAMILIES["gemma4"].build()
    runner, tokens = BlockRunner(model), random_tokens(1, LENGTH)
    with torch.no_grad():
        entry = runner.hidden(tokens, 1)
        later = runner.hidden(tokens, 2, 1, entry)
    whole = entry.clone().requires_grad_()
    runner.hidden(tokens, 4, 1, whole).square().sum().backward()
    middle = later.clone().requires_grad_()
    runner.hidden(tokens, 4, 2, middle).square().sum().backward()
    first = entry.clone().requires_grad_()
    runner.hidden(tokens, 2, 1, first).backward(middle.grad)
    torch.testing.assert_close(first.grad, whole.grad, rtol=1e-4, atol=1e-6 * float(whole.grad.abs().max()))
    width = model.config.hidden_size
    assert float(middle.grad[..., width:].abs().max()) > 0
