"""Twenty families: what a search can place of each, that experts as linears and cut blocks compute the same, and a tiny
model of each from search to a checkpoint that is loaded, generates, and is saved again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.families import FAMILIES, Family
from helpers.tiny_models import random_tokens
from torch import nn

from amq.checkpoint.store import open_checkpoint
from amq.configuration import Configuration
from amq.model.blocks import BlockRunner
from amq.model.experts import unfuse
from amq.model.inventory import EMBEDDING, EXPERT, HEAD, SCORES
from amq.model.usable import find_usable
from amq.quantize import quantize
from amq.search.run import run_search
from amq.search.settings import SearchSettings

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

TOKENS = 32
SEARCH = {
    "formats": "int2,int4", "group_size": 32, "proxy": "rtn", "cost": "weight", "points": 2, "windows": 1,
    "confirm_windows": 1, "window_length": TOKENS, "target_bits": 4.6,
}  # fmt: skip
by_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@by_family
def test_what_a_search_can_place(family: Family) -> None:
    model, tokens = family.build(), random_tokens(1, 16)
    expected = model(tokens).logits
    unfuse(model)
    usable = find_usable(model)
    found = usable.inventory
    assert sum(s.numel for s in found.weights) / found.numel >= family.placed
    assert found.numel == sum(p.numel() for p in model.parameters())
    kinds = [s.kind for s in found.outer]
    assert kinds.count(HEAD) == 1 and (found.head_is_tied or kinds.count(EMBEDDING) == 1)
    experts = {(s.experts, s.top_k) for s in found.linears if s.kind == EXPERT}
    routers = [o for o in found.others if o.reason == SCORES]
    assert experts == ({(4, 2)} if "expert" in str(family.options) else set()) and bool(experts) == bool(routers)
    difference = (model(tokens).logits - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-6
    BlockRunner(model).check(tokens)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(2000)))
    return path


@by_family
def test_from_search_to_a_checkpoint_that_is_saved_again(
    family: Family, make_folder: Callable[[nn.Module], Path], text: Path, tmp_path: Path
) -> None:
    source, run, output, again = make_folder(family.build()), tmp_path / "run", tmp_path / "out", tmp_path / "again"
    run_search(SearchSettings.make(model=str(source), output=str(run), calibration=str(text), **SEARCH))
    chosen = Configuration.load(run / "configuration.json")
    quantize(str(source), str(output), configuration=str(run / "configuration.json"), method="rtn", perplexity="none",
             calibration=str(text))  # fmt: skip
    record = open_checkpoint(output).record
    assert {**record.formats} == {name: fmt for name, fmt in chosen.formats.items() if fmt != "16bit"}
    loaded, tokens = _load(output), random_tokens(1, 12)
    expected = loaded(tokens).logits
    assert loaded.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 16)
    loaded.save_pretrained(again)
    assert torch.equal(_load(again)(tokens).logits, expected)
    first, second = open_checkpoint(output), open_checkpoint(again)
    assert second.record.formats == record.formats and second.record.shapes == record.shapes
    for name in record.formats:
        mine, theirs = first.packed(name), second.packed(name)
        assert torch.equal(mine.qweight, theirs.qweight) and torch.equal(mine.scale, theirs.scale), name


def _load(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = "ImageTextToText" if type(config) in _image_text_to_text() else "CausalLM"
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, dtype=torch.float32)


def _image_text_to_text() -> set[type]:
    causal = set(transformers.AutoModelForCausalLM._model_mapping.keys())
    return set(transformers.AutoModelForImageTextToText._model_mapping.keys()) - causal
