"""Opens a model that is larger than memory: its blocks stay in the folder's files until they are needed.

The model is built on meta, as transformers builds it; what is outside of the blocks is read at once, and blocks as
`amq.model.paging` asks for them, in the dtype that the model computes in. So a 16-bit model computes in float32 on a
processor without ever being there in float32.

A twin of the model on meta, whose modules stay as transformers makes them, is what the files' names mean
(`amq.model.weight_source`); in the model itself experts are linears (`amq.model.experts`).
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.auto import auto_class, other_parts
from amq.model.experts import is_fused, unfuse, views_of
from amq.model.inventory import find_blocks
from amq.model.paging import ATTRIBUTE, Pager
from amq.model.weight_source import WeightSource, quantizer_of
from amq.util.extras import needs
from amq.util.limits import check_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_paged(folder: Path, dtype: torch.dtype, device: str, trust_remote_code: bool, name: str) -> PreTrainedModel:
    """A causal LM whose blocks are on disk, in evaluation mode without gradients.

    Raises AmqError where files lack a weight, or what is always in memory does not fit it.
    """
    model, quantizer = skeleton_of(folder, dtype, trust_remote_code)
    twin = copy.deepcopy(model)
    unfuse(model)
    path, blocks = find_blocks(model)
    _check_apart(model, path, name)
    source = WeightSource(folder, twin, dtype, device, quantizer)
    missing = _missing(source, model)
    if missing:
        raise AmqError(f"{folder} lacks {len(missing)} of the model's weights, such as {missing[0]}: it is incomplete")
    _make_buffers(model, device)
    reader = _Reader(model, twin, source)
    parts = {f"{path}.{index}": block for index, block in enumerate(blocks)} | other_parts(model)
    pager = Pager(parts, len(blocks), reader.read_part)
    outside = sum(value.numel() * value.element_size() for _, value in pager.outside(model))
    check_memory(outside + max(pager.sizes), f"{name} block by block (what is outside of its blocks, and one)", device)
    reader.read(lambda target: pager.part_of(target) is None)
    model.tie_weights(missing_keys=set(source.missing), recompute_mapping=False)
    if quantizer is not None:
        quantizer.postprocess_model(model)
    object.__setattr__(model, ATTRIBUTE, pager)
    model.eval().requires_grad_(False)
    return model


def skeleton_of(folder: Path, dtype: torch.dtype, trust: bool, auto: str | None = None) -> tuple[PreTrainedModel, Any]:
    """(the model on meta, untied, and the quantizer of its files), as from_pretrained makes them before it reads.

    auto: name of the Auto class, where not the model's own.
    """
    with needs("models", "opening a model through transformers"):
        from transformers import AutoConfig, GenerationConfig
        from transformers.initialization import meta_device_safe_creation_ops, no_tie_weights

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    quantizer = quantizer_of(config)
    with no_tie_weights(), torch.device("meta"), meta_device_safe_creation_ops():
        model = auto_class(config, auto).from_config(config, dtype=dtype, trust_remote_code=trust)
    if quantizer is not None:
        quantizer.preprocess_model(model, dtype=dtype, device_map=None, checkpoint_files=[], use_kernels=False)
    if model.can_generate():
        own = (folder / "generation_config.json").is_file()
        how: dict[str, Any] = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(folder, **how)
    return model, quantizer


def _missing(source: WeightSource, model: PreTrainedModel) -> list[str]:
    """Names that neither the files nor a tie give, and that the model's class does not do without."""
    ties = dict(model.all_tied_weights_keys)
    partner = {**ties, **{origin: name for name, origin in ties.items()}}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    found = sorted(name for name in source.missing if partner.get(name, name) in source.missing)
    return [name for name in found if not any(pattern.search(name) for pattern in ignored)]


def _check_apart(model: nn.Module, path: str, name: str) -> None:
    """Refuses a model of which a block has a weight, or a module, that is also elsewhere."""
    owners: dict[int, str] = {}
    for key, value in model.named_parameters(remove_duplicate=False):
        owner = key[len(path) + 1 :].partition(".")[0] if key.startswith(f"{path}.") else ""
        if owners.setdefault(id(value), owner) != owner:
            raise AmqError(
                f"{name} shares {key} between its blocks, so that they cannot be read one by one: use --load memory"
            )


def _make_buffers(model: PreTrainedModel, device: str) -> None:
    """Buffers that no file has (rotary tables) as from_pretrained makes them: by the class, which leaves alone what is
    marked as initialized."""
    marked = [*model.parameters(), *model.buffers()]
    for tensor in marked:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        own = module._non_persistent_buffers_set & {n for n, value in module._buffers.items() if value is not None}
        cast(Any, module)._is_hf_initialized = not own
        for name in own:
            module._buffers[name] = torch.empty_like(cast(Tensor, module._buffers[name]), device=device)
    model.initialize_weights()


class _Reader:
    """Puts weights of `source` into `model`, by way of `twin` where they lie otherwise there."""

    def __init__(self, model: nn.Module, twin: nn.Module, source: WeightSource) -> None:
        self._source = source
        self._modules = dict(model.named_modules())  # as they are now: others may stand in their places meanwhile
        self._fused = {name: module for name, module in twin.named_modules() if is_fused(module)}

    def read_part(self, path: str) -> None:
        self.read(lambda target: target.startswith(f"{path}."))

    def read(self, wanted: Any) -> None:
        for target, expert, tensor in self._source.read(wanted):
            owner, _, leaf = target.rpartition(".")
            if owner in self._fused:
                self._put_experts(owner, leaf, tensor, expert or 0)
            else:
                _put(self._modules[owner], leaf, tensor)

    def _put_experts(self, name: str, leaf: str, tensor: Tensor, first: int) -> None:
        """Makes the linears of the experts `name`, from number `first` on, views of `tensor`, which has the layout that
        the twin's module has for its parameter `leaf`: weights or biases of one role, or of two."""
        for role, views in views_of(self._fused[name], leaf, tensor):
            key = "weight" if tensor.ndim == 3 else "bias"
            for index, view in enumerate(views):
                linear = self._modules[f"{name}.{role}.{first + index}"]
                linear._parameters[key] = nn.Parameter(view, requires_grad=False)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
