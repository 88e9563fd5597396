"""Flags from dataclasses, sizes and times as people write them, and what a command's exit status says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amq.errors import AmqError
from amq.util.lazy import Registry, lazy
from amq.util.settings import (
    CHOOSE,
    MEASURE,
    REQUIRED,
    SIZE_UNITS,
    TIME_UNITS,
    Settings,
    flag,
    limits,
    parse_command,
    parse_size,
    parse_time,
    run_command,
)


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


@dataclass(frozen=True)
class Options(Settings):
    VERB: ClassVar[str] = "try"
    ABOUT: ClassVar[str] = "tries flags"
    EXAMPLES: ClassVar[tuple[str, ...]] = ("amq try this --seed 1", "amq try that")

    model: str = flag(REQUIRED, "a model", positional=True)
    output: str = flag(REQUIRED, "a folder", metavar="DIR")
    group_size: int = flag(128, "features per scale, 100% of them", CHOOSE, metavar="G")
    rate: float | None = flag(None, "a rate", MEASURE, above=0, most=1, metavar="P")
    seed: int = flag(0, "of everything random", least=0, metavar="N")
    share: int = flag(1, "a share", least=-2, most=2)
    exact: bool = flag(False, "be exact", MEASURE)
    warm: bool = flag(True, "do not warm up", MEASURE, name="no-warm-up")
    solver: str = flag("fast", "how", choices=("fast", "slow"))
    memory: str | int | None = flag(None, "a size", parse=parse_size, metavar="SIZE")
    pin: list[str] = flag([], "keep one", CHOOSE, metavar="NAME")
    stop: tuple[str, ...] = flag((), "ends it", choices=("a", "b"))
    checked: int | None = flag(None, "", least=1)
    internal: int = 3
    other: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    resume: bool = flag(False, "go on")


def parse(*arguments: str) -> dict[str, Any]:
    given = parse_command(["m", "--output", "o", *arguments], Options, Command)
    assert given.pop("model") == "m" and given.pop("output") == "o"
    return given


def made(**given: Any) -> Options:
    return Options("m", "o", **given)


def test_absent_flags_are_absent() -> None:
    """So that a run's saved settings can tell what was asked for from what is the default."""
    assert parse() == {}
    assert made() == made(**parse()) and made().pin is not made().pin


def test_flags_are_typed() -> None:
    found = parse(
        *("--group-size", "64", "--rate", "0.5", "--exact", "--no-warm-up", "--solver", "slow", "--pin", "a"),
        *("--pin", "b", "--stop", "a", "--stop", "b", "--memory", "6GiB", "--resume"),
    )
    assert found.pop("resume") is True
    assert found == {
        **{"group_size": 64, "rate": 0.5, "exact": True, "warm": False, "solver": "slow", "pin": ["a", "b"]},
        **{"stop": ("a", "b"), "memory": "6GiB"},
    }
    assert made(**found).json() == {**asdict(made()), **found}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "many"], "--group-size: invalid int value: 'many'"),
        (["--rate", "x"], "--rate: invalid float value: 'x'"),
        (["--solver", "lucky"], "--solver: invalid choice: 'lucky'"),
        (["--stop", "c"], "--stop: invalid choice: 'c'"),
        (["--checked", "4"], "unrecognized arguments: --checked 4"),
        (["--internal", "4"], "unrecognized arguments: --internal 4"),
        (["--other", "4"], "unrecognized arguments: --other 4"),
        (["--exact", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_bad_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and message in err
    assert err.startswith("usage: amq try MODEL --output DIR [flags]\n")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line.endswith(":")]
    assert titles == [
        *("positional arguments:", "options:", "what to choose from:", "how to measure:", "how to run:", "examples:")
    ]
    assert out.endswith("examples:\n  amq try this --seed 1\n  amq try that\n") and "\nTries flags.\n" in out
    text = " ".join(out.split())
    assert "--group-size G features per scale, 100% of them (default 128)" in text
    assert "how to run: --output DIR a folder --seed N of everything random (default 0)" in text
    assert "--solver {fast,slow} how (default fast)" in text and "--no-warm-up do not warm up" in text
    assert "--exact be exact" in text and "--rate P a rate" in text and "--pin NAME keep one" in text
    assert "default None" not in text and "default False" not in text and "default True" not in text
    assert "internal" not in text and "checked" not in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"seed": 1.0}, "--seed must be a whole number at least 0, got 1.0"),
        ({"seed": True}, "--seed must be a whole number at least 0, got True"),
        ({"seed": None}, "--seed must be given, got None"),
        ({"share": 3}, "--share must be from -2 to 2, got 3"),
        ({"rate": 0}, "--rate must be above 0 and at most 1, got 0"),
        ({"rate": float("nan")}, "--rate must be a number above 0 and at most 1, got nan"),
        ({"rate": "x"}, "--rate must be a number above 0 and at most 1, got 'x'"),
        ({"group_size": 10.5}, "--group-size must be a whole number, got 10.5"),
        ({"checked": 0}, "--checked must be at least 1, got 0"),
        ({"solver": "lucky"}, "--solver must be one of fast, slow, got 'lucky'"),
        ({"stop": ("a", "c")}, "--stop must be one of a, b, got 'c'"),
        ({"memory": "6 GX"}, "--memory: '6 GX' is not a size such as 6GiB or 800MB"),
    ],
)
def test_a_value_out_of_range_is_named_by_its_flag(given: dict[str, Any], message: str) -> None:
    with pytest.raises(AmqError) as caught:
        made(**given)
    assert str(caught.value) == message
    with pytest.raises(AmqError):
        Options.make(model="m", output="o", **given)


def test_values_in_range() -> None:
    for values in ({"rate": 1}, {"rate": np.float32(0.5)}, {"seed": np.int64(3)}, {"seed": 10**400}, {"memory": 5}):
        assert asdict(made(**values)) == {**asdict(made()), **values}


def test_names_that_are_unknown_or_missing() -> None:
    with pytest.raises(AmqError, match="unknown try setting 'sed': expected one of checked, exact, group_size"):
        Options.make(model="m", output="o", sed=1)
    with pytest.raises(AmqError, match="--output is missing: a folder"):
        Options.make(model="m")


def test_json_schemas_get_the_same_range() -> None:
    assert limits(Options, "rate") == {"exclusiveMinimum": 0, "maximum": 1}
    assert limits(Options, "seed") == {"minimum": 0}
    assert limits(Options, "group_size") == {}


def test_a_registry_imports_what_is_asked_for() -> None:
    names: Registry[Any] = Registry("shape", {"late": "fractions:Fraction", "never": "no_such_module:x", "now": 3})
    assert list(names) == ["late", "never", "now"] and len(names) == 3 and "late" in names and "square" not in names
    from fractions import Fraction

    assert names["late"] is Fraction and names["now"] == 3
    with pytest.raises(AmqError, match="unknown shape 'square': expected one of late, never, now"):
        names["square"]
    names["square"] = 4
    assert names["square"] == 4
    with pytest.raises(AttributeError, match="module 'here' has no attribute 'y'"):
        lazy("here", {"x": "fractions"})("y")


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


def test_gpu_memory_is_of_a_gpu() -> None:
    from amq.search.settings import SearchSettings

    given = {"model": "m", "output": "runs/m", "gpu_memory": "2GiB"}
    assert SearchSettings.make(**given, device="cuda").gpu_bytes == 2 << 30
    assert SearchSettings.make(model="m", output="runs/m").gpu_bytes is None
    with pytest.raises(AmqError, match="--gpu-memory is of a GPU, and the model runs on cpu: give --device cuda too"):
        SearchSettings.make(**given)
