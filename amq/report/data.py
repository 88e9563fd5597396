"""What a run folder says, read once: the input of both the HTML charts (plotly) and the PNG charts (matplotlib).

`load_run` reads the JSON files of one run; `run.json` must exist, every other file may be absent and every number may
be null. The archive can hold 10,000 lines of hundreds of linears each, so a line shrinks to a `Candidate` (bits, loss,
a count of formats) as it is read. `Grid` places linears by role and block, both of which come from the run folder:
nothing here knows a model's shape, and bits come from the format registry. `report_charts.py` derives each chart's
numbers from these.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.formats import STORED
from amq.search.archive import Record
from amq.search.front_file import Front
from amq.search.run_folder import RunFolder
from amq.util.records import to_json

HOVER_BLOCKS = 100
"""Up to this many blocks a configuration's text has one character per block; above, only its counts."""


@dataclass(frozen=True)
class Candidate:
    """One line of archive.jsonl without its configuration; `loss` is None where the candidate was infeasible."""

    index: int
    phase: str
    windows: str
    bits: float
    loss: float | None
    counts: str


@dataclass(frozen=True)
class Run:
    """The files of one run folder; an optional file that is absent is None (an absent archive is empty)."""

    path: Path
    run: dict[str, Any]
    archive: list[Candidate]
    front: dict[str, Any] | None
    configuration: dict[str, Any] | None
    sensitivity: dict[str, Any] | None
    cost: dict[str, Any] | None
    surrogate: list[dict[str, Any]] | None

    @property
    def model(self) -> str:
        return str(child(self.run, "model").get("name") or "unnamed model")

    @property
    def settings(self) -> dict[str, Any]:
        return child(self.run, "settings")

    @property
    def linears(self) -> list[dict[str, Any]]:
        return [spec for spec in self.run.get("linears") or [] if spec.get("name")]

    @property
    def pinned(self) -> set[str]:
        return set(self.run.get("pinned") or ()) | set((self.sensitivity or {}).get("pinned") or ())


@dataclass(frozen=True)
class Grid:
    """Where each linear sits: `cells[linear] = (role index, block index)` into `roles` and `blocks`."""

    roles: list[str]
    blocks: list[str]
    cells: dict[str, tuple[int, int]]

    def lines(self, configuration: Mapping[str, str]) -> list[str]:
        """The configuration in a few lines of text: format counts, then per role one character per block."""
        lines = [count_formats(configuration.values())]
        if len(self.blocks) > HOVER_BLOCKS or len(self.roles) > 16:
            return lines
        rows = [["·"] * len(self.blocks) for _ in self.roles]
        for linear, name in configuration.items():
            if linear in self.cells:
                role, block = self.cells[linear]
                rows[role][block] = format_label(name)
        joint = "" if all(len(label) == 1 for row in rows for label in row) else " "
        width = max(map(len, self.roles), default=0)
        return lines + [f"{role:<{width}} {joint.join(row)}" for role, row in zip(self.roles, rows, strict=True)]


def load_run(run_dir: Path) -> Run:
    """Every file of the run folder `run_dir`, or an AmqError that names the file at fault."""
    folder = RunFolder.open(run_dir)
    chosen = folder.configuration
    return Run(
        path=run_dir,
        run=to_json(folder.run),
        archive=[_candidate(record) for record in folder.archive],
        front=_front(folder.front),
        configuration={"formats": chosen.formats, **to_json(chosen.details)} if chosen else None,
        sensitivity=to_json(folder.sensitivity),
        cost=to_json(folder.cost),
        surrogate=to_json(folder.surrogate),
    )


def _front(front: Front | None) -> dict[str, Any] | None:
    """front.json, its band as the limits of every point."""
    if front is None:
        return None
    limits = [front.band.around(point.loss) for point in front.front] if front.band else []
    low, high = [list(side) for side in zip(*limits, strict=True)] or ([], [])
    return {**to_json(front), "band": {"low": low, "high": high}}


def _candidate(record: Record) -> Candidate:
    return Candidate(
        index=record.index,
        phase=record.phase,
        windows=record.windows,
        bits=record.bits_per_weight,
        loss=record.loss,
        counts=count_formats(record.configuration.values()),
    )


def make_grid(run: Run) -> Grid:
    """Roles in the model's order, shortened to their last part where that stays unambiguous; blocks by number."""
    linears = run.linears
    roles = list(dict.fromkeys(str(spec.get("role") or spec["name"]) for spec in linears))
    blocks = list(dict.fromkeys(spec.get("block") for spec in linears))
    blocks.sort(key=lambda block: (block is None, block or 0))
    tails = [role.rsplit(".", 1)[-1] for role in roles]
    row = {role: i for i, role in enumerate(roles)}
    column = {block: i for i, block in enumerate(blocks)}
    places = {spec["name"]: (str(spec.get("role") or spec["name"]), spec.get("block")) for spec in linears}
    return Grid(
        roles=tails if len(set(tails)) == len(tails) else roles,
        blocks=["none" if block is None else str(block) for block in blocks],
        cells={name: (row[role], column[block]) for name, (role, block) in places.items()},
    )


def number(value: Any) -> float | None:
    """`value` as a finite float, or None for null, NaN, infinity and anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def child(document: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """The object at `key`, or an empty one where it is absent or null."""
    return dict((document or {}).get(key) or {})


def format_bits(name: str) -> float:
    """Code bits of a format; a name from a newer registry sorts last."""
    return STORED[name].code_bits if name in STORED else math.inf


def format_label(name: str) -> str:
    """The format's code bits as text ("3"), or its name where the registry does not know it."""
    return f"{STORED[name].code_bits:g}" if name in STORED else name


def sort_formats(names: Iterable[str]) -> list[str]:
    """Distinct format names, fewest bits first."""
    return sorted(set(names), key=lambda name: (format_bits(name), name))


def count_formats(names: Iterable[str]) -> str:
    """`"45 × int2, 120 × int3"`: how many linears hold each format, fewest bits first."""
    counts = Counter(names)
    return ", ".join(f"{counts[name]} × {name}" for name in sort_formats(counts))


def show_loss(loss: float | None) -> str:
    """Three significant digits without an exponent above 1e-5; a dash for None."""
    if loss is None:
        return "–"
    if loss == 0 or abs(loss) < 1e-5:
        return f"{loss:.2g}"
    return f"{loss:.{max(0, 2 - math.floor(math.log10(abs(loss))))}f}"


def show_bits(bits: float | None) -> str:
    return "–" if bits is None else f"{bits:.2f}"


def show_bytes(count: float) -> str:
    """Binary units, three significant digits: "812 MiB", "1.35 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


def show_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
