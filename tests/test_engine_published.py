"""What files of published models say is understood: a spec has a place for every tensor of a model, and no others."""

from __future__ import annotations

import copy
import json

import pytest
from helpers.published_configs import CONFIGS
from helpers.specs import check
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from amq.runtime.families import FAMILIES


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_of(name: str) -> None:
    """Once transformers has read it and written it into a checkpoint, with its defaults or without."""
    said = copy.deepcopy(CONFIGS[name])
    config = AutoConfig.for_model(**said)
    auto = AutoModelForImageTextToText if "text_config" in said else AutoModelForCausalLM
    beside = check(config, auto, written=(config.to_dict(), config.to_diff_dict()))
    assert bool(beside) == ("text_config" in said)


def test_families_that_are_published() -> None:
    """Every family but those that others here differ from in nothing that a file says."""
    types = {json.dumps(said) for said in CONFIGS.values()}
    alike = {"qwen3", "mixtral", "ministral", "qwen3_next", "qwen3_5_moe_text"}
    missing = {kind for kind in FAMILIES if not any(f'"model_type": "{kind}"' in said for said in types)}
    assert missing == alike
