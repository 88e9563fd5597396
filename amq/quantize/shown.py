"""What a quantization says of its linears: experts of a layer and role as one, with the spread of their errors.

quantization.json has every expert by itself.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from amq.model.inventory import EXPERT, LinearSpec
from amq.quantize.log import ExpertsOutcome

if TYPE_CHECKING:
    from amq.quantize.blocks import BlockResult

logger = logging.getLogger(__name__)

MOST_ERROR = 0.5
"""Relative error of a linear above which a warning names it."""


def layer_role(spec: LinearSpec) -> str:
    """The name of an expert's linear without its number: what the experts of a layer and role have in common."""
    block = spec.name[: -len(f"{spec.role}.{spec.expert}")]  # wherever in the rest the number stands
    return block + spec.role


def counts_text(specs: Iterable[LinearSpec], formats: Mapping[str, str]) -> str:
    """`96 int4, 1536 int3 of experts`."""
    counts = Counter((formats[s.name], s.kind == EXPERT) for s in specs)
    return ", ".join(f"{n} {fmt}" + " of experts" * expert for (fmt, expert), n in sorted(counts.items()))


def errors_text(result: BlockResult, specs: Mapping[str, LinearSpec]) -> str:
    """`relative error q_proj int3 0.123 … experts.gate_proj int4 0.101 to 0.157 …`. specs: {name: linear}."""
    shown = [f"{name.rpartition('.')[2]} {_formats(result, [name])} {result.errors[name]:.3f}"
             for name in result.errors if specs[name].kind != EXPERT]  # fmt: skip
    for layer, names in _experts(result.errors, specs).items():
        least, most = _spread(result.errors[n] for n in names)
        role = ".".join(layer.rsplit(".", 2)[1:])
        shown.append(f"{role} {_formats(result, names)} {least:.3f} to {most:.3f}")
    rotated = sum(packed.rotation > 0 for packed in result.packed.values())
    more = f"; {rotated} of {len(result.packed)} linears rotated" if rotated else ""
    return "relative error " + " ".join(shown) + more


def warn_of(result: BlockResult, specs: Mapping[str, LinearSpec]) -> None:
    """Names the linears of a block that lost more than half of what they compute."""
    lossy = {name: error for name, error in result.errors.items() if not error <= MOST_ERROR}
    for name in (n for n in lossy if specs[n].kind != EXPERT):
        fmt = result.packed[name].format.name
        logger.warning("%s in %s has a relative error of %.2f: give it a wider format", name, fmt, lossy[name])
    for layer, names in _experts(lossy, specs).items():
        worst = max(names, key=lambda n: lossy[n])
        logger.warning(
            "%d experts of %s have relative errors up to %.2f (%s in %s): give them a wider format",
            len(names), layer, lossy[worst], worst, result.packed[worst].format.name,
        )  # fmt: skip


def experts_outcomes(
    specs: Iterable[LinearSpec], formats: Mapping[str, str], errors: Mapping[str, float]
) -> dict[str, ExpertsOutcome]:
    """formats: {linear: format}. errors: of those of which they are known."""
    found = {}
    for layer, names in _experts({s.name: s for s in specs}, {s.name: s for s in specs}).items():
        known = [errors[n] for n in names if n in errors]
        least, most = _spread(known) if known else (None, None)
        counts = dict(sorted(Counter(formats[n] for n in names).items()))
        found[layer] = ExpertsOutcome(formats=counts, least_error=least, most_error=most)
    return found


def _experts(names: Iterable[str], specs: Mapping[str, LinearSpec]) -> dict[str, list[str]]:
    """{layer and role: those of `names` that are its experts}."""
    found: dict[str, list[str]] = {}
    for name in names:
        if specs[name].kind == EXPERT:
            found.setdefault(layer_role(specs[name]), []).append(name)
    return found


def _formats(result: BlockResult, names: Sequence[str]) -> str:
    return "/".join(sorted({result.packed[n].format.name for n in names}))


def _spread(errors: Iterable[float]) -> tuple[float, float]:
    known = list(errors)
    return min(known), max(known)
