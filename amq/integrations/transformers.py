"""transformers loads, runs and saves amq checkpoints: AutoModelForCausalLM.from_pretrained(DIR) after `import amq`.

transformers calls `AmqQuantizer` around its own loading. Before it, the checkpoint's files are verified, fused experts
become linears (`amq.model.experts`), and the
quantized linears of the still empty model become `StoredLinear`s; transformers then loads every other tensor, places it
and casts it as it always does; afterwards each quantized linear takes its tensors, memory-mapped and as they are. So no
dtype or device argument touches them. Saving writes them back with their hashes.

A checkpoint of a causal LM also loads as the base model alone (AutoModel), and with another head, which transformers
makes anew: names of the file and of the model then differ in the base model's prefix, as they do for transformers.

`import amq` imports this file at the moment when transformers loads its quantizers (amq/__init__.py).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from amq.checkpoint.record import METHOD, QuantizationRecord, check_parts
from amq.checkpoint.store import check_complete, check_tensors
from amq.errors import AmqError
from amq.formats import get_format
from amq.kernels.cpu import dequantized
from amq.kernels.embedding import OwnEmbedding, StoredEmbedding
from amq.kernels.modules import Execution, StoredLinear
from amq.model.auto import CAUSAL, IMAGES
from amq.model.experts import unfuse
from amq.model.inventory import get_linear
from amq.packing import PARTS, PackedWeight, part_names
from amq.util.tensors import HASHES, hashes_metadata, open_files, verify_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEEDS = "5.14"
"""The oldest transformers that this was run with."""
HOOKS = ("register_quantizer", "register_quantization_config", "LOADING_ATTRIBUTES_CONFIG_TYPES")
"""What `register` wants of transformers.quantizers.auto."""


class AmqConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json; given to from_pretrained, it says how to run a checkpoint.

    activations: `fp32` multiplies exactly, `int8` rounds activations to 8 bits, which is faster; see
        `amq.kernels.ops.linear`.
    backend: a name in `amq.kernels.backends.BACKENDS`; None takes the fastest for the device that the input is on.
    verify: compare the hash of every tensor before anything is computed; False loads without reading the files.
    stored: what the checkpoint's config.json says, unknown keys included; empty where a caller writes
        `AmqConfig(activations="int8")`.
    """

    quant_method: Any  # a text; transformers has an enumeration of its own methods

    def __init__(
        self,
        activations: str = "fp32",
        backend: str | None = None,
        verify: bool = True,
        **stored: Any,
    ) -> None:
        self.quant_method = METHOD
        self.activations, self.backend, self.verify = activations, backend, verify
        self.stored = stored

    def get_loading_attributes(self) -> dict[str, Any]:
        """What from_pretrained's argument overrides."""
        return {name: getattr(self, name) for name in ("activations", "backend", "verify")}

    def store(self, record: QuantizationRecord) -> None:
        """Makes `record`, by the names of the loaded model, what is saved; keys that this amq does not know stay."""
        some = {"-": "-"}
        full = QuantizationRecord({}, {}, record.group_size, "", (), "-", some, {"-": (1, 1)}, cache=some)
        known = full.json()
        self.stored = {**{k: v for k, v in self.stored.items() if k not in known}, **record.json()}

    def to_dict(self) -> dict[str, Any]:
        """How it was loaded is not part of what is saved."""
        return dict(self.stored)


class AmqQuantizer(HfQuantizer):
    """The hooks that transformers calls around loading and saving."""

    quantization_config: AmqConfig

    def __init__(self, quantization_config: AmqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise AmqError("this model is not quantized: run `python -m amq.quantize` and load the folder it writes")
        self._packed: dict[str, PackedWeight] = {}
        self._new: frozenset[str] = frozenset()
        self._names: _LocalNames | None = None
        self._record = QuantizationRecord.parse(quantization_config.stored, "config.json")

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses maps that would need linears moved to and fro while the model runs."""
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, Mapping) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise AmqError(
                f"device_map puts parts of the model on {', '.join(sorted(devices))}: amq does not move weights while "
                'the model runs; take device_map="cpu", more or larger GPUs, or a smaller --target-bits'
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(name) for name in checkpoint_files or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise AmqError(
                f"transformers {transformers.__version__} gave amq no safetensors files to load (got {files}): load a "
                f"checkpoint folder by its path, with transformers {NEEDS} or newer"
            )
        for file in files if self.quantization_config.verify else ():
            verify_file(file)
        tensors = open_files(files)
        check_complete(files[0].parent, (n for linear in self._record.formats for n in part_names(linear)), tensors)
        if self._record.has_experts:
            unfuse(model)
        names = self._names = _LocalNames(model, self._record)
        for linear, local in names.linears(self._record).items():
            parts = (tensors[name].get_tensor(name) for name in part_names(linear))
            self._packed[local] = check_parts(linear, self._record, *parts)  # memory-mapped, nothing is read yet
        self._record = record = names.record(self._record)
        self._put_stored_modules(model)
        found = {names.tensor(name) for name in tensors}
        self._new = _new_names(model) - found
        check_complete(files[0].parent, (n for n in _expected_names(model, found) if n not in self._new), found)
        check_tensors(tensors, model.state_dict(), names.tensor)
        if record.head or record.embedding:
            model.__dict__["resize_token_embeddings"] = _refuse_resizing
        ignored: set[str] = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"\.({'|'.join(PARTS)})$"}

    def _put_stored_modules(self, model: PreTrainedModel) -> None:
        """Replaces what is quantized by modules without a weight yet."""
        record, config = self._record, self.quantization_config
        execution = Execution(config.activations, config.backend, record.multiplied)
        for name in (n for n in record.formats if n not in record.own_embeddings):
            linear = _stored_linear(model, name, record, execution)
            linear.__dict__["_is_hf_initialized"] = True  # else each is filled with random numbers, in vain
            _replace(model, name, linear)
        for name in record.embedding:
            _replace(model, name, _stored_embedding(model, name, record))
            _untie(model, name)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Without those that make other tensors of the file's, such as fused experts: ours are the model's own."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming  # versions too old lack them

        kept = [conversion for conversion in weight_conversions if not isinstance(conversion, WeightConverter)]
        theirs, ours = self._names.text if self._names else ("", "")
        return [*kept, WeightRenaming(f"^{re.escape(theirs)}", ours)] if theirs != ours else kept

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        place = cache(partial(_device_in, model))
        for name in list(self._packed):
            module = cast("StoredLinear | OwnEmbedding", model.get_submodule(name))
            module.store(self._packed.pop(name))
            if isinstance(module, StoredLinear):
                module.place = place(name.rpartition(".")[0])
        for name, module in model.named_modules():
            if isinstance(module, StoredEmbedding):
                module.initialize(_owner(model, name))
        for name, parameter in model.named_parameters():  # what was quantized stays as it is: adapters are trained
            parameter.requires_grad_(name in self._new)
        self.quantization_config.store(self._record)
        model.__dict__["num_parameters"] = partial(_num_parameters, model)
        model.__dict__["_weight_conversions"] = []  # tensors are saved by the names of this model's modules
        if type(model).__module__.startswith("transformers.") and hasattr(model.config, "auto_map"):
            for auto in (CAUSAL, IMAGES):
                model.config.auto_map.pop(auto, None)  # save_pretrained does not copy the file that it names

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *_: Any, **__: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The header of every shard gets the hashes of all tensors: transformers gives all shards one header."""
        state = model.state_dict()
        return state, {HASHES: hashes_metadata(state)[HASHES]}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved config has it as text
        embeddings = {n: m for n, m in model.named_modules() if isinstance(m, StoredEmbedding)}
        device, dtype = model.device, dtype or torch.float32
        dense: dict[StoredLinear, nn.Linear] = {}
        for name, module in list(_stored_linears(model)):
            dense[module] = _dense(module, device, dtype)
            _replace(model, name, dense[module])
        for name, embedding in embeddings.items():
            head = embedding.head
            weight = _plain(embedding.source(), device, dtype) if head is None else dense[head].weight
            _replace(model, name, embedding.restored(cast(nn.Parameter, weight)))
        if any(embedding.head is not None for embedding in embeddings.values()):
            _tie_again(model)
        for name in ("resize_token_embeddings", "num_parameters"):
            model.__dict__.pop(name, None)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # beside the packed weights: adapters, new heads

    @property
    def is_compileable(self) -> bool:
        return True


class _LocalNames:
    """What a checkpoint's tensors and modules are called in `model`, which may be, or lack, the model around its base.

    transformers finds tensors in the same way: it takes the base model's prefix away, or adds it, where that fits.

    text: (prefix in the file, prefix in the model) of a text model's modules where the checkpoint is of a model that
    has images or sound beside it, and `model` is the text model alone, or the other way round; else equal.
    """

    def __init__(self, model: PreTrainedModel, record: QuantizationRecord) -> None:
        self._prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        self._modules = {name for name, _ in model.named_modules()}
        self._tensors = set(model.state_dict())
        self.text = ("", "")
        inner = next((name for name in record.block_shapes if self.module(name) not in self._modules), None)
        if inner is not None:
            self.text = _prefixes(inner, self._modules)

    def module(self, name: str) -> str:
        return self._find(name, self._modules)

    def tensor(self, name: str) -> str:
        return self._find(name, self._tensors)

    def _find(self, name: str, known: Container[str]) -> str:
        theirs, ours = self.text
        swapped = ours + name.removeprefix(theirs) if theirs != ours and name.startswith(theirs) else name
        bare = name.removeprefix(self._prefix)
        return next((n for n in (bare, f"{self._prefix}{name}", swapped) if n != name and n in known), name)

    def linears(self, record: QuantizationRecord) -> dict[str, str]:
        """{name in the file: name in the model} of the quantized linears, without a head that nothing needs.

        A head that the model lacks, but that its embedding is read from, stays, as a module beside the base model.
        """
        linears = {linear: self.module(linear) for linear in record.formats}
        if record.head and linears[record.head] not in self._modules:
            linears[record.head] = record.head.rpartition(".")[2]
            if record.head not in record.embedding.values():
                del linears[record.head]
        return linears

    def record(self, record: QuantizationRecord) -> QuantizationRecord:
        """`record` by the model's names, of the linears that it needs."""
        linears = self.linears(record)
        return replace(
            record,
            formats={local: record.formats[linear] for linear, local in linears.items()},
            shapes={local: record.shapes[linear] for linear, local in linears.items()},
            shared_inputs=tuple(tuple(linears[n] for n in group if n in linears) for group in record.shared_inputs),
            head=linears.get(record.head, ""),
            embedding={self.module(name): linears[head] for name, head in record.embedding.items()},
            kept={self.module(linear): shape for linear, shape in record.kept.items()},
        )


def _prefixes(name: str, known: set[str]) -> tuple[str, str]:
    """(prefix of `name`, prefix of the module in `known`) for the one module that ends like `name` at its longest, from
    the list of blocks on; both empty where there are several or none."""
    parts = name.split(".")
    before = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    for start in range(1, before):
        rest = ".".join(parts[start:])
        found = [module for module in known if module == rest or module.endswith(f".{rest}")]
        if found:
            return (name.removesuffix(rest), found[0].removesuffix(rest)) if len(found) == 1 else ("", "")
    return "", ""


def _new_names(model: PreTrainedModel) -> frozenset[str]:
    """Tensors that no checkpoint of the model's base has: those of a head, in a class that is not the checkpoint's own.

    transformers initialises them, and says so.
    """
    saved_as = set(model.config.architectures or ())
    if saved_as & {cls.__name__ for cls in type(model).__mro__} or model.base_model is model:
        return frozenset()
    prefix = f"{model.base_model_prefix}."
    return frozenset(name for name in model.state_dict() if not name.startswith(prefix))


def _num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """In place of model.num_parameters: as many as the original model has, packed ones included."""
    count = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return count
    embeddings = [m for m in model.modules() if isinstance(m, StoredEmbedding)]
    heads = [m.head for m in embeddings] if exclude_embeddings else []
    own = [] if exclude_embeddings else [m.num_embeddings * m.embedding_dim for m in embeddings if m.head is None]
    linears = [module for _, module in _stored_linears(model) if module not in heads]
    return count + sum(own) + sum(module.in_features * module.out_features for module in linears)


def _stored_linear(model: PreTrainedModel, name: str, record: QuantizationRecord, execution: Execution) -> StoredLinear:
    """An empty StoredLinear in place of the nn.Linear `name`, or an error where the two are not of one shape."""
    fmt = get_format(record.formats[name])
    if name == record.head and name not in dict(model.named_modules()):  # of a base model, whose embedding reads it
        return StoredLinear(
            fmt, record.shapes[name], record.group_size, execution, name=name, rotation=record.rotation.get(name, 0)
        )
    linear = get_linear(model, name)
    shape = (linear.out_features, linear.in_features)
    if shape != record.shapes[name]:
        raise AmqError(
            f"{name}: the model's config.json makes it {list(shape)}, the checkpoint has {list(record.shapes[name])}: "
            "config.json was altered, or belongs to another model"
        )
    rotation = record.rotation.get(name, 0)
    return StoredLinear(fmt, shape, record.group_size, execution, linear.bias, name, rotation)


def _stored_embedding(model: nn.Module, name: str, record: QuantizationRecord) -> StoredEmbedding:
    """In place of the nn.Embedding `name`, whose rows a packed weight has: a linear's, put there before, or its own."""
    embedding, source = _get_embedding(model, name), record.embedding[name]
    shape, expected = (embedding.num_embeddings, embedding.embedding_dim), record.shapes[source]
    if shape != expected:
        which = "the checkpoint has" if source == name else f"it is tied to {source} of"
        raise AmqError(
            f"{name}: the model's config.json makes it {list(shape)}, but {which} {list(expected)}: config.json was "
            "altered, or belongs to another model"
        )
    if source == name:
        return OwnEmbedding(embedding, get_format(record.formats[name]), record.group_size, name)
    return StoredEmbedding(embedding, cast(StoredLinear, model.get_submodule(source)))


def _get_embedding(model: nn.Module, name: str) -> nn.Embedding:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AmqError(f"embedding {name!r} is not in this {type(model).__name__}") from None
    if not isinstance(module, nn.Embedding):
        raise AmqError(f"{name!r} is a {type(module).__name__}, expected an nn.Embedding")
    return module


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost of transformers' models that holds the module `name`: it knows how to initialise it."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, transformers.PreTrainedModel):
            return module
    return model


def _untie(model: PreTrainedModel, embedding: str) -> None:
    """Takes the embedding out of what transformers ties after loading, and whenever it is asked to: there is one copy
    already. config.tie_word_embeddings stays: it tells what the model is."""
    weight = f"{embedding}.weight"
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if weight not in (k, v)}
    model._tied_weights_keys = dict(model.all_tied_weights_keys)  # of this model; its class keeps its own


def _refuse_resizing(*_: Any, **__: Any) -> None:
    """In place of model.resize_token_embeddings, which would change the embedding before it fails at the head."""
    raise AmqError(
        "the head of this model is quantized, its vocabulary cannot change: call model.dequantize() first, or resize "
        "the original model and quantize that"
    )


def _tie_again(model: PreTrainedModel) -> None:
    """Undoes `_untie`, for a model that has plain linears again."""
    model.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def _device_in(model: PreTrainedModel, name: str) -> torch.device:
    """Where the parameters nearest to the module `name` are, inside it or around."""
    while name:
        parameter = next(model.get_submodule(name).parameters(), None)
        if parameter is not None:
            return parameter.device
        name = name.rpartition(".")[0]
    return model.device


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _stored_linears(model: nn.Module) -> Iterator[tuple[str, StoredLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StoredLinear))


def _expected_names(model: PreTrainedModel, found: Any) -> list[str]:
    """Every tensor that the model wants besides packed weights; of tied ones, one is enough."""
    tied = model.all_tied_weights_keys  # {name: the name that it shares its tensor with}
    present = {name for pair in tied.items() if not found.isdisjoint(pair) for name in pair}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [n for n in model.state_dict() if n not in present and not any(p.search(n) for p in optional)]


def _dense(module: StoredLinear, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """The nn.Linear that `module` stands for, its weight dequantized in float32 and rounded once."""
    if module.packed is None:
        raise AmqError(f"{module.name} has no weight yet: nothing to dequantize")
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    linear.weight = _plain(module.packed, device, dtype)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.to(device, dtype), requires_grad=False)
    return linear.eval()


def _plain(packed: PackedWeight, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(dequantized(packed).to(device, dtype), requires_grad=False)


class _TooOld(QuantizationConfigMixin):
    """Stands in for AmqConfig where transformers lacks what amq needs; the error comes when a checkpoint is loaded."""

    def __init__(self, **kwargs: Any) -> None:
        raise AmqError(
            f"transformers {transformers.__version__} cannot load amq checkpoints: amq needs {NEEDS} or newer; "
            f"run `pip install 'transformers>={NEEDS}'`"
        )


def register() -> None:
    """Makes transformers know `quant_method` amq, or refuse it with a reason. Called on import, once or more."""
    if METHOD in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    if Version(transformers.__version__) < Version(NEEDS) or not all(hasattr(auto, hook) for hook in HOOKS):
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _TooOld
        return
    auto.register_quantization_config(METHOD)(AmqConfig)
    auto.register_quantizer(METHOD)(AmqQuantizer)
    # There is no function for this one: without it, from_pretrained ignores AmqConfig(activations=…).
    known: tuple[Any, ...] = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    vars(auto)["LOADING_ATTRIBUTES_CONFIG_TYPES"] = (*known, AmqConfig)


register()
