"""EvalSettings: what a table of figures is made of, as flags and as Python arguments."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat, check_group_size, parse_formats
from amq.kernels.names import ACTIVATIONS, BACKENDS
from amq.model.settings import AUTO, CALIBRATION_TEXTS, MODEL, LoadSettings
from amq.quantize.methods import BANK_ROTATIONS, ROTATION_HELP
from amq.quantize.quantizers import QUANTIZERS
from amq.util.settings import CHOOSE, MEASURE, REQUIRED, Settings, flag

TASKS = "tasks of lm-eval"
ANSWERS = "answers to the model's own prompts"
BANK = "of which bank --uniform is, without --configuration"


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """tasks: none where it is empty. Making these raises AmqError for values that cannot be, without lm-eval."""

    tasks: str = flag("", "lm-eval tasks, comma-separated: names or task YAML files", TASKS, metavar="LIST")
    task_path: str = flag("", "folder of task YAML files whose names --tasks may give", TASKS, metavar="FOLDER")
    limit: int | None = flag(None, "questions per task, from the first on (default all)", TASKS, least=1, metavar="N")
    num_fewshot: int | None = flag(
        None, "examples before each question (default the task's own)", TASKS, least=0, metavar="N"
    )
    batch_size: int = flag(8, "sequences run through the model at once for --tasks", TASKS, least=1, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        options = (field.name for field in fields(TaskSettings) if field.name != "tasks")
        given = [name for name in options if getattr(self, name) != getattr(TaskSettings, name)]
        if (given or self.tasks) and not self.task_names:
            raise AmqError(f"--{given[0].replace('_', '-')} needs --tasks" if given else "--tasks names no task")
        if self.task_path and not Path(self.task_path).is_dir():
            raise AmqError(f"--task-path {self.task_path} is not a folder")
        for name in filter(is_file, self.task_names):
            if not Path(name).is_file():
                raise AmqError(f"task file {name} does not exist")

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def task_json(self) -> dict[str, Any]:
        """The fields of this class alone."""
        return {field.name: getattr(self, field.name) for field in fields(TaskSettings)}


def is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) or "/" in task


@dataclass(frozen=True, kw_only=True)
class EvalSettings(LoadSettings, TaskSettings):
    """Perplexities on one text, figures of tasks, and agreement of greedy answers.

    model: one or several; a folder that amq quantized runs as it is, any other model in full precision.
    configurations: files written by the search; each is assembled from the very bank it was searched on.
    uniform: comma-separated formats, from the first configuration's bank, else the one that `proxy` to `rotation` name.
    backend, activations: what multiplies the quantized linears; see `amq.proxy.swap`. None: `reference` for banks,
        and for checkpoints the fastest on `device` that runs their formats.
    simulate_activations: formats, comma-separated; see `amq.eval.simulated`. A folder has its own group size.
    full: the model in full precision too. dequantized: every checkpoint also as plain torch linears.
    text: a file, or a name that `load_text` knows, of which the first `max_tokens` tokens are used; empty for none;
        None for docstrings, and for none where there are tasks or answers.
    answers: greedy answers of `answer_tokens` tokens at most that are compared with the full-precision model's, which
        is the first MODEL then; see `amq.model.answers`.
    """

    VERB: ClassVar[str] = "eval"
    ABOUT: ClassVar[str] = "measures perplexity, task figures and greedy answers of models and of their quantized forms"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq eval smollm2 --configuration runs/smollm2/configuration.json --uniform int3,int4",
        "amq eval smollm2 smollm2-4bit --answers 32 --tasks arc_easy --limit 200 --json table.json",
    )

    model: tuple[str, ...] = flag(
        REQUIRED,
        MODEL
        + "; a folder that amq quantized runs as it is. Three words make other commands: strategies, order, predictor",
        positional=True,
    )
    configurations: tuple[str, ...] = flag(
        (), "written by amq search; may be repeated", CHOOSE, name="configuration", metavar="FILE"
    )
    uniform: str = flag("", f"uniform formats to compare, of {', '.join(FORMATS)}", CHOOSE, metavar="LIST")
    full: bool = True
    dequantized: bool = flag(False, "a quantized folder also as plain torch linears: a second row", CHOOSE)
    proxy: str = flag("gptq", "quantizer", BANK, choices=QUANTIZERS)
    group_size: int = flag(128, "input features per scale", BANK, metavar="G")
    calibration: str = flag(AUTO, f"calibration text: {CALIBRATION_TEXTS}", BANK, metavar="TEXT")
    bank_windows: int = flag(24, "calibration windows", BANK, least=1, metavar="N")
    seed: int = flag(0, "of the choice of windows", BANK, least=0, metavar="N")
    rotation: str = flag(
        AUTO, f"{ROTATION_HELP}; a format, auto by that one's error instead of int3's", BANK, choices=BANK_ROTATIONS
    )
    text: str | None = flag(
        None,
        "a text file, wikitext2, c4, pydoc or docstrings (default; with --tasks or --answers, none)",
        MEASURE,
        metavar="TEXT",
    )
    max_tokens: int = flag(16384, "tokens of the text to use", MEASURE, least=1, metavar="N")
    window_length: int = flag(512, "tokens per window, BOS included", MEASURE, least=2, metavar="N")
    answers: int = flag(
        0,
        "greedy answers to compare with the full-precision model's, which is the first MODEL: tokens until the first "
        "difference, share of equal answers, and whether they end (default none)",
        ANSWERS,
        least=0,
        metavar="N",
    )
    answer_tokens: int = flag(128, "tokens that an answer may have", ANSWERS, least=1, metavar="N")
    backend: str | None = flag(
        None,
        "what multiplies quantized linears (default: reference for --configuration and --uniform, the device's fastest "
        "for a quantized folder)",
        choices=BACKENDS,
    )
    activations: str = flag("fp32", "int8 needs --backend cpu or cuda", choices=ACTIVATIONS)
    simulate_activations: str = flag(
        "",
        f"rows besides: the full model, or a quantized folder dequantized, with the linears' inputs rounded to these "
        f"formats (of {', '.join(FORMATS)}) per token and group of --group-size, as they are and rotated; no kernel "
        "runs so",
        metavar="LIST",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise AmqError("no model is given")
        if odd := next((name for name in self.model if self.model.count(name) > 1), None):
            raise AmqError(f"model {odd} is given twice")
        if not self.measured_text and not self.task_names and not self.answers:
            raise AmqError("nothing to measure: give a text or tasks, or a number of --answers")
        if self.simulated:
            check_group_size(self.group_size)
        if self.answer_tokens != EvalSettings.answer_tokens and not self.answers:
            raise AmqError("--answer-tokens needs --answers")

    @property
    def simulated(self) -> tuple[BitFormat, ...]:
        """The formats of `simulate_activations`, widest first. Raises AmqError for an unknown one."""
        return parse_formats(self.simulate_activations)[::-1] if self.simulate_activations else ()

    @property
    def measured_text(self) -> str:
        """Empty for none."""
        if self.text is None:
            return "" if self.task_names or self.answers else "docstrings"
        return self.text


@dataclass(frozen=True)
class EvalCommand:
    """What the command takes besides."""

    json: Path | None = flag(None, "write the table as JSON", metavar="FILE")
