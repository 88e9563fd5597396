"""Embeddings whose rows are packed: of the head, where the two are tied and one copy is left of both, or their own.

The looked-up rows are gathered as codes and dequantized, never the whole; on a GPU from what the head multiplies with,
so that one copy serves both. What an embedding does to its rows besides (Gemma's scales them) is done by the embedding
that stood there, which is given the gathered rows for a weight. The module stands where transformers expects an
nn.Embedding and is none, so that nothing ties, resizes or initialises it as one; `dequantize()` makes one of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.formats import BitFormat
from amq.kernels.cpu import dequantized
from amq.kernels.modules import PackedState, StoredLinear, unprepared
from amq.packing import PackedWeight, dequantize


class PackedRows(Tensor):
    """What a StoredEmbedding has for a `weight`: an empty tensor of the model's device and dtype, for those who ask for
    these, whose rows can be read one by one, as multimodal models read that of padding."""

    owner: StoredEmbedding
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    def __getitem__(self, index: Any) -> Tensor:
        """weight[i] and weight[i, columns] for an integer i."""
        row, *columns = index if isinstance(index, tuple) else (index,)
        if not isinstance(row, int):
            raise AmqError(f"an embedding is packed: its weight has rows by number, got {index!r}")
        like = self.owner.like
        found = self.owner.rows(torch.tensor([row % self.owner.num_embeddings], device=like.device))[0]
        return found[tuple(columns)] if columns else found


class StoredEmbedding(nn.Module):
    """ids, integers [...] → [..., embedding_dim] in the model's dtype: row i is row i of `head`'s packed weight.

    original: the nn.Embedding that this stands for. Its class may do more to the rows, each by itself; what it holds
        besides the weight (a factor, a norm) becomes this module's, under the same names.
    head: whose packed weight is read, and who saves and loads it. None: the weight is this module's own, see
        `OwnEmbedding`.
    Raises AmqError while there is no weight, IndexError for an id that is no row.
    """

    like: Tensor

    def __init__(self, original: nn.Embedding, head: StoredLinear | None) -> None:
        super().__init__()
        if original.max_norm is not None:
            raise AmqError("an embedding with max_norm changes its weight when it is read: it cannot be packed")
        self.num_embeddings, self.embedding_dim = original.num_embeddings, original.embedding_dim
        self.padding_idx, original.padding_idx = original.padding_idx, None  # it matters to gradients only
        self._copy: tuple[PackedWeight, PackedWeight] | None = None
        # No rows: it is what callers ask for a device and a dtype, and what .to() acts on.
        empty = torch.empty(0, self.embedding_dim, dtype=original.weight.dtype, device="meta")
        self.register_buffer("like", empty, persistent=False)
        original._parameters["weight"] = None
        self._adopt(original)
        # In tuples, else they would be children, and tensors in the state dict twice.
        self._original = (original,)
        self._head: tuple[StoredLinear, ...] = () if head is None else (head,)

    def _adopt(self, original: nn.Embedding) -> None:
        for name, parameter in original._parameters.items():
            if name != "weight":
                self.register_parameter(name, parameter)
        for name, buffer in original._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        for name, child in original._modules.items():
            self.add_module(name, child)

    @property
    def head(self) -> StoredLinear | None:
        return self._head[0] if self._head else None

    @property
    def original(self) -> nn.Embedding:
        return self._original[0]

    @property
    def extras(self) -> dict[str, Tensor]:
        """What was adopted, by name: everything that the rows are changed with."""
        own = {"like", "data"}
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor for name, tensor in tensors.items() if name not in own}

    @property
    def weight(self) -> PackedRows:
        rows = self.like.as_subclass(PackedRows)
        rows.owner = self
        return rows

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight [ids, embedding_dim], as the model's dtype has them."""
        head = self.head
        if head is not None and self.shares(ids.device):
            return head.rows(ids, self.like.dtype)
        packed = self.packed_on(ids.device).map(lambda part: part.index_select(0, ids))
        native = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        return (dequantized(packed) if native else dequantize(packed)).to(self.like.dtype)

    def shares(self, device: torch.device) -> bool:
        """Whether rows are read from what the head multiplies with on `device`, so that one copy serves both; on a CPU
        the packed weight is there anyway."""
        return device.type == "cuda" and self.head is not None and self.head.lends_rows(device)

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.rows(ids.reshape(-1))
        if type(self.original) is not nn.Embedding:
            places = torch.arange(len(weight), device=ids.device).view(ids.shape)
            state = {**self.extras, "weight": weight}
            return cast(Tensor, torch.func.functional_call(self.original, state, (places,)))
        return weight.view(*ids.shape, self.embedding_dim)

    def source(self) -> PackedWeight:
        """The packed weight, on the CPU."""
        head = self.head
        if head is None or head.packed is None:
            raise AmqError(f"{head.name if head else 'an embedding'} has no weight yet: load it with from_pretrained")
        return head.packed

    def packed_on(self, device: torch.device) -> PackedWeight:
        """The packed weight on `device`: on the CPU the one that is stored, elsewhere a copy that is made once. For an
        embedding without a head, or with one on another device."""
        packed = self.source()
        if device.type == "cpu":
            return packed
        if self._copy is None or self._copy[0] is not packed or self._copy[1].qweight.device != device:
            self._copy = (packed, packed.to(device))
        return self._copy[1]

    def initialize(self, owner: Any) -> None:
        """Lets `owner`, the transformers model around it, fill what no checkpoint has: a factor that is a buffer."""
        original = self.original
        if type(original) is nn.Embedding:
            return
        for name, buffer in self._buffers.items():
            if name in original._buffers:
                original._buffers[name] = buffer
        empty = nn.Parameter(torch.empty(0, self.embedding_dim), requires_grad=False)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # how transformers knows what to leave alone
        original._parameters["weight"] = empty
        owner._init_weights(original)
        original._parameters["weight"] = None

    def restored(self, weight: nn.Parameter) -> nn.Embedding:
        """The nn.Embedding that this stands for, around `weight`; this module is of no use afterwards."""
        original = self.original
        original.padding_idx = self.padding_idx
        original._parameters["weight"] = weight
        for name in original._buffers:
            original._buffers[name] = self._buffers[name]
        for name in original._modules:
            original._modules[name] = self._modules[name]
        for name in original._parameters.keys() - {"weight"}:
            original._parameters[name] = self._parameters[name]
        return original.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredEmbedding:
        self._copy = None
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        rows = "of its own" if self.head is None else f"of {self.head.name}"
        return f"{self.num_embeddings}, {self.embedding_dim}, packed rows {rows}, {self.like.dtype}"


class OwnEmbedding(PackedState, StoredEmbedding):
    """A StoredEmbedding with a packed weight of its own; state dict: `qweight`, `scale`, `zero_point`.

    fmt, group_size: of the weight that `store` will be given. name: its dotted name in its model, for errors.
    """

    def __init__(self, original: nn.Embedding, fmt: BitFormat, group_size: int, name: str) -> None:
        super().__init__(original, None)
        self.packed, self.name = None, name
        self.layout = (fmt, self.embedding_dim, group_size, 0)
        self.register_buffer("data", self._size(), persistent=False)  # footprints count buffers

    def _size(self) -> Tensor:
        fmt, features, group_size, _ = self.layout
        return unprepared(fmt, (self.num_embeddings, features), group_size)

    def store(self, packed: PackedWeight) -> None:
        """Takes the weight, which has the format and shape that this embedding was made for."""
        self.packed, self._copy, self.data = packed, None, self._size()

    def source(self) -> PackedWeight:
        if self.packed is None:
            raise AmqError(f"{self.name} has no weight yet: load it with from_pretrained, or give it one with store()")
        return self.packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OwnEmbedding:
        if self.packed is None:
            super()._apply(fn, recurse)
            return self
        self._buffers["data"] = None  # it has no numbers, and stays on meta
        super()._apply(fn, recurse)
        self.data = self._size()
        return self
