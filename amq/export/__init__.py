"""Exports: a quantized checkpoint written as what other tools load.

One module per target, `amq/export/<name>.py` (`-` becomes `_`), imported when it is asked for. Each has

    def write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]
        Writes the export's files into an existing empty folder and returns facts for the user, {phrase: value}: what
        maps to what, the extra error. Raises AmqError with the reason, before it writes anything, when the checkpoint
        cannot be expressed in the target.

    LOADING: str
        Markdown for the export's README.md: which tool loads the folder, what to install, and the lines that load it;
        `{folder}` stands for the folder's name.

`amq/export/common.py` holds what several of them need: the checks of groups, formats and zero points, and config.json
without amq's part; `amq.checkpoint.store.write_tensors` writes weight files in shards.
"""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.checkpoint.store import Checkpoint, open_checkpoint
from amq.errors import AmqError
from amq.export.common import DenseHead, plain_config
from amq.integrations.opening import open_export_once
from amq.model.companions import copy_model_files
from amq.util.extras import needs
from amq.util.folders import check_new_folder, real_folder, write_folder


@dataclass(frozen=True)
class Export:
    """help: one line. model_folder: whether the result is a Hugging Face folder, with the tokenizer in it.
    head: whether it holds a quantized lm_head; where not, the export gets it as a plain tensor.
    """

    help: str
    model_folder: bool = True
    head: bool = False


EXPORTS = {
    "gptq": Export("GPTQ with per-module `dynamic` rules, for gptqmodel"),
    "mlx": Export("MLX safetensors, lossless, for mlx-lm on Apple silicon", head=True),
    "auto-round": Export("AutoRound, symmetric, for transformers and vLLM"),
    "gguf": Export("GGUF with a type per tensor, for llama.cpp", model_folder=False, head=True),
    "recipe": Export(
        "settings for people who quantize with llama.cpp, AutoRound or GPTQModel", model_folder=False, head=True
    ),
}


def export(source: Path | str, to: str, output: Path | str) -> dict[str, Any]:
    """Exports the quantized folder `source` to the format `to`, as the folder `output`; returns the format's facts.

    output: must not exist, or be empty; it is written whole or not at all, and `source` is only read.
    Raises AmqError when the checkpoint is damaged, or cannot be expressed in the format.
    """
    if to not in EXPORTS:
        raise AmqError(f"unknown export {to!r}: expected one of {', '.join(EXPORTS)}")
    output, source = Path(output), Path(source)
    check_new_folder(output)
    with needs("export", f"amq export --to {to}"):
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    stored = checkpoint = open_checkpoint(source)
    module = importlib.import_module(f"amq.export.{to.replace('-', '_')}")
    record = stored.record
    facts: dict[str, Any] = {}
    if record.head and not EXPORTS[to].head:
        checkpoint = DenseHead(stored)
        kept = str(checkpoint.dtype).removeprefix("torch.")
        facts[record.head] = f"{record.formats[record.head]} in the checkpoint, dequantized to {kept} here"

    own_code = "auto_map" in plain_config(stored)
    if own_code:
        facts["not opened"] = "the model has code of its own, which an export does not run"

    def write(folder: Path) -> None:
        facts.update(module.write(checkpoint, folder))
        if EXPORTS[to].model_folder:
            copy_model_files(source, folder)
        readme = _readme(stored, to, module.LOADING.replace("{folder}", real_folder(output).name), facts)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        if EXPORTS[to].model_folder and not own_code:
            open_export_once(folder)

    write_folder(output, write)
    return facts


def _readme(checkpoint: Checkpoint, to: str, loading: str, facts: dict[str, Any]) -> str:
    record = checkpoint.record
    counts = Counter(record.configuration.formats.values())
    formats = ", ".join(f"{count} linears {name}" for name, count in sorted(counts.items()))
    formats += f", {record.head} {record.formats[record.head]}" if record.head else ""
    lines = [
        f"# {checkpoint.folder.resolve().name}, exported as {to}",
        "",
        f"Made by `python -m amq.export --to {to}` from an amq checkpoint: {formats}; group size {record.group_size}.",
        "",
        loading.strip(),
        "",
        "## What maps to what",
        "",
        *(f"- {phrase}: {value}" for phrase, value in facts.items()),
    ]
    return "\n".join(lines) + "\n"
