"""`load`: a folder that amq quantized, or any full-precision model, ready to generate.

A quantized model of a family that the native engine knows runs on it, and transformers is not even imported. Every
other one runs in transformers' own forward; the engine's banner says which it is, and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.checkpoint.store import Checkpoint, is_checkpoint, open_checkpoint
from amq.errors import AmqError
from amq.kernels.backends import ACTIVATIONS, choose_backend, default_activations, get_backend
from amq.runtime.engine import Engine
from amq.runtime.tokenizer import Tokenizer
from amq.runtime.tokenizer_files import EndTokens
from amq.util.limits import fit_threads
from amq.util.records import parse_record


@dataclass(frozen=True)
class Runtime:
    """A loaded model.

    name: as the user gave it. device: where it runs, such as `cpu` or `cuda:0`.
    weight_bytes: of the weights that one decoded token reads.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    weight_bytes: int
    device: str = "cpu"


def load(
    model: Path | str,
    device: str = "cpu",
    backend: str | None = None,
    activations: str | None = None,
    dtype: str = "auto",
    context: int | None = None,
    max_sequences: int = 1,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Runtime:
    """Loads MODEL with its tokenizer.

    model: a folder that `amq.quantize` wrote; or what `amq.model.open.load_model` takes, which then runs in plain
        torch.
    device: where everything but packed weights goes; those are prepared there when they are first used.
    backend: a name in `amq.kernels.backends.BACKENDS`; None takes the fastest that runs the model's formats on the
        device.
    activations: `int8` (faster on a CPU) or `fp32` (exact); see `amq.kernels.ops.linear`. None takes int8 on backend
        cpu, and fp32 on every other one: on a GPU int8 costs a launch for each linear. Triton and reference refuse
        int8.
    dtype: of everything that is not quantized and of the activations between linears: `auto` (float32 on a CPU, the
        checkpoint's own elsewhere), float32, bfloat16 or float16.
    context: positions that a sequence may have; None takes the model's own, or less where memory is set aside for it.
    max_sequences: that run at once.
    threads: on the CPU; None leaves torch's number, lowered to what a container's limits allow.
    trust_remote_code: see `amq.model.open.load_model`.
    Raises AmqError when the folder is damaged or cannot be found, or an argument does not fit.
    """
    folder = Path(model).expanduser()
    quantized = is_checkpoint(folder)
    _check(model, quantized, backend, activations, max_sequences, threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    else:
        fit_threads()
    checkpoint = open_checkpoint(folder, verify=False) if quantized else None
    if checkpoint is None:
        why = ""
    elif device != "cpu" or backend not in (None, "cpu") or dtype not in ("auto", "float32"):
        why = "the native engine is for device cpu, backend cpu and float32"
    elif choose_backend(sorted(set(checkpoint.record.formats.values()))) != "cpu":
        why = "backend cpu does not run its formats here"  # what it lacks has been logged
    else:
        from amq.runtime.native_engine import Unsupported, open_native

        try:
            engine = open_native(checkpoint, activations or "int8", context, max_sequences, threads)
        except Unsupported as reason:
            why = str(reason)
        else:
            return Runtime(str(model), engine, Tokenizer.from_folder(folder), engine.weight_bytes)
    return _load_torch(
        str(model), checkpoint, device, backend, activations, dtype, context, max_sequences, why,
        trust_remote_code,
    )  # fmt: skip


def _check(
    model: Path | str,
    quantized: bool,
    backend: str | None,
    activations: str | None,
    max_sequences: int,
    threads: int | None,
) -> None:
    if not quantized and (backend is not None or activations is not None):
        raise AmqError(
            f"{model}: the model is not quantized; activations and backend are for folders that amq.quantize wrote"
        )
    if activations not in (None, *ACTIVATIONS):
        raise AmqError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    if backend is not None:
        get_backend(backend)
    if max_sequences < 1:
        raise AmqError(f"max_sequences must be at least 1, got {max_sequences}")
    if threads is not None and threads < 1:
        raise AmqError(f"threads must be at least 1, got {threads}")


def _default_activations(checkpoint: Checkpoint, device: str, backend: str | None) -> str:
    """Those of `backend`, or of the one that the formats of the checkpoint get on `device`."""
    if backend is None and device != "cpu":
        return default_activations("cuda")  # like those of every other backend of a GPU
    return default_activations(backend or choose_backend(sorted(set(checkpoint.record.formats.values()))))


def _load_torch(
    model: str,
    checkpoint: Checkpoint | None,
    device: str,
    backend: str | None,
    activations: str | None,
    dtype: str,
    context: int | None,
    max_sequences: int,
    why: str,
    trust_remote_code: bool,
) -> Runtime:
    from amq.model.open import load_model
    from amq.runtime.torch_engine import TorchEngine

    how: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if checkpoint is not None:
        from amq.integrations.transformers import AmqConfig

        activations = activations or _default_activations(checkpoint, device, backend)
        how |= {"quantization_config": AmqConfig(activations=activations, backend=backend)}
    loaded = load_model(str(checkpoint.folder) if checkpoint else model, dtype, device, **how)
    engine = TorchEngine(loaded.model, context, max_sequences, why=why)
    ends = loaded.model.generation_config.eos_token_id
    if ends is None:
        ends = loaded.tokenizer.eos_token_id
    end_ids = parse_record({"eos_token_id": ends}, EndTokens, f"{model}: generation_config.json").end_ids
    tokenizer = Tokenizer.from_transformers(loaded.tokenizer, end_ids)
    return Runtime(model, engine, tokenizer, engine.weight_bytes, str(loaded.model.device))
