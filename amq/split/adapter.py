"""The trained LoRA: the server's half over the wire, and both halves as a folder that peft reads.

`PeftModel.from_pretrained(model, OUTPUT/adapter)` loads it, `merge_and_unload()` makes a plain model of it, and that
one can be searched and quantized like any other.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from amq.split.model import Part
from amq.split.wire import WireError
from amq.util.files import read_json, write_json
from amq.util.folders import write_folder
from amq.util.tensors import save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADER_BYTES = 512
"""Of a safetensors header per tensor, at most: names of 200 characters and two offsets."""


def half_of(part: Part) -> bytes:
    """This party's half, as safetensors."""
    from safetensors.torch import save

    return save(_own(part))


def _own(part: Part) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().float().contiguous() for name, tensor in part.trainable.items()}


def most_bytes(part: Part) -> int:
    """Bytes that `half_of` takes, at most."""
    return sum(4 * tensor.numel() + HEADER_BYTES for tensor in part.trainable.values()) + HEADER_BYTES


def read_half(data: bytes, part: Part) -> dict[str, Tensor]:
    """The other party's half. Raises WireError unless it has exactly the adapters that `part` lacks, finite float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        half = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WireError(f"the server's half of the adapter is no safetensors file: {error}") from None
    wanted = {name: shape for name, shape in part.shapes.items() if name not in part.trainable}
    if odd := sorted(wanted.keys() ^ half.keys()):
        raise WireError(
            f"the server's half of the adapter: {odd[0]} is {'missing' if odd[0] in wanted else 'not of it'}"
        )
    for name, tensor in half.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != wanted[name] or not bool(tensor.isfinite().all()):
            raise WireError(
                f"the server's half of the adapter: {name} must be finite float32 {list(wanted[name])}, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    return half


def write_adapter(folder: Path, part: Part, half: Mapping[str, Tensor]) -> None:
    """Writes the folder that peft reads, in place of one of an earlier end of the same run."""
    whole = sorted({**_own(part), **half}.items())

    def write(temporary: Path) -> None:
        save_file(dict(whole), temporary / WEIGHTS, {"format": "pt"})
        part.config.save_pretrained(str(temporary))
        config = temporary / CONFIG
        data = read_json(config)
        data["target_modules"] = sorted(data["target_modules"])  # peft keeps a set, in an order of the process
        write_json(config, data)

    if folder.is_dir():
        shutil.rmtree(folder)
    write_folder(folder, write)
