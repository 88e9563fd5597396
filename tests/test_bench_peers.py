"""amq bench --peers: the files that peers run, their strongest ways, and what the installed ones compute."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import random_models
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.gguf_files import finish, llama_writer, tensor_names, turned
from helpers.tiny_models import VOCABULARY, tiny_llama
from peers import gguf_layers

from amq.bench import contender, run
from amq.bench.cases import Case
from amq.bench.command import main
from amq.bench.contender import PeerMissing
from amq.bench.peers import PEERS, gguf, strongest
from amq.bench.peers.base import Package, Peer, Quantizer
from amq.bench.peers.bindings import Bindings
from amq.bench.peers.gguf import read_header
from amq.bench.settings import BenchSettings
from amq.bench.worker import ChildFailed, ChildProcess
from amq.errors import AmqError
from amq.export import export
from amq.model.open import ALIASES
from amq.util.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

ABSENT = Package("not-there", "not_there", "1", "pip install not-there")
HERE = Package("pytest", "pytest", "1", "pip install pytest")


def installed(name: str) -> Peer:
    """A peer that can run here; skips the test where it cannot."""
    if reason := PEERS[name].package.unsupported_reason():
        pytest.skip(f"a peer: {reason}")
    pytest.importorskip("gguf")
    return PEERS[name]


@pytest.mark.parametrize("name", PEERS)
def test_the_command_without_the_peer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours alone, with the line that installs the peer."""
    folder, file = tiny_checkpoint(tiny_llama(), tmp_path / "tiny"), tmp_path / "b.json"
    monkeypatch.setattr(run, "buffer_bytes", lambda: 1 << 20)
    monkeypatch.setattr(strongest, "PEERS", {name: replace(PEERS[name], package=ABSENT)})
    arguments = f"--no-startup --prompt 8 --generate 2 --batch 1 --repetitions 1 --threads 1 --json {file}"
    assert main([str(folder), "--peers", name, "--gguf", "Q4_K_M", *arguments.split()]) == 0
    assert json.loads(file.read_text())["left_out"] == {name: "not-there is not installed: pip install not-there"}
    assert f"{name} left out: not-there is not installed: pip install not-there" in capsys.readouterr().out


def test_no_package_of_a_peer_is_imported_before_its_process() -> None:
    packages = {PEERS[name].package.module for name in PEERS}
    code = "import sys; from amq.bench.peers import PEERS; list(PEERS.items()); "
    code += f"sys.exit(str({packages} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.stderr.strip() == "set()"


def test_a_package_that_is_too_old_is_not_measured() -> None:
    assert HERE.unsupported_reason() is None
    old = replace(HERE, least="999.1")
    assert str(old.unsupported_reason()).endswith("is older than 999.1: pip install pytest")


class Quantizing:
    """In the place of a worker with a quantizer; asked: the types of the files that were made."""

    asked: list[str]

    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> Quantizing:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def call(self, method: str, source: str, *more: Any) -> Any:
        if method == "quantize":
            self.asked.append(more[1])
            return Path(more[0]).write_text("quantized")
        weights = {"small": 80, "nearly": 97, "beyond": 120, "equal": 101}[more[0]]
        return (
            "[ 1/ 2] a.weight - x\nsize = 1.00 MiB\n[ 2/ 2] token_embd.weight - y, size = 9.00 MB -> 1.00 MB\n"
            f"main: quant size = {weights}.00 MB"
        )


def test_the_files_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """`auto`: all types within a few percent of our bytes, the nearest first; where there are none, the nearest."""
    original = tmp_path / "original.gguf"
    original.write_text("weights")
    (tmp_path / "quantization.json").write_text(json.dumps({"model": {"name": next(iter(ALIASES))}}))
    monkeypatch.setattr(gguf, "ChildProcess", Quantizing)
    monkeypatch.setattr(gguf, "alias_file", lambda name: original)
    tensor = gguf.Tensor("F32", 1, 4)
    header = gguf.Header({"a.weight": tensor, "token_embd.weight": tensor}, 1, 1)
    monkeypatch.setattr(gguf, "read_header", lambda file: header)
    monkeypatch.setattr(Quantizing, "asked", asked := [], raising=False)
    quantizer = Quantizer(HERE, ("small", "nearly", "beyond", "equal"), print, print)

    def names(kind: str, megabytes: int) -> list[str]:
        return [
            file.stem.split("-")[-1] for file in gguf.gguf_files(quantizer, str(tmp_path), kind, megabytes << 20, 1)
        ]

    assert names("auto", 100) == ["equal", "nearly"] and names("auto", 200) == ["beyond"]
    assert names("q4_0", 100) == ["Q4_0"] == names("Q4_0", 1)
    assert asked == ["equal", "nearly", "beyond", "Q4_0"]  # each once: they stay in the cache
    assert gguf.gguf_files(quantizer, "anything", str(original), 1, 1) == [original]
    with pytest.raises(AmqError, match="does not exist"):
        gguf.gguf_files(quantizer, "anything", "missing.gguf", 1, 1)
    with pytest.raises(PeerMissing, match="no GGUF of some/model is known.*--gguf FILE"):
        gguf.gguf_files(quantizer, "some/model", "auto", 1, 1)
    with pytest.raises(PeerMissing, match="made by not-there, or named with --gguf FILE; not-there is not installed"):
        gguf.gguf_files(replace(quantizer, package=ABSENT), str(tmp_path), "auto", 1, 1)


def test_of_embeddings_a_token_reads_none_unless_one_is_the_head() -> None:
    header = gguf.Header({}, used=2, experts=8)
    sizes = {"token_embd.weight": 100.0, "blk.0.ffn_up_exps.weight": 40.0, "per_layer_token_embd.weight": 7.0}
    assert header.read_per_token(sizes) == 110 and header.read_per_token({**sizes, "output.weight": 50.0}) == 60


def test_a_checkpoint_of_an_unknown_file_is_exported(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("gguf")
    random_file(tmp_path, tmp_path / "model.gguf", "tiny-moe", 2)
    (tmp_path / "in" / "quantization.json").write_text(json.dumps({"model": {"name": "some/model"}}))
    made = gguf.source_of(str(tmp_path / "in"))
    assert read_header(made) == read_header(tmp_path / "model.gguf") and made == gguf.source_of(str(tmp_path / "in"))


@pytest.mark.parametrize("name", PEERS)
def test_what_a_quantizer_plans_is_what_it_makes(name: str, tmp_path: Path) -> None:
    quantizer = installed(name).quantizer
    if reason := quantizer.package.unsupported_reason():
        pytest.skip(f"a peer: {reason}")
    source = write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    with ChildProcess(gguf.Quantizing, quantizer) as worker:
        sizes = gguf.planned_sizes(worker, quantizer, source)
        assert tuple(sizes) == tuple(quantizer.kinds)
        worker.call("quantize", str(source), str(tmp_path / "made.gguf"), "Q8_0", 1)
        with pytest.raises(AmqError, match="Q9_9"):
            worker.call("quantize", str(source), str(tmp_path / "none.gguf"), "Q9_9", 1)
    assert sizes["Q8_0"] == pytest.approx(read_header(tmp_path / "made.gguf").weight_bytes, rel=0.2)


class Trying:
    """In the place of a worker with a peer: the second file is twice as fast, one configuration crashes."""

    def __init__(self, make: Any, path: str, threads: int, configuration: str, seed: int) -> None:
        self._speed = {"one.gguf": 1.0, "two.gguf": 2.0}[Path(path).name] * {"wide": 3.0, "deep": 1.5}.get(
            configuration, 1
        )
        self._configuration = configuration

    def __enter__(self) -> Trying:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def close(self) -> None: ...
    def call(self, method: str, *arguments: Any) -> Any:
        if method == "facts":
            return {"vocab_size": 5}
        if self._configuration == "broken":
            raise ChildFailed("its process was ended by SIGILL")
        fast = self._speed if self._configuration != "deep" or arguments[0].decode else self._speed / 2
        return {"seconds": 1 / fast}


def open_fake(configurations: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> contender.Contender:
    monkeypatch.setattr(strongest, "ChildProcess", Trying)
    monkeypatch.setattr(strongest, "read_header", lambda file: gguf.Header({"w": gguf.Tensor("F32", 1, 4)}, 1, 1))
    peer = Peer("a peer", HERE, Trying, configurations, "", Quantizer(HERE, (), print, print))  # type: ignore[arg-type]
    files = [Path("one.gguf"), Path("two.gguf")]
    return strongest.open_strongest(peer, BenchSettings(model="m", threads=1), Progress(), files)


def test_the_strongest_file_and_way_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are compared in the first way that runs; the ways on the file that won."""
    monkeypatch.chdir(tmp_path)
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_text("x")
    found = open_fake(["broken", "plain", "wide", "deep"], monkeypatch)
    assert found.facts["file"] == "two.gguf" and found.facts["weight_bytes"] == 4
    assert found.configurations == {False: "wide", True: "wide"}
    tried = [(trial["file"], trial["configuration"], "failed" in trial) for trial in found.trials]
    assert tried == [
        *((name, "broken", True) for name in ("one.gguf", "two.gguf")),
        *((name, "plain", False) for name in ("one.gguf", "two.gguf")),
        ("two.gguf", "wide", False), ("two.gguf", "deep", False),
    ]  # fmt: skip
    assert open_fake(["plain", "deep"], monkeypatch).configurations == {False: "plain", True: "deep"}
    with pytest.raises(
        PeerMissing, match=r"runs in no way .*: one.gguf, broken: .* SIGILL; two.gguf, broken: .* SIGILL"
    ):
        open_fake(["broken"], monkeypatch)


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_measured_on_processors(name: str) -> None:
    with pytest.raises(PeerMissing, match="cuda:0.*CPUs only"):
        strongest.open_peer(name, BenchSettings(model="smollm2", device="cuda:0"), Progress(), 1)


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if issubclass(peer.make, Bindings)])
def test_peers_and_we_agree_on_a_tiny_model(name: str, tmp_path: Path) -> None:
    """The same weights in float32 on both sides: the same log-likelihood of the same tokens."""
    peer = installed(name)
    model = tiny_llama()
    path = write_gguf(model, tmp_path / "tiny.gguf")
    assert read_header(path).weight_bytes == 4 * sum(p.numel() for p in model.parameters()) < path.stat().st_size
    windows = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    with ChildProcess(peer.make, str(path), 1, peer.configurations[-1], 0) as worker:
        assert worker.call("facts")["vocab_size"] == VOCABULARY
        found = [worker.call("log_likelihood", windows.tolist(), unscored) for unscored in (0, 3)]
    losses = torch.nn.functional.cross_entropy(model(windows).logits[:, :-1].mT, windows[:, 1:], reduction="none")
    expected = [-float(losses[:, unscored:].sum()) for unscored in (0, 3)]
    assert found == pytest.approx(expected, rel=2e-3)  # they keep keys and values in 16 bits


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
    assert read_header(long).weight_bytes == read
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


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("shape, layers", [("tiny-moe", 2), ("tiny-hybrid", 4)])
def test_peers_run_tiny_models(shape: str, layers: int, name: str, tmp_path: Path) -> None:
    peer = installed(name)
    random_file(tmp_path, tmp_path / "model.gguf", shape, layers)
    with ChildProcess(peer.make, str(tmp_path / "model.gguf"), 1, peer.configurations[-1], 0) as worker:
        facts = worker.call("facts")
        assert facts["vocab_size"] == 320 and facts["version"] and facts["description"]
        for case in (Case(False, 16), Case(True, 4), Case(True, 4, 2, depth=8)):
            assert worker.call("measure", case, 0)["seconds"] > 0
        assert worker.call("memory")["resident_memory_bytes"] > 0


def write_gguf(model: torch.nn.Module, path: Path) -> Path:
    """A Llama in float32 with a vocabulary of bytes."""
    writer, names = llama_writer(path, model.config), tensor_names(model.config)
    writer.add_tokenizer_model("no_vocab")
    for name, parameter in model.named_parameters():
        file_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(file_name, turned(name, parameter, model.config).numpy())
    finish(writer)
    return path
