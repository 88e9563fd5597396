"""`--tasks`: lm-eval on a local task file, for a plain model and its quantized forms; what cannot be run is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import byte_tokenizer
from helpers.tiny_models import tiny_llama as make_tiny_llama
from torch import nn

from amq.errors import AmqError
from amq.eval import evaluate, table
from amq.eval.__main__ import main
from amq.util.settings import run_command

pytestmark = pytest.mark.usefixtures("cache", "one_thread")

QUESTIONS = [
    {"question": "The sky on a clear day is", "choices": ["blue", "a spoon", "seven"], "answer": 0},
    {"question": "Two and two make", "choices": ["a river", "four", "Tuesday"], "answer": 1},
    {"question": "A dog has four", "choices": ["wheels", "letters", "legs"], "answer": 2},
    {"question": "Ice melts when it gets", "choices": ["warm", "painted", "a job"], "answer": 0},
    {"question": "We read with our", "choices": ["shoes", "eyes", "cups"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with `common_sense.yaml`, `other.yaml` and their questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    for name in ("common_sense", "other"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / "questions.json"))
    return folder / "common_sense.yaml"


@pytest.fixture
def lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips where lm-eval is not installed; what it reads is cached in the test's own folder."""
    pytest.importorskip("lm_eval", reason="lm-eval is an optional extra, not a test requirement")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def folder(make_folder: Callable[[nn.Module], Path]) -> Path:
    """A tiny model whose tokenizer has the end-of-text token that lm-eval starts from."""
    path = make_folder(make_tiny_llama())
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(path)
    return path


def likelihood(model: nn.Module, question: str, choice: str) -> float:
    """log p(" choice" | question), by hand."""
    tokenizer = byte_tokenizer()
    context, rest = (tokenizer(text)["input_ids"] for text in (question, " " + choice))
    logits = model(input_ids=torch.tensor([context + rest])).logits[0].log_softmax(-1)
    return sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(rest))


def accuracy(model: nn.Module, count: int) -> float:
    right = 0
    for entry in QUESTIONS[:count]:
        scores = [likelihood(model, entry["question"], choice) for choice in entry["choices"]]
        right += max(range(len(scores)), key=scores.__getitem__) == entry["answer"]
    return right / count


@pytest.mark.usefixtures("lm_eval")
def test_a_task_file_on_a_model_and_its_quantized_form(
    folder: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    flags = ["--tasks", f"{task},other", "--task-path", str(task.parent), "--limit", "4", "--batch-size", "3"]
    quantized = ["--uniform", "int2", "--proxy", "rtn", "--group-size", "32"]
    assert run_command(main, [str(folder), *flags, *quantized, "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["rows"][0]["perplexity"] is None and data["settings"]["text"] == ""
    found = {(t["model"], t["task"]): t for t in data["tasks"]}
    assert list(found) == [(m, t) for m in ("full", "int2") for t in ("common_sense", "other")]
    full = found["full", "common_sense"]
    p = accuracy(make_tiny_llama(), 4)
    assert full["value"] == p and full["metric"] == "acc" and full["filter"] == "none"
    assert full["count"] == 4 and full["num_fewshot"] == 0
    assert full["stderr"] == pytest.approx((p * (1 - p) / 3) ** 0.5)
    assert data["settings"]["tasks"]["limit"] == 4 and data["settings"]["tasks"]["lm_eval"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["bits/weight", "weights", "MiB"]
    assert lines[4].split()[:6] == ["full", "common_sense", "acc", f"{p:.4f}", "±", f"{full['stderr']:.4f}"]


@pytest.mark.usefixtures("lm_eval")
def test_perplexity_and_a_group_with_examples(folder: Path, task: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to read " * 20)
    group = "group: both\ntask: [common_sense, other]\naggregate_metric_list: [{metric: acc}]\n"
    task.with_name("both.yaml").write_text(group)
    tasks = {"tasks": "both", "task_path": str(task.parent), "num_fewshot": 1}
    result = evaluate(str(folder), text=str(text), window_length=64, **tasks)
    assert result.rows[0].perplexity > 1
    assert [row.task for row in result.tasks] == ["common_sense", "other", "both"]
    first, second, both = result.tasks
    assert first.num_fewshot == second.num_fewshot == 1 and first.count == len(QUESTIONS)
    assert both.value == first.value == second.value
    lines = table(result).splitlines()
    assert lines[1].split()[-1] == "perplexity" and lines[-1].endswith("(group, 1-shot)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "3"], "--limit needs --tasks"),
        (["--batch-size", "3"], "--batch-size needs --tasks"),
        (["--tasks", " , "], "--tasks names no task"),
        (["--tasks", "gone.yaml"], "task file gone.yaml does not exist"),
        (["--tasks", "x", "--task-path", "gone"], "--task-path gone is not a folder"),
        (["--tasks", "x", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--tasks", "x", "--num-fewshot", "-1"], "--num-fewshot must be at least 0, got -1"),
        (["--tasks", "x", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["no model is loaded for this", *flags]) == 2
    assert f"error: {message}\n" == capsys.readouterr().err


def test_missing_package(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AmqError, match=r'--tasks needs the extra "tasks" \(lm_eval is not installed\): pip install'):
        evaluate("no model is loaded for this", tasks=str(task))


@pytest.mark.usefixtures("lm_eval")
def test_tasks_that_cannot_be_run(tiny_folder: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    everything = TaskManager.__init__
    monkeypatch.setattr(  # the index of lm-eval's own 15,000 files takes seconds
        TaskManager,
        "__init__",
        lambda self, include_defaults, **options: everything(self, include_defaults=False, **options),
    )
    with pytest.raises(AmqError, match=r"neither lm-eval nor .*/tasks has a task 'nonesuch'"):
        evaluate("no model", tasks="common_sense,nonesuch", task_path=str(task.parent))
    task.with_name("questions.json").unlink()
    with pytest.raises(AmqError, match=r"common_sense.yaml could not be loaded: .*questions.json"):
        evaluate("no model", tasks=str(task))
    task.write_text("- not a task")
    with pytest.raises(AmqError, match="common_sense.yaml could not be loaded: ValueError"):
        evaluate("no model", tasks=str(task))


@pytest.mark.usefixtures("lm_eval")
def test_a_tokenizer_without_a_first_token(tiny_folder: Path, task: Path) -> None:
    with pytest.raises(AmqError, match="its tokenizer has neither a bos nor an eos token"):
        evaluate(str(tiny_folder), text="", tasks=str(task))
