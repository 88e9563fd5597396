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

from pathlib import Path
from typing import Any

from amq.export.settings import EXPORTS, ExportSettings

__all__ = ["EXPORTS", "export"]


def export(source: Path | str, to: str, output: Path | str) -> dict[str, Any]:
    """Exports the quantized folder `source` to the format `to`, as the folder `output`; returns the format's facts.

    output: must not exist, or be empty; it is written whole or not at all, and `source` is only read.
    Raises AmqError when the checkpoint is damaged, or cannot be expressed in the format.
    """
    settings = ExportSettings(str(source), to, str(output))
    from amq.export.run import run_export

    return run_export(settings)
