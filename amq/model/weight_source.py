"""The weights of a model folder under the names that the model's class gives them, read a few at a time.

What a file calls a weight is not always what the class calls it: transformers renames on loading, stacks the experts'
tensors of a layer into one, splits and transposes. It can do so for a whole model only. `WeightSource` asks its rules
(`transformers.core_model_loading`) which tensors of the files make which weights, once, and then applies them to the
weights that are asked for. Tensors keep the files' dtype until a weight is whole: rules that only move numbers give the
same before the cast as after, in half the memory.

Files are read, not mapped: what is read counts as memory of this process, and is gone when a block is.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model.weight_files import LENGTH_BYTES, HeaderEntry, read_header, weight_files
from amq.util.extras import needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOVES = frozenset(
    {
        "Chunk", "Split", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose",
        "PermuteForRope", "Mxfp4Dequantize",
    }
)  # fmt: skip
"""Operations of transformers whose results are exact in the dtype of the files: all others get the model's dtype."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""As safetensors spells them."""


class TensorFiles:
    """The tensors of some safetensors files, read one at a time into memory of their own."""

    def __init__(self, folder: Path) -> None:
        self._entries: dict[str, tuple[Path, HeaderEntry, int]] = {}
        for path in weight_files(folder):
            with open(path, "rb") as file:
                begin = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
            for name, entry in read_header(path).items():
                self._entries[name] = path, entry, begin + entry.data_offsets[0]

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> list[int]:
        return self._entries[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Raises AmqError for a dtype that torch does not know."""
        path, entry, _ = self._entries[name]
        if entry.dtype not in DTYPES:
            raise AmqError(f"{path}: tensor {name} has the dtype {entry.dtype}, expected one of {', '.join(DTYPES)}")
        return DTYPES[entry.dtype]

    def read(self, name: str) -> Tensor:
        """That tensor, as it is stored. Raises AmqError naming a file that cannot be read or was cut meanwhile."""
        path, entry, begin = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=self.dtype(name))
        if not tensor.numel():
            return tensor
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(begin)
                while buffer and (count := file.readinto(buffer)):
                    buffer = buffer[count:]
        except OSError as error:
            raise AmqError(f"{path} cannot be read: {error}") from error
        if buffer:
            raise AmqError(f"{path} ends inside tensor {name}: it was cut short; copy it again")
        return tensor


@dataclass
class _Weight:
    """How one weight, or several that one rule makes, comes out of tensors of the files.

    parts: (tensor of the files, pattern of the rule that it matched), in the rule's order. rule: None for a tensor that
    is the weight. targets: names that come out, as far as they are known before.
    """

    rule: Any = None
    parts: list[tuple[str, str]] = field(default_factory=list)
    targets: tuple[str, ...] = ()

    def is_whole(self, result: Tensor | None) -> bool:
        """False where the rule stacks tensors of experts and some are not there. result: what it has to make."""
        stacks = self.rule is not None and any(type(o).__name__ == "MergeModulelist" for o in self.rule.operations)
        counts = Counter(pattern for _, pattern in self.parts)
        return not stacks or result is None or set(counts.values()) == {result.shape[0]}

    def by_expert(self) -> list[list[tuple[str, str]]]:
        """`parts` expert by expert, where the rule stacks them and does nothing across experts; else none."""
        operations = [] if self.rule is None else self.rule.operations
        if not operations or type(operations[0]).__name__ != "MergeModulelist" or operations[0].dim != 0:
            return []
        if not all(type(other).__name__ == "Concatenate" and other.dim > 0 for other in operations[1:]):
            return []
        patterns: dict[str, list[tuple[str, str]]] = {}
        for part, pattern in self.parts:
            patterns.setdefault(pattern, []).append((part, pattern))
        counts = {len(parts) for parts in patterns.values()}
        return list(map(list, zip(*patterns.values(), strict=True))) if len(counts) == 1 else []


class WeightSource:
    """The weights of `folder` by the names of `skeleton`, a model on meta without changes to its modules.

    quantizer: transformers' own, where the files are packed in one of its formats. dtype, device: of what `read` gives.

    missing: names of the skeleton that no tensor of the files makes. unexpected: tensors of the files that make none.
    """

    def __init__(
        self, folder: Path, skeleton: PreTrainedModel, dtype: torch.dtype, device: str = "cpu", quantizer: Any = None
    ) -> None:
        self.folder, self.files = folder, TensorFiles(folder)
        self._skeleton, self._dtype, self._device, self._quantizer = skeleton, dtype, device, quantizer
        self._wanted = skeleton.state_dict()
        self._plan = _dtype_plan(skeleton, dtype)
        self._weights, self.unexpected = _weights_of(self.files.names, skeleton, self._wanted, quantizer)
        made = {t for weight in self._weights.values() for t in weight.targets if weight.is_whole(self._wanted.get(t))}
        self.missing = {name for name in self._wanted if name not in made}

    def read(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int | None, Tensor]]:
        """(name, None, tensor in the model's dtype) of all weights whose rule begins with a name that is `wanted`.

        Of weights that a rule stacks from tensors of single experts come these, one by one, [1, …] with the expert's
        number in place of None: a layer of experts would otherwise be in memory twice.
        Raises AmqError naming a tensor whose shape is not the model's.
        """
        for name, weight in self._weights.items():
            if not wanted(name):
                continue
            experts = weight.by_expert()
            for number, parts in enumerate(experts or [weight.parts]):
                made = self._make(name, weight.rule, parts)
                while made:
                    target, value = made.popitem()
                    tensor = value[0] if isinstance(value, list) else value
                    self._check(target, tensor, len(experts) or None, parts[0][0])
                    yield target, number if experts else None, self._cast(target, tensor)

    def _check(self, target: str, tensor: Tensor, experts: int | None, part: str) -> None:
        expected = self._wanted.get(target)
        found = list(tensor.shape) if experts is None else [experts, *tensor.shape[1:]]
        if expected is None or found != list(expected.shape):
            raise AmqError(
                f"{self.folder}: {part} makes {target} {found}, the model's config.json "
                f"{'has no such weight' if expected is None else f'{list(expected.shape)}'}: it is damaged, or "
                "config.json belongs to another model"
            )

    def _make(self, name: str, plan: Any, parts: list[tuple[str, str]]) -> dict[str, Any]:
        """{weight: tensor, or a list with it} that the rule `plan` makes of `parts`."""
        if plan is None:
            return {name: self.files.read(parts[0][0])}
        rule = copy.deepcopy(plan)
        exact = {type(operation).__name__ for operation in rule.operations} <= MOVES or self._quantizer is not None
        for part, pattern in parts:
            tensor = self.files.read(part)
            rule.add_tensor(name, part, pattern, tensor if exact else tensor.to(self._dtype))
        how = {"model": self._skeleton, "config": self._skeleton.config, "hf_quantizer": self._quantizer}
        return dict(rule.convert(name, **how))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        dtype = next((kept for pattern, kept in self._plan.items() if re.search(pattern, name)), None)
        return tensor.to(device=self._device, dtype=dtype or self._wanted[name].dtype)


def _dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """{pattern of names: dtype} of weights that the model's class wants wider than `dtype`."""
    return {pattern.replace("*", ".*"): wide for pattern, wide in model._get_dtype_plan(dtype).items()}


def _weights_of(
    names: list[str], skeleton: PreTrainedModel, wanted: Mapping[str, Tensor], quantizer: Any
) -> tuple[dict[str, _Weight], list[str]]:
    """({first weight that comes out: how}, tensors of which nothing comes), by transformers' rules."""
    with needs("models", "reading a model's weights block by block"):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(skeleton, None, quantizer)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, known = skeleton.base_model_prefix, dict(wanted)
    weights: dict[str, _Weight] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # an own name of the model that a rule means for another's
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            unexpected.append(name)
        elif pattern is None:
            weights[target] = _Weight(None, [(name, name)], (target,))
        else:
            rule = by_pattern[pattern]
            first = rule.target_patterns[0]
            targets = tuple(target.replace(first, other) for other in rule.target_patterns)
            weights.setdefault(target, _Weight(rule, [], targets)).parts.append((name, pattern))
    return weights, unexpected


def quantizer_of(config: Any) -> Any:
    """transformers' quantizer for a model whose files are packed in one of its formats, set to unpack; else None.

    Raises AmqError for formats that it cannot unpack while loading.
    """
    with needs("models", "reading a model's weights block by block"):
        from transformers.quantizers.auto import AutoHfQuantizer

    packed = getattr(config, "quantization_config", None)
    packed = packed if packed is not None else getattr(config.get_text_config(), "quantization_config", None)
    if packed is None:
        return None
    how = AutoHfQuantizer.merge_quantization_configs(packed, None)
    if not hasattr(how, "dequantize"):
        raise AmqError(
            f"the model's weights are packed as {getattr(how, 'quant_method', packed)}, which cannot be unpacked block "
            "by block: use --load memory, or the model in 16 bits"
        )
    how.dequantize = True
    config.quantization_config = how
    return AutoHfQuantizer.from_config(how, pre_quantized=True)
