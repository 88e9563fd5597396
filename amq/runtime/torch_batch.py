"""Several sequences of `TorchEngine` in one call: their next tokens over one cache, padded on the left.

Sequence i of a batch has its `length[i]` positions at the end of the cache's; the mask hides what is before them, and
positions are counted without it. Only caches that hold keys and values of all positions can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from amq.errors import AmqError
from amq.runtime.torch_cache import copied
from amq.runtime.torch_places import CachedModel, Growing
from amq.runtime.trial import REFUSALS, differ, stir

SHORT = 64
"""A sequence is padded by at most its own length, or by so many positions."""


class Batch:
    """`members` with their caches in one, from now until `give_back`."""

    def __init__(self, model: CachedModel, members: Sequence[Growing]) -> None:
        self._model, self.members = model, list(members)
        self._lengths = [len(member.tokens) for member in members]
        caches, longest = [member.cache for member in members], max(self._lengths)
        self._cache = model.new_cache()
        for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
            if getattr(layers[0], "keys", None) is not None:  # else it has none of its own
                keys, values = (_side_by_side([getattr(n, k) for n in layers], longest) for k in ("keys", "values"))
                self._cache.update(keys, values, index)
        for member in self.members:
            member.join(self)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """The next token of each member → logits [members, vocabulary]."""
        device = self._model.device
        lengths = torch.tensor(self._lengths, device=device)
        size = max(self._lengths) + 1
        mask = torch.arange(size, device=device) >= size - 1 - lengths[:, None]
        for member in self.members:
            member.sound = False
        column = torch.tensor(tokens, device=device)[:, None]
        rows = self._model.forward(column, self._cache, attention_mask=mask.long(), position_ids=lengths[:, None])
        for member, token in zip(self.members, tokens, strict=True):
            member.add([token])
        self._lengths = [length + 1 for length in self._lengths]
        return rows

    def give_back(self) -> None:
        """Gives every member its own cache again."""
        for row, (member, length) in enumerate(zip(self.members, self._lengths, strict=True)):
            cache = self._model.new_cache()
            for index, layer in enumerate(self._cache.layers):
                if getattr(layer, "keys", None) is not None:
                    keys, values = (t[row : row + 1, :, -length:].clone() for t in (layer.keys, layer.values))
                    cache.update(keys, values, index)
            member.leave(cache)


def _side_by_side(tensors: Sequence[Tensor], longest: int) -> Tensor:
    """[1, heads, n, features] each → [len(tensors), heads, longest, features], zeros before what is shorter."""
    return torch.cat([pad(tensor, (0, 0, longest - tensor.shape[-2], 0)) for tensor in tensors])


def step_together(model: CachedModel, members: Sequence[Growing], tokens: Sequence[int]) -> Tensor:
    """The next token of each sequence → logits [len(members), vocabulary], in as few calls as their lengths allow.

    Batches last from call to call while their members stay the same.
    """
    order = sorted(range(len(members)), key=lambda i: -len(members[i].tokens))
    rows: dict[int, Tensor] = {}
    while order:
        longest = len(members[order[0]].tokens)
        group = [i for i in order if longest - len(members[i].tokens) <= max(len(members[i].tokens), SHORT)]
        order = [i for i in order if i not in group]
        places = {members[i]: i for i in group}
        batch = members[group[0]].batch
        if len(group) == 1:
            found = members[group[0]].run([tokens[group[0]]], True)
            assert found is not None
            rows[group[0]] = found[0]
            continue
        if not isinstance(batch, Batch) or set(batch.members) != set(places):
            batch = Batch(model, list(places))
        in_order = [places[member] for member in batch.members]
        rows |= zip(in_order, batch.step([tokens[i] for i in in_order]), strict=True)
    return torch.stack([rows[i] for i in range(len(members))])


@torch.inference_mode()
def decodes_together(model: CachedModel) -> bool:
    """Whether two sequences of different lengths get the same logits in a batch as each alone, found by trying."""
    alone, batched = [], []
    try:
        for length in (12, 2):
            place = Growing(model)
            place.run(range(length), True)
            stir(place.cache)
            alone.append(place)
            batched.append(Growing(model, place.tokens, copied(place.cache)))
        for _ in range(2):
            expected = [place.run([1], True) for place in alone]
            found = step_together(model, batched, [1, 1])
            if any(row is None or differ(found[i], row[0]) for i, row in enumerate(expected)):
                return False
    except AmqError:  # of a quantized linear, which runs no better alone
        raise
    except REFUSALS:
        return False
    return True
