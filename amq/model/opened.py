"""What every stage that works on a full-precision model begins with: load, try out, check, and then text and hash.

It stands beside `amq.model.open`, which the runtime uses too, because what follows here can reach for data sets.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from amq.model.inventory import Inventory, check_weights
from amq.model.open import LoadedModel, check_device, load_folder, model_fingerprint, resolve
from amq.model.own_text import open_sampler
from amq.model.settings import MEMORY
from amq.model.shape import ModelShape
from amq.model.text import Corpus, WindowSampler, load_corpus
from amq.model.unused import Unused, unused_tensors
from amq.model.usable import Usable, find_usable
from amq.util.limits import fit_threads
from amq.util.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenModel:
    """A model that a stage works with: loaded from `folder`, tried out (`find_usable`), and its weights checked."""

    folder: Path
    loaded: LoadedModel
    usable: Usable
    trust_remote_code: bool = False

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def inventory(self) -> Inventory:
        """Its linears are those that can be quantized."""
        return self.usable.inventory

    @cached_property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.loaded.config)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights as they are when this is first asked for: ask before they are changed."""
        return model_fingerprint(self.model)

    @cached_property
    def unused(self) -> Unused:
        """Tensors of the folder's files that the model does not use; says so in the log."""
        found = unused_tensors(self.folder, self.model, self.trust_remote_code)
        for line in found.lines():
            log.warning("%s", line)
        return found

    def corpus(self, text: str) -> Corpus:
        """The text of that name (`load_corpus`) in the model's tokens."""
        return load_corpus(text, self.loaded.tokenizer, self.loaded.embedding_rows)

    def sampler(self, text: str, length: int, seed: int, count: int, progress: Progress | None = None) -> WindowSampler:
        """Deals out `count` windows of a calibration text, which may be the model's own (`open_sampler`)."""
        return open_sampler(self.loaded, text, length, seed, count, self.fingerprint, progress)


def open_model(
    name: str, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False, load: str = MEMORY
) -> OpenModel:
    """Loads MODEL (see `load_model` and `load_folder`) and finds out what of it can be quantized.

    Raises AmqError where nothing can be, or where a weight is empty, infinite or NaN.
    """
    fit_threads()
    check_device(device)
    folder = resolve(name, trust_remote_code)
    loaded = load_folder(name, folder, dtype, device, trust_remote_code, load)
    opened = OpenModel(folder, loaded, find_usable(loaded.model), trust_remote_code)
    check_weights(loaded.model, opened.inventory.weights)
    return opened
