"""`evaluate`: models, their quantized forms and checkpoints on one text and on tasks, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from amq.checkpoint.store import Checkpoint, is_checkpoint
from amq.configuration import Configuration, other_items
from amq.errors import AmqError
from amq.eval import checkpoints
from amq.eval.banks import Banks
from amq.eval.measure import Form, Measure
from amq.eval.result import Evaluation
from amq.eval.tasks import TaskRunner, TaskSettings
from amq.formats import BitFormat, parse_formats
from amq.model.opened import open_model
from amq.proxy.swap import LinearSwap
from amq.quantize.bank import BankRecipe
from amq.util.progress import Progress


def evaluate(
    model: str | Sequence[str],
    configurations: Sequence[str | Path] = (),
    uniform: str = "",
    *,
    text: str = "docstrings",
    max_tokens: int = 16384,
    window_length: int = 512,
    proxy: str = "gptq",
    group_size: int = 128,
    calibration: str = "pydoc",
    bank_windows: int = 24,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    backend: str | None = None,
    activations: str = "fp32",
    full: bool = True,
    dequantized: bool = False,
    tasks: TaskSettings | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexities on one text, and figures of tasks.

    model: one or several; a folder that amq quantized runs as it is, any other model in full precision.
    configurations: files written by the search; each is assembled from the very bank it was searched on.
    uniform: comma-separated formats, from the first configuration's bank, else the one that `proxy` to `seed` name.
    backend, activations: what multiplies the quantized linears; see `amq.proxy.swap`. None: `reference` for banks,
        and for checkpoints the fastest on `device` that runs their formats.
    dequantized: every checkpoint also as plain torch linears.
    text: a file, or a name that `load_text` knows, of which the first `max_tokens` tokens are used; or empty.
    trust_remote_code: see `amq.model.open.load_model`.
    Raises AmqError for unusable input before anything is computed; for a tokenizer unlike the first when it is loaded.
    """
    names = [model] if isinstance(model, str) else list(model)
    opened = checkpoints.open_all(name for name in names if is_checkpoint(Path(name).expanduser()))
    _check(names, opened, bool(configurations or uniform), dequantized, bool(text or tasks))
    found = [(Path(p).stem, Configuration.load(Path(p))) for p in configurations]
    formats = parse_formats(uniform) if uniform else ()
    recipe = BankRecipe(proxy, group_size, calibration, bank_windows, window_length, seed)
    recipe = recipe.of(found[0][1]) if found else recipe
    if opened:
        backend = checkpoints.runtime_backend(opened.values(), backend, activations, device)
    runner = TaskRunner(tasks) if tasks else None
    measure = Measure(text, window_length, max_tokens, runner, progress or Progress())
    run = _Run(measure, dtype, device, backend or "reference", activations, trust_remote_code)
    for name, label in zip(names, _labels(names, opened), strict=True):
        if name in opened:
            run.checkpoint(name, label, opened[name], dequantized)
        else:
            run.plain(name, label, formats, found, recipe, full)
    settings: dict[str, Any] = {
        "model": ", ".join(names), "text": text, "tokens": measure.tokens,
        "window_length": window_length, "stride": window_length - len(measure.window_prefix),
        "window_prefix": list(measure.window_prefix), "backend": run.backend, "activations": activations,
    }  # fmt: skip
    settings |= {} if opened else {"bank": asdict(recipe)}
    settings |= {"tasks": runner.settings} if runner else {}
    return Evaluation(measure.rows, settings, tuple(measure.task_rows))


def _check(
    names: Sequence[str], opened: dict[str, Checkpoint], quantizing: bool, dequantized: bool, measuring: bool
) -> None:
    if not names:
        raise AmqError("no model is given")
    if odd := next((name for name in names if names.count(name) > 1), None):
        raise AmqError(f"model {odd} is given twice")
    if quantizing and opened:
        raise AmqError(f"{next(iter(opened))} is quantized already: --configuration and --uniform want a plain model")
    if quantizing and len(names) > 1:
        raise AmqError(f"--configuration and --uniform want one model, got {len(names)}: {', '.join(names)}")
    if dequantized and not opened:
        raise AmqError(f"--dequantized wants a folder that amq quantized, {names[0]} is not one")
    if not measuring:
        raise AmqError("nothing to measure: give a text or tasks")


def _labels(names: Sequence[str], opened: dict[str, Checkpoint]) -> list[str]:
    """A checkpoint is called by its folder's name, a plain model `full`; by what was given where that is ambiguous."""
    short = [Path(name).resolve().name if name in opened else "full" for name in names]
    return [label if short.count(label) == 1 else name for label, name in zip(short, names, strict=True)]


@dataclass(frozen=True)
class _Run:
    """Loads one model after another, each in a call of its own so that it is gone before the next."""

    measure: Measure
    dtype: str
    device: str
    backend: str
    activations: str
    trust_remote_code: bool

    def plain(
        self,
        name: str,
        label: str,
        formats: Sequence[BitFormat],
        configurations: Sequence[tuple[str, Configuration]],
        recipe: BankRecipe,
        full: bool,
    ) -> None:
        """A model in full precision, then uniform formats and configurations from their banks."""
        opened = open_model(name, self.dtype, self.device, self.trust_remote_code)
        inventory = opened.inventory
        for _, configuration in configurations:
            configuration.check(inventory.linears, opened.usable.reasons)
        self.measure.prepare(opened.loaded)
        swap = LinearSwap(opened.model, (s.name for s in inventory.linears), self.backend, self.activations)
        banks = Banks(opened, swap, self.measure.progress)
        jobs = [(f.name, Configuration.uniform(inventory.linears, f, recipe.group_size), recipe) for f in formats]
        jobs += [(stem, c, recipe.of(c)) for stem, c in configurations]
        forms = [Form(label, 16.0, 2 * inventory.numel)] if full else []
        for title, configuration, of in jobs:
            banks.open(of, configuration)
            size = configuration.bytes(inventory.linears) + sum(item.bytes for item in other_items(inventory))
            bits = configuration.bits_per_weight(inventory.linears)
            forms.append(Form(title, bits, size, lambda c=configuration, r=of: banks.apply(c, r)))
        self.measure.run(opened.loaded, forms)

    def checkpoint(self, name: str, label: str, checkpoint: Checkpoint, dequantized: bool) -> None:
        """A checkpoint as the backend runs it, and as plain torch linears; `reference` means the latter alone."""
        loaded = checkpoints.load(name, self.dtype, self.device, self.backend, self.activations, self.trust_remote_code)
        bits, size = checkpoints.bits_per_weight(checkpoint), checkpoints.weight_bytes(checkpoint)
        forms = [Form(label, bits, size)]
        plain = Form(f"{label} dequantized", bits, size, loaded.model.dequantize)
        if self.backend == "reference":
            plain.apply()
            forms = [replace(plain, apply=lambda: None)]
        elif dequantized:
            forms.append(plain)
        self.measure.prepare(loaded)
        self.measure.run(loaded, forms)
