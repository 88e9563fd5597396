"""The command line of `amq bench`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amq.bench.settings import BenchCommand, BenchSettings
from amq.util.files import check_file, write_text
from amq.util.settings import parse_command

if TYPE_CHECKING:
    from amq.bench.run import OpenPeer


def main(
    argv: Sequence[str] | None = None,
    peers: Mapping[str, OpenPeer] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> int:
    """peers, provenance: see `amq.bench.run.bench`; for scripts that measure other engines beside ours."""
    given = parse_command(argv, BenchSettings, BenchCommand)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    json_file, csv_file = given.pop("json", None), given.pop("csv", None)
    check_file(json_file, "--json")
    check_file(csv_file, "--csv")
    settings = BenchSettings(**given)
    from amq.bench.run import bench
    from amq.bench.table import csv_text, table
    from amq.util.progress import terminal_progress

    result = bench(settings, terminal_progress(), peers, provenance)
    print(table(result))
    if json_file:
        result.write(json_file)
    if csv_file:
        write_text(csv_file, csv_text(result))
    return 0
