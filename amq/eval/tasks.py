"""Tasks of the lm-eval package (zero-shot and few-shot accuracy), run in process on a model that is loaded already.

A task is a YAML file of the user's, or a name that lm-eval knows. lm-eval's own tasks read their questions from the
Hugging Face hub; a YAML with `dataset_path: json` and `data_files` needs no network (a relative path in it starts from
where the command runs).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from amq.errors import AmqError
from amq.eval.settings import TaskSettings, is_file
from amq.model.open import LoadedModel
from amq.util.extras import needs

log = logging.getLogger(__name__)

FEWSHOT_SEED = 1234
"""lm-eval's own, so that its examples are those of other people's figures."""


@dataclass(frozen=True)
class TaskRow:
    """One figure. model: the name of its row in the perplexity table. filter: lm-eval's, `none` for most.

    value: None where it was not finite, in a file. stderr: None where lm-eval gives none. count: questions asked; None
    for a group.
    """

    model: str
    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    num_fewshot: int | None
    count: int | None


class TaskRunner:
    """The tasks of `settings`, loaded with their questions; a task that cannot be loaded raises AmqError."""

    def __init__(self, settings: TaskSettings) -> None:
        with needs("tasks", "--tasks"):
            import lm_eval
        self._settings = settings
        self.settings: dict[str, Any] = {**settings.task_json(), "lm_eval": lm_eval.__version__}
        with _errors_only():
            self._loaded = _load(settings)
        for name, task in self._loaded["tasks"].items():
            self._set_shots(name, task)

    def _set_shots(self, name: str, task: Any) -> None:
        """As `lm_eval.simple_evaluate` does: a task that says 0 stays at 0."""
        own, wanted = task.get_config("num_fewshot"), self._settings.num_fewshot
        if own == 0 and wanted:
            log.warning(
                "task %s fixes num_fewshot at 0 in its YAML: --num-fewshot %d has no effect on it", name, wanted
            )
        elif wanted is not None or own is None:
            task.set_config(key="num_fewshot", value=wanted or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def run(self, loaded: LoadedModel, model: str) -> list[TaskRow]:
        """Figures of the model as it is now; `model` is what to call it in them."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        tokenizer = loaded.tokenizer
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise AmqError(
                f"{loaded.name}: its tokenizer has neither a bos nor an eos token, which lm-eval starts from"
            )
        names = ", ".join(self._loaded["tasks"])
        with _errors_only():
            try:
                runner = HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=self._settings.batch_size)
                results = lm_eval.evaluate(runner, self._loaded, limit=self._settings.limit, log_samples=False)
            except Exception as error:  # a task's YAML may hold any template, metric and function
                raise AmqError(f"lm-eval could not run {names}: {type(error).__name__}: {error}") from error
        return list(_rows(results, model))


def _load(settings: TaskSettings) -> Any:
    from lm_eval.tasks import TaskManager

    def manager(include_defaults: bool) -> Any:
        return TaskManager(include_path=settings.task_path or None, include_defaults=include_defaults)

    tasks = manager(include_defaults=False)
    wanted = [name for name in settings.task_names if not is_file(name)]
    if not set(wanted) <= set(tasks.all_tasks):
        tasks = manager(include_defaults=True)  # reads 15,000 files: seconds
    if unknown := sorted(set(wanted) - set(tasks.all_tasks)):
        where = f"neither lm-eval nor {settings.task_path} has" if settings.task_path else "lm-eval does not have"
        raise AmqError(f"{where} a task {unknown[0]!r}: give the path of a task YAML, or its folder with --task-path")
    try:
        return tasks.load(settings.task_names)
    except Exception as error:  # lm-eval, datasets and their HTTP library raise many types
        raise AmqError(
            f"tasks {settings.tasks} could not be loaded: {type(error).__name__}: {error}; lm-eval's own tasks read "
            "their questions from the Hugging Face hub, a task YAML with `dataset_path: json` reads local files"
        ) from error


@contextmanager
def _errors_only() -> Iterator[None]:
    """lm-eval warns of every default that it takes, and that a model came as an object."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _rows(results: Any, model: str) -> Iterator[TaskRow]:
    for task, figures in results["results"].items():
        samples = results["n-samples"].get(task, {}).get("effective")
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = figures.get(f"{metric}_stderr,{chosen}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            shots = results["n-shot"].get(task)
            yield TaskRow(model, task, metric, chosen, value, stderr if known else None, shots, samples)
