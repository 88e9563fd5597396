"""Flags from dataclasses, sizes and times as people write them, and what a command's exit status says."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amq.errors import AmqError
from amq.util.settings import SIZE_UNITS, TIME_UNITS, add_flags, flag, parse_size, parse_time, run_command


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 * 2**30), ("1.5 MiB", 3 * 2**19), (" 8MB ", 8 * 10**6), ("4kib", 4096), ("4 KB", 4000), ("7B", 7),
        ("512", 512), (512, 512), (".5GB", 5 * 10**8), ("0", 0), ("1gb", 10**9),
    ],
)  # fmt: skip
def test_sizes(text: str | int, expected: int) -> None:
    found = parse_size(text)
    assert found == expected and isinstance(found, int)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10min", 600.0),
        ("90s", 90.0),
        ("1.5h", 5400.0),
        ("90", 90.0),
        (90, 90.0),
        ("2 m", 120.0),
        ("5 SEC", 5.0),
        (0.5, 0.5),
    ],
)
def test_times(text: str | float, expected: float) -> None:
    assert parse_time(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "6GiBs", "-1", "-6GiB", "6 G", "1e9", "six", "6,5GiB", "1.2.3", "nan", "inf", "6GiB 5"]
)
def test_bad_sizes_and_times(text: str) -> None:
    with pytest.raises(AmqError, match="is not a size such as 6GiB or 800MB"):
        parse_size(text)
    with pytest.raises(AmqError, match="is not a time such as 10min or 90s"):
        parse_time(text)


def test_units_are_not_mixed_up() -> None:
    for text in ("10min", "10h"):
        with pytest.raises(AmqError, match=f"'{text}' is not a size"):
            parse_size(text)
    with pytest.raises(AmqError, match="'10MB' is not a time"):
        parse_time("10MB")


@given(number=st.integers(0, 10**6), size=st.sampled_from(sorted(SIZE_UNITS)), time=st.sampled_from(sorted(TIME_UNITS)))
def test_numbers_scale_by_their_unit(number: int, size: str, time: str) -> None:
    assert parse_size(f"{number}{size}") == number * SIZE_UNITS[size]
    assert parse_time(f"{number} {time.upper()}") == number * TIME_UNITS[time]


@dataclass
class Options:
    group_size: int = flag(128, "features per scale, 100% of them", metavar="G")
    rate: float | None = flag(None, "a rate", metavar="P")
    seed: int = flag(0, "of everything random", metavar="N")
    exact: bool = flag(False, "be exact")
    solver: str = flag("fast", "how", choices=("fast", "slow"))
    pin: list[str] = flag([], "keep one", metavar="NAME")
    internal: int = 3
    other: list[int] = field(default_factory=list)


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser(prog="test")
    add_flags(parser, Options)
    return vars(parser.parse_args(arguments))


def test_absent_flags_are_absent() -> None:
    """So that a run's saved settings can tell what was asked for from what is the default."""
    assert parse() == {}
    assert Options(**parse()) == Options() and Options().pin is not Options().pin


def test_flags_are_typed() -> None:
    found = parse("--group-size", "64", "--rate", "0.5", "--exact", "--solver", "slow", "--pin", "a", "--pin", "b")
    assert found == {"group_size": 64, "rate": 0.5, "exact": True, "solver": "slow", "pin": ["a", "b"]}
    assert Options(**found).seed == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "many"], "--group-size: invalid int value: 'many'"),
        (["--rate", "x"], "--rate: invalid float value: 'x'"),
        (["--solver", "lucky"], "--solver: invalid choice: 'lucky'"),
        (["--internal", "4"], "unrecognized arguments: --internal 4"),
        (["--other", "4"], "unrecognized arguments: --other 4"),
        (["--exact", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_bad_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--group-size G features per scale, 100% of them (default 128)" in text
    assert "--seed N of everything random (default 0)" in text
    assert "--solver {fast,slow} how (default fast)" in text
    assert "--exact be exact" in text and "--rate P a rate" in text and "--pin NAME keep one" in text
    assert "default None" not in text and "default False" not in text and "internal" not in text


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (AmqError("no such thing: do that"), 2, "error: no such thing: do that\n"),
        (PermissionError(13, "Permission denied", "/a/file"), 2, "error: Permission denied (/a/file)\n"),
        (OSError(30, "Read-only file system"), 2, "error: Read-only file system\n"),
        (OSError("no route to the hub"), 2, "error: no route to the hub\n"),
        (ValueError("embedded null byte"), 2, "error: a path holds a NUL character"),
        (KeyboardInterrupt(), 130, "interrupted: what was finished is kept"),
        (MemoryError(), 2, "error: out of memory; use --dtype bfloat16"),
        (OSError(12, "Cannot allocate memory"), 2, "error: out of memory; use --dtype bfloat16"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory; use"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "error: out of memory; use"),
    ],
)
def test_exit_status(outcome: object, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def main(argv: Sequence[str] | None) -> int:
        seen.append(argv)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome or 0

    assert run_command(main, ["a", "b"]) == status
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out and seen == [["a", "b"]]
    assert captured.err.count("\n") == bool(message), "one line, and no traceback"


@pytest.mark.parametrize("defect", [ZeroDivisionError(), ValueError("not of a path"), RuntimeError("a defect")])
def test_our_own_defects_keep_their_traceback(defect: Exception) -> None:
    def main(argv: Sequence[str] | None) -> int:
        raise defect

    with pytest.raises(type(defect)):
        run_command(main)


def test_a_reader_that_has_gone_is_no_error() -> None:
    code = (
        "import sys; from amq.util.settings import run_command; "
        "sys.exit(run_command(lambda _: print('x' * 10**6) or 0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
    process.stderr.close()
