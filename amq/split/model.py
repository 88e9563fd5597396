"""One party's part of a model: its blocks with their LoRA, and how to run them with gradients.

The model is cut at a boundary of blocks as `amq.model.blocks.BlockRunner` cuts it, through the model's own forward.
Both parties load the whole model, put adapters on all its blocks from one seed (so that either half starts as one
process would), and move the other party's blocks to torch's meta device, which has no memory. Embedding, norm and head
stay at both: they are not trained, the client needs them for a U-shape, and the embedding is often the head.

The server never sees a token through this: it runs its blocks with zeros for ids, which is checked to make no
difference. Models whose later blocks look at the ids again (per-layer embeddings) are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.blocks import BlockRunner
from amq.model.inventory import embedding_weight, take_inventory
from amq.util.extras import needs

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

SEED = 0x5917
"""Mixed into the seed of the adapters' start."""
PREFIX = "base_model.model."
"""What peft's files put before a module's name."""
PROBE = 16
"""Tokens that the cut is tried with."""


@dataclass
class Part:
    """The blocks [first, last) of a model, as a party holds them, and everything that it needs to run them.

    trainable: {name as peft's files have it: parameter}, of this party's blocks.
    shapes: the same of all blocks, for what the other party sends.
    """

    model: PreTrainedModel
    runner: BlockRunner
    config: LoraConfig
    first: int
    last: int
    trainable: dict[str, nn.Parameter]
    shapes: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.trainable.values())

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def embedded(self, tokens: Tensor) -> Tensor:
        """Hidden states [batch, length, hidden_size] behind the first blocks. tokens: int64 [batch, length]."""
        return self.runner.hidden(tokens.to(self.device), self.last)

    def continued(self, hidden: Tensor) -> Tensor:
        """The same behind the later blocks. hidden: [batch, length, hidden_size] at the cut."""
        return self.runner.hidden(_no_tokens(hidden), self.last, self.first, hidden)

    def loss(self, hidden: Tensor, targets: Tensor, predicted: int) -> Tensor:
        """Cross-entropy of what follows each token, summed and divided by `predicted`, the tokens of a whole step.

        hidden: behind the last block. targets: int64 [batch, length], −100 where nothing is predicted.
        """
        logits = self.runner.logits_from(_no_tokens(hidden), self.runner.n_blocks, hidden)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / predicted


def _no_tokens(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)


def targets_of(tokens: Tensor, unscored: int) -> Tensor:
    """What each position predicts, the next token; −100 at the last and at those of the window's prefix."""
    targets = torch.full_like(tokens, -100)
    targets[:, unscored:-1] = tokens[:, unscored + 1 :]
    return targets


def default_cut(blocks: int) -> int:
    return max(1, blocks // 3)


def check_cut(cut: int, blocks: int) -> None:
    if not 1 <= cut < blocks:
        raise AmqError(f"--cut {cut} leaves a party without blocks: the model has {blocks}, expected 1 to {blocks - 1}")


def take_part(model: PreTrainedModel, cut: int, rank: int, alpha: float, seed: int, *, client: bool | None) -> Part:
    """Puts adapters on `model` and keeps one party's blocks of it; with client None, all of them.

    Raises AmqError where the model cannot be cut there.
    """
    runner = BlockRunner(model)
    check_cut(cut, runner.n_blocks)
    _try_cut(runner, cut)
    config = _add_adapters(model, rank, alpha, seed)
    with needs("split", "amq split"):
        from peft import get_peft_model_state_dict
    named = {PREFIX + n: tuple(t.shape) for n, t in get_peft_model_state_dict(model).items()}
    ranges = {True: (0, cut), False: (cut, runner.n_blocks), None: (0, runner.n_blocks)}
    first, last = ranges[client]
    for index, block in enumerate(runner.blocks):
        if not first <= index < last:
            block.to("meta")
    trainable = dict(_trainable(runner, first, last))
    if unknown := set(trainable) - set(named):
        raise AmqError(f"peft names adapters otherwise than expected, such as {min(unknown)}: report this")
    return Part(model, runner, config, first, last, trainable, named)


def _try_cut(runner: BlockRunner, cut: int) -> None:
    rows = embedding_weight(runner.model)
    ids = torch.arange(PROBE, device=rows.device).remainder(rows.shape[0]).unsqueeze(0)
    runner.check(ids)
    with torch.no_grad():
        hidden = runner.hidden(ids, cut)
        seen, blind = (runner.logits_from(tokens, cut, hidden) for tokens in (ids, torch.zeros_like(ids)))
    if not torch.equal(seen, blind):
        raise AmqError(
            f"{type(runner.model).__name__} looks at the tokens again behind block {cut - 1}, so the server would need "
            "them: this architecture cannot be split"
        )


def _add_adapters(model: PreTrainedModel, rank: int, alpha: float, seed: int) -> LoraConfig:
    """LoRA on every linear of the blocks, B zero and A drawn from the seed; peft draws from torch's own generator."""
    with needs("split", "amq split"):
        from peft import LoraConfig, inject_adapter_in_model
    inventory = take_inventory(model)
    targets = sorted({spec.role.rpartition(".")[2] for spec in inventory.linears})
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number is one
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    digest = hashlib.blake2b(f"{SEED} {seed}".encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest, "little"))
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # whatever the model's dtype: AdamW's steps would vanish in 16 bits
            parameter.requires_grad_()
        if parameter.requires_grad and not name.startswith(inventory.blocks_path + "."):
            raise AmqError(
                f"{name} lies outside of the blocks at {inventory.blocks_path} and has the name of a linear inside: "
                "this architecture cannot be split"
            )
    return config


def _trainable(runner: BlockRunner, first: int, last: int) -> Iterator[tuple[str, nn.Parameter]]:
    for index in range(first, last):
        for name, parameter in runner.blocks[index].named_parameters():
            if parameter.requires_grad:
                whole = f"{PREFIX}{runner.blocks_path}.{index}.{name}"
                yield whole.replace(".default.", "."), parameter


def parts_of(model: PreTrainedModel, cut: int, rank: int, alpha: float, seed: int) -> tuple[Part, Part]:
    """Both parties' parts of one model in one process, which share its modules; for tests."""
    whole = take_part(model, cut, rank, alpha, seed, client=None)
    shared: dict[str, Any] = {"model": model, "runner": whole.runner, "config": whole.config, "shapes": whole.shapes}
    first, second = dict(_trainable(whole.runner, 0, cut)), dict(_trainable(whole.runner, cut, whole.last))
    return Part(first=0, last=cut, trainable=first, **shared), Part(
        first=cut, last=whole.last, trainable=second, **shared
    )
