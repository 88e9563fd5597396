"""What every stage that loads a model is told: in which dtype, where, and whether its own code may run."""

from __future__ import annotations

from dataclasses import dataclass

from amq.util.settings import Settings, flag

MODEL = "hub id, folder, .gguf file, or the alias smollm2"
CHECKPOINT = "a folder that amq quantize wrote; or " + MODEL
"""What the positional argument MODEL may be."""
CALIBRATION_TEXTS = (
    "self (the model writes it), pydoc or docstrings (built in), wikitext2, c4, a file; a .jsonl file holds "
    '{"messages": […]} or {"text": "…"} in each line; A+B takes windows of both in turn; auto is pydoc+self, and pydoc '
    "for a model that is read from disk"
)
"""What `--calibration` may be."""

AUTO, MEMORY, DISK = "auto", "memory", "disk"
LOADS = {
    AUTO: "disk where the model does not fit the free memory",
    MEMORY: "all weights at once",
    DISK: "block by block, as they are needed",
}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    dtype: str = flag(
        "auto", "of what is not quantized: auto (on a CPU float32), float32, bfloat16, float16", metavar="DTYPE"
    )
    device: str = flag("cpu", "where the model runs, in torch's words", metavar="DEVICE")
    trust_remote_code: bool = flag(
        False, "run the Python code that the model's folder brings along, with all your rights"
    )


@dataclass(frozen=True, kw_only=True)
class LoadSettings(ModelSettings):
    """Of a stage that works through a model block by block."""

    load: str = flag(
        AUTO, "how weights come into memory; " + "; ".join(f"{name}: {text}" for name, text in LOADS.items()),
        choices=LOADS,
    )  # fmt: skip
