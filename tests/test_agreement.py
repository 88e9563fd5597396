"""The objective `answers`: the formula by hand, what the evaluator makes of it, and a whole search with it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import byte_tokenizer, tiny_llama

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import FORMATS
from amq.model.answers import HELD_OUT, SEARCHED, Answers, agreement, open_answers
from amq.model.inventory import get_linear, take_inventory
from amq.model.losses import OBJECTIVES
from amq.model.open import LoadedModel, model_fingerprint
from amq.packing import dequantize
from amq.proxy.answers import WIDTH, Agreement, AnswerWindows
from amq.proxy.evaluator import Evaluator
from amq.quantize.bank import BankSettings, open_bank
from amq.report import write_report
from amq.search import search
from amq.search.__main__ import main
from amq.search.front_file import Front
from amq.search.run_folder import RunFolder
from amq.search.select import select_from_run
from amq.search.settings import SearchSettings
from amq.util.settings import run_command

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

LIMIT = 10
CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def loaded_model() -> LoadedModel:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return LoadedModel(tiny_llama(), tokenizer, "tiny")


def answered(loaded: LoadedModel, count: int = 6, half: int = SEARCHED) -> Answers:
    """Of different lengths: some end early, as if by an end token."""
    found = open_answers(loaded, count, LIMIT, 0, model_fingerprint(loaded.model), half)
    items = [
        type(item)(item.prompt, item.tokens[: LIMIT - 2 * (i % 3)], item.begun, False)
        for i, item in enumerate(found.items)
    ]
    return Answers(tuple(items), found.beginnings, found.kind, LIMIT, "")


def by_hand(full: torch.nn.Module, other: torch.nn.Module, answers: Answers) -> float:
    """The definition, token by token."""
    losses = []
    for item in answers.items:
        tokens = torch.tensor([[*item.prompt, *item.tokens]])
        kept = 0.0
        logits = [model(input_ids=tokens).logits[0].double() for model in (full, other)]
        for position, token in enumerate(item.tokens, len(item.prompt) - 1):
            sure = []
            for some in logits:
                row = some[position].clone()
                own = float(row[token])
                row[token] = -math.inf
                sure.append(1 / (1 + math.exp(-(own - float(row.max())) / WIDTH)))
            kept += min(1.0, sure[1] / sure[0]) / len(item.tokens)
        losses.append(1 - kept)
    return sum(losses) / len(losses)


class Setup:
    """The tiny model, its rtn bank, answers and an evaluator of them."""

    def __init__(self, cache: Path) -> None:
        self.loaded = loaded_model()
        self.inventory = take_inventory(self.loaded.model)
        formats = [FORMATS[n] for n in ("int2", "int3", "int8")]
        self.bank = open_bank(self.loaded.model, self.inventory, formats, BankSettings("rtn", 32), cache=cache)
        self.answers = {"search": answered(self.loaded), "confirm": answered(self.loaded, 3, HELD_OUT)}
        self.original = copy.deepcopy(self.loaded.model)
        self.measure = Agreement({name: AnswerWindows.of(some.items) for name, some in self.answers.items()})

    def evaluator(self, **options: Any) -> Evaluator:
        return Evaluator(self.loaded, self.inventory, self.bank, {}, "answers", answers=self.measure, **options)

    def quantized(self, formats: dict[str, str]) -> torch.nn.Module:
        model = copy.deepcopy(self.original)
        for name, fmt in formats.items():
            get_linear(model, name).weight.copy_(dequantize(self.bank.get(name, fmt)))
        return model

    def uniform(self, fmt: str) -> dict[str, str]:
        return {s.name: fmt for s in self.inventory.linears}


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "banks")


@pytest.mark.parametrize("windows", ["search", "confirm"])
@pytest.mark.parametrize("memory", [0, 1 << 28])
def test_loss_is_the_definition(setup: Setup, windows: str, memory: int) -> None:
    """With what is compared cached, and computed again for each; windows of different lengths in one batch."""
    evaluator = setup.evaluator(cache_memory=memory)
    found = {}
    for fmt in ("int2", "int3", "int8"):
        formats = setup.uniform(fmt)
        expected = by_hand(setup.original, setup.quantized(formats), setup.answers[windows])
        found[fmt] = evaluator.evaluate(formats, windows)
        assert found[fmt] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 <= found["int8"] < found["int3"] < found["int2"] <= 1
    exact = agreement(setup.quantized(setup.uniform("int2")), setup.answers[windows])
    assert min(exact) < LIMIT  # the answers do differ


def test_the_full_model_loses_nothing(setup: Setup) -> None:
    assert setup.evaluator().evaluate(dict.fromkeys(setup.uniform("int8"), "16bit")) == pytest.approx(0, abs=1e-6)


def test_together_as_alone(setup: Setup) -> None:
    configurations = [setup.uniform(fmt) for fmt in ("int2", "int8", "int3", "int2", "int8")]
    evaluator = setup.evaluator()
    together = [loss for some in evaluator.evaluate_many(configurations) for loss in some]
    assert together == [evaluator.evaluate(formats) for formats in configurations]


def test_a_configuration_that_overflows_is_infeasible(setup: Setup) -> None:
    class Broken:
        formats_of = setup.bank.formats_of

        def get(self, linear: str, fmt: str) -> Any:
            found = setup.bank.get(linear, fmt)
            return found.map(lambda part: part * torch.nan if part.is_floating_point() else part)

    evaluator = Evaluator(setup.loaded, setup.inventory, Broken(), {}, "answers", answers=setup.measure)  # type: ignore[arg-type]
    assert math.isnan(evaluator.evaluate(setup.uniform("int2")))


QUICK: dict[str, Any] = {
    "group_size": 64, "window_length": 32, "windows": 2, "confirm_windows": 2, "bank_windows": 4, "cost_passes": 2,
    "points": 3, "proxy": "rtn", "loss": "answers", "answers": 4, "answer_tokens": 6, "target_bits": 3.4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    loaded = loaded_model()
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return str(path)


def flags(settings: dict[str, Any]) -> list[str]:
    names = {"loss": "objective"}
    return [
        part
        for name, value in settings.items()
        for part in (f"--{names.get(name, name).replace('_', '-')}", str(value))
    ]


def test_a_search(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert run_command(main, [folder, "--output", str(run), *flags(QUICK)]) == 0
    out = capsys.readouterr().out
    assert " of an answer" in out and "nats" not in out
    opened = RunFolder.open(run)
    assert opened.settings.loss == "answers" and opened.front is not None and opened.cost is not None
    assert opened.front.objective == "answers" and opened.front.fit is not None and opened.front.fit.ceiling == 1
    assert 0 < opened.front.hypervolume <= 1
    assert all(record.loss is not None and 0 <= record.loss <= 1 for record in opened.archive)
    assert {record.windows for record in opened.archive} == {"search", "confirm"}
    chosen = Configuration.load(run / "configuration.json")
    assert chosen.details.provenance is not None and chosen.details.provenance.loss == "answers"
    page = (run / "report.html").read_text()
    assert "loss, of an answer" in page and "nats per token" not in page and "loss, nats" not in page
    assert "tokens that differ from the full-precision model" in page
    assert select_from_run(run, max_loss=1.0).details.loss is not None
    assert run_command(main, ["select", str(run), "--target-bits", "3.2"]) == 0
    assert " of an answer" in capsys.readouterr().out


def test_resuming(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same archive again; not with another objective, nor with other answers."""
    run = tmp_path / "run"
    search(folder, run, **QUICK)
    lines = (run / "archive.jsonl").read_text()
    search(folder, run, resume=True, **QUICK)
    assert (run / "archive.jsonl").read_text() == lines
    others = {name: value for name, value in QUICK.items() if name not in ("loss", "answers", "answer_tokens")}
    with pytest.raises(AmqError, match="--objective was answers, is jsd"):
        search(folder, run, resume=True, **others)
    with pytest.raises(AmqError, match="--answers was 4, is 5"):
        search(folder, run, resume=True, **{**QUICK, "answers": 5})
    monkeypatch.setattr("amq.model.answers.DRAWN", 5)
    with pytest.raises(AmqError, match="with --objective answers, the model answered anew"):
        search(folder, run, resume=True, **QUICK)


@pytest.mark.parametrize("cost", ["sensitivity", "weight"])
def test_other_costs(folder: str, tmp_path: Path, cost: str) -> None:
    search(folder, tmp_path / "run", **QUICK, cost=cost)
    found = RunFolder.open(tmp_path / "run").cost
    assert found is not None and found.unit == {"sensitivity": "−ln(1 − loss/1)", "weight": "sum of squares"}[cost]


def test_runs_of_before_say_nothing_of_an_objective(folder: str, tmp_path: Path) -> None:
    """Their front.json is of a divergence, and its curve saturates at ln 2."""
    run = tmp_path / "run"
    options = {name: value for name, value in QUICK.items() if name not in ("loss", "answers", "answer_tokens")}
    search(folder, run, **options)
    path = run / "front.json"
    data = json.loads(path.read_text())
    assert data.pop("objective") == "jsd" and data["fit"].pop("ceiling") == pytest.approx(math.log(2))
    path.write_text(json.dumps(data))
    assert Front.read(path).objective == "jsd" and Front.read(path).fit.ceiling == math.log(2)  # type: ignore[union-attr]
    write_report(run)
    assert "nats per token" in (run / "report.html").read_text()


def test_bad_input(folder: str, tmp_path: Path) -> None:
    def made(**given: Any) -> SearchSettings:
        return SearchSettings.make(model="m", output="o", **given)

    with pytest.raises(AmqError, match="--objective.*answers.*mse"):
        made(loss="mse")
    with pytest.raises(AmqError, match="--answers is of --objective answers, got jsd"):
        made(answers=4)
    with pytest.raises(AmqError, match="--answer-tokens is of --objective answers, got kl"):
        made(answer_tokens=4, loss="kl")
    with pytest.raises(AmqError, match="answers: the model is not in memory as a whole.*--load memory"):
        search(folder, tmp_path / "run", **QUICK, load="disk")
    assert not (tmp_path / "run").exists()


def test_every_objective_has_a_unit() -> None:
    assert all(OBJECTIVES[name].unit and OBJECTIVES[name].ceiling > 0 for name in OBJECTIVES)
