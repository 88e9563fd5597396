"""`python benchmarks/order.py MODEL`: does the proxy rank configurations as the deployed quantizer does?

AMQ's claim (order equivalence) is what makes a search on a cheap proxy worth anything. Random configurations spread
over the budget are quantized by each method, and the orders of their losses (divergence per token from the full-
precision model) are compared by Spearman's and Kendall's coefficients. Configurations of very different size rank
themselves, so the coefficient among those of about equal size is reported too: that is where a search has to choose.

All methods work with full-precision inputs here (as AWQ does), not with those of the blocks quantized before: what a
group of linears becomes depends on its own formats only, and is computed once per combination that occurs. The model
is walked once, block by block, with the hidden states of every method and configuration beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from provenance import write_results
from torch import Tensor

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import BitFormat, check_group_size, get_format, parse_formats
from amq.model.blocks import TOKENS, BlockRunner
from amq.model.calibration import CalibrationStream, InputGroup
from amq.model.inventory import LinearSpec, get_linear
from amq.model.opened import open_model
from amq.packing import dequantize
from amq.proxy.meter import token_losses
from amq.quantize.fold import find_fold
from amq.quantize.methods import METHODS, Method
from amq.quantize.quantizers import QUANTIZERS
from amq.quantize.quantizers.awq import candidate_scales, scale_errors
from amq.util.files import check_place
from amq.util.progress import Progress, terminal_progress
from amq.util.settings import add_flags, flag, run_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BANDS = 5
"""Bands of size within which configurations are compared; ten or so in each."""
Formats = dict[str, str]


@dataclass(frozen=True)
class OrderSettings:
    """Every field is a flag of the same name; `model` is the positional argument."""

    model: str
    output: str = flag("runs/order", "folder for order.json and order.png", metavar="DIR")
    samples: int = flag(50, "configurations", metavar="N")
    formats: str = flag("int2,int3,int4", "formats that they mix", metavar="LIST")
    group_size: int = flag(128, "input features per scale", metavar="G")
    proxy: str = flag("hqq", "methods that a search would rank them with", metavar="LIST")
    deployed: str = flag("awq,gptq", "methods that they would be deployed with", metavar="LIST")
    calibration: str = flag("pydoc", "text of calibration and loss, on different windows", metavar="TEXT")
    calibration_windows: int = flag(24, "windows that the methods see", metavar="N")
    windows: int = flag(2, "windows that the loss is measured on", metavar="N")
    window_length: int = flag(512, "tokens per window, BOS included where the tokenizer puts one", metavar="N")
    seed: int = flag(0, "of configurations and windows", metavar="N")
    dtype: str = flag("auto", "auto, float32, bfloat16 or float16", metavar="DTYPE")
    trust_remote_code: bool = flag(False, "run the Python code that the model's folder brings along")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Rank correlation between a proxy's losses and deployed ones.", argument_default=argparse.SUPPRESS
    )
    parser.add_argument("model", help="hub id, folder, .gguf file, or the alias smollm2")
    add_flags(parser, OrderSettings)
    settings = OrderSettings(**vars(parser.parse_args(argv)))
    result = order_equivalence(settings, terminal_progress())
    print(table(result))
    print(f"wrote {settings.output}/order.json, order.png")
    return 0


def order_equivalence(settings: OrderSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Measures, writes order.json and order.png into `settings.output`, and returns the content of the first."""
    progress = progress or Progress()
    start = time.monotonic()
    methods = {name: METHODS[name] for name in (*_names(settings.proxy), *_names(settings.deployed))}
    check_group_size(settings.group_size)
    if settings.samples < 2 * BANDS:
        raise AmqError(f"--samples {settings.samples} is too small: expected at least {2 * BANDS}")
    check_place(Path(settings.output), "--output")
    opened = open_model(settings.model, settings.dtype, trust_remote_code=settings.trust_remote_code)
    model, inventory = opened.model, opened.inventory
    count = settings.calibration_windows + settings.windows
    sampler = opened.sampler(settings.calibration, settings.window_length, settings.seed, count, progress)
    corpus = sampler.corpus
    calibration, windows = sampler.take(settings.calibration_windows), sampler.take(settings.windows)
    configurations = spread_configurations(
        inventory.linears, parse_formats(settings.formats), settings.group_size, settings.samples, settings.seed
    )
    walk = Walk(model, settings.group_size, methods, configurations, windows, corpus.unscored)
    stream = CalibrationStream(model, calibration)
    with progress.stage("order", inventory.n_blocks) as step:
        for block in range(inventory.n_blocks):
            path = f"{inventory.blocks_path}.{block}"
            groups = stream.measure(inventory.in_block(block))
            head_dim = opened.shape.head_dim(block)
            folds = [find_fold(model, path, g.linears, head_dim, stream.sample) for g in groups]
            stream.advance()  # before the weights change
            walk.block(block, groups, [None if fold is None else fold.index for fold in folds])
            step()
    losses = walk.losses(progress)
    bits = [Configuration(c, settings.group_size).bits_per_weight(inventory.linears) for c in configurations]
    pairs = [(p, d) for p in _names(settings.proxy) for d in _names(settings.deployed)]
    result = {
        "schema": "amq/order/1",
        "settings": asdict(settings),
        "window_prefix": list(corpus.prefix_names),
        "bits_per_weight": [round(b, 4) for b in bits],
        "losses": losses,
        "correlations": [{"proxy": p, "deployed": d, **correlations(losses[p], losses[d], bits)} for p, d in pairs],
        "seconds": round(time.monotonic() - start, 1),
    }
    output = Path(settings.output)
    write_results(output / "order.json", result)
    _plot(result, output / "order.png")
    return result


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def spread_configurations(
    linears: Sequence[LinearSpec], formats: Sequence[BitFormat], group_size: int, samples: int, seed: int
) -> list[Formats]:
    """Random configurations whose mean position between the cheapest and the dearest format is spread evenly.

    Each linear draws its format by itself: near an end of the range from the formats of that end, with probabilities
    that a normal density of one format's width around the wanted position gives.
    """
    generator = np.random.default_rng(seed)
    positions = np.arange(len(formats))
    result = []
    for index in range(samples):
        wanted = (index + 0.5) / samples * (len(formats) - 1)
        weights = np.exp(-((positions - wanted) ** 2))
        drawn = generator.choice(len(formats), size=len(linears), p=weights / weights.sum())
        result.append({spec.name: formats[i].name for spec, i in zip(linears, drawn, strict=True)})
    return result


def correlations(proxy: Sequence[float], deployed: Sequence[float], bits: Sequence[float]) -> dict[str, float]:
    """Spearman and Kendall over all, and the mean of Spearman's coefficient within bands of neighbours in size."""
    from scipy.stats import kendalltau, spearmanr

    bands = np.array_split(np.argsort(bits, kind="stable"), BANDS)
    p, d = np.array(proxy), np.array(deployed)
    within = [float(spearmanr(p[band], d[band]).statistic) for band in bands]
    return {
        "spearman": float(spearmanr(p, d).statistic),
        "kendall": float(kendalltau(p, d).statistic),
        "spearman_within_bands": float(np.mean(within)),
    }


class Walk:
    """Hidden states of every method and configuration at one block boundary, and what moves them on.

    unscored: leading positions of every window that have no loss, `Corpus.unscored`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        group_size: int,
        methods: dict[str, Method],
        configurations: list[Formats],
        windows: Tensor,
        unscored: int = 0,
    ) -> None:
        self._model, self._runner, self._group_size = model, BlockRunner(model), group_size
        self._methods, self._configurations, self._windows = methods, configurations, windows
        self._unscored = unscored
        self._hidden: dict[str, list[Tensor | None]] = {name: [None] * len(configurations) for name in methods}
        self._reference: Tensor | None = None

    @torch.no_grad()
    def block(self, block: int, groups: Sequence[InputGroup], ties: Sequence[Tensor | None]) -> None:
        """ties: per group, which producer's channel each input feature is, or None where no scale can be folded."""
        linears = {s.name: get_linear(self._model, s.name) for group in groups for s in group.linears}
        full = {name: module.weight.data for name, module in linears.items()}
        self._reference = self._runner.hidden(self._windows, block + 1, block, self._reference)
        for name, method in self._methods.items():
            quantized = [
                QuantizedGroup(group, [full[s.name].float() for s in group.linears], self._group_size, method, tie)
                for group, tie in zip(groups, ties, strict=True)
            ]
            states = self._hidden[name]
            for index, formats in enumerate(self._configurations):
                for group in quantized:
                    for linear, weight in group.weights(formats).items():
                        linears[linear].weight.data = weight.to(full[linear].dtype)
                states[index] = self._runner.hidden(self._windows, block + 1, block, states[index])
            for linear, module in linears.items():
                module.weight.data = full[linear]

    @torch.no_grad()
    def losses(self, progress: Progress) -> dict[str, list[float]]:
        """Per method, each configuration's mean Jensen–Shannon divergence per token, nats."""
        reference = self._scored(self._reference)
        divergence = token_losses("jsd", reference[0].device)
        totals = {name: np.zeros(len(self._configurations)) for name in self._methods}
        with progress.stage("losses", len(reference)) as step:
            for chunk, hidden in enumerate(reference):
                expected = self._logits(hidden).log_softmax(-1)
                for name, states in self._hidden.items():
                    for index, state in enumerate(states):
                        found = self._logits(self._scored(state)[chunk])
                        totals[name][index] += float(divergence(expected, found).sum(dtype=torch.float64))
                step()
        count = sum(map(len, reference))
        return {name: [float(t) / count for t in total] for name, total in totals.items()}

    def _scored(self, state: Tensor | None) -> tuple[Tensor, ...]:
        """Of hidden states [windows, length, hidden_size] those that have a loss, in chunks [tokens, hidden_size]."""
        assert state is not None  # losses are asked for after the last block
        return state[:, self._unscored :].flatten(0, 1).split(TOKENS)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._runner.logits(hidden).float().contiguous()


class QuantizedGroup:
    """What linears that share an input multiply with after `method`, for any formats; each piece is computed once.

    weights: float32 [out_features_i, in_features] each. tie: as in `amq.quantize.quantizers.awq.candidate_scales`, or
        None where no scale can be folded.
    """

    def __init__(
        self, group: InputGroup, weights: Sequence[Tensor], group_size: int, method: Method, tie: Tensor | None
    ) -> None:
        self._full = {spec.name: weight for spec, weight in zip(group.linears, weights, strict=True)}
        self._gram, self._group_size, self._rounding = group.gram, group_size, QUANTIZERS[method.rounding]
        self._scales = torch.ones(1, len(group.gram))
        if method.scales and tie is not None:
            self._scales = candidate_scales(group.gram, tie)
        self._errors: dict[tuple[str, str], Tensor] = {}
        self._weights: dict[tuple[str, str, int], Tensor] = {}

    def weights(self, formats: Formats) -> dict[str, Tensor]:
        """{linear: float32 weight}, scales undone, with the scales that are best for these formats together."""
        best = 0
        if len(self._scales) > 1:
            best = int(torch.stack([self._error(name, formats[name]) for name in self._full]).sum(0).argmin())
        return {name: self._weight(name, formats[name], best) for name in self._full}

    def _error(self, name: str, fmt: str) -> Tensor:
        if (name, fmt) not in self._errors:
            self._errors[name, fmt] = scale_errors(
                self._full[name], get_format(fmt), self._group_size, self._gram, self._scales
            )
        return self._errors[name, fmt]

    def _weight(self, name: str, fmt: str, best: int) -> Tensor:
        key = (name, fmt, best)
        if key not in self._weights:
            scale = self._scales[best]
            gram = self._gram / scale.unsqueeze(1) / scale
            packed = self._rounding([self._full[name] * scale], [get_format(fmt)], self._group_size, gram)[0][fmt]
            self._weights[key] = dequantize(packed) / scale
        return self._weights[key]


def table(result: dict[str, Any]) -> str:
    lines = [f"{'proxy':10}{'deployed':12}{'Spearman':>10}{'Kendall':>10}{'Spearman, equal size':>22}"]
    for row in result["correlations"]:
        lines.append(
            f"{row['proxy']:10}{row['deployed']:12}{row['spearman']:10.3f}{row['kendall']:10.3f}"
            f"{row['spearman_within_bands']:22.3f}"
        )
    return "\n".join(lines)


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = result["correlations"]
    figure, axes = pyplot.subplots(1, len(rows), figsize=(4.6 * len(rows), 4.2), squeeze=False, layout="constrained")
    for axis, row in zip(axes[0], rows, strict=True):
        x, y = result["losses"][row["proxy"]], result["losses"][row["deployed"]]
        points = axis.scatter(x, y, c=result["bits_per_weight"], cmap="viridis", s=26)
        axis.set(xscale="log", yscale="log", xlabel=f"{row['proxy']} proxy, nats per token")
        axis.set(ylabel=f"{row['deployed']} deployed, nats per token")
        axis.set_title(f"Spearman {row['spearman']:.3f}, at equal size {row['spearman_within_bands']:.2f}", fontsize=10)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3)
    figure.colorbar(points, ax=axes[0], label="bits per weight")
    figure.suptitle("Does the proxy rank configurations as the deployed quantizer does?", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
