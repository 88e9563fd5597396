"""amq: running language models in the memory you have (see README.md).

    import amq
    result = amq.search("smollm2", output="runs/smollm2", target_bits=4.0)     # the package amq.search is callable
    table = amq.evaluate("smollm2", configurations=["runs/smollm2/configuration.json"], uniform="int3,int4")

Importing amq loads nothing heavy: each stage's packages are imported when the stage is used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate", "search"]


def __getattr__(name: str) -> Any:
    if name == "search":
        from importlib import import_module

        return import_module("amq.search")
    if name == "evaluate":
        from amq.eval import evaluate

        return evaluate
    raise AttributeError(f"module 'amq' has no attribute {name!r}")
