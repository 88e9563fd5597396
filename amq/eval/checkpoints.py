"""A checkpoint as it runs in the runtime, and dequantized into plain torch linears."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from amq.checkpoint.store import Checkpoint, open_checkpoint
from amq.configuration import OTHER_BYTES
from amq.formats import get_format
from amq.kernels.backends import check_activations, choose_backend
from amq.model.open import LoadedModel, load_model
from amq.util.extras import needs
from amq.util.limits import fit_threads


def open_all(folders: Iterable[str]) -> dict[str, Checkpoint]:
    """The checkpoints at `folders`, hashes verified, before any of them is loaded."""
    return {folder: open_checkpoint(Path(folder).expanduser()) for folder in folders}


def runtime_backend(checkpoints: Iterable[Checkpoint], backend: str | None, activations: str, device: str) -> str:
    """`backend`, or the fastest one on `device` that runs the formats of all `checkpoints`: a table compares like."""
    formats = {fmt for checkpoint in checkpoints for fmt in checkpoint.record.multiplied}
    chosen = backend or choose_backend(sorted(formats), torch.device(device).type)
    check_activations(chosen, activations)
    return chosen


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Of everything that has a format, as everywhere: head and embeddings where they are quantized."""
    return checkpoint.record.bits_per_weight


def weight_bytes(checkpoint: Checkpoint) -> int:
    """All weights: packed ones as stored, everything else in 16 bits."""
    others = sum(checkpoint.tensor(name).numel() for name in checkpoint.other_names)
    record = checkpoint.record
    sizes = (get_format(record.formats[n]).stored_bytes(*s, record.group_size) for n, s in record.shapes.items())
    return sum(sizes) + OTHER_BYTES * others


def load(name: str, dtype: str, device: str, backend: str, activations: str, trust: bool = False) -> LoadedModel:
    """The model as it runs in the runtime; `open_all` has verified it."""
    with needs("models", f"measuring {name}"):
        from amq.integrations.transformers import AmqConfig

    fit_threads()
    how = AmqConfig(activations=activations, backend=backend, verify=False)
    return load_model(name, dtype, device, trust, quantization_config=how)
