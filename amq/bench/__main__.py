"""`python -m amq.bench DIR`. Processes that it starts import this file too, so all imports wait until it is run."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from amq.bench.command import main
    from amq.util.settings import run_command

    sys.exit(run_command(main))
