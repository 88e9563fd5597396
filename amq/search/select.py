"""`select RUN`: chooses again from a finished run, in milliseconds: no model is loaded, nothing is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.model.losses import OBJECTIVES
from amq.model.speed_table import MADE_BY, SpeedTable
from amq.search.choose import Budget, budget_from_memory, check_bits, choose, to_configuration
from amq.search.loss_curve import fit_records
from amq.search.run_folder import NAMES, RunFolder
from amq.search.settings import SPEED, SelectSettings
from amq.search.share import Sharing, share_memory
from amq.search.speed import Speed
from amq.util.progress import Progress
from amq.util.settings import parse_size


def select_from_run(path: Path | str, **budget: Any) -> Configuration:
    """The best configuration of a run under another budget: a field of `SelectSettings`, which wants exactly one."""
    return select(SelectSettings.make(run=str(path), **budget))


def select(settings: SelectSettings) -> Configuration:
    """As `select_from_run`."""
    folder = RunFolder.open(Path(settings.run))
    speed = _speed(settings, folder)
    bits: float | None = None
    kinds: dict[str, str] | None = None
    if settings.memory is not None:
        memory = parse_size(settings.memory)
        if settings.shares_memory:
            kinds = _share(settings, folder, memory)
        of = settings.cache if kinds is None else list(kinds.values())
        caches = folder.run.kv_cache.caches(of) if settings.context else ()
        bits = budget_from_memory(memory, settings.context, folder.inventory, caches, folder.space)
    elif settings.target_bits is not None:
        bits = check_bits(settings.target_bits, folder.space)
    table = folder.cost.cost if folder.settings.solver == "additive" and folder.cost else None
    fit = fit_records(folder.archive, table, OBJECTIVES[folder.settings.loss].ceiling) if table else None
    budget = Budget(bits, settings.max_loss, speed, settings.prefer == SPEED)
    chosen = choose(budget, folder.space, folder.archive, table, fit)
    return to_configuration(chosen, folder.run, settings, speed, kinds)


def _share(settings: SelectSettings, folder: RunFolder, memory: int) -> dict[str, str]:
    """{layer: kind of cache}: what the search measured to be best within this very memory and context, else what the
    tables say."""
    kv, inventory = folder.run.kv_cache, folder.inventory
    if (known := folder.shares) is not None and (known.memory, known.context) == (memory, settings.context):
        return known.kinds_of(kv.layers)
    if folder.cost is None or not folder.cost.cache:
        raise AmqError(
            f"{folder.path} knows no costs of caches, since its search was not with --cache auto: search again with "
            "it, or give one kind as --cache"
        )
    tables = folder.cost.cost, folder.cost.cache
    sharing = Sharing(memory, settings.context, inventory, folder.space, kv.caches(), kv.layers, *tables)
    return share_memory(sharing, None, 0, Progress()).kinds_of(kv.layers)


def _speed(settings: SelectSettings, folder: RunFolder) -> Speed | None:
    """By --speed-table, else the table of the search; None where time is not asked about, and there is none."""
    if settings.speed_table is not None:
        table, source = SpeedTable.read(Path(settings.speed_table)), settings.speed_table
    elif folder.speed is not None:
        table, source = folder.speed, str(folder.path / NAMES[SpeedTable])
    elif settings.timed:
        raise AmqError(
            f"{folder.path} has no speed table, since its search asked for no speed: make one with {MADE_BY}, and give "
            "it as --speed-table FILE"
        )
    else:
        return None
    if settings.timed:  # else it only says what the configuration reaches there
        table.check(source, folder.settings.group_size, folder.speed.model if folder.speed else None)
    return Speed.of(table, folder.inventory, folder.space, settings.context, settings.min_speed)
