"""transformers and checkpoints with experts, and with embeddings that are packed: load, run, save, reload."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.in_transformers import assert_same_tensors, distance, load
from helpers.packed_models import CASES, build, checkpoint_in
from helpers.tiny_models import random_tokens
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.integrations.opening import open_checkpoint_once
from amq.integrations.transformers import AmqConfig
from amq.kernels.backends import BACKENDS
from amq.kernels.embedding import OwnEmbedding, StoredEmbedding
from amq.kernels.modules import StoredLinear
from amq.model.experts import Experts
from amq.model.inventory import take_inventory

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = random_tokens(2, 20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.partial(checkpoint_in, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("case", CASES)
def test_load_run_save_reload(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Whole, in shards, and dequantized; logits are those of the plain model with the same rounded weights."""
    folder, original = folders(case), build(CASES[case][0])
    open_checkpoint_once(folder)
    checkpoint = open_checkpoint(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    stored = {n for n, m in model.named_modules() if isinstance(m, (StoredLinear, OwnEmbedding))}
    assert stored == checkpoint.record.formats.keys()
    assert model.num_parameters() == original.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == original.num_parameters(exclude_embeddings=True)
    logits = model(TOKENS).logits
    for path, size in ((tmp_path / "one", "1GB"), (tmp_path / "shards", "40KB")):
        model.save_pretrained(path, max_shard_size=size)
        again = load(path)
        assert_same_tensors(model, again)
        assert torch.equal(again(TOKENS).logits, logits)
        assert open_checkpoint(path).record == checkpoint.record
    copied = copy.deepcopy(model)
    assert torch.equal(copied(TOKENS).logits, logits)
    ids = model.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    plain = copied.dequantize()
    assert not any(isinstance(m, (StoredLinear, StoredEmbedding)) for m in plain.modules())
    assert distance(plain(TOKENS).logits, logits) < 1e-5
    assert distance(plain(TOKENS).logits, original(TOKENS).logits) > 1e-4
    assert plain.num_parameters() == original.num_parameters()
    assert torch.equal(plain.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0), ids)


@pytest.mark.parametrize("case", CASES)
def test_what_is_packed_is_the_rounded_weight(case: str, folders: Callable[[str], Path]) -> None:
    """The plain model with every weight replaced by its dequantized one has the loaded model's logits."""
    from amq.model.inventory import get_weight
    from amq.packing import dequantize

    checkpoint, plain = open_checkpoint(folders(case)), build(CASES[case][0])
    with torch.no_grad():
        for name in checkpoint.record.formats:
            get_weight(plain, name).copy_(dequantize(checkpoint.packed(name)))
        assert distance(load(folders(case))(TOKENS).logits, plain(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_base_model(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    causal, base = load(folders(case)), load(folders(case), AutoModel)
    states = causal.base_model(TOKENS).last_hidden_state
    assert torch.equal(base(TOKENS).last_hidden_state, states)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(load(tmp_path / "base", AutoModel)(TOKENS).last_hidden_state, states)


def test_a_missing_tensor_is_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from amq.util.tensors import hashes_metadata, save_file

    folder = Path(shutil.copytree(folders("experts, some kept"), tmp_path / "damaged"))
    whole = load_file(folder / "model.safetensors")
    for name in ("model.layers.2.mlp.experts.up_proj.5.scale", "model.layers.1.mlp.experts.gate_proj.2.weight"):
        tensors = {n: t for n, t in whole.items() if n != name}
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", metadata=hashes_metadata(tensors))
        with pytest.raises(AmqError, match=f"lacks 1 tensors, such as {name}"):
            open_checkpoint(folder)
        with pytest.raises(AmqError, match=f"lacks 1 tensors, such as {name}"):
            load(folder)


def test_experts_of_another_shape_than_the_model_makes_them_are_named(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """In config.json alone, and in the file as well."""
    folder = Path(shutil.copytree(folders("experts"), tmp_path / "damaged"))
    config = json.loads((folder / "config.json").read_text())
    row = "model.layers.1.mlp.experts.down_proj"
    config["quantization_config"]["shapes"][f"{row}.0-5"] = [64, 44]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AmqError, match=f"{row}.0.qweight must be"):
        open_checkpoint(folder)
    config["quantization_config"]["shapes"][f"{row}.0-5"] = [64, 40]
    (folder / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 44}))
    with pytest.raises(AmqError, match=r"gate_proj.0: the model's config.json makes it \[44, 64\], .* has \[40, 64\]"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 5, "num_local_experts": 5}))
    with pytest.raises(AmqError, match=r"linear '.*gate_proj.5' is not in this Qwen3MoeForCausalLM"):
        load(folder)


def test_a_format_that_a_backend_lacks_is_named(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = BACKENDS["cpu"]
    lacking = replace(cpu, unsupported_reason=lambda fmt: "no kernel" if fmt.name == "int5" else None)
    monkeypatch.setitem(BACKENDS, "cpu", lacking)
    model = load(folders("experts"), quantization_config=AmqConfig(backend="cpu"))
    with pytest.raises(AmqError, match=r"_proj(.\d)?: backend cpu cannot run int5: no kernel; take backend reference"):
        model(TOKENS)


def test_resizing_is_refused(folders: Callable[[str], Path]) -> None:
    with pytest.raises(AmqError, match=r"call model.dequantize\(\) first"):
        load(folders("embedding alone")).resize_token_embeddings(300)


def test_experts_stay_linears_after_dequantize(folders: Callable[[str], Path]) -> None:
    plain = load(folders("experts")).dequantize()
    experts = [m for m in plain.modules() if isinstance(m, Experts)]
    assert len(experts) == 3 and all(type(linear) is nn.Linear for e in experts for linear in e.gate_proj)
    assert [s.role for s in take_inventory(plain).linears] == [
        s.role for s in take_inventory(build("qwen3_moe")).linears
    ]


def test_the_record_of_many_experts_is_small(folders: Callable[[str], Path]) -> None:
    stored = json.loads((folders("experts") / "config.json").read_text())["quantization_config"]
    assert stored["version"] == 3
