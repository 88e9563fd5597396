"""Opens what was written once, before a command says that it is done.

The model is built from the folder's own config.json on the meta device, where weights take no memory, and every tensor
that it wants must be in the folder's files, of its shape, and every tensor of the files must be wanted. Of a checkpoint
the packed linears go through `amq.integrations.transformers`, as they do when a user loads it; of an export each
packed linear must be there, and what is in it is for the other tool to read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from amq.checkpoint.record import QuantizationRecord
from amq.errors import AmqError
from amq.kernels.modules import StoredLinear
from amq.model.weight_files import weight_files
from amq.packing import PARTS
from amq.util.tensors import open_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEVERAL = 3
"""Names that an error lists."""


def open_checkpoint_once(folder: Path, trust_remote_code: bool = False) -> None:
    """Raises AmqError unless transformers could load the checkpoint `folder` and its tokenizer; reads no weights.

    trust_remote_code: run the model's own code from the folder, where it has some.
    """
    from amq.integrations.transformers import AmqConfig, AmqQuantizer

    model, config = empty_model(folder, trust_remote_code)
    files = weight_files(folder)
    stored = dict(config.quantization_config)
    quantizer = AmqQuantizer(AmqConfig(verify=False, **stored), pre_quantized=True)
    quantizer.preprocess_model(model=model, checkpoint_files=[str(path) for path in files])
    _initialize(model, folder)
    record = QuantizationRecord.parse(stored, str(folder / "config.json"))
    packed = {f"{linear}.{part}" for linear in record.formats for part in PARTS}
    _compare(folder, model, {name: shape for name, shape in _shapes(folder).items() if name not in packed}, ())
    _open_tokenizer(folder, trust_remote_code)


def open_export_once(folder: Path) -> None:
    """Raises AmqError unless config.json, weights and tokenizer of a Hugging Face folder for other tools agree."""
    model, _ = empty_model(folder)
    shapes = _shapes(folder)
    packed = tuple({name.rpartition(".")[0] for name in shapes if name.endswith((".qweight", ".scales"))})
    _compare(folder, model, shapes, packed)
    _open_tokenizer(folder)


def empty_model(folder: Path, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """The model of the folder's config.json on the meta device, and that config."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = named_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model's own code raises for a config that does not fit it
        raise AmqError(f"transformers cannot build a model from {folder / 'config.json'}: {_line(error)}") from error
    return model.eval(), config


def named_class(config: Any) -> Any:
    """The class of transformers that builds the model which `config`, as it is in a folder, names: of causal LMs, or
    where it names none of these, of models that read images beside the text."""
    import transformers

    named = set(getattr(config, "architectures", None) or ())
    classes = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    for auto in classes:
        known: Any = auto._model_mapping.get(type(config), ())
        if named & {cls.__name__ for cls in (known if isinstance(known, tuple) else (known,))}:
            return auto
    return classes[0]


def _initialize(model: PreTrainedModel, folder: Path) -> None:
    """What transformers does once all tensors are there: it offers every module to the model's own initialization,
    which may want the weight of a linear that has none any more."""
    for module in model.modules():  # as it is in a model that from_pretrained builds
        module.__dict__["_is_hf_initialized"] = isinstance(module, StoredLinear)
    try:
        model.initialize_weights()
    except Exception as error:  # of the model's own code
        raise AmqError(f"transformers cannot load {folder}: {_line(error)}") from error


def _open_tokenizer(folder: Path, trust_remote_code: bool = False) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers' own exception is a bare Exception
        raise AmqError(f"transformers cannot read the tokenizer in {folder}: {_line(error)}") from error


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a folder's weight files, from their headers."""
    return {name: tuple(file.get_slice(name).get_shape()) for name, file in open_files(weight_files(folder)).items()}


def _compare(folder: Path, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], packed: tuple[str, ...]) -> None:
    """Raises AmqError where tensors of `shapes` and those of `model` differ; packed: modules whose weight is packed."""
    state = model.state_dict(keep_vars=True)
    there = {id(state[name]) for name in shapes if name in state}  # tied tensors are stored under one of their names
    held = {id(state[f"{name}.weight"]) for name in packed if f"{name}.weight" in state}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [
        name
        for name, tensor in state.items()
        if id(tensor) not in there | held
        and name not in shapes
        and not any(tied.get(name) == other or tied.get(other) == name for other in shapes)
        and not _matches(name, optional)
    ]
    parents = tuple(f"{name}." for name in packed)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    odd = [n for n in shapes if n not in state and not n.startswith(parents) and not _matches(n, ignored)]
    wrong = [
        f"{name} {list(shape)} instead of {list(state[name].shape)}"
        for name, shape in shapes.items()
        if name in state and name.rpartition(".")[0] not in packed and tuple(state[name].shape) != shape
    ]
    for what, names in (("lacks", missing), ("holds what the model does not use:", odd), ("has", wrong)):
        if names:
            shown = ", ".join(sorted(names)[:SEVERAL])
            more = f" and {len(names) - SEVERAL} more" if len(names) > SEVERAL else ""
            raise AmqError(f"{folder} {what} {shown}{more}: config.json and the weights do not belong together")


def _matches(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _line(error: Exception) -> str:
    """What `error` says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
