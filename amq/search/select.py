"""`select RUN`: chooses again from a finished run, in milliseconds: no model is loaded, nothing is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amq.configuration import Configuration
from amq.model.losses import OBJECTIVES
from amq.search.choose import Budget, budget_from_memory, check_bits, choose, to_configuration
from amq.search.loss_curve import fit_records
from amq.search.run_folder import RunFolder
from amq.search.settings import SelectSettings
from amq.util.settings import parse_size


def select_from_run(path: Path | str, **budget: Any) -> Configuration:
    """The best configuration of a run under another budget: a field of `SelectSettings`, which wants exactly one."""
    return select(SelectSettings.make(run=str(path), **budget))


def select(settings: SelectSettings) -> Configuration:
    """As `select_from_run`."""
    folder = RunFolder.open(Path(settings.run))
    bits: float | None = None
    if settings.memory is not None:
        memory = parse_size(settings.memory)
        caches = folder.run.kv_cache.caches(settings.cache) if settings.context else ()
        bits = budget_from_memory(memory, settings.context, folder.inventory, caches, folder.space)
    elif settings.target_bits is not None:
        bits = check_bits(settings.target_bits, folder.space)
    table = folder.cost.cost if folder.settings.solver == "additive" and folder.cost else None
    fit = fit_records(folder.archive, table, OBJECTIVES[folder.settings.loss].ceiling) if table else None
    chosen = choose(Budget(bits, settings.max_loss), folder.space, folder.archive, table, fit)
    return to_configuration(chosen, folder.run, settings)
