"""Selection: from a finished run (archive, cost table, fit) and a budget to one configuration. Evaluates nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from amq.configuration import (
    Configuration,
    Details,
    Memory,
    bytes_read,
    configuration_key,
    linear_bytes,
    memory_items,
)
from amq.errors import AmqError
from amq.formats import KEPT
from amq.model.inventory import Inventory, LinearSpec
from amq.model.shape import DEFAULT_CACHE, LayerCache
from amq.search.archive import Record
from amq.search.loss_curve import LossFit, table_cost
from amq.search.problem import Table
from amq.search.records import RunFile
from amq.search.refine import PHASE as REFINE
from amq.search.settings import BudgetSettings
from amq.search.space import SearchSpace
from amq.search.speed import TOLERANCE, Speed, within


@dataclass(frozen=True)
class Budget:
    """At most `bits` bits per weight, or (with `max_loss`) the fewest bits whose loss is at most that.

    speed: what a token may take, where that is asked. fast: the fastest counts, see `--prefer speed`.
    """

    bits: float | None = None
    max_loss: float | None = None
    speed: Speed | None = None
    fast: bool = False

    def fits(self, formats: Mapping[str, str]) -> bool:
        """Whether a configuration is fast enough."""
        return self.speed is None or self.speed.fits(formats)


def budget_from_memory(
    memory: int, context: int, inventory: Inventory, caches: Sequence[LayerCache], space: SearchSpace
) -> float:
    """Bits per weight that all that is searched may take when everything must fit in `memory` bytes."""
    smallest = Configuration(space.decode(space.smallest), space.group_size)
    items = memory_items(inventory, smallest, caches, context)
    needed = sum(i.bytes for i in items)
    if memory < needed:
        listing = ", ".join(f"{i.name} {i.bytes / 2**20:.1f} MiB" for i in items if i.bytes)
        raise AmqError(
            f"--memory {memory / 2**30:.3f} GiB is below the smallest configuration, which needs "
            f"{needed / 2**30:.3f} GiB ({listing}); " + _remedy(memory, needed, inventory, space)
        )
    return min(8 * (memory - needed + smallest.bytes(space.weights)) / space.numel, space.bits_range[1])


def _remedy(memory: int, needed: int, inventory: Inventory, space: SearchSpace) -> str:
    """What to do where even the smallest configuration, of `needed` bytes, is too large."""
    free = {s.name for v in space.variables for s in v}
    fixed = [s for s in inventory.outer if s.name not in free]
    saved = sum(_now(s, space) - linear_bytes(s, space.formats[0], space.group_size) for s in fixed)
    otherwise = "give more memory, a smaller --context or cheaper --formats"
    if saved <= 0:
        return otherwise
    names, least = " and ".join(s.name for s in fixed), f"{(needed - saved) / 2**30:.3f} GiB"
    if memory >= needed - saved:
        return f"it only fits with {names} quantized too, which takes {least} or more: search with --head auto"
    return f"with {names} quantized too (--head auto) it would still take {least}: {otherwise}"


def _now(spec: LinearSpec, space: SearchSpace) -> int:
    """Bytes of a head or embedding that is no variable."""
    return linear_bytes(spec, space.pinned.get(spec.name, KEPT), space.group_size)


def check_bits(bits: float, space: SearchSpace) -> float:
    """`bits` if the space reaches it, else an error with the reachable range."""
    low, high = space.bits_range
    if not low - 1e-9 <= bits <= high + 1e-9:
        side = "below the smallest" if bits < low else "above the largest"
        outer = f" and {', '.join(s.name for s in space.outer)} among them" if space.outer else ""
        raise AmqError(
            f"a budget of {bits:g} bits per weight is {side} configuration: with "
            f"formats {','.join(space.format_names)} at group {space.group_size}{outer} the reachable range is "
            f"{low:.4f} to {high:.4f}"
        )
    return min(max(bits, low), high)


@dataclass(frozen=True)
class Chosen:
    """A configuration with what is known of its loss: measured, confirmed on held-out windows, predicted."""

    formats: dict[str, str]
    bits_per_weight: float
    loss: float | None
    loss_confirm: float | None
    predicted: float | None


def choose(
    budget: Budget,
    space: SearchSpace,
    records: Sequence[Record],
    table: Table | None = None,
    fit: LossFit | None = None,
) -> Chosen:
    """The best configuration within the budget.

    records: the archive. Candidates are every feasible record and, with a cost table, the knapsack optimum at the
    budget; they compare by measured loss, or by predicted loss where none was measured.
    """
    search = {r.key: r for r in records if r.windows == "search" and r.loss is not None}
    confirm = {r.key: r.loss for r in records if r.windows == "confirm" and r.loss is not None}
    if not search:
        raise AmqError("the run holds no feasible evaluation: nothing to choose from")
    if budget.max_loss is not None:
        return _within_loss(budget, budget.max_loss, search, confirm)
    bits = check_bits(budget.bits if budget.bits is not None else space.bits_range[1], space)
    refined = _refined(records, bits)
    candidates = [
        _from_record(r, confirm)
        for key, r in search.items()
        if r.bits_per_weight <= bits + 1e-6 and (r.phase != REFINE or key == refined) and budget.fits(r.configuration)
    ]
    if table is not None and fit is not None:
        costs = space.variable_costs(table)
        points = [within(budget.speed, costs, space, space.capacity(bits))]
        if budget.fast and budget.speed:
            points += budget.speed.fastest(costs, space.capacity(bits))
        known = {r.key for r in records}  # an infeasible one must not come back as a prediction
        for formats in map(space.decode, points):
            if configuration_key(formats) not in known and budget.fits(formats):
                predicted = float(fit.predict(np.array(table_cost(table, formats))))
                candidates.append(Chosen(formats, space.bits_of(formats), None, None, predicted))
    if not candidates:
        raise AmqError(
            f"nothing that is fast enough was evaluated at {bits:g} bits per weight or below"
            if budget.speed
            else f"nothing was evaluated at {bits:g} bits per weight or below: search longer or raise the budget"
        )
    best, speed = min(candidates, key=_expected_loss), budget.speed
    if not budget.fast or speed is None:
        return best
    enough = [c for c in candidates if _expected_loss(c) <= (1 + TOLERANCE) * _expected_loss(best)]
    return min(enough, key=lambda c: (speed.seconds(c.formats), _expected_loss(c)))


def _refined(records: Sequence[Record], bits: float) -> str | None:
    """The key of what refinement kept last: the best on the held-out windows of what it measured there, and of what was
    measured there before it, as what it started from may have been. Its other moves are no candidates; one that is
    better on the search windows alone is so by chance, after so many tries."""
    begun = next((r.index for r in records if r.phase == REFINE), 0)
    held_out = [r for r in records if r.windows == "confirm" and r.bits_per_weight <= bits + 1e-6]
    measured = [r for r in held_out if r.phase in (REFINE, "budget") or r.index < begun]
    return min(measured, key=lambda r: r.ranked).key if measured else None


def _expected_loss(candidate: Chosen) -> float:
    """Measured where it was, else predicted: every candidate has one of the two."""
    known = candidate.loss if candidate.loss is not None else candidate.predicted
    return math.inf if known is None else known


def _within_loss(budget: Budget, max_loss: float, search: dict[str, Record], confirm: dict[str, float]) -> Chosen:
    good = [r for r in search.values() if r.ranked <= max_loss]
    if not good:
        best = min(search.values(), key=lambda r: r.ranked)
        raise AmqError(
            f"no evaluated configuration has a loss of {max_loss:g} or less; the least is {best.ranked:.5f} at "
            f"{best.bits_per_weight:.3f} bits per weight: raise --max-loss or add a wider format to --formats"
        )
    if budget.fast and (speed := budget.speed):
        return _from_record(min(good, key=lambda r: (speed.seconds(r.configuration), r.ranked)), confirm)
    return _from_record(min(good, key=lambda r: (r.bits_per_weight, r.ranked)), confirm)


def _from_record(record: Record, confirm: dict[str, float]) -> Chosen:
    return Chosen(record.configuration, record.bits_per_weight, record.loss, confirm.get(record.key), None)


def to_configuration(
    chosen: Chosen,
    run: RunFile,
    budget: BudgetSettings,
    speed: Speed | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Configuration:
    """What was chosen, with its figures; budget: says the KV cache in its memory, which a runtime is to have where that
    is another than it would take by itself. speed: by which a token is timed. kinds: {layer: kind of cache}, where
    `--cache auto` chose them."""
    model, group_size, inventory = run.settings.model, run.settings.group_size, run.inventory
    bare = Configuration(chosen.formats, group_size)
    if kinds is None:
        kinds = run.kv_cache.named(budget.cache) if budget.cache != DEFAULT_CACHE else {}
    caches = run.kv_cache.caches(list(kinds.values()) or DEFAULT_CACHE) if budget.context else ()
    kept = "+".join(sorted(set(kinds.values()))) or DEFAULT_CACHE
    details = Details(
        model=model,
        bits_per_weight=round(chosen.bits_per_weight, 6),
        bytes=bare.bytes(inventory.weights),
        bytes_read=round(bytes_read(inventory, bare)),
        loss=chosen.loss,
        loss_confirm=chosen.loss_confirm,
        predicted_loss=chosen.predicted,
        tokens_per_second=None if speed is None else round(1 / speed.seconds(chosen.formats), 3),
        memory=Memory.of(memory_items(inventory, bare, caches, budget.context, kept)),
        provenance=run.provenance,
    )
    return Configuration(chosen.formats, group_size, details, kinds)
