"""`python -m amq.search MODEL --output RUN …` and `python -m amq.search select RUN --target-bits B …`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from amq.configuration import Configuration, Memory
from amq.errors import AmqError
from amq.search.settings import SearchSettings
from amq.util.settings import add_flags, run_command


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return _select(argv[1:]) if argv[:1] == ["select"] else _search(argv)


def _search(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m amq.search",
        description="Finds which linear of a causal LM should hold which format, within a budget. "
        "`select RUN --target-bits B` chooses again from a finished run.",
    )
    parser.add_argument("model", help="hub id, folder, .gguf file, or the alias smollm2")
    parser.add_argument(
        "--output", required=True, metavar="RUN", help="run folder; refused if not empty, unless --resume"
    )
    parser.add_argument("--preset", choices=["paper"], help="the paper's setting; single flags still override it")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --output")
    add_flags(parser, SearchSettings)
    given = vars(parser.parse_args(argv))

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
    if details.loss is not None:
        loss = f"loss {details.loss:.5f} nats/token"
    else:
        loss = f"predicted loss {details.predicted_loss:.5f} nats/token (not evaluated)"
    if details.loss_confirm is not None:
        loss += f" ({details.loss_confirm:.5f} on held-out windows)"
    lines = [f"chosen: {details.bits_per_weight:.4f} bits per weight, {loss}"]
    memory = details.memory or Memory.of(())
    for item in memory.items:
        if item.bytes or item.note:
            lines.append(f"  {item.bytes / 2**20:10.2f} MiB  {item.name}" + f" ({item.note})" * bool(item.note))
    lines.append(f"  {memory.total / 2**20:10.2f} MiB  total")
    return "\n".join(lines)


def _select(argv: Sequence[str]) -> int:
    from amq.search.select import select_from_run

    parser = argparse.ArgumentParser(
        prog="python -m amq.search select", description="Chooses again from a finished run."
    )
    parser.add_argument("run", type=Path, help="run folder of an earlier search")
    parser.add_argument("--target-bits", type=float, metavar="B")
    parser.add_argument("--memory", metavar="SIZE")
    parser.add_argument("--context", type=int, default=0, metavar="N")
    parser.add_argument("--max-loss", type=float, metavar="L")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/configuration-<budget>.json")
    args = parser.parse_args(argv)
    configuration = select_from_run(args.run, args.target_bits, args.memory, args.context, args.max_loss)
    name = next(str(b) for b in (args.target_bits, args.memory, args.max_loss) if b is not None)
    path = args.output or args.run / f"configuration-{name}.json"
    if path.exists() and path.name == "configuration.json":
        raise AmqError(f"{path} exists: give another --output")
    configuration.save(path)
    print(summary(configuration))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
