"""`amq VERB …`: the same commands as `python -m amq.search` and so on, under one name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from amq.formats import FORMATS, GROUP_SIZES
from amq.util.settings import run_command

Command = Callable[[Sequence[str] | None], int]


def _search(argv: Sequence[str] | None) -> int:
    from amq.search.__main__ import main

    return main(argv)


def _select(argv: Sequence[str] | None) -> int:
    return _search(["select", *(argv or ())])


def _quantize(argv: Sequence[str] | None) -> int:
    from amq.quantize.__main__ import main

    return main(argv)


def _eval(argv: Sequence[str] | None) -> int:
    from amq.eval.__main__ import main

    return main(argv)


def _export(argv: Sequence[str] | None) -> int:
    from amq.export.__main__ import main

    return main(argv)


def _generate(argv: Sequence[str] | None) -> int:
    from amq.generate import main

    return main(argv)


def _bench(argv: Sequence[str] | None) -> int:
    from amq.bench.command import main

    return main(argv)


def _serve(argv: Sequence[str] | None) -> int:
    from amq.serve.__main__ import main

    return main(argv)


def _formats(argv: Sequence[str] | None) -> int:
    from amq.kernels.backends import availability
    from amq.kernels.cpu import cpu_module

    description = "Lists the bit formats, and which backend runs them on this machine."
    argparse.ArgumentParser(prog="amq formats", description=description).parse_args(argv)
    sizes = "".join(f"{f'group {g}':>11}" for g in GROUP_SIZES)
    print(f"{'format':8}{'levels':>7}{'unit':>20}{sizes}   (bits per weight, scale and zero point counted)")
    for fmt in FORMATS.values():
        unit = f"{fmt.unit_codes} codes in {fmt.unit_bytes} B"
        bits = "".join(f"{fmt.bits_per_weight(g):11.3f}" for g in GROUP_SIZES)
        print(f"{fmt.name:8}{fmt.levels:7}{unit:>20}{bits}")
    print(f"\n{'backend':11}{'instructions':14}{''.join(f'{name:>6}' for name in FORMATS)}")
    for backend, isa, reasons in availability():
        marks = "".join(f"{'-' if reason else 'yes':>6}" for reason in reasons.values())
        missing = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))
        used = backend == "cpu" and not missing and isa == cpu_module().isa()
        default = "   (used by default)" if used else ""
        print(f"{backend:11}{isa:14}{marks}{default}{'   ' if missing else ''}{missing}")
    return 0


COMMANDS: dict[str, Command] = {
    "search": _search,
    "select": _select,
    "quantize": _quantize,
    "eval": _eval,
    "export": _export,
    "generate": _generate,
    "bench": _bench,
    "serve": _serve,
    "formats": _formats,
}


def main() -> int:
    """Entry point of the console script `amq`."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb not in COMMANDS:
        print(f"usage: amq {{{','.join(COMMANDS)}}} …", file=sys.stderr)
        return 0 if verb in ("-h", "--help") else 2
    return run_command(COMMANDS[verb], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
