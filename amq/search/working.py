"""What a search holds beside the loaded model: working copies of weights, codes, and which formats its bank has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from amq.configuration import linear_bytes
from amq.formats import BitFormat
from amq.model.inventory import EMBEDDING, LinearSpec, embedding_weight
from amq.model.paging import block_bytes, pager_of
from amq.search.space import SearchSpace, is_outer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCE = "reference"
"""The backend that multiplies with matrices in the model's own dtype."""
CACHES = 3
"""What `--cache-memory` bounds, each for itself: reference distributions, hidden states, weights that are ready."""


def working_bytes(
    model: PreTrainedModel, space: SearchSpace, cache_memory: int, backend: str = "reference", whole: bool = True
) -> int:
    """A working copy of all weights that are in the model at once, what `cache_memory` bounds, and of a model that is
    read block by block that block.

    whole: whether those are the weights of all blocks, or of one at a time as in a model that is read block by block.
    """
    size = embedding_weight(model).element_size()
    blocks: Counter[int] = Counter()
    for spec in space.weights:
        blocks[spec.block] += 0 if is_outer(spec) else _copy_bytes(spec, space, size, backend)
    at_once = sum(blocks.values()) if whole and pager_of(model) is None else max(blocks.values())
    outer = sum(_copy_bytes(spec, space, size, backend) for spec in space.outer)
    return at_once + outer + CACHES * cache_memory + block_bytes(model)


def _copy_bytes(spec: LinearSpec, space: SearchSpace, size: int, backend: str) -> int:
    """What a weight is made into at most: a matrix like itself, whose numbers have `size` bytes, or the codes that a
    kernel multiplies with; a head that is tied to the embedding is both."""
    dense = spec.numel * size
    if backend == REFERENCE or spec.kind == EMBEDDING:
        return dense
    formats = (fmt for fmt in space.formats_of(spec) if isinstance(fmt, BitFormat))
    codes = max((linear_bytes(spec, fmt, space.group_size) for fmt in formats), default=0)
    return codes + (dense if spec.tied else 0)


def all_codes(space: SearchSpace) -> int:
    """Bytes of all weights in all their formats."""
    return sum(
        linear_bytes(spec, fmt, space.group_size)
        for spec in space.quantized
        for fmt in space.formats_of(spec)
        if isinstance(fmt, BitFormat)
    )


def bank_formats(space: SearchSpace) -> tuple[list[BitFormat], dict[str, list[BitFormat]]]:
    """What a bank must hold: formats of all linears, and {name: formats} of head and embeddings; cheapest first."""

    def of(specs: Iterable[LinearSpec]) -> list[BitFormat]:
        found = {fmt for s in specs for fmt in space.formats_of(s) if isinstance(fmt, BitFormat)}
        return sorted(found, key=lambda f: f.code_bits)

    linears = of(s for s in space.quantized if not is_outer(s))
    return linears, {s.name: of([s]) for s in space.quantized if is_outer(s)}
