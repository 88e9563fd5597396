"""The command line of `amq bench`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from amq.bench.settings import BenchCommand, BenchSettings
from amq.util.files import check_file, write_text
from amq.util.settings import parse_command

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_command(argv, BenchSettings, BenchCommand)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    json_file, csv_file = given.pop("json", None), given.pop("csv", None)
    check_file(json_file, "--json", or_folder=True)
    check_file(csv_file, "--csv")
    settings = BenchSettings(**given)
    from amq.bench.run import bench
    from amq.bench.table import csv_text, table
    from amq.util.progress import terminal_progress
    from amq.util.provenance import provenance, result_name

    result = bench(settings, terminal_progress(), provenance())
    print(table(result))
    if json_file and json_file.is_dir():
        machine = result.machine
        json_file /= result_name("bench", Path(settings.model).name, machine.gpu or machine.processor)
        log.info("writing %s", json_file)
    if json_file:
        result.write(json_file)
    if csv_file:
        write_text(csv_file, csv_text(result))
    return 0
