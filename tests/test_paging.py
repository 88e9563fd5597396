"""Models whose blocks stay in their files: the very weights and numbers of the model in memory, and little memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES
from helpers.paging import realign
from helpers.tiny_models import ARCHITECTURES, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from amq.configuration import Configuration, linear_bytes
from amq.errors import AmqError
from amq.formats import get_format
from amq.model import open as models
from amq.model.blocks import BlockRunner
from amq.model.inventory import EMBEDDING, HEAD, KEPT_PART, check_weights, get_linear, take_inventory
from amq.model.open import LoadedModel, load_folder, load_model, model_fingerprint
from amq.model.paging import after_reading, holding, in_turn, named_weights, pager_of
from amq.model.perplexity import negative_log_likelihood
from amq.model.settings import AUTO, DISK, MEMORY
from amq.model.unused import Unused, unused_tensors
from amq.model.usable import find_usable
from amq.quantize.plan import working_bytes
from amq.quantize.run import run_quantize
from amq.quantize.settings import QuantizeSettings
from amq.search.settings import SearchSettings
from amq.search.space import SearchSpace
from amq.search.working import working_bytes as search_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def family_folder(make_folder: Callable[[nn.Module], Path]) -> Callable[[str], Path]:
    """The tiny model of a family in a folder, made once."""
    return functools.cache(lambda name: make_folder(FAMILIES[name].build()))


def both(folder: Path, dtype: str = "float32") -> tuple[LoadedModel, LoadedModel]:
    """(in memory, block by block)"""
    return tuple(load_folder("tiny", folder, dtype, "cpu", False, how) for how in (MEMORY, DISK))


def in_half(folder: Path, target: Path) -> Path:
    """The same model in bfloat16 files."""
    target.mkdir()
    for path in folder.iterdir():
        target.joinpath(path.name).write_bytes(path.read_bytes())
    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(target / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_numbers_are_those_of_the_model_in_memory(
    name: str, dtype: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_folder(name) if dtype == "float32" else in_half(family_folder(name), tmp_path / "half")
    whole, paged = both(folder)  # of bfloat16 files, too, in float32
    expected = dict(whole.model.named_parameters())
    for part in named_weights(paged.model):
        for key, value in part:
            found = expected.pop(key)
            assert torch.equal(found, value) and found.dtype == value.dtype, key
    assert not expected
    for key, value in whole.model.named_buffers():
        assert paged.model.get_buffer(key).is_meta or torch.equal(value, paged.model.get_buffer(key)), key
    assert model_fingerprint(whole.model) == model_fingerprint(paged.model)
    tokens = random_tokens(1, 40)
    for loaded in (whole, paged):
        realign(loaded.model)
    with torch.no_grad():
        assert torch.equal(whole.model(tokens, use_cache=False).logits, paged.model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_what_can_be_quantized_is_found_block_by_block(name: str, family_folder: Callable[[str], Path]) -> None:
    whole, paged = both(family_folder(name))
    found, expected = find_usable(paged.model), find_usable(whole.model)
    assert found.inventory == expected.inventory and found.reasons == expected.reasons and not found.loaded
    check_weights(paged.model, found.inventory.linears)
    BlockRunner(paged.model).check(random_tokens(1, 16))


def test_mxfp4_is_unpacked_block_by_block(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """As gpt-oss is published: codes of 4 bits, and a power of two for 32 of them."""
    folder = in_half(family_folder("gpt_oss"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape, options = (experts, outputs, inputs // 32), {"dtype": torch.uint8, "generator": generator}
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), **options)
        tensors[f"{name}_scales"] = torch.randint(120, 124, shape, **options)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    whole, paged = both(folder)
    assert model_fingerprint(whole.model) == model_fingerprint(paged.model)


@pytest.fixture
def llama(family_folder: Callable[[str], Path]) -> LoadedModel:
    return load_folder("tiny", family_folder("llama"), "float32", "cpu", False, DISK)


WEIGHT = "model.layers.0.mlp.up_proj"


def weight(model: nn.Module) -> Tensor:
    return get_linear(model, WEIGHT).weight


def test_a_plan_counts_the_block_that_is_read(family_folder: Callable[[str], Path]) -> None:
    whole, paged = both(family_folder("llama"))
    sizes = []
    for model in (whole.model, paged.model):
        inventory = take_inventory(model)
        configuration = Configuration.uniform(inventory.linears, get_format("int4"), 32)
        sizes.append(working_bytes(model, inventory, configuration, (), random_tokens(1, 8), calibrated=False))
    assert sizes[1] - sizes[0] == max(pager_of(paged.model).sizes) > 0
    space = SearchSpace.of(inventory, SearchSettings(model="tiny", output="run", target_bits=3))
    outer, block = (sum(s.numel for s in some) for some in (inventory.outer, inventory.in_block(0)))
    assert search_bytes(whole.model, space, 10) == 4 * (inventory.n_blocks * block + outer) + 30
    assert search_bytes(whole.model, space, 10, whole=False) == 4 * (block + outer) + 30
    codes = sum(linear_bytes(s, get_format("int4"), 128) for s in inventory.linears)  # the widest of the candidates
    codes += sum(linear_bytes(s, get_format("int8"), 128) for s in inventory.outer if s.kind == HEAD)
    looked_up = sum(4 * s.numel for s in inventory.outer if s.kind == EMBEDDING or s.tied)
    assert search_bytes(whole.model, space, 10, "cuda") == codes + looked_up + 30
    assert search_bytes(paged.model, space, 10) == 4 * (block + outer) + 30 + max(pager_of(paged.model).sizes)


def test_a_change_counts_until_its_block_is_let_go(llama: LoadedModel) -> None:
    model, tokens = llama.model, random_tokens(1, 8)
    with torch.no_grad():
        before = model(tokens).logits
        with holding(model, 0), holding(model, 0):
            weight(model).zero_()
            changed = model(tokens).logits
        assert not torch.equal(before, changed)
        assert torch.equal(before, model(tokens).logits)
        after_reading(model, 0, lambda: weight(model).zero_())
        assert torch.equal(changed, model(tokens).logits)
        pager_of(model).forget_changes()
        assert torch.equal(before, model(tokens).logits)


def test_weights_that_are_not_there_refuse_to_be_used(llama: LoadedModel) -> None:
    """torch multiplies by a weight on meta as if it were one."""
    linear = get_linear(llama.model, WEIGHT)
    assert linear.weight.shape == (96, 64) and linear.weight.dtype == torch.float32
    uses: list[Callable[[], object]] = [
        lambda: linear(torch.ones(1, 64)),
        lambda: linear.weight.copy_(torch.zeros(96, 64)),
        lambda: linear.weight.data,
        lambda: torch.cat([linear.weight, torch.zeros(96, 64)]),
    ]
    for use in uses:
        with pytest.raises(AmqError, match=rf"{WEIGHT}.weight is not in memory: its block has to be held"):
            use()


def test_one_block_is_there_at_a_time(make_folder: Callable[[nn.Module], Path]) -> None:
    folder = make_folder(ARCHITECTURES["llama"].build(num_hidden_layers=5))
    model = load_folder("tiny", folder, "float32", "cpu", False, DISK).model
    pager, most = pager_of(model), 0

    def count(*args: object) -> None:
        nonlocal most
        most = max(most, len({n.split(".")[2] for n, p in model.named_parameters() if "layers" in n and not p.is_meta}))

    for block in model.model.layers:
        block.register_forward_hook(count)
    with torch.no_grad():
        model(random_tokens(1, 8))
        assert most == 1 and pager.reads == 5
        negative_log_likelihood(model, random_tokens(6, 8))
        assert most == 1 and pager.reads == 10  # one read per block for all windows
    for _ in range(2):
        BlockRunner(model).check(random_tokens(1, 8))
        assert most == 1 and pager.reads <= 20  # twice, and not again


def test_losses_are_those_of_the_model_in_memory(family_folder: Callable[[str], Path]) -> None:
    whole, paged = both(family_folder("qwen3_moe"))
    windows = random_tokens(3, 24)
    assert negative_log_likelihood(whole.model, windows, 1) == negative_log_likelihood(paged.model, windows, 1)


def test_names_come_while_their_block_is_held(llama: LoadedModel) -> None:
    names = [name for name, _ in llama.model.named_parameters()]
    assert [name for name in in_turn(llama.model, names) if not llama.model.get_parameter(name).is_meta] == names


def test_who_goes_through_all_weights_has_one_block_of_them(llama: LoadedModel) -> None:
    """A list that the caller still has would keep a block there while the next is read."""
    outside, *blocks = (part for part in named_weights(llama.model))
    assert outside and not any(blocks)


@pytest.mark.parametrize(
    ("name", "tensor", "missing"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "model.norm.weight", "model.norm.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_a_missing_tensor_is_named(
    name: str, tensor: str, missing: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = in_half(family_folder(name), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AmqError, match=f"lacks 1 of the model's weights, such as {missing}"):
        load_folder("tiny", folder, "float32", "cpu", False, DISK)


def test_a_tensor_of_another_shape_is_named(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = in_half(family_folder("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    model = load_folder("tiny", folder, "float32", "cpu", False, DISK).model
    with pytest.raises(AmqError, match=r"layers.0.mlp.\w+.weight makes .* \[\d+, \d+\], the model's config.json"):
        model(random_tokens(1, 4))


def test_a_model_that_does_not_fit_stays_on_disk(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_folder("llama")
    assert pager_of(load_folder("tiny", folder, "float32", "cpu", False, AUTO).model) is None
    monkeypatch.setattr(models, "fits", lambda needed, device: False)
    assert pager_of(load_folder("tiny", folder, "float32", "cpu", False, AUTO).model) is not None


def test_encoders_of_images_are_read_when_they_are_asked_for(family_folder: Callable[[str], Path]) -> None:
    whole, paged = both(family_folder("mistral3"))
    kept = {other.name for other in find_usable(paged.model).inventory.others if other.reason == KEPT_PART}
    assert kept == {n for n, p in whole.model.named_parameters() if p.ndim > 1 and ("vision" in n or "projector" in n)}
    with torch.no_grad():
        paged.model(random_tokens(1, 8), use_cache=False)
    assert all(paged.model.get_parameter(name).is_meta for name in kept)
    for name in in_turn(paged.model, sorted(kept)):
        assert torch.equal(paged.model.get_parameter(name), whole.model.get_parameter(name))


def test_what_the_class_ignores_is_kept(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = in_half(family_folder("qwen3_5"), tmp_path / "model")
    model = load_folder("tiny", folder, "float32", "cpu", False, DISK).model
    assert unused_tensors(folder, model, False) == Unused()
    tensors = load_file(folder / "model.safetensors")
    more = {"mtp.layers.0.mlp.up_proj.weight": torch.ones(2, 2), "odd.weight": torch.ones(2)}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    for how in (MEMORY, DISK):
        model = load_folder("tiny", folder, "float32", "cpu", False, how).model
        found = unused_tensors(folder, model, False)
        assert found.kept == ("mtp.layers.0.mlp.up_proj.weight",) and found.dropped == ("odd.weight",)
        assert [line.split(",")[0] for line in found.lines()] == [
            "1 tensors that the model does not use are kept as they are",
            "1 tensors that the model does not use are left out",
        ]


@pytest.mark.parametrize("name", ["llama", "mistral3", "gemma4", "qwen3_5"])
def test_a_checkpoint_is_the_same_from_disk(
    name: str, family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMQ_CACHE", str(tmp_path / "cache"))
    folder = in_half(family_folder(name), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    if name == "qwen3_5":
        tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.ones(2, 2)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for how in (MEMORY, DISK):
        run_quantize(
            QuantizeSettings(
                model=str(folder),
                output=str(tmp_path / how),
                uniform="int4",
                windows=2,
                window_length=32,
                perplexity_tokens=64,
                load=how,
                method="gptq",
                calibration="pydoc",  # auto is another text where the model cannot write
            )  # fmt: skip
        )
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / MEMORY / file).read_bytes() == (tmp_path / DISK / file).read_bytes()
    rows = [json.loads((tmp_path / how / "quantization.json").read_text())["perplexity"] for how in (MEMORY, DISK)]
    assert rows[0] == rows[1]
    loaded = load_model(str(tmp_path / DISK)).model
    assert torch.isfinite(loaded(random_tokens(1, 8)).logits).all()
    names = set(load_file(tmp_path / DISK / "model.safetensors"))
    assert ("mtp.layers.0.mlp.up_proj.weight" in names) == (name == "qwen3_5")
