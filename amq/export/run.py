"""One export: the checkpoint opened, its target's module called, its README.md written."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

from amq.checkpoint.store import Checkpoint, open_checkpoint
from amq.errors import AmqError
from amq.export.common import DenseOuter, outer_weights, plain_config
from amq.export.settings import EXPORTS, HOLD_EXPERTS, ExportSettings
from amq.integrations.opening import open_export_once
from amq.model.companions import copy_model_files
from amq.util.extras import needs
from amq.util.folders import check_new_folder, real_folder, write_folder


def run_export(settings: ExportSettings) -> dict[str, Any]:
    """Exports a quantized folder; see `amq.export.export`."""
    source, to, output = Path(settings.checkpoint), settings.to, Path(settings.output)
    target = EXPORTS[to]
    check_new_folder(output)
    with needs("export", f"amq export --to {to}"):
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    stored = checkpoint = open_checkpoint(source)
    module = importlib.import_module(f"amq.export.{to.replace('-', '_')}")
    record = stored.record
    facts: dict[str, Any] = {}
    if record.rotation and target.weights:
        raise AmqError(
            f"{source} holds {len(record.rotation)} rotated weights, such as {next(iter(record.rotation))}, which "
            "no other program multiplies: quantize again with `amq quantize … --rotation none`, and export that"
        )
    if record.has_experts and not target.experts:
        raise AmqError(
            f"the {to} export holds no experts: {target.experts_reason}; use --to {' or '.join(HOLD_EXPERTS)}"
        )
    if outer_weights(stored) and not target.head:
        checkpoint = DenseOuter(stored)
        kept = str(checkpoint.dtype).removeprefix("torch.")
        facts |= {n: f"{record.formats[n]} in the checkpoint, dequantized to {kept} here" for n in checkpoint.outer}

    own_code = "auto_map" in plain_config(stored)
    if own_code:
        facts["not opened"] = "the model has code of its own, which an export does not run"

    def write(folder: Path) -> None:
        facts.update(module.write(checkpoint, folder))
        if target.model_folder:
            copy_model_files(source, folder)
        readme = _readme(stored, to, module.LOADING.replace("{folder}", real_folder(output).name), facts)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        if target.model_folder and not own_code:
            open_export_once(folder)

    write_folder(output, write)
    return facts


def _readme(checkpoint: Checkpoint, to: str, loading: str, facts: dict[str, Any]) -> str:
    record = checkpoint.record
    outer = outer_weights(checkpoint)
    counts = Counter(fmt for name, fmt in record.configuration.formats.items() if name not in outer)
    formats = ", ".join(f"{count} linears {name}" for name, count in sorted(counts.items()))
    formats += "".join(f", {name} {record.formats[name]}" for name in outer)
    lines = [
        f"# {checkpoint.folder.resolve().name}, exported as {to}",
        "",
        f"Made by `amq export --to {to}` from an amq checkpoint: {formats}; group size {record.group_size}.",
        "",
        loading.strip(),
        "",
        "## What maps to what",
        "",
        *(f"- {phrase}: {value}" for phrase, value in facts.items()),
    ]
    return "\n".join(lines) + "\n"
