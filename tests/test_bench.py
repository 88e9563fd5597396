"""amq.bench: what its figures count, the files it writes, engines in turn, and what happens when a peer fails."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engines import FakeEngine
from helpers.tiny_models import byte_tokenizer, tiny_llama

from amq.bench import machine, run
from amq.bench.cases import Case, grid
from amq.bench.command import main
from amq.bench.contender import Contender, PeerMissing
from amq.bench.own import OwnEngine
from amq.bench.run import bench
from amq.bench.settings import BenchSettings, numbers
from amq.bench.table import table
from amq.bench.worker import ChildFailed, ChildProcess
from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.formats import get_format
from amq.model.inventory import get_linear
from amq.model.perplexity import perplexity
from amq.packing import dequantize
from amq.util.progress import Progress
from amq.util.records import to_json

pytestmark = pytest.mark.usefixtures("one_thread")


def engine_of(shared: int = 0) -> FakeEngine:
    """The likeliest token is always the last one plus one; `shared` tokens of every prompt are remembered."""
    engine = FakeEngine(64, 2, vocab_size=1000, max_rows=8, following=lambda slot: (slot.tokens[-1] + 1) % 1000)
    engine.shared = shared
    return engine


def own(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> OwnEngine:
    monkeypatch.setattr("amq.runtime.load", lambda model, **_: SimpleNamespace(engine=engine, weight_bytes=7))
    return OwnEngine("model", 0, {})


def test_a_prompt_is_passes_of_max_rows_with_logits_after_the_last(monkeypatch):
    engine = engine_of()
    figures = own(engine, monkeypatch).measure(Case(False, 20, depth=10), 1)
    lengths = [len(tokens) for pass_ in engine.passes for tokens, _ in pass_]
    assert lengths == [8, 2, 8, 8, 4]
    assert [logits for pass_ in engine.passes for _, logits in pass_] == [False, False, False, False, True]
    assert 0 < figures["seconds"] <= figures["first_token_seconds"]
    assert engine.prompts and not engine.slots


def test_decoding_feeds_the_likeliest_token_back_for_every_sequence(monkeypatch):
    engine = engine_of()
    own(engine, monkeypatch).measure(Case(True, 5, sequences=2), 1)
    steps = [[tokens[0] for tokens, logits in pass_ if logits] for pass_ in engine.passes]
    assert len(steps) == 5 and steps[0][0] != steps[0][1]
    assert steps == [[(token + i) % 1000 for token in steps[0]] for i in range(5)]
    assert engine.prompts and not engine.slots
    with pytest.raises(AmqError, match="no room for sequence 3 of 3.*--batch"):
        own(engine, monkeypatch).measure(Case(True, 5, sequences=3), 1)
    assert engine.prompts and not engine.slots


def test_what_an_engine_remembers_is_not_counted_as_computed(monkeypatch):
    engine = engine_of(shared=6)
    own(engine, monkeypatch).measure(Case(False, 8, depth=10), 1)
    assert [len(tokens) for pass_ in engine.passes for tokens, _ in pass_] == [4, 8]
    with pytest.raises(AmqError, match="--seed"):
        own(engine, monkeypatch).measure(Case(False, 8, depth=5), 1)
    assert engine.prompts and not engine.slots


def test_repetitions_measure_other_tokens_after_the_same_depth(monkeypatch):
    engine = engine_of()
    bencher = own(engine, monkeypatch)
    for repetition in (1, 2, 1):
        bencher.measure(Case(False, 8, depth=8), repetition)
    first, second, again = (engine.passes[i : i + 2] for i in (0, 2, 4))
    assert first[0] == second[0] and first[1] != second[1] and again == first


def test_names_and_lists():
    names = [case.name for case in grid([128, 512], [64], [1, 4], [0, 32])]
    assert names[:4] == ["pp128", "pp512", "tg64", "tg64 x4"] and names[4:6] == ["pp128 @ d32", "pp512 @ d32"]
    assert numbers("4,1,4", "--batch") == [4, 1] and numbers("0", "--prompt") == [] == numbers("", "--prompt")
    assert numbers("0", "--depth", least=0) == [0]
    for wrong in ("1,x", "-1", "1,0", "1.5"):
        with pytest.raises(AmqError, match="--batch"):
            numbers(wrong, "--batch")
    with pytest.raises(AmqError, match="nothing to measure"):
        main(["model", "--prompt", "0", "--generate", "0"])


def test_a_worker_reports_errors_and_its_own_death():
    with ChildProcess(importlib.import_module, "os") as worker:
        assert worker.call("getpid") != os.getpid()
        with pytest.raises(ChildFailed, match="FileNotFoundError"):
            worker.call("listdir", "/no/such/folder")
        assert worker.call("getcwd") == os.getcwd()  # it goes on
        with pytest.raises(ChildFailed, match="SIGABRT"):
            worker.call("abort")
    with pytest.raises(AmqError, match="int99"):
        ChildProcess(get_format, "int99")


def test_command_on_a_tiny_checkpoint(tmp_path, monkeypatch, capsys):
    """The whole command, with start-up and several cases, and peers that are not installed."""
    folder = tiny_checkpoint(tiny_llama(), tmp_path / "tiny")
    monkeypatch.setattr(run, "buffer_bytes", lambda: 1 << 20)
    monkeypatch.setattr(run, "STARTUP_REPETITIONS", 1)
    text, json_file, csv_file = tmp_path / "text.txt", tmp_path / "b.json", tmp_path / "b.csv"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(200)))
    arguments = f"--prompt 24 --generate 6 --batch 1,2 --repetitions 2 --threads 1 --perplexity {text}"
    arguments += f" --window-length 32 --max-tokens 64 --activations fp32 --json {json_file} --csv {csv_file}"
    assert main([str(folder), *arguments.split()]) == 0
    shown, result = capsys.readouterr().out, json.loads(json_file.read_text())
    assert result["left_out"] == {} == result["ratios"] and "tg6 x2" in shown
    assert {"commit", "dirty", "versions"} <= set(result["provenance"])
    rows = {row["test"]: row for row in result["rows"]}
    assert list(rows) == ["pp24", "tg6", "tg6 x2"]
    facts = result["engines"]["amq"]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert facts["file_bytes"] == size and 0 < facts["weight_bytes"] <= size
    assert len(facts["startup_seconds"]) == 1 and facts["peak_memory_bytes"] >= facts["resident_memory_bytes"] > 1 << 20
    for row in rows.values():
        assert len(row["samples"]) == 2 and row["lowest"] <= row["tokens_per_second"] <= row["highest"]
    tg = rows["tg6"]
    assert tg["weights_bytes_per_second"] == pytest.approx(facts["weight_bytes"] * tg["tokens_per_second"])
    reading = result["read_bandwidth"]["memory"]["bytes_per_second"]
    assert tg["share_of_memory_bandwidth"] == pytest.approx(tg["weights_bytes_per_second"] / reading)
    assert rows["tg6 x2"]["weight_bytes_per_token"] == facts["weight_bytes"] / 2
    assert rows["pp24"]["first_token_seconds"] > 0 and rows["pp24"]["share_of_memory_bandwidth"] is None
    with csv_file.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["test"] for line in lines] == list(rows)
    assert float(lines[1]["tokens_per_second"]) == tg["tokens_per_second"] and lines[1]["samples"].count(";") == 1
    assert facts["perplexity"] == pytest.approx(expected_perplexity(folder, text.read_text()[:64]), rel=1e-4)


def expected_perplexity(folder: Path, text: str) -> float:
    """Of the checkpoint's weights, in plain torch."""
    model, checkpoint = tiny_llama(), open_checkpoint(folder)
    for name in checkpoint.record.formats:
        get_linear(model, name).weight.copy_(dequantize(checkpoint.packed(name)))
    return perplexity(model, torch.tensor(byte_tokenizer()(text)["input_ids"]).view(-1, 32))


class FakeWorker:
    """Answers in this process; seconds per case by kind; fails in the case named `fails`."""

    def __init__(
        self, seconds: dict[bool, float], log: list[str], name: str, vocab: int = 100, fails: str = ""
    ) -> None:
        self.seconds, self.log, self.name, self.vocab, self.fails = seconds, log, name, vocab, fails

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "measure":
            case, repetition = arguments
            self.log.append(f"{self.name} {case.name} {repetition}")
            if case.name == self.fails:
                raise ChildFailed("its process was ended by SIGSEGV")
            return {"seconds": self.seconds[case.decode], "others": 0.0}
        return {
            "facts": {"vocab_size": self.vocab, "weight_bytes": 2000, "file_bytes": 3000},
            "memory": {"resident_memory_bytes": 1, "peak_memory_bytes": 2},
            "windows": ([[1, 2, 3]], ()),
            "log_likelihood": -2.0 * math.log(5.0 if self.name == "amq" else 10.0),
        }[method]  # fmt: skip

    def close(self) -> None:
        self.closed = True


def with_peer(monkeypatch: pytest.MonkeyPatch, log: list[str], **options: Any) -> dict[str, Any]:
    theirs = FakeWorker({False: 2.0, True: 3.0}, log, "llama.cpp", **options)
    facts = {**theirs.call("facts"), "file_bytes": 1500, "weight_bytes": 1000, "file": "x.gguf"}
    trials = [{"engine": "llama.cpp", "file": "x.gguf", "configuration": way} for way in ("a", "b")]
    trials[0]["failed"] = "its process was ended by SIGILL"
    peer = Contender("llama.cpp", facts, dict.fromkeys((False, True), theirs), {False: "a", True: "b"}, "more", trials)
    monkeypatch.setattr(run, "buffer_bytes", lambda: 1 << 16)
    monkeypatch.setattr(run, "ChildProcess", lambda *_: FakeWorker({False: 1.0, True: 1.0}, log, "amq"))
    grid = {"prompt": "8", "generate": "4", "batch": "1,2", "repetitions": 2, "window_length": 3}
    settings = BenchSettings(
        model="model", **grid, threads=1, startup=False, perplexity="text", peers="llama.cpp, ik_llama.cpp"
    )

    def open_peer(name: str, settings: BenchSettings, progress: Progress, weight_bytes: int) -> Contender:
        assert weight_bytes == 2000
        if name != "llama.cpp":
            raise PeerMissing("it is not installed")
        return peer

    monkeypatch.setattr(run, "open_peer", open_peer)
    measured = bench(settings, provenance={"commit": "0"})
    print(table(measured))
    result = to_json(measured)
    assert result["left_out"].pop("ik_llama.cpp") == "it is not installed"
    assert theirs.closed and result["trials"] == trials and result["provenance"] == {"commit": "0"}
    assert result["counted"].endswith("; more")
    return result


def test_engines_take_turns_and_ratios_are_ours_over_theirs(monkeypatch, capsys):
    log: list[str] = []
    result = with_peer(monkeypatch, log)
    shown = capsys.readouterr().out
    for line in (
        "ik_llama.cpp left out: it is not installed",
        "llama.cpp ran x.gguf, the fastest way of 2 tried: prompt: a; decode: b",
        "llama.cpp failed with x.gguf, a (its process was ended by SIGILL); a build of it that does not may be faster",
        "a token of llama.cpp reads 0.0 MB of weights, one of amq 0.0 MB: 0.50 times as many",
        "! not at equal bytes: a token of llama.cpp reads 50% of the bytes that ours does",
    ):
        assert f"{line}\n" in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("tg4 x2  llama.cpp"))
    assert row.endswith("  3.00x")
    assert log[:6] == ["llama.cpp pp8 0", "amq pp8 0", "amq pp8 1", "llama.cpp pp8 1", "llama.cpp pp8 2", "amq pp8 2"]
    ratios = result["ratios"]["llama.cpp"]
    assert ratios == pytest.approx(
        {"pp8": 2, "tg4": 3, "tg4 x2": 3, "perplexity": 0.5, "file_bytes": 2, "weight_bytes": 2}
    )
    assert result["scaling"]["amq"] == {"tg4 x2": 2} and result["left_out"] == {}
    assert [(r["engine"], r["tokens_per_second"]) for r in result["rows"][:2]] == [("amq", 8), ("llama.cpp", 4)]


def test_a_peer_that_crashes_is_left_out_with_the_reason(monkeypatch):
    result = with_peer(monkeypatch, [], fails="tg4")
    assert result["left_out"] == {"llama.cpp": "tg4: its process was ended by SIGSEGV"}
    assert [row["test"] for row in result["rows"]] == ["pp8", "pp8", "tg4", "tg4 x2"]
    other = with_peer(monkeypatch, [], vocab=99)
    assert "not the same model" in other["left_out"]["llama.cpp"] and other["ratios"]["llama.cpp"]["tg4"] == 3
    assert "perplexity" not in other["ratios"]["llama.cpp"]


def test_a_peer_that_nobody_knows():
    with pytest.raises(AmqError, match=r"--peers must be some of llama.cpp, ik_llama.cpp, xllamacpp, got 'vllm'"):
        BenchSettings(model="model", peers="llama.cpp,vllm")


def test_a_folder_gets_files_named_by_model_processor_and_date(tmp_path, monkeypatch):
    folder = tiny_checkpoint(tiny_llama(), tmp_path / "Tiny One")
    monkeypatch.setattr(run, "buffer_bytes", lambda: 1 << 20)
    monkeypatch.setattr(machine, "cpu_name", lambda: "AMD EPYC (family 26, model 2)")
    (tmp_path / "kept").mkdir()
    flags = "--no-startup --prompt 8 --generate 0 --repetitions 1 --threads 1 --json"
    assert main([str(folder), *flags.split(), str(tmp_path / "kept")]) == 0
    (file,) = (tmp_path / "kept").iterdir()
    assert re.fullmatch(r"bench-tiny-one-amd-epyc-family-26-model-2-\d{4}-\d\d-\d\d\.json", file.name)


def test_other_processes_work_is_seen_and_our_own_is_not():
    others = machine.OtherWork()
    if others.share() is None:
        pytest.skip("this system has no /proc/stat")
    ours = sum(os.times()[:4])
    while sum(os.times()[:4]) - ours < 0.1:
        pass
    assert 0 <= others.share() <= 1
