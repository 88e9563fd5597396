"""The search stage: `python -m amq.search`, and `amq.search(...)` in Python.

The package itself is callable, so that `amq.search` can be both the stage's package and the function users call.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amq.search.run import SearchResult
    from amq.util.progress import Progress


def search(
    model: str,
    output: str,
    *,
    preset: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> SearchResult:
    """Searches `model` and writes the run folder `output`.

    settings: any field of `amq.search.settings.SearchSettings` (the command's flags with underscores).
    Raises AmqError for bad input, before anything is written.
    """
    from amq.search.settings import SearchSettings

    made = SearchSettings.preset(preset, model=str(model), output=str(output), **settings)  # before torch is imported
    from amq.report import write_report
    from amq.search.run import run_search
    from amq.util.extras import needs

    with needs("search", "amq search"):  # before hours of work, not after
        import pymoo  # noqa: F401

        import amq.report.page  # noqa: F401

    result = run_search(made, resume, progress)
    write_report(result.output)
    return result


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> SearchResult:
        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
