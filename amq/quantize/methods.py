"""The ways to quantize a model, by name."""

from __future__ import annotations

from dataclasses import dataclass

from amq.quantize.quantizers import NEEDS_GRAM
from amq.util.lazy import Registry


@dataclass(frozen=True)
class Method:
    """rounding: a name in `amq.quantize.quantizers.QUANTIZERS`. scales: whether AWQ's scales are searched and folded
    first."""

    rounding: str
    scales: bool = False
    help: str = ""

    @property
    def calibrated(self) -> bool:
        return self.scales or self.rounding in NEEDS_GRAM


METHODS: Registry[Method] = Registry(
    "method",
    {
        "awq": Method("clip", True, "activation-aware scales and asymmetric clipping"),
        "gptq": Method("gptq", False, "error-compensated rounding, block by block"),
        "awq+gptq": Method("gptq", True, "activation-aware scales, then error-compensated rounding"),
        "clip": Method("clip", False, "asymmetric clipping alone"),
        "hqq": Method("hqq", False, "half-quadratic quantization, no calibration"),
        "rtn": Method("rtn", False, "round to nearest, no calibration"),
    },
)
"""Methods that quantize here."""
OTHER_METHODS = {
    "bank": "the weights that the search was made on",
    "autoround": "the package auto-round, tuned block by block",
}
"""Those that take weights that others made (amq/quantize/run.py), each in a few words."""
