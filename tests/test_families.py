"""Twenty families: what a search can place of each, that experts as linears and cut blocks compute the same, and a tiny
model of each from search to a checkpoint that is loaded, generates, and is saved again."""

from __future__ import annotations

import pytest
from helpers.families import FAMILIES, Family
from helpers.tiny_models import random_tokens

from amq.model.blocks import BlockRunner
from amq.model.experts import unfuse
from amq.model.inventory import EMBEDDING, EXPERT, HEAD, SCORES
from amq.model.usable import find_usable

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

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
