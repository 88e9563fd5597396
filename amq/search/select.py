"""`select RUN`: chooses again from a finished run, in milliseconds: no model is loaded, nothing is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.configuration import Configuration, parse_pins
from amq.errors import AmqError
from amq.model.inventory import Inventory
from amq.search.archive import read_archive
from amq.search.choose import Budget, budget_from_memory, check_bits, choose, to_configuration
from amq.search.loss_curve import fit_records
from amq.search.records import provenance
from amq.search.run_folder import CostFile, RunFile
from amq.search.settings import SearchSettings
from amq.search.space import SearchSpace
from amq.util.settings import parse_size


@dataclass(frozen=True)
class FinishedRun:
    """A run folder, read back without its model."""

    run: RunFile
    settings: SearchSettings
    inventory: Inventory
    space: SearchSpace
    records: list[dict[str, Any]]
    table: dict[str, dict[str, float]] | None

    @staticmethod
    def read(folder: Path) -> FinishedRun:
        if not (folder / "run.json").is_file() or not (folder / "archive.jsonl").is_file():
            raise AmqError(f"{folder} is not a run folder: expected run.json and archive.jsonl from `amq.search`")
        run, settings = RunFile.read(folder / "run.json")
        inventory = run.inventory
        pinned = parse_pins(settings.pin, inventory.linears)
        space = SearchSpace.build(inventory.linears, settings.bit_formats, settings.group_size, pinned, settings.ties)
        records = list(read_archive(folder / "archive.jsonl", space))
        table = None
        if settings.solver == "additive" and (folder / "cost.json").is_file():
            table = CostFile.read(folder / "cost.json", space).cost
        return FinishedRun(run, settings, inventory, space, records, table)


def select_from_run(
    folder: Path,
    target_bits: float | None = None,
    memory: str | None = None,
    context: int = 0,
    max_loss: float | None = None,
) -> Configuration:
    """The best configuration of a run under another budget; exactly one of the three budgets is given."""
    finished = FinishedRun.read(folder)
    caches = finished.run.kv_cache.caches() if context else ()
    given = [b for b in (target_bits, memory, max_loss) if b is not None]
    if len(given) != 1:
        raise AmqError("select needs exactly one budget: --target-bits, --memory or --max-loss")
    if memory is not None:
        bits = budget_from_memory(parse_size(memory), context, finished.inventory, caches, finished.space)
    else:
        bits = None if target_bits is None else check_bits(target_bits, finished.space)
    fit = fit_records(finished.records, finished.table) if finished.table else None
    chosen = choose(Budget(bits, max_loss), finished.space, finished.records, finished.table, fit)
    origin = provenance(
        finished.settings.json(), finished.run.model.fingerprint, finished.run.calibration.window_prefix
    )
    return to_configuration(
        chosen, finished.settings.model, finished.settings.group_size, finished.inventory, caches, context, origin
    )
