"""Runs a model: loads a checkpoint (or a full-precision model) with its tokenizer, and streams generated text.

    from amq.runtime import load, generate
    runtime = load("smollm2-4bit")
    for piece in generate(runtime, "The capital of France is"):
        print(piece, end="", flush=True)

The stages that make a checkpoint (amq.search, quantizers and what they import) are never imported from here, and
transformers only where a model needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amq.util.lazy import lazy

if TYPE_CHECKING:
    from amq.runtime.generation import Generation, generate
    from amq.runtime.loading import Runtime, load
    from amq.runtime.settings import Sampling

__all__ = ["Generation", "Runtime", "Sampling", "generate", "load"]
__getattr__ = lazy(
    __name__,
    {
        "Generation": "amq.runtime.generation",
        "generate": "amq.runtime.generation",
        "Runtime": "amq.runtime.loading",
        "load": "amq.runtime.loading",
        "Sampling": "amq.runtime.settings",
    },
)
