"""`load`: a folder that amq quantized, or any full-precision model, ready to generate."""

from __future__ import annotations

from pathlib import Path

from amq.backends import ACTIVATIONS, get_backend
from amq.checkpoint import is_checkpoint
from amq.errors import AmqError
from amq.models import LoadedModel, load_model


def load(
    model: Path | str,
    device: str = "cpu",
    backend: str | None = None,
    activations: str | None = None,
    dtype: str = "auto",
) -> LoadedModel:
    """Loads MODEL with its tokenizer, in evaluation mode.

    model: a folder that `amq.quantize` wrote; or what `amq.models.load_model` takes, which then runs in plain torch.
    device: where everything but packed weights goes; those are prepared there when they are first used.
    backend: a name in `amq.backends.BACKENDS`; None takes the fastest that runs the model's formats on the device.
    activations: `int8` (default, faster) or `fp32` (exact); see `amq.ops.linear`. On a backend that lacks int8, such as
        Triton, say fp32.
    dtype: of everything that is not quantized and of the activations between linears: `auto` (float32 on a CPU, the
        checkpoint's own elsewhere), float32, bfloat16 or float16.
    Raises AmqError when the folder is damaged or cannot be found, or an argument does not fit.
    """
    folder = Path(model).expanduser()
    if not is_checkpoint(folder):
        if backend is not None or activations is not None:
            raise AmqError(
                f"{model}: the model is not quantized; activations and backend are for folders that amq.quantize wrote"
            )
        return load_model(str(model), dtype, device)
    if activations not in (None, *ACTIVATIONS):
        raise AmqError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    if backend is not None:
        get_backend(backend)
    from amq.hf import AmqConfig

    how = AmqConfig(activations=activations or "int8", backend=backend)
    return load_model(str(folder), dtype, device, quantization_config=how)
