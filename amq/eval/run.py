"""`run_evaluate`: models, their quantized forms and checkpoints on one text, on tasks and by answers, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

from torch import nn

from amq.checkpoint.store import Checkpoint, is_checkpoint
from amq.configuration import Configuration, memory_items
from amq.errors import AmqError
from amq.eval import checkpoints
from amq.eval.answers import AnswerRunner
from amq.eval.banks import Banks
from amq.eval.measure import Form, Measure
from amq.eval.result import Evaluation, EvaluationSettings
from amq.eval.settings import EvalSettings
from amq.eval.simulated import Simulated
from amq.eval.tasks import TaskRunner
from amq.formats import BitFormat, parse_formats
from amq.model.opened import open_model
from amq.model.paging import pager_of
from amq.proxy.swap import LinearSwap
from amq.quantize.bank import BankRecipe
from amq.util.progress import Progress


def run_evaluate(settings: EvalSettings, progress: Progress | None = None) -> Evaluation:
    """The table that `settings` ask for.

    Raises AmqError for unusable input before anything is computed; for a tokenizer unlike the first when it is loaded.
    """
    names, backend, device = settings.model, settings.backend, settings.device
    opened = checkpoints.open_all(name for name in names if is_checkpoint(Path(name).expanduser()))
    _check(settings, opened)
    found = [(Path(p).stem, Configuration.load(Path(p))) for p in settings.configurations]
    formats = parse_formats(settings.uniform) if settings.uniform else ()
    recipe = BankRecipe(**{field.name: getattr(settings, field.name) for field in fields(BankRecipe)})
    recipe = recipe.of(found[0][1]) if found else recipe
    if opened:
        backend = checkpoints.runtime_backend(opened.values(), backend, settings.activations, device)
    runner, progress = TaskRunner(settings) if settings.task_names else None, progress or Progress()
    of = (settings.answers, settings.answer_tokens, settings.seed, progress)
    answers = AnswerRunner(*of) if settings.answers else None
    window_length, text = settings.window_length, settings.measured_text
    measure = Measure(text, window_length, settings.max_tokens, runner, answers, progress)
    run = _Run(measure, settings, backend or "reference")
    for name, label in zip(names, _labels(names, opened), strict=True):
        if name in opened:
            run.checkpoint(name, label, opened[name])
        else:
            run.plain(name, label, formats, found, recipe)
    facts = EvaluationSettings(
        model=", ".join(names), text=text, tokens=measure.tokens, window_length=window_length,
        stride=window_length - len(measure.window_prefix), window_prefix=tuple(measure.window_prefix),
        backend=run.backend, activations=settings.activations, bank=None if opened else recipe,
        tasks=runner.settings if runner else None, answers=answers.settings if answers else None,
    )  # fmt: skip
    rows, tasks = tuple(measure.rows), tuple(measure.task_rows)
    return Evaluation(settings=facts, rows=rows, tasks=tasks, answers=tuple(measure.answer_rows))


def _check(settings: EvalSettings, opened: dict[str, Checkpoint]) -> None:
    names, quantizing = settings.model, bool(settings.configurations or settings.uniform)
    if quantizing and opened:
        raise AmqError(f"{next(iter(opened))} is quantized already: --configuration and --uniform want a plain model")
    if quantizing and len(names) > 1:
        raise AmqError(f"--configuration and --uniform want one model, got {len(names)}: {', '.join(names)}")
    if settings.dequantized and not opened:
        raise AmqError(f"--dequantized wants a folder that amq quantized, {names[0]} is not one")
    if settings.answers and names[0] in opened:
        raise AmqError(
            f"--answers compares with the full-precision model's answers, and {names[0]} is quantized: name that model "
            f"first, as in `amq eval MODEL {names[0]} --answers {settings.answers}`"
        )


def _labels(names: Sequence[str], opened: dict[str, Checkpoint]) -> list[str]:
    """A checkpoint is called by its folder's name, a plain model `full`; by what was given where that is ambiguous."""
    short = [Path(name).resolve().name if name in opened else "full" for name in names]
    return [label if short.count(label) == 1 else name for label, name in zip(short, names, strict=True)]


@dataclass(frozen=True)
class _Run:
    """Loads one model after another, each in a call of its own so that it is gone before the next."""

    measure: Measure
    settings: EvalSettings
    backend: str

    def plain(
        self,
        name: str,
        label: str,
        formats: Sequence[BitFormat],
        configurations: Sequence[tuple[str, Configuration]],
        recipe: BankRecipe,
    ) -> None:
        """A model in full precision, then uniform formats and configurations from their banks."""
        how = self.settings
        opened = open_model(name, how.dtype, how.device, how.trust_remote_code, how.load)
        inventory = opened.inventory
        for _, configuration in configurations:
            configuration.check(inventory.linears, opened.usable.reasons, inventory.outer)
        if (formats or configurations) and pager_of(opened.model) is not None:
            raise AmqError(
                f"--configuration and --uniform want a model in memory, {name} is read block by block: use --load "
                "memory, or quantize it (amq quantize) and evaluate the checkpoint"
            )
        self.measure.prepare(opened.loaded)
        if self.measure.answers:
            self.measure.answers.prepare(opened)
        linears, outer = (s.name for s in inventory.linears), (s.name for s in inventory.outer)
        swap = LinearSwap(opened.model, linears, self.backend, how.activations, outer)
        banks = Banks(opened, swap, self.measure.progress)
        jobs = [(f.name, Configuration.uniform(inventory.linears, f, recipe.group_size), recipe) for f in formats]
        jobs += [(stem, c, recipe.of(c)) for stem, c in configurations]
        full = Form(label, 16.0, 2 * inventory.numel)
        forms = [full] if how.full else []
        forms += self._simulated(full, opened.model, [s.name for s in inventory.linears], recipe.group_size)
        for title, configuration, of in jobs:
            banks.open(of, configuration)
            size = sum(item.bytes for item in memory_items(inventory, configuration))
            bits = configuration.bits_per_weight(inventory.weights)
            forms.append(Form(title, bits, size, partial(banks.apply, configuration, of)))
        self.measure.run(opened.loaded, forms)

    def checkpoint(self, name: str, label: str, checkpoint: Checkpoint) -> None:
        """A checkpoint as the backend runs it, and as plain torch linears; `reference` means the latter alone."""
        how = self.settings
        loaded = checkpoints.load(name, how.dtype, how.device, self.backend, how.activations, how.trust_remote_code)
        bits, size = checkpoints.bits_per_weight(checkpoint), checkpoints.weight_bytes(checkpoint)
        forms = [Form(label, bits, size)]
        plain = Form(f"{label} dequantized", bits, size, cache(loaded.model.dequantize))
        if self.backend == "reference":
            plain.apply()
            forms = [plain]
        elif how.dequantized:
            forms.append(plain)
        names = list(checkpoint.record.block_shapes)
        forms += self._simulated(plain, loaded.model, names, checkpoint.record.group_size)
        self.measure.prepare(loaded)
        if self.measure.answers:
            self.measure.answers.check(loaded)
        self.measure.run(loaded, forms)

    def _simulated(self, form: Form, model: nn.Module, linears: Sequence[str], group_size: int) -> list[Form]:
        """`form` with its linears' inputs rounded, in each format plain and rotated."""
        made = [Simulated(f.name, group_size, rotated) for f in self.settings.simulated for rotated in (False, True)]
        return [
            replace(form, name=f"{form.name}, {s.title}", within=partial(s.within, model, linears), simulated=s)
            for s in made
        ]
