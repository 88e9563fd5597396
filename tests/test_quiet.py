"""Other libraries' progress bars do not show on a terminal while amq loads and saves; what else they say does."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")

PROGRAM = """
import sys, warnings
from pathlib import Path
from amq.model.open import _quietly, load_model
from tqdm.auto import tqdm
from transformers.utils import logging
from transformers.utils.logging import tqdm as switched

folder, copy = sys.argv[1:]
model = load_model(folder).model
with _quietly():
    for bars in (tqdm, switched):
        for _ in bars(range(3), desc="a bar inside"):
            list(bars(range(3), desc="a nested bar", leave=False))
    model.save_pretrained(copy)
    warnings.warn("a warning goes through")
    print("a line goes through", file=sys.stderr)
list(tqdm(range(3), desc="a bar afterwards"))
list(switched(range(3), desc="another afterwards"))
"""


def on_a_terminal(*command: str) -> str:
    """What a command shows on a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # tqdm shows nothing on 0 columns
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_no_bars_while_loading_and_saving(tiny_folder: Path, tmp_path: Path) -> None:
    shown = on_a_terminal(sys.executable, "-c", PROGRAM, str(tiny_folder), str(tmp_path / "copy"))
    inside, _, after = shown.partition("a line goes through")
    for bar in ("Loading weights", "Writing model shards", "a bar inside", "a nested bar", "%|"):
        assert bar not in inside, inside
    assert "a warning goes through" in inside
    assert "a bar afterwards" in after and "another afterwards" in after
