"""`--rotation`: what is decided of an input, and that bank, checkpoint, transformers and exports keep to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mixtures import MIXTURES
from helpers.quantizing import output_error, random_gram, random_weight
from helpers.tiny_models import random_tokens, tiny_llama
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from amq.checkpoint import record as checkpoint_record
from amq.checkpoint.store import open_checkpoint
from amq.configuration import Configuration, Details, Provenance
from amq.errors import AmqError
from amq.export import export
from amq.formats import FORMATS
from amq.model.calibration import InputGroup
from amq.model.inventory import EXPERT, LinearSpec, take_inventory
from amq.packing import dequantize
from amq.quantize import quantize
from amq.quantize.bank import BankRecipe, BankSettings, WeightBank, open_bank
from amq.quantize.methods import ROTATIONS, rotation_of
from amq.quantize.quantizers import QUANTIZERS
from amq.quantize.resume import WorkFolder
from amq.quantize.rotate import Rotator
from amq.rotation import WIDTH, rotate
from amq.search.choose import Budget
from amq.search.records import RunFile
from amq.search.run import bank_rotation
from amq.search.settings import SearchSettings
from amq.search.space import SearchSpace
from amq.util.progress import Progress
from amq.util.tensors import hashes_metadata

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
INT2, INT3, INT4 = (FORMATS[name] for name in ("int2", "int3", "int4"))
CALIBRATION = random_tokens(3, 48)
SMALL: dict[str, Any] = {"windows": 3, "window_length": 48, "perplexity": "none", "calibration": "docstrings"}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))
    monkeypatch.setattr("amq.model.text.BUILTIN", {"docstrings": lambda: text})


def model_with_outliers() -> nn.Module:
    """Every input can be rotated; it pays but for down_proj of the last block, which lies on a grid of int2."""
    model = tiny_llama(intermediate_size=128)
    for spec in take_inventory(model).linears:
        weight = model.get_submodule(spec.name).weight.data
        weight[:, :: WIDTH // 4] *= 6
        if spec.name == DOWN:
            weight.copy_(torch.randint(0, 4, weight.shape, generator=torch.Generator().manual_seed(0)) / 16)
    return model


@pytest.fixture(scope="module")
def folder(make_folder: Callable[[nn.Module], Path]) -> Path:
    return make_folder(model_with_outliers())


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    path = tmp_path / "configuration.json"
    names = [s.name for s in take_inventory(model_with_outliers()).linears]
    Configuration({n: "int2" if n == DOWN else ("int3", "int4")[i % 2] for i, n in enumerate(names)}, 32).save(path)
    return path


def run(folder: Path, output: Path, configuration: Path, **settings: Any) -> Path:
    quantize(str(folder), str(output), configuration=str(configuration), **{**SMALL, **settings})
    return output


def spec(name: str, in_features: int, **options: Any) -> LinearSpec:
    return LinearSpec(name, 0, name, 48, in_features, **options)


def decided(setting: str, groups: Sequence[InputGroup], weights: dict[str, Tensor], name: str = "gptq") -> Rotator:
    rotator = Rotator(setting, QUANTIZERS[name], 32)
    rotator.decide(groups, lambda s: weights[s.name], lambda s: [INT2, INT4])
    return rotator


def with_outliers(rows: int, in_features: int, seed: int = 0) -> Tensor:
    weight = random_weight(rows, in_features, seed)
    weight[:, ::16] *= 6
    return weight


def on_a_grid(rows: int, in_features: int) -> Tensor:
    return torch.randint(0, 4, (rows, in_features), generator=torch.Generator().manual_seed(0)) / 16


def test_names() -> None:
    assert str(WIDTH) in ROTATIONS


@pytest.mark.parametrize("name", ["gptq", "clip"])
def test_rotating_spreads_outliers_and_lowers_the_output_error(name: str) -> None:
    weight, gram, q = with_outliers(48, 128), random_gram(128), spec("q", 128)
    errors = {}
    for setting in ("none", "64"):
        rotator = decided(setting, [InputGroup((q,), gram)], {"q": weight}, name)
        (made,) = rotator.quantize([q], [weight], [INT3], gram)
        assert made["int3"].rotation == (WIDTH if setting == "64" else 0)
        errors[setting] = float(output_error(weight, made["int3"], gram).sum())
    assert errors["64"] < 0.8 * errors["none"]


def test_rotated_codes_are_those_of_the_rotated_weight_for_the_rotated_input() -> None:
    """H G H, against the second moments of rotated inputs."""
    x = torch.randn(400, 128, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 2, 128)
    weight, q = with_outliers(16, 128), spec("q", 128)
    made = decided("64", [], {}).quantize([q], [weight], [INT3], x.T @ x / len(x))[0]["int3"]
    inner = rotate(x)
    expected = QUANTIZERS["gptq"]([rotate(weight)], [INT3], 32, inner.T @ inner / len(x))[0]["int3"]
    gap = dequantize(made) - dequantize(replace(expected, rotation=WIDTH))
    assert float(gap.norm()) < 0.02 * float(weight.norm())  # a rounding in float32 may move a code


def test_auto_decides_by_the_error_and_for_all_that_read_one_tensor() -> None:
    specs = {n: spec(n, 128) for n in ("q", "k", "o")} | {"odd": spec("odd", 96)}
    weights = {
        "q": with_outliers(48, 128), "k": with_outliers(16, 128, 1), "o": on_a_grid(48, 128),
        "odd": with_outliers(48, 96),
    }  # fmt: skip
    groups = [
        InputGroup((specs["q"], specs["k"]), random_gram(128)),
        InputGroup((specs["o"],), random_gram(128, seed=3)),
    ]
    groups.append(InputGroup((specs["odd"],), random_gram(96)))
    rotator = decided("auto", groups, weights)
    assert {n: rotator.of(s) for n, s in specs.items()} == {"q": WIDTH, "k": WIDTH, "o": 0, "odd": 0}
    assert rotator.text == "1 of 3 inputs rotated"
    assert decided("none", groups, weights).text == ""


def test_experts_of_a_layer_and_role_are_decided_together() -> None:
    """Also those that are measured later, and whatever each of them would be by itself."""

    def expert(number: int) -> LinearSpec:
        name = f"layers.0.experts.down_proj.{number}"
        return replace(spec(name, 128), role="experts.down_proj", kind=EXPERT, expert=number)

    experts = [expert(number) for number in range(6)]
    weights = {s.name: with_outliers(48, 128, s.expert or 0) for s in experts}
    weights[experts[5].name] = on_a_grid(48, 128)
    groups = [InputGroup((s,), random_gram(128, seed=i)) for i, s in enumerate(experts)]
    rotator = decided("auto", groups[:4], weights)
    rotator.decide(groups[4:], lambda s: weights[s.name], lambda s: [INT2, INT4])
    assert [rotator.of(s) for s in experts] == [WIDTH] * 6


def test_what_is_known_is_not_decided_again() -> None:
    q, k, gram = spec("q", 128), spec("k", 128), random_gram(128)
    rotator = Rotator("auto", QUANTIZERS["gptq"], 32, known={"q": 0, "k": 0})
    rotator.decide([InputGroup((q, k), gram)], lambda s: with_outliers(48, 128), lambda s: [INT2])
    assert rotator.of(q) == rotator.of(k) == 0


def test_scales_beyond_fp16() -> None:
    """Alike numbers become one that is eight times as large."""
    weight, q, gram = torch.full((8, 128), 5e4), spec("q", 128), random_gram(128)
    assert decided("auto", [InputGroup((q,), gram)], {"q": weight}).of(q) == 0
    with pytest.raises(AmqError, match=r"q: its weights reach 4.0e\+05, for which int2 needs scales beyond"):
        decided("64", [], {}).quantize([q], [weight], [INT2], gram)


@pytest.mark.parametrize("setting", ["auto", "64", "none"])
def test_errors_name_one_linear(setting: str) -> None:
    """Of what an input's second moments refuse, and of scales, whose own linear it is."""
    q, k, gram = spec("q", 128), spec("k", 128), torch.full((128, 128), torch.nan)
    with pytest.raises(AmqError, match=r"^q: the calibration inputs are not finite"):
        decided(setting, [InputGroup((q, k), gram)], dict.fromkeys("qk", with_outliers(48, 128))).quantize(
            [q, k], [with_outliers(48, 128)] * 2, [INT2], gram
        )


def test_scales_of_a_rotated_weight_name_it(make_folder: Callable[[nn.Module], Path], tmp_path: Path) -> None:
    model = tiny_llama(intermediate_size=128)
    model.model.layers[1].self_attn.k_proj.weight.data.fill_(5e4)
    source, name = make_folder(model), "model.layers.1.self_attn.k_proj"
    with pytest.raises(AmqError, match=f"^{name}: its weights reach 4.0e"):
        quantize(str(source), str(tmp_path / "out"), uniform="int2", method="rtn", rotation="64", **SMALL)


def test_methods_that_do_not_rotate() -> None:
    assert [rotation_of(m, "auto") for m in ("gptq", "clip", "awq", "awq+gptq", "hqq", "rtn", "autoround")] == [
        "auto", "auto", "none", "none", "none", "none", "none",
    ]  # fmt: skip
    assert rotation_of("hqq", "64") == rotation_of("gptq", "64", "integer") == rotation_of("bank", "64") == "64"
    assert rotation_of("gptq", "auto", "symmetric") == "none"
    with pytest.raises(AmqError, match="--method awq does not rotate, because its scales belong to single input"):
        quantize("m", "out", uniform="int4", method="awq", rotation="64")
    with pytest.raises(AmqError, match="autoround does not rotate, because it rounds weights as it finds them: use"):
        quantize("m", "out", uniform="int4", method="autoround", rotation="64")
    with pytest.raises(AmqError, match="rotation must be one of auto, 64, none, got '32'"):
        quantize("m", "out", uniform="int4", rotation="32")


def bank_of(cache: Path, rotation: str, formats: Any = (INT2, INT4), proxy: str = "gptq", **options: Any) -> WeightBank:
    model = options.pop("model", None) or model_with_outliers()
    settings = BankSettings(proxy, 32, CALIBRATION, rotation)
    return open_bank(model, take_inventory(model), formats, settings, cache=cache, **options)


class Notes(Progress):
    """Keeps the notes of steps."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Any]:
        yield self.found.append


def rotations(bank: WeightBank, fmt: str = "int4") -> dict[str, int]:
    return {name: bank.get(name, fmt).rotation for name in bank.names}


def test_a_bank_holds_rotated_weights_where_it_pays(tmp_path: Path) -> None:
    notes = Notes()
    bank = bank_of(tmp_path, "auto", progress=notes)
    found = rotations(bank)
    assert found == rotations(bank, "int2") and found[DOWN] == 0 and set(found.values()) == {0, WIDTH}
    assert sum("of 4 inputs rotated" in note for note in notes.found) == 2
    weight = model_with_outliers().get_submodule("model.layers.0.mlp.up_proj").weight
    packed = bank.get("model.layers.0.mlp.up_proj", "int4")
    error = float((dequantize(packed).double() - weight.double()).square().sum())
    assert packed.rotation and bank.weight_errors()["model.layers.0.mlp.up_proj"]["int4"] == pytest.approx(error)
    assert error < 0.05 * float(weight.square().sum())


def test_rotations_have_banks_of_their_own(tmp_path: Path) -> None:
    assert len({bank_of(tmp_path, setting, [INT4]).folder for setting in ROTATIONS}) == 3
    same = {bank_of(tmp_path, setting, [INT4], "rtn").folder for setting in ("auto", "none")}
    assert len(same) == 1 and set(rotations(bank_of(tmp_path, "64", [INT4], "rtn")).values()) == {WIDTH}


def test_a_format_that_is_added_is_rotated_as_the_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rotations(bank_of(tmp_path, "auto", [INT4]))
    monkeypatch.setattr(Rotator, "_pays", lambda *_: pytest.fail("it was decided before"))
    assert rotations(bank_of(tmp_path, "auto", [INT3, INT4]), "int3") == first


def test_the_formats_of_a_bank_do_not_decide(tmp_path: Path) -> None:
    """Else two tables that open one bank with other formats would get other weights. One may be named."""
    banks = [bank_of(tmp_path / fmt.name, "auto", [fmt]) for fmt in (INT2, INT4)]
    assert rotations(banks[0], "int2") == rotations(banks[1], "int4")
    named = bank_of(tmp_path / "int4", "int3", [INT4])
    assert named.folder == banks[1].folder != bank_of(tmp_path / "int4", "int4", [INT4]).folder


@pytest.mark.parametrize("value", [torch.tensor(32), torch.tensor([64, 64]), None])
def test_a_damaged_rotation_is_named(tmp_path: Path, value: Tensor | None) -> None:
    bank = bank_of(tmp_path, "64", [INT4])
    path = bank.folder / "block-001.int4.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys() if n != f"{DOWN}.rotation"}
    tensors |= {} if value is None else {f"{DOWN}.rotation": value}
    save_file(tensors, path, metadata=hashes_metadata(tensors))
    with pytest.raises(AmqError, match="block-001.int4.safetensors is damaged .*: delete it and run the same command"):
        bank_of(tmp_path, "64", [INT4]).get(DOWN, "int4")


def test_inputs_that_64_does_not_divide(tmp_path: Path) -> None:
    message = r"model.layers.0.mlp.down_proj: 96 input features cannot be rotated 64 at a time.*--rotation auto"
    with pytest.raises(AmqError, match=message):
        bank_of(tmp_path / "banks", "64", model=tiny_llama())
    assert not (tmp_path / "banks").exists()
    found = rotations(bank_of(tmp_path / "banks", "auto", model=tiny_llama()))
    assert {n: r for n, r in found.items() if "down_proj" in n and r} == {}


def test_a_recipe_follows_the_configuration() -> None:
    recipe = BankRecipe("gptq", 64, "pydoc", 24, 512, 0, "auto")
    for provenance, expected in (
        (None, "auto"), (Provenance(), "auto"), (Provenance(proxy="gptq"), "none"), (Provenance(rotation="64"), "64"),
    ):  # fmt: skip
        assert recipe.of(Configuration({}, 64, Details(provenance=provenance))).rotation == expected


def test_a_checkpoint_of_rotated_weights(folder: Path, tmp_path: Path, configuration: Path) -> None:
    """By default; transformers computes with it, saves it again, and dequantizes it to what the weights say."""
    from transformers import AutoModelForCausalLM

    out = run(folder, tmp_path / "out", configuration)
    checkpoint = open_checkpoint(out)
    record = checkpoint.record
    assert record.version == 4 and 0 < len(record.rotation) < len(record.formats) and DOWN not in record.rotation
    log = json.loads((out / "quantization.json").read_text())
    assert {n: e["rotation"] for n, e in log["linears"].items() if "rotation" in e} == record.rotation
    assert f"{len(record.rotation)} of the linears are stored rotated" in (out / "README.md").read_text()
    plain = tiny_llama(intermediate_size=128)
    plain.load_state_dict({n: checkpoint.tensor(n).float() for n in checkpoint.other_names}, strict=False)
    plain.tie_weights()
    for name in record.formats:
        plain.get_submodule(name).weight.data = dequantize(checkpoint.packed(name))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        expected = plain(tokens).logits
        for model in (loaded, again, again.dequantize()):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert open_checkpoint(tmp_path / "again").record == record


def test_gradients_pass_through_rotated_linears(folder: Path, tmp_path: Path, configuration: Path) -> None:
    from transformers import AutoModelForCausalLM

    out, tokens, gradients = run(folder, tmp_path / "out", configuration, rotation="64"), random_tokens(2, 20), []
    for dequantized in (False, True):
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        model = model.dequantize() if dequantized else model
        x = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=x, labels=tokens).loss.backward()
        gradients.append(x.grad)
    floor = 1e-5 * float(gradients[1].abs().max())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=floor)


def test_an_older_reader_refuses(
    folder: Path, tmp_path: Path, configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(folder, tmp_path / "out", configuration)
    monkeypatch.setattr(checkpoint_record, "VERSIONS", (1, 2, 3))
    with pytest.raises(
        AmqError, match="checkpoint version 4 is not known to this amq, which reads 1, 2 and 3: upgrade"
    ):
        open_checkpoint(out)


def test_without_rotation_the_file_is_as_it_was(folder: Path, tmp_path: Path, configuration: Path) -> None:
    out = run(folder, tmp_path / "out", configuration, rotation="none")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["version"] == 1 and "rotation" not in settings
    assert "rotated" not in (out / "README.md").read_text()


@pytest.mark.parametrize("method", ["rtn", "hqq", "clip"])
def test_methods_that_rotate_all(folder: Path, tmp_path: Path, configuration: Path, method: str) -> None:
    record = open_checkpoint(run(folder, tmp_path / "out", configuration, method=method, rotation="64")).record
    assert record.rotation == dict.fromkeys(record.formats, WIDTH)


def test_experts(make_folder: Callable[[nn.Module], Path], tmp_path: Path) -> None:
    source = make_folder(MIXTURES["qwen3_moe"].build(num_hidden_layers=2, moe_intermediate_size=64))
    quantize(str(source), str(tmp_path / "out"), uniform="int3", group_size=32, rotation="64", **SMALL)
    record = open_checkpoint(tmp_path / "out").record
    assert set(record.rotation) == set(record.formats) and record.has_experts
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(written["rotation"]) < len(record.rotation)  # experts as one entry
    name = next(n for n in record.formats if n.endswith("experts.down_proj.1"))
    one = replace(record, rotation={n: w for n, w in record.rotation.items() if n != name})
    with pytest.raises(AmqError, match=r"down_proj.0' and other experts of its layer are not rotated alike"):
        checkpoint_record.QuantizationRecord.parse(one.json(), "config.json")


def with_provenance(path: Path, **known: Any) -> Path:
    found = Configuration.load(path)
    Configuration(found.formats, found.group_size, Details(provenance=Provenance(**known))).save(path)
    return path


def test_the_configuration_says_how_it_was_searched(folder: Path, tmp_path: Path, configuration: Path) -> None:
    with_provenance(configuration, rotation="none")
    assert not open_checkpoint(run(folder, tmp_path / "a", configuration)).record.rotation
    assert open_checkpoint(run(folder, tmp_path / "b", configuration, rotation="64")).record.rotation
    with_provenance(configuration, rotation="int3")
    auto = open_checkpoint(run(folder, tmp_path / "auto", configuration)).record.rotation
    assert auto and DOWN not in auto
    with_provenance(configuration, rotation="64")
    with pytest.raises(AmqError, match="--rotation 64: --method awq does not rotate"):
        run(folder, tmp_path / "c", configuration, method="awq")


def test_the_bank_of_a_search_is_taken_as_it_is(folder: Path, tmp_path: Path, configuration: Path) -> None:
    with_provenance(configuration, proxy="gptq", rotation="auto", bank_windows=2)
    out = run(folder, tmp_path / "out", configuration, method="bank")
    assert open_checkpoint(out).record.rotation.keys() ^ open_checkpoint(out).record.formats.keys() >= {DOWN}
    with pytest.raises(AmqError, match="--rotation 64: the bank that the configuration was searched on has auto"):
        run(folder, tmp_path / "other", configuration, method="bank", rotation="64")
    with_provenance(configuration, proxy="gptq", rotation="int4", bank_windows=2)  # auto, as a search says it
    run(folder, tmp_path / "same", configuration, method="bank", rotation="auto")
    with_provenance(configuration, proxy="gptq")
    assert not open_checkpoint(run(folder, tmp_path / "old", configuration, method="bank")).record.rotation


def test_a_resumed_run_keeps_what_it_decided(folder: Path, tmp_path: Path, configuration: Path) -> None:
    whole, output = run(folder, tmp_path / "whole", configuration), tmp_path / "out"
    save = WorkFolder.save

    def once(self: WorkFolder, block: int, result: Any) -> None:
        if block:
            raise KeyboardInterrupt
        save(self, block, result)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, "save", once)
        run(folder, output, configuration)
    with pytest.raises(AmqError, match="made with another rotation"):
        run(folder, output, configuration, rotation="64", resume=True)
    run(folder, output, configuration, resume=True)
    assert open_checkpoint(output).record == open_checkpoint(whole).record


@pytest.mark.parametrize("to", ["gptq", "mlx", "auto-round", "gguf"])
def test_exports_refuse(folder: Path, tmp_path: Path, configuration: Path, to: str) -> None:
    out = run(folder, tmp_path / "out", configuration)
    with pytest.raises(AmqError, match="rotated weights, such as .* no other program multiplies: .*--rotation none"):
        export(out, to, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_zero_points_of_other_tools_are_not_rotated(folder: Path, tmp_path: Path, configuration: Path) -> None:
    out = run(folder, tmp_path / "out", configuration, zero_points="integer")
    assert not open_checkpoint(out).record.rotation


def test_a_recipe_holds_no_weights(folder: Path, tmp_path: Path, configuration: Path) -> None:
    export(run(folder, tmp_path / "out", configuration), "recipe", tmp_path / "recipe")
    assert (tmp_path / "recipe" / "README.md").is_file()


def test_settings_of_a_search() -> None:
    assert SearchSettings.make(model="m", output="r").rotation == "auto"
    assert SearchSettings.preset("paper", model="m", output="r").rotation == "none"
    of = SearchSettings.make(model="m", output="r", formats="int2,int3,int4,int6", group_size=64)
    space = SearchSpace.of(take_inventory(tiny_llama()), of)
    by = {3.4: "int3", 4.3: "int4", 2.5: "int2", 9.0: "int6"}
    assert {bits: bank_rotation(of, space, Budget(bits)) for bits in by} == by
    assert bank_rotation(of, space, Budget(max_loss=0.1)) == "int4"
    assert bank_rotation(replace(of, rotation="64"), space, Budget(3.4)) == "64"


def test_runs_that_name_no_rotation_had_none() -> None:
    settings = SearchSettings.make(model="m", output="r").json()
    assert settings.pop("rotation") == "auto"
    data = {
        "schema": RunFile.SCHEMAS[0], "status": "running", "settings": settings, "versions": {}, "machine": {},
        "model": {"name": "m", "fingerprint": "f", "parameters": 1, "blocks": 1}, "calibration": {"sha256": "s"},
        "linears": [{"name": "a", "block": 0, "role": "a", "out_features": 1, "in_features": 64}], "others": [],
        "head_is_tied": True, "kv_cache": {}, "pinned": {},
    }  # fmt: skip
    old = RunFile.parse(data, "run.json")
    assert old.provenance.rotation == old.settings.rotation == "none"
    assert RunFile.parse({**data, "rotation": "int3"}, "run.json").provenance.rotation == "int3"
