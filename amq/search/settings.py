"""SearchSettings: every choice of a search, as flags, JSON and Python arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from amq.errors import AmqError
from amq.formats import FORMATS, KEPT, NO_ROTATION, BitFormat, check_group_size, parse_formats
from amq.kernels.names import ACTIVATIONS, BACKENDS
from amq.model.losses import ANSWERS, OBJECTIVES
from amq.model.settings import AUTO, CALIBRATION_TEXTS, MODEL, LoadSettings
from amq.model.shape import CACHES, DEFAULT_CACHE
from amq.quantize.methods import ROTATION_HELP, ROTATIONS
from amq.quantize.quantizers import QUANTIZERS
from amq.search.solvers import SOLVERS
from amq.search.surrogates import SURROGATES
from amq.util.settings import CHOOSE, MEASURE, REACH, REQUIRED, RUN, Settings, declared, flag, parse_size, parse_time

SEARCH = "how to search"
COSTS = ("fisher", "sensitivity", "weight")
"""Kinds of cost table; `amq.search.run` makes them."""
NATIVE = "native"
QUALITY, SPEED = "quality", "speed"
EXPERTS = "experts"

PAPER: dict[str, Any] = {
    "solver": "paper", "proxy": "hqq", "surrogate": "rbf", "initial": 250, "population": 200, "generations": 20,
    "crossover": 0.9, "mutation": 0.1, "per_iteration": 50, "iterations": 200, "prune": 2.0,
    "formats": "int2,int3,int4",
    "group_size": 128, "loss": "jsd", "head": KEPT.name, "rotation": NO_ROTATION,
}  # fmt: skip
"""The setting of AMQ (arXiv 2509.12019), §4.1 and appendix."""
PRESETS: dict[str, dict[str, Any]] = {"paper": PAPER}


@dataclass(frozen=True, kw_only=True)
class BudgetSettings(Settings):
    """What to reach; `search` takes one budget or none, `select` exactly one."""

    target_bits: float | None = flag(
        None,
        "budget: average bits per weight of all that is searched (linears, and head and embeddings unless --head "
        "16bit), scales and zero points counted",
        REACH,
        metavar="B",
    )
    memory: str | int | None = flag(
        None, "budget: every byte that must be resident, such as 6GiB", REACH, parse=parse_size, metavar="SIZE"
    )
    context: int = flag(
        0, "tokens of KV cache that --memory must hold besides the weights", REACH, least=0, metavar="N"
    )
    cache: str = flag(
        DEFAULT_CACHE,
        "what that cache is kept as, as --cache of generate and serve; auto shares --memory between weights and the "
        "cache of each layer",
        REACH,
        choices=(AUTO, *CACHES),
    )
    max_loss: float | None = flag(
        None,
        "budget: the smallest model whose loss stays below this (nats per token, or what --objective measures in)",
        REACH,
        metavar="L",
    )

    min_speed: float | None = flag(
        None,
        "budget, alone or beside --target-bits or --memory: tokens/s of one user at least, after --context others, by "
        "a table of this machine's times",
        REACH,
        above=0,
        metavar="T",
    )
    prefer: str = flag(
        QUALITY,
        "what counts among all within the budget: quality, the least loss; speed, the fastest that loses at most a "
        "tenth more than that, or under --max-loss the fastest instead of the smallest",
        REACH,
        choices=(QUALITY, SPEED),
    )
    speed_table: str | None = flag(
        None, "the table, from amq bench MODEL --table FILE; default: a search measures one", REACH, metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.budgets) > 1:
            raise AmqError(f"give one budget, not both {' and '.join(list(self.budgets)[:2])}")
        if self.context and self.memory is None and not self.timed:
            raise AmqError(
                "--context sizes the KV cache within --memory, or says what comes before a token of --min-speed: give "
                "--memory or --min-speed too"
            )
        if self.max_loss is not None and self.min_speed is not None:
            raise AmqError("--max-loss asks for the smallest or fastest: give --prefer speed instead of --min-speed")
        if self.speed_table is not None and not self.timed:
            raise AmqError("--speed-table is for --min-speed or --prefer speed: give one of these too")
        if self.cache != DEFAULT_CACHE and not self.context:
            raise AmqError(f"--cache {self.cache} is what the tokens of --context are kept as: give --context too")
        if self.shares_memory and (self.memory is None or self.timed):
            raise AmqError(
                f"--cache {AUTO} shares --memory between weights and cache, and knows no times: give --memory without "
                "--min-speed and --prefer speed, or one kind as --cache"
            )

    @property
    def shares_memory(self) -> bool:
        """Whether what layers keep of a sequence is chosen with the weights' formats."""
        return self.cache == AUTO

    @property
    def timed(self) -> bool:
        """Whether a token's time is asked about."""
        return self.min_speed is not None or self.prefer == SPEED

    @property
    def budgets(self) -> dict[str, float | str]:
        """Those that are given, by their flags."""
        all_ = {"--target-bits": self.target_bits, "--memory": self.memory, "--max-loss": self.max_loss}
        return {name: value for name, value in all_.items() if value is not None}


@dataclass(frozen=True)
class SearchSettings(LoadSettings, BudgetSettings):
    VERB: ClassVar[str] = "search"
    ABOUT: ClassVar[str] = "finds which linear of a model should hold which format, within a budget"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq search smollm2 --target-bits 4.0 --output runs/smollm2",
        "amq search Qwen/Qwen3-4B --memory 3GiB --context 4096 --output runs/qwen",
    )

    model: str = flag(REQUIRED, MODEL, positional=True)
    output: str = flag(REQUIRED, "run folder; refused if not empty, unless --resume", RUN, metavar="RUN")
    # what to choose from
    formats: str = flag("int2,int3,int4", f"candidate formats, of {', '.join(FORMATS)}", CHOOSE, metavar="LIST")
    group_size: int = flag(128, "input features per scale: 32, 64 or 128", CHOOSE, metavar="G")
    pin: list[str] = flag(
        [], "REGEX=FORMAT: linears that keep a format, or their 16 bits (16bit); may be repeated", CHOOSE, metavar="PIN"
    )
    head: str = flag(
        AUTO,
        "format of head and embeddings: auto searches them too, among the candidates, int6, int8 and 16 bits; 16bit "
        "leaves them out of the search and of --target-bits",
        CHOOSE,
        choices=(AUTO, *FORMATS, KEPT.name),
    )
    tie: str = flag(
        "",
        "groups whose members share a format per block, such as qkv,gate_up; the experts of a layer and role do in "
        "any case, unless --untie experts",
        CHOOSE,
        metavar="GROUPS",
    )
    untie: str = flag(
        "", "experts: each expert has its own format, which llama.cpp cannot run", CHOOSE, metavar="GROUPS"
    )
    # how to measure
    proxy: str = flag("gptq", "quantizer of the bank", MEASURE, choices=QUANTIZERS)
    rotation: str = flag(AUTO, ROTATION_HELP, MEASURE, choices=ROTATIONS)
    calibration: str = flag(AUTO, f"text: {CALIBRATION_TEXTS}", MEASURE, metavar="TEXT")
    window_length: int = flag(
        512, "tokens per window, BOS included where the tokenizer puts one", MEASURE, least=2, metavar="N"
    )
    windows: int = flag(4, "windows that the search's loss is measured on", MEASURE, least=1, metavar="N")
    confirm_windows: int = flag(
        4, "windows held out of the search, for error bars and --refine", MEASURE, least=1, metavar="N"
    )
    bank_windows: int = flag(24, "windows that calibrate the gptq bank", MEASURE, least=1, metavar="N")
    loss: str = flag(
        "jsd",
        "what is minimised: divergence from the full-precision model on windows of --calibration, or how far greedy "
        "answers to the model's own prompts differ from its (answers)",
        MEASURE,
        choices=OBJECTIVES,
        name="objective",
    )
    answers: int = flag(
        32, "--objective answers: prompts that the loss is measured on, and as many held out", MEASURE, least=1,
        metavar="N",
    )  # fmt: skip
    answer_tokens: int = flag(64, "--objective answers: tokens that an answer may have", MEASURE, least=1, metavar="N")
    # how to search
    solver: str = flag("additive", "search strategy", SEARCH, choices=SOLVERS)
    cost: str = flag("fisher", "cost table of the additive solver", SEARCH, choices=COSTS)
    cost_passes: int = flag(16, "backward passes (one window each) of --cost fisher", SEARCH, least=1, metavar="N")
    points: int = flag(12, "points of the front that are truly evaluated", SEARCH, least=0, metavar="N")
    exact: bool = flag(False, "solve every budget by integer programming instead of the Lagrangian with fill", SEARCH)
    refine: int | None = flag(
        None,
        "further true evaluations spent on moves around the budget; default: 40 where the linears of the blocks get "
        "less than 2.7 bits per weight there, else 0",
        SEARCH,
        least=0,
        metavar="N",
    )
    prune: float = flag(
        2.0, "paper and random: pin linears whose sensitivity exceeds this multiple of the median", SEARCH, metavar="X"
    )
    surrogate: str = flag("rbf", "paper: surrogate model", SEARCH, choices=SURROGATES)
    initial: int = flag(250, "paper and random: initial configurations", SEARCH, least=2, metavar="N")
    iterations: int = flag(200, "paper: iterations of fit, evolve, evaluate", SEARCH, least=0, metavar="N")
    per_iteration: int = flag(50, "paper: configurations evaluated per iteration", SEARCH, least=1, metavar="N")
    population: int = flag(200, "paper: NSGA-II population", SEARCH, least=4, metavar="N")
    generations: int = flag(20, "paper: NSGA-II generations", SEARCH, least=1, metavar="N")
    crossover: float = flag(0.9, "paper: crossover probability", SEARCH, least=0, most=1, metavar="P")
    mutation: float = flag(0.1, "paper: mutation probability per variable", SEARCH, least=0, most=1, metavar="P")
    seed: int = flag(0, "seed of everything random", SEARCH, least=0, metavar="N")
    # how to run
    backend: str = flag(
        AUTO,
        "what runs the candidates: native is the engine for CPUs, reference torch on dequantized weights, the others "
        "multiply within the model's own modules; auto: native where it knows the model, else reference",
        choices=(AUTO, NATIVE, *BACKENDS),
    )
    activations: str = flag(
        AUTO,
        "int8 rounds activations as deployed; auto: int8 with --backend native, else fp32",
        choices=(AUTO, *ACTIVATIONS),
    )
    cache_memory: str | int = flag(
        "256MiB",
        "memory for each of three: reference distributions, hidden states (more of these goes to disk), and weights "
        "that are ready for their next turn",
        parse=parse_size,
        metavar="SIZE",
    )
    gpu_memory: str | int | None = flag(
        None,
        "with a GPU as --device: memory there for the bank's weights, of which the others stay in the host's; default: "
        "a quarter of what the model leaves free",
        parse=parse_size,
        metavar="SIZE",
    )
    time: str | float | None = flag(
        None, "stop evaluating after this long, such as 10min", parse=parse_time, metavar="T"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group_size(self.group_size)
        if self.exact and self.min_speed is not None:
            raise AmqError("--exact has one bound, the size: leave it out, or --min-speed")
        if self.gpu_memory is not None and self.device.startswith("cpu"):
            raise AmqError(f"--gpu-memory is of a GPU, and the model runs on {self.device}: give --device cuda too")
        if self.shares_memory and (self.solver != "additive" or self.cost != "fisher"):
            raise AmqError(f"--cache {AUTO} wants costs of both kinds, --solver additive --cost fisher")
        if self.untie not in ("", EXPERTS):
            raise AmqError(f"--untie {self.untie}: expected {EXPERTS}; nothing else is tied unless --tie says so")
        if self.untied and EXPERTS in self.tie.split(","):
            raise AmqError("experts are either tied or not: give --tie experts or --untie experts")
        if self.loss != ANSWERS:
            given = [n for n in ("answers", "answer_tokens") if getattr(self, n) != getattr(SearchSettings, n)]
            if given:
                raise AmqError(f"--{given[0].replace('_', '-')} is of --objective {ANSWERS}, got {self.loss}")
        if len(self.bit_formats) < 2:
            raise AmqError(f"--formats {self.formats}: a search needs at least two formats to choose from")
        if self.activations != AUTO and self.backend not in (AUTO, NATIVE):
            from amq.kernels.backends import check_activations  # imports torch

            check_activations(self.backend, self.activations)

    @property
    def gpu_bytes(self) -> int | None:
        """`gpu_memory` in bytes, where it is given."""
        return None if self.gpu_memory is None else parse_size(self.gpu_memory)

    @property
    def bit_formats(self) -> tuple[BitFormat, ...]:
        return parse_formats(self.formats)

    @property
    def ties(self) -> list[str]:
        """What `--tie` names besides experts, which are tied unless they are `untied`."""
        return [t for t in self.tie.split(",") if t not in ("", EXPERTS)]

    @property
    def untied(self) -> bool:
        return self.untie == EXPERTS

    @classmethod
    def preset(cls, name: str | None, **given: Any) -> SearchSettings:
        """As `make`, over the settings that `name` stands for, over the defaults."""
        if name not in (None, *PRESETS):
            raise AmqError(f"unknown preset {name!r}: expected {' or '.join(PRESETS)}")
        return cls.make(**{**PRESETS.get(name or "", {}), **given})


@dataclass(frozen=True)
class SearchCommand:
    """What the command takes besides."""

    preset: str | None = flag(None, "the paper's setting; single flags still override it", SEARCH, choices=PRESETS)
    resume: bool = flag(False, "go on with the interrupted run in --output")


@dataclass(frozen=True)
class SelectSettings(BudgetSettings):
    VERB: ClassVar[str] = "select"
    ABOUT: ClassVar[str] = "chooses again from a finished search, under another budget, without its model"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq select runs/smollm2 --target-bits 3.5",
        "amq select runs/qwen --memory 4GiB --context 8192 --output four.json",
    )

    run: str = flag(REQUIRED, "run folder of an earlier search", positional=True)
    output: str | None = flag(None, "default: RUN/configuration-<budget>.json", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budgets and self.min_speed is None:
            raise AmqError("select needs a budget: --target-bits, --memory or --max-loss, or --min-speed")


FREE_ON_RESUME = frozenset(
    {"output", "time", "cache_memory", "gpu_memory", "refine", "iterations", "trust_remote_code", "load"}
)
"""What may change between an interrupted run and its resumption: it alters no evaluation, only how many there are."""


ENGINE = frozenset({"backend", "activations"})
"""What stands for an engine by the model and the memory that is free: where a run says what it was measured by, that is
compared in their place."""


def differences(old: dict[str, Any], new: dict[str, Any], free: frozenset[str] = FREE_ON_RESUME) -> list[str]:
    """Settings that forbid resuming, as `--name was X, is Y`. free: what may differ."""
    flags = declared(SearchSettings)
    names = [n for n in new if n not in free and old.get(n) != new[n]]
    return [f"{flags[n].spelling} was {old.get(n)}, is {new[n]}" for n in names]
