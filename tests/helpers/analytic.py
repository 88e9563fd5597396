"""An analytic stand-in for the evaluator: additive, saturating losses with a known front, in microseconds.

A module of its own, beside conftest, so that crash tests can import it in a child process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amq.formats import parse_formats, quantized_formats
from amq.model.inventory import BEFORE, EMBEDDING, EXPERT, HEAD, LinearSpec
from amq.model.losses import LN2
from amq.search.archive import Archive
from amq.search.problem import Problem
from amq.search.settings import SearchSettings
from amq.search.solvers import SOLVERS
from amq.search.space import SearchSpace

ROLES = {"attn.q_proj": (64, 64), "attn.v_proj": (32, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}


def linears(blocks: int = 4) -> tuple[LinearSpec, ...]:
    return tuple(
        LinearSpec(f"layers.{b}.{role}", b, role, *shape) for b in range(blocks) for role, shape in ROLES.items()
    )


def expert_linears(blocks: int = 2, experts: int = 4) -> tuple[LinearSpec, ...]:
    """Linears of experts, which have attention beside them; 2 of them see a token."""
    return tuple(
        spec
        for b in range(blocks)
        for spec in (
            LinearSpec(f"layers.{b}.attn.q_proj", b, "attn.q_proj", 64, 64),
            *(
                LinearSpec(
                    f"layers.{b}.mlp.experts.{role}.{e}", b, f"mlp.experts.{role}", 64, 64, EXPERT, e, experts, 2
                )
                for role in ("gate_proj", "up_proj", "down_proj")
                for e in range(experts)
            ),
        )
    )


def tied_head(blocks: int = 4) -> tuple[LinearSpec, ...]:
    return (LinearSpec("lm_head", blocks, "lm_head", 256, 64, HEAD, tied="embed"),)


def untied_head(blocks: int = 4) -> tuple[LinearSpec, ...]:
    embedding = LinearSpec("embed", BEFORE, "embed", 256, 64, EMBEDDING)
    return (embedding, LinearSpec("lm_head", blocks, "lm_head", 256, 64, HEAD))


def space(
    formats: str = "int2,int3,int4", blocks: int = 4, outer: tuple[LinearSpec, ...] = (), **options
) -> SearchSpace:
    return SearchSpace.build((*linears(blocks), *outer), parse_formats(formats), 64, **options)


class AnalyticLosses:
    """loss = ln 2 · (1 − exp(−Σ cost)); the confirmation windows see the same costs times 1.1."""

    def __init__(self, of: SearchSpace, seed: int = 0, nan_when: str | None = None) -> None:
        rng = np.random.default_rng(seed)
        weights = rng.lognormal(-4.5, 1.0, len(of.weights))
        names = ("int2", "int3", "int4", "int5", "int6", "int8")
        self.table = {
            s.name: {f: float(w * 4.0**-(i)) for i, f in enumerate(names)}
            for s, w in zip(of.weights, weights, strict=True)
        }
        self.calls, self.together = 0, 3
        self.seconds = self.seconds_in_model = 0.0
        self.nan_when = nan_when

    def evaluate(self, formats: Mapping[str, str], windows: str = "search") -> float:
        self.calls += 1
        if self.nan_when and formats[self.nan_when] == "int2":
            return math.nan
        total = sum(self.table[n][f] for n, f in quantized_formats(formats).items())
        return LN2 * -math.expm1(-total * (1.0 if windows == "search" else 1.1))

    def evaluate_many(
        self, configurations: Sequence[Mapping[str, str]], windows: str = "search"
    ) -> Iterator[list[float]]:
        for start in range(0, len(configurations), self.together):
            yield [self.evaluate(formats, windows) for formats in configurations[start : start + self.together]]


def settings(**given) -> SearchSettings:
    quick = {
        "initial": 12,
        "iterations": 2,
        "per_iteration": 4,
        "population": 12,
        "generations": 3,
        "points": 5,
        "group_size": 64,
    }
    return SearchSettings.make(**{"model": "m", "output": "o", **quick, **given})


def problem(path: Path, options: SearchSettings, losses: AnalyticLosses | None = None, **fields) -> Problem:
    of = space(options.formats)
    losses = losses or AnalyticLosses(of)
    made = Problem(of, Archive(path), losses, options.solver, options.seed, **fields)
    made.cost_tables = {"fisher": lambda: losses.table, "weight": lambda: losses.table}
    return made


def solve(path: Path, options: SearchSettings, losses: AnalyticLosses | None = None, **fields) -> Problem:
    made = problem(path, options, losses, **fields)
    SOLVERS[options.solver](made, options)
    made.archive.close()
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    """Records of an archive without what depends on the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
