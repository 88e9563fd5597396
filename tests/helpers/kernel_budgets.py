"""What compiled kernels may cost: a number for each format that was measured, and a default for one that was not."""

from __future__ import annotations

from amq.formats import FORMATS, BitFormat


def budget(measured: dict[str, float], name: str) -> float:
    """Of the format `name`; of one that `measured` lacks, a tenth more than the dearest of its kind takes.

    Two kinds: codes that fill their bytes, and those that leave bits over, of which byte words have to be gathered.
    """
    if name in measured:
        return measured[name]
    kind = fills_bytes(FORMATS[name])
    return 1.1 * max(value for other, value in measured.items() if fills_bytes(FORMATS[other]) == kind)


def fills_bytes(fmt: BitFormat) -> bool:
    return 8 % fmt.bits == 0
