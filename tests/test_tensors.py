"""Safetensors files of equal content have equal bytes, and safetensors reads them as it reads its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import python_path
from safetensors import safe_open
from safetensors.torch import load_file

from amq.errors import AmqError
from amq.util.tensors import save_file, save_tensors

METADATA = {f"key {i} \"'\\\n\t\x01\x7f é 漢 😀": 'value \\ " \b\f\r ü' * (i + 1) for i in range(8)}
TENSORS = {"b": torch.arange(12, dtype=torch.float16).reshape(3, 4), "a": torch.arange(5, dtype=torch.uint8)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, METADATA)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == METADATA
        assert {n: file.get_tensor(n).tolist() for n in file.keys()} == {n: t.tolist() for n, t in TENSORS.items()}
    save_tensors(tmp_path / "plain.safetensors", TENSORS)
    assert set(load_file(tmp_path / "plain.safetensors")) == set(TENSORS)
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain.safetensors").stat().st_mode


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path: Path) -> None:
    """safetensors orders metadata by a hash with a random seed: 8 keys agree by chance once in 40,320 processes."""
    code = (
        "import json, sys; from pathlib import Path; from safetensors.torch import load_file; "
        "from amq.util.tensors import save_file; "
        "save_file(load_file(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))"
    )
    save_tensors(tmp_path / "content", TENSORS)
    arguments = [str(tmp_path / "content"), str(tmp_path / "one"), json.dumps(METADATA)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=os.environ | python_path())
    save_file(TENSORS, tmp_path / "two", dict(reversed(METADATA.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AmqError, match="the folder .*file cannot be made: File exists"):
        save_tensors(tmp_path / "file" / "x.safetensors", TENSORS)
