"""The page of `amq eval strategies`: one chart of hypervolumes, and what each took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from amq.report.look import PARTS, Chart, finish, table, write_page

TEMPLATE = Path(__file__).with_name("strategies.html.jinja")
NAME = "strategies"
ABOUT = ("granularity", "inputs", "systems", "deviation")


def write(folder: Path, model: str, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Writes report.html and strategies.png; rows: strategy, family, hv7 (median), least, most, equivalents; and what
    is said of the strategy: granularity, inputs, systems, deviation."""
    ranked = sorted(rows, key=lambda row: -row["hv7"])
    cells = [
        [row["strategy"], row["family"], f"{row['hv7']:.4f}", f"{row['least']:.4f} to {row['most']:.4f}",
         f"{row['equivalents']:.0f}"]
        for row in ranked
    ]  # fmt: skip
    about = [[row[key] for key in ("strategy", *ABOUT)] for row in rows]
    values = {"model": model, "tiles": [("best", ranked[0]["strategy"], f"hypervolume {ranked[0]['hv7']:.4f}")],
              "rows": cells, "about": about, "details": {}}  # fmt: skip
    return write_page(folder, TEMPLATE, {NAME: strategies_chart(ranked)}, model, (NAME,), values)


def strategies_chart(rows: Sequence[dict[str, Any]]) -> Chart:
    """A point per strategy, the best on top, with the span of its seeds."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    y = alt.Y("strategy:N").title(None).sort([row["strategy"] for row in rows])
    colors = [PARTS[i % len(PARTS)] for i in range(len(families))]
    color = alt.Color("family:N").title(None).scale(domain=families, range=colors)
    tooltip = ["strategy:N", "family:N", "hv7:Q", "least:Q", "most:Q", "equivalents:Q"]
    x = alt.X("hv7:Q").title("hypervolume of the losses at seven budgets (more is better)").scale(zero=False)
    rows = [{key: value for key, value in row.items() if key not in ABOUT} for row in rows]
    points = table(rows).mark_point(filled=True, size=90).encode(x, y, color, tooltip=tooltip)
    spans = table(rows).mark_rule(strokeWidth=2).encode(alt.X("least:Q").scale(zero=False), alt.X2("most:Q"), y, color)
    text = "Dot chart: hypervolume by strategy, with the span of its seeds"
    return finish([spans, points], "Strategies of bit allocation", text, 24 * len(rows) + 20)
