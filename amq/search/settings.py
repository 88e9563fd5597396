"""SearchSettings: every choice of a search, as flags, JSON and Python arguments."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat, check_group_size, parse_formats
from amq.kernels.backends import ACTIVATIONS, BACKENDS, check_activations
from amq.model.losses import LOSSES
from amq.quantize.quantizers import QUANTIZERS
from amq.search.surrogates import SURROGATES
from amq.util.settings import TRUST_REMOTE_CODE, flag, parse_size, parse_time

COSTS = ("fisher", "sensitivity", "weight")
SOLVER_NAMES = ("additive", "paper", "random")

PAPER = {
    "solver": "paper", "proxy": "hqq", "surrogate": "rbf", "initial": 250, "population": 200, "generations": 20,
    "crossover": 0.9, "mutation": 0.1, "per_iteration": 50, "iterations": 200, "prune": 2.0,
    "formats": "int2,int3,int4",
    "group_size": 128, "loss": "jsd",
}  # fmt: skip
"""`--preset paper`: the setting of AMQ (arXiv 2509.12019), §4.1 and appendix."""


LEAST = {
    "window_length": 2, "windows": 1, "confirm_windows": 1, "bank_windows": 1, "cost_passes": 1, "points": 0,
    "refine": 0, "initial": 2, "iterations": 0, "per_iteration": 1, "population": 4, "generations": 1, "context": 0,
    "seed": 0,
}  # fmt: skip
"""The smallest value of each counting flag."""


@dataclass(frozen=True)
class SearchSettings:
    model: str
    output: str
    # what to reach
    target_bits: float | None = flag(
        None, "budget: average bits per weight of the linears, scales and zero points counted", metavar="B"
    )
    memory: str | int | None = flag(None, "budget: everything that must be resident, such as 6GiB", metavar="SIZE")
    context: int = flag(0, "tokens of KV cache that --memory must hold besides the weights", metavar="N")
    max_loss: float | None = flag(
        None, "budget: the smallest model whose loss stays below this (nats per token)", metavar="L"
    )
    # what to choose from
    formats: str = flag("int2,int3,int4", f"candidate formats, of {', '.join(FORMATS)}", metavar="LIST")
    group_size: int = flag(128, "input features per scale: 32, 64 or 128", metavar="G")
    pin: list[str] = flag(
        [], "REGEX=FORMAT: linears that keep a format, or their 16 bits (16bit); may be repeated", metavar="PIN"
    )
    tie: str = flag("", "groups whose members share a format per block, such as qkv,gate_up", metavar="GROUPS")
    # how to measure
    proxy: str = flag("gptq", "quantizer of the bank", choices=tuple(QUANTIZERS))
    calibration: str = flag(
        "pydoc", "text: a file, wikitext2, c4, or pydoc or docstrings (built in, no network)", metavar="TEXT"
    )
    window_length: int = flag(512, "tokens per window, BOS included where the tokenizer puts one", metavar="N")
    windows: int = flag(4, "windows that the search's loss is measured on", metavar="N")
    confirm_windows: int = flag(4, "windows held out of the search, for error bars and --refine", metavar="N")
    bank_windows: int = flag(24, "windows that calibrate the gptq bank", metavar="N")
    loss: str = flag("jsd", "divergence from the full-precision model", choices=tuple(LOSSES))
    # how to search
    solver: str = flag("additive", "search strategy", choices=SOLVER_NAMES)
    cost: str = flag("fisher", "cost table of the additive solver", choices=COSTS)
    cost_passes: int = flag(16, "backward passes (one window each) of --cost fisher", metavar="N")
    points: int = flag(12, "points of the front that are truly evaluated", metavar="N")
    exact: bool = flag(False, "solve every budget by integer programming instead of the Lagrangian with fill")
    refine: int = flag(0, "further true evaluations spent on local moves around the budget", metavar="N")
    prune: float = flag(
        2.0, "paper and random: pin linears whose sensitivity exceeds this multiple of the median", metavar="X"
    )
    surrogate: str = flag("rbf", "paper: surrogate model", choices=SURROGATES)
    initial: int = flag(250, "paper and random: initial configurations", metavar="N")
    iterations: int = flag(200, "paper: iterations of fit, evolve, evaluate", metavar="N")
    per_iteration: int = flag(50, "paper: configurations evaluated per iteration", metavar="N")
    population: int = flag(200, "paper: NSGA-II population", metavar="N")
    generations: int = flag(20, "paper: NSGA-II generations", metavar="N")
    crossover: float = flag(0.9, "paper: crossover probability", metavar="P")
    mutation: float = flag(0.1, "paper: mutation probability per variable", metavar="P")
    seed: int = flag(0, "seed of everything random", metavar="N")
    # how to run
    dtype: str = flag("auto", "auto, float32, bfloat16 or float16", metavar="DTYPE")
    device: str = flag("cpu", "torch device", metavar="DEVICE")
    trust_remote_code: bool = flag(False, TRUST_REMOTE_CODE)
    backend: str = flag("reference", "what multiplies the candidates' linears", choices=tuple(BACKENDS))
    activations: str = flag("fp32", "int8 rounds activations as deployed; needs --backend cpu", choices=ACTIVATIONS)
    cache_memory: str | int = flag("256MiB", "memory for cached reference distributions", metavar="SIZE")
    time: str | float | None = flag(None, "stop evaluating after this long, such as 10min", metavar="T")

    def __post_init__(self) -> None:
        self.bit_formats  # noqa: B018 - raises on unknown names
        check_group_size(self.group_size)
        given = [n for n in ("target_bits", "memory", "max_loss") if getattr(self, n) is not None]
        if len(given) > 1:
            raise AmqError(
                f"give one budget, not both --{given[0].replace('_', '-')} and --{given[1].replace('_', '-')}"
            )
        if self.context and self.memory is None:
            raise AmqError("--context sizes the KV cache within --memory: give --memory too")
        check_activations(self.backend, self.activations)
        if len(self.bit_formats) < 2:
            raise AmqError(f"--formats {self.formats}: a search needs at least two formats to choose from")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise AmqError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        for size in (self.memory, self.cache_memory):
            if size is not None:
                parse_size(size)
        if self.time is not None:
            parse_time(self.time)

    @property
    def bit_formats(self) -> tuple[BitFormat, ...]:
        return parse_formats(self.formats)

    @property
    def ties(self) -> list[str]:
        return [t for t in self.tie.split(",") if t]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def make(preset: str | None = None, **given: Any) -> SearchSettings:
        """Settings from keyword arguments over a preset over the defaults; an unknown name is an error."""
        known = {f.name for f in dataclasses.fields(SearchSettings)}
        for name in given:
            if name not in known:
                raise AmqError(f"unknown search setting {name!r}: expected one of {', '.join(sorted(known))}")
        if preset not in (None, "paper"):
            raise AmqError(f"unknown preset {preset!r}: expected paper")
        return SearchSettings(**{**(PAPER if preset else {}), **given})


FREE_ON_RESUME = frozenset({"output", "time", "cache_memory", "refine", "iterations", "trust_remote_code"})
"""What may change between an interrupted run and its resumption: it alters no evaluation, only how many there are."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that forbid resuming, as `--name was X, is Y`."""
    names = [n for n in new if n not in FREE_ON_RESUME and old.get(n) != new[n]]
    return [f"--{n.replace('_', '-')} was {old.get(n)}, is {new[n]}" for n in names]
