"""Files written whole or not at all, temporaries that nobody shares and no kill leaves for ever, errors in one line."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.processes import python_path

from amq.errors import AmqError
from amq.util.files import check_place, make_folder, reason, write_atomic, write_json, write_text
from amq.util.temporary import temporary_folder


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("name", ["a.json", "x" * 250, "ü" * 120, "a.b c"])
def test_any_name_that_the_system_takes_is_written(tmp_path: Path, name: str) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / name, text)
        assert (tmp_path / name).read_text() == text
    (tmp_path / "plain").touch()
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert listing(tmp_path) == sorted([name, "plain"])


def test_file_and_folder_are_on_the_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced, and when: the file before it gets its name, its folder after."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", rename)
    write_json(tmp_path / "a.json", {})
    assert events == ["a.json", "rename", tmp_path.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from amq.util.files import write_atomic
def write(temporary):
    temporary.write_bytes(b"half")
    print("half", flush=True)
    sys.stdin.read()
write_atomic(Path(sys.argv[1]), write)
"""


def writer(path: Path) -> subprocess.Popen:
    """A process in the middle of writing `path`."""
    env = os.environ | python_path()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    )
    assert process.stdout.readline() == b"half\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.stdout.close()
    process.stdin.close()
    process.wait()


def test_what_a_killed_process_left_goes_with_the_next_write_and_no_living_one_s(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    killed, living, other = writer(path), writer(path), writer(tmp_path / "b.bin")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert len(listing(tmp_path)) == 3
    write_text(path, "whole")
    left = [p for p in listing(tmp_path) if p != "a.bin"]
    assert len(left) == 1 and left[0].startswith(".a.bin.")  # the living one's
    end(living)  # its input ends: it goes on and finishes
    assert living.returncode == 0 and path.read_bytes() == b"half"
    assert listing(tmp_path) == ["a.bin"]
    for process in (killed, other):
        end(process)


def test_writers_of_one_id_and_many_threads_share_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers that share a folder have equal process ids; here as many writers as can be of one."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path, failures, together = tmp_path / "shared", [], threading.Barrier(8)

    def work(mark: bytes) -> None:
        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                for _ in range(50):
                    file.write(mark * 1000)

        together.wait()
        for _ in range(20):
            try:
                write_atomic(path, write)
                if len(set(path.read_bytes())) != 1:
                    failures.append("mixed")
            except (AmqError, OSError) as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(bytes([65 + i]),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and listing(tmp_path) == ["shared"]


def test_a_folder_without_locks_is_written_and_nothing_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with temporary_folder(tmp_path / "a") as folder:
        write_text(tmp_path / "a", "text")
        assert folder.is_dir()
    assert listing(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_failed_write_is_one_error_and_leaves_what_was(tmp_path: Path, error: int) -> None:
    path = tmp_path / "a.bin"
    write_text(path, "before")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(error, os.strerror(error))

    full = error in (errno.ENOSPC, errno.EDQUOT)
    message = "the disk is full: could not write" if full else f"could not write .*a.bin: {os.strerror(error)}"
    with pytest.raises(AmqError, match=message):
        write_atomic(path, write)
    assert path.read_text() == "before" and listing(tmp_path) == ["a.bin"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", write)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "is a file: expected a folder"),
        ("file/below/it", "lies below .*file, which is a file"),
        ("x" * 256, "cannot be written: File name too long"),
        ("new/" + "x" * 256, "cannot be written: File name too long"),
        ("a\0b", "holds a NUL character"),
        ("dangling", "cannot be written: File exists"),
        ("dangling/run", "cannot be written: File exists"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("/proc/1/nowhere/at/all")
    before = listing(tmp_path)
    with pytest.raises(AmqError, match=f"--output .*({message})"):
        check_place(tmp_path / name, "--output")
    assert listing(tmp_path) == before
    for write in (write_text, lambda path, text: make_folder(path)):
        with pytest.raises(AmqError):
            write(tmp_path / name / "x", "text")


def test_a_place_that_refuses_new_entries_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system, which a test that may run as root cannot have from permissions."""
    import tempfile

    def refuse(*arguments: object, **options: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "probe"))

    check_place(tmp_path / "new" / "run", "--output")
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(AmqError, match="--output .*run cannot be written: Read-only file system"):
        check_place(tmp_path / "new" / "run", "--output")
    with pytest.raises(AmqError, match="could not write .*a.json: Read-only file system"):
        write_json(tmp_path / "a.json", {})
    assert listing(tmp_path) == []


COMMANDS, NAMES = ("generate", "eval", "bench"), ("file/x.json", "x" * 256, "a\0b")


@pytest.mark.parametrize("command, name", [*itertools.product(COMMANDS, NAMES), ("generate", "."), ("eval", ".")])
def test_commands_try_the_file_for_their_figures_before_their_work(tmp_path: Path, command: str, name: str) -> None:
    """Before a model is loaded: there is none. (A folder is a place for amq bench's: it names the file.)"""
    import importlib

    module = {"generate": "amq.generate", "eval": "amq.eval.__main__", "bench": "amq.bench.command"}[command]
    (tmp_path / "file").write_text("x")
    prompt = ["--prompt", "x"] if command == "generate" else []
    with pytest.raises(AmqError, match="--json .*(is a folder|is a file|cannot be written|NUL)"):
        importlib.import_module(module).main([str(tmp_path / "no model"), *prompt, "--json", str(tmp_path / name)])
    assert listing(tmp_path) == ["file"]


def test_reasons_name_the_file_where_there_is_one() -> None:
    assert reason(PermissionError(13, "Permission denied", "/a")) == "Permission denied (/a)"
    assert reason(OSError(5, "Input/output error")) == "Input/output error"
    assert reason(OSError("words alone")) == "words alone" and reason(OSError()) == "OSError"
