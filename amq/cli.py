"""`amq VERB …`: every stage's command, under one name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import amq
from amq.formats import FORMATS, GROUP_SIZES
from amq.util.lazy import load
from amq.util.settings import Settings, parse_command, run_command


@dataclass(frozen=True)
class FormatsSettings(Settings):
    VERB: ClassVar[str] = "formats"
    ABOUT: ClassVar[str] = "lists the bit formats, and which backend runs them on this machine"
    EXAMPLES: ClassVar[tuple[str, ...]] = ("amq formats", "AMQ_CPU_ISA=avx2 amq formats")


def _formats(argv: Sequence[str] | None) -> int:
    parse_command(argv, FormatsSettings)
    from amq.kernels.backends import availability
    from amq.kernels.cpu import cpu_module

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


@dataclass(frozen=True)
class Verb:
    """Both as `module:name`, so that a verb's help imports its settings alone. before: its first arguments."""

    settings: str
    main: str
    before: tuple[str, ...] = ()

    def __call__(self, argv: Sequence[str] | None) -> int:
        main: Callable[[Sequence[str]], int] = load(self.main)
        return main([*self.before, *(argv or ())])


VERBS = {
    "search": Verb("amq.search.settings:SearchSettings", "amq.search.__main__:main"),
    "select": Verb("amq.search.settings:SelectSettings", "amq.search.__main__:main", ("select",)),
    "report": Verb("amq.report.settings:ReportSettings", "amq.report.__main__:main"),
    "quantize": Verb("amq.quantize.settings:QuantizeSettings", "amq.quantize.__main__:main"),
    "eval": Verb("amq.eval.settings:EvalSettings", "amq.eval.__main__:main"),
    "export": Verb("amq.export.settings:ExportSettings", "amq.export.__main__:main"),
    "generate": Verb("amq.generate:GenerateSettings", "amq.generate:main"),
    "bench": Verb("amq.bench.settings:BenchSettings", "amq.bench.command:main"),
    "serve": Verb("amq.serve.settings:ServeSettings", "amq.serve.__main__:main"),
    "split": Verb("amq.split.settings:SplitSettings", "amq.split.__main__:main"),
    "formats": Verb("amq.cli:FormatsSettings", "amq.cli:_formats"),
}


def usage() -> Iterator[str]:
    """The lines of `amq --help`."""
    yield "usage: amq VERB …; amq VERB --help says more; amq --version"
    yield ""
    for name, verb in VERBS.items():
        yield f"  {name:10}{load(verb.settings).ABOUT}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script `amq`."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv else ""
    if verb in VERBS:
        return run_command(VERBS[verb], argv[1:])
    if verb in ("-h", "--help"):
        print("\n".join(usage()))
        return 0
    if verb in ("-V", "--version"):
        print(f"amq {amq.__version__}")
        return 0
    print(f"error: {verb!r} is no verb of amq" if verb else "error: no verb is given", file=sys.stderr)
    print("\n".join(usage()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
