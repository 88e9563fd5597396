"""A checkpoint of a causal LM as a base model, under another head, and what transformers says of its size."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.in_transformers import load
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.kernels.embedding import StoredEmbedding
from amq.kernels.modules import StoredLinear

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = random_tokens(2, 20)
KINDS = {  # family and the head's format; llama's head is tied, mistral's is not
    "tied": ("llama", ""), "tied int6": ("llama", "int6"),
    "untied": ("mistral", ""), "untied int6": ("mistral", "int6"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    parent = tmp_path_factory.mktemp("checkpoints")

    def folder(kind: str) -> Path:
        family, head = KINDS[kind]
        if not (parent / kind).exists():
            tiny_checkpoint(ARCHITECTURES[family].build(num_hidden_layers=2), parent / kind, head=head)
        return parent / kind

    return folder


def hidden(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.base_model(TOKENS).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Its states are the causal LM's, and it is saved by its own names, from which both load again."""
    causal = load(folders(kind))
    base, info = load(folders(kind), AutoModel, output_loading_info=True)
    assert not info["missing_keys"] and not hasattr(base, "model")
    assert torch.equal(hidden(base), hidden(causal))
    base.save_pretrained(tmp_path / "base")
    record = open_checkpoint(tmp_path / "base").record
    assert "layers.0.mlp.up_proj" in record.formats
    assert len(record.block_shapes) == len(open_checkpoint(folders(kind)).record.block_shapes)
    assert torch.equal(hidden(load(tmp_path / "base", AutoModel)), hidden(causal))
    assert torch.equal(hidden(copy.deepcopy(base)), hidden(causal))
    if kind.startswith("tied"):
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "base")(TOKENS).logits, causal(TOKENS).logits)
    else:  # the head is not in it: a new one, and transformers says so
        assert load(tmp_path / "base", output_loading_info=True)[1]["missing_keys"] == {"lm_head.weight"}
    plain = base.dequantize()
    torch.testing.assert_close(hidden(plain), hidden(causal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The base is the checkpoint's; the head is new, and the only thing that is trained."""
    options = {"num_labels": 3, "pad_token_id": 0}
    model, info = load(folders(kind), AutoModelForSequenceClassification, output_loading_info=True, **options)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert torch.equal(hidden(model), hidden(load(folders(kind))))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["score.weight"]
    model(TOKENS, labels=torch.tensor([0, 2])).loss.backward()
    assert model.score.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "classifier")
    again, info = load(tmp_path / "classifier", AutoModelForSequenceClassification, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_classifiers_base_must_be_complete(tmp_path: Path) -> None:
    model = ARCHITECTURES["mistral"].build(num_hidden_layers=2)
    del model.model.norm
    with pytest.raises(AmqError, match=r"lacks 1 tensors, such as model\.norm\.weight"):
        load(tiny_checkpoint(model, tmp_path / "in"), AutoModelForSequenceClassification)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_true_before_and_after_the_first_forward(kind: str, folders: Callable[[str], Path]) -> None:
    model = load(folders(kind))
    original = ARCHITECTURES[KINDS[kind][0]].build(num_hidden_layers=2)
    linears = [m for m in model.modules() if isinstance(m, StoredLinear)]
    others = [m for m in model.modules() if not isinstance(m, (StoredLinear, StoredEmbedding))]
    plain = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for m in others for b in m.buffers(False))
    assert model.get_memory_footprint() == plain + sum(m.packed.nbytes for m in linears)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert one.num_parameters() == original.num_parameters()
        assert one.num_parameters(exclude_embeddings=True) == original.num_parameters(exclude_embeddings=True)
        assert one.num_parameters(only_trainable=True) == 0
    hidden(model)
    model(TOKENS)
    assert model.get_memory_footprint() == plain + sum(m.data.nbytes for m in linears)
    model.to(torch.float32)
    assert model.get_memory_footprint() == plain + sum(m.data.nbytes for m in linears)  # and they were not thrown away
    assert model.dequantize().num_parameters() == original.num_parameters()
