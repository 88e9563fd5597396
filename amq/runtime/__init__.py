"""Runs a model: loads a checkpoint (or a full-precision model) with its tokenizer, and streams generated text.

    from amq.runtime import load, generate
    loaded = load("smollm2-4bit")
    for piece in generate(loaded, "The capital of France is"):
        print(piece, end="", flush=True)

The stages that make a checkpoint (amq.search, quantizers and what they import) are never imported from here.
"""

from __future__ import annotations

from amq.runtime.generation import Generation, Sampling, generate
from amq.runtime.loading import load

__all__ = ["Generation", "Sampling", "generate", "load"]
