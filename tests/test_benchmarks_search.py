"""The benchmarks of searches run (at tiny sizes): native evaluations beside the reference, and fronts side by side."""

from __future__ import annotations

import json
from pathlib import Path

import native_evaluations
import paper_front
import pytest
from helpers.tiny_models import byte_tokenizer, tiny_llama

import amq

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {
    "group_size": 64, "window_length": 32, "windows": 2, "confirm_windows": 2, "bank_windows": 4, "cost_passes": 2,
    "points": 3, "proxy": "rtn", "head": "16bit",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMQ_CACHE", str(tmp_path / "cache"))
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_native_evaluations(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "native.json"
    native_evaluations.main(
        [str(folder), "--settings", json.dumps({**QUICK, "head": "auto"}), "--configurations", "8", "--json", str(path)]
    )
    found = json.loads(path.read_text())
    rows, summary = found["configurations"], found["summary"]
    assert len(rows) == 8 and len({row["bits_per_weight"] for row in rows}) > 4
    assert summary["native fp32"]["largest_difference"] < 1e-5 < summary["native int8"]["largest_difference"] < 0.01
    assert summary["native fp32"]["all"]["spearman"] > 0.99 and summary["reference"]["cpu_seconds"] > 0


def test_fronts_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper = {"solver": "paper", "initial": 8, "iterations": 2, "per_iteration": 4, "population": 8, "generations": 2}
    amq.search(str(folder), tmp_path / "paper", **QUICK, **paper)
    for bits in (3.0, 3.5):
        amq.search(str(folder), tmp_path / f"refined-{bits}", **QUICK, target_bits=bits, refine=3)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(5_000)))
    path, picture = tmp_path / "fronts.json", tmp_path / "fronts.png"
    methods = [f"paper={tmp_path}/paper", f"refined={tmp_path}/refined-3.0,{tmp_path}/refined-3.5"]
    how = ["--text", str(text), "--length", "64", "--budgets", "3", "3.5", "--json", str(path), "--plot", str(picture)]
    paper_front.main([*methods, *how])
    found = json.loads(path.read_text())
    assert list(found["methods"]) == ["paper", "refined"] and picture.stat().st_size > 10_000
    for row in found["methods"].values():
        assert [point["budget"] for point in row["points"]] == [3, 3.5]
        assert all(p["bits_per_weight"] <= p["budget"] + 1e-6 for p in row["points"])
        assert 0 < row["hv6_search"] < 1 and 0 < row["hv6_held_out"] < 1 and row["evaluations"] > 0
    assert found["methods"]["paper"]["sensitivities"] == 14 and found["methods"]["refined"]["runs"] == 2
    other = amq.search(str(folder), tmp_path / "other", **{**QUICK, "windows": 1}, target_bits=3.0).output
    with pytest.raises(SystemExit, match="--windows of .*other is 1"):
        paper_front.main([methods[0], f"other={other}", *how])
