"""What a comparison of orders gives: losses of configurations by banks and as deployed, and how far they agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, ClassVar

import numpy as np

from amq.eval.order_settings import OrderSettings
from amq.model.losses import LN2
from amq.search.scores import quality
from amq.util.records import JsonFile

ALL = "all"
"""All configurations together, as a row has it; those of an entry are spread over all sizes. Other parts are budgets,
as text (`3.5`)."""
Losses = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class OrderEntry:
    """One configuration. point: a digit per variable of the space, in the model's order: its place among the formats.

    banks, deployed: loss by each bank, and as each method deploys it; nats per token, None where not finite.
    """

    part: str
    point: str
    bits: float
    banks: Losses = field(default_factory=dict)
    deployed: Losses = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OrderRow:
    """How a bank's order of a part's configurations agrees with a method's.

    regret: of the configuration that the bank ranks first, deployed loss over the least deployed one, less 1.
    """

    part: str
    bank: str
    method: str
    configurations: int
    spearman: float
    kendall: float
    regret: float


@dataclass(frozen=True, kw_only=True)
class OrderTable(JsonFile):
    """order.json.

    fingerprint: of the model's weights. measured_by: what ran the banks' configurations; deployed ones are torch's.
    text: SHA-256 of the calibration text. windows: a hash of all windows. banks: {name: its folder's}. provenance: of
    the call that wrote last; see `amq.util.provenance`.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/order/2",)

    schema: str = SCHEMAS[0]
    settings: OrderSettings
    fingerprint: str
    measured_by: str
    text: str
    windows: str
    banks: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    rows: tuple[OrderRow, ...] = ()
    entries: tuple[OrderEntry, ...] = ()

    def lacking(self, kind: str, name: str) -> list[int]:
        """Places of the entries without a loss by the bank or method `name`; kind: `banks` or `deployed`."""
        return [place for place, entry in enumerate(self.entries) if name not in getattr(entry, kind)]

    def with_loss(self, place: int, kind: str, name: str, loss: float | None) -> OrderTable:
        """With that loss, and the rows that it completes."""
        entries = list(self.entries)
        changed: dict[str, Any] = {kind: {**getattr(entries[place], kind), name: loss}}
        entries[place] = replace(entries[place], **changed)
        made = replace(self, entries=tuple(entries))
        return replace(made, rows=tuple(agreements(made)))


def agreements(table: OrderTable) -> Iterator[OrderRow]:
    """Of each bank, method and part whose losses are all there."""
    parts = _parts(table)
    banks = dict.fromkeys(name for entry in table.entries for name in entry.banks)
    methods = dict.fromkeys(name for entry in table.entries for name in entry.deployed)
    for bank, method, (part, own) in product(banks, methods, parts.items()):
        if all(bank in e.banks and method in e.deployed for e in own):
            by_bank, by_method = _ranked(e.banks[bank] for e in own), _ranked(e.deployed[method] for e in own)
            found, best = quality(by_method, by_bank), float(by_method.min())
            regret = float(by_method[by_bank.argmin()]) / best - 1 if best > 0 else 0.0
            yield OrderRow(
                part=part, bank=bank, method=method, configurations=len(own), regret=round(regret, 4),
                spearman=round(found["spearman"], 4), kendall=round(found["kendall"], 4),
            )  # fmt: skip


def _parts(table: OrderTable) -> dict[str, list[OrderEntry]]:
    """{part of a row: its configurations}."""
    budgets: dict[str, list[OrderEntry]] = {}
    for entry in table.entries:
        if entry.part != ALL:
            budgets.setdefault(entry.part, []).append(entry)
    return {ALL: list(table.entries), **budgets}


def _ranked(losses: Iterator[float | None]) -> np.ndarray:
    """float64 [configurations]; one that overflowed ranks last."""
    return np.array([LN2 if loss is None else loss for loss in losses])


def markdown(table: OrderTable) -> str:
    """A row per bank and method, a column per part."""
    parts = _parts(table)
    names = ["bank", "deployed", *(f"{_title(part)} ({len(own)})" for part, own in parts.items())]
    rows = {(row.bank, row.method, row.part): row for row in table.rows}
    pairs = dict.fromkeys((row.bank, row.method) for row in table.rows)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for bank, method in pairs:
        cells = [_cell(rows.get((bank, method, part))) for part in parts]
        lines.append(f"| {bank} | {method} | {' | '.join(cells)} |")
    return "\n".join([*_head(table), "", *lines]) + "\n"


def _title(part: str) -> str:
    return "all sizes" if part == ALL else f"{part} bits"


def _cell(row: OrderRow | None) -> str:
    return "–" if row is None else f"{row.spearman:.2f} / {row.kendall:.2f}, {100 * row.regret:.1f} %"


def _head(table: OrderTable) -> Iterator[str]:
    s, machine = table.settings, table.provenance.get("machine", {})
    yield (
        f"{s.model}, {s.formats}, group {s.group_size}, rotation {s.rotation}; Jensen–Shannon divergence in nats per "
        f"token on {s.windows} windows of {s.window_length} tokens of {s.calibration}, of a bank ({s.bank_windows} "
        f"windows) by the {table.measured_by}, deployed ({s.deploy_windows} other windows) by torch; seed {s.seed}. "
        f"Budgets are of the linears, and {s.width:g} bits wide."
    )
    yield (
        "Spearman / Kendall between the orders by the bank's loss and by the deployed one; then what the bank's first "
        "choice loses deployed above the least that any of these configurations loses."
    )
    if machine:
        yield f"{machine.get('processor')}, {machine.get('threads')} threads, {str(table.provenance.get('date'))[:10]}."
