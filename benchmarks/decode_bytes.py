"""Bytes that the native engine moves for a token beside its weights: keys, values and recurrent state."""

from __future__ import annotations

from pathlib import Path

from amq.checkpoint.store import open_checkpoint
from amq.runtime.decoder_spec import Attention, DecoderSpec, DeltaNet, ShortConv
from amq.runtime.families import read_spec

FLOAT = 4
"""Bytes of a number of recurrent state."""


def spec_of(folder: Path) -> DecoderSpec:
    """Of the checkpoint in `folder`; raises Unsupported where the engine does not run it."""
    checkpoint = open_checkpoint(folder, verify=False)
    names = {*checkpoint.record.formats, *checkpoint.other_names}
    return read_spec(checkpoint.config, str(folder / "config.json"), names)


def beside_weights(spec: DecoderSpec, positions: int, cache: int = 2) -> int:
    """Of one token of one sequence. positions: in its cache. cache: bytes of one of its numbers."""
    total = 0
    for step in spec.steps:
        op = step.op
        if isinstance(op, Attention):
            seen = min(positions, op.window or positions)
            total += seen * 2 * op.n_kv_heads * op.head_dim * cache
        elif isinstance(op, DeltaNet):
            channels = 2 * op.n_key_heads * op.key_dim + op.n_value_heads * op.value_dim
            state = (op.kernel - 1) * channels + op.n_value_heads * op.key_dim * op.value_dim
            total += 2 * FLOAT * state  # read, and written
        elif isinstance(op, ShortConv):
            total += 2 * FLOAT * (op.kernel - 1) * op.out.in_features
    return total
