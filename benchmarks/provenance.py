"""What benchmarks write: figures, and what made them, which `amq.util.provenance` says.

python benchmarks/provenance.py gemv        # the path of a new file: results/gemv-PROCESSOR-DATE.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from amq.util.files import write_json
from amq.util.machine import cpu_name
from amq.util.provenance import checkout, provenance, result_name, started_from

__all__ = ["checkout", "provenance", "write_results"]

started_from()  # now, when a benchmark begins


def write_results(path: Path, content: dict[str, Any]) -> None:
    """`content` and its provenance as JSON, all of it or nothing."""
    write_json(path, content | {"provenance": provenance()})


if __name__ == "__main__":
    print(Path(__file__).parent / "results" / result_name(*sys.argv[1:], cpu_name()))
