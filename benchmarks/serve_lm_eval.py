"""lm-eval over HTTP against the same tasks in this process: `python benchmarks/serve_lm_eval.py DIR`.

A multiple-choice task through `local-completions` (log likelihoods: echo with logprobs, several prompts of token ids in
a request) and one of short answers through `local-chat-completions`. In this process the checkpoint runs in
transformers, as `amq eval --tasks` runs it. Accuracies and generated texts must be equal, and the log likelihoods as
close as floating point allows: the tolerance is 4 times the largest difference between two runs in this process that
are the same function by other kernels (backend cpu, and the weights dequantized).

Wants the extra `tasks`, and what lm-eval needs for HTTP: pip install "amq-llm[tasks]" "lm-eval[api]". The questions are
in this file; nothing is read from the network. --smoke takes a tiny random model.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import write_results
from serving import ROOT, Launch, Served, launched

from amq.errors import AmqError
from amq.util.extras import needs
from amq.util.settings import run_command

SCHEMA = "amq/serve_lm_eval/1"
MARGIN = 4
QUESTIONS = (
    ("What colour is the sky on a clear day?", "blue", "brown", "square"),
    ("How many legs does a dog have?", "four", "nine", "none"),
    ("What is the capital of France?", "Paris", "Oslo", "Lima"),
    ("What is the capital of Italy?", "Rome", "Cairo", "Tokyo"),
    ("What do bees make?", "honey", "bread", "iron"),
    ("Which animal barks?", "a dog", "a fish", "a snail"),
    ("What is frozen water called?", "ice", "sand", "smoke"),
    ("What is two plus three?", "five", "seven", "ten"),
    ("Which day comes after Monday?", "Tuesday", "Sunday", "Friday"),
    ("What do we see with?", "our eyes", "our knees", "our teeth"),
    ("In which season does it snow most?", "winter", "summer", "spring"),
    ("Which is the largest planet of the sun?", "Jupiter", "Mars", "Venus"),
    ("What does a thermometer measure?", "temperature", "weight", "time"),
    ("How many minutes has an hour?", "sixty", "twelve", "five"),
    ("Which metal is attracted by a magnet?", "iron", "gold", "silver"),
    ("What is the opposite of hot?", "cold", "tall", "loud"),
)
CHOICE = """
task: amq_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ANSWER = """
task: amq_answer
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}} Answer in one word."
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
"""


@dataclass(frozen=True)
class Ran:
    """One task, one way. figure: acc or exact_match. answers: per question, log likelihoods, or [the text]."""

    figure: float
    answers: list[list[Any]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="the checkpoint to serve")
    add("--server-args", default="--activations fp32", metavar="ARGS", help="default: %(default)s")
    add("--limit", type=int, metavar="N", help=f"questions (default: {len(QUESTIONS)})")
    add("--json", type=Path, metavar="FILE", help="write every likelihood and text")
    add("--smoke", action="store_true", help="four questions and a tiny random model")
    args = parser.parse_args(argv)
    if bool(args.folder) == args.smoke:
        raise AmqError("give a folder that amq quantized, or --smoke")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with needs("tasks", "lm-eval over HTTP"):
        import datasets
        import lm_eval  # noqa: F401
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="amq-lm-eval-") as temporary:
        datasets.config.HF_DATASETS_CACHE = Path(temporary, "datasets")
        folder = args.folder or tiny(Path(temporary, "model"))
        limit = args.limit or (4 if args.smoke else len(QUESTIONS))
        tasks = Tasks(Path(temporary, "tasks"), limit)
        tasks.write()
        here, plain = in_process(folder, tasks)
        figure = amq_eval(folder, tasks)
        with launched(folder, shlex.split(args.server_args), Launch()) as server:
            there = over_http(folder, server, tasks)
    result = compared(here, plain, there, figure)
    print(table(result, here, there))
    if args.json:
        runs = {"in_process": here, "dequantized": {"amq_choice": plain}, "over_http": there}
        written = {name: {task: vars(ran) for task, ran in tasks.items()} for name, tasks in runs.items()}
        write_results(args.json, {"schema": SCHEMA, "server_args": args.server_args, **result, "runs": written})
    return 0 if result["equal"] else 1


@dataclass(frozen=True)
class Tasks:
    """The two task files in `folder`."""

    folder: Path
    limit: int

    def write(self) -> None:
        self.folder.mkdir()
        data = self.folder / "questions.json"
        rows = [{"question": question, "choices": list(choices)} for question, *choices in QUESTIONS[: self.limit]]
        data.write_text(json.dumps(rows))
        for name, text in {"amq_choice": CHOICE, "amq_answer": ANSWER}.items():
            (self.folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))

    def run(self, model: Any, name: str, chat: bool) -> Ran:
        """`name` on an lm-eval model."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(self.folder), include_defaults=False)
        results = lm_eval.simple_evaluate(
            model, tasks=[name], task_manager=manager, apply_chat_template=chat, bootstrap_iters=0
        )
        metric = "exact_match" if chat else "acc"
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        answers = [[answer if chat else answer[0] for answer in sample["filtered_resps"]] for sample in samples]
        return Ran(results["results"][name][f"{metric},none"], answers)


def in_process(folder: Path, tasks: Tasks) -> tuple[dict[str, Ran], Ran]:
    """In transformers, as amq eval runs it; and the choices once more with plain linears of the same values."""
    from lm_eval.models.huggingface import HFLM

    from amq.eval import checkpoints

    loaded = checkpoints.load(str(folder), "float32", "cpu", "cpu", "fp32")

    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    packed = {name: tasks.run(model, name, chat) for name, chat in (("amq_choice", False), ("amq_answer", True))}
    loaded.model.dequantize()
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    return packed, tasks.run(model, "amq_choice", False)


def amq_eval(folder: Path, tasks: Tasks) -> float:
    """acc, as `amq eval DIR --tasks` prints it."""
    from amq.eval import evaluate

    result = evaluate(str(folder), tasks=str(tasks.folder / "amq_choice.yaml"))
    return next(row.value for row in result.tasks if row.metric == "acc")


def over_http(folder: Path, server: Served, tasks: Tasks) -> dict[str, Ran]:
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    completions = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model=server.model, tokenizer=str(folder),
        tokenizer_backend="huggingface", batch_size=4, max_retries=1,
    )  # fmt: skip
    chat = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", model=server.model, max_retries=1)
    return {
        "amq_choice": tasks.run(completions, "amq_choice", False),
        "amq_answer": tasks.run(chat, "amq_answer", True),
    }


def compared(here: dict[str, Ran], plain: Ran, there: dict[str, Ran], figure: float | None) -> dict[str, Any]:
    """Differences in nats, and whether all is as it must be."""
    noise = largest(here["amq_choice"].answers, plain.answers)
    difference = largest(here["amq_choice"].answers, there["amq_choice"].answers)
    same = sum(a == b for a, b in zip(here["amq_answer"].answers, there["amq_answer"].answers, strict=True))
    equal = (
        difference <= MARGIN * noise
        and here["amq_choice"].figure == there["amq_choice"].figure == figure
        and here["amq_answer"].figure == there["amq_answer"].figure
        and same == len(here["amq_answer"].answers)
    )
    return {
        "equal": equal, "difference": difference, "noise": noise, "tolerance": MARGIN * noise, "amq_eval": figure,
        "same_texts": same,
    }  # fmt: skip


def largest(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True))


def table(result: dict[str, Any], here: dict[str, Ran], there: dict[str, Ran]) -> str:
    choice, answer = (here["amq_choice"], there["amq_choice"]), (here["amq_answer"], there["amq_answer"])
    questions, likelihoods = len(choice[0].answers), sum(map(len, choice[0].answers))
    return "\n".join(
        [
            "| task | through | in process | over HTTP | what else |",
            "|---|---|---|---|---|",
            f"| multiple choice, acc | local-completions | {choice[0].figure:.4f} | {choice[1].figure:.4f} | "
            f"{likelihoods} log likelihoods differ by at most {result['difference']:.2e}, tolerance "
            f"{result['tolerance']:.2e}; amq eval says {result['amq_eval']:.4f} |",
            f"| short answers, exact_match | local-chat-completions | {answer[0].figure:.4f} | {answer[1].figure:.4f} "
            f"| {result['same_texts']} of {questions} texts are equal |",
            "",
            "equal" if result["equal"] else "NOT EQUAL",
        ]
    )


def tiny(folder: Path) -> Path:
    """A tiny random Llama, quantized; its tokenizer has the end token that lm-eval starts from."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.checkpoints import tiny_checkpoint
    from helpers.tiny_models import byte_tokenizer, tiny_llama

    tiny_checkpoint(tiny_llama(), folder)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "!"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(run_command(main))
