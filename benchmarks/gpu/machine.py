"""Starts DIR/suite.json afresh with where and with what the suite runs.

python benchmarks/gpu/machine.py DIR [--smoke]
"""

from __future__ import annotations

import sys

from common import Device, arguments, machine, record, say


def main() -> int:
    options = arguments(__doc__, 60).parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "suite.json").unlink(missing_ok=True)
    found = machine(Device(options.smoke))
    record(options.folder, "machine", found, options.smoke)
    say(f"machine: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
