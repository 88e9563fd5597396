"""Fisher scores: what each linear in each format will cost, from a few backward passes.

With labels sampled from the full-precision model's own next-token distribution, g[t] the gradient of their summed
log-likelihood at a linear's output for token t, x[t] its input and δW = W − Ŵ the bank's error, the score is

    ⅛ · mean over t of (g[t] · δW x[t])²          nats per token

At the positions of a window's prefix (BOS) no label is drawn, since no loss counts there. Their x stay in the sum, as
what later tokens read there is wrong with δW too; the mean is over the tokens that have a loss.
For small errors the Jensen–Shannon divergence is an eighth of the Fisher quadratic form, so scores are in loss units.
What it leaves out: terms between linears, terms between tokens (an error that attention hands on from many tokens adds
up, in v most of all), and saturation (the loss cannot exceed ln 2); the search's fit takes in what it can.

Weights need no gradients. Each pass runs the model once without a graph, keeping the hidden state after every block,
and then walks back block by block, rebuilding one block's graph at a time: peak memory is the model, one block's
activations and one hidden state per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amq.kernels.cpu import dequantize_into
from amq.model.blocks import TOKENS, BlockRunner
from amq.model.inventory import Inventory, LinearSpec, embedding_weight, get_linear
from amq.quantize.bank import WeightBank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Table = dict[str, dict[str, float]]
"""{linear: {format: cost}}"""


def fisher_passes(
    model: PreTrainedModel,
    inventory: Inventory,
    bank: WeightBank,
    windows: Tensor,
    formats: Sequence[str],
    seed: int,
    start: int = 0,
    unscored: int = 0,
) -> Iterator[Table]:
    """One table per window (a pass), from window `start` on; their mean is the cost table.

    model: full-precision causal LM. windows: int64 [passes, length]. Pass i depends on `seed` and i only.
    unscored: leading positions of every window that have no loss, `Corpus.unscored`.
    """
    runner = BlockRunner(model)
    device = embedding_weight(model).device
    for index in range(start, len(windows)):
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
        tokens = windows[index : index + 1].to(device)
        yield _one_pass(model, runner, inventory, bank, tokens, formats, generator, unscored)


def _one_pass(
    model: PreTrainedModel,
    runner: BlockRunner,
    inventory: Inventory,
    bank: WeightBank,
    tokens: Tensor,
    formats: Sequence[str],
    generator: torch.Generator,
    unscored: int,
) -> Table:
    table: Table = {}
    length = tokens.shape[1]
    per_scored = length / (length - unscored)  # mean over all tokens → sum over all tokens per token that has a loss
    with torch.no_grad():
        states = runner.boundaries(tokens)
    gradient = _head_gradient(runner, states.pop(), generator, unscored)
    for block in reversed(range(runner.n_blocks)):
        linears = inventory.in_block(block)
        entry = states.pop() if block else None  # block 0 starts from the tokens; nothing before it needs gradients
        captured, gradient = _backward_block(model, runner, tokens, block, entry, gradient, linears)
        with torch.no_grad():
            for spec, (x, g) in captured.items():
                scores = _scores(get_linear(model, spec.name).weight, bank, spec, formats, x, g)
                table[spec.name] = {fmt: score * per_scored for fmt, score in scores.items()}
    return {s.name: table.get(s.name, dict.fromkeys(formats, 0.0)) for s in inventory.linears}


def _head_gradient(runner: BlockRunner, final: Tensor, generator: torch.Generator, unscored: int) -> Tensor:
    """Gradient of Σ_t ln p(y_t), y_t ~ p, at the final hidden state [1, length, hidden_size]; head in chunks.

    Zero at the first `unscored` positions, which have no term in the sum.
    """
    gradients = [torch.zeros_like(final[0, :unscored])]
    for chunk in final[0, unscored:].split(TOKENS):
        with torch.enable_grad():
            hidden = chunk.detach().requires_grad_()
            log_probabilities = runner.logits(hidden).float().log_softmax(-1)
            labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
            likelihood = log_probabilities.gather(1, labels).sum()
            gradients.append(torch.autograd.grad(likelihood, hidden)[0])
    return torch.cat(gradients).unsqueeze(0)


def _backward_block(
    model: PreTrainedModel,
    runner: BlockRunner,
    tokens: Tensor,
    block: int,
    entry: Tensor | None,
    gradient: Tensor,
    linears: Sequence[LinearSpec],
) -> tuple[dict[LinearSpec, tuple[Tensor, Tensor]], Tensor]:
    """Reruns one block with a graph.

    Returns {linear: (inputs [tokens, in_features], output gradients [tokens, out_features])} and the gradient at
    `entry`.
    """
    inputs: dict[LinearSpec, Tensor] = {}
    outputs: dict[LinearSpec, Tensor] = {}

    def keep(spec: LinearSpec, args: Any, output: Tensor) -> None:
        inputs[spec] = args[0].detach()
        # In block 0 the first linears have no ancestor that needs gradients: their outputs become the leaves.
        outputs[spec] = output if output.requires_grad else output.requires_grad_()

    handles = [
        get_linear(model, s.name).register_forward_hook(lambda module, args, output, s=s: keep(s, args, output))
        for s in linears
    ]
    try:
        with torch.enable_grad():
            entry = None if entry is None else entry.detach().requires_grad_()
            result = runner.hidden(tokens, block + 1, block, entry)
    finally:
        for handle in handles:
            handle.remove()
    wanted = list(outputs.values()) + ([] if entry is None else [entry])
    found = torch.autograd.grad(result, wanted, gradient, allow_unused=True)
    captured = {
        spec: (inputs[spec].flatten(0, -2), g.flatten(0, -2))
        for spec, g in zip(outputs, found[: len(outputs)], strict=True)
        if g is not None
    }
    return captured, found[-1]


def _scores(
    weight: Tensor, bank: WeightBank, spec: LinearSpec, formats: Sequence[str], x: Tensor, g: Tensor
) -> dict[str, float]:
    """x: [tokens, in_features], g: [tokens, out_features]."""
    scores = {}
    error = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for fmt in formats:
        dequantize_into(bank.get(spec.name, fmt), error)
        error.sub_(weight)
        change = x.float() @ error.t()  # [tokens, out_features]
        scores[fmt] = float((change.mul_(g).sum(-1)).square_().mean()) / 8
    return scores
