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
    json_file, csv_file, table_file = (given.pop(name, None) for name in ("json", "csv", "table"))
    group_size = given.pop("group_size", BenchCommand.group_size)
    check_file(table_file, "--table")
    check_file(json_file, "--json", or_folder=True)
    check_file(csv_file, "--csv")
    settings = BenchSettings(**given)
    if table_file:
        from amq.bench.speed import speed_table, text
        from amq.util.progress import terminal_progress

        found = speed_table(settings, group_size, terminal_progress())
        found.write(table_file)
        print(text(found))
        return 0
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
