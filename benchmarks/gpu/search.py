"""What the search computes, on the GPU against the CPU: losses, sensitivities, Fisher scores and a bank.

    python benchmarks/gpu/search.py DIR [--smoke]             writes the section "search" of DIR/suite.json

A random Llama of two layers, its weights and token windows the same on both. A smoke run takes the CPU for both, in
double precision where the GPU would be. Rows, each with `allowed`, which is derived, and `wrong`:

- `loss`: mean divergence of a configuration from the full-precision model, of one bank, by plain torch and by the
  kernels (those in 16 bits). √JSD is a metric and ⅛ Σ p·δ² bounds JSD for small differences δ of logits, so that the
  roots differ by at most the distance that rounding moves the candidate's and the reference's logits.
- `sensitivity`: likewise, of one linear in another format, which reruns only the blocks behind it.
- `bank`: relative errors of the weights that GPTQ makes of statistics gathered on either. A code at a tie rounds either
  way and later codes follow, so only the sum over a linear's codes can agree: as well as a sum of so many does.
- `fisher`: the mean over passes of every score. Labels are drawn on the device, so two devices see other samples of one
  distribution: five standard errors of the difference are allowed.

Needs `amq._cpu`, for the CPU's side.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import Clock, Device, Failure, Results, arguments, attempt, load_cpu_module, now, say
from engine import agrees
from torch import Tensor, nn

from amq.formats import get_format
from amq.model.inventory import Inventory, take_inventory
from amq.model.open import LoadedModel
from amq.proxy.evaluator import Evaluator
from amq.proxy.fisher import fisher_passes
from amq.quantize.bank import BankSettings, WeightBank, open_bank

LAYERS, GROUP_SIZE = 2, 64
FORMATS = ("int2", "int3", "int4")
SMALL = {
    **{"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4},
    "vocab_size": 2048,
}
TINY = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "vocab_size": 192,
}
FLOAT32_LOSS = 2.0**-20
"""Relative error of a divergence in single precision: a sum of thousands of terms, each of a few operations."""


def random_llama(sizes: Mapping[str, int], dtype: torch.dtype, where: torch.device) -> nn.Module:
    """The same weights whatever the device and dtype: drawn on the CPU, of variance 1 / in_features; logits about 2."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, max_position_embeddings=512, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.0 if "embed" in name else (2.0 if "lm_head" in name else 1.0) / math.sqrt(parameter.shape[-1])
        parameter.data = noise * scale if parameter.ndim > 1 else 1 + 0.1 * noise
    return model.to(where, dtype).eval().requires_grad_(False)


def windows_of(sizes: Mapping[str, int], count: int, length: int, seed: int) -> Tensor:
    return torch.randint(sizes["vocab_size"], (count, length), generator=torch.Generator().manual_seed(seed))


class Side:
    """One of the two: a model, where it lies, and its losses."""

    def __init__(self, stage: Stage, dtype: torch.dtype, where: torch.device, backend: str = "reference") -> None:
        self.stage, self.dtype = stage, dtype
        self.model = random_llama(stage.sizes, dtype, where)
        everything = take_inventory(self.model)
        self.inventory: Inventory = everything.only({s.name for s in everything.linears})  # the head stays as it is
        self._backend = backend

    def evaluator(self, bank: WeightBank) -> Evaluator:
        loaded = LoadedModel(self.model, None, "random")
        return Evaluator(loaded, self.inventory, bank, {"search": self.stage.windows}, backend=self._backend)

    def bank(self, proxy: str) -> WeightBank:
        """Built afresh from what this side's model says of the windows."""
        settings = BankSettings(proxy, GROUP_SIZE, self.stage.windows)
        folder = Path(tempfile.mkdtemp(dir=self.stage.folder))
        formats = [get_format(name) for name in FORMATS]
        return open_bank(self.model, self.inventory, formats, settings, cache=folder, fingerprint="random")

    def fisher(self, bank: WeightBank, passes: int) -> Tensor:
        """[passes, scores], in the order of linears and formats."""
        windows = windows_of(self.stage.sizes, passes, self.stage.windows.shape[1], 2)
        tables = fisher_passes(self.model, self.inventory, bank, windows, FORMATS, seed=0)
        return torch.tensor([[table[s.name][f] for s in self.inventory.linears for f in FORMATS] for table in tables])


def moved(dtype: torch.dtype, logits_rms: float) -> float:
    """How far, in √JSD, rounding may move a distribution: ⅛ Σ p·δ² with δ the logits' error."""
    return agrees(LAYERS, dtype) * logits_rms / math.sqrt(8)


def allowed_loss(loss: float, distance: float) -> float:
    """From a distance of roots to one of losses: (√L + d)² − L, and the loss's own arithmetic."""
    return 2 * math.sqrt(loss) * distance + distance**2 + FLOAT32_LOSS * loss


class Stage:
    """The two sides, and the rows so far; written after each."""

    def __init__(self, device: Device, clock: Clock, results: Results, folder: Path) -> None:
        self.device, self.clock, self.results, self.folder = device, clock, results, folder
        self.sizes = TINY if device.smoke else SMALL
        self.windows = windows_of(self.sizes, *((2, 40) if device.smoke else (4, 256)), 1)
        self.content: dict[str, Any] = {"rows": [], "failed": {}, "left_out": {}}

    def run(self) -> None:
        device = self.device.torch
        self.cpu = Side(self, torch.float32, torch.device("cpu"))
        self.other = Side(self, torch.float64 if self.device.smoke else torch.float32, device)
        self.shared = self.cpu.bank("rtn")
        names = [s.name for s in self.cpu.inventory.linears]
        self.mixed = {name: FORMATS[at % len(FORMATS)] for at, name in enumerate(names)}
        self.configurations = {f: dict.fromkeys(names, f) for f in FORMATS} | {"mixed": self.mixed}
        with torch.no_grad():
            self.rms = float(self.cpu.model(self.windows[:1]).logits.square().mean().sqrt())
        self.add("losses", self.losses, self.other, "torch")
        self.add("fisher", self.fisher)
        self.add("bank", self.bank)
        kernels = ("cpu",) if self.device.smoke else ("cuda", "triton")
        for backend in kernels:
            dtype = torch.float32 if self.device.smoke else torch.float16
            self.add(f"losses {backend}", lambda b=backend, d=dtype: self.losses(Side(self, d, device, b), b))

    def losses(self, side: Side, how: str) -> list[dict]:
        """Rows: each configuration, and some sensitivities, by `side` and by the CPU."""
        found, truth = side.evaluator(self.shared), self.cpu.evaluator(self.shared)
        try:
            return self.compare(found, truth, side.dtype, how)
        finally:  # the models are those of other rows too
            found.restore()
            truth.restore()

    def compare(self, found: Evaluator, truth: Evaluator, dtype: torch.dtype, how: str) -> list[dict]:
        distance = 2 * (moved(dtype, self.rms) + moved(torch.float32, self.rms))
        names = list(self.mixed)
        changes = [(names[at], FORMATS[(at + 1) % len(FORMATS)]) for at in (0, len(names) // 2, len(names) - 1)]
        figures = [
            ("loss", name, found.evaluate(formats), truth.evaluate(formats))
            for name, formats in self.configurations.items()
        ] + [
            ("sensitivity", f"{name} {fmt}", mine, theirs)
            for (name, fmt, mine), (_, _, theirs) in zip(
                found.sensitivities(self.mixed, changes), truth.sensitivities(self.mixed, changes), strict=True
            )
        ]
        rows = []
        for kind, name, mine, theirs in figures:
            allowed = allowed_loss(theirs, distance)
            wrong = not abs(mine - theirs) <= allowed
            rows.append({"row": kind, "what": name, "by": how, "dtype": str(dtype), "device": mine, "cpu": theirs,
                         "allowed": allowed, "wrong": wrong})  # fmt: skip
        return rows

    def fisher(self) -> list[dict]:
        passes = 4 if self.device.smoke else 16
        mine, theirs = (side.fisher(self.shared, passes).double() for side in (self.other, self.cpu))
        error = ((mine.var(0) + theirs.var(0)) / passes).sqrt()
        deviation = float(((mine.mean(0) - theirs.mean(0)).abs() / error.clamp_min(1e-30)).max())
        return [{"row": "fisher", "what": f"{mine.shape[1]} scores, {passes} passes", "by": "torch",
                 "dtype": str(self.other.dtype), "device": float(mine.mean()), "cpu": float(theirs.mean()),
                 "standard_errors": deviation, "allowed": 5.0, "wrong": not deviation <= 5.0}]  # fmt: skip

    def bank(self) -> list[dict]:
        mine, theirs = (side.bank("gptq").weight_errors() for side in (self.other, self.cpu))
        fewest = min(s.numel for s in self.cpu.inventory.linears)
        allowed, rows = 4 / math.sqrt(fewest), []
        for fmt in FORMATS:
            name = max(theirs, key=lambda n, f=fmt: abs(mine[n][f] / theirs[n][f] - 1))
            difference = abs(mine[name][fmt] / theirs[name][fmt] - 1)
            rows.append({"row": "bank", "what": f"gptq {fmt}, {name}", "by": "torch", "dtype": str(self.other.dtype),
                         "device": mine[name][fmt], "cpu": theirs[name][fmt], "difference": difference,
                         "allowed": allowed, "wrong": not difference <= allowed})  # fmt: skip
        return rows

    def add(self, name: str, function: Callable[..., list[dict]], *values: object) -> None:
        """The rows of one comparison, or why there are none."""
        if self.clock.left() < 0:
            self.content["left_out"][name] = "no time left"
            self.save()
            return
        rows = attempt(self.device, function, *values)
        if isinstance(rows, Failure):
            self.content["failed"][name] = rows.reason
            say(f"search: FAILED {name}: {rows.reason}")
        else:
            self.content["rows"] += [{**row, "at": now()} for row in rows]
            worst = [f"{row['row']} {row['what']}" for row in rows if row["wrong"]]
            say(f"search: {name}: {len(rows)} rows, wrong: {', '.join(worst) or 'none'}")
        self.save()
        if isinstance(rows, Failure) and rows.broken:
            raise SystemExit(1)

    def save(self) -> None:
        self.results.write({**self.content, "seconds": self.clock.spent()})


def missing() -> str:
    """What a machine without a package index may lack, and how it gets there; empty where nothing is missing."""
    if find_spec("msgspec") is None:
        return "the package msgspec is missing: benchmarks/gpu/README.md says how to carry it in"
    return ""


def main() -> int:
    options = arguments(__doc__, 25).parse_args()
    clock, device = Clock(options.seconds, options.began), Device(options.smoke)
    with tempfile.TemporaryDirectory(prefix="amq-search-") as folder:
        stage = Stage(device, clock, Results(options.folder, "search", options.smoke), Path(folder))
        reason = load_cpu_module() or missing()
        if reason:
            stage.content["failed"]["what it needs"] = reason
            say(f"search: {reason}")
        else:
            failure = attempt(device, stage.run)
            if isinstance(failure, Failure):
                stage.content["failed"]["search"] = failure.reason
                say(f"search: FAILED: {failure.traceback}")
        stage.save()
    content = stage.content
    return 1 if content["failed"] or not content["rows"] or any(row["wrong"] for row in content["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
