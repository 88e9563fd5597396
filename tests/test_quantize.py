"""From a configuration to a checkpoint: every method, folding, resuming, and what bad input does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mixtures import EXPERTS, mixture
from helpers.quantizing import output_error, random_gram, random_weight
from helpers.tiny_models import ARCHITECTURES, random_tokens, randomized, tiny_llama
from safetensors import safe_open
from safetensors.torch import save_file

from amq.checkpoint.store import open_checkpoint
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import FORMATS
from amq.model.calibration import CalibrationStream, shared_inputs
from amq.model.inventory import take_inventory
from amq.packing import dequantize, unpack_codes
from amq.quantize import quantize
from amq.quantize import run as quantize_run
from amq.quantize.fold import apply_fold, find_fold
from amq.quantize.methods import METHODS
from amq.quantize.quantizers import ZERO_POINTS, clip
from amq.quantize.quantizers.awq import search_scale
from amq.quantize.quantizers.clip import clipped_grid, diagonal_blocks
from amq.quantize.quantizers.grid import symmetric_zero
from amq.quantize.resume import WorkFolder
from amq.util.folders import work_folder

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
SMALL = {"windows": 3, "window_length": 48, "perplexity": "none", "calibration": "docstrings"}


@pytest.fixture(autouse=True)
def short_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in texts take seconds to read: tests calibrate on a short one."""
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))
    monkeypatch.setattr("amq.model.text.BUILTIN", {"docstrings": lambda: text})


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """All formats, dealt to the linears of `tiny_folder` in turn; group size 32."""
    names = [s.name for s in take_inventory(tiny_llama()).linears]
    formats = {name: list(FORMATS)[i % len(FORMATS)] for i, name in enumerate(names)}
    path = tmp_path / "configuration.json"
    Configuration(formats, 32).save(path)
    return path


def run(folder: Path, output: Path, configuration: Path, **settings: object) -> Path:
    quantize(str(folder), str(output), configuration=str(configuration), **{**SMALL, **settings})
    return output


@pytest.mark.parametrize("method", [*METHODS, "bank"])
def test_every_method_makes_a_checkpoint_that_computes_what_its_weights_say(
    tiny_folder: Path, tmp_path: Path, configuration: Path, method: str
) -> None:
    """Loaded by transformers, the model equals plain torch with the dequantized weights; nothing is left beside it."""
    from transformers import AutoModelForCausalLM

    change(configuration, cache={"layers.0": "int4", "layers.1": "int8"})
    folder = run(tiny_folder, tmp_path / "out", configuration, method=method)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.configuration.formats == Configuration.load(configuration).formats
    kinds = (checkpoint.record.cache, Configuration.load(folder / "configuration.json").cache)
    assert kinds == ({"layers.0": "int4", "layers.1": "int8"},) * 2
    plain = tiny_llama()
    plain.load_state_dict({n: checkpoint.tensor(n).float() for n in checkpoint.other_names}, strict=False)
    plain.tie_weights()
    for name in checkpoint.record.formats:
        plain.get_submodule(name).weight.data = dequantize(checkpoint.packed(name))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()
    log = json.loads((folder / "quantization.json").read_text())
    assert all(0 <= entry["relative_error"] < 1 for entry in log["linears"].values())
    assert checkpoint.record.shared_inputs[0] == tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv")


def test_the_same_settings_give_the_same_bytes(tiny_folder: Path, tmp_path: Path, configuration: Path) -> None:
    first, second = (run(tiny_folder, tmp_path / n, configuration, method="awq+gptq") for n in ("a", "b"))
    assert content(first) == content(second)


def content(folder: Path) -> tuple[dict, bytes]:
    """A file of weights: its header, whose metadata safetensors writes in no fixed order, and all tensors' bytes."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize("zero_points", ZERO_POINTS)
@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_zero_points(tiny_folder: Path, tmp_path: Path, configuration: Path, method: str, zero_points: str) -> None:
    folder = run(tiny_folder, tmp_path / "out", configuration, method=method, zero_points=zero_points)
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.record.formats:
        packed = checkpoint.packed(name)
        zero = packed.zero_point.float()
        assert (zero_points == "fractional") == bool((zero != zero.round()).any()), name
        if zero_points == "symmetric":
            assert (zero == symmetric_zero(packed.format)).all()
        elif zero_points == "integer":
            assert (zero >= 0).all() and (zero <= packed.format.max_code).all()
        assert int(unpack_codes(packed.qweight, packed.format, packed.in_features).max()) <= packed.format.max_code


@pytest.mark.parametrize("zero_points", ZERO_POINTS)
def test_clipping_and_error_compensation_lower_the_output_error(zero_points: str) -> None:
    """gptq < clip < rtn in (W − Ŵ) H (W − Ŵ)ᵀ, with every kind of zero point, at int3."""
    from amq.quantize.quantizers import QUANTIZERS

    weight, gram = random_weight(48, 96), random_gram(96)
    fmt = FORMATS["int3"]
    error = {
        name: float(
            output_error(weight, QUANTIZERS[name]([weight], [fmt], 32, gram, zero_points)[0]["int3"], gram).sum()
        )
        for name in ("rtn", "clip", "gptq")
    }
    assert error["gptq"] < error["clip"] < error["rtn"]


def test_clipping_shrinks_each_end_of_a_range_by_itself() -> None:
    """One outlier above, of little importance: the upper end moves in by a larger share than the lower one."""
    groups = torch.linspace(-1, 1, 32).repeat(1, 1, 1)
    groups[0, 0, -1] = 2.0
    importance = torch.ones(32)
    importance[-1] = 0.05
    scale, zero = clipped_grid(groups, importance.diag().unsqueeze(0), FORMATS["int2"])
    low, high = float(-zero * scale), float((FORMATS["int2"].max_code - zero) * scale)
    assert high / 2 < -low - 0.1


def test_diagonal_blocks_of_a_ragged_gram() -> None:
    gram = torch.arange(36.0).view(6, 6)
    blocks = diagonal_blocks(gram, 4)
    assert torch.equal(blocks[0], gram[:4, :4]) and torch.equal(blocks[1, :2, :2], gram[4:, 4:])
    assert not blocks[1, 2:].any() and not blocks[1, :, 2:].any()


def test_scales_lower_the_rounding_error_and_respect_ties() -> None:
    gram = random_gram(64)
    weights, fmt = [random_weight(32, 64), random_weight(16, 64, 1)], FORMATS["int3"]
    tie = torch.arange(64) % 32
    for index in (None, tie):
        scale, exponent = search_scale(weights, [fmt, FORMATS["int2"]], 32, gram, tie=index)
        assert exponent > 0 and (scale > 0).all()
    assert torch.equal(scale[:32], scale[32:])

    def error(factors: torch.Tensor) -> float:
        gram_of_scaled = gram / factors.unsqueeze(1) / factors
        packed = clip.quantize([weights[0] * factors], [fmt], 32, gram_of_scaled)[0][fmt.name]
        difference = dequantize(packed) / factors - weights[0]
        return float(((difference @ gram) * difference).sum())

    best, _ = search_scale(weights[:1], [fmt], 32, gram)
    assert error(best) < error(torch.ones(64))


PRODUCERS = {  # the last part of each group's producer, by the group's first linear
    "llama": {"q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "post_attention_layernorm",
              "down_proj": "up_proj"},
    "gemma2": {"q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "pre_feedforward_layernorm",
               "down_proj": "up_proj"},
    "opt": {"q_proj": "self_attn_layer_norm", "out_proj": "v_proj", "fc1": "final_layer_norm", "fc2": "fc1"},
    "phi3": {"qkv_proj": "input_layernorm", "o_proj": None, "gate_up_proj": "post_attention_layernorm",
             "down_proj": None},
}  # fmt: skip


@pytest.mark.parametrize("family", PRODUCERS)
def test_producers_are_found_by_trying_and_folding_changes_nothing(family: str) -> None:
    model = ARCHITECTURES[family].build()
    parts = take_inventory(model)
    stream = CalibrationStream(model, random_tokens(1, 40))
    tokens = random_tokens(2, 32, seed=1)
    with torch.no_grad():
        before = model(tokens).logits
        for group in stream.measure(parts.in_block(0)):
            first = group.linears[0]
            head_dim = getattr(model.config, "head_dim", None) or 16
            fold = find_fold(model, f"{parts.blocks_path}.0", group.linears, head_dim, stream.sample)
            expected = PRODUCERS[family][first.role.rpartition(".")[2]]
            assert (fold and fold.producer.rpartition(".")[2]) == expected
            if fold is not None:
                apply_fold(model, fold, group.linears, torch.rand(int(fold.index.max()) + 1) + 0.5)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "producer"), [("qwen3_moe", "up_proj"), ("mixtral", "up_proj"), ("gpt_oss", None)])
def test_an_expert_s_down_takes_its_scales_from_its_own_up_and_the_router_s_norm_gives_none(
    kind: str, producer: str | None
) -> None:
    """Though a token may reach none of them; gpt-oss adds 1 to up and clips it, so nothing can be folded there."""
    model = mixture(kind)
    parts = take_inventory(model)
    stream = CalibrationStream(model, random_tokens(1, 4))
    tokens = random_tokens(2, 32, seed=1)
    downs = 0
    with torch.no_grad():
        before = model(tokens).logits
        for group in stream.measure(parts.in_block(0)):
            first = group.linears[0]
            if first.kind != "expert":
                continue
            fold = find_fold(model, f"{parts.blocks_path}.0", group.linears, 16, stream.sample)
            down = first.role.endswith("down_proj")
            downs += down
            expected = first.name.replace("down_proj", producer) if down and producer else None
            assert (fold and fold.producer) == expected
            if fold is not None:
                apply_fold(model, fold, group.linears, torch.rand(int(fold.index.max()) + 1) + 0.5)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-3, atol=1e-3)
    assert downs == EXPERTS


def test_linears_that_read_one_tensor_are_found() -> None:
    model = tiny_llama()
    groups = shared_inputs(model, take_inventory(model).linears, random_tokens(1, 8))
    roles = [[name.rpartition(".")[2] for name in group] for group in groups]
    assert roles == 2 * [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def test_an_interrupted_run_resumes_at_its_last_block(
    tiny_folder: Path, tmp_path: Path, configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_folder, tmp_path / "whole", configuration, method="awq+gptq")
    make = quantize_run.BlockQuantizer.make
    made: list[int] = []

    def failing(self: object, block: int) -> object:
        made.append(block)
        if made == [0, 1]:
            raise KeyboardInterrupt
        return make(self, block)

    monkeypatch.setattr(quantize_run.BlockQuantizer, "make", failing)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, output, configuration, method="awq+gptq")
    assert not output.exists() and work_folder(output).is_dir()
    with pytest.raises(AmqError, match="holds an interrupted run: add --resume"):
        run(tiny_folder, output, configuration, method="awq+gptq")
    with pytest.raises(AmqError, match="made with another seed"):
        run(tiny_folder, output, configuration, method="awq+gptq", seed=1, resume=True)
    run(tiny_folder, output, configuration, method="awq+gptq", resume=True)
    assert made == [0, 1, 1]  # block 0 was not made again
    assert content(output) == content(whole)


def interrupted(folder: Path, output: Path, configuration: Path, **settings: Any) -> Path:
    """The work folder of a run that ended after its first block."""
    with pytest.MonkeyPatch.context() as patch:
        save = WorkFolder.save

        def once(self: WorkFolder, block: int, result: Any) -> None:
            if block:
                raise KeyboardInterrupt
            save(self, block, result)

        patch.setattr(WorkFolder, "save", once)
        with pytest.raises(KeyboardInterrupt):
            run(folder, output, configuration, **settings)
    return work_folder(output)


def test_a_text_that_was_rewritten_meanwhile_is_refused(tiny_folder: Path, tmp_path: Path, configuration: Path) -> None:
    """Under the same name: else blocks of two calibrations would lie in one checkpoint."""
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    interrupted(tiny_folder, output, configuration, calibration=str(text))
    whole = text.read_text()
    text.write_text(whole[::-1])
    with pytest.raises(AmqError, match="was made with another calibration text, calibration windows: use the same"):
        run(tiny_folder, output, configuration, calibration=str(text), resume=True)
    text.write_text(whole)
    run(tiny_folder, output, configuration, calibration=str(text), resume=True)


def damage_a_tensor(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 0xFF
    path.write_bytes(data)


def change_facts(text: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}
        save_file(tensors, path, metadata=metadata | {"facts": text})

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_a_tensor, "its hash differs"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "is damaged"),
        (change_facts("["), "its facts are no JSON"),
        (change_facts('{"linears": 5}'), r"its facts at \$\.linears: expected `array`, got `int`"),
        (change_facts('{"linears": ["a"], "errors": {}, "notes": []}'), "it holds 'a', which has no format"),
    ],
)
def test_a_finished_block_that_was_damaged_meanwhile_is_named(
    tiny_folder: Path, tmp_path: Path, configuration: Path, damage: Callable[[Path], None], message: str
) -> None:
    work = interrupted(tiny_folder, tmp_path / "out", configuration, method="rtn")
    damage(work / "block-000.safetensors")
    with pytest.raises(AmqError, match=f"block-000.safetensors is damaged .*{message}.*: delete it and run") as raised:
        run(tiny_folder, tmp_path / "out", configuration, method="rtn", resume=True)
    assert "\n" not in str(raised.value)
    (work / "block-000.safetensors").unlink()
    run(tiny_folder, tmp_path / "out", configuration, method="rtn", resume=True)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000])
def test_a_damaged_identity_is_named(tiny_folder: Path, tmp_path: Path, configuration: Path, text: str) -> None:
    work = interrupted(tiny_folder, tmp_path / "out", configuration, method="rtn")
    (work / "identity.json").write_text(text)
    with pytest.raises(AmqError, match="identity.json"):
        run(tiny_folder, tmp_path / "out", configuration, method="rtn", resume=True)


@pytest.mark.parametrize("method", ["rtn", "bank"])
def test_equal_runs_write_equal_weights(tiny_folder: Path, tmp_path: Path, configuration: Path, method: str) -> None:
    one, two = (run(tiny_folder, tmp_path / name, configuration, method=method) for name in ("one", "two"))
    for name in ("model.safetensors", "config.json", "configuration.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"formats": [1]}, r"\$\.formats: expected `object`, got `array`"),
        ({"formats": {"model.layers.0.mlp.up_proj": 5}}, r"\$\.formats.*: expected `str`, got `int`"),
        ({"group_size": "32"}, r"\$\.group_size: expected `int`, got `str`"),
        ({"group_size": [32]}, r"\$\.group_size: expected `int`, got `array`"),
        ({"provenance": 5}, r"\$\.provenance: expected `object \| null`, got `int`"),
        ({"provenance": {"bank_windows": "x"}}, r"\$\.provenance\.bank_windows: expected"),
        ({"provenance": {"bank_windows": 0}}, "expected bank_windows from 1 to"),
    ],
)
def test_a_damaged_configuration_is_named(configuration: Path, entries: dict, message: str) -> None:
    change(configuration, **entries)
    with pytest.raises(AmqError, match=message) as raised:
        Configuration.load(configuration)
    assert str(configuration) in str(raised.value)


def test_a_float32_model_is_stored_in_16_bits_and_a_bfloat16_one_stays(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    for dtype, stored in ((torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)):
        folder = make_folder(tiny_llama().to(dtype))
        output = tmp_path / str(stored)
        quantize(str(folder), str(output), uniform="int4", group_size=32, method="rtn", **SMALL)
        checkpoint = open_checkpoint(output)
        assert {checkpoint.tensor(n).dtype for n in checkpoint.other_names} == {stored}
        assert checkpoint.config["dtype"] == str(stored).removeprefix("torch.")


def change(path: Path, **entries: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"formats": {"model.layers.0.nothing": "int4"}}, "'model.layers.0.nothing'.*which the model does not have"),
        ({"formats": {"model.layers.0.self_attn.q_proj": "int4"}}, "lacks 'model.layers.0.mlp.down_proj'"),
        ({"formats": {"model.layers.0.self_attn.q_proj": "int9"}}, "unknown format 'int9'"),
        ({"provenance": {"model_fingerprint": "other"}}, "searched on other weights than those of"),
        ({"schema": "other"}, "is not a configuration"),
        ({"cache": {"layers.0": "int4"}}, "configuration's cache: .* got none for 'layers.1'; correct it, or"),
    ],
)
def test_a_configuration_of_something_else_is_refused(
    tiny_folder: Path, tmp_path: Path, configuration: Path, entries: dict, message: str
) -> None:
    change(configuration, **entries)
    with pytest.raises(AmqError, match=message):
        run(tiny_folder, tmp_path / "out", configuration)
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_other_bad_input(tiny_folder: Path, tmp_path: Path, configuration: Path, make_folder: Callable) -> None:
    with pytest.raises(AmqError, match="give one of --configuration FILE and --uniform FORMAT"):
        run(tiny_folder, tmp_path / "out", configuration, uniform="int4")
    with pytest.raises(AmqError, match="the bank has fractional zero points, not integer ones"):
        run(tiny_folder, tmp_path / "out", configuration, method="bank", zero_points="integer")
    with pytest.raises(AmqError, match="less than one window"):
        run(tiny_folder, tmp_path / "out", configuration, window_length=100_000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(AmqError, match="is not empty"):
        run(tiny_folder, tmp_path / "full", configuration)
    broken = tiny_llama()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(AmqError, match=r"model\.layers\.1\.mlp\.up_proj holds 1 non-finite weights"):
        run(make_folder(broken), tmp_path / "out", configuration)
    assert not (tmp_path / "out").exists() and not work_folder(tmp_path / "out").exists()


def test_inputs_that_overflow_name_the_linear() -> None:
    model = randomized(tiny_llama(), 0)
    stream = CalibrationStream(model, random_tokens(1, 40))
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1e38)
    with pytest.raises(AmqError, match=r"inputs of model\.layers\.0\.mlp\.down_proj are not finite"), torch.no_grad():
        stream.measure(take_inventory(model).in_block(0))


def test_a_full_disk_leaves_nothing_but_the_finished_blocks(
    tiny_folder: Path, tmp_path: Path, configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("amq.checkpoint.store.save_file", full)
        with pytest.raises(AmqError, match="the disk is full"):
            run(tiny_folder, output, configuration, method="rtn")
    assert not output.exists()
    run(tiny_folder, output, configuration, method="rtn", resume=True)
    open_checkpoint(output)
    shutil.rmtree(output)


@pytest.mark.parametrize("method", ["rtn", "gptq", "bank"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head(tmp_path: Path, make_folder: Callable, configuration: Path, method: str, tied: bool) -> None:
    """One tensor for head and embedding; what comes after sees it; bits are of linears and head, bytes of all."""
    from transformers import AutoModelForCausalLM

    source = make_folder(tiny_llama(tie_word_embeddings=tied))
    folder = run(source, tmp_path / "out", configuration, method=method, head="int6")
    checkpoint, log = open_checkpoint(folder), json.loads((folder / "quantization.json").read_text())
    packed = checkpoint.packed("lm_head")
    assert checkpoint.record.embedding == ({"model.embed_tokens": "lm_head"} if tied else {})
    linears, whole = Configuration.load(configuration), Configuration.load(folder / "configuration.json")
    assert whole.formats == {**linears.formats, "lm_head": "int6"}
    assert log["head"]["bytes"] == packed.nbytes and 0 < log["head"]["relative_error"] < 0.05
    numel = sum(checkpoint.tensor(name).numel() for name in checkpoint.other_names)
    assert log["memory"]["total"] == sum(checkpoint.packed(n).nbytes for n in checkpoint.record.formats) + 2 * numel
    without = run(source, tmp_path / "without", configuration, method=method)
    before = open_checkpoint(without)
    inventory = take_inventory(tiny_llama(tie_word_embeddings=tied))
    assert log["bits_per_weight"] == round(whole.bits_per_weight(inventory.weights), 4)
    bits = json.loads((without / "quantization.json").read_text())["bits_per_weight"]
    assert bits == round(linears.bits_per_weight(inventory.linears), 4) != log["bits_per_weight"]
    changed = any(
        not torch.equal(before.packed(n).qweight, checkpoint.packed(n).qweight) for n in before.record.formats
    )
    assert changed == (tied and method == "gptq")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = random_tokens(2, 24)
    embedded = dequantize(packed)[tokens] if tied else checkpoint.tensor("model.embed_tokens.weight")[tokens].float()
    assert torch.equal(loaded.get_input_embeddings()(tokens), embedded)
    hidden = loaded.model(tokens).last_hidden_state
    torch.testing.assert_close(loaded(tokens).logits, hidden @ dequantize(packed).T, rtol=1e-4, atol=1e-4)


def test_what_a_configuration_says_of_head_and_embedding_and_what_the_command_line_does(
    tmp_path: Path, make_folder: Callable, configuration: Path
) -> None:
    """The configuration's formats, unless a flag gives another; `none` leaves 16 bits and does not count them."""
    source = make_folder(tiny_llama(tie_word_embeddings=False))
    linears = Configuration.load(configuration)
    searched = tmp_path / "searched.json"
    replace(linears, formats={**linears.formats, "lm_head": "int4", "model.embed_tokens": "int2"}).save(searched)

    def outer(name: str, **flags: str) -> dict[str, str]:
        folder = run(source, tmp_path / name, searched, method="rtn", **flags)
        formats = Configuration.load(folder / "configuration.json").formats
        return {n: f for n, f in formats.items() if n not in linears.formats}

    assert outer("other", head="int8", embeddings="none") == {"lm_head": "int8"}
    assert outer("neither", head="none", embeddings="none") == {}
    assert outer("kept", head="16bit", embeddings="none") == {"lm_head": "16bit"}


def test_an_embedding_of_its_own_is_rounded_before_what_reads_it(
    tmp_path: Path, make_folder: Callable, configuration: Path
) -> None:
    source = make_folder(tiny_llama(tie_word_embeddings=False))
    folder = run(source, tmp_path / "out", configuration, embeddings="int4")
    checkpoint, log = open_checkpoint(folder), json.loads((folder / "quantization.json").read_text())
    assert checkpoint.record.embedding == {"model.embed_tokens": "model.embed_tokens"} and log.get("head") is None
    (entry,) = log["embeddings"]
    assert (entry["name"], entry["format"], entry["shape"]) == ("model.embed_tokens", "int4", [256, 64])
    assert entry["bytes"] == checkpoint.packed("model.embed_tokens").nbytes and 0 < entry["relative_error"] < 0.2
    numel = sum(checkpoint.tensor(name).numel() for name in checkpoint.other_names)
    assert log["memory"]["total"] == sum(checkpoint.packed(n).nbytes for n in checkpoint.record.formats) + 2 * numel
    assert "`model.embed_tokens` is an int4 weight" in (folder / "README.md").read_text()
    plain = run(source, tmp_path / "plain", configuration)
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(checkpoint.packed(name).qweight, open_checkpoint(plain).packed(name).qweight)


def test_an_embedding_that_scales_can_be_packed(tmp_path: Path, make_folder: Callable, configuration: Path) -> None:
    """Gemma's multiplies what it looks up; its head is tied to it."""
    source = make_folder(ARCHITECTURES["gemma2"].build(num_hidden_layers=2))
    folder = run(source, tmp_path / "out", configuration, head="int8", method="rtn")
    assert open_checkpoint(folder).record.embedding == {"model.embed_tokens": "lm_head"}


def test_heads_that_cannot_be_quantized(tmp_path: Path, make_folder: Callable, configuration: Path) -> None:
    source = make_folder(tiny_llama())
    with pytest.raises(AmqError, match="--embeddings int8: the embedding is tied to the head, which --head quantizes"):
        run(source, tmp_path / "out", configuration, embeddings="int8")
    for flag in ("head", "embeddings"):
        with pytest.raises(AmqError, match="unknown format 'int9'"):
            run(source, tmp_path / "out", configuration, **{flag: "int9"})
    assert not (tmp_path / "out").exists() and not work_folder(tmp_path / "out").exists()


def test_the_grid_of_a_head_is_no_worse_than_its_range() -> None:
    from amq.quantize.head import round_to_grid
    from amq.quantize.quantizers import rtn

    weight = random_weight(48, 96)
    for fmt in (FORMATS["int4"], FORMATS["int8"]):
        fitted = (dequantize(round_to_grid(weight, fmt, 64, "fractional")) - weight).norm()
        assert fitted < (dequantize(rtn.quantize([weight], [fmt], 64)[0][fmt.name]) - weight).norm()


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from amq.cli import VERBS

    arguments = f"{tiny_folder} --uniform int4 --group-size 32 --method awq --windows 2 --window-length 48 "
    arguments += f"--calibration docstrings --perplexity-tokens 96 --output {tmp_path / 'out'}"
    assert VERBS["quantize"](arguments.split()) == 0
    shown = capsys.readouterr().out
    assert "14 linears at 5.0000 bits per weight" in shown and "perplexity on 96 tokens of docstrings: full" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "python -m amq.generate out" in card and "| int4 | 14 |" in card
