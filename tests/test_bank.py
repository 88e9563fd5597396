"""The weight bank on a tiny model: what it holds, what its key depends on, and that no failure leaves half a file."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.mixtures import MIXTURES, mixture
from helpers.tiny_models import ARCHITECTURES, random_tokens
from helpers.tiny_models import tiny_llama as make_tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.model.calibration import in_parts
from amq.model.inventory import get_linear, get_weight, take_inventory
from amq.packing import dequantize
from amq.quantize import quantizers
from amq.quantize.bank import BankSettings, open_bank
from amq.quantize.head import round_to_grid
from amq.util import tensors as tensors_module

pytestmark = pytest.mark.usefixtures("one_thread")

INT2, INT4 = FORMATS["int2"], FORMATS["int4"]
CALIBRATION = random_tokens(3, 48)
SETTINGS = BankSettings("gptq", 32, CALIBRATION)
RTN = BankSettings("rtn", 32)


@pytest.fixture
def banks(tmp_path: Path) -> Path:
    return tmp_path / "banks"


def build(
    model: nn.Module, cache: Path, settings: BankSettings = SETTINGS, formats: tuple = (INT2, INT4), **kwargs: Any
) -> Any:
    return open_bank(model, take_inventory(model), formats, settings, cache=cache, **kwargs)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def replace_quantizer(monkeypatch: pytest.MonkeyPatch, name: str, wrapper: Callable[[Any], Any]) -> None:
    monkeypatch.setitem(quantizers.QUANTIZERS, name, wrapper(quantizers.QUANTIZERS[name]))


def refuse(original: Any) -> Any:
    def quantize(*args: Any) -> Any:
        raise AssertionError("the bank quantized something that it had")

    return quantize


def failing_at(call: int, error: BaseException) -> Callable[[Any], Any]:
    """A quantizer that works `call` times and then raises."""

    def wrap(original: Any) -> Any:
        calls = iter(range(call))

        def quantize(*args: Any) -> Any:
            if next(calls, None) is None:
                raise error
            return original(*args)

        return quantize

    return wrap


@pytest.mark.parametrize("settings", [SETTINGS, RTN, BankSettings("hqq", 64)], ids=lambda s: s.proxy)
def test_holds_every_linear_in_every_format(tiny_llama: nn.Module, banks: Path, settings: BankSettings) -> None:
    before = {n: p.clone() for n, p in tiny_llama.named_parameters()}
    bank = build(tiny_llama, banks, settings)
    errors = bank.weight_errors()
    for spec in take_inventory(tiny_llama).linears:
        weight = get_linear(tiny_llama, spec.name).weight
        for fmt in (INT2, INT4):
            packed = bank.get(spec.name, fmt.name)
            assert (packed.format, packed.group_size) == (fmt, settings.group_size)
            assert (packed.out_features, packed.in_features) == tuple(weight.shape)
            error = float((dequantize(packed).double() - weight.double()).square().sum())
            assert errors[spec.name][fmt.name] == pytest.approx(error, rel=1e-5)
        assert errors[spec.name]["int4"] < 0.2 * errors[spec.name]["int2"]
    assert all(torch.equal(p, before[n]) for n, p in tiny_llama.named_parameters())
    assert not any(m._forward_hooks for m in tiny_llama.modules())


def test_rtn_bank_is_the_quantizer_s_output(tiny_llama: nn.Module, banks: Path) -> None:
    bank = build(tiny_llama, banks, RTN)
    for spec in take_inventory(tiny_llama).linears:
        expected = quantizers.QUANTIZERS["rtn"]([get_linear(tiny_llama, spec.name).weight], [INT2], 32, None)[0]["int2"]
        packed = bank.get(spec.name, "int2")
        assert all(torch.equal(getattr(packed, f), getattr(expected, f)) for f in ("qweight", "scale", "zero_point"))


@pytest.mark.parametrize("settings", [SETTINGS, RTN], ids=lambda s: s.proxy)
def test_second_open_builds_nothing(
    tiny_llama: nn.Module, banks: Path, settings: BankSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(tiny_llama, banks, settings)
    replace_quantizer(monkeypatch, settings.proxy, refuse)
    stamps = {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    second = build(tiny_llama, banks, settings)
    assert second.folder == first.folder and stamps == {p: p.stat().st_mtime_ns for p in second.folder.iterdir()}
    assert build(tiny_llama, banks, settings, (INT4,)).formats == (INT4,)


@pytest.mark.parametrize(("proxy", "call"), [("gptq", 0), ("gptq", 4), ("gptq", 6), ("rtn", 1)])
def test_interrupted_build_resumes_to_the_same_bytes(
    tiny_llama: nn.Module, banks: Path, tmp_path: Path, proxy: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gptq quantizes four groups of linears per block (qkv, o, gate and up, down), rtn all at once."""
    settings = replace(SETTINGS, proxy=proxy)
    whole = files(build(tiny_llama, tmp_path / "whole", settings).folder)
    with monkeypatch.context() as patch:
        replace_quantizer(patch, proxy, failing_at(call, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build(tiny_llama, banks, settings)
    (folder,) = banks.iterdir()
    kept = files(folder)
    assert not [n for n in kept if "tmp" in n]
    assert ("block-000.int2.safetensors" in kept) is (call >= (4 if proxy == "gptq" else 1))
    assert "block-001.int2.safetensors" not in kept
    assert not any(m._forward_hooks for m in tiny_llama.modules())
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.glob("block-*")}
    assert files(build(tiny_llama, banks, settings).folder) == whole
    assert {n: (folder / n).stat().st_mtime_ns for n in stamps} == stamps, "a finished file was written again"


def test_adding_a_format_builds_only_that_one(
    tiny_llama: nn.Module, banks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(tiny_llama, banks)
    before = files(first.folder)
    asked = []

    def record(original: Any) -> Any:
        def quantize(weights: Any, formats: Any, *rest: Any) -> Any:
            asked.append([f.name for f in formats])
            return original(weights, formats, *rest)

        return quantize

    replace_quantizer(monkeypatch, "gptq", record)
    both = build(tiny_llama, banks, formats=(INT2, FORMATS["int3"], INT4))
    assert asked == [["int3"]] * 8  # four groups of linears in each of two blocks
    after = files(both.folder)
    assert set(after) - set(before) == {"block-000.int3.safetensors", "block-001.int3.safetensors"}
    assert all(after[n] == before[n] for n in before)


def test_formats_do_not_depend_on_each_other(tiny_llama: nn.Module, banks: Path, tmp_path: Path) -> None:
    alone = build(tiny_llama, tmp_path / "alone", formats=(INT4,))
    together = build(tiny_llama, banks, formats=(INT2, FORMATS["int3"], INT4))
    for spec in take_inventory(tiny_llama).linears:
        a, b = dequantize(alone.get(spec.name, "int4")), dequantize(together.get(spec.name, "int4"))
        weight = get_linear(tiny_llama, spec.name).weight
        # The work matrix is wider and its products may round differently, which can flip a code here and there.
        assert float((a - weight).norm()) == pytest.approx(float((b - weight).norm()), rel=0.05)


def test_key_depends_on_everything_that_matters(tiny_llama: nn.Module, banks: Path) -> None:
    fingerprint = "0" * 32
    keys = [
        SETTINGS.key(fingerprint),
        SETTINGS.key("1" * 32),
        replace(SETTINGS, group_size=64).key(fingerprint),
        replace(SETTINGS, proxy="rtn").key(fingerprint),
        replace(SETTINGS, proxy="hqq").key(fingerprint),
        replace(SETTINGS, calibration=CALIBRATION.flip(0)).key(fingerprint),
        replace(SETTINGS, calibration=CALIBRATION[:2]).key(fingerprint),
        replace(SETTINGS, calibration=CALIBRATION.view(6, 24)).key(fingerprint),
    ]
    assert len(set(keys)) == len(keys)
    assert RTN.key(fingerprint) == replace(RTN, calibration=CALIBRATION).key(fingerprint)  # rtn reads no calibration
    folder = build(tiny_llama, banks, RTN).folder
    assert folder == build(make_tiny_llama(), banks, RTN).folder
    tiny_llama.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    assert folder != build(tiny_llama, banks, RTN).folder


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "another file"])
def test_damaged_file_is_named(tiny_llama: nn.Module, banks: Path, damage: str) -> None:
    folder = build(tiny_llama, banks, RTN).folder
    path = folder / "block-001.int4.safetensors"
    content = path.read_bytes()
    path.write_bytes({
        "truncated": content[:-10], "empty": b"", "garbage": b"\xff" * len(content),
        "another file": (folder / "block-000.int4.safetensors").read_bytes(),
    }[damage])  # fmt: skip
    with pytest.raises(AmqError, match=r"block-001.int4.safetensors is damaged .*: delete it and run the same command"):
        build(tiny_llama, banks, RTN).get("model.layers.1.mlp.up_proj", "int4")
    build(tiny_llama, banks, RTN).get("model.layers.0.mlp.up_proj", "int4")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 0xFF
    path.write_bytes(data)


def scale_up(path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {n: file.get_tensor(n) * (4 if n.endswith(".scale") else 1) for n in file.keys()}
        save_file(tensors, path, metadata=file.metadata())


def raise_an_error(path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {n: file.get_tensor(n) * (2 if n.endswith(".weight_error") else 1) for n in file.keys()}
        save_file(tensors, path, metadata=file.metadata())


def drop_a_linear(path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys() if "down_proj" not in n}
        save_file(tensors, path, metadata=file.metadata())


def drop_the_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def break_the_hashes(path: Path) -> None:
    save_file(load_file(path), path, metadata={"amq_hashes": "[1]"})


@pytest.mark.parametrize(
    "damage", [flip_a_byte, scale_up, raise_an_error, drop_a_linear, drop_the_metadata, break_the_hashes]
)
@pytest.mark.parametrize("read", ["weights", "errors"])
def test_what_was_not_written_is_named(tiny_llama: nn.Module, banks: Path, damage: Any, read: str) -> None:
    """Structure intact: only the hashes tell. Either way of reading the file finds out."""
    bank = build(tiny_llama, banks, RTN)
    damage(bank.folder / "block-001.int4.safetensors")
    bank = build(tiny_llama, banks, RTN)
    with pytest.raises(AmqError, match=r"block-001.int4.safetensors is damaged .*hash.*: delete it and run the same"):
        if read == "weights":
            bank.get("model.layers.1.mlp.up_proj", "int4")
        else:
            bank.weight_errors()
    bank.get("model.layers.0.mlp.up_proj", "int4")
    bank.get("model.layers.1.mlp.up_proj", "int2")


def test_a_cache_that_cannot_be_made_is_named(tiny_llama: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for cache in (tmp_path / "file", tmp_path / "file" / "banks"):
        with pytest.raises(AmqError, match=r"the folder .*file.* cannot be made: .*; point AMQ_CACHE at"):
            build(tiny_llama, cache, RTN)


def test_what_a_killed_build_left_in_a_finished_bank_goes(tiny_llama: nn.Module, banks: Path) -> None:
    folder = build(tiny_llama, banks, RTN).folder
    left = folder / ".block-000.int4.safetensors.amq-abcd_123.tmp"
    left.mkdir()
    build(tiny_llama, banks, RTN)
    assert not left.exists()


def test_full_disk_is_foreseen(tiny_llama: nn.Module, banks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(AmqError, match=r"the bank needs 0.00 GiB under .*, 0.00 GiB are free: .*AMQ_CACHE"):
        build(tiny_llama, banks)
    assert not banks.exists()


@pytest.mark.parametrize("message", [None, "I/O error: No space left on device (os error 28)"], ids=["errno", "text"])
def test_disk_that_fills_up_leaves_no_partial_file(
    tiny_llama: nn.Module, banks: Path, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tensors_module.save_file

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        if "block-001.int2" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "full") if message is None else RuntimeError(message)
        original(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(tensors_module, "save_file", save)
        with pytest.raises(AmqError, match="the disk is full: could not write .*block-001.int2.safetensors"):
            build(tiny_llama, banks)
    (folder,) = banks.iterdir()
    names = set(files(folder))
    assert names == {"bank.json", "block-000.int2.safetensors", "block-000.int4.safetensors"}
    build(tiny_llama, banks).get("model.layers.1.mlp.up_proj", "int2")


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "mixtral"])
def test_grams_are_mean_x_xt_of_shared_inputs(name: str, banks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every linear's input caught from whole forwards, in float64."""
    model = ARCHITECTURES[name].build()
    parts = take_inventory(model)
    inputs: dict[str, list[torch.Tensor]] = {s.name: [] for s in parts.linears}
    handles = [
        get_linear(model, n).register_forward_pre_hook(
            lambda m, args, n=n: inputs[n].append(args[0].double().flatten(0, -2))
        )
        for n in inputs
    ]
    with torch.no_grad():
        for window in CALIBRATION:
            model(input_ids=window.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    expected = {n: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for n, x in inputs.items()}
    seen: list[tuple[list[torch.Tensor], torch.Tensor]] = []

    def record(original: Any) -> Any:
        def quantize(weights: Any, formats: Any, group_size: int, gram: torch.Tensor, *rest: Any) -> Any:
            seen.append((weights, gram))
            return original(weights, formats, group_size, gram, *rest)

        return quantize

    replace_quantizer(monkeypatch, "gptq", record)
    build(model, banks, formats=(INT4,))
    by_weight = {get_linear(model, n).weight.data_ptr(): n for n in inputs}
    groups = []
    for weights, gram in seen:
        names = [by_weight[w.data_ptr()] for w in weights]
        groups.append({n.rpartition(".")[2] for n in names})
        for n in names:
            scale = float(expected[n].diagonal().mean())
            torch.testing.assert_close(gram.double(), expected[n], rtol=1e-4, atol=1e-5 * scale)
    together = {
        "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
        "phi3": [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
        "opt": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
        "mixtral": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}],
    }[name]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, 3 * together))


def test_block_of_zero_weights(tiny_llama: nn.Module, banks: Path) -> None:
    """Nothing to approximate: exact zeros in every format, and no division by the block's energy."""
    for spec in take_inventory(tiny_llama).in_block(1):
        get_linear(tiny_llama, spec.name).weight.zero_()
    bank = build(tiny_llama, banks)
    for spec in take_inventory(tiny_llama).in_block(1):
        assert not dequantize(bank.get(spec.name, "int2")).any()


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("settings", [SETTINGS, RTN], ids=lambda s: s.proxy)
def test_experts_are_held_like_other_linears(
    kind: str, settings: BankSettings, banks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one of them in every format, its error beside it; and the same weights where memory is set aside for one
    linear at a time."""
    model = mixture(kind)
    linears = take_inventory(model).linears
    bank = build(model, banks, settings)
    errors = bank.weight_errors()
    monkeypatch.setattr("amq.quantize.bank.stacks", lambda specs: ([spec] for spec in specs))
    monkeypatch.setattr("amq.quantize.bank.in_parts", lambda linears: in_parts(linears, 0))
    divided = build(mixture(kind), tmp_path / "divided", settings)
    for spec in linears:
        weight = get_linear(model, spec.name).weight.double()
        for fmt in (INT2, INT4):
            packed = bank.get(spec.name, fmt.name)
            error = float((dequantize(packed).double() - weight).square().sum())
            assert errors[spec.name][fmt.name] == pytest.approx(error, rel=1e-5)
            assert torch.equal(packed.qweight, divided.get(spec.name, fmt.name).qweight)
        assert errors[spec.name]["int4"] < 0.2 * errors[spec.name]["int2"]


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_have_formats_of_their_own(
    tied: bool, banks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files stand beside those of the blocks, and none of these is made again for them."""
    model = make_tiny_llama(tie_word_embeddings=tied)
    outer = {s.name: [FORMATS["int6"], FORMATS["int8"]] for s in take_inventory(model).outer}
    assert list(outer) == (["lm_head"] if tied else ["model.embed_tokens", "lm_head"])
    plain = build(model, banks, RTN)
    before = files(plain.folder)
    replace_quantizer(monkeypatch, "rtn", refuse)
    bank = build(model, banks, RTN, outer=outer)
    assert bank.folder == plain.folder and bank.names == (*plain.names, *outer)
    after = files(bank.folder)
    assert set(after) - set(before) == {f"{n}.{f}.safetensors" for n in outer for f in ("int6", "int8")}
    assert all(after[n] == before[n] for n in before if n != "bank.json")
    assert json.loads(after["bank.json"])["outer"] == list(outer)
    errors = bank.weight_errors()
    for name in outer:
        weight = get_weight(model, name)
        for fmt in ("int6", "int8"):
            packed = bank.get(name, fmt)
            expected = round_to_grid(weight, FORMATS[fmt], 32, "fractional")
            assert all(torch.equal(packed.parts[part], expected.parts[part]) for part in packed.parts)
            error = float((dequantize(packed).double() - weight.double()).square().sum())
            assert errors[name][fmt] == pytest.approx(error, rel=1e-5)
        assert errors[name].keys() == {"int6", "int8"}
        with pytest.raises(AmqError, match=f"format 'int4' is not in this bank for {name} .it has int6, int8."):
            bank.get(name, "int4")
    monkeypatch.setattr("amq.quantize.bank.round_to_grid", lambda *_: pytest.fail("it was there"))
    build(model, banks, RTN, outer=outer)
    flip_a_byte(bank.folder / "lm_head.int8.safetensors")
    with pytest.raises(AmqError, match="lm_head.int8.safetensors is damaged .*hash"):
        build(model, banks, RTN, outer=outer).get("lm_head", "int8")


def test_the_disk_must_hold_head_and_embeddings_too(
    tiny_llama: nn.Module, banks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny_llama, banks, RTN)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(AmqError, match=r"the bank needs 0.00 GiB under .*, 0.00 GiB are free"):
        build(tiny_llama, banks, RTN, outer={"lm_head": [INT4]})
    with pytest.raises(AmqError, match="'model.embed_tokens' is no head or embedding .* it has lm_head"):
        build(tiny_llama, banks, RTN, outer={"model.embed_tokens": [INT4]})


def test_unknown_names(tiny_llama: nn.Module, banks: Path) -> None:
    bank = build(tiny_llama, banks, RTN)
    with pytest.raises(AmqError, match="linear 'lm_head' is not in the bank at"):
        bank.get("lm_head", "int4")
    with pytest.raises(AmqError, match=r"format 'int3' is not in this bank \(it has int2, int4\)"):
        bank.get("model.layers.0.mlp.up_proj", "int3")
    with pytest.raises(AmqError, match="unknown quantizer 'awq': expected one of gptq, guided, two_sided"):
        build(tiny_llama, banks, BankSettings("awq", 32))
    with pytest.raises(AmqError, match="group size 100 is not supported: expected one of 32, 64, 128"):
        build(tiny_llama, banks, BankSettings("rtn", 100))


@pytest.mark.parametrize("calibration", [None, CALIBRATION[:0]])
def test_gptq_needs_calibration(tiny_llama: nn.Module, banks: Path, calibration: torch.Tensor | None) -> None:
    with pytest.raises(AmqError, match=r"the gptq bank needs at least one calibration window \(--bank-windows\)"):
        build(tiny_llama, banks, BankSettings("gptq", 32, calibration))
    build(tiny_llama, banks, BankSettings("rtn", 32, calibration))


def test_non_finite_activations_are_refused(tiny_llama: nn.Module, banks: Path) -> None:
    tiny_llama.model.layers[0].mlp.up_proj.weight.mul_(1e30)
    tiny_llama.model.layers[0].mlp.gate_proj.weight.mul_(1e30)
    with pytest.raises(AmqError, match="not finite"):
        build(tiny_llama, banks)
