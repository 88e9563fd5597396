"""`python -m amq.search MODEL --output RUN …` and `python -m amq.search select RUN --target-bits B …`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from amq.errors import AmqError
from amq.model.losses import OBJECTIVES
from amq.search.settings import SPEED, SearchCommand, SearchSettings, SelectSettings
from amq.util.settings import parse_command, run_command

if TYPE_CHECKING:
    from amq.configuration import Configuration


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return _select(argv[1:]) if argv[:1] == ["select"] else _search(argv)


def _search(argv: Sequence[str]) -> int:
    given = parse_command(argv, SearchSettings, SearchCommand)

    from amq.search import search
    from amq.util.progress import terminal_progress

    result = search(**given, progress=terminal_progress())
    print(summary(result.configuration))
    print(f"front of {len(result.front)} points, hypervolume {result.hypervolume:.4f}; {result.timings['total']:.0f} s")
    print(f"wrote {result.output}/configuration.json, front.json, archive.jsonl, report.html")
    return 0


def summary(configuration: Configuration) -> str:
    """The chosen configuration in a few lines, memory itemised."""
    details = configuration.details
    unit = OBJECTIVES[(details.provenance and details.provenance.loss) or "jsd"].unit
    if details.loss is not None:
        loss = f"loss {details.loss:.5f} {unit}"
    else:
        loss = f"predicted loss {details.predicted_loss:.5f} {unit} (not evaluated)"
    if details.loss_confirm is not None:
        loss += f" ({details.loss_confirm:.5f} on held-out windows)"
    lines = [f"chosen: {details.bits_per_weight:.4f} bits per weight, {loss}"]
    if details.memory is None:
        return lines[0]
    for item in details.memory.items:
        if item.bytes or item.note:
            lines.append(f"  {item.bytes / 2**20:10.2f} MiB  {item.name}" + f" ({item.note})" * bool(item.note))
    lines.append(f"  {details.memory.total / 2**20:10.2f} MiB  total")
    if details.tokens_per_second is not None:
        lines.append(f"  {details.tokens_per_second:10.1f} tokens/s by the speed table")
    if details.bytes_read is not None:
        lines.append(f"  {details.bytes_read / 2**20:10.2f} MiB  of weights are read per token")
    return "\n".join(lines)


def _select(argv: Sequence[str]) -> int:
    settings = SelectSettings(**parse_command(argv, SelectSettings))
    from amq.search.select import select

    run, asked = Path(settings.run), list(settings.budgets.values())
    asked += [f"{settings.min_speed:g}tps"] if settings.min_speed is not None else []
    budget = "-".join(map(str, asked)) + "-fast" * (settings.prefer == SPEED)
    configuration = select(settings)
    path = Path(settings.output) if settings.output else run / f"configuration-{budget}.json"
    if path.exists() and path.name == "configuration.json":
        raise AmqError(f"{path} exists: give another --output")
    configuration.save(path)
    print(summary(configuration))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
