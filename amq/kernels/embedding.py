"""An embedding that is read from a packed head: tied weights of a checkpoint, one copy of both.

The looked-up rows are gathered as codes and dequantized, never the whole. It stands where transformers expects an
nn.Embedding and is none, so that nothing ties, resizes or initialises it as one; `dequantize()` makes one of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.kernels.cpu import dequantized
from amq.kernels.modules import StoredLinear
from amq.packing import PackedWeight, dequantize


class StoredEmbedding(nn.Module):
    """ids, integers [...] → [..., embedding_dim] in the model's dtype: row i is row i of `head`'s packed weight.

    head: whose packed weight is read; it saves and loads it, so that this module has no state of its own.
    dtype: of the result; it follows the model's when that is cast.
    padding_idx: kept for the nn.Embedding that this stands for; it matters to gradients only.
    Raises AmqError while the head has no weight, IndexError for an id that is no row.
    """

    weight: Tensor

    def __init__(self, head: StoredLinear, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = head.out_features, head.in_features, padding_idx
        self._head = (head,)  # in a tuple, else it would be a child, and its tensors in the state dict twice
        self._copy: tuple[PackedWeight, PackedWeight] | None = None
        # No rows: it is what callers ask for a device and a dtype, and what .to() acts on.
        empty = torch.empty(0, head.in_features, dtype=dtype, device="meta")
        self.register_buffer("weight", empty, persistent=False)

    @property
    def head(self) -> StoredLinear:
        return self._head[0]

    def forward(self, ids: Tensor) -> Tensor:
        packed = self.packed(ids.device)
        rows = packed.map(lambda part: part.index_select(0, ids.reshape(-1)))
        native = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        weight = dequantized(rows) if native else dequantize(rows)
        return weight.to(self.weight.dtype).view(*ids.shape, self.embedding_dim)

    def packed(self, device: torch.device) -> PackedWeight:
        """The head's packed weight on `device`: on the CPU its own, elsewhere a copy that is made once."""
        packed = self.head.packed
        if packed is None:
            raise AmqError(f"{self.head.name} has no weight yet: load it with from_pretrained")
        if device.type == "cpu":
            return packed
        if self._copy is None or self._copy[0] is not packed or self._copy[1].qweight.device != device:
            self._copy = (packed, packed.to(device))
        return self._copy[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredEmbedding:
        self._copy = None
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rows of {self.head.name}, {self.weight.dtype}"
