"""`load`: a folder that amq quantized, or any full-precision model, ready to generate.

A quantized model of a family that our engines know runs on the native engine on a CPU, on the CUDA engine on an NVIDIA
GPU, and transformers is not even imported. Every other one runs in transformers' own forward; the engine's banner says
which it is, and why.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import Checkpoint, is_checkpoint, open_checkpoint
from amq.errors import AmqError
from amq.kernels.backends import choose_backend, default_activations
from amq.runtime.cache_kinds import advice_text
from amq.runtime.engine import Engine
from amq.runtime.settings import AUTO_CACHE, LoadSettings
from amq.runtime.tokenizer import Tokenizer
from amq.runtime.tokenizer_files import EndTokens
from amq.util.extras import needs
from amq.util.limits import fit_threads
from amq.util.records import parse_record

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from amq.model.open import LoadedModel
    from amq.runtime.cuda_engine import CudaEngine
    from amq.runtime.native_engine import NativeEngine


@dataclass(frozen=True)
class Runtime:
    """A loaded model.

    name: as the user gave it. device: where it runs, such as `cpu` or `cuda:0`.
    weight_bytes: of the weights that one decoded token reads. record: how it was quantized, if it was.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    weight_bytes: int
    device: str = "cpu"
    record: QuantizationRecord | None = None


def load(model: Path | str, **settings: Any) -> Runtime:
    """Loads MODEL with its tokenizer.

    model: a folder that `amq.quantize` wrote; or what `amq.model.open.load_model` takes, which then runs in plain
        torch.
    settings: fields of `amq.runtime.settings.LoadSettings`, which says what they do.
    Raises AmqError when the folder is damaged or cannot be found, or an argument does not fit.
    """
    how = LoadSettings.make(**settings)
    folder = Path(model).expanduser()
    quantized = is_checkpoint(folder)
    if not quantized and (how.backend is not None or how.activations is not None):
        raise AmqError(
            f"{model}: the model is not quantized; activations and backend are for folders that amq.quantize wrote"
        )
    if how.threads is not None:
        import torch

        torch.set_num_threads(how.threads)
    else:
        fit_threads()
    checkpoint = open_checkpoint(folder, verify=False) if quantized else None
    engine, why = (None, "") if checkpoint is None else _load_own(checkpoint, how)
    if checkpoint is not None and engine is not None:
        tokenizer = Tokenizer.from_folder(folder)
        return Runtime(str(model), engine, tokenizer, engine.weight_bytes, how.device, checkpoint.record)
    return _load_torch(str(model), checkpoint, how, why)


def _load_own(checkpoint: Checkpoint, how: LoadSettings) -> tuple[NativeEngine | CudaEngine | None, str]:
    """An engine of our own, or why there is none for this model and these settings."""
    on_gpu = how.device.partition(":")[0] == "cuda"
    backend, dtypes = ("cuda", ("auto", "float16", "bfloat16")) if on_gpu else ("cpu", ("auto", "float32"))
    if how.device != "cpu" and not on_gpu:
        return None, "engines of our own are for the devices cpu and cuda"
    if how.backend not in (None, backend) or how.dtype not in dtypes:
        name = "CUDA" if on_gpu else "native"
        return None, f"the {name} engine is for device {backend}, backend {backend} and {' or '.join(dtypes[1:])}"
    if on_gpu:
        from amq.model.open import check_device

        check_device(how.device)
    if choose_backend(sorted(set(checkpoint.record.formats.values())), how.device) != backend:
        return None, f"backend {backend} does not run its formats here"  # what it lacks has been logged
    from amq.runtime.families import Unsupported

    try:
        return (_load_cuda if on_gpu else _load_native)(checkpoint, how), ""
    except Unsupported as reason:
        return None, str(reason)


def _load_native(checkpoint: Checkpoint, how: LoadSettings) -> NativeEngine:
    from amq.runtime.native_engine import open_native

    return open_native(
        checkpoint, how.activations or "int8", how.context, how.max_sequences, how.threads, how.cache,
        prompt_cache=how.prompt_cache, prompt_cache_folder=how.prompt_cache_folder, state_cache=how.state_cache,
    )  # fmt: skip


def _load_cuda(checkpoint: Checkpoint, how: LoadSettings) -> CudaEngine:
    from amq.runtime.cuda_engine import open_cuda

    if how.prompt_cache is not None:
        raise AmqError("a prompt cache on disk is for the native engine: leave --prompt-cache out with --device cuda")
    return open_cuda(
        checkpoint, how.device, how.activations or "fp32", how.dtype, how.context, how.max_sequences,
        how.cache, how.state_cache,
    )  # fmt: skip


def _default_activations(checkpoint: Checkpoint, device: str, backend: str | None) -> str:
    """Those of `backend`, or of the one that the formats of the checkpoint get on `device`."""
    if backend is None and device != "cpu":
        return default_activations("cuda")  # like those of every other backend of a GPU
    return default_activations(backend or choose_backend(checkpoint.record.multiplied))


def _load_torch(model: str, checkpoint: Checkpoint | None, settings: LoadSettings, why: str) -> Runtime:
    from amq.model.open import load_model
    from amq.runtime.torch_engine import TorchEngine

    for given, what in (
        (settings.prompt_cache, "a prompt cache on disk"),
        (settings.state_cache, "a state cache"),
        (None if settings.cache == AUTO_CACHE else settings.cache, "the choice of a KV cache"),
    ):
        if given is not None:
            raise AmqError(
                f"{what} is for engines of our own, {model} runs in transformers ({why or 'it is not quantized'})"
            )
    device, backend = settings.device, settings.backend
    how: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if checkpoint is not None:
        if checkpoint.record.cache:
            log.warning(
                "%s asks for keys and values in %s, which transformers does not have: they stay in the model's dtype",
                model, advice_text(checkpoint.record),
            )  # fmt: skip
        with needs("models", f"running {model} through transformers ({why})"):
            from amq.integrations.transformers import AmqConfig

        activations = settings.activations or _default_activations(checkpoint, device, backend)
        how |= {"quantization_config": AmqConfig(activations=activations, backend=backend)}
    loaded = load_model(str(checkpoint.folder) if checkpoint else model, settings.dtype, device, **how)
    engine = TorchEngine(loaded.model, settings.context, settings.max_sequences, why=why)
    tokenizer = Tokenizer.from_transformers(loaded.tokenizer, _end_ids(model, loaded))
    record = None if checkpoint is None else checkpoint.record
    return Runtime(model, engine, tokenizer, engine.weight_bytes, str(loaded.model.device), record)


def _end_ids(model: str, loaded: LoadedModel) -> list[int]:
    """Those of generation_config.json, or else config.json, and the tokenizer's own."""
    given = {"eos_token_id": loaded.model.generation_config.eos_token_id}
    end_ids = parse_record(given, EndTokens, f"{model}: generation_config.json").end_ids
    own = loaded.tokenizer.eos_token_id
    return end_ids if own is None else [*end_ids, own]
