"""The page: what page.html.jinja puts in place and escapes, and the files.

The template holds the sentences, this module the figures of its tables, in the order of the page: what the budget buys
and what it costs, where the bits went, what one step more or less would change, and what there is to trust.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amq.configuration import expand
from amq.report import charts
from amq.report.data import EPSILON, Point, Shown, count_formats, show_bytes, show_change, show_loss
from amq.report.look import show_details, write_page
from amq.search.run_folder import RunFolder
from amq.search.speed import Speed

TEMPLATE = Path(__file__).with_name("page.html.jinja")
NEIGHBOURS = 2  # points on each side of the chosen one that it is compared with


def write(run_dir: Path) -> list[Path]:
    """As `amq.report.write_report`."""
    run = Shown(RunFolder.open(run_dir))
    drawn = {name: draw(run) for name, draw in charts.CHARTS.items()}
    name = run.folder.run.model.name
    filters: dict[str, Callable[..., Any]] = {"loss": show_loss, "bytes": show_bytes}
    return write_page(run_dir, TEMPLATE, drawn, name, charts.CHARTS, _values(run), filters)


def _values(run: Shown) -> dict[str, Any]:
    """What the template wants besides the charts."""
    chosen = next((i for i, p in enumerate(run.choices) if run.is_chosen(p)), None)
    return {
        "shown": run, "run": run.folder.run, "settings": run.folder.settings, "front": run.folder.front,
        "sensitivity": run.folder.sensitivity, "objective": run.objective,
        "tiles": _tiles(run), "uniform": _uniform_rows(run), "memory": _memory_rows(run),
        "steps": [] if chosen is None else _step_rows(run, chosen), "points": _point_rows(run), "chosen": chosen,
        "reads": _reads(run), "shares": _share_rows(run),
        "infeasible": sum(record.loss is None for record in run.evaluated), "details": _details(run),
    }  # fmt: skip


def _tiles(run: Shown) -> list[tuple[str, str, str]]:
    """The figures at the top: (what, value, remark)."""
    chosen, settings = run.chosen, run.folder.settings
    if chosen is None:
        return [("chosen", "nothing yet", f"{len(run.evaluated)} evaluations so far")]
    aims = (("target", settings.target_bits), ("memory", settings.memory), ("loss at most", settings.max_loss))
    aim = next((f"asked for: {name} {value}" for name, value in aims if value is not None), "no budget was given")
    size, full = run.size(chosen.formats), run.size(run.widest)
    share = f"{100 * size / full:.0f} % of {show_bytes(full)} in 16 bits"
    heldout = "on windows that --refine looked at" if run.is_refined else "on unseen windows"
    heldout = "not measured" if chosen.heldout is None else heldout
    found = [
        ("bits per weight", f"{chosen.bits:.2f}", aim),
        ("memory" if run.memory else "memory of the linears", show_bytes(size), share),
        (run.objective.label, show_loss(chosen.lost), "predicted" if chosen.loss is None else "on the search windows"),
        ("held-out loss", show_loss(chosen.heldout), heldout),
    ]
    rivals = [p for p in run.uniform if p.loss is not None and p.bits <= chosen.bits + EPSILON]
    if not rivals:
        return [*found, ("uniform", "–", "none that was evaluated costs as little")]
    rival = min(rivals, key=lambda p: p.lost)
    ours, theirs = _paired(chosen, rival)
    times = f"{theirs / ours:.2g} times as much" if ours > 0 else "no loss to compare"
    return [*found, (f"uniform {rival.name} loses", show_loss(theirs), f"{times}, at {rival.bits:.2f} bits")]


def _paired(ours: Point, theirs: Point) -> tuple[float, float]:
    """Two losses on the same windows: the held-out ones where both have them, for the search chose on the others."""
    if ours.heldout is not None and theirs.heldout is not None:
        return ours.heldout, theirs.heldout
    return ours.lost, theirs.lost


def _cells(run: Shown, name: str, point: Point) -> list[str]:
    losses = (show_loss(point.loss), show_loss(point.heldout))
    return [name, f"{point.bits:.2f}", show_bytes(run.size(point.formats)), *losses]


def _uniform_rows(run: Shown) -> list[list[str]]:
    """The chosen configuration among the uniform ones, by rising bits."""
    if run.chosen is None:
        return []
    points = sorted([run.chosen, *run.uniform], key=lambda p: p.bits)
    changes = [show_change(*reversed(_paired(run.chosen, p))) if p.name else "" for p in points]
    return [[*_cells(run, p.name or "chosen", p), change] for p, change in zip(points, changes, strict=True)]


def _memory_rows(run: Shown) -> list[list[str]]:
    total = sum(item.bytes for item in run.memory)
    rows = [[i.name, show_bytes(i.bytes), f"{100 * i.bytes / total:.0f} %", i.note] for i in run.memory]
    return [*rows, ["in all", show_bytes(total), "", ""]] if rows else []


def _share_rows(run: Shown) -> list[list[str]]:
    """How the memory could be shared between weights and cache, the chosen way marked."""
    found = run.folder.shares
    if found is None:
        return []
    rows = []
    for share in found.shares:
        counts = Counter(expand(share.kinds).values())
        kinds = ", ".join(f"{counts[kind]} × {kind}" for kind in sorted(counts, key=lambda kind: -counts[kind]))
        name = f"{share.name} (chosen)" if share.name == found.chosen else share.name
        loss = show_loss(share.cost if share.loss is None else share.loss)
        rows.append([name, kinds, show_bytes(share.cache_bytes), f"{share.bits:.2f}", loss])
    return rows


def _reads(run: Shown) -> str:
    """What one token reads of the chosen configuration, as a sentence."""
    if run.chosen is None or not run.memory:
        return ""
    read, full = run.read(run.chosen.formats), run.read(run.widest)
    return (
        f"For each token {show_bytes(read)} of weights are read, {100 * read / full:.0f} % of what 16 bits take: "
        "this and the machine's bandwidth bound the speed." + (f" {_speed(run, run.speed)}" if run.speed else "")
    )


def _speed(run: Shown, speed: Speed) -> str:
    assert run.chosen is not None
    after = f" after {speed.context} others" if speed.context else ""
    wanted = f"; {speed.least:g} were asked for" if speed.least else ""
    return (
        f"By the speed table of this run ({speed.table.processor}, {speed.table.threads} threads) that is "
        f"{1 / speed.seconds(run.chosen.formats):.1f} tokens/s{after}{wanted}."
    )


def _step_rows(run: Shown, chosen: int) -> list[list[str]]:
    """The chosen point between its neighbours on the front; in the end the changes of memory and loss."""
    first, base, rows = max(0, chosen - NEIGHBOURS), run.choices[chosen], []
    for i, point in enumerate(run.choices[first : chosen + NEIGHBOURS + 1], first):
        name = f"{abs(i - chosen)} {'smaller' if i < chosen else 'larger'}" if i != chosen else "chosen"
        changes = show_bytes(run.size(point.formats) - run.size(base.formats), "+"), show_change(point.lost, base.lost)
        rows.append([*_cells(run, name, point), *changes])
    return rows


def _point_rows(run: Shown) -> list[list[str]]:
    losses = [map(show_loss, (p.loss, p.heldout, p.predicted)) for p in run.choices]
    counts = [count_formats(p.formats.values()) for p in run.choices]
    speeds = [[f"{1 / run.speed.seconds(p.formats):.1f}"] if run.speed else [] for p in run.choices]
    rows = zip(run.choices, losses, speeds, counts, strict=True)
    return [[f"{p.bits:.2f}", *shown, *speed, n] for p, shown, speed, n in rows]


def _details(run: Shown) -> dict[str, dict[str, str]]:
    """Everything needed to repeat the run, by group."""
    of = run.folder.run
    groups: dict[str, Mapping[str, Any]] = {
        "Model": asdict(of.model), "Settings": of.settings.json(), "Calibration": asdict(of.calibration),
        "Seconds": dict(of.timings or {}), "Evaluations": asdict(of.evaluations) if of.evaluations else {},
        "Machine": asdict(of.machine), "Versions": of.versions, "Pinned linears": of.pinned,
    }  # fmt: skip
    return show_details(groups)
