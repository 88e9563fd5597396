"""`amq bench` with llama.cpp on the nearest GGUF in turn with ours: `python benchmarks/beside_llama_cpp.py DIR`.

All flags of `amq bench` hold, and --gguf, which says what llama.cpp runs. Every way in which it can run the file is
tried first, and the strongest is measured, for prompts and for decode.

Processes that it starts import this file too, so all imports wait until it is run. (It is not named llama_cpp.py: a
script's folder comes first on Python's path, and would hide the package of that name.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    import argparse
    from functools import partial

    from peers.llama_cpp import NAME, PROJECT
    from peers.strongest import AUTO, open_peer
    from provenance import provenance

    from amq.bench import command

    parser = argparse.ArgumentParser(
        description=f"amq bench beside llama.cpp (pip install {PROJECT}). All flags of amq bench, listed below, and:",
        usage="python benchmarks/beside_llama_cpp.py MODEL [--gguf FILE|TYPE] [flags of amq bench]",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gguf", default="auto", metavar="FILE|TYPE",
        help="what llama.cpp runs: a .gguf file; or a type that its quantizer makes of the model's own GGUF "
        f"(default auto: {AUTO})",
    )  # fmt: skip
    mine, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    return command.main(rest, {NAME: partial(open_peer, gguf=mine.gguf)}, provenance())


if __name__ == "__main__":
    from amq.util.settings import run_command

    sys.exit(run_command(main, sys.argv[1:]))
