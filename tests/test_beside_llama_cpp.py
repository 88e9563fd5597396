"""benchmarks/beside_llama_cpp.py: the file that llama.cpp runs, what it computes, the command where it is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import beside_llama_cpp
import pytest
import random_models
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.gguf_files import finish, llama_writer, tensor_names, turned
from helpers.tiny_models import VOCABULARY, tiny_llama
from peers import gguf_layers, ik_llama, llama_cpp, strongest, xllamacpp_server

from amq.bench import run
from amq.bench.cases import Case
from amq.bench.run import PeerMissing
from amq.bench.settings import BenchSettings
from amq.bench.worker import ChildFailed, ChildProcess
from amq.errors import AmqError
from amq.export import export
from amq.model.open import ALIASES
from amq.util.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_command_without_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours alone, with the reason, and what made the result."""
    folder, file = tiny_checkpoint(tiny_llama(), tmp_path / "tiny"), tmp_path / "b.json"
    monkeypatch.setattr(run, "buffer_bytes", lambda: 1 << 20)
    monkeypatch.setattr(strongest, "unsupported_reason", lambda: "llama-cpp-python is not installed")
    arguments = f"--no-startup --prompt 8 --generate 2 --batch 1 --repetitions 1 --threads 1 --json {file}"
    assert beside_llama_cpp.main([str(folder), "--gguf", "Q4_K_M", *arguments.split()]) == 0
    result = json.loads(file.read_text())
    assert result["left_out"] == {"llama.cpp": "llama-cpp-python is not installed"}
    assert "llama.cpp left out: llama-cpp-python is not installed" in capsys.readouterr().out
    assert {"commit", "dirty", "versions"} <= set(result["provenance"])


def test_its_help_has_its_own_flag_and_those_of_the_bench(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        beside_llama_cpp.main(["--help"])
    shown = capsys.readouterr().out
    assert "--gguf FILE|TYPE" in shown and "--window-length" in shown


def test_the_gguf_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    quantized: list[tuple[str, str]] = []

    class Quantizing:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Quantizing:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def call(self, method: str, source: str, output: str, kind: str, threads: int) -> None:
            quantized.append((Path(source).name, kind))
            Path(output).write_text("quantized")

    original = tmp_path / "original.gguf"
    original.write_text("weights")
    monkeypatch.setattr(strongest, "ChildProcess", Quantizing)
    monkeypatch.setattr(strongest, "alias_file", lambda name: original)
    (tmp_path / "quantization.json").write_text(json.dumps({"model": {"name": next(iter(ALIASES))}}))
    files = [strongest.gguf_file(str(tmp_path), kind, 1) for kind in ("auto", "q4_0", "Q4_K_M")]
    assert files[0] == files[1] != files[2] and quantized == [("original.gguf", "Q4_0"), ("original.gguf", "Q4_K_M")]
    assert strongest.gguf_file("anything", str(original), 1) == original
    with pytest.raises(AmqError, match="does not exist"):
        strongest.gguf_file("anything", "missing.gguf", 1)
    with pytest.raises(PeerMissing, match="--gguf FILE"):
        strongest.gguf_file("some/model", "auto", 1)
    with pytest.raises(PeerMissing, match="cuda:0.*CPUs only"):
        strongest.open_peer(BenchSettings(model="smollm2", device="cuda:0"), Progress(), "auto")


def test_llama_cpp_and_we_agree_on_a_tiny_model(tmp_path: Path) -> None:
    """The same weights in float32 on both sides: the same log-likelihood of the same tokens."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is the peer that this measures")
    pytest.importorskip("gguf")
    model = tiny_llama()
    path = write_gguf(model, tmp_path / "tiny.gguf")
    sizes = strongest.weights(path)
    assert sizes["weight_bytes"] == 4 * sum(p.numel() for p in model.parameters()) < sizes["file_bytes"]
    windows = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    configuration = llama_cpp.Configuration("as stored", False)
    with ChildProcess(llama_cpp.LlamaCpp, str(path), 1, configuration, 0) as worker:
        assert worker.call("facts")["vocab_size"] == VOCABULARY
        found = [worker.call("log_likelihood", windows.tolist(), unscored) for unscored in (0, 3)]
        for case in (Case(False, 16), Case(True, 4, 2, depth=8)):
            assert worker.call("measure", case, 0)["seconds"] > 0
    losses = torch.nn.functional.cross_entropy(model(windows).logits[:, :-1].mT, windows[:, 1:], reduction="none")
    expected = [-float(losses[:, unscored:].sum()) for unscored in (0, 3)]
    assert found == pytest.approx(expected, rel=2e-3)  # llama.cpp keeps keys and values in 16 bits


def test_layers_of_a_file_again_and_again(tmp_path: Path) -> None:
    """Twice two layers of a mixture; of its experts a token reads two of eight."""
    gguf = pytest.importorskip("gguf")
    short, long = tmp_path / "model.gguf", tmp_path / "long.gguf"
    random_file(tmp_path, short, "tiny-moe", 2)
    gguf_layers.repeat_layers(short, long, 4)
    one, two = (gguf.GGUFReader(path) for path in (short, long))
    assert [int(reader.fields["qwen3moe.block_count"].contents()) for reader in (one, two)] == [2, 4]
    assert one.fields["tokenizer.ggml.tokens"].contents() == two.fields["tokenizer.ggml.tokens"].contents()
    source, found = ({tensor.name: tensor for tensor in reader.tensors} for reader in (one, two))
    for name, tensor in found.items():
        copied = source[name.replace("blk.2.", "blk.0.").replace("blk.3.", "blk.1.")]
        assert (tensor.data == copied.data).all() and tensor.tensor_type == copied.tensor_type, name
    assert len(found) - len(source) == sum(name.startswith("blk.") for name in source)
    sizes = {name: int(tensor.n_bytes) for name, tensor in found.items()}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    read = sum(sizes.values()) - experts * 3 // 4 - sizes["token_embd.weight"]
    assert strongest.weights(long)["weight_bytes"] == read
    with pytest.raises(AmqError, match="2 layers: expected a multiple of them, got 3"):
        gguf_layers.repeat_layers(short, tmp_path / "odd.gguf", 3)


def test_layers_of_a_hybrid_again_and_again(tmp_path: Path) -> None:
    """Four layers have as many as the rotary embedding has sections, which are no more in a longer file."""
    gguf = pytest.importorskip("gguf")
    random_file(tmp_path, tmp_path / "model.gguf", "tiny-hybrid", 4)
    gguf_layers.repeat_layers(tmp_path / "model.gguf", tmp_path / "long.gguf", 8)
    fields = [gguf.GGUFReader(tmp_path / name).fields for name in ("model.gguf", "long.gguf")]
    one, two = (
        {key: entry.contents() for key, entry in found.items() if key.startswith("qwen35.")} for found in fields
    )
    assert len(one["qwen35.rope.dimension_sections"]) == 4 and one | {"qwen35.block_count": 8} == two


def random_file(folder: Path, path: Path, shape: str, layers: int) -> None:
    """A random model as GGUF."""
    tokenizer = random_models.small_tokenizer(folder / "tokenizer")
    formats = random_models.Formats(group_size=32)
    random_models.write_random(folder / "in", random_models.SHAPES[shape].model(layers), formats, tokenizer)
    export(folder / "in", "gguf", folder / "out")
    (folder / "out" / "model.gguf").rename(path)


@pytest.mark.parametrize(
    "module, engine, package",
    [
        (xllamacpp_server, xllamacpp_server.XllamaCpp, "xllamacpp is the peer"),
        (ik_llama, ik_llama.IkLlama, "ik-llama-cpp-python is the peer"),
    ],
)
@pytest.mark.parametrize("shape, layers", [("tiny-moe", 2), ("tiny-hybrid", 4)])
def test_peers_of_wheels_run_tiny_models(
    shape: str, layers: int, module: Any, engine: Any, package: str, tmp_path: Path
) -> None:
    if module.unsupported_reason():
        pytest.skip(f"{package} that this measures")
    pytest.importorskip("gguf")
    random_file(tmp_path, tmp_path / "model.gguf", shape, layers)
    with ChildProcess(engine, str(tmp_path / "model.gguf"), 1, module.CONFIGURATIONS[-1], 0) as worker:
        facts = worker.call("facts")
        assert facts["vocab_size"] == 320 and "AVX2" in facts["description"]
        for case in (Case(False, 16), Case(True, 4), Case(True, 4, 2, depth=8)):
            assert worker.call("measure", case, 0)["seconds"] > 0
        assert worker.call("memory")["resident_memory_bytes"] > 0


def test_a_peer_that_runs_in_no_way_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ChildFailed("its process was ended by SIGABRT")

    monkeypatch.setattr(strongest, "ChildProcess", fail)
    engine = strongest.GgufEngine("a peer", fail, ["slow", "fast"], "nothing")
    settings = BenchSettings(model="m", threads=1)
    with pytest.raises(PeerMissing, match=r"a peer runs m.gguf in no way .*: slow: .* SIGABRT; fast: .* SIGABRT"):
        strongest.open_strongest(engine, settings, Progress(), tmp_path / "m.gguf")


def write_gguf(model: torch.nn.Module, path: Path) -> Path:
    """A Llama in float32 with a vocabulary of bytes."""
    writer, names = llama_writer(path, model.config), tensor_names(model.config)
    writer.add_tokenizer_model("no_vocab")
    for name, parameter in model.named_parameters():
        file_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(file_name, turned(name, parameter, model.config).numpy())
    finish(writer)
    return path
