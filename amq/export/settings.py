"""The targets of an export, and its settings: the command line of `amq export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amq.util.lazy import Registry
from amq.util.settings import REACH, REQUIRED, Settings, flag


@dataclass(frozen=True)
class Export:
    """help: one line. model_folder: whether the result is a Hugging Face folder, with the tokenizer in it.
    head: whether it holds quantized embeddings and a head; where not, the export gets them as plain tensors.
    experts: whether it holds them; experts_reason: why not. weights: whether it holds any, or names and formats alone.
    """

    help: str
    model_folder: bool = True
    head: bool = False
    experts: bool = False
    experts_reason: str = ""
    weights: bool = True


EXPORTS: Registry[Export] = Registry(
    "export",
    {
        "gptq": Export(
            "GPTQ with per-module `dynamic` rules, for gptqmodel",
            experts_reason="transformers loads GPTQ's linears one by one, and has the experts of a layer in one tensor",
        ),
        "mlx": Export("MLX safetensors, lossless, for mlx-lm on Apple silicon", head=True, experts=True),
        "auto-round": Export(
            "AutoRound, symmetric, for transformers and vLLM",
            experts_reason="transformers loads its linears one by one, and has the experts of a layer in one tensor",
        ),
        "gguf": Export("GGUF with a type per tensor, for llama.cpp", model_folder=False, head=True, experts=True),
        "recipe": Export(
            "settings for people who quantize with llama.cpp, AutoRound or GPTQModel",
            model_folder=False,
            head=True,
            weights=False,
            experts_reason="AutoRound and GPTQModel have names of their own for them, which were not compared",
        ),
    },
)

HOLD_EXPERTS = tuple(name for name in EXPORTS if EXPORTS[name].experts)

TARGETS = "; ".join(f"{name}: {EXPORTS[name].help}" for name in EXPORTS)


@dataclass(frozen=True)
class ExportSettings(Settings):
    VERB: ClassVar[str] = "export"
    ABOUT: ClassVar[str] = "writes a quantized checkpoint as what another tool loads"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq export smollm2-4bit --to gguf --output smollm2-gguf",
        "amq export smollm2-4bit --to mlx --output smollm2-mlx",
    )

    checkpoint: str = flag(
        REQUIRED, "a folder written by amq quantize (--rotation none, but for recipe); only read", positional=True
    )
    to: str = flag(REQUIRED, TARGETS, REACH, choices=EXPORTS, metavar="FORMAT")
    output: str = flag(REQUIRED, "a new or empty folder", REACH, metavar="OUT")
