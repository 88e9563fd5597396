"""Model folders: the index decides which files are the model; headers, maps and configs that lie are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.model import open as models
from amq.model.inventory import check_weights, narrowed, take_inventory
from amq.model.open import load_model
from amq.model.weight_files import INDEX, read_header, weight_files
from amq.quantize.run import run_quantize
from amq.quantize.settings import QuantizeSettings

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def shards(folder: Path) -> Path:
    """The same model in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in (1, 2):
        chosen = {n: t for j, (n, t) in enumerate(tensors.items()) if j % 2 == i - 1}
        file = f"model-0000{i}-of-00002.safetensors"
        save_file(chosen, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def quantize(folder: Path, output: Path, **settings: Any) -> Path:
    given = {"uniform": "int8", "group_size": 32, "method": "rtn", "perplexity": "none", "windows": 1}
    run_quantize(QuantizeSettings(str(folder), str(output), window_length=32, **{**given, **settings}))
    return output


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("beside", ["consolidated.safetensors", "adapter_model.safetensors", "model.x.safetensors"])
def test_files_beside_the_shards_do_not_count(
    beside: str, shards: Path, tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(models, "check_memory", lambda needed, what, device="cpu": asked.append(needed))
    save_file({"w": torch.zeros(1000)}, shards / beside)
    loaded = load_model(str(shards))
    assert asked == [4 * sum(p.numel() for p in tiny_llama.parameters())]
    assert torch.equal(loaded.model.model.norm.weight, tiny_llama.model.norm.weight)


def test_one_file_goes_before_an_index(shards: Path, folder: Path, tiny_folder: Path, tiny_llama: nn.Module) -> None:
    """As in transformers: what is counted is what is loaded."""
    shutil.copy(tiny_folder / "model.safetensors", folder)
    for path in folder.glob("model-*"):
        path.write_bytes(b"something else")
    assert weight_files(folder) == [folder / "model.safetensors"]
    loaded = load_model(str(folder))
    assert torch.equal(loaded.model.model.norm.weight, tiny_llama.model.norm.weight)


def test_an_adapter_beside_a_checkpoint_does_not_alter_it(folder: Path, tmp_path: Path) -> None:
    output = quantize(folder, tmp_path / "out")
    save_file({"w": torch.zeros(3)}, output / "adapter_model.safetensors")
    assert [path.name for path in weight_files(output)] == ["model.safetensors"]
    open_checkpoint(output)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "Expected `object`|expected `object`|expected `WeightIndex`"),
        ({"metadata": {}}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": 3}, "weight_map"),
        ({"weight_map": {"a": 1}}, "weight_map"),
        ({"weight_map": {}}, "names no files"),
        ({"weight_map": {"a": "../model.safetensors"}}, "no file of this folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "no file of this folder"),
        ({"weight_map": {"a": ".."}}, "no file of this folder"),
        ({"weight_map": {"a": ""}}, "no file of this folder"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "no file of this folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
    ],
)
def test_index_that_lies(content: Any, message: str, shards: Path, tmp_path: Path) -> None:
    checkpoint = quantize(shards, tmp_path / "out")
    for path in (shards, checkpoint):
        (path / "model.safetensors").unlink(missing_ok=True)
        (path / INDEX).write_text(json.dumps(content))
        with pytest.raises(AmqError, match=message):
            weight_files(path)
    with pytest.raises(AmqError, match=message):
        load_model(str(shards))
    with pytest.raises(AmqError, match=message):
        open_checkpoint(checkpoint)


def test_adapter_alone_is_no_model(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(AmqError, match="has no weights: .*holds an adapter: merge it"):
        load_model(str(folder))
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(AmqError, match="other.safetensors is not named by an index"):
        load_model(str(folder))


def head(content: Any) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        (10**9).to_bytes(8, "little") + b"{}",
        head([]),
        head({"w": 3}) + b"\0" * 8,
        head({"w": {}}) + b"\0" * 8,
        head({"w": {**ENTRY, "shape": [2**40]}}) + b"\0" * 8,
        head({"w": {**ENTRY, "shape": [-2]}}) + b"\0" * 8,
        head({"w": {**ENTRY, "shape": "x"}}) + b"\0" * 8,
        head({"w": {**ENTRY, "data_offsets": [0, 2**62]}}) + b"\0" * 8,
        head({"w": {**ENTRY, "data_offsets": [8, 0]}}) + b"\0" * 8,
        head({"w": {**ENTRY, "data_offsets": [-8, 0]}}) + b"\0" * 8,
        head({"w": ENTRY}) + b"\0" * 7,
        (4).to_bytes(8, "little") + b"\xff\xff\xff\xff",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_header_that_lies(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(AmqError, match=r"model.safetensors is not a readable safetensors file"):
        read_header(folder / "model.safetensors")
    with pytest.raises(AmqError, match="model.safetensors is not a readable safetensors file"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, more than the files' 20 tensors"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is a number of"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ({"num_local_experts": 2**40}, "num_local_experts is"),
        ({"num_attention_heads": 0}, "could not load .*ZeroDivisionError"),
        ({"num_hidden_layers": "x"}, "could not load"),
        ({"num_hidden_layers": None}, "could not load"),
        ({"hidden_size": -64}, "could not load"),
        ({"hidden_size": 2**62}, "could not load"),
        ({"vocab_size": 2**31 - 1}, "could not load"),
        ({"head_dim": 2**31 - 2}, "could not load"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "could not load"),
        ({"model_type": 3}, "could not load"),
        ({"model_type": ["llama"]}, "could not load"),
        ({"hidden_act": "no such thing"}, "could not load"),
        ({"quantization_config": {"quant_method": "awq"}}, "could not load"),
    ],
)
def test_config_that_lies(values: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **values)
    with pytest.raises(AmqError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null"])
def test_config_that_is_no_object(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(AmqError, match="config.json: expected an object"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", ["no such type", 3, ["float32"]])
def test_unknown_dtype_in_config(dtype: Any, folder: Path) -> None:
    edit(folder, dtype=dtype)
    try:
        load_model(str(folder))  # float32 is asked for: transformers may not even look
    except AmqError as error:
        assert "could not load" in str(error)


def test_pickles_are_not_opened(folder: Path) -> None:
    """A file that transformers would otherwise take: an unpickling error, or worse, code that runs."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(AmqError, match="pytorch_model.bin is a pickle; save it again"):
        load_model(str(folder))


# weights that no format holds


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"]
)
def test_non_finite_weights_are_named(name: str, value: float, folder: Path, tmp_path: Path) -> None:
    rewrite(folder, lambda tensors: tensors[name].view(-1)[3].fill_(value))
    for method in ("rtn", "hqq"):
        with pytest.raises(AmqError, match=f"{name} holds 1 non-finite weights"):
            quantize(folder, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_non_finite_linear_is_called_a_linear(tiny_llama: nn.Module) -> None:
    linears = take_inventory(tiny_llama).linears
    check_weights(tiny_llama, linears)
    tiny_llama.get_submodule(linears[0].name).weight[0, 0] = float("nan")
    with pytest.raises(AmqError, match=f"linear {linears[0].name} holds 1 non-finite"):
        check_weights(tiny_llama, linears)


def test_weights_beyond_fp16_are_stored_in_bfloat16(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder, dtype="float16")
    rewrite(folder, lambda tensors: tensors["model.norm.weight"][0].fill_(70000.0))
    checkpoint = open_checkpoint(quantize(folder, tmp_path / "out"))
    assert checkpoint.tensor("model.norm.weight")[0] == torch.tensor(70000.0).bfloat16()
    assert checkpoint.config["dtype"] == "bfloat16"
    assert "float16, which its largest weight 7e+04 is beyond" in caplog.text


def test_narrowing_checks_its_range() -> None:
    tensor = torch.tensor([1.0, -65520.0])  # the least that fp16 rounds to infinity
    assert torch.equal(narrowed("w", tensor, torch.bfloat16), tensor.bfloat16())
    assert narrowed("w", torch.tensor([65519.0]), torch.float16) == 65504
    with pytest.raises(AmqError, match="w holds 6.552e\\+04, beyond the range of float16: say --dtype bfloat16"):
        narrowed("w", tensor, torch.float16)


# code that a folder brings along

CONFIGURATION = """from transformers import LlamaConfig
class AcmeConfig(LlamaConfig):
    model_type = 'acme_llama'
"""
MODELING = """from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_acme import AcmeConfig
Path({ran!r}).touch()
class AcmeForCausalLM(LlamaForCausalLM):
    config_class = AcmeConfig
"""


@pytest.fixture
def own_code(folder: Path, tmp_path: Path) -> Path:
    """A model with a class of its own, whose code leaves the file `ran` when it runs."""
    (folder / "configuration_acme.py").write_text(CONFIGURATION)
    (folder / "modeling_acme.py").write_text(MODELING.format(ran=str(tmp_path / "ran")))
    classes = {"AutoConfig": "configuration_acme.AcmeConfig", "AutoModelForCausalLM": "modeling_acme.AcmeForCausalLM"}
    edit(folder, model_type="acme_llama", auto_map=classes)
    return folder


def test_own_code_runs_only_when_it_is_trusted(own_code: Path, tmp_path: Path, tiny_llama: nn.Module) -> None:
    with pytest.raises(AmqError, match=r"brings Python code of its own.*give --trust-remote-code"):
        load_model(str(own_code))
    assert not (tmp_path / "ran").exists()
    loaded = load_model(str(own_code), trust_remote_code=True)
    assert type(loaded.model).__name__ == "AcmeForCausalLM" and (tmp_path / "ran").exists()
    assert torch.equal(loaded.model.model.norm.weight, tiny_llama.model.norm.weight)


@pytest.mark.parametrize("verb", ["search", "quantize", "eval", "generate", "serve", "bench"])
def test_every_verb_has_the_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from amq.cli import VERBS

    with pytest.raises(SystemExit):
        VERBS[verb](["--help"])
    assert "--trust-remote-code" in capsys.readouterr().out


def test_quantize_and_generate_with_own_code(own_code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from amq.generate import main

    arguments = [str(own_code), "--prompt", "ab", "--max-new-tokens", "2"]
    with pytest.raises(AmqError, match="--trust-remote-code"):
        main(arguments)
    with pytest.raises(AmqError, match="--trust-remote-code"):
        quantize(own_code, own_code.parent / "out")
    settings = QuantizeSettings(str(own_code), "out", uniform="int8", trust_remote_code=True)
    assert settings.trust_remote_code is True


def test_hub_cache_of_links(folder: Path, tmp_path: Path) -> None:
    """Snapshots of the hub are links to blobs."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir(), blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../blobs") / str(i))
    load_model(str(snapshot))


@pytest.mark.parametrize("sharded", [False, True])
def test_hub_download_takes_what_the_index_names(
    sharded: bool, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fnmatch import fnmatch

    import huggingface_hub

    save_file({"w": torch.zeros(9)}, shards / "consolidated.safetensors")
    (shards / "modeling_x.py").touch()
    if not sharded:
        every = {n: t for path in weight_files(shards) for n, t in load_file(path).items()}
        (shards / INDEX).unlink()
        save_file(every, shards / "model.safetensors", metadata={"format": "pt"})
    target = tmp_path / "snapshot"

    def download(name: str, allow_patterns: list[str], **options: Any) -> str:
        target.mkdir(exist_ok=True)
        for path in shards.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.resolve("acme/model") == target
    found = {path.name for path in target.glob("*.safetensors")}
    assert found == {path.name for path in weight_files(shards)} and not list(target.glob("*.py"))
    models.resolve("acme/model", trust_remote_code=True)
    assert (target / "modeling_x.py").is_file()
