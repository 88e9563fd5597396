"""The report of split runs: one HTML page that works offline, and its charts as PNG files.

    write_report([run])                             # into the run's folder
    write_report([run, other, third], output)       # compared, on one page

`figures` reads the folders and does the arithmetic, `charts` holds one Altair specification per chart, `page` the words
and tables around them, `page.html.jinja` their place; frame and colours are those of `amq.report.look`. A chart that no
run has data for is left out: the page says why in its place. A run may still be going on. Nothing of a run is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_report(runs: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Writes report.html and the charts' PNG files into `output`, by default the first run's folder; returns their
    paths, report.html first.

    Raises AmqError for a folder that is no split run's or is given twice, for a damaged file in it, for an `output`
    that cannot be written, and where the extra "split" is missing.
    """
    from amq.util.extras import needs

    with needs("split", "amq split report"):
        from amq.split.page import write
    return write([Path(run) for run in runs], None if output is None else Path(output))
