"""Runs a causal LM from any decoder block to any other, through the model's own forward.

Sensitivities recompute only the blocks after a change, Hessians are collected block by block, and logits are computed a
few tokens at a time from cached final hidden states. All three need the model cut at block boundaries. Instead of
rebuilding each architecture's masks, rotary tables, norms and logit scaling, the cut is made inside the model: blocks
that need not run are replaced for the call by a `_Replay`, which hands on a hidden state, and a forward hook stops the
call after the last block that must run. So the model prepares every block's arguments itself.

This holds where blocks run in order and pass on one hidden-state tensor, and besides it at most keys and values per
token that later blocks read again (Gemma 4): those travel in the state, behind the hidden state of their token
(`Carried`), so that whoever keeps, cuts, joins or differentiates states need not know of them. `BlockRunner.check`
proves it on real tokens before anything relies on it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.inventory import find_blocks
from amq.model.paging import holding, pager_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 128
"""Tokens whose logits exist at once, wherever logits are computed from final hidden states: a vocabulary is large."""


@dataclass(frozen=True)
class Carried:
    """What blocks put into a mapping that the model hands to all of them: keys and values that later blocks read.

    width: of the hidden state itself. entries: (argument of the blocks, key in it, (heads, head size) of each tensor
    there, which is [batch, heads, length, head size]), in the order in which they lie in a state.
    """

    width: int
    entries: tuple[tuple[str, Hashable, tuple[tuple[int, int], ...]], ...]

    @staticmethod
    def pack(hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Carried | None]:
        """([batch, length, width + what is carried], its layout) of what a block was given and returned; None where
        it was handed nothing to be carried."""
        entries, parts = [], [hidden]
        for name, mapping in kwargs.items():
            for key, tensors in mapping.items() if isinstance(mapping, MutableMapping) else ():
                if _per_token(tensors, hidden):
                    entries.append((name, key, tuple((t.shape[1], t.shape[3]) for t in tensors)))
                    parts += [t.transpose(1, 2).flatten(2).to(hidden.dtype) for t in tensors]
        return (torch.cat(parts, -1), Carried(hidden.shape[-1], tuple(entries))) if entries else (hidden, None)

    def unpack(self, state: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Puts what `state` carries into the mappings among `kwargs`; returns the hidden state."""
        sizes = [heads * size for _, _, shapes in self.entries for heads, size in shapes]
        hidden, *parts = state.split([self.width, *sizes], -1)
        left = iter(parts)
        for name, key, shapes in self.entries:
            kwargs[name][key] = tuple(next(left).unflatten(-1, shape).transpose(1, 2) for shape in shapes)
        return hidden


def _per_token(tensors: Any, hidden: Tensor) -> bool:
    """Whether it is a tuple of tensors [batch, heads, length, size] of the tokens of `hidden`."""
    return isinstance(tensors, tuple) and all(
        isinstance(t, Tensor) and t.ndim == 4 and (t.shape[0], t.shape[2]) == tuple(hidden.shape[:2]) for t in tensors
    )


class _Replay(nn.Module):
    """Stands in for a block that need not run: returns `hidden`, or its own input when `hidden` is None."""

    def __init__(self, block: nn.Module, hidden: Tensor | None, carried: Carried | None, as_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: it is only asked for attributes
        self._hidden, self._carried, self._as_tuple = hidden, carried, as_tuple

    def __getattr__(self, name: str) -> Any:  # models read attributes of their blocks, such as the attention type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self._hidden
        if hidden is None:
            hidden = args[0] if args else kwargs["hidden_states"]
        elif self._carried is not None:
            hidden = self._carried.unpack(hidden, kwargs)
        return (hidden,) if self._as_tuple else hidden


class _Stop(Exception):
    """Leaves the model's forward once the wanted block has run."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class BlockRunner:
    """Cuts `model` at block boundaries; `n_blocks` decoder blocks, boundary i lies before block i."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks_path, self.blocks = find_blocks(model)
        self.n_blocks = len(self.blocks)
        self._as_tuple = False
        self._carried: dict[int, Carried] = {}  # by boundary, as states there were made

    def hidden(self, tokens: Tensor, stop: int, start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """Hidden state at boundary `stop` (≥ start); wider than hidden_size where keys and values are carried with it.

        tokens: int64 [batch, length].
        start, hidden: boundary to start from and the hidden state there, [batch, length, hidden_size], of this runner;
            block 0 starts from the tokens.
        """
        if stop == start and hidden is not None:
            return hidden
        with self._replaying(start, hidden), self._stopping(stop):
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _Stop as stopped:
                return stopped.hidden
        raise AmqError(f"{type(self.model).__name__} never ran block {stop - 1} at {self.blocks_path}.{stop - 1}")

    def final(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Hidden states behind the last block, of each of `batches` (int64 [batch, length]), in order.

        Of a model that is larger than memory every block is read once: all batches go through it, and only then on.
        """
        if pager_of(self.model) is None:
            yield from (self.hidden(tokens, self.n_blocks) for tokens in batches)
            return
        states: list[Tensor | None] = [None] * len(batches)
        for block in range(self.n_blocks):
            with holding(self.model, block):
                for index, tokens in enumerate(batches):
                    states[index] = self.hidden(tokens, block + 1, block, states[index])
        yield from (state for state in states if state is not None)

    def boundaries(self, tokens: Tensor) -> list[Tensor]:
        """Hidden states after every block, n_blocks of [batch, length, hidden_size], from one forward."""
        states: list[Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            states.append(self._state(len(states) + 1, kwargs, output))

        handles = [block.register_forward_hook(keep, with_kwargs=True) for block in self.blocks[:-1]]
        try:
            last = self.hidden(tokens, self.n_blocks)
            return [*states, last]
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of final hidden states [tokens, hidden_size]: norm, head and scaling only."""
        tokens = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
        return self.logits_from(tokens, self.n_blocks, hidden.unsqueeze(0))[0]

    def logits_from(self, tokens: Tensor, start: int, hidden: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of a hidden state [batch, length, hidden_size] at boundary `start` ≥ 1."""
        with self._replaying(start, hidden):
            return self.model(input_ids=tokens, use_cache=False).logits

    def check(self, tokens: Tensor) -> None:
        """Raises AmqError unless the model cut at every boundary gives the very logits of an uncut forward.

        tokens: int64 [1, n]. A model that is larger than memory is checked once: this reads every block twice.
        """
        name, pager = type(self.model).__name__, pager_of(self.model)
        if pager is not None and pager.checked:
            return
        with torch.no_grad():
            whole = self.model(input_ids=tokens, use_cache=False).logits[0]
            if not bool(torch.isfinite(whole).all()):
                raise AmqError(f"the logits of {name} are not finite (NaN or infinity): load it in a wider --dtype")
            refused = f"{name} cannot be run block by block: its blocks at {self.blocks_path} pass on "
            refused += "more than one hidden state ({}); this architecture is not supported"
            try:
                state = self.hidden(tokens, 1)
                for boundary in range(1, self.n_blocks):
                    state = self.hidden(tokens, boundary + 1, boundary, state)
                cut = self.logits(state[0])
            except Exception as error:  # the uncut forward ran: what the model's code raises now is due to the cut
                raise AmqError(refused.format(f"{type(error).__name__}: {error}")) from error
        difference = float((cut - whole).abs().max() / whole.abs().max())
        if not difference <= 1e-3:
            raise AmqError(refused.format(f"logits differ by {difference:.1e} relative"))
        if pager is not None:
            pager.checked = True

    def _state(self, boundary: int, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """What goes on from the block before `boundary`; behind the last block that is the hidden state alone."""
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if boundary == self.n_blocks:
            return hidden
        state, carried = Carried.pack(hidden, kwargs)
        if carried is not None:
            self._carried[boundary] = carried
        return state

    @contextmanager
    def _replaying(self, start: int, hidden: Tensor | None) -> Iterator[None]:
        originals = list(self.blocks[:start])
        try:
            for index, block in enumerate(originals):
                state = hidden if index == start - 1 else None
                self.blocks[index] = _Replay(block, state, self._carried.get(start), self._as_tuple)
            yield
        finally:
            for index, block in enumerate(originals):
                self.blocks[index] = block

    @contextmanager
    def _stopping(self, stop: int) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._as_tuple = isinstance(output, tuple)
            raise _Stop(self._state(stop, kwargs, output))

        handle = self.blocks[stop - 1].register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
