"""An importance matrix for llama.cpp's quantizers: the mean square of every input feature of every linear.

llama.cpp has a program for it, `llama-imatrix`, which runs a text of its own choice in its own way. This measures the
same sums on the windows that our quantizers are calibrated on, by the same forward pass, so that all compared
quantizers see one text. As that program does by default, the head and the embedding are left out.

    python -m peers.imatrix MODEL OUTPUT TEXT WINDOWS LENGTH SEED        # from the folder benchmarks/

A file is in the older of its two forms, which llama.cpp and ik_llama.cpp both read: int32 counts, little-endian.

    entries | name length, name, calls, features, float32 sums over the calls … | calls of all, length, name of the text
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amq.errors import AmqError
from amq.util.files import write_atomic


def measure(model: str, calibration: str, windows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """{tensor's name in a GGUF file: float32 [in_features], mean of x²}, of the linears of all blocks.

    model, calibration, windows, length, seed: as `amq quantize` takes them, and the same windows.
    """
    import torch  # here, so that who only reads a file need not wait for it

    from amq.model.gguf.families import find_family
    from amq.model.gguf.keys import n_layers
    from amq.model.gguf.places import Places
    from amq.model.inventory import EXPERT, get_linear
    from amq.model.opened import open_model
    from amq.util.progress import terminal_progress

    opened = open_model(model)
    linears = opened.inventory.linears
    if expert := next((spec for spec in linears if spec.kind == EXPERT), None):
        raise AmqError(f"{expert.name} is an expert's, whose importance is not measured here: give a dense model")
    config = opened.loaded.config.to_dict()
    places = Places(find_family(config), config, n_layers(config))
    sums = {spec: torch.zeros(spec.in_features, dtype=torch.float64) for spec in linears}

    def add(spec: Any, x: torch.Tensor) -> None:
        sums[spec] += x.reshape(-1, spec.in_features).square().sum(dim=0)

    for spec in linears:
        module = get_linear(opened.model, spec.name)
        module.register_forward_pre_hook(lambda _, args, spec=spec: add(spec, args[0]))
    tokens = opened.sampler(calibration, length, seed, windows).take(windows)
    with terminal_progress().stage("importance matrix", windows) as step, torch.no_grad():
        for window in tokens.split(1):
            opened.model.base_model(input_ids=window, use_cache=False)
            step()
    means = {spec: (total / tokens.numel()).float().numpy() for spec, total in sums.items()}
    return {place.name: means[spec] for spec in linears for place in places.of(f"{spec.name}.weight")}


def write(path: Path, means: Mapping[str, np.ndarray], text: str) -> None:
    """One call of each linear; text: what the windows are of."""
    parts = [struct.pack("<i", len(means))]
    for name, values in means.items():
        encoded = name.encode()
        parts += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", 1, len(values))]
        parts.append(np.ascontiguousarray(values, "<f4").tobytes())
    encoded = text.encode()
    parts += [struct.pack("<ii", 1, len(encoded)), encoded]
    write_atomic(path, lambda temporary: temporary.write_bytes(b"".join(parts)))


def read(path: Path) -> dict[str, np.ndarray]:
    """What `write` wrote; means, where a file of `llama-imatrix` holds sums over several calls."""
    data, at, found = path.read_bytes(), 4, {}
    try:
        (entries,) = struct.unpack_from("<i", data)
        for _ in range(entries):
            (length,) = struct.unpack_from("<i", data, at)
            name = data[at + 4 : at + 4 + length].decode()
            calls, features = struct.unpack_from("<ii", data, at + 4 + length)
            at += 12 + length
            found[name] = np.frombuffer(data, "<f4", features, at) / np.float32(max(calls, 1))
            at += 4 * features
    except (struct.error, ValueError) as error:  # of Unicode, too
        raise AmqError(f"{path} is not an importance matrix in llama.cpp's older form: {error}") from error
    return found


if __name__ == "__main__":
    model, output, calibration, *numbers = sys.argv[1:]
    write(Path(output), measure(model, calibration, *map(int, numbers)), calibration)
