"""amq: running language models in the memory you have (see README.md).

    import amq
    result = amq.search("smollm2", output="runs/smollm2", target_bits=4.0)     # the package amq.search is callable
    table = amq.evaluate("smollm2", configurations=["runs/smollm2/configuration.json"], uniform="int3,int4")

Importing amq loads nothing heavy: each stage's packages are imported when the stage is used. It does make transformers
able to load amq's checkpoints: `amq.integrations.transformers` is imported when transformers loads its quantizers, or
now if it already has.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate", "quantize", "search"]


def __getattr__(name: str) -> Any:
    if name in ("quantize", "search"):
        return importlib.import_module(f"amq.{name}")
    if name == "evaluate":
        from amq.eval import evaluate

        return evaluate
    raise AttributeError(f"module 'amq' has no attribute {name!r}")


class _Registration:
    """A finder that imports `amq.integrations.transformers` right after `MODULE`, whoever imports that and whenever.

    MODULE takes seconds to import, so that importing it from here would slow down every command that needs no model.
    """

    MODULE = "transformers.quantizers.auto"

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != cls.MODULE:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("amq.integrations.transformers")

            spec.loader.__dict__["exec_module"] = execute_and_register  # of this loader alone
        return spec


if _Registration.MODULE in sys.modules:
    importlib.import_module("amq.integrations.transformers")
else:
    sys.meta_path.insert(0, _Registration)
