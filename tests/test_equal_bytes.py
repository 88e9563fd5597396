"""benchmarks/equal_bytes.py: the common source, the importance matrix, and what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import equal_bytes
import equal_bytes_show
import numpy as np
import pytest
import torch
from equal_bytes_make import Workshop
from helpers.gguf_files import keys_of, weights_of, write_gguf
from peers import imatrix
from peers.source import FACTOR, write_source

from amq.errors import AmqError
from amq.model.inventory import get_linear
from amq.model.opened import open_model

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
pytest.importorskip("gguf")


def written(path: Path, architecture: str, **changes: Any) -> Path:
    """A tiny model as a file in F32. Its biases and norms are random: what is scaled must show."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture]
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
    config = kind(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    weights = weights_of(model.requires_grad_(False), architecture)
    return write_gguf(path, architecture, keys_of(model, architecture), weights)


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("qwen2", False)])
def test_a_source_on_no_grid_computes_the_same(tmp_path: Path, architecture: str, tied: bool) -> None:
    """Every linear's weights are others, by different factors within a row; tied embeddings and their norm are not."""
    file = written(tmp_path / "model.gguf", architecture, tie_word_embeddings=tied)
    weights = write_source(file, tmp_path / "off.gguf")
    before, after = (open_model(str(path)) for path in (file, tmp_path / "off.gguf"))
    assert weights == sum(p.numel() for p in before.model.parameters())
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    expected, found = (opened.model(tokens).logits for opened in (before, after))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    for spec in before.inventory.linears:
        old, new = (get_linear(opened.model, spec.name).weight for opened in (before, after))
        ratio = new / old
        assert float(ratio.std(dim=1).min()) > 0.05, spec.name
        assert FACTOR**-2.001 < float(ratio.min()) and float(ratio.max()) < FACTOR**2.001, spec.name
    heads = [opened.model.lm_head.weight for opened in (before, after)]
    assert torch.equal(*heads) == tied
    assert torch.equal(*(opened.model.model.embed_tokens.weight for opened in (before, after)))


def test_a_source_on_its_grid_is_the_file_itself(tmp_path: Path) -> None:
    file = written(tmp_path / "model.gguf", "llama")
    write_source(file, tmp_path / "on.gguf", on_grid=True)
    before, after = (open_model(str(path)).model.state_dict() for path in (file, tmp_path / "on.gguf"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_whose_features_are_not_known(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", "gemma2", {"block_count": 1}, {"token_embd.weight": np.ones((4, 4))})
    with pytest.raises(AmqError, match="features of gemma2.*llama, qwen2, qwen3.*--on-grid"):
        write_source(tmp_path / "other.gguf", tmp_path / "out.gguf")


def test_the_importance_matrix_is_of_what_the_linears_read(tmp_path: Path) -> None:
    """By llama.cpp's names; the sums of one window by hooks, and the same from the file again."""
    import gguf

    file, text = written(tmp_path / "model.gguf", "qwen2"), tmp_path / "text.txt"
    text.write_text("the heather on the other thorn " * 40)
    means = imatrix.measure(str(file), str(text), 2, 32, 0)
    linears = {t.name for t in gguf.GGUFReader(file).tensors if len(t.shape) == 2 and t.name.startswith("blk.")}
    assert set(means) == linears
    opened, seen = open_model(str(file)), []
    down = get_linear(opened.model, "model.layers.1.mlp.down_proj")
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    opened.model(opened.sampler(str(text), 32, 0, 2).take(2))
    expected = seen[0].square().mean(dim=(0, 1))
    assert torch.allclose(torch.from_numpy(means["blk.1.ffn_down.weight"]), expected, rtol=1e-4)
    imatrix.write(tmp_path / "matrix.dat", means, "text")
    again = imatrix.read(tmp_path / "matrix.dat")
    assert again.keys() == means.keys() and all(np.array_equal(again[name], means[name]) for name in means)
    (tmp_path / "matrix.dat").write_bytes((tmp_path / "matrix.dat").read_bytes()[:100])
    with pytest.raises(AmqError, match="matrix.dat is not an importance matrix"):
        imatrix.read(tmp_path / "matrix.dat")


def test_rows_are_added_once_and_failures_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, results, made = written(tmp_path / "model.gguf", "llama"), tmp_path / "results.json", []

    def row(self: Workshop, name: str) -> dict[str, Any]:
        made.append(name)
        if name.startswith("ik"):
            raise AmqError("it is not installed")
        return {"engine": name.split(" ")[0], "bytes": 1000, "bits_per_weight": 4.0, "perplexity": 20.0, "made": {}}

    monkeypatch.setattr(Workshop, "row", row)
    monkeypatch.setattr(Workshop, "facts", lambda self: {})
    monkeypatch.setattr(equal_bytes.os, "nice", lambda _: 0)
    arguments = [str(file), "--work", str(tmp_path / "work"), "--json", str(results)]
    with pytest.raises(AmqError, match="1 of 2 rows failed: ik_llama.cpp IQ4_K;"):
        equal_bytes.main([*arguments, "--rows", "llama.cpp Q4_K_M,ik_llama.cpp IQ4_K"])
    assert "ik_llama.cpp IQ4_K: it is not installed" in capsys.readouterr().err
    assert equal_bytes.main([*arguments, "--rows", "llama.cpp Q4_K_?,amq *", "--bits", "3.0", "--variant", "x"]) == 0
    assert made == ["llama.cpp Q4_K_M", "ik_llama.cpp IQ4_K", "llama.cpp Q4_K_S", "amq 3.0 x"]
    content = json.loads(results.read_text())
    assert [row["name"] for row in content["rows"]] == ["llama.cpp Q4_K_M", "llama.cpp Q4_K_S", "amq 3.0 x"]
    assert all("commit" in row for row in content["rows"]) and "provenance" in content
    with pytest.raises(AmqError, match="no such row; there are full precision, llama.cpp F32"):
        equal_bytes.main([*arguments, "--rows", "other"])
    with pytest.raises(AmqError, match="work is of on_grid False: give another --work"):
        equal_bytes.main([*arguments, "--on-grid"])
    with pytest.raises(AmqError, match="results of .*model.gguf: expected those of another.gguf"):
        equal_bytes.main(["another.gguf", *arguments[1:]])


def test_ours_from_the_file_to_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searched, quantized, measured both ways and timed; a wrong size of the whole would show."""
    file, text = written(tmp_path / "model.gguf", "qwen2"), tmp_path / "text.txt"
    text.write_text("the heather on the other thorn " * 60)
    monkeypatch.setattr(equal_bytes.os, "nice", lambda _: 0)
    small = f"--calibration {text} --window-length 32"
    search = (
        f"--formats int2,int3 --group-size 32 --windows 1 --confirm-windows 1 --bank-windows 1 --cost-passes 1 {small}"
    )
    arguments = [
        *(
            str(file),
            "--work",
            str(tmp_path / "work"),
            "--json",
            str(tmp_path / "results.json"),
            "--rows",
            "full*,amq*",
        ),
        *("--text", str(text), "--max-tokens", "256", "--window-length", "32", "--windows", "1", "--generate", "4"),
        *("--calibration", str(text), "--bits", "4.0,4.5", "--searched", "4.0", "--search", f"{search} --points 2"),
        *("--rounds", "1"),
        *("--quantize", f"{small} --windows 1"),
    ]
    assert equal_bytes.main(arguments) == 0
    assert equal_bytes.main([*arguments, "--speed"]) == 0
    full, ours, selected = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert full["bits_per_weight"] == 16 and 3.5 < ours["bits_per_weight"] < 8
    assert ours["perplexity"] == pytest.approx(ours["perplexity_exact"], rel=0.05)
    assert full["perplexity"] < 1.5 * ours["perplexity"] and ours["speed"]["tokens_per_second"] > 0
    assert set(ours["made"]) == {"search", "quantize"} and ours["made"]["search"]["peak_bytes"] > 1e8
    assert set(selected["made"]) == {"search", "select", "quantize"} and selected["bytes"] > ours["bytes"]
    assert selected["made"]["search"] == ours["made"]["search"] and selected["flags"]["searched"] == "4.0"
    assert "speed" not in full


def test_the_table_compares_at_equal_bytes() -> None:
    """Half way between two of ours the logarithm is half way; beyond the ends nothing is said."""
    step = {"seconds": 9.0, "processor_seconds": 5.0, "peak_bytes": 2**30}
    common = {"bits_per_weight": 4.0, "made": {"search": step, "quantize": step}}
    rows = [
        {"name": "amq 3.0", "engine": "amq", "bytes": 100_000_000, "perplexity": 32.0, "perplexity_exact": 31.5},
        {"name": "amq 4.0", "engine": "amq", "bytes": 200_000_000, "perplexity": 18.0},
        {"name": "llama.cpp Q4_0", "engine": "llama.cpp", "bytes": 150_000_000, "perplexity": 20.0},
        {"name": "llama.cpp Q8_0", "engine": "llama.cpp", "bytes": 201_000_000, "perplexity": 17.0},
    ]
    lines = equal_bytes_show.table({"rows": [row | common for row in rows]}).splitlines()[2:]
    assert lines[0].startswith("| **amq 3.0** | 100.0 | 4.00 | 32.00 (31.50 exact) |  |")
    assert lines[1] == "| llama.cpp Q4_0 | 150.0 | 4.00 | 20.00 | 24.00 (+20.0 %) |  | 10 s, 1.0 GiB |"
    assert "| 17.00 |  |" in lines[3] and lines[2].startswith("| **amq 4.0** |")
    assert equal_bytes_show.interpolated(rows, 200_000_000) == pytest.approx(18.0)
    assert equal_bytes_show.interpolated(rows[:1], 100_000_000) is None
