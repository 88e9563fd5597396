"""What every stage that works on a full-precision model begins with: load, try out, check, and then text and hash.

It stands beside `amq.model.open`, which the runtime uses too, because what follows here can reach for data sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from amq.model.inventory import Inventory, check_weights
from amq.model.open import LoadedModel, check_device, load_folder, model_fingerprint, resolve
from amq.model.shape import ModelShape
from amq.model.text import Corpus, load_corpus
from amq.model.usable import Usable, find_usable
from amq.util.limits import fit_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class OpenModel:
    """A model that a stage works with: loaded from `folder`, tried out (`find_usable`), and its weights checked."""

    folder: Path
    loaded: LoadedModel
    usable: Usable

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

    def corpus(self, text: str) -> Corpus:
        """The text of that name (`load_corpus`) in the model's tokens."""
        return load_corpus(text, self.loaded.tokenizer, self.loaded.embedding_rows)


def open_model(name: str, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> OpenModel:
    """Loads MODEL (see `load_model`) and finds out what of it can be quantized.

    Raises AmqError where nothing can be, or where a weight is empty, infinite or NaN.
    """
    fit_threads()
    check_device(device)
    folder = resolve(name, trust_remote_code)
    loaded = load_folder(name, folder, dtype, device, trust_remote_code)
    opened = OpenModel(folder, loaded, find_usable(loaded.model))
    check_weights(loaded.model, opened.inventory.weights)
    return opened
