"""The settings of one quantization: the command line of `python -m amq.quantize`."""

from __future__ import annotations

from dataclasses import dataclass

from amq.errors import AmqError
from amq.formats import check_group_size, get_format
from amq.quantize.blocks import METHODS
from amq.quantize.head import NONE
from amq.quantize.quantizers.grid import ZERO_POINTS
from amq.util.settings import TRUST_REMOTE_CODE, flag

OTHER_METHODS = ("bank", "autoround")
DEFAULT_METHOD = "gptq"


@dataclass(frozen=True)
class QuantizeSettings:
    """Every field is a flag of the same name; `model` is the positional argument."""

    model: str
    output: str = flag("", "folder of the checkpoint; must not exist, or be empty", metavar="DIR")
    configuration: str = flag("", "configuration.json of a search", metavar="FILE")
    uniform: str = flag("", "one format for all linears, instead of --configuration", metavar="FORMAT")
    pin: list[str] = flag(
        [], "REGEX=FORMAT: linears that get this format, or keep their 16 bits (16bit); may be repeated", metavar="PIN"
    )
    group_size: int = flag(128, "input features per scale, with --uniform", metavar="G")
    method: str = flag(DEFAULT_METHOD, "how the weights are rounded", choices=(*METHODS, *OTHER_METHODS))
    zero_points: str = flag("fractional", "other tools' formats need integer or symmetric ones", choices=ZERO_POINTS)
    autoround_iterations: int = flag(50, "tuning steps per block of autoround, whose own default is 200", metavar="N")
    head: str = flag(
        NONE, f"format of the lm_head and of an embedding tied to it; {NONE} leaves both", metavar="FORMAT"
    )
    calibration: str = flag("pydoc", "text: a file, pydoc, docstrings, wikitext2 or c4", metavar="TEXT")
    windows: int = flag(64, "calibration windows", metavar="N")
    window_length: int = flag(512, "tokens per window, BOS included where the tokenizer puts one", metavar="N")
    seed: int = flag(0, "of the choice of windows", metavar="N")
    dtype: str = flag("auto", "dtype to compute in: auto, float32, bfloat16, float16", metavar="DTYPE")
    device: str = flag("cpu", "where the model runs", metavar="DEVICE")
    trust_remote_code: bool = flag(False, TRUST_REMOTE_CODE)
    perplexity: str = flag("docstrings", "text for the model card's perplexities, or none", metavar="TEXT")
    perplexity_tokens: int = flag(8192, "tokens of it", metavar="N")

    def check(self) -> None:
        """Refuses what no run could use; raises AmqError."""
        if bool(self.configuration) == bool(self.uniform):
            raise AmqError("give one of --configuration FILE and --uniform FORMAT")
        if not self.output:
            raise AmqError("--output DIR is missing: where to write the checkpoint")
        if self.method == "bank" and self.zero_points != "fractional":
            raise AmqError(f"the bank has fractional zero points, not {self.zero_points} ones: use --method gptq")
        if self.uniform:
            get_format(self.uniform)
            check_group_size(self.group_size)
        if self.head != NONE:
            get_format(self.head)
        if self.windows < 1:
            raise AmqError(f"--windows {self.windows} is too small: expected at least 1")
