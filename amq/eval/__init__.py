"""Evaluation: perplexity of the full-precision model, of uniform banks and of configurations, on one text.

Perplexity is exp of the mean negative log-likelihood over disjoint windows (stride = window): in every window of L
tokens the last L − 1 are predicted from those before them in the same window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amq.bank import BankSettings, WeightBank, open_bank
from amq.blocks import BlockRunner
from amq.configuration import Configuration, other_items
from amq.data import WindowSampler, fixed_windows, load_corpus
from amq.formats import get_format, parse_formats
from amq.linears import Inventory, check_weights, inventory
from amq.models import LoadedModel, load_model, model_fingerprint
from amq.progress import Progress
from amq.swap import LinearSwap

TOKENS = 128
"""Tokens whose logits exist at once."""


@dataclass(frozen=True)
class Row:
    """One line of the table. weight_bytes: all weights, linears as stored, everything else in 16 bits."""

    name: str
    bits_per_weight: float
    perplexity: float
    negative_log_likelihood: float
    weight_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """rows in the order full, uniform formats, configurations; settings: text, window, tokens and bank."""

    rows: list[Row]
    settings: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """JSON has no infinity: a figure that is not finite is null."""

        def finite(value: str | float) -> str | float | None:
            return value if isinstance(value, str) or math.isfinite(value) else None

        rows = [{name: finite(value) for name, value in asdict(row).items()} for row in self.rows]
        return {"schema": "amq/eval/1", "settings": self.settings, "rows": rows}


def evaluate(
    model: str,
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
    backend: str = "reference",
    activations: str = "fp32",
    full: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexities on one text.

    configurations: files written by the search; each is assembled from the very bank it was searched on (its
    provenance).
    uniform: comma-separated formats, from the bank that `proxy`, `group_size`, `calibration`, `bank_windows`, `seed`
    name;
        where configurations are given, from the first one's bank.
    backend, activations: what multiplies the quantized linears; see `amq.swap`.
    text: a file, or a name that `amq.data.load_text` knows; the first `max_tokens` tokens are used.
    Raises AmqError for unusable input before anything is computed.
    """
    progress = progress or Progress()
    loaded_configurations = [(Path(p).stem, Configuration.load(Path(p))) for p in configurations]
    formats = parse_formats(uniform) if uniform else ()
    loaded = load_model(model, dtype, device)
    parts = inventory(loaded.model)
    check_weights(loaded.model, parts.linears)
    for _, configuration in loaded_configurations:
        configuration.check(parts.linears)
    windows = fixed_windows(load_corpus(text, loaded.tokenizer), window_length, max_tokens)
    BlockRunner(loaded.model).check(windows[:1, :32].to(loaded.model.get_input_embeddings().weight.device))
    recipe = _Recipe(proxy, group_size, calibration, bank_windows, window_length, seed)
    swap = LinearSwap(loaded.model, (s.name for s in parts.linears), backend, activations)
    banks = _Banks(loaded, parts, swap, progress)
    if loaded_configurations:
        recipe = _Recipe.of(loaded_configurations[0][1], recipe)
    jobs = [(f.name, Configuration.uniform(parts.linears, f, recipe.group_size), recipe) for f in formats]
    jobs += [(name, c, _Recipe.of(c, recipe)) for name, c in loaded_configurations]
    for _, configuration, job_recipe in jobs:
        banks.open(job_recipe, set(configuration.formats.values()))
    rows = _measure(loaded, parts, banks, jobs, windows, full, progress)
    settings = {"model": model, "text": text, "tokens": windows.numel(), "window_length": window_length,
                "stride": window_length, "backend": backend, "activations": activations,
                "bank": asdict(recipe)}  # fmt: skip
    return Evaluation(rows, settings)


def _measure(
    loaded: LoadedModel,
    parts: Inventory,
    banks: _Banks,
    jobs: Sequence[tuple[str, Configuration, _Recipe]],
    windows: Tensor,
    full: bool,
    progress: Progress,
) -> list[Row]:
    rows = []
    with progress.stage("perplexity", len(jobs) + full) as step:
        if full:
            rows.append(_row("full", loaded, windows, 16.0, 2 * parts.numel))
            step(f"full: {rows[-1].perplexity:.3f}")
        for name, configuration, job_recipe in jobs:
            banks.apply(configuration, job_recipe)
            size = configuration.bytes(parts.linears) + sum(i.bytes for i in other_items(parts))
            rows.append(_row(name, loaded, windows, configuration.bits_per_weight(parts.linears), size))
            step(f"{name}: {rows[-1].perplexity:.3f}")
    return rows


def perplexity(model: torch.nn.Module, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood per predicted token; windows: int64 [n, length]."""
    return _exp(negative_log_likelihood(model, windows))


def _exp(loss: float) -> float:
    # a broken model's mean log-likelihood can exceed what exp can hold; infinity is then the honest perplexity
    return math.inf if loss > 700 else math.exp(loss)


def negative_log_likelihood(model: torch.nn.Module, windows: Tensor) -> float:
    """Mean over the last length − 1 tokens of every window, nats; logits of `TOKENS` tokens at a time."""
    runner = BlockRunner(model)
    device = model.get_input_embeddings().weight.device
    total = 0.0
    with torch.no_grad():
        for window in windows.to(device).split(1):
            hidden = runner.hidden(window, runner.n_blocks)[0, :-1]
            for states, labels in zip(hidden.split(TOKENS), window[0, 1:].split(TOKENS), strict=True):
                logits = runner.logits(states).float()
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total / (len(windows) * (windows.shape[1] - 1))


def _row(name: str, loaded: LoadedModel, windows: Tensor, bits: float, size: int) -> Row:
    loss = negative_log_likelihood(loaded.model, windows)
    return Row(name, round(bits, 4), _exp(loss), loss, size)


@dataclass(frozen=True)
class _Recipe:
    """What names a bank of one model."""

    proxy: str
    group_size: int
    calibration: str
    bank_windows: int
    window_length: int
    seed: int

    @staticmethod
    def of(configuration: Configuration, fallback: _Recipe) -> _Recipe:
        """The bank a configuration was searched on; a hand-written one without provenance takes the flags'."""
        provenance = configuration.details.get("provenance") or {}
        names = ("proxy", "calibration", "bank_windows", "window_length", "seed")
        given = {n: provenance.get(n, getattr(fallback, n)) for n in names}
        return _Recipe(group_size=configuration.group_size, **given)


class _Banks:
    """Opens the banks that a table needs and puts configurations into the model."""

    def __init__(self, loaded: LoadedModel, parts: Inventory, swap: LinearSwap, progress: Progress) -> None:
        self._loaded, self._parts, self._progress = loaded, parts, progress
        self._fingerprint = model_fingerprint(loaded.model)
        self._open: dict[_Recipe, WeightBank] = {}
        self._names: dict[_Recipe, set[str]] = {}
        self._swap = swap

    def open(self, recipe: _Recipe, formats: set[str]) -> None:
        """Builds or opens the bank while the model still holds its full-precision weights."""
        names = self._names.setdefault(recipe, set())
        if formats <= names:
            return
        names |= formats
        corpus = load_corpus(recipe.calibration, self._loaded.tokenizer)
        windows = WindowSampler(corpus, recipe.window_length, recipe.seed).take(recipe.bank_windows)
        self._open[recipe] = open_bank(
            self._loaded.model, self._parts, sorted((get_format(n) for n in names), key=lambda f: f.code_bits),
            BankSettings(recipe.proxy, recipe.group_size, windows), self._progress, fingerprint=self._fingerprint,
        )  # fmt: skip

    def apply(self, configuration: Configuration, recipe: _Recipe) -> None:
        self._swap.apply(configuration.formats, self._open[recipe])


__all__ = ["Evaluation", "Row", "evaluate", "negative_log_likelihood", "perplexity"]
