"""BankedSettings: what comparisons are told that measure many configurations of one model from a bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amq.formats import FORMATS, KEPT
from amq.kernels.names import ACTIVATIONS, BACKENDS
from amq.model.settings import CALIBRATION_TEXTS, MODEL, LoadSettings
from amq.quantize.methods import ROTATION_HELP, ROTATIONS
from amq.search.settings import AUTO, NATIVE, SearchSettings
from amq.util.settings import CHOOSE, MEASURE, REQUIRED, RUN, flag, parse_size


@dataclass(frozen=True, kw_only=True)
class BankedSettings(LoadSettings):
    """The linears of the blocks have the formats; head and embeddings stay in 16 bits, and sizes are bits per weight of
    the linears."""

    model: str = flag(REQUIRED, MODEL, positional=True)
    output: str = flag(
        REQUIRED, "folder of the table; a table of the same settings in it goes on where it stopped", RUN,
        metavar="FOLDER",
    )  # fmt: skip
    formats: str = flag("int2,int3,int4", f"candidate formats, of {', '.join(FORMATS)}", CHOOSE, metavar="LIST")
    group_size: int = flag(64, "input features per scale: 32, 64 or 128", CHOOSE, metavar="G")
    rotation: str = flag(AUTO, ROTATION_HELP, MEASURE, choices=ROTATIONS)
    calibration: str = flag("pydoc", f"text: {CALIBRATION_TEXTS}", MEASURE, metavar="TEXT")
    window_length: int = flag(256, "tokens per window, BOS included", MEASURE, least=2, metavar="N")
    windows: int = flag(2, "windows of the loss", MEASURE, least=1, metavar="N")
    bank_windows: int = flag(24, "windows that calibrate a bank, where its quantizer looks at some", MEASURE, least=1,
                             metavar="N")  # fmt: skip
    backend: str = flag(AUTO, "what runs the candidates, as of amq search", choices=(AUTO, NATIVE, *BACKENDS))
    activations: str = flag(
        "fp32", "int8 rounds activations as deployed, of what a kernel can run", choices=ACTIVATIONS
    )
    cache_memory: str | int = flag("256MiB", "as of amq search", parse=parse_size, metavar="SIZE")

    def search_with(self, proxy: str, seed: int, cost_passes: int, **more: Any) -> SearchSettings:
        """The settings of a search on the same model, windows and loss, and a bank by the quantizer `proxy`."""
        shared = (
            "model", "output", "formats", "group_size", "rotation", "calibration", "window_length", "windows",
            "bank_windows", "backend", "activations", "cache_memory", "dtype", "device", "trust_remote_code", "load",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in shared} | {"confirm_windows": self.windows, "head": KEPT.name}
        return SearchSettings.make(**given, proxy=proxy, seed=seed, cost_passes=cost_passes, **more)


FREE = frozenset({"output", "cache_memory", "load", "trust_remote_code"})
"""What may change between a table and its continuation, in every comparison: it alters no figure."""
