"""The quantize stage: `python -m amq.quantize`, and `amq.quantize(...)` in Python.

The package itself is callable, so that `amq.quantize` can be both the stage's package and the function users call.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amq.quantize.run import QuantizeResult
    from amq.util.progress import Progress


def quantize(
    model: str, output: str, *, resume: bool = False, progress: Progress | None = None, **settings: Any
) -> QuantizeResult:
    """Quantizes `model` and writes the checkpoint folder `output`.

    settings: any field of `amq.quantize.settings.QuantizeSettings` (the command's flags with underscores).
    Raises AmqError for bad input, before anything is written.
    """
    from amq.quantize.settings import QuantizeSettings

    made = QuantizeSettings.make(model=str(model), output=str(output), **settings)  # refused before torch is imported
    from amq.quantize.run import run_quantize

    return run_quantize(made, resume, progress)


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> QuantizeResult:
        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
