"""The ways to quantize a model, by name."""

from __future__ import annotations

from dataclasses import dataclass

from amq.errors import AmqError
from amq.formats import FORMATS, NO_ROTATION
from amq.model.settings import AUTO
from amq.quantize.quantizers import NEEDS_GRAM, NEEDS_OUTPUTS, NEEDS_WEIGHTS
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

    @property
    def weighted(self) -> bool:
        """Whether tokens count by what they do to the loss."""
        return self.rounding in NEEDS_WEIGHTS

    @property
    def two_sided(self) -> bool:
        """Whether it looks at gradients of outputs, too."""
        return self.rounding in NEEDS_OUTPUTS


METHODS: Registry[Method] = Registry(
    "method",
    {
        "awq": Method("clip", True, "activation-aware scales and asymmetric clipping"),
        "gptq": Method("gptq", False, "error-compensated rounding, block by block"),
        "guided": Method("guided", False, "gptq, tokens weighted by what they do to the loss (a backward pass each)"),
        "two_sided": Method("two_sided", False, "guided, and rows make up for each other's errors (YAQA)"),
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

ROTATIONS = (AUTO, "64", NO_ROTATION)
"""What `--rotation` may say: see `amq.quantize.rotate`."""
BANK_ROTATIONS = (*ROTATIONS, *FORMATS)
"""What a bank may have: a format is `auto`, decided by the errors of that format."""
ROTATION_HELP = (
    "inputs that are rotated 64 features at a time before they are multiplied, at no stored byte: auto, those where it "
    "lowers the error on calibration text (none of quantizers without calibration); 64, all"
)


def rotation_of(method: str, given: str, zero_points: str = "fractional") -> str:
    """What `--rotation` `given` means for a method: where there is nothing to decide by, none instead of `auto` (or a
    format).

    Other programs hold no rotation, so `auto` is none where zero points are as these need them. Raises AmqError where a
    method cannot rotate.
    """
    rounds = METHODS.get(method)
    if given == NO_ROTATION or method == "bank":
        return given
    if rounds is None or rounds.scales:
        if given != "64":
            return NO_ROTATION
        why = "its scales belong to single input features" if rounds else "it rounds weights as it finds them"
        raise AmqError(
            f"--rotation {given}: --method {method} does not rotate, because {why}: "
            "use --method gptq, or --rotation none"
        )
    if given != "64" and (not rounds.calibrated or zero_points != "fractional"):
        return NO_ROTATION
    return given
