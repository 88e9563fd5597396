"""What a quantization is going to do and to need, said and checked before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from amq.checkpoint.store import SHARD_SIZE
from amq.configuration import OTHER_BYTES, Configuration
from amq.errors import AmqError
from amq.model.calibration import FLOAT, STATE_BYTES, gram_bytes, in_parts
from amq.model.inventory import EXPERT, Inventory, embedding_weight, get_linear
from amq.model.paging import block_bytes
from amq.quantize.pieces import STACK
from amq.quantize.quantizers.gptq import REFIT_BYTES, ROUND_BYTES
from amq.quantize.shown import counts_text
from amq.util.folders import real_folder
from amq.util.limits import check_memory, free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_COPIES = 4
"""Of what is rounded at once, in float32: itself, its codes, its errors, its result."""
ROTATED_COPIES = 1
"""More of both where they may be rotated: of what is rounded at once in float32, and of one input's second moments."""
RESULT_COPIES = 2
"""Of a block's packed weights: as they are made, and as its file is written."""
GRAM_COPIES = 2
"""The second moments of a block's inputs, and what is made of those that are worked with."""
FACTOR_COPIES = 2
"""On a GPU, where those are factorized outside of their place: the matrix in its order, and its factor."""
HEADERS = 1 << 20
"""Bytes allowed for what files of tensors hold besides them, and for a log that grows."""


def working_bytes(
    model: PreTrainedModel,
    inventory: Inventory,
    configuration: Configuration,
    sharing: Sequence[Sequence[str]],
    windows: Tensor,
    calibrated: bool,
    scales: bool = False,
    rotates: bool = False,
) -> int:
    """Bytes needed besides the loaded model: hidden states, one block's second moments, copies of what is rounded, one
    block's results, packed head and embeddings, and of a model that is read block by block that block; or what is held
    in 16 bits for a file, where that is more.

    sharing: groups of linears that read one tensor. windows: int64 [windows, length]. scales: whether AWQ's are
    searched, for which a block is measured as a whole and a layer of experts kept twice. rotates: whether inputs may be
    rotated.
    """
    largest = max(s.numel for s in inventory.linears)
    experts = [sum(s.numel for s in inventory.in_block(b) if s.kind == EXPERT) for b in range(inventory.n_blocks)]
    stacked = max(largest, min(STACK, max(experts)))
    results = RESULT_COPIES * max(configuration.bytes(inventory.in_block(b)) for b in range(inventory.n_blocks))
    always = configuration.bytes(inventory.outer) + block_bytes(model)
    written = _written_bytes(inventory, configuration)
    needed = (WEIGHT_COPIES + ROTATED_COPIES * rotates) * FLOAT * stacked + results
    if not calibrated:
        return always + max(needed, written)
    followers = {name for group in sharing for name in group[1:]}
    blocks = [inventory.in_block(block) for block in range(inventory.n_blocks)]
    grams = max(gram_bytes(p, followers) for b in blocks for p in ([b] if scales else in_parts(b)))
    embedding = embedding_weight(model)
    states = (windows.numel() + windows.shape[1]) * model_width(model, inventory) * embedding.element_size()
    states *= 1 + any(experts)  # what enters a layer of experts is kept, for those that few tokens reach
    needed += min(states, STATE_BYTES) + GRAM_COPIES * grams + FLOAT * max(experts) * scales
    widest = max(s.in_features for s in inventory.linears)
    needed += ROTATED_COPIES * rotates * FLOAT * widest**2
    if embedding.device.type != "cpu":
        needed += FACTOR_COPIES * FLOAT * widest**2 + ROUND_BYTES + REFIT_BYTES
    return always + max(needed, written)


def _written_bytes(inventory: Inventory, configuration: Configuration) -> int:
    """Most bytes of weights in 16 bits that are made for a file at once, `write_tensors`."""
    packed = [s for s in inventory.outer if s.name in configuration.quantized]
    names = {f"{name}.weight" for s in packed for name in (s.name, s.tied)}
    sizes = [OTHER_BYTES * o.numel for o in inventory.others if o.name not in names]
    small = sum(size for size in sizes if 2 * size <= SHARD_SIZE)
    return min(small, SHARD_SIZE) + max((size for size in sizes if 2 * size > SHARD_SIZE), default=0)


def model_width(model: PreTrainedModel, inventory: Inventory) -> int:
    """Numbers per token between blocks."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, "hidden_size", None) or get_linear(model, inventory.linears[0].name).in_features


def check_disk(output: Path, needed: int) -> int:
    """Raises AmqError where the disk of `output` has less than `needed` bytes; returns what it has."""
    folder = real_folder(output)
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise AmqError(
            f"not enough disk space for --output {output}: {needed / 2**20:.0f} MiB needed (the checkpoint, and the "
            f"finished blocks until it is written), {free / 2**20:.0f} MiB free at {place}; free some, or give another "
            "folder"
        )
    return free


def plan_text(
    inventory: Inventory,
    configuration: Configuration,
    method: str,
    checkpoint: int,
    memory: int,
    disk: tuple[int, int],
    device: str,
) -> str:
    """The first lines of the plan. checkpoint, memory: bytes; disk: bytes needed and free.

    Raises AmqError where the memory is not free.
    """
    import psutil

    check_memory(memory, f"quantizing by {method}", device)
    formats = counts_text(inventory.linears, configuration.formats)
    formats += "".join(f"; {s.name} {configuration.formats[s.name]}" for s in configuration.of(inventory.outer))
    resident, free = psutil.Process().memory_info().rss, free_memory()
    return (
        f"plan: {len(inventory.linears)} linears in {inventory.n_blocks} blocks by {method} ({formats}): "
        f"{configuration.bits_per_weight(inventory.weights):.4f} bits per weight, {checkpoint / 2**20:.1f} MiB in all\n"
        f"plan: memory: {resident / 2**30:.2f} GiB in use with the model, about {memory / 2**30:.2f} GiB more, "
        f"{free / 2**30:.2f} GiB free; disk: {disk[0] / 2**20:.0f} MiB needed, {disk[1] / 2**20:.0f} MiB free"
    )


def time_text(seconds: float) -> str:
    """Seconds up to two minutes, then minutes."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
