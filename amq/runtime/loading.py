"""`load`: a folder that amq quantized, or any full-precision model, ready to generate."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from amq.backends import ACTIVATIONS, get_backend
from amq.checkpoint import is_checkpoint
from amq.errors import AmqError
from amq.models import DTYPES, LoadedModel, load_model

FULL_PRECISION_TAKES = "the model is not quantized: --activations and --backend are for folders that amq.quantize wrote"


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
    if dtype != "auto" and dtype not in DTYPES:
        raise AmqError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    folder = Path(model).expanduser()
    if not is_checkpoint(folder):
        if backend is not None or activations is not None:
            raise AmqError(f"{model}: {FULL_PRECISION_TAKES}")
        return load_model(str(model), dtype, device)
    if activations not in (None, *ACTIVATIONS):
        raise AmqError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    if backend is not None:
        get_backend(backend)
    return _load_checkpoint(folder, device, backend, activations or "int8", dtype)


def _load_checkpoint(folder: Path, device: str, backend: str | None, activations: str, dtype: str) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from amq.hf import AmqConfig

    try:
        on_cpu = torch.empty(0, device=device).is_cpu
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA that is asked for it
        raise AmqError(f"device {device!r} cannot be used here: {str(error).strip().splitlines()[0]}") from error
    target = DTYPES[dtype] if dtype != "auto" else torch.float32 if on_cpu else "auto"
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # it says that ours is used
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=target, quantization_config=AmqConfig(activations=activations, backend=backend)
            )
        model.to(device)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise AmqError(f"transformers could not load {folder} on {device}: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise AmqError(
            f"{folder} has no usable tokenizer ({error}): copy the original model's tokenizer files"
        ) from error
    return LoadedModel(model.eval(), tokenizer, str(folder))
