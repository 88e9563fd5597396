"""Tensors of a model's files that its class has no place for.

What the class ignores by name belongs to the model all the same: heads that predict several tokens, which other
programs use. It is kept in a checkpoint as it is. Everything else is dropped: an encoder of images whose text model
alone was loaded, or what nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amq.model.auto import IMAGES
from amq.model.paged import skeleton_of
from amq.model.weight_source import TensorFiles, WeightSource
from amq.util.extras import needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Unused:
    """Names of tensors in the files, sorted."""

    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What a user should know of."""
        kept = f"{len(self.kept)} tensors that the model does not use are kept as they are, {_few(self.kept)}"
        dropped = f"{len(self.dropped)} tensors that the model does not use are left out, {_few(self.dropped)}"
        return [line for names, line in ((self.kept, kept), (self.dropped, dropped)) if names]


def _few(names: Sequence[str]) -> str:
    return f"such as {names[0]}" if names else ""


def unused_tensors(folder: Path, model: PreTrainedModel, trust_remote_code: bool) -> Unused:
    """Of the files in `folder`, from which `model` was loaded; nothing is read but their headers."""
    if set(TensorFiles(folder).names) <= model.state_dict().keys():
        return Unused()
    empty, quantizer = skeleton_of(folder, torch.float32, trust_remote_code)
    unexpected = WeightSource(folder, empty, torch.float32, quantizer=quantizer).unexpected
    patterns = [re.compile(pattern) for pattern in empty._keys_to_ignore_on_load_unexpected or ()]
    ignored = {name for name in unexpected if any(pattern.search(name) for pattern in patterns)}
    kept = ignored - _of_images(folder, type(model.config), trust_remote_code)
    return Unused(tuple(sorted(kept)), tuple(sorted(set(unexpected) - kept)))


def _of_images(folder: Path, loaded: type, trust_remote_code: bool) -> set[str]:
    """Tensors that the model which also reads images has a place for, where its text model alone was loaded."""
    with needs("models", "opening a model through transformers"):
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if type(config) is loaded or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return set()
    whole, quantizer = skeleton_of(folder, torch.float32, trust_remote_code, IMAGES)
    source = WeightSource(folder, whole, torch.float32, quantizer=quantizer)
    return set(source.files.names) - set(source.unexpected)
