"""What a run folder's JSON files say: run.json, front.json and a configuration's provenance (docs/format.md)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

import amq
from amq.model.inventory import Inventory
from amq.model.shape import ModelShape
from amq.search.front import hypervolume
from amq.search.knapsack import select
from amq.search.loss_curve import LossFit, table_cost
from amq.search.problem import Problem, Table
from amq.search.run_folder import KvEntry
from amq.search.space import SearchSpace

CURVE_POINTS = 120
PACKAGES = ("torch", "transformers", "numpy", "scipy", "hqq", "pymoo", "scikit-learn")
BANK_SETTINGS = ("proxy", "calibration", "window_length", "bank_windows", "seed")
"""Settings that name a bank of a model, besides the group size: `amq.eval` opens the same one from them."""


def provenance(settings: Mapping[str, Any], fingerprint: str, window_prefix: Sequence[str]) -> dict[str, Any]:
    """Where a configuration came from, and what names its bank; window_prefix: tokens that its windows begin with."""
    names = (*BANK_SETTINGS, "solver", "cost", "formats", "loss")
    return {
        **{n: settings[n] for n in names}, "window_prefix": list(window_prefix), "model_fingerprint": fingerprint,
        "amq": amq.__version__,
    }  # fmt: skip


def front_json(
    problem: Problem, front: list[dict[str, Any]], table: Table | None, fit: LossFit | None
) -> dict[str, Any]:
    """The content of front.json."""
    space, archive = problem.space, problem.archive

    def confirmed(formats: dict[str, str]) -> float | None:
        record = archive.find(formats, "confirm")
        return record["loss"] if record else None

    def predicted(formats: dict[str, str]) -> float | None:
        return float(fit.predict(table_cost(table, formats))) if fit else None

    uniform = []
    for fmt in space.formats:
        record = archive.find(space.uniform(fmt))
        if record:
            uniform.append({
                "name": fmt.name, "bits_per_weight": record["bits_per_weight"], "loss": record["loss"],
                "loss_confirm": confirmed(space.uniform(fmt)),
            })  # fmt: skip
    points = [
        {
            "bits_per_weight": r["bits_per_weight"], "loss": r["loss"], "loss_confirm": confirmed(r["configuration"]),
            "predicted": predicted(r["configuration"]), "archive_index": r["index"],
            "configuration": r["configuration"],
        }
        for r in front
    ]  # fmt: skip
    pairs = np.array([(p["bits_per_weight"], p["loss"]) for p in points]).reshape(-1, 2)
    return {
        "schema": "amq/front/1", "bits_range": list(space.bits_range),
        "hypervolume": hypervolume(pairs, space.bits_range),
        "uniform": uniform, "front": points, "curve": _curve(space, table, fit), "fit": fit.json() if fit else None,
    }  # fmt: skip


def _curve(space: SearchSpace, table: Table | None, fit: LossFit | None) -> list[dict[str, float]] | None:
    """Predicted loss of the knapsack optimum at evenly spaced budgets."""
    if table is None or fit is None:
        return None
    costs = space.variable_costs(table)
    curve = []
    for bits in np.linspace(*space.bits_range, CURVE_POINTS):
        formats = space.decode(select(costs, space.sizes, space.capacity(float(bits) + 1e-9)))
        curve.append(
            {"bits_per_weight": space.bits_of(formats), "loss": float(fit.predict(table_cost(table, formats)))}
        )
    return curve


def describe_model(inventory: Inventory, shape: ModelShape) -> dict[str, Any]:
    """The part of run.json that stands in for the model: its linears, its other weights, and its KV cache."""
    return {
        "linears": [
            {
                "name": s.name,
                "block": s.block,
                "role": s.role,
                "out_features": s.out_features,
                "in_features": s.in_features,
            }
            for s in inventory.linears
        ],
        "others": [{"name": o.name, "kind": o.kind, "numel": o.numel, "reason": o.reason} for o in inventory.others],
        "head_is_tied": inventory.head_is_tied,
        "kv_cache": KvEntry.of(shape),
    }


def versions() -> dict[str, str]:
    """Of amq, Python and the packages that results depend on."""
    found = {"amq": amq.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
