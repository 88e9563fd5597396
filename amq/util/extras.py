"""Optional packages: what a missing one is called by, and the line that installs it.

The base install runs a checkpoint. What a stage needs beyond that is an extra of the distribution (`EXTRAS`), imported
inside `needs`, so that a machine without it gets one line that names it instead of a traceback:

    with needs("serve", "amq serve"):
        import uvicorn
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from amq.errors import AmqError

DISTRIBUTION = "amq-llm"
"""What pip calls this package (it is imported as `amq`). setup.py reads this line."""
EXTRAS = ("models", "search", "report", "export", "serve", "split", "datasets", "tasks", "gpu", "all", "test")
"""As in setup.py's `extras_require`."""


def install_hint(extra: str = "") -> str:
    """The command that installs this package with `extra`, or alone."""
    return f'pip install "{DISTRIBUTION}[{extra}]"' if extra else f"pip install {DISTRIBUTION}"


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Imports inside of it may fail for want of a package that `extra` installs: an AmqError that names all three.

    what: the verb or setting that asked, as a user types it (`amq serve`, `--tasks`).
    A module of amq itself that is missing is a defect of ours and keeps its traceback.
    """
    if extra not in EXTRAS:
        raise KeyError(f"{extra!r} is no extra of this package: {', '.join(EXTRAS)}")
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if missing.partition(".")[0] == "amq":
            raise
        message = f'{what} needs the extra "{extra}" ({missing} is not installed): {install_hint(extra)}'
        raise AmqError(message) from error
