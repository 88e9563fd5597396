"""What `amq serve MODEL` is going to do with MODEL, said before it takes the time."""

from __future__ import annotations

from pathlib import Path

from amq.checkpoint.store import is_checkpoint
from amq.model.open import ALIASES
from amq.serve.settings import ServeSettings


def plan(model: str, settings: ServeSettings) -> str:
    """One line; "" for what cannot be a model, which loading it will say.

    A hub id is not asked for here: whether the hub knows it is seen when it is loaded.
    Raises AmqError where a folder's config.json cannot be read.
    """
    folder = Path(model).expanduser()
    if is_checkpoint(folder):
        return f"{model} is quantized by amq: loading it"
    slow = f"it runs {_bits(settings)} through transformers, slowly and with much memory; "
    slow += f"faster: amq quantize {model} --uniform int4 --output NAME, then amq serve NAME"
    if model in ALIASES or folder.suffix == ".gguf":
        return f"{model} is a GGUF file: it is dequantized once, into the cache; {slow}"
    if folder.is_dir():
        return f"{model} is not quantized by amq: {slow}"
    return "" if folder.exists() else _from_hub(model, slow)


def _bits(settings: ServeSettings) -> str:
    if settings.dtype == "auto":
        return "in 32 bits" if settings.device == "cpu" else "in the dtype of its files"
    return "in 32 bits" if settings.dtype == "float32" else "in 16 bits"


def _from_hub(model: str, slow: str) -> str:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:  # no name that a hub could have
        return ""
    where = (
        "is in the local cache of the Hugging Face hub" if cached else "will be downloaded from the Hugging Face hub"
    )
    return f"{model} {where}; {slow}"
