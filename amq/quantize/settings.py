"""The settings of one quantization: the command line of `amq quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amq.errors import AmqError
from amq.formats import check_group_size, get_format, get_stored
from amq.model.settings import AUTO, CALIBRATION_TEXTS, MODEL, LoadSettings
from amq.quantize.methods import METHODS, OTHER_METHODS, ROTATION_HELP, ROTATIONS, rotation_of
from amq.quantize.quantizers import ZERO_POINTS
from amq.util.settings import REACH, REQUIRED, flag

ROUND, CARD = "how to round", "what the model card says"
NO_HEAD = "none"
"""`--head none`: lm_head and embedding keep their dtype; `--embeddings none` likewise."""
HELP = {name: METHODS[name].help for name in METHODS} | OTHER_METHODS


@dataclass(frozen=True)
class QuantizeSettings(LoadSettings):
    VERB: ClassVar[str] = "quantize"
    ABOUT: ClassVar[str] = "quantizes a model by a configuration, into a checkpoint folder"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq quantize smollm2 --configuration runs/smollm2/configuration.json --output smollm2-4bit",
        "amq quantize Qwen/Qwen3-4B --uniform int4 --head int8 --output qwen-int4",
    )

    model: str = flag(REQUIRED, MODEL, positional=True)
    output: str = flag(REQUIRED, "folder of the checkpoint; must not exist, or be empty", REACH, metavar="DIR")
    configuration: str = flag("", "configuration.json of a search", REACH, metavar="FILE")
    uniform: str = flag("", "one format for all linears, instead of --configuration", REACH, metavar="FORMAT")
    pin: list[str] = flag(
        [], "REGEX=FORMAT: linears that get this format, or keep their 16 bits (16bit); may be repeated", REACH,
        metavar="PIN",
    )  # fmt: skip
    group_size: int = flag(128, "input features per scale, with --uniform", REACH, metavar="G")
    head: str = flag(
        "", f"format of the lm_head and of an embedding tied to it, {NO_HEAD} for 16 bits; without it as the "
        "configuration says", REACH, metavar="FORMAT",
    )  # fmt: skip
    embeddings: str = flag(
        "", f"the same of embeddings that are not tied to the lm_head, {NO_HEAD} for 16 bits", REACH, metavar="FORMAT"
    )
    method: str = flag("gptq", "; ".join(f"{name}: {text}" for name, text in HELP.items()), ROUND, choices=HELP)
    zero_points: str = flag(
        "fractional", "other tools' formats need integer or symmetric ones", ROUND, choices=ZERO_POINTS
    )
    rotation: str | None = flag(
        None, f"{ROTATION_HELP}; without it as the configuration's search had it, else auto. Only gptq, guided, clip, "
        "hqq and rtn rotate; where --zero-points are as other tools need them, auto is none", ROUND, choices=ROTATIONS,
    )  # fmt: skip
    autoround_iterations: int = flag(
        50, "tuning steps per block of autoround, whose own default is 200", ROUND, least=1, metavar="N"
    )
    tune: float | None = flag(
        None, "minutes of tuning scales, zero points and norms end to end, on text that the model writes itself",
        ROUND, above=0, metavar="MINUTES",
    )  # fmt: skip
    calibration: str = flag(AUTO, f"text: {CALIBRATION_TEXTS}", ROUND, metavar="TEXT")
    windows: int = flag(64, "calibration windows", ROUND, least=1, metavar="N")
    window_length: int = flag(
        512, "tokens per window, BOS included where the tokenizer puts one", ROUND, least=2, metavar="N"
    )
    seed: int = flag(0, "of the choice of windows", ROUND, least=0, metavar="N")
    perplexity: str = flag("docstrings", "text for the model card's perplexities, or none", CARD, metavar="TEXT")
    perplexity_tokens: int = flag(8192, "tokens of it", CARD, least=1, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.configuration) == bool(self.uniform):
            raise AmqError("give one of --configuration FILE and --uniform FORMAT")
        if self.method == "bank" and self.zero_points != "fractional":
            raise AmqError(f"the bank has fractional zero points, not {self.zero_points} ones: use --method gptq")
        if self.uniform:
            get_format(self.uniform)
            check_group_size(self.group_size)
        if self.rotation:
            rotation_of(self.method, self.rotation)
        for given in (self.head, self.embeddings):
            if given not in ("", NO_HEAD):
                get_stored(given)


@dataclass(frozen=True)
class QuantizeCommand:
    """What the command takes besides."""

    resume: bool = flag(False, "go on with an interrupted run, after its last block")
