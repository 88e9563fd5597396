"""transformers and amq checkpoints: load, run, save, reload; what damaged ones say; linears that share an input."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import advise, tiny_checkpoint
from helpers.in_transformers import assert_same_tensors
from helpers.tiny_models import ARCHITECTURES, random_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import amq.integrations.transformers
from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.integrations.transformers import AmqConfig
from amq.kernels.embedding import StoredEmbedding
from amq.kernels.modules import QuantizedLinear, StoredLinear
from amq.packing import dequantize
from amq.util.extras import install_hint
from amq.util.tensors import HASHES, hashes_metadata, verify_file

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]

TOKENS = random_tokens(2, 20)
QKV = tuple(f"model.layers.1.self_attn.{role}_proj" for role in "qkv")
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": ARCHITECTURES["llama"].build,
    "qwen2": ARCHITECTURES["qwen2"].build,  # q, k and v have biases
    "phi3": ARCHITECTURES["phi3"].build,  # one linear for q, k, v and one for gate, up
    "untied": lambda: ARCHITECTURES["llama"].build(tie_word_embeddings=False),
    "mixtral": ARCHITECTURES["mixtral"].build,  # transformers renames and merges tensors of its original checkpoints
    "opt": ARCHITECTURES["opt"].build,  # every linear has a bias
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else tiny_checkpoint(MAKERS[name](), path)

    return folder


@pytest.fixture
def damaged(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folders("llama"), tmp_path / "damaged"))


def load(folder: Path, how: AmqConfig | None = None, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options, **({"quantization_config": how} if how else {}))


@pytest.mark.parametrize("name", MAKERS)
def test_load_run_save_reload(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Whole, in shards, and dequantized to a plain model; logits are the plain model's within float32 rounding."""
    model, info = AutoModelForCausalLM.from_pretrained(folders(name), output_loading_info=True)
    assert not any(info.values()), info
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, StoredLinear)}
    checkpoint = open_checkpoint(folders(name))
    assert linears.keys() == checkpoint.record.formats.keys()
    logits = model(TOKENS).logits
    for folder, size in ((tmp_path / "one", "1GB"), (tmp_path / "shards", "40KB")):
        model.save_pretrained(folder, max_shard_size=size)
        again = load(folder)
        assert_same_tensors(model, again)
        assert torch.equal(again(TOKENS).logits, logits)
        assert open_checkpoint(folder).record == checkpoint.record  # and the hashes of every file hold
    plain = load(folders(name)).dequantize()
    assert not any(isinstance(m, QuantizedLinear) for m in plain.modules())
    difference = (plain(TOKENS).logits - logits).abs().max() / logits.abs().max()
    assert 0 < difference < 3e-6
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert_same_tensors(load(tmp_path / "plain"), plain)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_packed_head(family: str, tmp_path: Path) -> None:
    """Tied, the embedding reads the packed head; nothing that transformers does ties, renews or stores it anew."""
    original = ARCHITECTURES[family].build(num_hidden_layers=2)
    tied = original.config.tie_word_embeddings
    advise(tiny_checkpoint(original, tmp_path / "in", head="int6"), {"layers.0": "int8", "layers.1": "int4"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "in", output_loading_info=True)
    assert not any(info.values()) and model.config.tie_word_embeddings is tied and model.all_tied_weights_keys == {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, StoredLinear) and isinstance(embedding, StoredEmbedding if tied else nn.Embedding)
    rows = dequantize(head.packed) if tied else original.get_input_embeddings().weight
    assert torch.equal(embedding(TOKENS), rows[TOKENS]) and embedding(TOKENS).shape == (2, 20, 64)
    logits = model(TOKENS).logits
    model.tie_weights()
    for folder, size in ((tmp_path / "one", "1GB"), (tmp_path / "shards", "40KB")):
        model.save_pretrained(folder, max_shard_size=size)
        assert_same_tensors(model, load(folder))
        assert torch.equal(load(folder)(TOKENS).logits, logits)
        assert open_checkpoint(folder).record == open_checkpoint(tmp_path / "in").record
    copied = copy.deepcopy(model)
    assert torch.equal(copied(TOKENS).logits, logits)
    assert not tied or copied.get_input_embeddings().head is copied.get_output_embeddings()
    ids = model.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    for size in (300, None):
        with pytest.raises(AmqError, match=r"call model.dequantize\(\) first"):
            model.resize_token_embeddings(size)
    plain = copied.dequantize()
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied
    assert 0 < (plain(TOKENS).logits - logits).abs().max() / logits.abs().max() < 3e-6
    assert torch.equal(plain.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0), ids)
    plain.save_pretrained(tmp_path / "plain")
    assert_same_tensors(load(tmp_path / "plain"), plain)
    plain.resize_token_embeddings(300, mean_resizing=False)
    assert plain(TOKENS).logits.shape[-1] == 300


def test_an_embedding_that_reads_a_packed_head(tmp_path: Path) -> None:
    folder = tiny_checkpoint(ARCHITECTURES["llama"].build(num_hidden_layers=2), tmp_path / "in", head="int4")
    model = load(folder, dtype=torch.bfloat16)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding(TOKENS).dtype == torch.bfloat16
    model.to(torch.float32)
    assert embedding(TOKENS).dtype == torch.float32
    compiled = torch.compile(embedding, backend="eager")
    assert torch.equal(compiled(TOKENS), embedding(TOKENS)) and torch.equal(embedding(TOKENS.int()), embedding(TOKENS))
    for outside in (-1, 256):
        with pytest.raises(IndexError):
            embedding(torch.tensor([outside]))
    state = {name: tensor + (tensor.dtype == torch.float16) for name, tensor in model.state_dict().items()}
    assert not any("embed_tokens" in name for name in state)
    model.load_state_dict(state)
    assert torch.equal(embedding(TOKENS), dequantize(head.packed)[TOKENS])
    edit_config(folder, lambda c: c["quantization_config"].update(embedding={"model.norm": "lm_head"}))
    with pytest.raises(AmqError, match="'model.norm' is a LlamaRMSNorm, expected an nn.Embedding"):
        load(folder)


def test_every_shard_carries_its_hashes(folders: Callable[[str], Path], tmp_path: Path) -> None:
    load(folders("llama")).save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        verify_file(shard)
        with safe_open(shard, "pt") as file:
            assert set(file.keys()) <= json.loads(file.metadata()[HASHES]).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_does_not_touch_quantized_weights(dtype: torch.dtype, folders: Callable[[str], Path]) -> None:
    model = load(folders("qwen2"), dtype=dtype)
    assert model(TOKENS).logits.dtype == dtype
    checkpoint = open_checkpoint(folders("qwen2"))
    for name in checkpoint.record.formats:
        module = model.get_submodule(name)
        assert module.bias is None or module.bias.dtype == dtype
        for part, stored in vars(checkpoint.packed(name)).items():
            assert not isinstance(stored, Tensor) or torch.equal(getattr(module.packed, part), stored)


def test_weights_are_mapped_and_prepared_when_used(folders: Callable[[str], Path]) -> None:
    model = load(folders("llama"))
    linears = [m for m in model.modules() if isinstance(m, StoredLinear)]
    assert all(m.data.is_meta for m in linears) and "backend=," in repr(linears[0])
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [tuple(int(end, 16) for end in m[0].split("-")) for m in maps if m[-1].endswith("/llama/model.safetensors")]
    for module in linears:
        address = module.packed.qweight.data_ptr()
        assert any(start <= address < end for start, end in spans), module.name
    model(TOKENS)
    assert all(m.prepared(torch.device("cpu")).backend == "cpu" for m in linears)
    model.to("meta")
    assert all(m.data.is_meta and m.packed.qweight.device.type == "cpu" for m in linears)


def test_state_dict_loads_into_another_model(folders: Callable[[str], Path]) -> None:
    model, other = load(folders("llama")), load(folders("llama"))
    state = {name: tensor + (tensor.dtype == torch.float16) for name, tensor in model.state_dict().items()}
    other(TOKENS)  # prepared weights must go
    other.load_state_dict(state)
    assert not torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    del state[f"{QKV[0]}.scale"]
    with pytest.raises(RuntimeError, match=f"Missing key.*{QKV[0]}.scale"):
        other.load_state_dict(state)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(device_map: Any, folders: Callable[[str], Path]) -> None:
    pytest.importorskip("accelerate", reason="transformers wants accelerate for a device_map")
    model = load(folders("llama"), device_map=device_map)
    assert torch.equal(model(TOKENS).logits, load(folders("llama"))(TOKENS).logits)


def test_device_maps_that_need_offloading_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """`auto` counts the quantized weights: the whole model has about 190 KB, of which they are 120."""
    pytest.importorskip("accelerate", reason="transformers wants accelerate for a device_map")
    with pytest.raises(AmqError, match="disk: amq does not move weights"):
        load(folders("llama"), device_map="auto", max_memory={"cpu": "100KB"}, offload_folder=tmp_path)
    with pytest.raises(AmqError, match="cpu, cuda:0: amq does not move weights"):
        load(folders("llama"), device_map={"model": "cpu", "lm_head": "cuda:0"})


def test_loading_attributes(folders: Callable[[str], Path], tmp_path: Path) -> None:
    exact, rounded = load(folders("llama")), load(folders("llama"), AmqConfig(activations="int8", backend="cpu"))
    assert not torch.equal(exact(TOKENS).logits, rounded(TOKENS).logits)
    rounded.save_pretrained(tmp_path)
    assert "activations" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    reference = load(folders("llama"), AmqConfig(backend="reference"))
    assert torch.allclose(reference(TOKENS).logits, exact(TOKENS).logits, atol=1e-5)
    with pytest.raises(AmqError, match="unknown backend 'gpu'"):
        load(folders("llama"), AmqConfig(backend="gpu"))(TOKENS)
    with pytest.raises(AmqError, match="int8 does not go with backend reference"):
        load(folders("llama"), AmqConfig(activations="int8", backend="reference"))(TOKENS)


def test_pipeline(folders: Callable[[str], Path]) -> None:
    pipe = transformers.pipeline("text-generation", str(folders("llama")))
    assert pipe("hello", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("hello")


def test_remote_code_and_none(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """trust_remote_code loads the same model; plain loading does not ask, and saves no dangling auto_map."""
    remote, plain = load(folders("llama"), trust_remote_code=True), load(folders("llama"))
    assert type(remote).__name__ == "AmqLlamaForCausalLM" and type(plain).__name__ == "LlamaForCausalLM"
    assert torch.equal(remote(TOKENS).logits, plain(TOKENS).logits)
    remote.save_pretrained(tmp_path / "remote")
    plain.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "remote" / "modeling_amq.py").exists()
    assert not json.loads((tmp_path / "plain" / "config.json").read_text()).get("auto_map")


def test_remote_code_without_amq_says_what_to_install(folders: Callable[[str], Path]) -> None:
    """Random weights would be the alternative. transformers' own words would be the name of another package."""
    code = "import sys; sys.modules['amq'] = None; from transformers import AutoModelForCausalLM as Model; "
    code += f"Model.from_pretrained({str(folders('llama'))!r}, trust_remote_code=True)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    said = f"ImportError: the weights of this model are packed by amq: {install_hint()}"
    assert result.returncode == 1 and result.stderr.rstrip().endswith(said), result.stderr


def test_saving_into_the_folder_it_was_loaded_from(damaged: Path) -> None:
    model = load(damaged)
    model.save_pretrained(damaged)
    again = load(damaged)
    assert_same_tensors(model, again)
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


def test_importing_amq_loads_neither_torch_nor_transformers() -> None:
    code = "import amq, sys; assert not {'torch', 'transformers', 'amq.integrations.transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)


def test_registration_follows_the_module_that_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for transformers' quantizers, which take seconds to import."""
    (tmp_path / "stand_in.py").write_text("HERE = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(amq._Registration, "MODULE", "stand_in")
    monkeypatch.setattr(sys, "meta_path", [amq._Registration, *sys.meta_path])
    seen: list[Any] = []
    monkeypatch.setattr(amq.importlib, "import_module", lambda name: seen.append((name, sys.modules["stand_in"].HERE)))
    import stand_in

    assert (
        stand_in.HERE and seen == [("amq.integrations.transformers", True)] and amq._Registration not in sys.meta_path
    )


def test_registering_twice_and_an_old_transformers(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    amq.integrations.transformers.register()
    mapping = {
        k: v for k, v in amq.integrations.transformers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING.items() if k != "amq"
    }
    monkeypatch.setattr(amq.integrations.transformers.auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", mapping)
    monkeypatch.setattr(transformers, "__version__", "5.2.0")
    amq.integrations.transformers.register()
    with pytest.raises(AmqError, match="transformers 5.2.0 cannot load amq checkpoints: amq needs"):
        load(folders("llama"))


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_damaged_tensors_are_refused(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AmqError, match=r"model.safetensors: tensor .* is not what was written"):
        load(damaged)
    load(damaged, AmqConfig(verify=False))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AmqError, match="model.safetensors cannot be read"):
        load(damaged)


@pytest.mark.parametrize("gone", ["model.norm.weight", "model.embed_tokens.weight", f"{QKV[1]}.zero_point"])
def test_missing_tensors_are_refused(gone: str, damaged: Path) -> None:
    """transformers itself would fill them with random numbers."""
    path = damaged / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != gone}
    save_file(tensors, path, metadata=hashes_metadata(tensors))
    with pytest.raises(AmqError, match=f"damaged lacks .* such as {gone}"):
        load(damaged)


def test_damaged_configs_are_refused(damaged: Path) -> None:
    edit_config(damaged, lambda c: c["quantization_config"].update(colour="red"))
    load(damaged)
    edit_config(damaged, lambda c: c.update(intermediate_size=97))
    with pytest.raises(
        AmqError, match=r"gate_proj: the model's config.json makes it \[97, 64\], the checkpoint has \[96"
    ):
        load(damaged)
    edit_config(damaged, lambda c: c.update(intermediate_size=96, num_hidden_layers=2))
    with pytest.raises(AmqError, match="layers.2.* is not in this LlamaForCausalLM"):
        load(damaged)
    edit_config(damaged, lambda c: c["quantization_config"].update(version=99))
    with pytest.raises(AmqError, match="checkpoint version 99 is not known"):
        load(damaged)


def test_a_model_that_is_not_quantized(tiny_folder: Path) -> None:
    with pytest.raises(AmqError, match="not quantized: run `python -m amq.quantize`"):
        load(tiny_folder, AmqConfig())


def test_threads_share_one_model(folders: Callable[[str], Path]) -> None:
    """Weights are prepared when the first input comes, on whichever thread."""
    q = load(folders("qwen2")).get_submodule(QKV[0])
    inputs = [torch.randn(2, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [load(folders("qwen2")).get_submodule(QKV[0])(x) for x in inputs]

    def run(i: int) -> bool:
        return all(torch.equal(q(inputs[i]), expected[i]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile: no C++ compiler on PATH")
def test_compiled(folders: Callable[[str], Path]) -> None:
    """Without a graph break, once the weights are prepared; each linear is then a node of its own."""
    model = load(folders("qwen2"))
    qkv = [model.get_submodule(name) for name in QKV]

    def attend(x: Tensor) -> Tensor:
        q, k, v = (m(x) for m in qkv)
        return torch.cat([q, k * 2, v], dim=-1)

    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = attend(x)
        assert torch.allclose(torch.compile(attend, fullgraph=True, backend="eager")(x), expected, atol=1e-6)


def test_a_loaded_model_compiles(tmp_path: Path) -> None:
    """Whole, with weights that are prepared while it is traced, and at lengths that make its sizes symbolic."""
    folder = tiny_checkpoint(ARCHITECTURES["llama"].build(), tmp_path / "out")
    plain, compiled = load(folder), torch.compile(load(folder), backend="eager")
    with torch.no_grad():
        for length in (3, 5, 7):
            tokens = torch.arange(length).unsqueeze(0)
            assert torch.equal(compiled(tokens).logits, plain(tokens).logits)
