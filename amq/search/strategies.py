"""Strategies of bit allocation, a row each: what `amq eval strategies` compares, and what cited systems do otherwise.

Families are those that the survey of mixed-precision quantization for language models (arXiv 2510.16805) tells apart by
how bits are allocated, in our words: rules, metrics of each weight (with the exact knapsack over them), search by
measured losses, optimisation by gradients, and finer parts than a linear. A metric is a cost table {linear: {format:
cost}}; `how` says where the allocation comes from, and `amq.eval.strategies` runs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from amq.errors import AmqError

BASELINE, RULE, METRIC, SEARCHED, GRADIENT, FINER = (
    "baseline", "rule", "metric, knapsack", "search", "gradient", "finer parts",
)  # fmt: skip
LINEAR, ROWS, FEATURES, GROUPS, ROUNDS = (
    "linear", "rows of a linear", "input features of a linear", "groups of a linear's rows", "rounds of a linear",
)  # fmt: skip
TABLE = "table"
"""`how` of a strategy that is a cost table of its own name."""
PASSES, RESIDENT, STEPS, EVALUATIONS = "passes", "resident", "steps", "evaluations"
"""What a strategy may need: windows of `--cost-passes`; the model in memory whole; `--steps`; `--evaluations`."""


@dataclass(frozen=True)
class Strategy:
    """inputs: what it looks at. systems: those that allocate bits so. deviation: what they do otherwise. needs: of
    PASSES to EVALUATIONS."""

    name: str
    family: str
    granularity: str
    inputs: str
    systems: str
    deviation: str
    how: str = TABLE
    needs: frozenset[str] = frozenset()


_ROWS = (
    Strategy(
        "uniform", BASELINE, "model", "nothing", "every quantizer without mixed precision",
        "the widest format that fits the budget for everything", "uniform",
    ),
    Strategy(
        "random", BASELINE, LINEAR, "losses of random mixtures",
        "the baseline of AMQ and of neural architecture search",
        "in the space that AMQ's pruning leaves, which takes a single-linear evaluation of each linear", "random",
        frozenset({EVALUATIONS}),
    ),
    Strategy(
        "recipe", RULE, LINEAR, "position", "llama.cpp's K-quants",
        "one rule of v, down, first and last block at any budget; llama.cpp has a table of its own per file type",
        "recipe",
    ),
    Strategy(
        "weight", METRIC, LINEAR, "weights", "allocation by plain quantization error",
        "sum of squares of the bank's own error, so of GPTQ's with a gptq bank",
    ),
    Strategy(
        "activation", METRIC, LINEAR, "inputs", "OWQ, GPTQ's error, Atom",
        "whole linears by relative output error; OWQ and Atom keep single input channels in 16 or 8 bits",
        needs=frozenset({PASSES}),
    ),
    Strategy(
        "entropy", METRIC, LINEAR, "outputs", "ZeroQ, EMQ, SL-ACC",
        "Gaussian outputs on real text; ZeroQ makes its data up, EMQ evolves its formula, SL-ACC groups channels",
        needs=frozenset({PASSES}),
    ),
    Strategy(
        "taylor", METRIC, LINEAR, "gradients of the text's loss", "LLM-MQ, ModelOpt, AutoScheme, KVmix, PM-KVQ",
        "the absolute sum over a window's tokens, mean of windows; the last two score keys and values of a cache so",
        needs=frozenset({PASSES}),
    ),
    Strategy(
        "trace", METRIC, LINEAR, "gradients of drawn labels", "HAWQ-V2 and V3",
        "the exact trace of a token's Fisher matrix in the place of Hutchinson's estimate of the Hessian's",
        needs=frozenset({PASSES}),
    ),
    Strategy(
        "fisher", METRIC, LINEAR, "gradients of drawn labels", "SqueezeLLM, FGMP (both by Fisher weights)",
        "amq's default: the quadratic form of the bank's very error over runs of positions, for whole linears; both "
        "weigh single weights or blocks by a diagonal",
        needs=frozenset({PASSES}),
    ),
    Strategy(
        "sensitivity", METRIC, LINEAR, "losses with one linear changed",
        "AMQ's pruning",
        "every linear in every format, the others in the widest; losses are made additive before they are summed",
    ),
    Strategy(
        "kl", METRIC, LINEAR, "divergences with one linear changed", "exllamav3, ModelOpt's KL score, ZeroQ",
        "`sensitivity` with Kullback and Leibler's divergence from the full-precision model for single linears; "
        "exllamav3 goes greedily by it, ZeroQ measures it on data that it makes up", "kl",
    ),
    Strategy(
        "gradient", GRADIENT, LINEAR, "losses of mixed weights", "DNAS, EdMIPS, GAMMA",
        "one run at the middle of the budgets, no draws and no annealing; weights stay the bank's",
        "gradient", frozenset({PASSES, RESIDENT, STEPS}),
    ),
    Strategy(
        "greedy", SEARCHED, LINEAR, "losses of whole configurations", "EvoPress",
        "a few dozen offspring per budget, all on the same tokens; EvoPress takes thousands, on more and more of them",
        "greedy", frozenset({EVALUATIONS}),
    ),
    Strategy(
        "paper", SEARCHED, LINEAR, "losses of whole configurations", "AMQ",
        "its sensitivity pruning, surrogate and NSGA-II with as many evaluations as the others here, not 10,250",
        "paper", frozenset({EVALUATIONS}),
    ),
    Strategy(
        "refine", SEARCHED, LINEAR, "fisher, then losses of its neighbours", "amq's --refine",
        "amq's own; the evaluations are spread over all budgets, where a search has one", "refine",
        frozenset({PASSES, EVALUATIONS}),
    ),
    Strategy(
        "rows", FINER, ROWS, "gradients of drawn labels", "MixLLM, CMPQ, SliM-LLM, SFMP",
        "four blocks of output rows by salience in each linear; MixLLM ranks single features of the whole model, the "
        "others cut otherwise; no kernel of amq runs it", "rows", frozenset({PASSES, RESIDENT}),
    ),
    Strategy(
        "channels", FINER, FEATURES, "inputs", "OWQ, LLM.int8(), QUIK, Atom",
        "the same share of features in int8 beside the widest uniform format that fits; OWQ keeps columns in 16 bits, "
        "the others quantize activations too, and choose by magnitude; no kernel of amq runs it",
        "channels", frozenset({PASSES, RESIDENT}),
    ),
    Strategy(
        "dialect", FINER, GROUPS, "fisher, and inputs", "BlockDialect",
        "eight sets of levels for each format, and Fisher's choice of formats for linears; BlockDialect has sixteen of "
        "4-bit floats for all blocks, and quantizes activations too; no kernel of amq runs it",
        "dialect", frozenset({PASSES, RESIDENT}),
    ),
    Strategy(
        "bitstack", FINER, ROUNDS, "inputs, and losses with one linear at its first round", "BitStack",
        "six rounds of rank 4, one order of linears for all rounds; BitStack has sixteen of rank 16 in 7B models, and "
        "measures an order for each; no kernel of amq runs it",
        "bitstack", frozenset({PASSES, RESIDENT}),
    ),
)  # fmt: skip
STRATEGIES: dict[str, Strategy] = {row.name: row for row in _ROWS}
"""By name, in the order of the table."""


def parse_strategies(text: str) -> list[Strategy]:
    """`fisher,taylor` → their rows, in the table's order; empty for all. Raises AmqError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := next((name for name in names if name not in STRATEGIES), None):
        raise AmqError(f"--strategies: {unknown!r} is none of {', '.join(STRATEGIES)}")
    return [row for name, row in STRATEGIES.items() if not names or name in names]


def check_needs(rows: Iterable[Strategy], has: dict[str, bool], remedies: dict[str, str]) -> None:
    """Raises AmqError for the first strategy that lacks what it needs. has: of PASSES to EVALUATIONS, whether it is
    there; what it does not name is not judged. remedies: what would give it."""
    for row in rows:
        if missing := next((need for need in sorted(row.needs) if not has.get(need, True)), None):
            raise AmqError(f"strategy {row.name!r} {remedies[missing]}, or leave it out of --strategies")
