"""The report of a search: one HTML page that works offline, and its charts as PNG files.

    write_report(run_dir) -> [report.html, memory.png, bits.png, cost.png, front.png, …]

`data` reads the run folder, `charts` holds one Altair specification per chart, `page` the words and tables around
them, `page.html.jinja` their place. The page carries Vega's JavaScript, out of the package vl-convert-python, which
also draws the PNG files without a browser. A chart that the run has no data for is left out: the page says why in its
place, and no PNG of an earlier report stays behind.
"""

from __future__ import annotations

from pathlib import Path


def write_report(run_dir: Path) -> list[Path]:
    """Writes report.html and the charts' PNG files into the run folder; returns their paths, report.html first.

    Raises AmqError for a folder that is no run's, for a damaged file in it, and where the extra "report" is missing.
    """
    from amq.util.extras import needs

    with needs("report", "amq report"):
        from amq.report.page import write
    return write(Path(run_dir))
