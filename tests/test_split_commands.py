"""`amq split serve|train|eval|report` on a tiny model, and what becomes of its adapter."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import byte_tokenizer, random_tokens, tiny_llama
from transformers import AutoModelForCausalLM

from amq.cli import main
from amq.errors import AmqError
from amq.split.evaluate import evaluate_run
from amq.split.records import ADAPTER, RUN, STEPS, SplitEvaluation, SplitRun, StepRecord, read_lines
from amq.split.run import address, run_serve, run_train
from amq.split.settings import ServeSettings, TrainSettings
from amq.split.state import States
from amq.util.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT: dict[str, Any] = {
    "samples": 6, "window_length": 32, "batch": 2, "micro_batches": 2, "steps": 4, "save_every": 2,
    "learning_rate": 1e-2,
}  # fmt: skip
PATIENCE = 300.0


class Told(Progress):
    """Keeps what is said, and says when the server listens, and where."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.port: int | None = None
        self.listening = threading.Event()

    def say(self, text: str) -> None:
        self.lines.append(text)
        if found := re.search(r" at 127\.0\.0\.1:(\d+)", text):
            self.port = int(found[1])
            self.listening.set()


@dataclass
class Trained:
    model: Path
    run: Path
    server: Path
    said: list[str]


def train(model: Path, folder: Path, **settings: Any) -> Trained:
    """A run of both commands in this process, to its end."""
    told, failed = Told(), []
    both = {"model": str(model), "cut": 1, "lora": 2, "reconnect": "0s"}
    serve = ServeSettings.make(**both, port=0, output=str(folder / "server"))

    def serving() -> None:
        try:
            run_serve(serve, told)
        except BaseException as error:  # noqa: BLE001  # told to the test's own thread
            failed.append(error)
            told.listening.set()

    thread = threading.Thread(target=serving, daemon=True)
    thread.start()
    assert told.listening.wait(PATIENCE) and not failed, failed
    made = {**both, **SHORT, "server": f"127.0.0.1:{told.port}", "output": str(folder / "run"), **settings}
    run_train(TrainSettings.make(**made), Progress())
    thread.join(PATIENCE)
    assert not thread.is_alive() and not failed, failed
    return Trained(model, folder / "run", folder / "server", told.lines)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    torch.set_num_threads(1)
    yield train(model, tmp_path_factory.mktemp("waterfill"), policy="waterfill", coder="range", target_bits=3.0)


def test_a_run_leaves_its_records(trained: Trained) -> None:
    run, steps = SplitRun.read(trained.run / RUN), read_lines(trained.run / STEPS, StepRecord)
    assert run.status == "finished" and run.terms["policy"] == "waterfill" and run.trainable > 0
    assert [step.step for step in steps] == [0, 1, 2, 3]
    assert all(step.seconds > 0 and step.server.compute > 0 and step.forward_bits > 1 for step in steps)
    assert run.sent > steps[-1].sent > steps[0].sent and run.received > steps[-1].received
    assert steps[-1].sent > sum(step.forward_bytes for step in steps) and steps[-1].loss < steps[0].loss
    assert any("training from step 0 of 4: cut 1, policy waterfill, coder range" in line for line in trained.said)
    assert trained.said[-1].startswith("finished: the adapter is with the client")


def test_peft_loads_the_adapter_and_merges_it(trained: Trained) -> None:
    """The merged model is the run's: it has the loss that `amq split eval` measured, and it can be searched."""
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32).eval()
    tokens = random_tokens(1, 30)
    before = plain(tokens).logits
    adapted = PeftModel.from_pretrained(plain, str(trained.run / ADAPTER)).eval()
    after = adapted(tokens).logits
    assert not torch.allclose(before, after)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, after, rtol=1e-3, atol=1e-4 * float(after.abs().max()))


def test_the_merged_model_is_quantized_like_any_other(trained: Trained, tmp_path: Path) -> None:
    from peft import PeftModel

    from amq.quantize import quantize

    plain = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32)
    PeftModel.from_pretrained(plain, str(trained.run / ADAPTER)).merge_and_unload().save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    quantize(str(tmp_path / "merged"), tmp_path / "quantized", uniform="int4", method="rtn", group_size=32,
             perplexity="none", windows=1, window_length=32)  # fmt: skip
    assert (tmp_path / "quantized" / "config.json").is_file()


def test_eval_and_report(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "eval", str(trained.run), "--max-tokens", "512"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("docstrings, held out: 512 tokens") and "tuned, quantized cut" in shown
    written = SplitEvaluation.read(trained.run / "evaluation.json")
    base, tuned, quantized = written.rows
    assert tuned.loss < base.loss and 1 < (quantized.bits or 0) < 8
    assert abs(quantized.loss - tuned.loss) < base.loss - tuned.loss
    assert main(["split", "report", str(trained.run)]) == 0
    assert str(trained.run / "report.html") in capsys.readouterr().out and (trained.run / "report.html").is_file()


@pytest.mark.parametrize("settings", [
    {"policy": "none", "half": True}, {"policy": "fixed", "labels": "client"}, {"policy": "step", "labels": "client",
     "coder": "range"}, {"policy": "amaq"}, {"policy": "aq-sgd", "samples": 4},
], ids=lambda s: "-".join(map(str, s.values())))  # fmt: skip
def test_every_policy_can_be_evaluated(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    made = train(model, tmp_path, **settings)
    rows = {row.name: row for row in evaluate_run(made.run, max_tokens=256, base=False).rows}
    assert rows.keys() == {"tuned", "tuned, quantized cut"}
    bits = rows["tuned, quantized cut"].bits
    assert bits is not None and (bits > 16) == (settings["policy"] in ("none", "aq-sgd"))
    assert abs(rows["tuned, quantized cut"].loss - rows["tuned"].loss) < 0.05 * rows["tuned"].loss


def test_what_a_run_was_made_of_is_asked_for(trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_llama(seed=1, num_hidden_layers=3).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(AmqError, match="other is another model than the run's: its weights or its config differ"):
        evaluate_run(trained.run, model=str(other))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / RUN).write_text(json.dumps({**json.loads((trained.run / RUN).read_text()), "status": "running"}))
    with pytest.raises(AmqError, match="has no adapter: the run is running; go on with `amq split train … --resume`"):
        evaluate_run(unfinished)
    settings = TrainSettings.make(model=str(trained.model), server="127.0.0.1:1", output=str(trained.run))
    with pytest.raises(AmqError, match="has the states of an earlier run: add --resume, or give another --output"):
        run_train(settings, Progress())


@pytest.mark.parametrize(("given", "message"), [
    ({"batch": 3}, "--batch 3 windows do not divide into --micro-batches 2: give a multiple"),
    ({"half": True}, "--half is of --policy none; --policy waterfill quantizes"),
    ({"policy": "none", "coder": "range"}, "--coder codes quantized values: --policy none has none"),
    ({"policy": "amaq", "target_bits": 1.5}, "amaq gives .* at least 2 bits: --target-bits must be 2 or more, got 1.5"),
    ({"backward_bits": 0.5}, "waterfill gives .* --backward-bits must be 1 or more, got 0.5"),
    ({"policy": "amaq", "backward_bits": 4.0}, "--backward-bits is of .* amaq sends them with the widths of"),
    ({"policy": "none", "backward_bits": 4.0}, "--backward-bits is of .* --policy none quantizes nothing"),
    ({"target_bits": 9.0}, "--target-bits must be .*8, got 9.0"),
])  # fmt: skip
def test_settings_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(AmqError, match=message):
        TrainSettings.make(model="m", server="127.0.0.1:1", **given)
    TrainSettings.make(model="m", server="127.0.0.1:1", policy="step", target_bits=0.5, start_bits=0.5, coder="range")


@pytest.mark.parametrize(
    "text", ["127.0.0.1", ":7000", "host:", "host:0", "host:70000", "host:x", "host:²", "::1", "[]:1"]
)
def test_addresses(text: str) -> None:
    assert address("[::1]:7000") == ("::1", 7000) and address("a.example:1") == ("a.example", 1)
    with pytest.raises(AmqError, match=f"--server {re.escape(repr(text))} is not HOST:PORT"):
        address(text)


def test_actions_have_their_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("serve", "train", "eval", "report"):
        with pytest.raises(SystemExit) as end:
            main(["split", action, "--help"])
        out = capsys.readouterr().out
        assert end.value.code == 0 and out.startswith(f"usage: amq split {action} ") and f"  amq split {action} " in out
    with pytest.raises(SystemExit) as end:
        main(["split", "tune"])
    assert end.value.code == 2 and "invalid choice: 'tune'" in capsys.readouterr().err


def test_a_folder_has_one_party_at_a_time(trained: Trained, tmp_path: Path) -> None:
    held = States(tmp_path)
    held.hold()
    settings = TrainSettings.make(model=str(trained.model), server="127.0.0.1:1", output=str(tmp_path))
    with pytest.raises(AmqError, match="another process is at work in .*: end it, or give another --output"):
        run_train(settings, Progress())
