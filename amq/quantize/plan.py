"""What a quantization is going to do and to need, said and checked before it begins."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.model.inventory import Inventory, embedding_weight, get_linear
from amq.util.folders import real_folder
from amq.util.limits import check_memory, free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT = 4
"""Bytes of the numbers that blocks are quantized in."""
WEIGHT_COPIES = 4
"""Of the largest linear, in float32, while it is rounded: itself, its codes, its errors, its result."""
GRAM_COPIES = 2
"""The sums of a block's second moments, and their means."""
HEADERS = 1 << 20
"""Bytes allowed for what files of tensors hold besides them, and for a log that grows."""


def working_bytes(
    model: PreTrainedModel, inventory: Inventory, sharing: Sequence[Sequence[str]], windows: Tensor, calibrated: bool
) -> int:
    """Bytes needed besides the loaded model: hidden states, one block's second moments, the largest linear's copies.

    sharing: groups of linears that read one tensor. windows: int64 [windows, length].
    """
    largest = max(s.numel for s in inventory.linears)
    if not calibrated:
        return WEIGHT_COPIES * FLOAT * largest
    followers = {name for group in sharing for name in group[1:]}
    grams = [0] * inventory.n_blocks
    for spec in inventory.linears:
        grams[spec.block] += spec.in_features**2 * (spec.name not in followers)
    embedding = embedding_weight(model)
    states = (windows.numel() + windows.shape[1]) * model_width(model, inventory) * embedding.element_size()
    return states + GRAM_COPIES * FLOAT * max(grams) + WEIGHT_COPIES * FLOAT * largest


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
    counts = Counter(configuration.formats.values())
    formats = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    resident, free = psutil.Process().memory_info().rss, free_memory()
    return (
        f"plan: {len(inventory.linears)} linears in {inventory.n_blocks} blocks by {method} ({formats}): "
        f"{configuration.bits_per_weight(inventory.linears):.4f} bits per weight, {checkpoint / 2**20:.1f} MiB in all\n"
        f"plan: memory: {resident / 2**30:.2f} GiB in use with the model, about {memory / 2**30:.2f} GiB more, "
        f"{free / 2**30:.2f} GiB free; disk: {disk[0] / 2**20:.0f} MiB needed, {disk[1] / 2**20:.0f} MiB free"
    )


def time_text(seconds: float) -> str:
    """Seconds up to two minutes, then minutes."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
