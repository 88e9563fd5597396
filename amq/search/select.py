"""`select RUN`: chooses again from a finished run, in milliseconds: no model is loaded, nothing is evaluated."""

from __future__ import annotations

from pathlib import Path

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.search.choose import Budget, budget_from_memory, check_bits, choose, to_configuration
from amq.search.loss_curve import fit_records
from amq.search.run_folder import RunFolder
from amq.util.settings import parse_size


def select_from_run(
    path: Path,
    target_bits: float | None = None,
    memory: str | None = None,
    context: int = 0,
    max_loss: float | None = None,
) -> Configuration:
    """The best configuration of a run under another budget; exactly one of the three budgets is given."""
    folder = RunFolder.open(path)
    config = folder.run.kv_cache.config
    given = [b for b in (target_bits, memory, max_loss) if b is not None]
    if len(given) != 1:
        raise AmqError("select needs exactly one budget: --target-bits, --memory or --max-loss")
    bits: float | None
    if memory is not None:
        bits = budget_from_memory(parse_size(memory), context, folder.inventory, config, folder.space)
    else:
        bits = None if target_bits is None else check_bits(target_bits, folder.space)
    table = folder.cost.cost if folder.settings.solver == "additive" and folder.cost else None
    fit = fit_records(folder.archive, table) if table else None
    chosen = choose(Budget(bits, max_loss), folder.space, folder.archive, table, fit)
    return to_configuration(chosen, folder.run, context)
